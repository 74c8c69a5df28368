"""A sweep on a Ray of two nodes: one is lost on the way, another comes, and a stranger asks in vain.

Usage: hosts.py RESULTS. In a process of its own, for a process has one Ray. Prints what happened, a line each.
"""

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from attack import PATIENCE, TESTS, committed

os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")

from ray.cluster_utils import Cluster  # Ray reads the mode when it is imported

FAST_LOSS = {  # a lost node is noticed in seconds instead of half a minute
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}


def command(results: Path, address: str, **environment: str) -> subprocess.Popen[str]:
    """The sweep on that cluster."""
    paths = f"{TESTS.parent}:{TESTS}"
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("driver.py")), str(results), address],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=subprocess.DEVNULL,  # where Ray shows the last words of a node that is gone
        stderr=subprocess.PIPE,
        text=True,
    )


def main(results: Path) -> None:
    """All of it."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": FAST_LOSS})
    try:
        other = cluster.add_node(num_cpus=1)
        stranger = command(results, cluster.address, RAY_AUTH_TOKEN=secrets.token_hex(32))
        _, said = stranger.communicate(timeout=PATIENCE)
        print(f"stranger: status {stranger.returncode}: {said.strip().splitlines()[-1]}", flush=True)

        status, lost = None, False
        while status != 0:
            before = committed(results)
            run = command(results, cluster.address)
            if not lost:
                trained = results / "artefacts"
                while not list(trained.glob("*/policy.safetensors")) and run.poll() is None:
                    time.sleep(0.2)
                cluster.remove_node(other, allow_graceful=False)
                cluster.add_node(num_cpus=1)
                lost = True
                print("a node lost, another added", flush=True)
            _, said = run.communicate(timeout=PATIENCE)
            status = run.returncode
            print(f"run: status {status}: {said.strip().splitlines()[-1]}", flush=True)
            assert before.items() <= committed(results).items()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
