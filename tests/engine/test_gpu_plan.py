"""Which GPU each engine gets. No GPU can be had here: what stands in for them is their list."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rsm.broker import InvalidRequest
from rsm.engine import gpu_plan
from rsm.engine.gpu_plan import Place, places
from rsm.workers.backends.vllm.start import gpus


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    count: int = request.param
    monkeypatch.setattr(gpu_plan, "on_gpu", lambda: count > 0)
    monkeypatch.setattr(gpu_plan, "visible_gpus", lambda: tuple(map(str, range(count))))
    return count


@pytest.mark.parametrize("there", [0], indirect=True)
def test_on_the_cpu_any_number_starts(there: int) -> None:
    assert len(places(5)) == 5
    assert all(not place.engine_args for place in places(5, share=True))


@pytest.mark.parametrize("there", [4], indirect=True)
def test_each_has_gpus_of_its_own(there: int) -> None:
    assert places(4) == [Place(0), Place(1), Place(2), Place(3)]
    assert places(2, 2) == places(2, 2, share=True) == [Place(0), Place(2)]


@pytest.mark.parametrize("there", [1], indirect=True)
def test_too_few_is_a_sentence(there: int) -> None:
    with pytest.raises(InvalidRequest, match=r"2 engines need 2 GPUs, and this machine has 1\. Start 1 .*--share-gpus"):
        places(2)
    with pytest.raises(InvalidRequest, match="An engine can have at most 1"):
        places(1, 2, share=True)


@pytest.mark.parametrize("there", [2], indirect=True)
def test_those_that_share_get_a_part_of_the_memory(there: int) -> None:
    made = places(3, share=True)
    assert [place.gpu_id for place in made] == [0, 1, 0]
    assert [place.engine_args for place in made] == [{"gpu_memory_utilization": 0.45}] * 3


def test_those_that_a_job_scheduler_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.visible_gpus.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert gpus.visible_gpus() == ("3", "5")
    gpus.visible_gpus.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.visible_gpus() == ()
    gpus.visible_gpus.cache_clear()


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
