"""Malformed input to every decoder that reads from Redis or HTTP. `make fuzz` does the same for longer."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.decoders import CUT, DECODERS, Decoder
from tests.fuzz.entries import pass_through
from tests.fuzz.run import LARGEST_BYTES, SLOWEST_S, Tally, feed, fuzz, peak_bytes

each = pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: d.name)
# Inputs for each decoder. More: RSM_FUZZ_INPUTS=100000.
INPUTS = int(os.environ.get("RSM_FUZZ_INPUTS", "600"))
# Without hypothesis's deadline, because the machine has other work.
relaxed = settings(deadline=None, database=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@each
def test_a_decoder_keeps_its_contract_on_damaged_inputs(decoder: Decoder) -> None:
    tally = fuzz(decoder, INPUTS)
    assert not tally.crashes, tally.crashes[:3]
    assert tally.inputs >= INPUTS
    assert tally.slowest_s < SLOWEST_S


@each
def test_a_decoder_keeps_its_contract_on_anything(decoder: Decoder) -> None:
    names = sorted({part for seed in decoder.seeds for part in seed.split(CUT)[::2] if len(part) < 20} | {b"n"})
    fields = st.lists(st.sampled_from(names) | st.binary(max_size=40), max_size=12).map(CUT.join)

    @relaxed
    @given(st.binary(max_size=300) | fields)
    def keeps(data: bytes) -> None:
        tally = Tally(decoder.name)
        feed(decoder, data, tally)
        assert not tally.crashes, tally.crashes

    keeps()


@each
def test_well_formed_input_is_read(decoder: Decoder) -> None:
    """Otherwise a decoder that refuses everything would pass."""
    tally = Tally(decoder.name)
    feed(decoder, decoder.seeds[0], tally)
    assert (tally.refused, tally.crashes) == (0, [])


@each
@pytest.mark.parametrize(
    "data",
    [
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa6prompt\xdd\xff\xff\xff\xff",
        b"\x81\xa6prompt\xdb\xff\xff\xff\xff",
        b"\x91" * 500_000,
        b"[" * 500_000,
        b'{"a":' * 100_000,
        b"data: x\n" * 60_000,
        b"9" * 500_000,
    ],
    ids=lambda data: repr(data[:12]),
)
def test_no_input_takes_unlimited_memory_or_time(decoder: Decoder, data: bytes) -> None:
    tally = Tally(decoder.name)
    feed(decoder, data, tally)
    assert not tally.crashes, tally.crashes
    assert tally.slowest_s < SLOWEST_S
    assert peak_bytes(decoder, data) < LARGEST_BYTES


def test_the_tally_distinguishes_a_crash_from_a_refusal() -> None:
    def read(data: bytes) -> Any:
        if data == b"refuse":
            raise ValueError
        raise KeyError

    decoder, tally = Decoder("none", read, (ValueError,), [b""]), Tally("none")
    feed(decoder, b"refuse", tally)
    feed(decoder, b"crash", tally)
    assert (tally.inputs, tally.refused, len(tally.crashes)) == (2, 1, 1)


def test_a_router_continues_after_malformed_entries() -> None:
    passage = pass_through(2000)
    assert passage.answered == passage.good == 4
    assert (passage.left, passage.pending) == (0, 0)
    assert passage.failed > 500, "most of them were malformed"
