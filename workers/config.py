"""The configuration of one engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from rsm.broker.protocol.ids import check_id
from rsm.broker.settings import EngineScheduler, Settings

BackendName = Literal["vllm", "openai", "sim"]


class EngineConfig(BaseModel):
    """The configuration of one engine.

    Attributes:
        engine_id: names its queue in Redis.
        model: a model name or a local folder. Default for `vllm`: a tiny random model, built locally.
        gpu_id: the first of its `tensor_parallel_size` consecutive GPUs.
        max_num_seqs: calls that run at once. Default for `openai`: what the server reports.
        backend: "vllm", "openai" (any remote OpenAI-compatible server) or "sim" (a modelled engine).
        engine_args: further arguments of the backend; for `vllm`, of vLLM's engine.
        base_url: the URL of the remote server, for `openai`, such as http://host:8000/v1.
        api_key: for `openai`; never in a repr or a log.
        served_model_name: the name that calls use. Default: `model`.
        engine_scheduler: the order in which the engine runs its calls: "fcfs", "priority" or "plas". Default: the
            value of RSM_ENGINE_SCHEDULER. Not for `openai`, whose server orders its calls itself.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=(), extra="forbid", hide_input_in_errors=True)

    engine_id: str
    model: str = ""
    gpu_id: int = Field(default=0, ge=0)
    tensor_parallel_size: int = Field(default=1, ge=1)
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_seqs: int = Field(default=256, ge=1)
    trust_remote_code: bool = False
    dtype: str = "auto"
    backend: BackendName = "vllm"
    engine_args: dict[str, Any] = Field(default_factory=dict)
    base_url: str | None = None
    api_key: SecretStr | None = None
    served_model_name: str | None = None
    engine_scheduler: EngineScheduler | None = None

    @field_validator("engine_id")
    @classmethod
    def _engine_id(cls, value: str) -> str:
        return check_id(value, "engine_id")

    @model_validator(mode="after")
    def _backend_has_its_arguments(self) -> EngineConfig:
        if self.backend == "openai" and not self.base_url:
            raise ValueError('backend "openai" needs base_url, such as http://host:8000/v1')
        return self

    @model_validator(mode="after")
    def _scheduler_is_set_once(self) -> EngineConfig:
        if self.engine_scheduler is None:
            return self
        if self.backend == "openai":
            raise ValueError(
                'backend "openai" takes no engine_scheduler, because a remote server orders its calls itself; '
                "leave it out"
            )
        for name in self.engine_args:
            if name.lstrip("-").replace("-", "_") in ("scheduler_cls", "scheduling_policy", "scheduler"):
                raise ValueError(
                    f"engine_scheduler={self.engine_scheduler} and {name} in engine_args contradict each other; "
                    "leave one out"
                )
        return self

    def scheduler(self, settings: Settings) -> EngineScheduler:
        """The order in which the engine runs its calls, unless engine_args set one."""
        return self.engine_scheduler or settings.engine_scheduler

    def with_args(self, args: Mapping[str, Any]) -> EngineConfig:
        """A copy with further arguments for the backend. Its own arguments take precedence."""
        return self.model_copy(update={"engine_args": {**args, **self.engine_args}}) if args else self

    def as_json(self) -> str:
        """The fields that were set, for another process. Without the key, which is passed separately."""
        return self.model_dump_json(exclude={"api_key"}, exclude_unset=True)

    def gpus(self) -> range:
        """The GPUs it uses, if the machine has any."""
        return range(self.gpu_id, self.gpu_id + self.tensor_parallel_size)

    def shares_gpu_with(self, other: EngineConfig) -> bool:
        """Whether both would use the same GPU."""
        both_vllm = self.backend == other.backend == "vllm"
        return both_vllm and bool(set(self.gpus()) & set(other.gpus()))

    @property
    def served_name(self) -> str:
        return self.served_model_name or self.model
