"""The report: counts per fault, terminal states, recovery times and the verdict, with one column per seed."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.machine import machine
from bench.report.page import RESULTS
from chaos.faults import KINDS
from chaos.ledger import Story
from chaos.producers.process import KINDS as PRODUCERS
from chaos.run import Outcome
from chaos.stage import SIM_WORKERS
from chaos.verdict import Window

BEGIN, END = "<!-- chaos -->", "<!-- /chaos -->"
_ROOT = Path(__file__).resolve().parent.parent
_Data = Mapping[str, Any]
_FAULTS_HEAD = (
    "Faults of all runs together. *Calls hit*: in progress during a fault. *Recovery*: from the end of a fault until a",
    "call that was pushed after it has ended. Faults overlap, so a short one also waits for longer concurrent ones.",
)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Returns all figures of one run."""
    stories = list(outcome.stories.values())
    totals = outcome.found.totals
    return {
        "seed": outcome.seed,
        "minutes": outcome.minutes,
        "vllm_workers": outcome.vllm,
        "commit": _commit(),
        "machine": machine("shared with other work", outcome.server),
        "calls": len(stories),
        "by_producer": {kind: sum(s.producer == place for s in stories) for place, kind in enumerate(PRODUCERS)},
        "by_act": dict(Counter(s.plan.act.value for s in stories)),
        "ends": dict(Counter(s.ends[0].state for s in stories if s.ends)),
        "streams": sum(s.plan.stream for s in stories),
        "pieces": sum(len(s.chunks) for s in stories),  # chunks; the key is that of the committed results
        "run_again": totals.get("requeued", 0),
        "dead_letters": totals.get("dead_letters", 0),
        "held": totals.get("ever_throttled", 0),
        "stolen": totals.get("stolen", 0),
        "faults": _faults(outcome.windows, stories),
        "violations": [str(v) for v in outcome.violations],
    }


def _faults(windows: Sequence[Window], stories: Sequence[Story]) -> dict[str, dict[str, float]]:
    """Returns, per kind, the number of faults, the calls in progress, and the recovery times."""
    spans = sorted((s.accepted, s.ended) for s in stories if s.ended)
    found = {}
    for name in (k.name for k in KINDS):
        faults = [w for w in windows if w.name == name]
        hit = sum(s.accepted < w.healed + 0.001 and s.ended > w.began for w in faults for s in stories if s.ended)
        back = [min(e for a, e in spans if a >= w.healed) - w.healed for w in faults if spans[-1][0] >= w.healed]
        found[name] = {
            "injected": len(faults),
            "hit": hit,
            "back_median_s": statistics.median(back) if back else 0.0,
            "back_max_s": max(back, default=0.0),
        }
    return {name: row for name, row in found.items() if row["injected"]}


def save(outcome: Outcome, folder: Path = RESULTS) -> Path:
    """Writes chaos-SEED.json."""
    path = folder / f"chaos-{outcome.seed}.json"
    path.write_text(json.dumps(as_json(outcome), indent=2) + "\n", encoding="utf-8")
    return path


def into(page: Path, folder: Path = RESULTS) -> None:
    """Puts the tables of all runs in the folder between the page's chaos marks."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("chaos-*.json"), key=_seed)]
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    page.write_text(f"{head}{BEGIN}\n{render(runs)}\n{END}{tail}", encoding="utf-8")


def _seed(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def render(runs: Sequence[_Data]) -> str:
    """Returns the tables."""
    seeds = [f"seed {r['seed']}" for r in runs]
    rows: list[tuple[str, list[str]]] = [
        ("minutes of faults", [f"{r['minutes']:g}" for r in runs]),
        (f"vLLM workers, in addition to {SIM_WORKERS} with `sim`", [str(r["vllm_workers"]) for r in runs]),
        ("commit", [r["commit"] for r in runs]),
        ("calls accepted", [_n(r["calls"]) for r in runs]),
        *(
            (f"… {state}", [_n(r["ends"].get(state, 0)) for r in runs])
            for state in ("COMPLETED", "CANCELLED", "FAILED")
        ),
        ("streams", [_n(r["streams"]) for r in runs]),
        ("chunks of streams", [_n(r["pieces"]) for r in runs]),
        ("attempts lost and retried", [_n(r["run_again"]) for r in runs]),
        ("dead letters", [_n(r["dead_letters"]) for r in runs]),
        ("throttled for lack of KV cache", [_n(r.get("held", 0)) for r in runs]),
        ("stolen by idle engines", [_n(r.get("stolen", 0)) for r in runs]),
        ("faults", [_n(sum(f["injected"] for f in r["faults"].values())) for r in runs]),
        ("**broken promises**", [f"**{len(r['violations'])}**" for r in runs]),
    ]
    lines = _table(("", *seeds), rows)
    lines += [*_broken(runs), "", *_FAULTS_HEAD, ""]
    lines += _table(("fault", "injected", "calls hit", "recovery, median", "longest"), _fault_rows(runs))
    if runs:
        about = runs[-1]["machine"]
        lines += ["", f"{about['CPU']}, {about['Machine']}; {about['OS']}; {about['Python']}; {about['Server']}."]
    return "\n".join(lines)


def _broken(runs: Sequence[_Data]) -> Iterable[str]:
    """Yields the lines below the table: the broken promises of each run."""
    for r in runs:
        checks = Counter(v.partition(":")[0] for v in r["violations"])
        if checks:
            yield ""
            yield f"Seed {r['seed']} broke: {', '.join(f'*{check}* ({n})' for check, n in checks.items())}."
    if not any(v.startswith("rightly failed") for r in runs for v in r["violations"]):
        yield ""
        yield "Every FAILED call had a deadline that had passed."


def _fault_rows(runs: Sequence[_Data]) -> Iterable[tuple[str, list[str]]]:
    for name in (k.name for k in KINDS):
        found = [r["faults"][name] for r in runs if name in r["faults"]]
        if found:
            median = statistics.median(f["back_median_s"] for f in found)
            longest = max(f["back_max_s"] for f in found)
            counts = [_n(sum(f[key] for f in found)) for key in ("injected", "hit")]
            yield name, [*counts, f"{median:.2f} s", f"{longest:.1f} s"]


def _table(head: Sequence[str], rows: Iterable[tuple[str, list[str]]]) -> list[str]:
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    lines += [" | ".join([name, *cells]) for name, cells in rows]
    return [f"| {line} |" for line in lines]


def _n(count: float) -> str:
    return f"{int(count):,}"


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
