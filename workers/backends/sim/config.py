"""What engine to model, and how fast it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rsm.workers.scheduling.plas import PlasRules

SchedulerName = Literal["fcfs", "priority", "plas"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimTimes:
    """What a step costs, in seconds.

    The defaults are sums for an 8B model in bfloat16 on one H100, not measurements.

    Attributes:
        step_s: every step: 16 GB of weights at 3.35 TB/s, and launching the kernels.
        prefill_token_s: each prompt token: 16 GFLOP at 450 TFLOP/s.
        decode_seq_s: each call that decodes: sampling and bookkeeping.
        context_token_s: each token of context read: 128 KiB of KV cache at 3.35 TB/s.
        prefill_pair_s: each pair of a prompt token and one before it, for attention: 0.52 MFLOP at 450 TFLOP/s.
    """

    step_s: float = 0.006
    prefill_token_s: float = 36e-6
    decode_seq_s: float = 20e-6
    context_token_s: float = 40e-9
    prefill_pair_s: float = 1.2e-9

    def __post_init__(self) -> None:
        if min(astuple(self)) < 0:
            raise ValueError("The times of a simulated engine must not be negative.")

    def scaled(self, factor: float) -> SimTimes:
        """Of an engine that takes so many times as long."""
        return SimTimes(**{f.name: factor * getattr(self, f.name) for f in fields(self)})

    @classmethod
    def zero(cls) -> SimTimes:
        """All times zero: calls that cost nothing."""
        return cls(**{f.name: 0 for f in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """What engine to model.

    Attributes:
        kv_tokens: capacity of the KV cache in tokens, rounded down to whole blocks.
        block_size: tokens in one block.
        max_num_batched_tokens: token budget of one step; no more calls run than that, whatever max_num_seqs is.
        scheduler: fcfs (by arrival), priority (by class, level, arrival; whoever runs, runs on), plas (programs by
            their service, with preemption: workers/scheduling/plas.py).
        plas, service_unit: the rules of that scheduler, and what it counts (workers/scheduling/service.py).
        max_model_len: most tokens of one call, prompt and output; never more than the KV cache holds.
        eos_mean: mean length, in tokens, at which an answer ends by itself; 0: never, it runs to `max_tokens`.
        speed: how many modelled seconds pass in one real second.
        die_on: failure injection: a call whose prompt has this text takes the engine down, when its first token is due.
        die_hard: so it takes the whole process down, by SIGKILL, as a fault in a driver would.
        load_s: real seconds it takes to come up, in which the event loop stands still, as it does while vLLM loads.
        stall_on: failure injection: a call whose prompt holds this text makes the engine stand still for ever, and all
            its calls with it; "" = none.
        hang_on: the same, but the whole event loop stands still.
    """

    model: str = "sim-8b"
    max_num_seqs: int = 256
    kv_tokens: int = 400_000
    block_size: int = 16
    max_num_batched_tokens: int = 8192
    max_model_len: int = 131_072
    prefix_caching: bool = True
    scheduler: SchedulerName = "priority"
    plas: PlasRules = field(default_factory=PlasRules)
    service_unit: str = "tokens"
    eos_mean: int = 0
    times: SimTimes = field(default_factory=SimTimes)
    speed: float = 1.0
    die_on: str = ""
    die_hard: bool = False
    load_s: float = 0.0
    stall_on: str = ""
    hang_on: str = ""

    def __post_init__(self) -> None:
        if min(self.max_num_seqs, self.block_size, self.num_blocks, self.max_num_batched_tokens) < 1:
            raise ValueError("A simulated engine needs at least one slot, one block and one token a step.")
        if not isinstance(self.die_on, str):
            raise ValueError("die_on is a text; one that reads as JSON needs quotation marks of its own.")
        if self.max_len < 2 or self.eos_mean < 0 or not self.speed > 0:
            raise ValueError("A simulated engine needs room for two tokens, eos_mean >= 0 and speed > 0.")

    @property
    def num_blocks(self) -> int:
        return self.kv_tokens // self.block_size

    @property
    def slots(self) -> int:
        """Calls that run at once."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def max_len(self) -> int:
        """Most tokens of one call, in effect: a call that could never fit would preempt itself for ever."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    @property
    def instant(self) -> bool:
        """Nothing takes any time."""
        return self.times == SimTimes.zero()


def config_of(args: Mapping[str, Any], **given: Any) -> SimConfig:
    """A configuration of loose arguments: the fields of SimTimes and SimConfig, `instant` for calls that cost nothing,
    and `times_file`, what `rsm calibrate` wrote: its figures hold where no argument says otherwise.

    Args:
        given: what holds where neither does.

    Raises:
        ValueError, TypeError: an argument is unknown or makes no sense, or the file cannot be read.
    """
    more = dict(args)
    times, engine = read_times(Path(more.pop("times_file"))) if "times_file" in more else ({}, {})
    names = {f.name for f in fields(SimTimes)}
    times |= {name: more.pop(name) for name in names & more.keys()}
    found = SimTimes.zero() if more.pop("instant", False) else SimTimes(**times)
    return SimConfig(**(given | engine | more), times=found)


def read_times(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The `times` and the `engine` of a file that `rsm calibrate` wrote: fields of SimTimes and of SimConfig.

    Raises:
        ValueError: it cannot be read; the message says why.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return dict(read["times"]), dict(read.get("engine", {}))
    except OSError as e:
        raise ValueError(f"times_file {path} cannot be read: {e.strerror}.") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"times_file {path} is not what `rsm calibrate` writes: {type(e).__name__}: {e}") from e
