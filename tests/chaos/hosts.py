"""A sweep on a Ray of two nodes: one is lost on the way, another comes, and a stranger asks in vain.

Usage: hosts.py RESULTS nodes|namespaces. In a process of its own, for a process has one Ray. Prints what happened, a
line each.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from attack import PATIENCE, check_untouched, committed, program

os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")

from ray.cluster_utils import Cluster  # Ray reads the mode when it is imported

FAST_LOSS = {  # a lost node is noticed in seconds instead of half a minute
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}


UNREACHED = 20.0  # seconds for which nothing takes the lost one's place: the head has noticed by then


class Hosts(Protocol):
    """A Ray with a head and another node, of one CPU each."""

    address: str
    prefix: tuple[str, ...]  # of a command, so that it runs beside the head

    def lose(self) -> str:
        """Lose the other node without a farewell. Returns what was done."""
        ...

    def add(self) -> None:
        """One more in its place."""
        ...


class Nodes:
    """Two raylets side by side; one is killed."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self.address, self.prefix = cluster, cluster.address, ()
        self.add()

    def lose(self) -> str:
        """Kill it."""
        self._cluster.remove_node(self._other, allow_graceful=False)
        return "killed"

    def add(self) -> None:
        """Start one."""
        self._other = self._cluster.add_node(num_cpus=1)


@contextmanager
def nodes() -> Iterator[Hosts]:
    """On one host."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": FAST_LOSS})
    try:
        yield Nodes(cluster)
    finally:
        cluster.shutdown()


class Namespaces:
    """Two network namespaces with an address each and a cable between them; the cable is cut."""

    NAMES, ADDRESSES, PORT = ("mergedt-head", "mergedt-other"), ("10.77.0.1", "10.77.0.2"), 6399

    def __init__(self, session: str) -> None:
        self.address = f"{self.ADDRESSES[0]}:{self.PORT}"
        self.prefix = ("ip", "netns", "exec", self.NAMES[0])
        for name in self.NAMES:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", self.NAMES[0], "type", "veth", "peer", "cable", "netns", self.NAMES[1])
        for name, address in zip(self.NAMES, self.ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        own = (f"--temp-dir={session}", "--include-dashboard=false", f"--system-config={json.dumps(FAST_LOSS)}")
        self._ray(0, "--head", f"--port={self.PORT}", *own)
        self._ray(1, f"--address={self.address}")

    def lose(self) -> str:
        """Cut the cable: the node lives, and nobody reaches it."""
        ip("-n", self.NAMES[0], "link", "set", "cable", "down")
        return "cut off"

    def add(self) -> None:
        """End what is left there, mend the cable, start anew."""
        end_all(self.NAMES[1])
        ip("-n", self.NAMES[0], "link", "set", "cable", "up")
        self._ray(1, f"--address={self.address}")

    def _ray(self, host: int, *options: str) -> None:
        ray = Path(sys.executable).with_name("ray")
        start = ["ip", "netns", "exec", self.NAMES[host], str(ray), "start", *options]
        start += [f"--node-ip-address={self.ADDRESSES[host]}", "--num-cpus=1"]
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE)


def end_all(namespace: str) -> None:
    """Kill all processes there."""
    for process in ip("netns", "pids", namespace).split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def ip(*arguments: str) -> str:
    """Configure the network."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@contextmanager
def namespaces() -> Iterator[Hosts]:
    """On two hosts, as far as the network is concerned."""
    with tempfile.TemporaryDirectory(prefix="mdt", ignore_cleanup_errors=True) as session:  # short: it holds sockets
        try:
            yield Namespaces(session)
        finally:
            for name in {*Namespaces.NAMES}.intersection(ip("netns", "list").split()):
                end_all(name)
                ip("netns", "delete", name)


def command(hosts: Hosts, results: Path, **environment: str) -> subprocess.Popen[str]:
    """The sweep on that cluster. Its output is not kept: Ray shows there the last words of a node that is gone."""
    driver = program("driver.py", results, hosts.address, **environment)
    driver["args"] = [*hosts.prefix, *driver["args"]]
    return subprocess.Popen(**driver, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(who: str, run: subprocess.Popen[str]) -> int:
    """Wait for it, say how it ended, and return its status."""
    _, said = run.communicate(timeout=PATIENCE)
    print(f"{who}: status {run.returncode}: {said.strip().splitlines()[-1]}", flush=True)
    return run.returncode


def main(results: Path, kind: str) -> None:
    """All of it."""
    with {"nodes": nodes, "namespaces": namespaces}[kind]() as hosts:
        ended("stranger", command(hosts, results, RAY_AUTH_TOKEN=secrets.token_hex(32)))
        run = command(hosts, results)
        while not list(results.glob("artefacts/*/policy.safetensors")) and run.poll() is None:
            time.sleep(0.2)
        how = hosts.lose()
        time.sleep(UNREACHED)
        hosts.add()
        print(f"a node {how}, another added", flush=True)
        status = ended("run", run)
        while status != 0:
            before = committed(results)
            status = ended("run", command(hosts, results))
            check_untouched(results, before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
