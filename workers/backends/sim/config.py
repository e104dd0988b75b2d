"""The configuration of a modelled engine."""

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
    """The cost of a step, in seconds.

    The defaults are calculated for an 8B model in bfloat16 on one H100, not measured.

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
            raise ValueError("The times of a modelled engine must not be negative.")

    def scaled(self, factor: float) -> SimTimes:
        """The times of an engine that takes `factor` times as long."""
        return SimTimes(**{f.name: factor * getattr(self, f.name) for f in fields(self)})

    @classmethod
    def zero(cls) -> SimTimes:
        """All times zero: calls cost nothing."""
        return cls(**{f.name: 0 for f in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """The configuration of a modelled engine.

    Attributes:
        kv_tokens: the capacity of the KV cache in tokens, rounded down to whole blocks.
        block_size: tokens in one block.
        max_num_batched_tokens: the token budget of one step. It also limits the calls that run at once.
        scheduler: fcfs (by arrival), priority (by class, level, arrival, without preemption) or plas (by the service of
            programs, with preemption: workers/scheduling/plas.py).
        plas, service_unit: the rules and the service unit of plas (workers/scheduling/service.py).
        max_model_len: the most tokens of one call, prompt and output; limited by the KV cache.
        eos_mean: the mean length of answers that end with EOS, in tokens; 0: answers always run to `max_tokens`.
        speed: modelled seconds per real second.
        die_on: failure injection: a call whose prompt has this text kills the engine when its first token is due.
        die_hard: with `die_on`, kills the whole process by SIGKILL, as a driver fault would.
        load_s: real seconds to start, in which the event loop is blocked, as it is while vLLM loads.
        stall_on: failure injection: a call whose prompt has this text makes the engine hang with all of its calls.
        hang_on: the same, but the whole event loop hangs.
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
            raise ValueError(
                "A modelled engine needs at least one slot, one block and one token per step; raise max_num_seqs, "
                "kv_tokens or max_num_batched_tokens."
            )
        if not isinstance(self.die_on, str):
            raise ValueError('die_on must be text; quote a value that is valid JSON, such as "1".')
        if self.max_len < 2 or self.eos_mean < 0 or not self.speed > 0:
            raise ValueError("A modelled engine needs max_model_len and kv_tokens >= 2, eos_mean >= 0 and speed > 0.")

    @property
    def num_blocks(self) -> int:
        return self.kv_tokens // self.block_size

    @property
    def slots(self) -> int:
        """Calls that run at once."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def max_len(self) -> int:
        """The effective limit on the tokens of one call: a call that never fits would preempt itself forever."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    @property
    def instant(self) -> bool:
        """Whether nothing takes any time."""
        return self.times == SimTimes.zero()


def config_of(args: Mapping[str, Any], **given: Any) -> SimConfig:
    """Creates a configuration from arguments: the fields of SimTimes and SimConfig, `instant` for calls that cost
    nothing, and `times_file`, the path of a file from `rsm calibrate`. Arguments override the values of the file.

    Args:
        given: defaults, for what is neither an argument nor in the file.

    Raises:
        ValueError, TypeError: an argument is unknown or wrong, or the file cannot be read.
    """
    more = dict(args)
    times, engine = read_times(Path(more.pop("times_file"))) if "times_file" in more else ({}, {})
    names = {f.name for f in fields(SimTimes)}
    times |= {name: more.pop(name) for name in names & more.keys()}
    found = SimTimes.zero() if more.pop("instant", False) else SimTimes(**times)
    return SimConfig(**(given | engine | more), times=found)


def read_times(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Reads `times` and `engine` from a file of `rsm calibrate`: fields of SimTimes and of SimConfig.

    Raises:
        ValueError: it cannot be read; the message says why.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return dict(read["times"]), dict(read.get("engine", {}))
    except OSError as e:
        raise ValueError(f"times_file {path} cannot be read: {e.strerror}.") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"times_file {path} was not written by `rsm calibrate` ({type(e).__name__}: {e}); run it to make one."
        ) from e
