"""Settings shared by all parts, from the environment (RSM_*) or given in code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from rsm.broker.protocol.ids import check_id

# Token-seconds of KV cache are more than tokens or ms of the same calls: some thousand tokens are held for a second.
_KV_BOUNDS = (10_000, 40_000, 160_000, 640_000, 2_560_000, 10_000_000)

# How vLLM, or the model of an engine, orders the calls that it has been given: by arrival; by class, level and arrival;
# or like that with the programs' service counted on, and with preemption.
EngineScheduler = Literal["fcfs", "priority", "plas"]


class Settings(BaseSettings):
    """One object for client, router and worker. Times in the unit that the name says."""

    model_config = SettingsConfigDict(env_prefix="RSM_", frozen=True, extra="ignore", hide_input_in_errors=True)

    redis_url: SecretStr | None = Field(None, description="see docs/operations.md; none = the embedded server")
    wait_replicas: int = Field(0, ge=0, description="replicas that must have a write before it counts as accepted")
    wait_ms: int = Field(1000, ge=1, le=5000, description="how long to wait for them")
    namespace: str = Field("rsm", description="hash tag of all keys")
    data_dir: Path | None = Field(None, description="where the embedded server lives; none = the user's state folder")

    lease_ms: int = Field(2500, ge=300, description="a worker or router silent for so long is dead")
    heartbeat_ms: int = Field(500, ge=50, description="how often a worker renews its lease")
    tick_ms: int = Field(250, ge=20, description="how often a router looks for dead engines and passed deadlines")
    max_attempts: int = Field(3, ge=1, description="attempts lost to errors before a call is a dead letter")
    max_deaths: int = Field(3, ge=2, description="engine processes that a call may take with it, the last one alone")

    result_ttl_s: int = Field(3600, ge=1, description="how long a finished call's record, log and inbox live")
    session_ttl_s: int = Field(3600, ge=1, description="how long an idle session's entry and affinity live")
    max_body_bytes: int = Field(8 << 20, ge=1024, description="largest body of a call")
    max_open_calls: int = Field(200_000, ge=0, description="unfinished calls in all; 0 = no bound, as below")
    max_open_bytes: int = Field(1 << 30, ge=0, description="bytes of their bodies")
    max_session_calls: int = Field(20_000, ge=0, description="unfinished calls of one session")
    max_session_bytes: int = Field(256 << 20, ge=0, description="bytes of their bodies")
    max_retained_bytes: int = Field(1 << 30, ge=0, description="bytes of finished calls: records, results, logs")
    max_dead_bytes: int = Field(256 << 20, ge=0, description="bytes of dead letters")
    inbox_max: int = Field(10_000, ge=100, description="events kept in a client's inbox, approximately")
    batch: int = Field(256, ge=1, le=4096, description="calls per round trip in router, worker and client")

    policy: str = Field("autellix", description="routing policy: a name or package.module:Class")
    cache_token_threshold: int = Field(2048, ge=0, description="prompts up to this many tokens go anywhere")
    stealing: bool = Field(True, description="idle engines take waiting calls of loaded ones; under policy cost")
    service_unit: str = Field("tokens", description="what calls cost: tokens, work, time, kv, or package.module:Class")
    service_rule: Literal["path", "total"] = Field(
        "path", description="what a program has had: its longest path of calls (path), or all of them (total)"
    )
    level_bounds: Annotated[tuple[int, ...], NoDecode] = Field(
        (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000),
        max_length=15,
        description="upper ends of the scheduling levels, in service units",
    )
    starvation_beta: float = Field(
        8.0, ge=0, allow_inf_nan=False, description="wait / run of a program at which its calls starve; 0 = never"
    )
    admission: bool = Field(False, description="programs whose contexts no engine's KV cache has room for wait")
    admission_factor: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="contexts that an engine may have, over its KV cache"
    )
    admission_half_life_s: float = Field(
        8.0, gt=0, allow_inf_nan=False, description="a program that thinks counts half as much after so long"
    )
    engine_scheduler: EngineScheduler = Field("priority", description="in which order an engine runs its calls")
    prompt_piece: int = Field(
        512,
        ge=0,
        description="prompt tokens a step of a worse program beside a better one (plas); 0 = all",
    )
    drain_grace_s: float = Field(30.0, ge=0, description="how long a draining worker lets running calls finish")
    # Longer than one step may take (a huge prompt in one chunk, kernels compiled on first use), shorter than patience.
    stall_s: float = Field(
        300.0, ge=0, description="an engine with calls and no progress for so long is dead; 0 = never"
    )
    start_s: float = Field(1800.0, ge=0, description="how long an engine may take to come up; 0 = for ever")

    @field_validator("namespace")
    @classmethod
    def _namespace_is_an_id(cls, value: str) -> str:
        return check_id(value, "namespace")

    @model_validator(mode="after")
    def _a_body_fits(self) -> Settings:
        for name in ("max_open_bytes", "max_session_bytes", "max_dead_bytes"):
            if 0 < getattr(self, name) < self.max_body_bytes:
                raise ValueError(f"{name} must be 0 or at least max_body_bytes ({self.max_body_bytes})")
        return self

    @model_validator(mode="before")
    @classmethod
    def _bounds_suit_the_unit(cls, data: dict[str, object]) -> dict[str, object]:
        return {"level_bounds": _KV_BOUNDS, **data} if data.get("service_unit") == "kv" else data

    @field_validator("level_bounds", mode="before")
    @classmethod
    def _bounds_from_text(cls, value: object) -> object:
        return tuple(int(v) for v in value.replace(",", " ").split()) if isinstance(value, str) else value

    @field_validator("level_bounds")
    @classmethod
    def _bounds_rise(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("level_bounds must rise")
        return value

    def wait_command(self) -> tuple[str, int, int] | None:
        """The WAIT that goes with a write that must not be lost; None if none is asked for."""
        return ("WAIT", self.wait_replicas, self.wait_ms) if self.wait_replicas else None

    def url(self) -> str:
        """The Redis URL in clear, for the connection alone; it may hold a password, so never print it."""
        if self.redis_url is not None:
            return self.redis_url.get_secret_value()
        return f"unix://{self.socket_path()}"

    def socket_path(self) -> Path:
        """Where the embedded server of this user listens when no Redis URL is set."""
        return self.state_dir() / "redis.sock"

    def state_dir(self) -> Path:
        if self.data_dir is not None:
            return self.data_dir
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return Path(base) / "rsm-engine"

    def environment(self) -> dict[str, str]:
        """The same settings as RSM_* variables, for a child process. They may hold a password: never log them."""
        given = {name: value for name, value in self if value is not None}
        return {"RSM_REDIS_URL": self.url()} | {
            f"RSM_{name.upper()}": " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            for name, value in given.items()
            if name != "redis_url"
        }

    def with_redis(self, url: str | None, namespace: str | None = None) -> Settings:
        """A copy that uses another server or namespace."""
        changes: dict[str, object] = {}
        if url is not None:
            changes["redis_url"] = SecretStr(url)
        if namespace is not None:
            changes["namespace"] = check_id(namespace, "namespace")
        return self.model_copy(update=changes)
