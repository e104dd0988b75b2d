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

from rsm.broker import BrokerUnavailable, Client, EvictingRedis, InvalidRequest, RsmError, Settings
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import BLIPS, reason
from rsm.broker.connection.topology import place_of, shown_url
from rsm.broker.views.dead_letters import DeadLetters
from rsm.broker.views.monitor import Monitor
from rsm.cli.output import say_error

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 2

# These may stand behind a command's name as well as before it: `rsm ps --namespace a` is how people write.
_GLOBAL = ("--redis", "--namespace", "--log-level")


class Rsm(TyperGroup):
    """Takes global options anywhere, and turns errors raised on purpose into one sentence and an exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, hoist(args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokerUnavailable as e:
            say_error(str(e))
            raise typer.Exit(EXIT_UNAVAILABLE) from None
        except EvictingRedis as e:
            say_error(str(e))
            raise typer.Exit(os.EX_CONFIG) from None
        except RsmError as e:
            say_error(str(e))
            raise typer.Exit(EXIT_FAILED) from None
        except ValidationError as e:
            say_error(sentences(e))
            raise typer.Exit(EXIT_UNAVAILABLE) from None
        except redis.RedisError as e:
            say_error(f"Redis refused or went away ({type(e).__name__}); `rsm doctor` says what is wrong.")
            raise typer.Exit(EXIT_UNAVAILABLE) from None


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


def sentences(error: ValidationError) -> str:
    """What is wrong with a configuration, without the values: one of them may be a secret."""
    return " ".join(
        f"{'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg'].removeprefix('Value error, ')}."
        for e in error.errors(include_url=False, include_input=False)
    )


app = typer.Typer(
    name="rsm",
    cls=Rsm,
    help="A durable, program-aware broker for LLM calls, on Redis. Start with `rsm demo` or `rsm up`.",
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
            "--redis", help="URL (redis+sentinel:// and redis+cluster:// too); none = RSM_REDIS_URL, else embedded."
        ),
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Hash tag of all keys; none = RSM_NAMESPACE, else rsm.")] = None,
    log_level: Annotated[
        str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR; none = RSM_LOG_LEVEL, else what suits.")
    ] = None,
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    if log_level is not None:
        _check_level(log_level)
    settings = Settings() if log_level is None else Settings(log_level=log_level)
    # A process that serves says more: it calls `rsm.broker.logs.configure` with its own default.
    logging.getLogger().setLevel(settings.log_level or "WARNING")
    ctx.obj = settings.with_redis(redis_url, namespace)
    _check_url(ctx.obj)


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
def dead_letters_of(ctx: typer.Context) -> Iterator[DeadLetters]:
    with server_of(ctx) as server:
        yield DeadLetters(settings_of(ctx), server)
