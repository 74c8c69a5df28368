"""A sweep of many evaluations of no work: none lost, few handed over at a time, memory flat. `benchmarks.scale` goes on
to a hundred thousand."""

import asyncio
import pickle
from pathlib import Path

import pytest
import ray
from ray import tune

from benchmarks.scale import asked, orchestrate
from orchestrator.session import Session
from orchestrator.sweeps import IN_FLIGHT, run_bundle
from orchestrator.tables import Tables
from orchestrator.tuning import run_trials


@pytest.mark.slow
def test_many_evaluations_leave_their_rows_and_no_memory(ray_session: Session, tmp_path: Path) -> None:
    evaluations = asked(400)
    failures, samples = orchestrate(evaluations, tmp_path, workers=ray_session.cpus)
    assert failures == []
    tables = Tables(tmp_path / "tables")
    assert tables.done("episodes") == tables.done("runs") == {one.id for one in evaluations}
    assert tables.done("policies") >= {one.policy.id for one in evaluations}
    middle, end = samples[len(samples) // 2], samples[-1]
    assert end.done == 400
    assert end.driver_megabytes < middle.driver_megabytes + 30  # a hundred kilobytes for each would be 20
    assert end.pool_megabytes < middle.pool_megabytes + 20


@ray.remote(num_cpus=0)
class CountingPool:
    """Counts the evaluations that it was handed and has not given back."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def evaluate(self, evaluation: object) -> None:
        del evaluation
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.02)
        self.now -= 1

    async def most_at_once(self) -> int:
        return self.most


@pytest.mark.slow
def test_no_trial_hands_over_more_than_a_few_jobs(ray_session: Session) -> None:
    assert ray_session.cpus == 2
    pool = CountingPool.remote()
    trial = tune.with_parameters(run_bundle, pool=pool, bundles=[pickle.dumps(tuple(asked(60)))] * 2)
    assert run_trials(trial, "bundle", [0, 1], lambda _: None, concurrent=2, reuse=True) == []
    assert IN_FLIGHT <= ray.get(pool.most_at_once.remote()) <= 2 * IN_FLIGHT
