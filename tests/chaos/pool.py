"""A pool of two rollout actors of a class that does no rollouts, and jobs for it."""

from typing import Any

import ray
from toy import sweep

from orchestrator.recipes import ingredients
from orchestrator.rollouts import Job, RolloutPool


def jobs() -> list[Job]:
    """One for each evaluation of the toy sweep."""
    return [(evaluation,) for evaluation in sweep()]


def pool_of(worker: Any) -> Any:
    """It lives; worker: what starts an actor when its `remote` is called."""
    parts = {part.id: part for (evaluation,) in jobs() for part in ingredients(evaluation)}
    pool = RolloutPool.remote({name: (part, ray.put({})) for name, part in parts.items()}, worker)
    ray.get(pool.recruit.remote(2))
    return pool
