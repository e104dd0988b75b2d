"""Event streams, assembled chunks and errors of OpenAI-compatible servers, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from rsm.workers.backends.base import EngineError
from rsm.workers.backends.openai.wire import Assembler, SseParser, document, error


def test_sse_follows_the_standard() -> None:
    stream = (
        ': hi\r\n\r\ndata: {"a":\r\ndata: 1}\nid: 7\n\nevent: x\rdata:two\u2028words\r\rdata\n\ndata: last'.encode()
    )
    expected = ['{"a":\n1}', "two\u2028words", "last"]
    for size in range(1, len(stream)):
        parser, events = SseParser(), []
        for i in range(0, len(stream), size):
            events += parser.feed(stream[i : i + size])
        assert events + parser.close() == expected, size
        assert parser.close() == []


def test_an_assembled_stream_is_the_whole_body() -> None:
    def delta(index: int, **content: Any) -> dict[str, Any]:
        return {"id": "x", "object": "chat.completion.chunk", "choices": [{"index": index, "delta": content}]}

    def tool(index: int, **function: str) -> dict[str, Any]:
        return {"index": index, "type": "function", "function": function}

    whole = Assembler()
    for chunk in (
        delta(0, role="assistant", content=None), delta(1, role="assistant", content="b"),
        delta(0, tool_calls=[tool(0, name="f", arguments="")]), delta(0, tool_calls=[tool(0, arguments='{"a"')]),
        delta(0, tool_calls=[tool(0, arguments=":1}"), tool(1, name="g", arguments="{}")]), delta(1, content="c"),
    ):  # fmt: skip
        whole.add(chunk)
    seen = [whole.finished]
    for index, reason in ((0, "tool_calls"), (1, "stop")):
        whole.add({"choices": [{"index": index, "delta": {}, "finish_reason": reason}]})
        seen.append(whole.finished)
    assert seen == [False, False, True]
    assert whole.response({"total_tokens": 9}) == {
        "id": "x",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [tool(0, name="f", arguments='{"a":1}'), tool(1, name="g", arguments="{}")],
                },
                "finish_reason": "tool_calls",
            },
            {"index": 1, "message": {"role": "assistant", "content": "bc"}, "finish_reason": "stop"},
        ],
        "usage": {"total_tokens": 9},
    }


def test_a_servers_message_is_shortened() -> None:
    assert len(str(error(400, "x" * 10_000))) < 600


def test_an_event_that_is_too_large_is_refused() -> None:
    for line in (b"x" * 10, b"data: xxxxxx\n"):
        parser = SseParser(max_bytes=1000)
        with pytest.raises(EngineError, match="an event of more than 1000 bytes"):
            all(parser.feed(line) == [] for _ in range(200))
    parser = SseParser(max_bytes=1000)
    assert sum(len(parser.feed(b"data: xxxxxx\n\n")) for _ in range(1000)) == 1000, "many small ones are fine"


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(EngineError):
        document('{"text":"\\ud800"}')
    assert document('{"text":"\\ud83d\\ude00"}') == {"text": "😀"}
