"""What Redis holds, as rows for people and as JSON for programs. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from rsm.broker.protocol.ids import shorten
from rsm.broker.protocol.models import CallRecord
from rsm.broker.views.monitor import ActiveCall
from rsm.cli.checks import usage_line
from rsm.cli.output import record_json, seconds, table

_TEXT_SHOWN = 400


def calls_json(calls: Sequence[ActiveCall]) -> list[dict[str, Any]]:
    return [{**record_json(c.record), "where": c.where, "engine_id": c.engine_id} for c in calls]


def calls_table(
    calls: Sequence[ActiveCall], backlog: int, now_ms: int, usage: Mapping[str, Mapping[str, int]] | None = None
) -> RenderableType:
    """`usage`: as `Monitor.usage` gives it, for the foot."""
    columns = ["CALL", "SESSION", "STATE", "ENGINE", "SINCE", "PRIORITY", "LEVEL", "PROMPT", "ATTEMPT"]
    rows = [
        [
            c.request_id,
            c.record.session_id,
            c.record.state.value,
            c.engine_id or ("(held)" if c.where == "throttled" else "(none ready)"),
            seconds(now_ms - _since(c)),
            c.record.priority,
            c.record.level,
            c.record.prompt_tokens,
            c.record.attempt,
        ]
        for c in calls
    ]
    running = sum(c.where == "running" for c in calls)
    held = sum(c.where == "throttled" for c in calls)
    waiting = f"{len(calls) - running} waiting" + (f" ({held} held until there is room)" if held else "")
    foot = f"{running} running, {waiting}, {backlog} not yet routed"
    used = "; ".join(usage_line(name, u) for name, u in (usage or {}).items())
    return Group(table("", columns, rows), Text(foot, style="dim"), Text(used, style="dim"))


def _since(call: ActiveCall) -> int:
    """When it began to run, or to wait."""
    return (call.record.started_ms if call.where == "running" else None) or call.record.submitted_ms


def engines_table(engines: Sequence[Mapping[str, Any]], now_ms: int) -> RenderableType:
    columns = [
        "ENGINE",
        "STATE",
        "MODEL",
        "NODE",
        "PID",
        "RUNNING",
        "QUEUED",
        "TOKENS",
        "KV",
        "TOKENS/S",
        "PREFILL/S",
        "DECODE/S",
        "SERVED",
        "SEEN",
    ]
    rows = [
        [
            e["engine_id"],
            e["state"],
            e["model"],
            e["node"],
            e["pid"],
            f"{e['running']}/{e['max_num_seqs']}",
            e["queued"],
            e["queued_tokens"],
            f"{e['kv_usage']:.0%}",
            round(e["tokens_per_s"]),
            _learned(e["prefill_tps"]),
            _learned(e["decode_tps"]),
            e["served"],
            f"{seconds(now_ms - e['heartbeat_ms'])} ago" if e["heartbeat_ms"] else "never",
        ]
        for e in engines
    ]
    return table("", columns, rows) if rows else Text("No engines. Start some with `rsm up` or `rsm worker`.")


def _learned(tokens_per_s: float) -> str:
    return str(round(tokens_per_s)) if tokens_per_s else "-"


def sessions_table(sessions: Sequence[Mapping[str, Any]], now_ms: int, unit: str = "tokens") -> RenderableType:
    """A session's service, level and wait are those of its program."""
    columns = ["SESSION", "PARENT", f"SERVICE ({unit})", "LEVEL", "WAITED", "RAN", "RATIO", "THREADS", "RUNS ON"]
    columns += ["DONE", "CANCELLED", "FAILED", "CACHE AT", "ARRIVAL"]
    rows = [
        [
            s["session_id"],
            s["parent"] or "-",
            s["service"],
            s["level"],
            seconds(s["waited_ms"]),
            seconds(s["ran_ms"]),
            f"{s['wait_ratio']:.2f}",
            s["active"],
            ", ".join(s["engines"]) or "-",
            s["completed"],
            s["cancelled"],
            s["failed"],
            ", ".join(f"{e} ({n} tokens)" for e, n in s["resident_tokens"].items()) or "-",
            f"{seconds(now_ms - s['last_arrival_ms'])} ago" if s["last_arrival_ms"] else "-",
        ]
        for s in sessions
    ]
    return table("", columns, rows) if rows else Text("No sessions.")


def call_table(record: CallRecord, now_ms: int) -> RenderableType:
    """One call, told in the order in which things happened to it."""
    rows = [["state", record.state.value], ["session", record.session_id], ["kind", record.kind]]
    rows += _routing(record)
    rows += _times(record, now_ms)
    rows += _ending(record)
    return table(f"call {record.request_id}", ["", ""], [row for row in rows if row[1] not in ("", None)])


def _routing(r: CallRecord) -> list[list[Any]]:
    return [
        ["model asked for", r.model],
        ["prompt tokens", str(r.prompt_tokens)],
        ["priority, level", f"{r.priority}, {r.level}"],
        ["engine", r.engine_id or "(none yet)"],
        ["why there" if r.engine_id else "why it waits", r.why],
        ["cost there, elsewhere", _costs(r.costs)],
        ["waited before for", ", ".join(r.stolen_from)],
        ["attempt", str(r.attempt)],
    ]


def _costs(costs: Mapping[str, float]) -> str:
    """What the call would take on each engine, as its router reckoned."""
    return ", ".join(f"{e} {s:.3g} s" for e, s in costs.items())


def _times(r: CallRecord, now_ms: int) -> list[list[Any]]:
    """Spans between the stations; a call that has not got there yet has waited until now."""
    end = r.finished_ms or now_ms
    return [
        ["submitted", f"{seconds(now_ms - r.submitted_ms)} ago"],
        ["assigned after", seconds(r.assigned_ms - r.submitted_ms) if r.assigned_ms else ""],
        ["waited", seconds((r.started_ms or end) - r.submitted_ms)],
        ["ran" if r.finished_ms else "runs for", seconds(end - r.started_ms) if r.started_ms else ""],
        ["deadline", f"in {seconds(r.deadline_ms - now_ms)}" if r.deadline_ms and not r.finished_ms else ""],
        ["cancel", "asked for" if r.cancel_requested and not r.finished_ms else ""],
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


def stats_table(stats: Mapping[str, Any]) -> RenderableType:
    ends = [[state, stats[state]] for state in ("completed", "cancelled", "failed")]
    now = [[state, stats[state]] for state in ("pending", "running", "unaccounted")]
    now.insert(1, ["of them held until there is room", stats["held"]])
    rest = [
        ["requeued attempts", stats["requeued"]],
        ["dead letters", stats["dead_letters"]],
        ["taken to idle engines", stats["stolen"]],
        ["prompt tokens", stats["prompt_tokens"]],
        ["of them cached", stats["cached_tokens"]],
        ["completion tokens", stats["completion_tokens"]],
    ]
    shares = [
        ["affinity hit rate", f"{stats['hit_rate']:.0%}"],
        ["mean waiting", seconds(stats["mean_waiting_s"] * 1000)],
        ["mean running", seconds(stats["mean_running_s"] * 1000)],
    ]
    used = [["in use", usage_line(name, usage)] for name, usage in stats["usage"].items()]
    early = [["results gone before their TTL", stats["retired"]]]
    rows = [["submitted", stats["submitted"]], *now, *ends, *rest, *shares, *early, *used]
    return table("", ["SINCE THE NAMESPACE BEGAN", ""], rows)


def dead_table(letters: Sequence[Mapping[str, Any]], now_ms: int) -> RenderableType:
    columns = ["ENTRY", "CALL", "SESSION", "ATTEMPTS", "DIED", "BODY", "REASON"]
    rows = [
        [
            d["entry"],
            d["request_id"],
            d["session_id"],
            d["attempts"],
            f"{seconds(now_ms - d['died_ms'])} ago",
            f"{d['body_bytes']} bytes" if d["replayable"] else "not kept",
            f"{d['error_code']}: {d['error']}",
        ]
        for d in letters
    ]
    return table("", columns, rows) if rows else Text("No dead letters.")


def checks_table(checks: Sequence[Mapping[str, str]]) -> RenderableType:
    rows = [[c["status"], c["name"], f"{c['detail']} {c['advice']}".strip()] for c in checks]
    return table("", ["", "CHECK", "WHAT"], rows)
