"""Runs decoders on malformed inputs and counts the outcomes."""

from __future__ import annotations

import random
import time
import tracemalloc
import zlib
from dataclasses import dataclass, field

from tests.fuzz.decoders import Decoder
from tests.fuzz.mutate import mutants

# The most time for one input of a few kilobytes: far more than any needs, because the machine may be busy.
SLOWEST_S = 2.0
LARGEST_BYTES = 64 << 20


@dataclass(slots=True)
class Tally:
    """The outcome for one decoder. `crashes`: inputs whose error is not in the contract."""

    name: str
    inputs: int = 0
    refused: int = 0
    crashes: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


def fuzz(decoder: Decoder, inputs: int, seed: int = 0) -> Tally:
    """Runs the decoder on `inputs` mutants, and on the seeds themselves."""
    tally = Tally(decoder.name)
    rng = random.Random(zlib.crc32(decoder.name.encode()) + seed)
    for data in decoder.seeds:
        feed(decoder, data, tally)
    for _, data in zip(range(inputs - len(decoder.seeds)), mutants(decoder.seeds, rng), strict=False):
        feed(decoder, data, tally)
    return tally


def feed(decoder: Decoder, data: bytes, tally: Tally) -> None:
    began = time.perf_counter()
    try:
        decoder.read(data)
    except decoder.contract:
        tally.refused += 1
    except Exception as e:
        tally.crashes.append(f"{type(e).__name__}: {e} on {data[:200]!r}")
    tally.inputs += 1
    tally.slowest_s = max(tally.slowest_s, time.perf_counter() - began)


def peak_bytes(decoder: Decoder, data: bytes) -> int:
    """The memory that reading one input takes at its peak."""
    tracemalloc.start()
    try:
        feed(decoder, data, Tally(decoder.name))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
