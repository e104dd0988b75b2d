"""A simple workload: conversations with a common system prompt and Poisson arrivals."""

from __future__ import annotations

from random import Random

from rsm.simulation.workload.programs import CallSpec, ProgramSpec, Segment

_SYSTEM = Segment(1, 512)
_TURNS, _NEW_TOKENS, _OUTPUT_TOKENS, _PAUSE_S = 7.0, 256.0, 277.0, 10.0  # means
_MOST_TURNS, _MOST_TOKENS = 80, 4096


def conversations(per_s: float, seconds: float, seed: int) -> list[ProgramSpec]:
    """Programs that arrive at a mean rate of `per_s` for `seconds`. Turns, lengths and pauses have exponential
    distributions with the means of ShareGPT (arXiv 2502.13965, section 6.1)."""
    random, at = Random(seed), 0.0  # noqa: S311
    programs: list[ProgramSpec] = []
    while (at := at + random.expovariate(per_s)) < seconds:
        programs.append(_conversation(random, len(programs), at))
    return programs


def _conversation(random: Random, number: int, arrival_s: float) -> ProgramSpec:
    def drawn(mean: float, most: int) -> int:
        return min(1 + int(random.expovariate(1 / mean)), most)

    calls: list[CallSpec] = []
    context: tuple[Segment, ...] = (_SYSTEM,)
    for n in range(drawn(_TURNS, _MOST_TURNS)):
        text = (number + 1) * 1000 + 2 * n
        prompt = (*context, Segment(text, drawn(_NEW_TOKENS, _MOST_TOKENS)))
        output = drawn(_OUTPUT_TOKENS, _MOST_TOKENS)
        pause_s = random.expovariate(1 / _PAUSE_S) if n else 0.0
        calls.append(CallSpec(prompt, output, text + 1, (n - 1,) if n else (), pause_s))
        context = (*prompt, Segment(text + 1, output))
    return ProgramSpec(f"conversation-{number}", "conversation", arrival_s, tuple(calls))
