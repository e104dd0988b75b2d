"""A producer that uses only docs/protocol.md and a Redis client: XADD of JSON, HMGET of the record, XREAD of the log.

Only cancels go through our client, because they are scripts. One thread per lane.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import redis

from chaos.producers.calls import Act, Plan
from chaos.producers.lanes import Lane, run_lanes
from chaos.producers.process import INBOX, Book
from rsm.broker import BrokerUnavailable, Client, Settings
from rsm.broker.connection.factory import connect

_POLL_S = 0.1
_BLOCK_MS = 500


def run(book: Book, settings: Settings) -> None:
    """Runs all lanes; returns when the book has no more work."""
    run_lanes(_Lane, book, settings)


class _Lane(Lane):
    def __init__(self, book: Book, client: Client, number: int) -> None:
        super().__init__(book, client, number)
        self._keys = client.keys
        self._redis: Any = connect(client.settings, _BLOCK_MS / 1000)

    def _together(self, plans: list[Plan]) -> None:
        for plan in plans:
            if not self._book.story(plan).accepted:
                self._push(plan)
        if plans and plans[0].act is Act.CANCEL_SESSION:
            self._cancel_session(plans)
        for plan in plans:
            self._follow(plan)

    def _push(self, plan: Plan) -> None:
        if plan.deadline_s and not self._book.story(plan).deadline_ms:
            self._book.deadline(plan, self._now_ms() + int(plan.deadline_s * 1000))
        self._xadd(plan)
        self._book.accepted(plan)
        if plan.act is Act.TWICE:
            self._xadd(plan)

    def _xadd(self, plan: Plan) -> None:
        body = {"prompt": plan.prompt, "max_tokens": plan.max_tokens, "temperature": 0}
        fields = {
            "id": plan.id,
            "session": plan.session,
            "json": json.dumps(body),
            "stream": int(plan.stream),
            "model": plan.model,
            "inbox": INBOX,
        }
        if deadline := self._book.story(plan).deadline_ms:
            fields["deadline_ms"] = deadline
        _retry(lambda: self._redis.xadd(self._keys.calls, fields))

    def _follow(self, plan: Plan) -> None:
        if plan.stream:
            self._read(plan)
        elif plan.act is Act.CANCEL:
            time.sleep(plan.after / 10)
            self._cancel(plan)
        state, result, code = self._wait(plan)
        self._book.end(plan, state, result.get("text", ""), result.get("token_ids", []), code)

    def _read(self, plan: Plan) -> None:
        key = self._keys.events(plan.id)
        while True:
            last = self._book.story(plan).last_eid
            reply = _retry(lambda last=last: self._redis.xread({key: last}, block=_BLOCK_MS))  # type: ignore[misc]
            for eid, fields in reply[0][1] if reply else ():
                if b"state" in fields:
                    return
                ids = [int(i) for i in fields[b"token_ids"].split()]
                self._book.chunk(plan, int(fields[b"n"]), eid.decode(), fields[b"text"].decode(), ids)
                if plan.act is Act.CANCEL and int(fields[b"n"]) >= plan.after and not self._book.story(plan).cancels:
                    self._cancel(plan)
            if plan.act is Act.AWAY:
                self._redis.connection_pool.disconnect()

    def _wait(self, plan: Plan) -> tuple[str, dict[str, Any], str]:
        key = self._keys.call(plan.id)
        while True:
            state, result, code = _retry(lambda: self._redis.hmget(key, "state", "result", "error_code"))
            if state not in (None, b"PENDING", b"RUNNING"):
                return state.decode(), json.loads(result or "{}"), (code or b"").decode()
            time.sleep(_POLL_S)

    def _cancel(self, plan: Plan) -> None:
        self._book.cancel(plan)
        if _retry(lambda: self._client.cancel(plan.id)):
            self._book.cancelled(plan, self._now_ms())

    def _cancel_session(self, plans: list[Plan]) -> None:
        time.sleep(plans[0].after / 10)
        for plan in plans:
            self._book.cancel(plan)
        _retry(lambda: self._client.cancel_session(plans[0].session))
        now = self._now_ms()
        for plan in plans:
            self._book.session_cancelled(plan, now)

    def _now_ms(self) -> int:
        seconds, micros = _retry(self._redis.time)
        return int(seconds * 1000 + micros // 1000)


def _retry(action: Callable[[], Any]) -> Any:
    """Repeats an action until Redis accepts it, which is safe because every push has an id."""
    while True:
        try:
            return action()
        except (redis.RedisError, BrokerUnavailable):
            time.sleep(_POLL_S)
