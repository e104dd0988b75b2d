"""Settings shared by all processes, from the environment (RSM_*) or from code.

Only this module reads the environment. A program creates one `Settings()` and passes it on.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from rsm.broker.errors import InvalidRequest
from rsm.broker.protocol.ids import check_id, is_id

log = logging.getLogger("rsm.settings")

PREFIX = "RSM_"
# Token-seconds of KV cache are larger numbers than tokens or ms: a call may hold thousands of tokens for a second.
_KV_BOUNDS = (10_000, 40_000, 160_000, 640_000, 2_560_000, 10_000_000)
# Further known variables: for one process only (workers/environment.py, the vLLM scheduler), and for tests.
_OTHERS = {"RSM_ENGINE", "RSM_NODE", "RSM_SUPERVISOR", "RSM_BIRTH"}
_TESTS = "RSM_TEST_"
# Settings that had another name before.
_RENAMED = {"RSM_PROMPT_PIECE": "RSM_PROMPT_CHUNK"}

# The order in which vLLM, or a modelled engine, runs its calls: by arrival; by class, level and arrival; or as the
# second, with each program's service counted while its calls run, and with preemption.
EngineScheduler = Literal["fcfs", "priority", "plas"]
LogFormat = Literal["text", "json"]


class Settings(BaseSettings):
    """The settings of clients, routers and workers. The name of a duration states its unit."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", hide_input_in_errors=True)

    redis_url: SecretStr | None = Field(default=None, description="see docs/operations.md; default: embedded server")
    wait_replicas: int = Field(default=0, ge=0, description="replicas that must confirm a write before it is accepted")
    wait_ms: int = Field(default=1000, ge=1, le=5000, description="how long to wait for them")
    namespace: str = Field(default="rsm", description="hash tag of all keys")
    data_dir: Path | None = Field(default=None, description="the embedded server's folder; default: in XDG_STATE_HOME")

    lease_ms: int = Field(default=2500, ge=300, description="a worker or router that is silent for this long is dead")
    heartbeat_ms: int = Field(default=500, ge=50, description="how often a worker renews its lease")
    tick_ms: int = Field(default=250, ge=20, description="how often a router looks for dead engines and deadlines")
    max_attempts: int = Field(default=3, ge=1, description="failed attempts after which a call is a dead letter")
    max_deaths: int = Field(default=3, ge=2, description="engine deaths during a call after which it is a dead letter")

    result_ttl_s: int = Field(default=3600, ge=1, description="lifetime of a finished call's record, log and inbox")
    session_ttl_s: int = Field(default=3600, ge=1, description="lifetime of an idle session's entry and affinity")
    max_body_bytes: int = Field(default=8 << 20, ge=1024, description="largest body of a call")
    max_open_calls: int = Field(default=200_000, ge=0, description="all unfinished calls; 0 = no limit, also below")
    max_open_bytes: int = Field(default=1 << 30, ge=0, description="bytes of the bodies of all unfinished calls")
    max_session_calls: int = Field(default=20_000, ge=0, description="unfinished calls of one session")
    max_session_bytes: int = Field(default=256 << 20, ge=0, description="bytes of the bodies of these")
    max_retained_bytes: int = Field(default=1 << 30, ge=0, description="bytes of finished calls: record, result, log")
    max_dead_bytes: int = Field(default=256 << 20, ge=0, description="bytes of dead letters")
    inbox_max: int = Field(default=10_000, ge=100, description="events kept in a client's inbox, approximately")
    batch: int = Field(default=256, ge=1, le=4096, description="calls per round trip in router, worker and client")

    policy: str = Field(default="autellix", description="routing policy: a name or package.module:Class")
    cache_token_threshold: int = Field(default=2048, ge=0, description="prompts up to this many tokens go anywhere")
    stealing: bool = Field(default=True, description="idle engines take waiting calls of loaded ones (policy cost)")
    service_unit: str = Field(
        default="tokens", description="unit of service: tokens, work, time, kv, or package.module:Class"
    )
    service_rule: Literal["path", "total"] = Field(
        default="path", description="a program's service: its longest path of calls (path), or all its calls (total)"
    )
    level_bounds: Annotated[tuple[int, ...], NoDecode] = Field(
        default=(1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000),
        max_length=15,
        description="upper bounds of the scheduling levels, in service units",
    )
    starvation_beta: float = Field(
        default=8.0, ge=0, allow_inf_nan=False, description="ratio wait / run at which a program starves; 0 = never"
    )
    admission: bool = Field(default=False, description="throttle programs whose contexts fit no engine's KV cache")
    admission_factor: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="contexts of an engine as a multiple of its KV cache"
    )
    admission_half_life_s: float = Field(
        default=8.0, gt=0, allow_inf_nan=False, description="time after which an idle program's context counts half"
    )
    engine_scheduler: EngineScheduler = Field(default="priority", description="the order in which an engine runs calls")
    prompt_chunk: int = Field(
        default=512, ge=0, description="prompt tokens per step of a worse program beside a better one (plas); 0 = all"
    )
    drain_grace_s: float = Field(default=30.0, ge=0, description="how long a draining worker lets running calls finish")
    # Longer than any one step takes (a huge prompt in one chunk, kernels compiled on first use).
    stall_s: float = Field(default=300.0, ge=0, description="an engine with calls but no progress is dead; 0 = never")
    start_s: float = Field(default=1800.0, ge=0, description="how long an engine may take to start; 0 = no limit")
    openai_api_key: SecretStr | None = Field(default=None, description="for engines of backend openai; never shown")
    log_level: str | None = Field(default=None, description="DEBUG, INFO, WARNING or ERROR; default: by process")
    log_format: LogFormat = Field(default="text", description="text, or json: one object per line")

    @field_validator("namespace")
    @classmethod
    def _namespace_is_an_id(cls, value: str) -> str:
        if not is_id(value):
            raise ValueError("must be 1 to 128 characters from A-Z a-z 0-9 . _ : - without a reserved end like :events")
        return value

    @model_validator(mode="after")
    def _limits_allow_one_body(self) -> Settings:
        for name in ("max_open_bytes", "max_session_bytes", "max_dead_bytes"):
            if 0 < getattr(self, name) < self.max_body_bytes:
                variable = f"{PREFIX}{name.upper()}"
                raise ValueError(f"{variable} must be 0 or at least RSM_MAX_BODY_BYTES ({self.max_body_bytes})")
        return self

    @model_validator(mode="before")
    @classmethod
    def _bounds_fit_unit(cls, data: dict[str, object]) -> dict[str, object]:
        return {"level_bounds": _KV_BOUNDS, **data} if data.get("service_unit") == "kv" else data

    @field_validator("level_bounds", mode="before")
    @classmethod
    def _bounds_from_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return tuple(int(v) for v in value.replace(",", " ").split())
        except ValueError:
            raise ValueError("must be whole numbers") from None

    @field_validator("level_bounds")
    @classmethod
    def _bounds_increase(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("must be strictly increasing")
        return value

    @field_validator("log_level")
    @classmethod
    def _level_is_known(cls, value: str | None) -> str | None:
        if value is not None and value.upper() not in logging.getLevelNamesMapping():
            raise ValueError("must be DEBUG, INFO, WARNING or ERROR")
        return value.upper() if value else None

    @model_validator(mode="after")
    def _report_unknown(self) -> Settings:
        report_unknown(os.environ)
        return self

    @classmethod
    def with_defaults(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from the environment, with these values for what it leaves out."""
        return cls(**{n: v for n, v in values.items() if f"{PREFIX}{n.upper()}" not in os.environ})

    def wait_command(self) -> tuple[str, int, int] | None:
        """The WAIT to send with a write that must not be lost; None if `wait_replicas` is 0."""
        return ("WAIT", self.wait_replicas, self.wait_ms) if self.wait_replicas else None

    def url(self) -> str:
        """The Redis URL in clear text, for connections only. It may contain a password: never print it."""
        if self.redis_url is not None:
            return self.redis_url.get_secret_value()
        return f"unix://{self.socket_path()}"

    def socket_path(self) -> Path:
        """The socket of this user's embedded server, which is used when no Redis URL is set."""
        return self.state_dir() / "redis.sock"

    def state_dir(self) -> Path:
        if self.data_dir is not None:
            return self.data_dir
        return _user_folder("XDG_STATE_HOME", ".local/state")

    @staticmethod
    def cache_dir() -> Path:
        """The folder for files that can be made again, such as the tiny model."""
        return _user_folder("XDG_CACHE_HOME", ".cache")

    def environment(self) -> dict[str, str]:
        """These settings as RSM_* variables, for a child process. They may contain a password: never log them."""
        given = {name: value for name, value in self if value is not None and name != "redis_url"}
        return {"RSM_REDIS_URL": self.url()} | {f"{PREFIX}{n.upper()}": _as_text(v) for n, v in given.items()}

    def with_redis(self, url: str | None, namespace: str | None = None) -> Settings:
        """A copy that uses another server or namespace."""
        changes: dict[str, object] = {}
        if url is not None:
            changes["redis_url"] = SecretStr(url)
        if namespace is not None:
            changes["namespace"] = check_id(namespace, "namespace")
        return self.model_copy(update=changes)


def _as_text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _user_folder(variable: str, below_home: str) -> Path:
    """By the XDG base directory specification, 0.8, which ignores a relative path in the variable."""
    configured = Path(os.environ.get(variable, ""))
    if configured.is_absolute():
        return configured / "rsm-engine"
    try:
        return Path.home() / below_home / "rsm-engine"
    except RuntimeError:  # no HOME, and no entry for this user: a container
        raise InvalidRequest(
            "This user has no home folder. Set RSM_DATA_DIR (for the embedded Redis) and XDG_CACHE_HOME (for the tiny "
            "model) to folders that it can write to, or set RSM_REDIS_URL or --redis to a running Redis."
        ) from None


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that look like settings but are not, each with advice."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | _OTHERS
    unknown = (n for n in environment if n.startswith(PREFIX) and n not in known and not n.startswith(_TESTS))
    return {name: _advice(name, known) for name in unknown}


def _advice(name: str, known: set[str]) -> str:
    if name in _RENAMED:
        return f"it is now called {_RENAMED[name]}."
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else "docs/operations.md lists all settings."


_reported: set[str] = set()


def report_unknown(environment: Mapping[str, str]) -> None:
    """Warns once per process about each unknown variable."""
    for name, advice in unknown_variables(environment).items():
        if name not in _reported:
            _reported.add(name)
            log.warning("%s is not a setting of rsm-engine and has no effect: %s", name, advice)
