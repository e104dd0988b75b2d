"""A line to Redis of one's own: one connection for one thread, without a pool.

redis-py's client spends half of a command's time on its pool and its retries (`bench/` counts it). A thread that does
nothing but talk to Redis needs neither: it has its connection, and its own way to wait for a server that is away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.exceptions import ResponseError

from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import BLIPS
from rsm.broker.protocol.scripts import Arg
from rsm.broker.settings import Settings

Entry = tuple[bytes, dict[bytes, bytes]]


class DedicatedConnection:
    """Connects when it is first used, and again after every failure. Not for several threads at once.

    Args:
        block_s: the longest that a command on it may block, in seconds.
    """

    def __init__(self, settings: Settings, block_s: float | None = None) -> None:
        self._connection: Any = connect(settings, block_s).connection_pool.make_connection()

    def execute_command(self, *command: Arg) -> Any:
        """One command's reply.

        Raises:
            redis.ResponseError: the server refused it.
            redis.ConnectionError or its kin: see `rsm.broker.connection.factory.BLIPS`.
        """
        (reply,) = self.exchange([command])
        if isinstance(reply, Exception):
            raise reply
        return reply

    def exchange(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        """The replies to several commands in one round trip; a refusal is among them as an exception."""
        connection = self._connection
        try:
            connection.send_packed_command(connection.pack_commands(commands))
            return [self._reply() for _ in commands]
        except BaseException:
            connection.disconnect()  # unread replies must not be taken for those of the next command
            raise

    def _reply(self) -> Any:
        try:
            return self._connection.read_response()
        except BLIPS:
            raise
        except ResponseError as e:
            return e

    def read_stream(self, *command: Arg) -> list[Entry]:
        """The entries that XREAD or XREADGROUP gives of one stream; none if it waited in vain."""
        reply = self.execute_command(*command)
        return entries(reply[0][1]) if reply else []

    def close(self) -> None:
        self._connection.disconnect()


def entries(rows: Sequence[Any]) -> list[Entry]:
    """Stream entries as the server sends them (RESP2), with their fields as maps."""
    return [(entry, dict(zip(fields[::2], fields[1::2], strict=True)) if fields else {}) for entry, fields in rows]
