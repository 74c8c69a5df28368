"""A pool of two rollout actors one of which is stopped, as on a machine that hangs. Prints which process did what.

Ray notices in minutes; the test lets it look more often (RAY_grpc_client_keepalive_...).
"""

import json
import os
import signal
import time

import ray
from pool import pool_of
from toy import sweep

from orchestrator.rollouts import WORKER_CPUS
from orchestrator.session import connect


@ray.remote(num_cpus=WORKER_CPUS, max_restarts=-1, max_task_retries=2)
class Worker:
    """Answers with its process."""

    def ready(self) -> None:
        """It is."""

    def evaluate(self, evaluation: object, weights: object) -> int:
        """Half a second of work."""
        del evaluation, weights
        time.sleep(0.5)
        return os.getpid()


def main() -> None:
    """Some evaluations, a stop, more of them, and more until the stopped one's successor takes part."""
    with connect("local", cpus=2):
        pool = pool_of(Worker)

        def answers() -> list[int]:
            return ray.get([pool.evaluate.remote(evaluation) for evaluation in sweep()])

        first = answers()
        os.kill(first[0], signal.SIGSTOP)
        second = answers()
        deadline = time.monotonic() + 120
        while len(set(last := answers())) < 2 and time.monotonic() < deadline:
            pass
    print(json.dumps({"first": first, "stopped": first[0], "second": second, "last": last}))


if __name__ == "__main__":
    main()
