"""The paper's workloads as programs: chat, ReAct, tree search, and their mix.

Calls per program, new prompt tokens per call and output tokens per call have the means that the paper gives for
ShareGPT, BFCL and LATS on HotpotQA (section 6 of arXiv 2502.13965), and its maxima where it gives them. The rest is
assumed here:

- "Prefill tokens per call" are taken as the tokens that a call adds to its program's context. They cannot be whole
  prompts: by its third turn a conversation with answers of 277 tokens is longer than the paper's 256 tokens. So
  contexts grow: a call's prompt is the shared system prompt, all previous turns, and its new tokens.
- The deviations, the lengths of the system prompts, and the delays by people and tools between calls.

Programs arrive as a Poisson process. A program depends only on the seed and its number. At another rate the same
programs arrive at other times, so rates, like systems, are compared on the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from math import log, sqrt
from random import Random

from bench.programs.workloads.lengths import Lengths
from rsm.simulation.workload.programs import CallSpec, ProgramSpec, Segment

# Texts below this number are shared between programs (system prompts); each program owns a range of this size above.
_OWN_TEXTS = 1_000_000
KINDS = ("chat", "react", "tree")


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of one kind of program: `calls` per program (tree: rounds), tokens, and the mean delay in seconds."""

    system: Segment
    calls: Lengths
    new: Lengths
    output: Lengths
    delay_s: float


SHAPES = {
    "chat": Shape(
        system=Segment(1, 256),
        calls=Lengths(6.66, 1.1, 1, 80),
        new=Lengths(256, 1.2, 4, 4096),
        output=Lengths(277, 0.8, 4, 2048),
        delay_s=10.0,
    ),
    "react": Shape(
        system=Segment(2, 1024),
        calls=Lengths(10.75, 0.7, 1, 70),
        new=Lengths(735, 0.8, 16, 8192),
        output=Lengths(34, 0.7, 4, 512),
        delay_s=1.0,
    ),
    "tree": Shape(
        system=Segment(3, 768),
        calls=Lengths(15.97, 0.5, 2, 50),
        new=Lengths(467, 0.5, 32, 4096),
        output=Lengths(73, 0.6, 4, 512),
        delay_s=0.5,
    ),
}
# LATS (Zhou et al., 2024) on HotpotQA: children per node, maximum depth, and the exploration weight of UCT.
_WIDTH, _DEPTH, _EXPLORE = 5, 7, 1.0


@dataclass(slots=True)
class Draft:
    """A program under construction: its calls so far, and the numbers for its texts."""

    shape: Shape
    rng: Random
    texts: Iterator[int]
    calls: list[CallSpec] = field(default_factory=list)

    def call(self, context: tuple[Segment, ...], after: tuple[int, ...], delay_s: float = 0.0) -> tuple[Segment, ...]:
        """Adds a call that extends a context; returns the context with its prompt and its answer."""
        prompt = (*context, Segment(next(self.texts), self.shape.new.draw(self.rng)))
        output, answer = self.shape.output.draw(self.rng), next(self.texts)
        self.calls.append(CallSpec(prompt, output, answer, after, delay_s))
        return (*prompt, Segment(answer, output))

    def pause(self) -> float:
        """Draws the delay of a person or a tool, in seconds."""
        return self.rng.expovariate(1 / self.shape.delay_s)


def conversation(draft: Draft) -> None:
    """Adds sequential calls, with a person's turns (chat) or a tool's results (ReAct) between them."""
    context: tuple[Segment, ...] = (draft.shape.system,)
    for n in range(draft.shape.calls.draw(draft.rng)):
        context = draft.call(context, (n - 1,) if n else (), draft.pause() if n else 0.0)


@dataclass(slots=True)
class _Node:
    """A state of the search: the context on the way to it, and the value of the searches below it."""

    context: tuple[Segment, ...]
    depth: int
    parent: _Node | None
    children: list[_Node] = field(default_factory=list)
    value: float = 0.0
    visits: int = 0

    def descend(self) -> _Node:
        """Returns the leaf that UCT chooses: at each node the child with the best mean value plus exploration."""
        if not self.children:
            return self
        scale = _EXPLORE * sqrt(log(self.visits + 1))
        return max(self.children, key=lambda c: c.value / c.visits + scale / sqrt(c.visits)).descend()

    def credit(self, value: float) -> None:
        self.value, self.visits = self.value + value, self.visits + 1
        if self.parent is not None:
            self.parent.credit(value)


def tree_search(draft: Draft) -> None:
    """Adds a Monte Carlo tree search like that of LATS.

    A round selects a leaf, tries five steps from it in parallel, runs a tool for each, and judges each by another call.
    The next round needs all five judgements.
    """
    root = _Node((draft.shape.system, Segment(next(draft.texts), draft.shape.new.draw(draft.rng))), 0, None)
    before: tuple[int, ...] = ()
    for _ in range(draft.shape.calls.draw(draft.rng)):
        leaf = root.descend()
        first = len(draft.calls)
        children = [_Node(draft.call(leaf.context, before), leaf.depth + 1, leaf) for _ in range(_WIDTH)]
        for n, child in enumerate(children):
            draft.call(child.context, (first + n,), draft.pause())
            child.credit(draft.rng.random())
        if leaf.depth + 1 < _DEPTH:  # a leaf at the maximum depth is tried again instead
            leaf.children = children
        before = tuple(range(first + _WIDTH, first + 2 * _WIDTH))


BUILDERS: dict[str, Callable[[Draft], None]] = {"chat": conversation, "react": conversation, "tree": tree_search}


def program(kind: str, number: int, seed: int, arrival_s: float) -> ProgramSpec:
    """Returns program `number` of a workload; `kind` is one of KINDS, or "mixed" for each with equal probability."""
    rng = Random(f"{seed}/{number}")
    chosen = rng.choice(KINDS) if kind == "mixed" else kind
    draft = Draft(SHAPES[chosen], rng, count((number + 1) * _OWN_TEXTS))
    BUILDERS[chosen](draft)
    return ProgramSpec(f"{chosen}-{number}", chosen, arrival_s, tuple(draft.calls))


def poisson(per_s: float, window_s: float, seed: int) -> Iterator[float]:
    """Yields arrival times in seconds. The same seed at another rate gives the same arrivals on another scale."""
    rng, at = Random(f"{seed}/arrivals"), 0.0
    while (at := at + rng.expovariate(1.0) / per_s) < window_s:
        yield at


def synthetic(kind: str, per_s: float, window_s: float, seed: int) -> list[ProgramSpec]:
    """Returns programs of one kind, or "mixed", that arrive within a window at a mean rate."""
    return [program(kind, n, seed, at) for n, at in enumerate(poisson(per_s, window_s, seed))]
