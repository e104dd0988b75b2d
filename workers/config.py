"""What an engine is made of: its configuration, and the backend that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from rsm.broker.protocol.ids import check_id
from rsm.broker.settings import EngineScheduler, Settings

BackendName = Literal["vllm", "openai", "sim"]


class EngineConfig(BaseModel):
    """One engine.

    Attributes:
        engine_id: names its queue in Redis.
        model: what it serves: a name, or a local folder. For `vllm`, none = a tiny random model built locally.
        gpu_id: the first of its GPUs; the others follow, as many as `tensor_parallel_size`.
        max_num_seqs: calls that run at once; for `openai`, unless it is named, what the server says of itself.
        backend: "vllm", "openai" (any remote OpenAI-compatible server) or "sim" (a model of an engine).
        engine_args: any further argument of the backend; for `vllm`, of vLLM's engine.
        base_url: of the remote server, for `openai`, such as http://host:8000/v1.
        api_key: for `openai`; shown in no repr and no log.
        served_model_name: the name that calls ask for, where it is not `model`.
        engine_scheduler: in which order the engine runs its calls, "fcfs", "priority" or "plas"; none: as
            RSM_ENGINE_SCHEDULER says. Not for `openai`, whose engine orders them itself.
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
    def _backend_has_what_it_needs(self) -> EngineConfig:
        if self.backend == "openai" and not self.base_url:
            raise ValueError('backend "openai" needs base_url, such as http://host:8000/v1')
        return self

    @model_validator(mode="after")
    def _one_says_who_schedules(self) -> EngineConfig:
        if self.engine_scheduler is None:
            return self
        if self.backend == "openai":
            raise ValueError('backend "openai" takes no engine_scheduler: a remote server orders its calls itself')
        for name in self.engine_args:
            if name.lstrip("-").replace("-", "_") in ("scheduler_cls", "scheduling_policy", "scheduler"):
                raise ValueError(
                    f"engine_scheduler={self.engine_scheduler} and {name} among engine_args contradict each other; "
                    "leave one out"
                )
        return self

    def scheduler(self, settings: Settings) -> EngineScheduler:
        """In which order the engine runs its calls, unless engine_args say so."""
        return self.engine_scheduler or settings.engine_scheduler

    def with_args(self, args: Mapping[str, Any]) -> EngineConfig:
        """The same with further arguments for its backend; those that it has itself stand above them."""
        return self.model_copy(update={"engine_args": {**args, **self.engine_args}}) if args else self

    def as_json(self) -> str:
        """For another process: what was named, without the key, which travels apart."""
        return self.model_dump_json(exclude={"api_key"}, exclude_unset=True)

    def gpus(self) -> range:
        """Its GPUs, where there are any."""
        return range(self.gpu_id, self.gpu_id + self.tensor_parallel_size)

    def shares_gpu_with(self, other: EngineConfig) -> bool:
        """Whether both would compute on one of them."""
        both_vllm = self.backend == other.backend == "vllm"
        return both_vllm and bool(set(self.gpus()) & set(other.gpus()))

    @property
    def served_name(self) -> str:
        return self.served_model_name or self.model
