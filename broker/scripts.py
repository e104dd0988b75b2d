"""Lua scripts as typed commands: one file per transition, loaded once, run by EVALSHA.

A `Command` is a script with its arguments and the parser of its reply. It knows nothing of connections, so the
synchronous and the asynchronous client run the very same ones.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Generic, TypeVar

import redis
import redis.asyncio
from redis.exceptions import NoScriptError

T = TypeVar("T")
Arg = str | bytes | int | float

_INCLUDE = re.compile(r"^--- @include (.+)\n")


@dataclass(frozen=True, slots=True)
class Script:
    """A script with its includes in place."""

    name: str
    text: str
    sha: str


@cache
def script(name: str) -> Script:
    """The script in lua/NAME.lua. Its first line may name the shared pieces it needs."""
    text = _read(name)
    head = _INCLUDE.match(text)
    if head:
        text = "\n".join([*(_read(piece) for piece in head[1].split()), text[head.end() :]])
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _read(name: str) -> str:
    return (files("broker") / "lua" / f"{name}.lua").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Command(Generic[T]):
    """One script call: arguments ready to send, and how to read the reply."""

    script: Script
    args: Sequence[Arg]
    parse: Callable[[Any], T]


def run(server: redis.Redis, command: Command[T]) -> T:
    """Runs one command in one round trip."""
    send: Any = server.execute_command  # untyped in redis-py
    try:
        reply = send("EVALSHA", command.script.sha, 1, *command.args)
    except NoScriptError:
        reply = send("EVAL", command.script.text, 1, *command.args)
    return command.parse(reply)


def run_after(server: redis.Redis, wait: Sequence[Arg], command: Command[T]) -> T:
    """A blocking command and then a script, in one round trip: the server runs the script the moment the wait ends."""
    pipe: Any = server.pipeline(transaction=False)
    pipe.execute_command(*wait)
    pipe.execute_command("EVALSHA", command.script.sha, 1, *command.args)
    waited, reply = pipe.execute(raise_on_error=False)
    if isinstance(waited, Exception):
        raise waited
    if isinstance(reply, NoScriptError):
        return run(server, command)
    if isinstance(reply, Exception):
        raise reply
    return command.parse(reply)


def load_all(server: redis.Redis) -> None:
    """Makes every script known to the server."""
    for entry in (files("broker") / "lua").iterdir():
        text = entry.read_text(encoding="utf-8")
        if text.startswith("--- @include"):
            server.script_load(script(entry.name.removesuffix(".lua")).text)


async def arun(server: redis.asyncio.Redis, command: Command[T]) -> T:
    """Runs one command in one round trip."""
    send: Any = server.execute_command
    try:
        reply = await send("EVALSHA", command.script.sha, 1, *command.args)
    except NoScriptError:
        reply = await send("EVAL", command.script.text, 1, *command.args)
    return command.parse(reply)


def run_all(server: redis.Redis, commands: Sequence[Command[Any]]) -> list[Any]:
    """Runs commands in order, in one round trip.

    A server that lost its scripts (a restart) gets all of them again before the refused commands are repeated, so
    that none of a batch is skipped while its neighbours run.

    Raises:
        redis.RedisError: the first error of any command; those before and after it have run.
    """
    if len(commands) == 1:  # spares the pipeline, which at low load is most of the way
        return [run(server, commands[0])]
    pipe: Any = server.pipeline(transaction=False)
    for command in commands:
        pipe.execute_command("EVALSHA", command.script.sha, 1, *command.args)
    replies = pipe.execute(raise_on_error=False)
    results = []
    for command, reply in zip(commands, replies, strict=True):
        if isinstance(reply, NoScriptError):
            load_all(server)
            results.append(run(server, command))
        elif isinstance(reply, Exception):
            raise reply
        else:
            results.append(command.parse(reply))
    return results
