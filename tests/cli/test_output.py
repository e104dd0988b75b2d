"""The `rsm` command in this process: formats, options, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner, Result

from rsm.broker import Client, Settings
from rsm.broker.connection.topology import shown_url
from rsm.broker.protocol.transitions import Transitions
from rsm.cli import app
from rsm.cli.app import hoist
from rsm.cli.checks import Check, examine
from rsm.cli.engine_options import pair
from rsm.cli.foreground import next_lines, redis_cli
from rsm.cli.output import seconds
from tests.support.fake_worker import FakeWorker


@pytest.fixture(autouse=True)
def _clean_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "NAMESPACE", "DATA_DIR", "LOG_LEVEL"):
        monkeypatch.delenv(f"RSM_{name}", raising=False)


def rsm(settings: Settings, *args: str) -> Result:
    return CliRunner().invoke(app, ["--redis", settings.url(), "--namespace", settings.namespace, *args])


@pytest.mark.parametrize(
    ("ms", "text"),
    [(-5, "0 ms"), (0, "0 ms"), (999, "999 ms"), (1500, "1.5 s"), (119_000, "119.0 s"), (600_000, "10 min")],
)
def test_seconds(ms: float, text: str) -> None:
    assert seconds(ms) == text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:pass@host:6379/2?password=pass", "redis://host:6379/2"),
        ("rediss://:p@ss@host", "rediss://host"),
        ("unix://user:pass@/tmp/a.sock?db=1", "unix:///tmp/a.sock"),
        ("redis://[bad", "redis://…"),
    ],
)
def test_a_printed_url_holds_no_secret(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_global_options_may_stand_anywhere() -> None:
    assert hoist(["ps", "--redis", "u", "--json"]) == ["--redis", "u", "ps", "--json"]
    assert hoist(["ps", "--namespace=a"]) == ["--namespace=a", "ps"]
    assert hoist(["submit", "--", "--redis", "u"]) == ["submit", "--", "--redis", "u"]
    assert hoist(["ps", "--redis"]) == ["--redis", "ps"]


def test_engine_args_are_json_or_text() -> None:
    assert [pair(p) for p in ("a=1", "b-c=true", "d=x=y", "e=")] == [("a", 1), ("b_c", True), ("d", "x=y"), ("e", "")]


def test_next_lines_work_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    settings = Settings().with_redis("redis://u:geheim@host:1/0", "ns")
    lines = next_lines(settings, embedded=False)
    assert "geheim" not in str(lines)
    assert "export RSM_NAMESPACE=ns" in lines
    body = '\'{"prompt":"hi","max_tokens":8}\''
    assert f"redis-cli -u redis://host:1/0 XADD '{{ns}}:calls' '*' id c1 session s1 json {body}" in lines
    assert redis_cli(Settings().with_redis("unix:///a b/redis.sock")) == "redis-cli -s '/a b/redis.sock'"


def test_next_lines_of_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    lines = next_lines(Settings(redis_url=None, data_dir=Path("/var/lib/rsm")), embedded=True)
    assert lines[0] == "export RSM_DATA_DIR=/var/lib/rsm"


def test_only_json_on_stdout(settings: Settings, client: Client, transitions: Transitions) -> None:
    worker = FakeWorker(settings, "e1").up()
    handle = client.submit("never shown", session="s")
    for args in (["ps"], ["engines"], ["sessions"], ["stats"], ["call", handle.id], ["dead", "ls"]):
        result = rsm(settings, *args, "--json")
        assert result.exit_code == 0, result.output
        json.loads(result.stdout)
        assert "never shown" not in result.stdout
        assert rsm(settings, *args).exit_code == 0
    assert json.loads(rsm(settings, "call", handle.id, "--json").stdout)["state"] == "PENDING"
    assert rsm(settings, "drain", "e1").exit_code == 0
    handle.cancel()
    worker.close()


def test_an_error_is_one_message(settings: Settings) -> None:
    cases = {
        ("call", "nix"): (1, "There is no call nix."),
        ("call", "no/id"): (1, "id must be"),
        ("drain", "e9"): (1, "There is no live engine e9. Known engines: none."),
        ("dead", "show", "nix"): (1, "There is no dead letter nix"),
        ("submit", "x", "--priority", "999"): (1, "priority"),
    }
    for args, (status, message) in cases.items():
        result = rsm(settings, *args)
        assert result.exit_code == status, result.output
        assert message in result.stderr
        assert "Traceback" not in result.output


def test_wrong_options() -> None:
    runner = CliRunner()
    for args in (
        ["--redis", "http://u:geheim@h", "ps"],
        ["--redis", "redis://h:geheim", "ps"],
        ["--log-level", "x", "ps"],
    ):
        result = runner.invoke(app, args)
        assert result.exit_code == 2
        assert "geheim" not in result.output
    assert runner.invoke(app, ["--namespace", "a b", "ps"]).exit_code == 1
    assert runner.invoke(app, ["ps"], env={"RSM_LEASE_MS": "geheim"}).exit_code == 2
    assert runner.invoke(app, ["--version"]).stdout.startswith("rsm-engine ")
    assert "rsm demo" in runner.invoke(app, ["--help"]).stdout
    assert runner.invoke(app, ["demo", "--backend", "openai"]).exit_code == 1


def test_no_redis_is_status_2() -> None:
    result = CliRunner().invoke(app, ["--redis", "unix:///nowhere.sock", "engines"])
    assert result.exit_code == 2
    assert "rsm up" in result.stderr
    report = CliRunner().invoke(app, ["--redis", "unix:///nowhere.sock", "doctor", "--json"])
    assert report.exit_code == 1
    assert [c["name"] for c in json.loads(report.stdout)["checks"]] == ["redis"]


# -- doctor


def found(settings: Settings) -> dict[str, Check]:
    return {check.name: check for check in examine(settings)}


def test_doctor_reports_missing_routers_and_engines(settings: Settings, db: redis.Redis) -> None:
    checks = found(settings)
    assert {name for name, c in checks.items() if c.status == "problem"} == {"routers", "engines"}
    worker = FakeWorker(settings, "e1").up()
    assert found(settings)["engines"].status == "ok"
    stale: Any = {"e1": 1}
    db.zadd(worker.keys.engines, stale)
    assert "e1 has sent no heartbeat for" in found(settings)["engines"].detail
    worker.close()


def test_doctor_reports_a_backlog_and_dead_routers(settings: Settings, db: redis.Redis, client: Client) -> None:
    keys: Any = client.keys
    db.xgroup_create(keys.calls, "router", id="0", mkstream=True)
    assert "none is alive" in found(settings)["routers"].detail
    old = db.xadd(keys.calls, {"id": "x"}, id="1000-0")
    checks = found(settings)
    assert checks["backlog"].status == "problem"
    db.xdel(keys.calls, old)
    db.xadd(keys.dead, {"id": "x"})
    assert found(settings)["dead letters"].status == "warning"


def test_doctor_checks_the_server(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    info: dict[str, Any] = {
        "redis_version": "6.2.7", "aof_enabled": 0, "maxmemory_policy": "allkeys-lru", "maxmemory": 100,
        "used_memory": 9,
    }  # fmt: skip
    monkeypatch.setattr(redis.Redis, "info", lambda *_: info)
    monkeypatch.setattr(redis.Redis, "time", lambda _: (1000, 0))
    checks = found(settings)
    assert {checks[n].status for n in ("version", "persistence", "memory")} == {"problem"}
    assert checks["clock"].status == "warning"
    info |= {"aof_enabled": 1, "aof_last_write_status": "err", "maxmemory_policy": "noeviction", "used_memory": 90}
    info |= {"redis_version": "7.2.4", "valkey_version": "8.0.1"}
    checks = found(settings)
    assert checks["version"] == Check("version", "ok", "Valkey 8.0.1.")
    assert checks["persistence"].status == "problem"
    assert checks["memory"].status == "warning"
