"""The smallest recipes that run everything: two robots, one-layer policies, seconds on an idle core."""

import numpy as np

from dt.data.trajectories import Trajectories
from dt.model.architecture import Architecture
from dt.tasks import get_task
from dt.training.optimisation import Optimisation
from orchestrator.recipes import (
    AnyPolicy,
    Assemble,
    Evaluate,
    FineTune,
    Fisher,
    FisherWeights,
    Merge,
    Perturb,
    Recording,
    Train,
)

TASKS = ("hopper", "walker2d")
ARCHITECTURE = Architecture(width=16, layers=1, heads=1, context=5)
OPTIMISATION = Optimisation(steps=220, batch_size=8, learning_rate=1e-3, warmup_steps=5)


def noise(task: str, seed: int = 0) -> Trajectories:
    """Data of a task's shapes without physics: episodes shorter and longer than a window."""
    rng, offsets = np.random.default_rng(seed), np.cumsum([0, 3, 9, 1, 12])
    steps, dims = offsets[-1], get_task(task)
    return Trajectories(
        rng.normal(size=(steps, dims.state_dim)),
        np.tanh(rng.normal(size=(steps, dims.action_dim))),
        rng.random(steps),
        offsets,
        np.ones(4, bool),
    )


def recording(task: str) -> Recording:
    """Three episodes."""
    return Recording(task=task, quality="medium", episodes=3)


def expert(task: str, **changes: object) -> Train:
    """A policy of 16 numbers a token."""
    return Train(
        dataset=recording(task), architecture=ARCHITECTURE, optimisation=OPTIMISATION.model_copy(update=changes)
    )


def evaluation(policy: AnyPolicy, task: str = "hopper", episodes: int = 2) -> Evaluate:
    """Two episodes."""
    return Evaluate(policy=policy, task=task, episodes=episodes, seed=100)


def merged(group: str, alpha: float | None) -> Merge:
    """Hopper's policy with some of Walker2d's."""
    return Merge(sources=tuple(expert(task) for task in TASKS), group=group, alpha=alpha)


def shared() -> Assemble:
    """Attention and MLPs of both merged by Fisher and frozen, the rest fine-tuned for each robot."""
    experts = tuple(expert(task) for task in TASKS)
    estimates = {own.id: Fisher(policy=own, datasets=own.datasets, batches=2, batch_size=4) for own in experts}
    quick = OPTIMISATION.model_copy(update={"steps": 80})

    def tuned(own: Train, other: Train) -> FineTune:
        weights = FisherWeights(estimates=(estimates[own.id], estimates[other.id]))
        start = Merge(sources=(own, other), group="attention+mlp", fisher=weights)
        return FineTune(policy=start, dataset=own.dataset, optimisation=quick, frozen="attention+mlp")

    return Assemble(policies=(tuned(*experts), tuned(*experts[::-1])), shared="attention+mlp")


def sweep() -> list[Evaluate]:
    """Both experts, two lines of merges, one uniform mean, three perturbations."""
    experts = [evaluation(expert(task), task) for task in TASKS]
    lines = [evaluation(merged(group, alpha)) for group in ("attention", "mlp") for alpha in (0.25, 0.5, 1.0)]
    mean = evaluation(merged("trunk", None))
    perturbed = [evaluation(Perturb(policy=expert("hopper"), how=how)) for how in ("random", "identity", "removed")]
    return [*experts, *lines, mean, *perturbed]


def everything() -> list[Evaluate]:
    """The sweep, one policy for both robots, and a longer line of merges."""
    line = [evaluation(merged("mlp+layernorm", step / 20)) for step in range(1, 19)]
    return [*sweep(), *(evaluation(shared(), task) for task in TASKS), *line]
