"""The root of the `rsm` command: global options, and one sentence instead of a traceback."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any

import redis
import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from rsm.broker import BrokerUnavailable, Client, EvictingRedis, InvalidRequest, RsmError, Settings, logs
from rsm.broker.config_errors import explain
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import BLIPS, reason
from rsm.broker.connection.topology import place_of, shown_url
from rsm.broker.protocol.keys import Keys
from rsm.broker.views.dead_letters import DeadLetters
from rsm.broker.views.lookup import Lookup
from rsm.broker.views.monitor import Monitor
from rsm.cli.groups import SERVING, group_of, in_order
from rsm.cli.output import log_errors, say_error
from rsm.cli.streams import tolerate

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 2

# These may stand behind a command's name as well as before it: `rsm ps --namespace a` is how people write.
_GLOBAL = ("--redis", "--namespace", "--log-level")
# Options of an engine whose names differ from those of its configuration in more than the dashes.
_ENGINE_OPTIONS = {"gpu_id": "--gpu", "engine_args": "--engine-arg"}


class Rsm(TyperGroup):
    """Takes global options anywhere, and turns errors raised on purpose into one sentence and an exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, hoist(args))

    def list_commands(self, ctx: Any) -> list[str]:
        return in_order(super().list_commands(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None:
            command.rich_help_panel = group_of(cmd_name)
        return command

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _in_a_sentence():  # --install-completion writes files
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _in_a_sentence():
            return super().invoke(ctx)


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    try:
        yield
    except (RsmError, ValidationError, redis.RedisError, OSError, UnicodeError) as e:
        say_error(_sentence(e))
        raise typer.Exit(_status(e)) from None


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return explain(error, lambda name: _ENGINE_OPTIONS.get(name, f"--{name.replace('_', '-')}"))
    if isinstance(error, redis.RedisError):
        return f"Redis refused or went away ({type(error).__name__}); `rsm doctor` says what is wrong."
    if isinstance(error, OSError):
        why = error.strerror or str(error).rstrip(".") or type(error).__name__
        return f"{error.filename}: {why}." if error.filename else f"{why}."
    if isinstance(error, UnicodeError):
        return f"A text that was given cannot be written as UTF-8 or read as such ({type(error).__name__})."
    return str(error)


def _status(error: Exception) -> int:
    if isinstance(error, EvictingRedis):
        return os.EX_CONFIG
    unavailable = isinstance(error, BrokerUnavailable | ValidationError | redis.RedisError)
    return EXIT_UNAVAILABLE if unavailable else EXIT_FAILED


def hoist(args: list[str]) -> list[str]:
    """Moves global options to the front; leaves alone what stands behind `--`."""
    cut = args.index("--") if "--" in args else len(args)
    front: list[str] = []
    rest: list[str] = []
    words = iter(args[:cut])
    for word in words:
        if word in _GLOBAL:
            front += [word, *[value for value in [next(words, None)] if value is not None]]
        elif word.startswith(tuple(f"{name}=" for name in _GLOBAL)):
            front.append(word)
        else:
            rest.append(word)
    return [*front, *rest, *args[cut:]]


app = typer.Typer(
    name="rsm",
    cls=Rsm,
    help="A durable, program-aware broker for LLM calls, on Redis. Start with `rsm demo` or `rsm up`.",
    epilog="Commands that take an id also take its short form, or any beginning or end of it that is unique.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rsm-engine {version('rsm-engine')}")
        raise typer.Exit


@app.callback()
def _global_options(
    ctx: typer.Context,
    redis_url: Annotated[
        str | None,
        typer.Option(
            "--redis",
            metavar="URL",
            help="Redis server. Default: RSM_REDIS_URL, else the embedded server of this user.",
        ),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Separates deployments that share a Redis. Default: RSM_NAMESPACE, else rsm."
        ),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL",
            help="DEBUG, INFO, WARNING or ERROR. Default: RSM_LOG_LEVEL, else INFO if the command serves, or WARNING.",
        ),
    ] = None,
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    if log_level is not None:
        _check_level(log_level)
    serves = ctx.invoked_subcommand in SERVING
    with logs.held_back():
        settings = Settings() if log_level is None else Settings(log_level=log_level)
        # A process that serves says more: it calls `configure` again, with its own default.
        logs.configure(settings, str(ctx.invoked_subcommand) if serves else "rsm", "WARNING")
    log_errors(serves and settings.log_format == "json")
    if serves:
        tolerate()
    ctx.obj = settings.with_redis(redis_url, namespace)
    _check_url(ctx.obj)


def settings_while_completing(ctx: typer.Context) -> Settings:
    """The settings that the options typed so far say; no callback is run for a completion."""
    given = ctx.find_root().params
    return Settings().with_redis(given.get("redis_url"), given.get("namespace"))


def _check_url(settings: Settings) -> None:
    try:
        place_of(settings.url(), settings.namespace)
    except InvalidRequest as e:
        raise typer.BadParameter(str(e), param_hint="--redis or RSM_REDIS_URL") from None


def _check_level(level: str) -> None:
    if level.upper() not in logging.getLevelNamesMapping():
        raise typer.BadParameter("must be DEBUG, INFO, WARNING or ERROR", param_hint="--log-level")


# -- what commands work with


def settings_of(ctx: typer.Context) -> Settings:
    settings: Settings = ctx.obj
    return settings


def require_redis(settings: Settings) -> None:
    """Fails at once, instead of after the long patience that a service has with its Redis.

    Raises:
        BrokerUnavailable: Redis does not answer; the message says where it was looked for, and what to do.
    """
    server: Any = connect(settings)
    try:
        server.time()  # not PING: a Redis whose disk is full refuses that one too
    except (redis.AuthenticationError, redis.ResponseError) as e:
        raise BrokerUnavailable(
            f"Redis at {shown_url(settings.url())} refuses this client ({type(e).__name__}); check user and password."
        ) from None
    except BLIPS as e:
        raise BrokerUnavailable(
            f"Redis at {shown_url(settings.url())} does not answer ({reason(e)}). "
            "Start everything with `rsm up`, or name a server with --redis or RSM_REDIS_URL."
        ) from None
    finally:
        server.close()


@contextmanager
def client_of(ctx: typer.Context) -> Iterator[Client]:
    require_redis(settings_of(ctx))
    with Client(settings=settings_of(ctx)) as client:
        yield client


@contextmanager
def server_of(ctx: typer.Context) -> Iterator[redis.Redis]:
    require_redis(settings_of(ctx))
    server: redis.Redis = connect(settings_of(ctx))
    try:
        yield server
    finally:
        server.close()


@contextmanager
def monitor_of(ctx: typer.Context) -> Iterator[Monitor]:
    with server_of(ctx) as server:
        yield Monitor(settings_of(ctx), server)


@contextmanager
def lookup_of(ctx: typer.Context) -> Iterator[Lookup]:
    with server_of(ctx) as server:
        yield Lookup(Keys(settings_of(ctx).namespace), server)


@contextmanager
def dead_letters_of(ctx: typer.Context) -> Iterator[DeadLetters]:
    with server_of(ctx) as server:
        yield DeadLetters(settings_of(ctx), server)
