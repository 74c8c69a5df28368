"""A pool of two rollout actors, one of which takes more memory than there is to take, once or whenever it is asked.
Usage: hungry.py MARK. Prints which process did which evaluation, what became of the one
that never has enough, and which processes took too much.

Ray's memory monitor ends the process; the test sets the limit (RAY_memory_usage_threshold) a little above what is used.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import ray
from pool import pool_of
from toy import sweep

from orchestrator.recipes import Evaluate
from orchestrator.rollouts import WORKER_CPUS
from orchestrator.session import connect

MARK = Path(sys.argv[1])
ONCE, ALWAYS = 0, 1  # the evaluations that take too much
MOST = 12 << 30  # bytes that are taken before giving up on being noticed


@ray.remote(num_cpus=WORKER_CPUS, max_restarts=-1, max_task_retries=2)
class Worker:
    """Answers with its process."""

    def __init__(self, mark: Path, greedy: dict[str, int]) -> None:
        self._mark, self._greedy = mark, greedy

    def ready(self) -> None:
        """It is."""

    def evaluate(self, evaluation: Evaluate, weights: object) -> int:
        """A moment of work."""
        del weights
        kind = self._greedy.get(evaluation.id)
        if kind == ALWAYS or (kind == ONCE and not self._mark.exists()):
            with self._mark.open("a") as mark:
                print(os.getpid(), file=mark)
            _eat()
        time.sleep(0.5)
        return os.getpid()


def _eat() -> None:
    taken: list[bytearray] = []
    while sum(map(len, taken)) < MOST:
        taken.append(bytearray(os.urandom(1 << 20) * 128))  # not zeros, which cost nothing
        time.sleep(0.1)


def main() -> None:
    """All evaluations at once, twice."""
    asked = sweep()
    greedy = {asked[kind].id: kind for kind in (ONCE, ALWAYS)}
    with connect("local", cpus=2):
        pool = pool_of(SimpleNamespace(remote=partial(Worker.remote, MARK, greedy)))
        answers = ray.get([pool.evaluate.remote(evaluation) for evaluation in asked])
        after = ray.get([pool.evaluate.remote(evaluation) for evaluation in asked if evaluation.id not in greedy])
    told = [answer if isinstance(answer, int) else answer.why for answer in answers]
    print(json.dumps({"answers": told, "after": after, "greedy": [int(line) for line in MARK.read_text().split()]}))


if __name__ == "__main__":
    main()
