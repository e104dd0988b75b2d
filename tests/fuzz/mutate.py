"""Makes malformed inputs from well-formed ones, deterministically for a seed of the generator."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

# Values that often break decoders.
_SPECIAL = [
    b"", b"\x00", b"\xff", b"-1", b"0", b"1e999", b"nan", b"-inf", b"9" * 5000, b"1_0", "١٢".encode(), b"{", b"[[[[",
    b'"', b"\\ud800", b"null", b"true", b"[]", b"{}", b'{"a":', b"\xd6\xff\x00\x00\x00\x01", b"\xc7\x0c\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc1", b"\x81\xa1a", b"\n", b"\r", b"\r\n\r\n", b":events", b"}", b" ", b"%s%n", b"..", b"\x00state\x00RUNNING",
    b"\x00n\x00x", b"NaN", b"1" * 400, b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"$(id)", b"@", b"://", b"?db=x",
]  # fmt: skip
_MOST = 4096


def mutants(seeds: Sequence[bytes], rng: random.Random) -> Iterator[bytes]:
    """An endless series of damaged copies of the seeds, and sometimes of random bytes."""
    while True:
        data = rng.choice(seeds) if rng.random() < 0.95 else rng.randbytes(rng.randrange(64))
        for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
            data = _damage(data, rng)
        yield data


def _damage(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.choice((0, 1, 1, 2, 8, 64)))
    how = rng.randrange(6)
    if how == 0:  # another byte
        return data[:at] + rng.randbytes(1) + data[at + 1 :]
    if how == 1:  # something left out
        return data[:at] + data[to:]
    if how == 2:  # cut off
        return data[:at]
    if how == 3:  # something twice, or moved elsewhere
        where = rng.randrange(len(data) + 1)
        return (data[:where] + data[at:to] * rng.choice((1, 1, 2, 30)) + data[where:])[:_MOST]
    if how == 4:  # one bit
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :] if at < len(data) else data
    return (data[:at] + rng.choice(_SPECIAL) + data[to:])[: 2 * _MOST]
