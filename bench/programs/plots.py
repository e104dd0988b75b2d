"""Plots mean latency per token over the rate, as PNG; needs the packages of `requirements/bench.txt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.page import RESULTS

# Colours that are safe for colour-blind readers (Okabe and Ito, 2008), and a marker for each.
_STYLES = {
    "fcfs_rr": ("#000000", "o"),
    "fcfs_ll": ("#999999", "v"),
    "mlfq": ("#E69F00", "s"),
    "hash": ("#56B4E9", "^"),
    "paper": ("#D55E00", "D"),
    "ours": ("#009E73", "*"),
}


def plot(found: Mapping[str, Any], name: str, folder: Path = RESULTS) -> list[Path]:
    """Writes NAME-latency.png (all workloads) and NAME-fleets.png (fleets of several sizes)."""
    sweeps = found["sweeps"]
    most = max(sum(s["engines"] == e for s in sweeps) for e in {s["engines"] for s in sweeps})
    main = next(e for e in {s["engines"] for s in sweeps} if sum(s["engines"] == e for s in sweeps) == most)
    figures = [
        ("latency", [s for s in sweeps if s["engines"] == main and "ours" in s["systems"]]),
        ("fleets", sorted((s for s in sweeps if s["workload"] in ("mixed", "coding")), key=_order)),
    ]
    return [_grid(shown, folder / f"{name}-{title}.png") for title, shown in figures]


def _order(sweep: Mapping[str, Any]) -> tuple[bool, int]:
    return sweep["workload"] != "mixed", sweep["engines"]


def _grid(sweeps: Sequence[Mapping[str, Any]], path: Path) -> Path:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(len(sweeps), 4 if len(sweeps) > 6 else 3)
    rows = -(-len(sweeps) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False)
    for ax in axes.flat[len(sweeps) :]:
        ax.axis("off")
    for ax, sweep in zip(axes.flat, sweeps, strict=False):
        _curves(ax, sweep)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _curves(ax: Any, sweep: Mapping[str, Any]) -> None:
    for name, system in sweep["systems"].items():
        if name in _STYLES:
            colour, mark = _STYLES[name]
            rates = [p["rate"] for p in system["points"]]
            means = [1000 * p["figures"]["per_token_mean"] for p in system["points"]]
            ax.plot(rates, means, color=colour, marker=mark, markersize=5, linewidth=1.2, label=system["label"])
    for level in sweep["levels_s"]:
        ax.axhline(1000 * level, color="#bbbbbb", linewidth=0.7, linestyle=":")
    ax.set(xscale="log", yscale="log", xlabel="programs/s", ylabel="mean latency per token, ms")
    ax.set_title(f"{sweep['workload']}, {sweep['engines']} engine{'s' * (sweep['engines'] > 1)}", fontsize=10)
    ax.legend(fontsize=6, frameon=False)
