"""What is still to be computed: the recipes asked for and all they need, minus what the store already has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar, cast

from dt.tasks import get_task
from orchestrator.recipes import Dataset, Evaluate, Merge, Perturb, Quality, Recipe, Recording, Train
from orchestrator.store import Store
from orchestrator.tables import Tables

R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Plan:
    """The missing recipes, each kind in the order of first need, and how many of those asked for are stored."""

    recordings: tuple[Recording, ...]  # of one behaviour policy each
    trainings: tuple[Train, ...]
    evaluations: tuple[Evaluate, ...]
    stored_recordings: int
    stored_trainings: int
    stored_evaluations: int

    @property
    def empty(self) -> bool:
        """Whether everything asked for is there."""
        return not (self.recordings or self.trainings or self.evaluations)

    @property
    def recorded_episodes(self) -> int:
        """Episodes to record."""
        return sum(recording.episodes for recording in self.recordings)

    @property
    def gradient_steps(self) -> int:
        """Optimiser steps to take."""
        return sum(training.optimisation.steps for training in self.trainings)

    @property
    def episodes(self) -> int:
        """Episodes to roll out."""
        return sum(evaluation.episodes for evaluation in self.evaluations)

    @property
    def environment_steps(self) -> int:
        """Environment steps of recordings and rollouts, at most: no episode is longer than its task's horizon."""
        rollouts: Iterable[Recording | Evaluate] = chain(self.recordings, self.evaluations)
        return sum(rollout.episodes * get_task(rollout.task).horizon for rollout in rollouts)

    def describe(self) -> str:
        """The plan in one line."""
        if self.empty:
            return f"nothing to compute: all {self.stored_evaluations:,} evaluations are stored"
        todo = (
            (len(self.recordings), "recording", f"{self.recorded_episodes:,} episodes"),
            (len(self.trainings), "training", f"{self.gradient_steps:,} gradient steps"),
            (len(self.evaluations), "evaluation", f"{self.episodes:,} episodes"),
        )
        parts = [f"{count:,} {kind}{'s' * (count != 1)} ({size})" for count, kind, size in todo if count]
        return f"to compute: {', '.join(parts)}; stored: {self._stored()}"

    def _stored(self) -> str:
        counts = (self.stored_recordings, self.stored_trainings, self.stored_evaluations)
        return "{:,} recordings, {:,} trainings, {:,} evaluations".format(*counts)


def make_plan(recipes: Iterable[Recipe], store: Store, tables: Tables) -> Plan:
    """What these recipes still need.

    An evaluation is missing when it has no rows. A training is missing when it is asked for, or a missing evaluation
    needs its policy, and its policy is not in the store; a recording likewise when a missing training needs it.
    """
    asked = {recipe.id: recipe for recipe in recipes}
    evaluations = [recipe for recipe in asked.values() if isinstance(recipe, Evaluate)]
    answered, committed = tables.done("episodes"), store.policies()
    missing = tuple(evaluation for evaluation in evaluations if evaluation.id not in answered)

    wanted = [recipe for recipe in asked.values() if isinstance(recipe, Train | Merge | Perturb)]
    needed = _by_id(chain.from_iterable(trained(policy) for policy in (*wanted, *(e.policy for e in missing))))
    trainings = tuple(training for training in needed.values() if training.id not in committed)

    datasets = [recipe for recipe in asked.values() if isinstance(recipe, Recording)]
    sources = _by_id(chain.from_iterable(parts(d) for d in (*datasets, *(t.dataset for t in trainings))))
    recordings = tuple(recording for recording in sources.values() if not is_recorded(recording, store))

    reachable = _by_id(chain(needed.values(), chain.from_iterable(trained(e.policy) for e in evaluations)))
    behind = _by_id(chain(sources.values(), chain.from_iterable(parts(t.dataset) for t in reachable.values())))
    return Plan(
        recordings,
        trainings,
        missing,
        stored_recordings=sum(is_recorded(recording, store) for recording in behind.values()),
        stored_trainings=len(committed & reachable.keys()),
        stored_evaluations=len(evaluations) - len(missing),
    )


def trained(policy: Train | Merge | Perturb) -> Iterator[Train]:
    """The trained policies a policy is made of, target first, repeats included. Hashes nothing, so it is fast."""
    match policy:
        case Train():
            yield policy
        case Merge():
            for source in policy.sources:
                yield from trained(source)
        case Perturb():
            yield from trained(policy.policy)


def parts(dataset: Dataset) -> tuple[Recording, ...]:
    """The recordings, of one behaviour policy each, that a dataset is made of; none for an imported one."""
    if not isinstance(dataset, Recording):
        return ()
    from dt.behaviour.record import parts_of  # heavy (Minari, MuJoCo), and not every plan has a dataset

    names = cast(tuple[Quality, ...], parts_of(dataset.quality))
    return tuple(dataset.model_copy(update={"quality": name}) for name in names)


def is_recorded(recording: Recording, store: Store) -> bool:
    """Whether the recording lies in the store."""
    from dt.behaviour import record

    return record.is_recorded(recording.task, recording.quality, recording.episodes, recording.seed, store.datasets)


def _by_id(recipes: Iterable[R]) -> dict[str, R]:
    return {recipe.id: recipe for recipe in recipes}
