"""Whatever a command is started with, an error is one message and an exit status."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rsm.broker import Client, Settings
from tests.support.rsm_command import RSM, Deployment, clean_env, run
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(240)

FULL = "Standard output cannot be written: No space left on device.\n"
CLOSED = "Standard output cannot be written: it is closed.\n"
# All of these print something.
PRINTING = [
    ["ps"], ["ps", "--json"], ["ps", "--watch"], ["engines"], ["sessions"], ["stats"], ["call", "printed"],
    ["doctor"], ["doctor", "--json"], ["dead", "ls"], ["dead", "show", "died"], ["cancel", "--session", "printed"],
    ["submit", "x", "--max-tokens", "2", "--no-stream"], ["submit", "x", "--max-tokens", "2", "--stream"],
    ["submit", "x", "--max-tokens", "2", "--json"], ["simulate", "--seconds", "2"], ["acl"], ["demo"], ["--help"],
    ["--version"], ["submit", "--help"], ["dead", "--help"], ["--show-completion"],
]  # fmt: skip


def in_shell(command: Sequence[str], redirection: str, env: dict[str, str]) -> tuple[int, str]:
    """Exit status and stderr."""
    shell = ["bash", "-c", f'"$@" {redirection}', "bash", RSM, *command]
    done = subprocess.run(shell, env=env, capture_output=True, text=True, timeout=120, check=False)
    for sign in ("Traceback", "Exception ignored", "Error:"):
        assert sign not in done.stderr, (command, done.stderr)
    return done.returncode, done.stderr


@pytest.fixture
def prepared(standing: Deployment, producer: Client) -> Deployment:
    """A deployment that gives each of the commands something to print."""
    producer.submit("x", id="printed", session="printed", max_tokens=2).result(20)
    if not producer.redis.xlen(producer.keys.dead):
        letter: Any = {"id": "died", "error_code": "engine_error", "error": "it died", "json": '{"prompt":"a"}'}
        producer.redis.xadd(producer.keys.dead, letter)
    return standing


def run_all(up: Deployment, redirection: str) -> dict[str, tuple[int, str]]:
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda command: in_shell(command, redirection, up.env), PRINTING)
        return {" ".join(command): result for command, result in zip(PRINTING, found, strict=True)}


@pytest.mark.parametrize(("redirection", "message"), [(">/dev/full", FULL), (">&-", CLOSED)])
def test_an_output_that_cannot_be_written(prepared: Deployment, redirection: str, message: str) -> None:
    expected = {" ".join(command): (1, message) for command in PRINTING}
    assert run_all(prepared, redirection) == expected


def test_a_reader_that_has_gone(prepared: Deployment) -> None:
    """The command ends silently, as if by SIGPIPE."""
    gone = "> >(exec true)"  # a process that reads nothing
    for command in (["ps"], ["sessions", "--json"], ["doctor"], ["--help"], ["simulate", "--seconds", "2"]):
        delayed = ["bash", "-c", f'exec {gone}; sleep 0.2; "$@"', "bash", RSM, *command]
        done = subprocess.run(delayed, env=prepared.env, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (141, ""), command


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_an_stderr_that_cannot_be_written(prepared: Deployment, redirection: str) -> None:
    assert in_shell(["call", "nix"], redirection, prepared.env)[0] == 1
    assert in_shell(["nix"], redirection, prepared.env)[0] == 2
    assert in_shell(["ps"], redirection, prepared.env)[0] == 0
    assert in_shell(["ps"], f"{redirection} >&- <&-", prepared.env)[0] == 1
    assert in_shell(["router", "--redis", "unix:///nowhere", "--namespace", "a b"], redirection, prepared.env)[0] == 1


def test_processes_that_serve_continue_without_an_output(settings: Settings, tmp_path: Path) -> None:
    env = clean_env() | settings.environment()
    worker = ["worker", "--engine-id", "w1", "--backend", "sim"]
    for command, sign in ((["router"], "serves"), (worker, "is ready"), (["sim-server", "--port", "0"], "started")):
        log = tmp_path / command[0]
        shell = ["bash", "-c", f'exec "$@" >/dev/full 2>{log}', "bash", RSM, *command]
        process = subprocess.Popen(shell, env=env)
        eventually(partial(says, log, sign))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    assert "Continuing without it." in (tmp_path / "sim-server").read_text()


def says(log: Path, words: str) -> bool:
    return log.exists() and words in log.read_text().lower()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["acl", "--passwords"], "The password file {} cannot be read"),
        (["simulate", "--workload"], "The workload {} cannot be read"),
        (["simulate", "--times-file"], "times_file {} cannot be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, command: list[str], message: str) -> None:
    garbage, missing = tmp_path / "garbage", tmp_path / "missing"
    garbage.write_bytes(b"\xff\xfe\x00")
    for path, why in ((missing, "No such file or directory"), (tmp_path, "Is a directory"), (garbage, "")):
        done = run(*command, str(path))
        assert done.returncode == 1
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert str(path) in done.stderr
        if why:
            assert f"{message.format(path)}: {why}." in done.stderr


def test_calibrate_refuses_a_file_that_cannot_be_written_before_it_measures(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "it is a folder"), (tmp_path / "no" / "x", f"there is no folder {tmp_path / 'no'}")):
        done = run("calibrate", "--out", str(path))
        assert (done.returncode, done.stderr) == (1, f"The figures cannot be written to {path}: {why}.\n")


def test_input_that_is_not_text(standing: Deployment) -> None:
    shell = f"printf '\\xff' | {RSM} submit -"
    done = subprocess.run(["bash", "-c", shell], env=standing.env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "The prompt on standard input cannot be read: it is not text in UTF-8.\n"
    assert in_shell(["submit", "-"], "<&-", standing.env)[0] == 1
    for command in (["submit"], ["call"], ["cancel", "x", "--reason"]):
        raw = [b"bash", b"-c", b'"$@"', b"bash", RSM.encode(), *(word.encode() for word in command), b"\xff"]
        done = subprocess.run(raw, env=standing.env, capture_output=True, text=True, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr


def test_a_terminal_that_cannot_show_a_character(standing: Deployment) -> None:
    """An ASCII locale, without Python's own workarounds."""
    plain = standing.env | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    prompt = "h\u00e9llo".encode()
    submit = [RSM.encode(), b"submit", prompt, b"--max-tokens", b"2"]
    done = subprocess.run(submit, env=plain, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    cancel = [RSM.encode(), b"cancel", b"--session", "\u2026\u2026".encode()]
    done = subprocess.run(cancel, env=plain, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"session must be 1 to 128 characters" in done.stderr
    assert done.stderr.isascii()


def test_json_is_json_in_any_encoding(standing: Deployment, producer: Client) -> None:
    call = producer.submit("x", session="any-encoding", max_tokens=50_000)
    call.cancel("caf\u00e9 \u2026")
    call.wait(20)
    for encoding in ("ascii", "latin-1", "utf-8"):
        env = standing.env | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([RSM, "call", call.id, "--json"], env=env, capture_output=True, check=True)
        assert json.loads(done.stdout.decode(encoding))["error"] == "caf\u00e9 \u2026"
        shown = subprocess.run([RSM, "call", call.id], env=env, capture_output=True, check=True)
        assert "caf" in shown.stdout.decode(encoding)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """An OSError that no code expects is one message, too."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = run("up", "--backend", "sim", env=clean_env() | {"RSM_DATA_DIR": str(blocker / "below")})
    assert done.returncode != 0
    assert str(blocker) in done.stderr
