"""Facts about a server that OpenAI's API does not report: how many calls it runs at once, and its KV cache's size.

Each kind of server has its own endpoint: vLLM's `/metrics` (and `/server_info` in development mode), SGLang's
`/get_server_info`, llama.cpp's `/props`. A missing fact is no error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

_MOST_BYTES = 4 << 20
_CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class About:
    """`slots`: calls that run at once; `kv_tokens`: the capacity of its KV cache. 0 = unknown."""

    slots: int = 0
    kv_tokens: int = 0


async def fetch(client: httpx.AsyncClient, base_url: str, timeout_s: float) -> About:
    """Tries all known endpoints of a server.

    Args:
        base_url: as OpenAI's clients take it, with `/v1`; the endpoints are next to that.
    """
    root = base_url.rstrip("/").removesuffix("/v1")
    sglang = await _json(client, f"{root}/get_server_info", timeout_s)
    llama = await _json(client, f"{root}/props", timeout_s)
    vllm = await _json(client, f"{root}/server_info?config_format=json", timeout_s)
    slots = _number(sglang.get("max_running_requests")) or _number(llama.get("total_slots")) or _vllm_slots(vllm)
    kv_tokens = _number(sglang.get("max_total_num_tokens")) or cache_tokens(
        await _text(client, f"{root}/metrics", timeout_s)
    )
    return About(slots, kv_tokens)


def cache_tokens(metrics: str) -> int:
    """The KV cache of all vLLM engines behind one server, in tokens, from its metrics; 0 = unknown."""
    total = 0
    for found in _CACHE.finditer(metrics):
        labels = dict(_LABEL.findall(found[1]))
        total += _number(labels.get("num_gpu_blocks")) * _number(labels.get("block_size"))
    return total


def _vllm_slots(info: dict[str, Any]) -> int:
    config = info.get("vllm_config")
    scheduler = config.get("scheduler_config") if isinstance(config, dict) else None
    return _number(scheduler.get("max_num_seqs")) if isinstance(scheduler, dict) else 0


def _number(value: Any) -> int:
    try:
        return max(0, int(value))
    except (TypeError, ValueError):
        return 0


async def _json(client: httpx.AsyncClient, url: str, timeout_s: float) -> dict[str, Any]:
    try:
        found = json.loads(await _text(client, url, timeout_s) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


async def _text(client: httpx.AsyncClient, url: str, timeout_s: float) -> str:
    import httpx

    try:
        reply = await client.get(url, timeout=timeout_s)
    except (httpx.HTTPError, httpx.InvalidURL):
        return ""
    return reply.text if reply.is_success and len(reply.content) <= _MOST_BYTES else ""
