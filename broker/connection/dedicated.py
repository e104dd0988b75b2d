"""A dedicated connection to Redis: one connection for one thread, without a pool.

redis-py's client spends half of a command's time in its pool and its retries (`bench/` measures it). A thread that only
talks to Redis needs neither: it has its own connection, and its own loop that waits for an unreachable server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.exceptions import ResponseError

from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import OUTAGES
from rsm.broker.protocol.scripts import Arg
from rsm.broker.settings import Settings

Entry = tuple[bytes, dict[bytes, bytes]]


class DedicatedConnection:
    """Connects on first use, and again after every failure. Not thread-safe.

    Args:
        block_s: the longest time that a command may block, in seconds.
    """

    def __init__(self, settings: Settings, block_s: float | None = None) -> None:
        self._connection: Any = connect(settings, block_s).connection_pool.make_connection()

    def execute_command(self, *command: Arg) -> Any:
        """One command's reply.

        Raises:
            redis.ResponseError: the server rejected it.
            redis.ConnectionError and the other errors in `rsm.broker.connection.retry.OUTAGES`: retry later.
        """
        (reply,) = self.exchange([command])
        if isinstance(reply, Exception):
            raise reply
        return reply

    def exchange(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        """The replies to several commands in one round trip. A rejected command's reply is an exception."""
        connection = self._connection
        try:
            connection.send_packed_command(connection.pack_commands(commands))
            return [self._reply() for _ in commands]
        except BaseException:
            connection.disconnect()  # unread replies must not be read as those of the next command
            raise

    def _reply(self) -> Any:
        try:
            return self._connection.read_response()
        except OUTAGES:
            raise
        except ResponseError as e:
            return e

    def read_stream(self, *command: Arg) -> list[Entry]:
        """The entries that XREAD or XREADGROUP returns from one stream; empty if it timed out."""
        reply = self.execute_command(*command)
        return entries(reply[0][1]) if reply else []

    def close(self) -> None:
        self._connection.disconnect()


def entries(rows: Sequence[Any]) -> list[Entry]:
    """Converts stream entries from the server's format (RESP2), with their fields as maps."""
    return [(entry, dict(zip(fields[::2], fields[1::2], strict=True)) if fields else {}) for entry, fields in rows]
