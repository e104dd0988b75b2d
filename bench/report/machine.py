"""Describes the machine that a benchmark ran on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path


def machine(name: str, server: str) -> dict[str, str]:
    """Returns a page's description of the machine, under the caller's `name` and never its host name."""
    return {
        "Machine": name,
        "CPU": f"{cpu_model()}, {os.cpu_count()} cores",
        "OS": f"{os_name()}, {platform.system()} {platform.release().partition('-')[0]}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "Server": server,
    }


def cpu_model() -> str:
    """Returns the processor's name from the kernel, or else from the platform module."""
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
    """Returns a server's name and version from its INFO; Valkey's `redis_version` is a compatibility level."""
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}"


def here(**more: str) -> dict[str, str]:
    """Returns a page's description of this machine, with `more` lines about whatever else took part."""
    about = machine(f"{os.cpu_count()} cores, shared with others", "")
    return {key: value for key, value in about.items() if value} | more
