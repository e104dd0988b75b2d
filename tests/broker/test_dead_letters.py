"""Dead letters: listed, shown without their bodies, and replayed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from rsm.broker import Client, Conflict, InvalidRequest, Settings, UnknownCall
from rsm.broker.protocol.keys import Keys
from rsm.broker.views.dead_letters import DeadLetters
from tests.support.fake_worker import FakeWorker, patient, routing
from tests.support.waiting import eventually


@pytest.fixture
def letters(settings: Settings, db: redis.Redis) -> DeadLetters:
    return DeadLetters(settings, db)


@pytest.fixture
def worker(settings: Settings) -> Iterator[FakeWorker]:
    """A worker on which each call becomes a dead letter at its first fault."""
    made = FakeWorker(settings.model_copy(update={"max_attempts": 1}), "e1").up()
    with routing(patient(settings)):
        yield made
    made.close()


def kill(worker: FakeWorker) -> str:
    """Makes the next call a dead letter; returns its id."""
    call = worker.take_soon()
    worker.release(call, fault=True)
    return call.fence.call_id


def serve(worker: FakeWorker, client: Client, call_id: str) -> str:
    """Completes a replayed call; returns the body's text."""
    call = worker.take_soon()
    assert call.fence.call_id == call_id
    worker.finish(call)
    assert client.result(call_id, 10).text == "done"
    return call.body.decode("utf-8", "replace")


def test_a_letter_says_what_happened_but_not_the_prompt(
    worker: FakeWorker, client: Client, letters: DeadLetters
) -> None:
    client.submit("the prompt", id="c", session="s", model="m")
    kill(worker)
    (letter,) = letters.ls()
    assert (letter.request_id, letter.session_id, letter.kind, letter.model) == ("c", "s", "generate", "m")
    assert (letter.error_code, letter.attempts, letter.replayable) == ("engine_error", 1, True)
    assert letter == letters.show("c") == letters.show(letter.entry)
    assert letter.body_bytes > len("the prompt")
    assert "the prompt" not in f"{letter!r}{letter.summary()}"
    assert letters.count() == 1


def test_replay_under_a_new_id_while_the_record_lasts(worker: FakeWorker, client: Client, letters: DeadLetters) -> None:
    client.submit("the prompt", id="c", session="s", priority=-3, stream=True, on_engine_loss="restart")
    kill(worker)
    entry = letters.show("c").entry
    again = letters.replay("c")
    assert again == f"c.replay-{entry}"
    assert letters.count() == 0
    record = client.record(again)
    assert (record.session_id, record.priority, record.stream) == ("s", -3, True)
    assert client.redis.hget(client.keys.call(again), "on_engine_loss") == b"restart"
    assert "the prompt" in serve(worker, client, again)
    assert client.record("c").state == "FAILED"


def test_replay_under_its_own_id_once_the_record_is_gone(
    worker: FakeWorker, client: Client, letters: DeadLetters, db: redis.Redis, keys: Keys
) -> None:
    client.submit("the prompt", id="c")
    kill(worker)
    db.delete(keys.call("c"))
    assert letters.replay("c") == "c"
    assert client.record("c").session_id == "c"
    serve(worker, client, "c")


def test_what_came_as_json_goes_as_json(
    worker: FakeWorker, client: Client, letters: DeadLetters, db: redis.Redis, keys: Keys
) -> None:
    db.xadd(keys.calls, {"id": "c", "session": "s", "json": '{"prompt":"the prompt"}'})
    kill(worker)
    again = letters.replay("c")
    assert serve(worker, client, again) == '{"prompt":"the prompt"}'
    assert bytes(db.hget(keys.call(again), "result") or b"").startswith(b"{")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["json", "body"])
@pytest.mark.parametrize("record_gone", [False, True])
def test_an_interrupted_replay_may_be_repeated(
    worker: FakeWorker,
    client: Client,
    letters: DeadLetters,
    db: redis.Redis,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    record_gone: bool,
) -> None:
    if form == "json":
        db.xadd(keys.calls, {"id": "c", "json": '{"prompt":"p"}'})
    else:
        client.submit("p", id="c")
    kill(worker)
    if record_gone:
        db.delete(keys.call("c"))

    def cut(*_: Any) -> None:
        raise redis.ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(letters._transitions, "discard", cut)
        with pytest.raises(redis.ConnectionError):
            letters.replay("c")
    assert letters.count() == 1
    first = worker.take_soon().fence.call_id
    assert letters.replay("c") == first
    assert letters.count() == 0
    assert worker.claim() == []
    assert client.cancel(first)
    worker.finish(worker.held[first])


def test_the_id_of_another_call_is_left_alone(worker: FakeWorker, client: Client, letters: DeadLetters) -> None:
    client.submit("p", id="c")
    kill(worker)
    entry = letters.show("c").entry
    client.submit("something else", id=f"c.replay-{entry}")
    with pytest.raises(InvalidRequest, match="belong to other calls"):
        letters.replay("c")
    assert letters.count() == 1
    serve(worker, client, f"c.replay-{entry}")


def test_all_that_a_replay_needs_is_in_the_letter(
    worker: FakeWorker, client: Client, letters: DeadLetters, db: redis.Redis, keys: Keys
) -> None:
    """Except the deadline, which would have passed."""
    options: dict[str, Any] = {"session": "s", "priority": -3, "stream": True, "prompt_tokens": 77}
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    client.submit(
        "p",
        id="c",
        model="m",
        traceparent=trace,
        on_engine_loss="restart",
        deadline_ms=client.deadline_in(3600),
        **options,
    )
    kill(worker)
    db.delete(keys.call("c"))
    assert letters.replay("c") == "c"
    record = client.record("c")
    seen = {"session": record.session_id, "priority": record.priority, "stream": record.stream}
    assert seen | {"prompt_tokens": record.prompt_tokens} == options
    assert (record.model, record.deadline_ms) == ("m", None)
    call = worker.take_soon()
    assert (call.traceparent, call.on_engine_loss) == (trace, "restart")
    worker.finish(call)


def test_a_conflict_can_be_sent_again_under_an_id_of_its_own(
    worker: FakeWorker, client: Client, letters: DeadLetters, db: redis.Redis, keys: Keys
) -> None:
    client.submit("p", id="c")
    first = worker.take_soon()
    with pytest.raises(Conflict):
        client.submit("q", id="c")
    db.xadd(keys.calls, {"id": "c", "priority": "5", "json": '{"prompt":"other"}'})
    eventually(letters.count)
    (letter,) = letters.ls()
    assert (letter.error_code, letter.replayable, letter.priority) == ("conflict", True, "5")
    again = letters.replay("c")
    assert again == f"c.replay-{letter.entry}"
    assert "other" in serve(worker, client, again)
    worker.finish(first)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"id": "no id"}, "has no body"),
        ({"id": "no id", "json": '{"prompt":"' + "x" * 70_000 + '"}'}, "has no body"),
        ({"id": "no id", "json": "{"}, "not valid JSON"),
        ({"id": "no id", "kind": "dance", "json": '{"prompt":"p"}'}, "has an unknown kind"),
    ],
    ids=["bodiless", "large", "broken", "kind"],
)
def test_what_was_refused_and_would_be_again_stays(
    worker: FakeWorker, letters: DeadLetters, db: redis.Redis, keys: Keys, fields: dict[str, str], why: str
) -> None:
    db.xadd(keys.calls, fields)  # type: ignore[arg-type]
    eventually(letters.count)
    (letter,) = letters.ls()
    with pytest.raises(InvalidRequest, match=why):
        letters.replay(letter.entry)
    assert letters.count() == 1


def test_a_call_refused_for_its_id_alone_can_be_sent_again(
    worker: FakeWorker, client: Client, letters: DeadLetters, db: redis.Redis, keys: Keys
) -> None:
    db.xadd(keys.calls, {"id": "no id", "priority": "-2", "json": '{"prompt":"the prompt"}'})
    eventually(letters.count)
    (letter,) = letters.ls()
    again = letters.replay(letter.entry)
    assert again == f".replay-{letter.entry}".lstrip(".")
    assert client.record(again).priority == -2
    assert "the prompt" in serve(worker, client, again)


def test_many_letters_come_newest_first(letters: DeadLetters, db: redis.Redis, keys: Keys) -> None:
    for i in range(50):
        db.xadd(keys.dead, {"id": f"c{i}", "error_code": "engine_error", "error": "x"})
    assert [letter.request_id for letter in letters.ls(45)] == [f"c{i}" for i in range(49, 4, -1)]
    assert len(letters.ls()) == 50
    assert letters.show("c0").request_id == "c0"
    for ref in ("nix", "1-1"):
        with pytest.raises(UnknownCall, match="no dead letter"):
            letters.show(ref)


def test_a_long_id_keeps_within_the_limit(worker: FakeWorker, client: Client, letters: DeadLetters) -> None:
    client.submit("p", id="c" * 128)
    kill(worker)
    again = letters.replay("c" * 128)
    assert len(again) == 128
    serve(worker, client, again)
