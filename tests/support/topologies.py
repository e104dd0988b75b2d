"""The Redis topologies on this machine, for tests: one server, a master under Sentinel, a Cluster.

All of them use the binary of the embedded server. Everything listens on 127.0.0.1.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import redis

from rsm.broker import child_process as child
from rsm.broker.connection.embedded import EmbeddedRedis, find_server
from rsm.broker.connection.topology import place_of
from rsm.broker.protocol.ids import new_id
from tests.support.waiting import eventually

SLOTS = 16384
SENTINELS = 3
# How long a server must be silent to count as down. Short, to keep tests short; a deployment needs some seconds.
DOWN_AFTER_MS = 1000
_MASTER = "primary"
_START_S = 30.0


class Topology(Protocol):
    """A running Redis with its URL."""

    @property
    def url(self) -> str: ...


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Node:
    """One server process. Its folder survives a kill."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port, self.bus = free_port(), free_port()
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()

    def start(self) -> Node:
        with (self._folder / "log").open("ab") as output:
            command = [find_server(), *self._arguments()]
            self._process = child.spawn(command, output=output, cwd=self._folder)
        eventually(self._answers, _START_S, f"the server on port {self.port} starts")
        return self

    def _arguments(self) -> list[str]:
        fixed = {"port": self.port, "cluster-port": self.bus, "bind": "127.0.0.1", "dir": self._folder}
        fixed |= {"save": "", "appendonly": "yes", "repl-diskless-sync-delay": 0}
        return [*(part for name, value in fixed.items() for part in (f"--{name}", str(value))), *self._options]

    def _answers(self) -> bool:
        try:
            return bool(self.ask("PING"))
        except redis.ConnectionError:
            return False

    def ask(self, *command: Any) -> Any:
        """Sends one command over a new connection."""
        server: Any = redis.Redis(port=self.port, protocol=2, socket_timeout=5)
        try:
            return server.execute_command(*command)
        finally:
            server.close()

    def info(self, section: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.ask("INFO", section)
        return answer

    def kill(self) -> None:
        """kill -9, also for a process that it may have forked to write a snapshot."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Makes it hang, while its kernel still accepts connections and bytes."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            os.kill(self._process.pid, number)

    def stop(self) -> None:
        self.kill()

    def refuse_replicas(self) -> None:
        """Cuts off its replicas without clients noticing: later writes are what an asynchronous replica lacks."""
        self.ask("ACL", "SETUSER", "default", "-psync", "-sync")
        self.ask("CLIENT", "KILL", "TYPE", "replica")
        eventually(lambda: self.info("replication")["connected_slaves"] == 0)

    def replicates(self) -> bool:
        """Whether this replica is connected to its master."""
        return self.info("replication").get("master_link_status") == "up"


class Sentinel(Node):
    def _arguments(self) -> list[str]:
        config = self._folder / "sentinel.conf"
        lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {self._folder}", *self._options]
        config.write_text("\n".join(lines) + "\n")  # Sentinel rewrites its file
        return [str(config), "--sentinel"]


class _Several:
    """Several servers in one temporary folder."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rsm-topology-"))
        self.nodes: list[Node] = []

    def _node(self, *options: str) -> Node:
        node = Node(self._folder / f"node-{len(self.nodes)}", *options).start()
        self.nodes.append(node)
        return node

    def stop(self) -> None:
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            for node in self.nodes:
                stack.callback(node.stop)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


class UnderSentinel(_Several):
    """A master with replicas and three Sentinels, two of which must agree."""

    def __init__(self, replicas: int = 1) -> None:
        super().__init__()
        self._replicas = replicas
        self._sentinels: list[Node] = []

    @property
    def url(self) -> str:
        seeds = ",".join(f"127.0.0.1:{s.port}" for s in self._sentinels)
        return f"redis+sentinel://{seeds}/{_MASTER}"

    def __enter__(self) -> UnderSentinel:
        try:
            return self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> UnderSentinel:
        master = self._node()
        for _ in range(self._replicas):
            self._node("--replicaof", f"127.0.0.1 {master.port}")
        eventually(lambda: all(n.replicates() for n in self.nodes[1:]), _START_S)
        self._sentinels = [self._sentinel(i, master) for i in range(SENTINELS)]
        self.nodes += self._sentinels
        eventually(self._all_know_all, _START_S, "the Sentinels find each other and the replicas")
        return self

    def _sentinel(self, i: int, master: Node) -> Node:
        return Sentinel(
            self._folder / f"sentinel-{i}",
            f"sentinel monitor {_MASTER} 127.0.0.1 {master.port} 2",
            f"sentinel down-after-milliseconds {_MASTER} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {_MASTER} {5 * DOWN_AFTER_MS}",
        ).start()

    def _all_know_all(self) -> bool:
        return all(
            len(s.ask("SENTINEL", "SENTINELS", _MASTER)) == SENTINELS - 1
            and len(s.ask("SENTINEL", "REPLICAS", _MASTER)) == self._replicas
            for s in self._sentinels
        )

    def namespace(self) -> str:
        """A new namespace."""
        return f"t{new_id()}"

    def master(self, namespace: str) -> Node:
        """The node that the Sentinels name. All namespaces are on it."""
        _, port = self._sentinels[0].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", _MASTER)
        return next(n for n in self.nodes if n.port == int(port))


class Cluster(_Several):
    """Three masters with a third of the slots each. The first one has `replicas`, the others have none."""

    def __init__(self, replicas: int = 0) -> None:
        super().__init__()
        self._replicas = replicas

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{n.port}" for n in self.nodes)

    def __enter__(self) -> Cluster:
        try:
            return self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> Cluster:
        masters = [self._member() for _ in range(3)]
        bounds = [SLOTS * i // len(masters) for i in range(len(masters) + 1)]
        for i, node in enumerate(masters):
            node.ask("CLUSTER", "ADDSLOTSRANGE", bounds[i], bounds[i + 1] - 1)
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
        replicas = [self._member() for _ in range(self._replicas)]
        for node in self.nodes[1:]:
            node.ask("CLUSTER", "MEET", "127.0.0.1", masters[0].port, masters[0].bus)
        eventually(self._all_know_all, _START_S, "the cluster's nodes find each other")
        for replica in replicas:
            replica.ask("CLUSTER", "REPLICATE", masters[0].ask("CLUSTER", "MYID"))
        eventually(lambda: all(r.replicates() for r in replicas), _START_S)
        eventually(self._all_see_replicas, _START_S, "the cluster's nodes learn of the replicas")
        return self

    def _member(self) -> Node:
        options = {"enabled": "yes", "node-timeout": str(DOWN_AFTER_MS)}
        options |= {"require-full-coverage": "no", "replica-validity-factor": "0"}
        return self._node(*(part for name, value in options.items() for part in (f"--cluster-{name}", value)))

    def _all_know_all(self) -> bool:
        wanted = {"cluster_state:ok", f"cluster_known_nodes:{len(self.nodes)}"}
        states = [set(n.ask("CLUSTER", "INFO").decode().split()) for n in self.nodes]
        return all(wanted <= state for state in states) and all(len(n.ask("CLUSTER", "SLOTS")) == 3 for n in self.nodes)

    def _all_see_replicas(self) -> bool:
        return all(sum(map(len, n.ask("CLUSTER", "SLOTS"))) == 3 * 3 + self._replicas for n in self.nodes)

    def namespace(self) -> str:
        """A new namespace on the master that has replicas."""
        return next(name for name in iter(lambda: f"t{new_id()}", "") if self.master(name) is self.nodes[0])

    def master(self, namespace: str) -> Node:
        """The node that serves a namespace's slot, according to the first node that answers."""
        finder = place_of(self.url, namespace).finder
        assert finder is not None
        for node in self.nodes:
            try:
                found = finder.read(node.ask("CLUSTER", "SLOTS"), ("", 0))
            except redis.ConnectionError:
                continue
            assert found is not None
            return next(n for n in self.nodes if n.port == found[1])
        raise AssertionError("no node of the cluster answers")


TOPOLOGIES: dict[str, Callable[[], AbstractContextManager[Topology]]] = {
    "standalone": EmbeddedRedis,
    "sentinel": UnderSentinel,
    "cluster": Cluster,
}
