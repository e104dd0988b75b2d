"""The names of all keys of a namespace. Only this file and the scripts (lib.lua) build key names."""

from __future__ import annotations

from dataclasses import dataclass

from rsm.broker.protocol.ids import check_id

ROUTER_GROUP = "router"


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names of a namespace. The hash tag keeps a whole namespace in one Redis Cluster slot."""

    namespace: str = "rsm"

    def __post_init__(self) -> None:
        check_id(self.namespace, "namespace")

    @property
    def prefix(self) -> str:
        return f"{{{self.namespace}}}:"

    @property
    def calls(self) -> str:
        return f"{self.prefix}calls"

    @property
    def engines(self) -> str:
        return f"{self.prefix}engines"

    @property
    def routers(self) -> str:
        return f"{self.prefix}routers"

    @property
    def dead(self) -> str:
        return f"{self.prefix}dead"

    @property
    def solved(self) -> str:
        return f"{self.prefix}solved"

    @property
    def deadlines(self) -> str:
        return f"{self.prefix}deadlines"

    @property
    def holding(self) -> str:
        return f"{self.prefix}holding"

    @property
    def stats(self) -> str:
        return f"{self.prefix}stats"

    @property
    def usage(self) -> str:
        return f"{self.prefix}usage"

    @property
    def session_bytes(self) -> str:
        return f"{self.prefix}usage:sessions"

    @property
    def finished(self) -> str:
        return f"{self.prefix}finished"

    def call(self, call_id: str) -> str:
        return f"{self.prefix}call:{call_id}"

    def events(self, call_id: str) -> str:
        return f"{self.prefix}call:{call_id}:events"

    def inbox(self, client_id: str) -> str:
        return f"{self.prefix}inbox:{client_id}"

    def engine(self, engine_id: str) -> str:
        return f"{self.prefix}engine:{engine_id}"

    def queue(self, engine_id: str) -> str:
        return f"{self.prefix}engine:{engine_id}:queue"

    def work(self, engine_id: str) -> str:
        return f"{self.prefix}engine:{engine_id}:work"

    def starving(self, engine_id: str) -> str:
        return f"{self.prefix}engine:{engine_id}:starving"

    def residents(self, engine_id: str) -> str:
        return f"{self.prefix}engine:{engine_id}:residents"

    def running(self, engine_id: str) -> str:
        return f"{self.prefix}engine:{engine_id}:running"

    def bell(self, engine_id: str) -> str:
        return f"{self.prefix}engine:{engine_id}:bell"

    def control(self, engine_id: str) -> str:
        return f"{self.prefix}engine:{engine_id}:control"

    def order(self, job_id: str) -> str:
        return f"{self.prefix}order:{job_id}"

    def session(self, session_id: str) -> str:
        return f"{self.prefix}session:{session_id}"

    def session_calls(self, session_id: str) -> str:
        return f"{self.prefix}session:{session_id}:calls"

    def session_recent(self, session_id: str) -> str:
        return f"{self.prefix}session:{session_id}:recent"

    def session_children(self, session_id: str) -> str:
        return f"{self.prefix}session:{session_id}:children"

    def affinity(self, session_id: str) -> str:
        return f"{self.prefix}affinity:{session_id}"

    def residency(self, session_id: str) -> str:
        return f"{self.prefix}residency:{session_id}"

    def parked(self, model: str) -> str:
        return f"{self.prefix}parked:{model}"

    def held(self, model: str) -> str:
        return f"{self.prefix}held:{model}"

    def held_starving(self, model: str) -> str:
        return f"{self.prefix}starving:{model}"


def literal(prefix: str) -> str:
    """Escapes the beginning of a key, so that it matches only itself in a glob."""
    return "".join(f"\\{c}" if c in "[]*?\\" else c for c in prefix)
