"""The root of the `rsm` command: global options, and error messages instead of tracebacks."""

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
from rsm.broker.connection.retry import OUTAGES, reason
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

# Also accepted after the command's name, where people write them: `rsm ps --namespace a`.
_GLOBAL = ("--redis", "--namespace", "--log-level")
# Engine options whose names differ from the fields of EngineConfig by more than dashes.
_ENGINE_OPTIONS = {"gpu_id": "--gpu", "engine_args": "--engine-arg"}


class Rsm(TyperGroup):
    """Accepts global options anywhere, and turns expected errors into one line on stderr and an exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, hoist(args))

    def list_commands(self, ctx: Any) -> list[str]:
        return in_order(super().list_commands(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None:
            command.rich_help_panel = group_of(cmd_name)
            command.help = _unwrapped(command.help or "")
        return command

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _errors_reported():  # --install-completion writes files
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _errors_reported():
            return super().invoke(ctx)


def _unwrapped(text: str) -> str:
    """Each paragraph on one line: Typer keeps the line breaks of all paragraphs but the first."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


@contextmanager
def _errors_reported() -> Iterator[None]:
    try:
        yield
    except (RsmError, ValidationError, redis.RedisError, OSError, UnicodeError) as e:
        say_error(_message(e))
        raise typer.Exit(_status(e)) from None


def _message(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return explain(error, lambda name: _ENGINE_OPTIONS.get(name, f"--{name.replace('_', '-')}"))
    if isinstance(error, redis.RedisError):
        return f"Redis failed or refused a command ({type(error).__name__}). Run `rsm doctor` to find out why."
    if isinstance(error, OSError):
        why = error.strerror or str(error).rstrip(".") or type(error).__name__
        return f"{error.filename}: {why}." if error.filename else f"{why}."
    if isinstance(error, UnicodeError):
        return f"The arguments or the input are not valid UTF-8 ({type(error).__name__})."
    return str(error)


def _status(error: Exception) -> int:
    if isinstance(error, EvictingRedis):
        return os.EX_CONFIG
    unavailable = isinstance(error, BrokerUnavailable | ValidationError | redis.RedisError)
    return EXIT_UNAVAILABLE if unavailable else EXIT_FAILED


def hoist(args: list[str]) -> list[str]:
    """Moves global options to the front. Leaves everything after `--` alone."""
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
    epilog="Commands that take an id also accept its short form, or any unique beginning or end of it.",
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
            help="Redis server. Default: RSM_REDIS_URL, else this user's embedded server.",
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
            help="DEBUG, INFO, WARNING or ERROR. Default: RSM_LOG_LEVEL, else INFO for processes that serve and "
            "WARNING for other commands.",
        ),
    ] = None,
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    if log_level is not None:
        _check_level(log_level)
    serves = ctx.invoked_subcommand in SERVING
    with logs.held_back():
        settings = Settings() if log_level is None else Settings(log_level=log_level)
        # A process that serves logs more by default: it calls `configure` again.
        logs.configure(settings, str(ctx.invoked_subcommand) if serves else "rsm", "WARNING")
    log_errors(serves and settings.log_format == "json")
    if serves:
        tolerate()
    ctx.obj = settings.with_redis(redis_url, namespace)
    _check_url(ctx.obj)


def settings_while_completing(ctx: typer.Context) -> Settings:
    """The settings by the options typed so far. Completion runs no callback, so `ctx.obj` is not set."""
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


# -- what commands use


def settings_of(ctx: typer.Context) -> Settings:
    settings: Settings = ctx.obj
    return settings


def require_redis(settings: Settings) -> None:
    """Fails at once if Redis does not answer, where a service would keep trying.

    Raises:
        BrokerUnavailable: Redis does not answer; the message names its address and says what to do.
    """
    server: Any = connect(settings)
    try:
        server.time()  # not PING, which a Redis with a full disk refuses
    except (redis.AuthenticationError, redis.ResponseError) as e:
        raise BrokerUnavailable(
            f"Redis at {shown_url(settings.url())} refuses this client ({type(e).__name__}). Check user and password."
        ) from None
    except OUTAGES as e:
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
