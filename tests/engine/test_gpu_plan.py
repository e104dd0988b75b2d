"""The GPUs of each engine. No GPU is needed: their list is faked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rsm.broker import InvalidRequest
from rsm.engine import gpu_plan
from rsm.engine.gpu_plan import Place, places
from rsm.workers.backends.vllm.start import gpus


@pytest.fixture
def gpu_count(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    count: int = request.param
    monkeypatch.setattr(gpu_plan, "on_gpu", lambda: count > 0)
    monkeypatch.setattr(gpu_plan, "visible_gpus", lambda: tuple(map(str, range(count))))
    return count


@pytest.mark.parametrize("gpu_count", [0], indirect=True)
def test_on_the_cpu_any_number_starts(gpu_count: int) -> None:
    assert len(places(5)) == 5
    assert all(not place.engine_args for place in places(5, share=True))


@pytest.mark.parametrize("gpu_count", [4], indirect=True)
def test_each_has_gpus_of_its_own(gpu_count: int) -> None:
    assert places(4) == [Place(0), Place(1), Place(2), Place(3)]
    assert places(2, 2) == places(2, 2, share=True) == [Place(0), Place(2)]


@pytest.mark.parametrize("gpu_count", [1], indirect=True)
def test_too_few_gpus_give_an_error_message(gpu_count: int) -> None:
    with pytest.raises(InvalidRequest, match=r"2 engines need 2 GPUs, and this machine has 1\. Start 1 .*--share-gpus"):
        places(2)
    with pytest.raises(InvalidRequest, match="An engine can have at most 1"):
        places(1, 2, share=True)


@pytest.mark.parametrize("gpu_count", [2], indirect=True)
def test_engines_that_share_a_gpu_get_part_of_its_memory(gpu_count: int) -> None:
    made = places(3, share=True)
    assert [place.gpu_id for place in made] == [0, 1, 0]
    assert [place.engine_args for place in made] == [{"gpu_memory_utilization": 0.45}] * 3


def test_gpus_chosen_by_a_job_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.visible_gpus.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert gpus.visible_gpus() == ("3", "5")
    gpus.visible_gpus.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.visible_gpus() == ()
    gpus.visible_gpus.cache_clear()


def test_gpus_counted_by_the_drivers_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gpus.visible_gpus.cache_clear()
    assert gpus.visible_gpus() == ("0", "1")
    tool.write_text("#!/bin/sh\nexit 9\n")
    gpus.visible_gpus.cache_clear()
    assert gpus.visible_gpus() == ()
    gpus.visible_gpus.cache_clear()
