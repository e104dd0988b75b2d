"""Logs every step of a vLLM engine for `rsm calibrate`: what was planned, the planning time, and when its tokens came.

`make_scheduler` is a factory for vLLM's `scheduler_cls`. It creates the scheduler named by `steps_scheduler` (a class
or factory, as in `scheduler_cls`; default: vLLM's own) and times two of its methods. A thread writes the rows to the
file `steps_file`, so that the engine's loop does not wait for a disk. A second file describes the engine (`described`).
Both names are in vLLM's `additional_config` under "rsm".
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from rsm.workers.backends.vllm.guard import CONFIG_KEY, create, setting

FACTORY = "rsm.workers.backends.vllm.steps.make_scheduler"
SCHEDULER, FILE = "steps_scheduler", "steps_file"
EVERY_S = 0.5


@dataclass(slots=True)
class Step:
    """One step of an engine. Times are on the monotonic clock, in seconds.

    Attributes:
        planned_from, planned_to: around `schedule`.
        done_from, done_to: around `update_from_output`; asynchronous scheduling plans later steps in between.
        prefill_tokens, prefill_calls: prompt tokens computed, and the number of their calls.
        prefill_pairs: pairs of such a token and an earlier one of the same call: the work of attention.
        decode_seqs: calls that get one more token.
        context_tokens: tokens that all of these calls have computed before.
        running, waiting: calls after the planning.
        preempted: calls that ran before the planning and wait after it.
        left: calls that are not done at the end of this step.
    """

    planned_from: float = 0.0
    planned_to: float = 0.0
    done_from: float = 0.0
    done_to: float = 0.0
    prefill_tokens: int = 0
    prefill_calls: int = 0
    prefill_pairs: int = 0
    decode_seqs: int = 0
    context_tokens: int = 0
    running: int = 0
    waiting: int = 0
    preempted: int = 0
    left: int = 0


def make_scheduler(*args: Any, **kwargs: Any) -> Any:
    """The scheduler factory that vLLM calls in place of a class, with the same arguments."""
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    scheduler = create(setting(config, SCHEDULER), *args, **kwargs)
    Log(scheduler, Path(setting(config, FILE)))
    return scheduler


def logged(file: Path, scheduler: str = "") -> dict[str, Any]:
    """vLLM's `additional_config` that logs the steps of an engine to a file."""
    return {CONFIG_KEY: {FILE: str(file), SCHEDULER: scheduler}}


def read(file: Path) -> Iterator[Step]:
    """The steps of a log, in the order of their ends."""
    with file.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                yield Step(*json.loads(line))


def described(file: Path) -> dict[str, int]:
    """The engine that wrote this log, as fields of SimConfig."""
    read: dict[str, int] = json.loads(file.with_suffix(".json").read_text())
    return read


def _description(scheduler: Any) -> dict[str, int]:
    size: int = scheduler.block_size
    return {
        "max_num_seqs": scheduler.max_num_running_reqs,
        "max_num_batched_tokens": scheduler.max_num_scheduled_tokens,
        "max_model_len": scheduler.max_model_len,
        "block_size": size,
        "kv_tokens": scheduler.kv_cache_config.num_blocks * size,
    }


class Log:
    """Wraps two methods of one scheduler and logs their calls."""

    def __init__(self, scheduler: Any, file: Path) -> None:
        self._scheduler = scheduler
        self._schedule, self._update = scheduler.schedule, scheduler.update_from_output
        self._open: dict[int, Step] = {}
        self._rows: list[Step] = []
        file.with_suffix(".json").write_text(json.dumps(_description(scheduler)))
        self._file = file.open("a")
        scheduler.schedule, scheduler.update_from_output = self.schedule, self.update
        threading.Thread(target=self._write, name="step-log", daemon=True).start()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        before = {r.request_id for r in self._scheduler.running}
        step = Step(planned_from=time.monotonic())
        output = self._schedule(*args, **kwargs)
        step.planned_to = time.monotonic()
        self._describe(step, output, before)
        self._open[id(output)] = step
        return output

    def update(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        found = self._update(output, *args, **kwargs)
        ended = time.monotonic()
        if (step := self._open.pop(id(output), None)) is not None:
            step.done_from, step.done_to, step.left = began, ended, len(self._scheduler.requests)
            self._rows.append(step)
        return found

    def _describe(self, step: Step, output: Any, before: set[str]) -> None:
        requests = self._scheduler.requests
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = requests[request_id]
            computed = request.num_computed_tokens - tokens  # it already includes this step
            step.context_tokens += computed
            if tokens == 1 and computed >= request.num_prompt_tokens:
                step.decode_seqs += 1
            else:
                step.prefill_calls += 1
                step.prefill_tokens += tokens
                step.prefill_pairs += tokens * (2 * computed + tokens) // 2
        after = {r.request_id for r in self._scheduler.running}
        step.running = len(after)
        step.waiting = len(self._scheduler.waiting)
        step.preempted = len((before & requests.keys()) - after)

    def flush(self) -> None:
        """Writes the finished rows to the file."""
        rows, self._rows = self._rows, []
        self._file.writelines(json.dumps(astuple(row)) + "\n" for row in rows)
        self._file.flush()

    def _write(self) -> None:
        while True:
            time.sleep(EVERY_S)
            self.flush()
