"""On what a benchmark ran."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path


def machine(name: str, server: str) -> dict[str, str]:
    """Return what the page says of the machine; it goes by the caller's `name`, never by its host name."""
    return {
        "Machine": name,
        "CPU": f"{cpu_model()}, {os.cpu_count()} cores",
        "OS": f"{os_name()}, {platform.system()} {platform.release().partition('-')[0]}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "Server": server,
    }


def cpu_model() -> str:
    """Return the processor's name as the kernel or, elsewhere, the platform module tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.platform(terse=True)


def server_name(info: Mapping[str, object]) -> str:
    """Return a server's name and version from its INFO; Valkey's `redis_version` is a compatibility level."""
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}"


def here(**more: str) -> dict[str, str]:
    """What a page says of the machine and, by name, of whatever else took part."""
    about = machine(f"{os.cpu_count()} cores, shared with others", "")
    return {key: value for key, value in about.items() if value} | more
