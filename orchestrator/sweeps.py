"""Sweeps on Ray Tune: a trial is a stretch of the sweep, whose evaluations stream through a shared pool."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from itertools import islice
from math import ceil
from typing import Any

import ray
from ray import tune

from dt.errors import UserError
from orchestrator.messages import Failure, describe, explain
from orchestrator.progress import Phase
from orchestrator.recipes import Artefact, Evaluate, Fisher, Trained, ingredients
from orchestrator.rollouts import RolloutPool, RolloutWorker, Rows, Weights
from orchestrator.store import Store
from orchestrator.tables import Tables
from orchestrator.tuning import run_trials

TRIALS = 256  # at most: one costs Tune some kilobytes and a tenth of a second
IN_FLIGHT = 8  # evaluations that a trial has handed over and not got back: few wait, and no worker waits for one


def bundles_of(evaluations: Sequence[Evaluate], count: int = TRIALS) -> list[tuple[Evaluate, ...]]:
    """The evaluations, in order, in so many bundles of one size.

    In fewer, where a bundle would have fewer evaluations than a trial hands over at a time.
    """
    size = max(IN_FLIGHT, ceil(len(evaluations) / count))
    return [tuple(evaluations[start : start + size]) for start in range(0, len(evaluations), size)]


def concurrent_trials(bundles: int, workers: int) -> int:
    """How many of so many bundles are a trial at once.

    Each is a process: just enough to hand over twice as many evaluations as there are workers, and one more while
    another begins its next bundle.
    """
    return min(bundles, 1 + ceil(2 * workers / IN_FLIGHT))


def sweep(
    evaluations: Sequence[Evaluate],
    store: Store,
    tables: Tables,
    *,
    workers: int,
    phase: Phase,
    worker: Any = RolloutWorker,
) -> list[Failure]:
    """Evaluate and commit all of them; returns those that failed. What they are made of must be in the store.

    worker: the class of the actors that do it; another one measures what everything but the rollouts costs.
    """
    failures: list[Failure] = []
    # As NumPy, which workers map from the object store without a copy; this process keeps the references alive.
    weights: dict[str, tuple[Artefact, Any]] = {}
    for part in {part.id: part for evaluation in evaluations for part in ingredients(evaluation)}.values():
        try:
            weights[part.id] = part, ray.put(_arrays(part, store))
        except UserError as error:  # damaged: what is made of others can be evaluated
            failures.append(Failure(describe(part), str(error)))
    bundles = bundles_of([each for each in evaluations if all(part.id in weights for part in ingredients(each))])
    if not bundles:
        return failures
    pool = RolloutPool.remote(weights, worker)  # type: ignore[attr-defined]
    recruited = pool.recruit.remote(workers)

    def commit(report: dict[str, Any]) -> None:
        results, note = report.pop("results", []), ""
        for result in results:
            if isinstance(result, Failure):
                failures.append(result)
            else:
                _commit(result, tables)
                task, scores = result.episodes["task"][0], result.episodes["score"].to_numpy()
                note = f"the last on {task}: score {scores.mean():.1f}"
        phase.advance(len(results), note)

    try:
        died = run_trials(
            tune.with_parameters(run_bundle, pool=pool, bundles=[pickle.dumps(bundle) for bundle in bundles]),
            "bundle",
            list(range(len(bundles))),
            commit,
            concurrent=concurrent_trials(len(bundles), workers),
            reuse=True,
        )
    finally:
        del recruited  # kept until here: a dropped reference may cancel the call
        ray.kill(pool)  # and its workers with it
    return [*failures, *(Failure("a part of the sweep", explain(error)) for error in died)]


def _arrays(part: Artefact, store: Store) -> Weights:
    if isinstance(part, Fisher):
        return {name: tensor.numpy() for name, tensor in store.load_fisher(part).items()}
    assert isinstance(part, Trained)
    return store.load_policy(part).arrays()


def run_bundle(config: dict[str, Any], pool: Any, bundles: list[bytes]) -> None:
    """The trial: its evaluations into the pool, a few at a time, each reported as soon as it is done."""
    bundle: tuple[Evaluate, ...] = pickle.loads(bundles[config["bundle"]])
    rest = iter(bundle)
    waiting = [pool.evaluate.remote(evaluation) for evaluation in islice(rest, IN_FLIGHT)]
    while waiting:
        ready, waiting = ray.wait(waiting)
        waiting += [pool.evaluate.remote(evaluation) for evaluation in islice(rest, len(ready))]
        results = ray.get(ready)
        tune.report({"results": results, "evaluations": len(results)})  # a number that stays: without one Tune prints


def _commit(rows: Rows, tables: Tables) -> None:
    """The episodes last: they say that the evaluation is done, so a kill in between costs a repetition at most."""
    tables.append("policies", rows.policies["policy"][0].as_py(), rows.policies)
    tables.append("runs", rows.evaluation, rows.runs)
    tables.append("episodes", rows.evaluation, rows.episodes)
