"""`rsm.yaml`: the description of a fleet."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest

from rsm.broker import InvalidRequest
from rsm.engine.fleet_file import read_fleet
from rsm.workers.config import EngineConfig
from tests.support.paths import ROOT

OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")

WHOLE = """
settings:
  namespace: prod
  level_bounds: [10, 20]
  lease_ms: 3000
routers: 2
engines:
  - {engine_id: e0, backend: sim, max_num_seqs: 4, engine_args: {step_s: 0.02}}
  - engine_id: far
    backend: openai
    base_url: http://host:8000/v1
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "rsm.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    fleet = read_fleet(write(tmp_path, WHOLE))
    assert (fleet.routers, [e.engine_id for e in fleet.engines]) == (2, ["e0", "far"])
    assert fleet.engines[0].engine_args == {"step_s": 0.02}
    assert "max_num_seqs" not in fleet.engines[1].model_fields_set, "so the server is asked"
    settings = fleet.applied()
    assert (settings.namespace, settings.level_bounds, settings.lease_ms) == ("prod", (10, 20), 3000)


def test_the_example_of_the_docs_is_a_fleet(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", OPERATIONS, re.DOTALL)
    fleet = read_fleet(write(tmp_path, example))
    assert {e.backend for e in fleet.engines} == {"vllm", "openai"}
    assert not [(a, b) for a, b in combinations(fleet.engines, 2) if a.shares_gpu_with(b)], "each has its own GPUs"
    settings = fleet.applied()
    assert (settings.namespace, settings.policy, settings.lease_ms) == ("prod", "cost", 3000)


def test_the_docs_name_every_field_of_an_engine() -> None:
    section = OPERATIONS.partition("\n### A fleet in a file\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    named = [name for names, *_ in rows for name in names.strip("`").split("`, `")]
    assert sorted(named) == sorted(EngineConfig.model_fields)


def test_the_environment_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSM_NAMESPACE", "mine")
    settings = read_fleet(write(tmp_path, WHOLE)).applied()
    assert (settings.namespace, settings.lease_ms) == ("mine", 3000)


def test_an_empty_file_is_a_fleet_without_engines(tmp_path: Path) -> None:
    assert read_fleet(write(tmp_path, "")).engines == []


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("engines: [{backend: sim}]", r"does not describe a fleet: engines\.0\.engine_id: Field required"),
        ("engines: [{engine_id: a b, backend: sim}]", r"engines\.0\.engine_id: .*1 to 128 characters"),
        ("engine: []", "engine: Extra inputs are not permitted"),
        (
            "engines: [{engine_id: e, backend: sim}, {engine_id: e, backend: sim}]",
            "engine_id e is used twice; give each engine an id of its own",
        ),
        ("settings: {leese_ms: 3}", "settings has no leese_ms"),
        ("routers: 0", "routers: Input should be greater than or equal to 1"),
        ("engines: [\n", r"cannot be read as YAML \(ParserError, line 2\)"),
        ("- just\n- a list", "rsm.yaml"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        ("!!python/object/apply:os.system ['true']", r"cannot be read as YAML \(ConstructorError"),
    ],
)
def test_the_error_says_what_is_wrong(tmp_path: Path, text: str | bytes, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        read_fleet(write(tmp_path, text))


def test_the_error_for_a_wrong_setting_omits_its_value(tmp_path: Path) -> None:
    fleet = read_fleet(write(tmp_path, "settings: {lease_ms: geheim}"))
    with pytest.raises(ValueError, match="lease_ms") as caught:
        fleet.applied()
    assert "geheim" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"There is no file .*none\.yaml"):
        read_fleet(tmp_path / "none.yaml")
