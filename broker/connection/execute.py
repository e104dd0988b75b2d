"""Sends scripts with EVALSHA, and with EVAL if the server does not know the script; sync and asyncio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis
import redis.asyncio
from redis.exceptions import NoScriptError

from rsm.broker.connection.dedicated import DedicatedConnection
from rsm.broker.protocol.scripts import Arg, Command, T, all_scripts

Server = redis.Redis | DedicatedConnection


def run(server: Server, command: Command[T]) -> T:
    """Runs one command in one round trip."""
    send: Any = server.execute_command  # untyped in redis-py
    try:
        reply = send("EVALSHA", command.script.sha, 1, *command.args)
    except NoScriptError:
        reply = send("EVAL", command.script.text, 1, *command.args)
    return command.parse(reply)


def _exchange(server: Server, commands: Sequence[Sequence[Arg]]) -> list[Any]:
    if isinstance(server, DedicatedConnection):
        return server.exchange(commands)
    pipe: Any = server.pipeline(transaction=False)
    for command in commands:
        pipe.execute_command(*command)
    replies: list[Any] = pipe.execute(raise_on_error=False)
    return replies


def run_replicated(server: Server, command: Command[T], wait: Sequence[Arg]) -> tuple[T, int]:
    """Runs one command and `wait`, a WAIT, in one round trip; also returns how many replicas have the write."""
    reply, acks = _exchange(server, [("EVALSHA", command.script.sha, 1, *command.args), wait])
    if isinstance(reply, NoScriptError):
        reply, acks = _exchange(server, [("EVAL", command.script.text, 1, *command.args), wait])
    return command.parse(_checked(reply)), _checked(acks)


def _checked(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise reply
    return reply


def run_after(server: DedicatedConnection, wait: Sequence[Arg], command: Command[T]) -> T:
    """Runs a blocking command, then a script, in one round trip. The script runs as soon as the wait ends."""
    waited, reply = server.exchange([wait, ("EVALSHA", command.script.sha, 1, *command.args)])
    _checked(waited)
    if isinstance(reply, NoScriptError):
        return run(server, command)
    return command.parse(_checked(reply))


def load_all(server: Server) -> None:
    """Loads every script into the server."""
    send: Any = server.execute_command
    for script in all_scripts():
        send("SCRIPT LOAD", script.text)


async def arun_replicated(server: redis.asyncio.Redis, command: Command[T], wait: Sequence[Arg]) -> tuple[T, int]:
    """Runs one command and `wait`, a WAIT, in one round trip; also returns how many replicas have the write."""

    async def exchange(*run: Arg) -> list[Any]:
        pipe: Any = server.pipeline(transaction=False)
        pipe.execute_command(*run)
        pipe.execute_command(*wait)
        replies: list[Any] = await pipe.execute(raise_on_error=False)
        return replies

    reply, acks = await exchange("EVALSHA", command.script.sha, 1, *command.args)
    if isinstance(reply, NoScriptError):
        reply, acks = await exchange("EVAL", command.script.text, 1, *command.args)
    return command.parse(_checked(reply)), _checked(acks)


async def arun(server: redis.asyncio.Redis, command: Command[T]) -> T:
    """Runs one command in one round trip."""
    send: Any = server.execute_command
    try:
        reply = await send("EVALSHA", command.script.sha, 1, *command.args)
    except NoScriptError:
        reply = await send("EVAL", command.script.text, 1, *command.args)
    return command.parse(reply)


def run_all(server: Server, commands: Sequence[Command[Any]], wait: Sequence[Arg] | None = None) -> list[Any]:
    """Runs commands in order in one round trip, followed by `wait`, a WAIT, if given.

    If the server has lost its scripts (in a restart), loads all of them before it repeats the failed commands, so that
    no command of a batch is skipped while the others run.

    Raises:
        redis.RedisError: the first error of any command; the other commands have run.
    """
    sent: list[Sequence[Arg]] = [("EVALSHA", c.script.sha, 1, *c.args) for c in commands]
    replies = _exchange(server, sent if wait is None else [*sent, wait])
    results = []
    for command, reply in zip(commands, replies, strict=False):
        if isinstance(reply, NoScriptError):
            load_all(server)
            results.append(run(server, command))
        else:
            results.append(command.parse(_checked(reply)))
    return results
