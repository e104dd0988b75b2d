"""A namespace with admission: engines whose caches hold 1000 tokens, and their accounts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsm.broker.protocol import codec
from tests.support.fake_worker import FakeWorker
from tests.support.world import World, texts

CAPACITY = 1000
HALF_S = 8.0


class Rooms:
    """Steps of calls under admission. Contexts are in tokens."""

    def __init__(self, world: World, **changes: Any) -> None:
        self.world = world
        self.use(**{"admission": True, "admission_half_life_s": HALF_S} | changes)

    def use(self, **changes: Any) -> None:
        """Lets routers use these settings from now on."""
        self.world.transitions = self.world.with_settings(**changes)

    def engine(self, engine: str = "e1", model: str = "m", kv_tokens: int = CAPACITY) -> FakeWorker:
        return FakeWorker(self.world.settings, engine, model, server=self.world.db, kv_tokens=kv_tokens).up()

    def place(self, call_id: str, context: int, engine: str = "e1", new: int | None = None, **changes: Any) -> str:
        """Places a call that is on the stream. Returns the script's code."""
        changes |= {"context": context, "new": context if new is None else new}
        return self.world.assign(call_id, engine, **changes).code

    def bring(
        self,
        call_id: str,
        context: int,
        engine: str = "e1",
        session: str | None = None,
        new: int | None = None,
        **o: Any,
    ) -> str:
        """Submits and places a call, by default in a session of its own."""
        assert self.world.submit(call_id, session=session or f"of-{call_id}", prompt_tokens=context, **o).code == "new"
        return self.place(call_id, context, engine, new)

    def admit(self) -> list[str]:
        """Runs a router's tick. Returns the calls that are on the stream then."""
        self.world.run(self.world.transitions.admit_throttled())
        return self.on_stream()

    def on_stream(self) -> list[str]:
        return [f["id"] for _, f in self.world.stream()]

    def held(self, model: str = "") -> list[str]:
        return [codec.text(m) for m in self.world.db.zrange(self.world.keys.held(model), 0, -1)]

    def age(self, call_id: str, ms: int, model: str = "") -> None:
        """Lets a throttled call have waited this much longer, so that it is promoted sooner."""
        db, keys = self.world.db, self.world.keys
        for field in ("submitted_ms", "starves_ms"):
            if db.hexists(keys.call(call_id), field):
                db.hincrby(keys.call(call_id), field, -ms)
        if db.zscore(keys.held_starving(model), call_id) is not None:
            db.zincrby(keys.held_starving(model), -ms, call_id)

    def think(self, engine: str, seconds: float) -> None:
        """Lets time pass for programs that think on an engine: in its accounts and in those of all sessions."""
        db, keys = self.world.db, self.world.keys
        db.hincrby(keys.residents(engine), "at", -int(seconds * 1000))
        for key in db.scan_iter(match=keys.residency("*").replace("{", "\\{")):
            words = codec.text(db.hget(key, engine)).split()
            if words:
                words[2] = str(max(0, int(words[2]) - int(seconds * 1000)))
                db.hset(key, engine, " ".join(words))

    # -- state

    def account(self, engine: str = "e1") -> tuple[int, int, int]:
        """Calls counted, tokens of active programs, tokens of thinking programs."""
        found = texts(self.world.db.hgetall(self.world.keys.residents(engine)))
        active, thinking = (sum(map(float, found[n].split())) for n in ("active", "thinking"))
        return codec.number(found["calls"]), round(active), round(thinking)

    def shares(self, session: str) -> Mapping[str, tuple[int, int]]:
        """Unfinished calls and tokens, by engine."""
        found = texts(self.world.db.hgetall(self.world.keys.residency(session)))
        return {e: (int(w[0]), int(w[1])) for e, w in ((e, v.split()) for e, v in found.items())}
