"""What work costs: multiplications of a recipe, and by what earlier runs took, seconds of a plan."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from dt.model.shapes import block_parameters
from orchestrator.plan import Plan
from orchestrator.recipes import FineTune, Fisher, Job, Pretrain, TrainTogether
from orchestrator.rows import processor
from orchestrator.tables import Tables

# Of one core, before anything has run here: for an episode recorded; and, of 594,816 parameters, by the parameter: for
# an episode rolled out, and for a product of a token in training (forward, backward, its own gradient).
SECONDS = {"recording": 0.15, "train": 0.1 / (64 * 60) / (3 * 594_816), "evaluate": 0.8 / 594_816}


def multiply_adds(recipe: Job | Fisher) -> int:
    """Of all tokens' products with the weights of the blocks, forward and backward, attention's scores aside: in
    proportion, what it costs. Frozen weights have no gradients of their own."""
    if isinstance(recipe, Fisher):
        shape, windows = recipe.policy.architecture, recipe.batches * recipe.batch_size
    else:
        shape, windows = recipe.architecture, recipe.optimisation.steps * recipe.optimisation.batch_size
    if isinstance(recipe, Pretrain):
        return windows * recipe.block * 3 * (block_parameters(shape) + recipe.vocabulary * shape.width)
    if isinstance(recipe, TrainTogether) and recipe.harmony is None:  # a step sees every task
        windows *= len(recipe.datasets)
    products = 3 * block_parameters(shape)
    if isinstance(recipe, FineTune) and recipe.frozen is not None:
        products -= block_parameters(shape, recipe.frozen)
    return windows * 3 * shape.context * products


def unit_costs(tables: Tables) -> dict[str, float]:
    """Seconds of one core for a unit of each kind of work: by what earlier runs took, else by typical figures.

    Of runs on this machine if there are any, else anywhere. A transformer's work is tokens × parameters, so that runs
    of one budget tell something of another.
    """
    known, here = dict(SECONDS), (platform.node(), processor())
    runs = tables.query(_RUNS).to_pylist()
    for kind in {run["kind"] for run in runs}:
        anywhere = [run for run in runs if run["kind"] == kind]
        some = [run for run in anywhere if (run["host"], run["processor"]) == here] or anywhere
        known[kind] = sum(run["busy"] for run in some) / sum(run["work"] for run in some)
    return known | {"fisher": known["train"]}  # a step's gradients, without the step


def estimate(planned: Plan, costs: Mapping[str, float], cores: int) -> dict[str, float]:
    """Seconds on so many cores for each kind of work, at these `unit_costs`."""
    sizes = {
        "recording": planned.recorded_episodes,
        "train": sum(map(multiply_adds, planned.trainings)),
        "fisher": sum(map(multiply_adds, planned.fishers)),
        "evaluate": sum(each.episodes * block_parameters(each.policy.architecture) for each in planned.evaluations),
    }
    at_once = {"train": len(planned.trainings), "fisher": len(planned.fishers)}
    busy = dict.fromkeys(sizes, cores) | {kind: min(cores, max(1, count)) for kind, count in at_once.items()}
    return {kind: sizes[kind] * costs[kind] / busy[kind] for kind in sizes}


# Of training on CPUs, and single-task alone: of other kinds the rows do not tell how many tasks a step saw, or how much
# was frozen.
_RUNS = """
SELECT kind, host, processor, sum(busy) AS busy, sum(work)::DOUBLE AS work FROM (
    SELECT 'train' AS kind, host, processor, seconds * coalesce(threads, 1) AS busy,
           steps * batch_size * 3 * context * 3 * trunk_parameters AS work
    FROM runs JOIN policies ON runs.recipe = policy WHERE runs.kind = 'train' AND gpu IS NULL
    UNION ALL
    SELECT 'evaluate', host, processor, seconds, episodes * trunk_parameters
    FROM runs JOIN scores ON runs.recipe = evaluation WHERE runs.kind = 'evaluate'
) GROUP BY kind, host, processor
"""
