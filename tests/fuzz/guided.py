"""One decoder under atheris, whose mutants follow the code's branches: `python -m tests.fuzz.guided NAME -runs=100000`.

Atheris comes with `pip install -r requirements/fuzz.txt`; options after the name are libFuzzer's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rsm.broker", "rsm.router", "rsm.workers"]):
    from tests.fuzz.decoders import DECODERS

# Git ignores it. Each run starts from the findings of the last one.
_CORPORA = Path(".hypothesis") / "fuzz"


def main() -> None:
    names = {decoder.name: decoder for decoder in DECODERS}
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"Name one of: {', '.join(names)}")
    decoder = names[sys.argv[1]]

    def test_one(data: bytes) -> None:
        try:
            decoder.read(data)
        except decoder.contract:
            return

    corpus = _CORPORA / decoder.name.replace(" ", "-")
    corpus.mkdir(parents=True, exist_ok=True)
    for n, seed in enumerate(decoder.seeds):
        (corpus / str(n)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(corpus)], test_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
