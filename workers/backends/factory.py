"""Creates the backend that a configuration names."""

from __future__ import annotations

from collections.abc import Callable

from rsm.broker.errors import InvalidRequest
from rsm.broker.settings import Settings
from rsm.workers.backends.base import Backend
from rsm.workers.config import EngineConfig
from rsm.workers.scheduling.service import create_unit


def create_backend(config: EngineConfig, settings: Settings) -> Backend:
    """Creates the backend, not yet started. Imports only that one: a worker for a remote server needs no vLLM.

    Raises:
        InvalidRequest: `engine_args` do not fit this backend, or there is no such service unit.
    """
    create_unit(settings.service_unit)
    try:
        return _FACTORIES[config.backend](config, settings)
    except (TypeError, ValueError) as e:
        raise InvalidRequest(f"engine_args of {config.engine_id} do not fit backend {config.backend}: {e}") from e


def _vllm(config: EngineConfig, settings: Settings) -> Backend:
    from rsm.workers.backends.vllm.backend import VllmBackend

    return VllmBackend(config, settings)


def _openai(config: EngineConfig, settings: Settings) -> Backend:
    from rsm.workers.backends.openai.backend import OpenAIBackend

    slots = {"max_num_seqs": config.max_num_seqs} if "max_num_seqs" in config.model_fields_set else {}
    return OpenAIBackend(
        config.base_url or "",
        config.model,
        api_key=config.api_key or settings.openai_api_key,
        **slots | config.engine_args,
    )


def _sim(config: EngineConfig, settings: Settings) -> Backend:
    """engine_args: see `config_of`."""
    from rsm.workers.backends.sim.backend import SimBackend
    from rsm.workers.backends.sim.config import config_of
    from rsm.workers.scheduling.program import rules_of

    args = {"max_num_seqs": config.max_num_seqs, "scheduler": config.scheduler(settings), **config.engine_args}
    if config.max_model_len is not None:
        args["max_model_len"] = config.max_model_len
    if config.model:
        args["model"] = config.model
    given = {"model": "sim-8b", "plas": rules_of(settings), "service_unit": settings.service_unit}
    return SimBackend(config_of(args, **given))


_FACTORIES: dict[str, Callable[[EngineConfig, Settings], Backend]] = {"vllm": _vllm, "openai": _openai, "sim": _sim}
