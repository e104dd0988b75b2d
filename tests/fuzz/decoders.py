"""Every decoder of untrusted data, as a function of bytes, with the errors that it may raise.

The contract: a decoder returns a value or raises a documented error. It never hangs and never raises another error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgpack
from pydantic import ValidationError

from rsm.broker import BadRecord, InvalidRequest, Settings
from rsm.broker.client.request import check_body
from rsm.broker.connection.factory import connect
from rsm.broker.protocol import codec
from rsm.broker.protocol.events import End, end_record, is_end, read_event
from rsm.broker.protocol.ids import check_id, check_model
from rsm.broker.protocol.models import CallRecord, Delta
from rsm.broker.protocol.rules import spoken_for
from rsm.broker.protocol.snapshot import engine_view, session_view
from rsm.broker.protocol.transitions import Rejection, _claimed_call
from rsm.broker.views.dead_letters import _letter
from rsm.router.intake import Arrival, read_entry
from rsm.workers.backends.base import CallRejected, EngineError, Job, Resumed
from rsm.workers.backends.openai.calls import exchange
from rsm.workers.backends.openai.wire import SseParser, document, error, error_inside, readable, single_line
from rsm.workers.backends.sim.engine import SimConfig
from rsm.workers.backends.sim.request import read as read_sim
from rsm.workers.backends.vllm.start.args import command_line
from rsm.workers.config import EngineConfig
from rsm.workers.runtime.control import Control
from rsm.workers.supervision import node_jobs

LIMIT = 1 << 20
# Separates the parts of an input, for decoders that take several.
CUT = b"\x00"


@dataclass(frozen=True, slots=True)
class Decoder:
    """One decoder. `contract`: the errors it may raise; `seeds`: well-formed inputs, to start from."""

    name: str
    read: Callable[[bytes], object]
    contract: tuple[type[Exception], ...]
    seeds: list[bytes] = field(repr=False)


def fields_of(data: bytes) -> dict[bytes, bytes]:
    """name, value, name, value … as in a hash or a stream entry."""
    parts = data.split(CUT)
    return dict(zip(parts[::2], parts[1::2], strict=False))


def seed(**fields: str | bytes) -> bytes:
    return CUT.join(
        part
        for name, value in fields.items()
        for part in (name.encode(), value.encode() if isinstance(value, str) else value)
    )


# -- Redis


def _entry(data: bytes) -> object:
    read = read_entry("5-1", fields_of(data), LIMIT)
    assert isinstance(read, Arrival | Rejection)
    return read


def _record(data: bytes) -> CallRecord:
    record = CallRecord.from_hash("c1", fields_of(data))
    assert record.result is None or isinstance(record.result.text, str)
    return record


def _event(data: bytes) -> object:
    fields = fields_of(data)
    is_end(fields)
    end_record("c1", fields)
    event = read_event("c1", fields, "1-1")
    assert event is None or isinstance(event, Delta | End)
    return event


@cache
def _control_thread() -> Any:
    return Control("e1", "0-0", Settings(), print, print)


def _control(data: bytes) -> None:
    received: list[object] = []
    control = _control_thread()
    control._cancel = control._command = received.append
    control._run_command(fields_of(data))
    assert all(not isinstance(command, str) or command in ("drain", "stop") for command in received)


def _rows(data: bytes) -> None:
    """Replies of scripts contain the contents of hashes."""
    parts = [*data.split(CUT), *[b""] * 24]
    _claimed_call(parts[:23])
    engine_view([*parts[:2], b"1", b"1", *parts[2:19]])
    session_view([parts[0], parts[1:9], parts[9], parts[10], 0, parts[11], parts[12], parts[13:17]], 5)
    spoken_for(dict(zip((b"at", b"half", b"active", b"thinking"), parts[17:21], strict=True)), 5)
    codec.number(parts[0])


def _node_job(data: bytes) -> None:
    """The name and the arguments of an RQ job."""
    doc = json.loads(data)
    if not isinstance(doc, list) or len(doc) != 2:
        raise ValueError
    assert isinstance(doc[0], str) is False or (doc[0] in node_jobs.JOBS) <= doc[0].startswith(
        "rsm.workers.supervision.node_jobs."
    )
    if isinstance(doc[1], dict):
        EngineConfig(**doc[1])
    check_id(str(doc[1]), "engine")


def _settings(data: bytes) -> None:
    given = fields_of(data)
    texts = {codec.text(name): codec.text(value) for name, value in given.items()}
    connect(Settings(**texts)).close()  # type: ignore[arg-type]


def _ids(data: bytes) -> None:
    check_id(codec.text(data), "id")
    check_model(codec.text(data))


def _body(form: codec.Format) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        body = codec.decode(data, form)
        check_body("generate", body)
        return codec.decode(codec.encode(body, form), form)

    return read


# -- HTTP


def _sse(data: bytes) -> None:
    parser, at = SseParser(max_bytes=LIMIT), max(1, data[:1][0] if data else 1)
    events = [event for i in range(0, len(data), at) for event in parser.feed(data[i : i + at])]
    for event in [*events, *parser.close()]:
        if event == "[DONE]":
            continue
        error_inside(document(event))
        single_line(event)


def _server(kind: str, stream: bool) -> Callable[[bytes], object]:
    """A whole exchange with a server that may send anything."""
    bodies: dict[str, dict[str, Any]] = {
        "generate": {"prompt": "hi"},
        "chat.completions": {"messages": []},
        "embeddings": {"input": "hi"},
    }

    def read(data: bytes) -> object:
        ex = exchange(Job(key="c/1", call_id="c", session="s", kind=kind, body=bodies[kind], stream=stream), "m", True)
        if not ex.streams:
            with readable():
                ex.whole(data)
        for line in data.split(b"\n") if ex.streams else ():
            text = line.decode("utf-8", "replace")
            with readable():
                chunk = ex.chunk(document(text), text)
            if chunk is not None:
                f"{chunk.text}{chunk.document}{chunk.replay}{chunk.token_ids}".encode()
                assert all(type(i) is int for i in chunk.token_ids)
        with readable():
            outcome = ex.outcome()
        assert isinstance(outcome.text, str)
        assert isinstance(outcome.finish_reason, str)
        assert 0 <= outcome.cached_tokens <= outcome.prompt_tokens
        return outcome

    return read


def _error(data: bytes) -> None:
    assert isinstance(error(500, data), EngineError)
    assert len(str(error(404, data))) < 1000


# -- engines


def _sim(data: bytes) -> object:
    kind, _, rest = data.partition(CUT)
    body = codec.decode(rest, "json")
    check_body(codec.text(kind), body)
    resumed = Resumed("ab", [1, 2], [codec.text(kind)], 1)
    for before in (None, resumed):
        read_sim(Job("c/1", "c", "s", codec.text(kind), body, resumed=before), SimConfig())
    return None


def _vllm(data: bytes) -> object:
    config = EngineConfig(engine_id="e1", engine_args=codec.decode(data, "json"))
    return command_line(config.engine_args)


_BODY: dict[str, Any] = {"prompt": "hi", "max_tokens": 5, "stop": ["a"], "logit_bias": {"5": -1.5}, "x": None}
_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "text", "text": "é"}]}], "n": 1}
_RESULT = msgpack.packb({"text": "a", "token_ids": [1], "finish_reason": "stop", "ttft_ms": 1, "response": None})
_CHUNK = json.dumps({"id": "x", "choices": [{"index": 0, "text": "a", "token_ids": [7], "finish_reason": None}]})
_DELTA = json.dumps(
    {"choices": [{"index": 0, "delta": {"content": "a", "tool_calls": [{"index": 0, "function": {"name": "f"}}]}}]}
)
_USAGE = json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}})
_JSON = json.dumps(_BODY).encode()
_PACKED = msgpack.packb(_BODY)
_TALK = b'{"prompt_token_ids":[1,2,3],"temperature":0.5,"tools":[{"a":{"b":["\\u00e9",null,true]}}],"seed":7}'
_STAMPS = [msgpack.packb({"prompt": "x", "t": msgpack.Timestamp(s, n)}) for s, n in ((1, 0), (1, 5), (1 << 40, 5))]
_RECORD = {
    "state": "COMPLETED", "session": "s", "attempt": "2", "priority": "-3", "submitted_ms": "1000", "n": "4",
    "started_ms": "1100", "finished_ms": "1200", "prompt_tokens": "5", "stream": "1", "engine": "e",
}  # fmt: skip
_ODD = [b'{"prompt":"x","a":NaN}', b'{"prompt":"x","a":1e999}', b'{"prompt":"\\ud800"}', b"[" * 2000, b'{"a":' * 500]

DECODERS = [
    Decoder("codec.decode json", _body("json"), (InvalidRequest,), [_JSON, _JSON, _TALK, _TALK, *_ODD]),
    Decoder(
        "codec.decode msgpack", _body("body"), (InvalidRequest,), [_PACKED, _PACKED, _PACKED, *_STAMPS, b"\x91" * 2000]
    ),
    Decoder(
        "router intake",
        _entry,
        (),
        [
            seed(id="c1", session="s1", json=_JSON, priority="5", stream="1", inbox="i", deadline_ms="99999"),
            seed(body=_PACKED, kind="generate", model="m/x", prompt_tokens="7", traceparent="00-ab-cd-01"),
            seed(kind="chat.completions", json=json.dumps(_CHAT)),
            seed(id="c1", ref="1", session="s", model="m", prompt_tokens="3"),
            seed(id="c1", gen="5-0"),
            *(seed(json=odd) for odd in _ODD),
        ],
    ),
    Decoder("call record", _record, (BadRecord,), [seed(**_RECORD, result=_RESULT), seed(state="PENDING")]),
    Decoder(
        "inbox and log events",
        _event,
        (),
        [
            seed(**_RECORD, result=_RESULT, call="c1"),
            seed(call="c1", eid="1-1", n="0", text="hi", token_ids="1 2 3"),
            seed(n="3", chunk=_CHUNK, replay="r"),
        ],
    ),
    Decoder("control orders", _control, (), [seed(op="cancel", id="c", gen="1-1", attempt="1"), seed(op="stop")]),
    Decoder("rows of scripts", _rows, (), [CUT.join([b"c1", b"5-1", b"1", b"s", b"generate", b"0.5", b"7:1"])]),
    Decoder(
        "dead letters",
        lambda data: _letter(data[:9], fields_of(data[9:])).summary(),
        (),
        [b"1700000-0" + seed(id="c1", error_code="engine_error", error="x", session="s", attempts="3", body=_PACKED)],
    ),
    Decoder(
        "node job",
        _node_job,
        (ValueError, TypeError, RecursionError),
        [
            b'["rsm.workers.supervision.node_jobs.stop_engine","e1"]',
            b'["os.system",{"engine_id":"e1","backend":"sim"}]',
        ],
    ),
    Decoder(
        "settings and URL",
        _settings,
        (ValidationError, InvalidRequest),
        [
            seed(redis_url="redis://user:pass@host:6379/0", namespace="a", level_bounds="1 2 3"),
            seed(redis_url="rediss://[::1]:6380/1?ssl_ca_certs=/x&socket_timeout=1", lease_ms="2000"),
            seed(redis_url="unix:///tmp/x.sock?db=2", policy="a.b:C", drain_grace_s="1e3", data_dir="/tmp"),
        ],
    ),
    Decoder("ids", _ids, (InvalidRequest,), [b"c1.a_b:c-d", b"c:events", b"{a}"]),
    Decoder(
        "event stream",
        _sse,
        (EngineError,),
        [f"data: {_CHUNK}\r\n\r\n: hi\ndata: {_DELTA}\n\ndata: [DONE]\n\n".encode(), b"\rdata:1\r\rid:2\n"],
    ),
    Decoder("server, generate", _server("generate", True), (EngineError,), [f"{_CHUNK}\n{_CHUNK}\n{_USAGE}".encode()]),
    Decoder("server, chat stream", _server("chat.completions", True), (EngineError,), [f"{_DELTA}\n{_USAGE}".encode()]),
    Decoder("server, chat", _server("chat.completions", False), (EngineError,), [_DELTA.encode(), _USAGE.encode()]),
    Decoder("server, embeddings", _server("embeddings", False), (EngineError,), [_USAGE.encode()]),
    Decoder("server's errors", _error, (), [b'{"error":{"message":"no","code":400}}', b'{"detail":["x"]}']),
    Decoder(
        "modelled engine",
        _sim,
        (InvalidRequest, CallRejected),
        [b"generate\x00" + _JSON, b"chat.completions\x00" + json.dumps(_CHAT).encode()],
    ),
    Decoder("vLLM's arguments", _vllm, (InvalidRequest,), [b'{"max_model_len":5,"enforce_eager":true,"a":["b",{}]}']),
]
