"""The page of results: targets, throughput at equal latency, metrics, fleets, ablations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from bench.report.page import DOCS, RESULTS, Target
from bench.report.table import table_line

BEGIN, END = "<!-- programs -->", "<!-- /programs -->"
Found = Mapping[str, Any]
BASE, PAPER, OURS = "fcfs_rr", "paper", "ours"
_FLEET = 4  # engines in the sweeps that cover all workloads


def page(found: Found) -> str:
    """Returns the whole page, as markdown."""
    about = found["machine"]
    lines = [f"# Programs in virtual time: {about['Machine']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "Machine"]
    lines += [f"- Took: {found['wall_s'] / 60:.0f} minutes, without the cells cached from earlier runs", ""]
    for title, section in (
        ("Targets", targets_table(found)),
        ("Throughput at the same mean latency per token", throughput(found)),
        ("Beyond the knee", metrics(found)),
        ("Routing alone", routing(found)),
        ("Other fleet sizes", sizes(found)),
        ("Ablations", ablations(found)),
    ):
        lines += [f"## {title}", "", *section, ""]
    return "\n".join(lines).rstrip() + "\n"


# -- targets


def targets_table(found: Found) -> list[str]:
    head = ("What", "Target", *(f"{m:g} x" for m in found["levels"]), "Met")
    lines = [
        "Columns: at this multiple of the mean latency of FCFS + round robin on a nearly idle fleet.",
        "",
        table_line(head),
        table_line(["---", "---", *["---:"] * len(found["levels"]), "---"]),
    ]
    for name, other, workload, aim in _RATIOS:
        if (sweep := _sweep(found, workload, _FLEET)) and {name, other} <= sweep["systems"].keys():
            values = _ratios(sweep, name, other)
            what = f"{workload}: {_label(sweep, name)} over {_label(sweep, other)}"
            lines.append(_aim_line(what, aim, values))
    blank = [""] * (len(found["levels"]) - 1)
    lines += [table_line((t.what, t.aim, t.got, *blank, "yes" if t.met else "**no**")) for t in _absolute(found)]
    return lines


# A system, the system it is compared with, the workload, and the least ratio of their rates.
_RATIOS = (
    (OURS, BASE, "mixed", 5.0),
    (OURS, BASE, "chat", 2.0),
    (OURS, BASE, "react", 2.0),
    (OURS, BASE, "tree", 2.0),
    (OURS, PAPER, "coding", 1.5),
    *(("route_cost", f"route_{p}", w, 1.4) for w in ("mixed", "coding") for p in ("least_loaded", "round_robin")),
    ("route_cost", "route_session_hash", "uneven", 1.2),
)


def _aim_line(what: str, aim: float, values: Sequence[float]) -> str:
    met = max(values) >= aim
    everywhere = min(values) >= aim
    verdict = "yes" if everywhere else "at one level" if met else "**no**"
    return table_line((what, f"≥ {aim:g} x", *(_times(v) for v in values), verdict))


def _absolute(found: Found) -> Iterator[Target]:
    pairs = [pair for sweep in found["sweeps"] for pair in _common(sweep, OURS, BASE)]
    for key, name in (("per_token_p95", "P95"), ("per_token_p99", "P99"), ("jct_p99", "response P99")):
        worse = [ours[key] / base[key] for ours, base in pairs if ours[key] > 1.02 * base[key]]
        got = f"worse in {len(worse)} of {len(pairs)} cells" + (f", up to {_times(max(worse))}" if worse else "")
        yield Target(f"{name}, ours vs. FCFS + round robin at the same rate", "no worse in any cell", got, not worse)
    yield from _starved(found)


def _starved(found: Found) -> Iterator[Target]:
    """Counts up to the highest latency level, and in all cells, since a search also tries rates far beyond capacity."""
    most = found["levels"][-1]
    cells = [(p["figures"], s["levels_s"][-1]) for s in found["sweeps"] for p in _points(s, OURS)]
    within = [f for f, level in cells if f["per_token_mean"] <= level]
    everything = [f for f, _ in cells]
    for where, some in ((f"in the {len(within)} cells up to {most:g} x", within), ("in all cells", everything)):
        starved = sum(f["starved"] for f in some)
        got = f"{starved} of {sum(f['programs'] for f in some):,}"
        yield Target(f"starved programs, ours, {where}", "0", got, not starved)


def _common(sweep: Found, one: str, other: str) -> Iterator[tuple[Found, Found]]:
    """Yields the figures of two systems at each rate at which both were run."""
    if not {one, other} <= sweep["systems"].keys():
        return
    others = {p["rate"]: p["figures"] for p in _points(sweep, other)}
    for point in _points(sweep, one):
        if point["rate"] in others:
            yield point["figures"], others[point["rate"]]


# -- tables


def throughput(found: Found) -> list[str]:
    """Returns the table of programs per second that a fleet of four engines sustains."""
    sweeps = _main_sweeps(found)
    names = [n for n in sweeps[0]["systems"] if not n.startswith("route_")]
    head = ("Workload", "Mean latency", *(_label(sweeps[0], n) for n in names))
    lines = [
        f"Programs per second on {_FLEET} engines; in brackets: ratio to FCFS + round robin.",
        "",
        table_line(head),
        table_line(["---", "---:", *["---:"] * len(names)]),
    ]
    for sweep in sweeps:
        for n, level in enumerate(sweep["levels_s"]):
            lines.append(table_line((sweep["workload"], _ms(level), *_rates(sweep, n, names))))
    return lines


def _rates(sweep: Found, level: int, names: Sequence[str]) -> Iterator[str]:
    base = sweep["systems"][BASE]["sustained"][level]
    for name in names:
        if name not in sweep["systems"]:
            yield ""
            continue
        rate = sweep["systems"][name]["sustained"][level]
        least = "≥ " * (rate >= 0.999 * sweep["highest"])  # the highest rate that was tried
        yield f"{least}{rate:.3g}" if name == BASE else f"{least}{rate:.3g} ({_times(_over(rate, base))})"


def metrics(found: Found) -> list[str]:
    """Returns the table of all metrics, at the highest rate at which every system was run."""
    head = ("Workload", "System", *(name for name, _ in _METRICS))
    lines = [
        f"All metrics on {_FLEET} engines, at the highest rate at which all systems were run. Latency is per token, in "
        "ms; response times and the longest wait of a call are in seconds.",
        "",
        table_line(head),
        table_line(["---", "---", *["---:"] * len(_METRICS)]),
    ]
    for sweep in _main_sweeps(found):
        names = [n for n in sweep["systems"] if not n.startswith("route_")]
        rate = max(set.intersection(*({p["rate"] for p in _points(sweep, n)} for n in names)), default=None)
        for name in names if rate else ():
            point = next(p for p in _points(sweep, name) if p["rate"] == rate)
            title = f"{sweep['workload']}, {rate:.3g}/s"
            lines.append(table_line((title, _label(sweep, name), *(_metric(point, read) for _, read in _METRICS))))
    return lines


_METRICS = (
    ("mean", ("per_token_mean", 1000)),
    ("P95", ("per_token_p95", 1000)),
    ("P99", ("per_token_p99", 1000)),
    ("response", ("jct_mean", 1)),
    ("response P99", ("jct_p99", 1)),
    ("hit rate", ("hit_rate", 100)),
    ("Jain", ("jain", 100)),
    ("starved", ("starved", 1)),
    ("longest wait", ("longest_wait", 1)),
    ("busy", ("busy", 100)),
)


def _metric(point: Found, read: tuple[str, float]) -> str:
    key, scale = read
    value = point[key] if key in point else point["figures"][key]
    text = "∞" if value == inf else f"{value * scale:,.0f}" if value * scale >= 100 else f"{value * scale:.3g}"
    return f"{text} %" if scale == 100 else text


def routing(found: Found) -> list[str]:
    lines = [
        "All engines run our scheduler; only the router's policy differs. Programs per second; in brackets: the cache "
        "hit rate at the system's highest rate.",
        "",
    ]
    sweeps = [s for s in found["sweeps"] if any(n.startswith("route_") for n in s["systems"])]
    if not sweeps:
        return ["Not measured."]
    names = [n for n in sweeps[0]["systems"] if n.startswith("route_")]
    lines += [table_line(("Workload", "Mean latency", *(_label(sweeps[0], n) for n in names)))]
    lines += [table_line(["---", "---:", *["---:"] * len(names)])]
    for sweep in sweeps:
        for n, level in enumerate(sweep["levels_s"]):
            cells = [
                f"{sweep['systems'][s]['sustained'][n]:.3g} ({_points(sweep, s)[-1]['figures']['hit_rate']:.0%})"
                for s in names
            ]
            lines.append(table_line((sweep["workload"], _ms(level), *cells)))
    return lines


def sizes(found: Found) -> list[str]:
    sweeps = sorted(
        (s for s in found["sweeps"] if OURS in s["systems"] and s["workload"] in ("mixed", "coding")),
        key=lambda s: (s["workload"] != "mixed", s["engines"]),
    )
    names = (BASE, PAPER, OURS)
    lines = [
        "Programs per second; in brackets: ratio to FCFS + round robin on the same fleet.",
        "",
        table_line(("Workload", "Engines", "Window", "Mean latency", *(_label(sweeps[0], n) for n in names))),
        table_line(["---", "---:", "---:", "---:", *["---:"] * len(names)]),
    ]
    for sweep in sweeps:
        for n, level in enumerate(sweep["levels_s"]):
            about = (sweep["workload"], str(sweep["engines"]), f"{sweep['window_s']:g} s", _ms(level))
            lines.append(table_line((*about, *_rates(sweep, n, names))))
    return lines


def ablations(found: Found) -> list[str]:
    lines: list[str] = []
    for ablation in found["ablations"]:
        head = ("System", *(name for name, _ in _METRICS))
        systems = ablation["systems"].values()
        lines += [
            f"{ablation['workload']}, {ablation['engines']} engines, {ablation['rate']:.3g} programs per second for "
            f"{ablation['window_s']:g} s:",
            "",
            table_line(head),
            table_line(["---", *["---:"] * len(_METRICS)]),
            *(table_line((s["label"], *(_metric(s, read) for _, read in _METRICS))) for s in systems),
            "",
        ]
    return lines[:-1] or ["Not measured."]


# -- reading


def _main_sweeps(found: Found) -> list[Found]:
    """Returns the sweeps over all systems, without those over routing alone."""
    return [s for s in found["sweeps"] if s["engines"] == _FLEET and OURS in s["systems"]]


def _sweep(found: Found, workload: str, engines: int) -> Found | None:
    return next((s for s in found["sweeps"] if (s["workload"], s["engines"]) == (workload, engines)), None)


def _points(sweep: Found, system: str) -> list[Any]:
    return sweep["systems"][system]["points"] if system in sweep["systems"] else []


def _label(sweep: Found, name: str) -> str:
    return str(sweep["systems"][name]["label"])


def _ratios(sweep: Found, one: str, other: str) -> list[float]:
    rates = (sweep["systems"][name]["sustained"] for name in (one, other))
    return [_over(a, b) for a, b in zip(*rates, strict=True)]


def _over(one: float, other: float) -> float:
    return one / other if other else inf


def _times(value: float) -> str:
    return "∞" if value == inf else f"{value:.2f} x"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


# -- files


def write(name: str, found: Found, folder: Path = RESULTS) -> Path:
    """Writes NAME.md; returns its path."""
    path = folder / f"{name}.md"
    path.write_text(page(found), encoding="utf-8")
    return path


def read(name: str, folder: Path = RESULTS) -> Found:
    loaded: Found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def excerpt(found: Found) -> str:
    """Returns what docs/scheduling.md shows: everything below the page's title, one heading level deeper."""
    body = page(found).split("\n", 1)[1].strip().replace("## ", "### ")
    return f"{BEGIN}\n{body}\n{END}"


def into_docs(found: Found, docs: Path = DOCS) -> None:
    """Puts the results between the two marks of docs/scheduling.md."""
    head, rest = docs.read_text(encoding="utf-8").split(BEGIN)
    docs.write_text(head + excerpt(found) + rest.split(END)[1], encoding="utf-8")
