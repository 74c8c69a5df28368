"""A sweep on a Ray of two nodes: one is lost on the way, another comes, and a stranger asks in vain.

Usage: hosts.py RESULTS. In a process of its own, for a process has one Ray. Prints what happened, a line each.
"""

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from attack import PATIENCE, check_untouched, committed, program

os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")

from ray.cluster_utils import Cluster  # Ray reads the mode when it is imported

FAST_LOSS = {  # a lost node is noticed in seconds instead of half a minute
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}


def command(results: Path, address: str, **environment: str) -> subprocess.Popen[str]:
    """The sweep on that cluster. Its output is not kept: Ray shows there the last words of a node that is gone."""
    return subprocess.Popen(
        **program("driver.py", results, address, **environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(who: str, run: subprocess.Popen[str]) -> int:
    """Wait for it, say how it ended, and return its status."""
    _, said = run.communicate(timeout=PATIENCE)
    print(f"{who}: status {run.returncode}: {said.strip().splitlines()[-1]}", flush=True)
    return run.returncode


def main(results: Path) -> None:
    """All of it."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": FAST_LOSS})
    try:
        other = cluster.add_node(num_cpus=1)
        ended("stranger", command(results, cluster.address, RAY_AUTH_TOKEN=secrets.token_hex(32)))

        run = command(results, cluster.address)
        while not list(results.glob("artefacts/*/policy.safetensors")) and run.poll() is None:
            time.sleep(0.2)
        cluster.remove_node(other, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        print("a node lost, another added", flush=True)

        status = ended("run", run)
        while status != 0:
            before = committed(results)
            status = ended("run", command(results, cluster.address))
            check_untouched(results, before)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
