"""A pool of two rollout actors of a class that does no rollouts, for the toy sweep."""

from typing import Any

import ray
from toy import sweep

from orchestrator.recipes import ingredients
from orchestrator.rollouts import RolloutPool


def pool_of(worker: Any) -> Any:
    """It lives; worker: what starts an actor when its `remote` is called."""
    parts = {part.id: part for evaluation in sweep() for part in ingredients(evaluation)}
    pool = RolloutPool.remote({name: (part, ray.put({})) for name, part in parts.items()}, worker)
    ray.get(pool.recruit.remote(2))
    return pool
