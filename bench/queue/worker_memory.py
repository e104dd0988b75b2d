"""Measures the memory that a worker adds to a process with an imported engine library; prints a JSON object in MiB.

The library is vLLM if it is installed. The worker then serves 2,000 no-op calls with the `sim` backend, because its
own code, threads and connections are the same for every backend.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import threading

import psutil

LIBRARY = "vllm.v1.engine.async_llm"
MIB = 1 << 20
CALLS = 2_000


def rss_mib() -> float:
    return float(psutil.Process().memory_info().rss / MIB)


def import_library() -> str:
    try:
        importlib.import_module(LIBRARY)
    except ImportError:
        return "none (vLLM is not installed)"
    return f"vLLM {sys.modules['vllm'].__version__}"


def serve_calls() -> None:
    """Runs a worker until its calls are done. The router and the client run in another process, as in production."""
    from rsm.broker import Settings
    from rsm.workers.__main__ import share_heaps
    from rsm.workers.backends.factory import create_backend
    from rsm.workers.config import EngineConfig
    from rsm.workers.runtime.worker import Worker

    share_heaps()
    config = EngineConfig(engine_id="e0", model="noop", backend="sim", engine_args={"instant": True})
    settings = Settings()
    worker = Worker("e0", create_backend(config, settings), settings, model="noop")
    threading.Thread(target=_drive, args=(worker.request_stop,), daemon=True).start()
    asyncio.run(worker.serve(handle_signals=False))


def _drive(stop: object) -> None:
    import subprocess

    subprocess.run([sys.executable, "-m", "bench.queue.drive", str(CALLS)], check=True, timeout=120)
    global after
    after = rss_mib()
    stop()  # type: ignore[operator]


after = 0.0


def main() -> None:
    library = import_library()
    before = rss_mib()
    serve_calls()
    print(json.dumps({"worker_mib": after - before, "library_mib": before, "library": library}))


if __name__ == "__main__":
    main()
