"""Tables of what Redis holds. Pure: no I/O.

A list has two forms. The narrow one fits a terminal of 80 columns: it has short ids and the most important columns. The
wide one has whole ids and all columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from rsm.broker.protocol.ids import shorten
from rsm.broker.protocol.models import CallRecord, EngineState
from rsm.broker.views.monitor import ActiveCall
from rsm.cli.checks import usage_line, used_of_limit
from rsm.cli.output import GAP, counted, printable, record_json, seconds, table
from rsm.cli.short_ids import ShortIds

_TEXT_SHOWN = 400
# The least width of a cell that is cut.
_LEAST = 8
_ENDED = (EngineState.STOPPED, EngineState.DEAD)

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a list. `narrow`, `wide`: the forms that show it."""

    name: str
    value: Callable[[Any], Any]
    narrow: bool = True
    wide: bool = True


def _listing(
    columns: Sequence[Column], items: Sequence[Any], room: int | None, *, cut: str, spare: Sequence[str] = ()
) -> Table:
    """A list: narrow if `room` gives the width of the terminal, else wide.

    Args:
        cut: the column whose cells are cut if the list is too wide.
        spare: columns to leave out if that is not enough, the least important first.
    """
    shown = [c for c in columns if (c.wide if room is None else c.narrow)]
    rows = {c.name: [c.value(item) for item in items] for c in shown}
    widths = {name: max(map(len, [name, *map(str, values)])) for name, values in rows.items()}
    widths[cut] = min(widths[cut], _LEAST)
    for name in spare:
        if room is not None and sum(widths.values()) + GAP * (len(widths) - 1) > room:
            del widths[name]
    names = list(widths)
    return table("", names, list(zip(*(rows[name] for name in names), strict=True)), cut=[cut])


# -- calls


def calls_json(calls: Sequence[ActiveCall]) -> list[dict[str, Any]]:
    return [{**record_json(c.record), "where": c.where, "engine_id": c.engine_id} for c in calls]


def calls_table(
    calls: Sequence[ActiveCall],
    backlog: int,
    now_ms: int,
    usage: Mapping[str, Mapping[str, int]] | None = None,
    *,
    room: int | None = None,
    limit: int = 0,
) -> RenderableType:
    """`usage`: from `Monitor.usage`, for the footer. `limit`: how many calls were requested at most."""
    foot = [Text(_calls_foot(calls, backlog, limit), style="dim")]
    if usage and room is None:
        foot.append(Text("; ".join(usage_line(name, u) for name, u in usage.items()), style="dim"))
    columns = _call_columns(calls, now_ms, room is None)
    return Group(_listing(columns, calls, room, cut="ENGINE", spare=["PROMPT", "LEVEL"]), *foot)


def _call_columns(calls: Sequence[ActiveCall], now_ms: int, wide: bool) -> list[Column]:
    ids = ShortIds((i for c in calls for i in (c.request_id, c.record.session_id)), whole=wide)
    engines = ShortIds((c.engine_id for c in calls), whole=wide)

    def session(c: ActiveCall) -> str:
        return "(own)" if c.record.session_id == c.request_id and not wide else ids[c.record.session_id]

    def engine(c: ActiveCall) -> str:
        return engines[c.engine_id] or ("(throttled)" if c.where == "throttled" else "(none ready)")

    return [
        Column("CALL", lambda c: ids[c.request_id]),
        Column("SESSION", session),
        Column("STATE", lambda c: c.record.state.value),
        Column("ENGINE", engine),
        Column("SINCE", lambda c: seconds(now_ms - _since(c))),
        Column("PRIORITY", lambda c: c.record.priority, narrow=False),
        Column("LEVEL", lambda c: c.record.level),
        Column("PROMPT", lambda c: c.record.prompt_tokens),
        Column("ATTEMPT", lambda c: c.record.attempt, narrow=False),
    ]


def _calls_foot(calls: Sequence[ActiveCall], backlog: int, limit: int) -> str:
    running = sum(c.where == "running" for c in calls)
    throttled = sum(c.where == "throttled" for c in calls)
    why = f" ({throttled} throttled until there is headroom)" if throttled else ""
    more = f"; the first {limit} (see --limit)" if limit and len(calls) >= limit else ""
    return f"{running} running, {len(calls) - running} waiting{why}, {backlog} not yet routed{more}"


def _since(call: ActiveCall) -> int:
    """When it began to run or to wait."""
    return (call.record.started_ms if call.where == "running" else None) or call.record.submitted_ms


# -- engines


def engines_table(
    engines: Sequence[Row], now_ms: int, *, room: int | None = None, everything: bool = True
) -> RenderableType:
    """`everything`: include engines that stopped or died without an error."""
    shown = [e for e in engines if everything or not _ended_in_order(e)]
    foot = [] if everything else _not_shown([e for e in engines if _ended_in_order(e)])
    if not shown:
        return Text(" ".join(["No engines. Start some with `rsm up` or `rsm worker`.", *foot]))
    ids = ShortIds((e["engine_id"] for e in shown), whole=room is None)
    listing = _listing(_engine_columns(ids, now_ms, room is None), shown, room, cut="MODEL", spare=["TOKENS/S"])
    rows = listing if room is None else _WithErrors(listing, [e["error"] for e in shown])
    return Group(rows, *(Text(line, style="dim") for line in foot))


def _ended_in_order(engine: Row) -> bool:
    return engine["state"] in _ENDED and not engine["error"]


def _not_shown(engines: Sequence[Row]) -> list[str]:
    if not engines:
        return []
    counts = {state: sum(e["state"] == state for e in engines) for state in _ENDED}
    listed = " and ".join(f"{n} {state.lower()}" for state, n in counts.items() if n)
    return [f"Not shown: {listed}; --all shows them."]


class _WithErrors:
    """A list with a row per line, and below each row the first line of its error, if there is one."""

    def __init__(self, listing: Table, errors: Sequence[str]) -> None:
        self._listing = listing
        self._errors = errors

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._listing, options, pad=False)
        head = len(lines) - len(self._errors)
        for line, error in zip(lines, [*[""] * head, *self._errors], strict=True):
            yield from (*line, Segment.line())
            if error:
                first_line = printable(error.strip().partition("\n")[0])
                yield Text(f"  {first_line}", style="red", no_wrap=True, overflow="ellipsis")


def _engine_columns(ids: ShortIds, now_ms: int, wide: bool) -> list[Column]:
    def model(e: Row) -> str:
        return str(e["model"]) if wide else str(e["model"]).rstrip("/").rpartition("/")[2]

    def seen(e: Row) -> str:
        return f"{seconds(now_ms - e['heartbeat_ms'])} ago" if e["heartbeat_ms"] else "never"

    return [
        Column("ENGINE", lambda e: ids[e["engine_id"]]),
        Column("STATE", lambda e: e["state"]),
        Column("MODEL", model),
        Column("NODE", lambda e: e["node"], narrow=False),
        Column("PID", lambda e: e["pid"], narrow=False),
        Column("RUNNING", lambda e: f"{e['running']}/{e['max_num_seqs']}"),
        Column("QUEUED", lambda e: e["queued"]),
        Column("TOKENS", lambda e: e["queued_tokens"], narrow=False),
        Column("KV", lambda e: f"{e['kv_usage']:.0%}"),
        Column("TOKENS/S", lambda e: round(e["tokens_per_s"])),
        Column("PREFILL/S", lambda e: _estimate(e["prefill_tps"]), narrow=False),
        Column("DECODE/S", lambda e: _estimate(e["decode_tps"]), narrow=False),
        Column("SERVED", lambda e: e["served"], narrow=False),
        Column("SEEN", seen),
        Column("ERROR", lambda e: e["error"] or "-", narrow=False),
    ]


def _estimate(tokens_per_s: float) -> str:
    return str(round(tokens_per_s)) if tokens_per_s else "-"


# -- sessions


def running_first(sessions: Sequence[Row]) -> list[Row]:
    """Sorts programs with unfinished calls first, then by last activity. Keeps a program's sessions together."""
    programs: dict[str, list[Row]] = {}
    for s in sessions:
        programs.setdefault(s["program"], []).append(s)

    def rank(program: str) -> tuple[bool, int, str]:
        rows = programs[program]
        return not any(s["active"] for s in rows), -max(map(_last_active, rows)), program

    return [s for program in sorted(programs, key=rank) for s in _root_first(programs[program])]


def _last_active(session: Row) -> int:
    return max(int(session["last_arrival_ms"]), int(session["last_completion_ms"]))


def _root_first(rows: Sequence[Row]) -> list[Row]:
    """A program's sessions, each after its parent."""
    known = {s["session_id"] for s in rows}
    children: dict[str, list[Row]] = {}
    for s in rows:
        children.setdefault(s["parent"] if s["parent"] in known else "", []).append(s)
    ordered, waiting = [], children.get("", [])[::-1]
    while waiting:
        ordered.append(waiting.pop())
        waiting += children.get(ordered[-1]["session_id"], [])[::-1]
    return ordered


def sessions_table(
    sessions: Sequence[Row], now_ms: int, unit: str = "tokens", *, room: int | None = None
) -> RenderableType:
    """A list of sessions. Service, level and wait are those of a session's program."""
    if not sessions:
        return Text("No sessions.")
    columns = _session_columns(sessions, now_ms, unit, room is None)
    listing = _listing(columns, sessions, room, cut="RUNS ON", spare=["RAN", "WAITED"])
    running = len({s["program"] for s in sessions if s["active"]})
    programs = len({s["program"] for s in sessions})
    foot = f"{counted(programs, 'program')}, {running} with unfinished calls"
    foot += "" if room is None else f"; service in {unit}"
    return Group(listing, Text(foot, style="dim"))


def _session_columns(sessions: Sequence[Row], now_ms: int, unit: str, wide: bool) -> list[Column]:
    ids = ShortIds((s["session_id"] for s in sessions), whole=wide)
    depth = {} if wide else _depths(sessions)
    engines = ShortIds((e for s in sessions for e in s["engines"]), whole=wide)

    def last(s: Row) -> str:
        return f"{seconds(now_ms - _last_active(s))} ago" if _last_active(s) else "-"

    def cached(s: Row) -> str:
        return ", ".join(f"{e} ({n} tokens)" for e, n in s["resident_tokens"].items()) or "-"

    return [
        Column("SESSION", lambda s: "  " * depth.get(s["session_id"], 0) + ids[s["session_id"]]),
        Column("PARENT", lambda s: s["parent"] or "-", narrow=False),
        Column("CALLS", lambda s: s["active"], wide=False),
        Column("RUNS ON", lambda s: ", ".join(engines[e] for e in s["engines"]) or "-", wide=False),
        Column(f"SERVICE ({unit})" if wide else "SERVICE", lambda s: s["service"]),
        Column("LEVEL", lambda s: s["level"]),
        Column("WAITED", lambda s: seconds(s["waited_ms"])),
        Column("RAN", lambda s: seconds(s["ran_ms"])),
        Column("RATIO", lambda s: f"{s['wait_ratio']:.2f}", narrow=False),
        Column("THREADS", lambda s: s["active"], narrow=False),
        Column("RUNS ON", lambda s: ", ".join(s["engines"]) or "-", narrow=False),
        Column("DONE", lambda s: s["completed"], narrow=False),
        Column("CANCELLED", lambda s: s["cancelled"], narrow=False),
        Column("FAILED", lambda s: s["failed"], narrow=False),
        Column("CACHED ON", cached, narrow=False),
        Column("ACTIVE", last),
    ]


def _depths(sessions: Sequence[Row]) -> dict[str, int]:
    """How many levels each session is below its program's root. `sessions` has parents before their children."""
    depths: dict[str, int] = {}
    for s in sessions:
        depths[s["session_id"]] = depths.get(s["parent"], -1) + 1
    return depths


# -- one call


def call_table(record: CallRecord, now_ms: int) -> RenderableType:
    """One call, in the order in which things happened to it."""
    rows = [["state", record.state.value], ["session", record.session_id], ["kind", record.kind]]
    rows += _routing(record)
    rows += _times(record, now_ms)
    rows += _ending(record)
    return table(f"call {record.request_id}", ["", ""], [row for row in rows if row[1] not in ("", None)])


def _routing(r: CallRecord) -> list[list[Any]]:
    return [
        ["requested model", r.model],
        ["prompt tokens", str(r.prompt_tokens)],
        ["priority, level", f"{r.priority}, {r.level}"],
        ["engine", r.engine_id or "(none yet)"],
        ["why this engine" if r.engine_id else "why it waits", r.why],
        ["estimated times", _costs(r.costs)],
        ["stolen from", ", ".join(r.stolen_from)],
        ["attempt", str(r.attempt)],
    ]


def _costs(costs: Mapping[str, float]) -> str:
    """The router's estimates of how long the call takes on each engine."""
    return ", ".join(f"{e} {s:.3g} s" for e, s in costs.items())


def _times(r: CallRecord, now_ms: int) -> list[list[Any]]:
    """Time spans between the stages. A stage that has not ended lasts until now."""
    end = r.finished_ms or now_ms
    return [
        ["submitted", f"{seconds(now_ms - r.submitted_ms)} ago"],
        ["assigned after", seconds(r.assigned_ms - r.submitted_ms) if r.assigned_ms else ""],
        ["waited" if r.started_ms or r.finished_ms else "waiting for", seconds((r.started_ms or end) - r.submitted_ms)],
        ["ran" if r.finished_ms else "running for", seconds(end - r.started_ms) if r.started_ms else ""],
        ["deadline", f"in {seconds(r.deadline_ms - now_ms)}" if r.deadline_ms and not r.finished_ms else ""],
        ["cancellation", "requested" if r.cancel_requested and not r.finished_ms else ""],
    ]


def _ending(r: CallRecord) -> list[list[Any]]:
    rows: list[list[Any]] = [["error", f"{r.error_code}: {r.error}" if r.error_code else r.error]]
    if r.result is not None:
        result = r.result
        rows += [
            ["finish reason", result.finish_reason],
            ["tokens", f"{result.completion_tokens} out, {result.prompt_tokens} in, {result.cached_tokens} cached"],
            ["first token", seconds(result.ttft * 1000) if result.ttft is not None else ""],
            ["text", shorten(result.text, _TEXT_SHOWN)],
        ]
    return rows


# -- totals, dead letters, checks


def stats_table(stats: Mapping[str, Any]) -> RenderableType:
    since = [
        ["submitted", stats["submitted"]],
        *([state, stats[state]] for state in ("completed", "cancelled", "failed")),
        ["requeued attempts", stats["requeued"]],
        ["dead letters", stats["dead_letters"]],
        ["stolen by idle engines", stats["stolen"]],
        ["results removed before their TTL", stats["retired"]],
        ["prompt tokens", stats["prompt_tokens"]],
        ["  of these cached", stats["cached_tokens"]],
        ["completion tokens", stats["completion_tokens"]],
        ["affinity hit rate", f"{stats['hit_rate']:.0%}"],
        ["mean time waiting", seconds(stats["mean_waiting_s"] * 1000)],
        ["mean time running", seconds(stats["mean_running_s"] * 1000)],
    ]
    now = [
        ["pending", stats["pending"]],
        ["  of these throttled", stats["throttled"]],
        *([state, stats[state]] for state in ("running", "unaccounted")),
        *([name.replace("_", " "), used_of_limit(name, usage)] for name, usage in stats["usage"].items()),
    ]
    return Group(table("", ["SINCE THE NAMESPACE BEGAN", ""], since), Text(), table("", ["NOW", ""], now))


def dead_table(letters: Sequence[Row], now_ms: int, *, room: int | None = None) -> RenderableType:
    if not letters:
        return Text("No dead letters.")
    ids = ShortIds((i for d in letters for i in (d["request_id"], d["session_id"])), whole=room is None)
    columns = [
        Column("ENTRY", lambda d: d["entry"]),
        Column("CALL", lambda d: ids[d["request_id"]]),
        Column("SESSION", lambda d: ids[d["session_id"]], narrow=False),
        Column("ATTEMPTS", lambda d: d["attempts"]),
        Column("DIED", lambda d: f"{seconds(now_ms - d['died_ms'])} ago"),
        Column("BODY", lambda d: counted(d["body_bytes"], "byte") if d["replayable"] else "not kept", narrow=False),
        Column("REASON", lambda d: f"{d['error_code']}: {d['error']}"),
    ]
    return _listing(columns, letters, room, cut="REASON", spare=["ATTEMPTS"])


def letter_table(letter: Row, now_ms: int) -> RenderableType:
    shown = {**letter, "died_ms": f"{seconds(now_ms - letter['died_ms'])} ago"}
    rows = [[name.removesuffix("_ms").replace("_", " "), str(value)] for name, value in shown.items() if value != ""]
    return table(f"dead letter {letter['entry']}", ["", ""], rows)


def checks_table(checks: Sequence[Mapping[str, str]]) -> RenderableType:
    rows = [[c["status"], c["name"], f"{c['detail']} {c['advice']}".strip()] for c in checks]
    return table("", ["STATUS", "CHECK", "RESULT"], rows)
