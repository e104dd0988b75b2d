"""The paths of a program's prompts. Most prompts extend an earlier one, so a path starts from the longest known one."""

from __future__ import annotations

from typing import NamedTuple

from rsm.simulation.workload.programs import Segment
from rsm.workers.backends.sim.cache import Path, PathBuilder

# The most texts by which a prompt may extend a known path.
_NEW_TEXTS = 4


class _Known(NamedTuple):
    texts: tuple[Segment, ...]
    builder: PathBuilder


class Paths:
    """The paths of one program. They equal `path_of_texts` of the whole prompt and its answer."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._known: dict[tuple[int, Segment], _Known] = {}  # by the number of texts and the last of them

    def path(self, prompt: tuple[Segment, ...], answer: Segment) -> tuple[Path, int]:
        """The path of a prompt with its answer, and the number of prompt tokens."""
        builder = self._longest(prompt)
        tokens = builder.tokens
        self._keep(prompt, builder.copy())
        builder.add((answer,))
        self._keep((*prompt, answer), builder)
        return builder.path, tokens

    def _longest(self, prompt: tuple[Segment, ...]) -> PathBuilder:
        for n in range(len(prompt), max(0, len(prompt) - _NEW_TEXTS), -1):
            known = self._known.get((n, prompt[n - 1]))
            if known is not None and known.texts == prompt[:n]:
                builder = known.builder.copy()
                builder.add(prompt[n:])
                return builder
        builder = PathBuilder(self._size)
        builder.add(prompt)
        return builder

    def _keep(self, texts: tuple[Segment, ...], builder: PathBuilder) -> None:
        self._known[len(texts), texts[-1]] = _Known(texts, builder)
