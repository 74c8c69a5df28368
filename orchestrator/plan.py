"""What is still to be computed: the recipes asked for and all they need, minus what the store already has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar, cast

from orchestrator.recipes import (
    AnyPolicy,
    Artefact,
    Dataset,
    Evaluate,
    FineTune,
    Fisher,
    ImportLanguage,
    Job,
    Quality,
    Recipe,
    Recording,
    Train,
    TrainTogether,
    ingredients,
    inputs,
)
from orchestrator.store import Store
from orchestrator.tables import Tables

R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Plan:
    """The missing recipes, each after all it needs, and how many of those asked for are stored."""

    recordings: tuple[Recording, ...]  # of one behaviour policy each
    artefacts: tuple[Artefact, ...]  # trainings, and what they or merges need beside them
    evaluations: tuple[Evaluate, ...]
    stored_recordings: int
    stored_artefacts: tuple[Artefact, ...]
    stored_evaluations: int

    @property
    def trainings(self) -> tuple[Job, ...]:
        """What takes gradient steps."""
        return _jobs(self.artefacts)

    @property
    def stored_trainings(self) -> tuple[Job, ...]:
        """What took gradient steps."""
        return _jobs(self.stored_artefacts)

    @property
    def others(self) -> tuple[Fisher | ImportLanguage, ...]:
        """Estimates and imports."""
        return tuple(artefact for artefact in self.artefacts if not isinstance(artefact, Job))

    @property
    def fishers(self) -> tuple[Fisher, ...]:
        """What takes gradients alone."""
        return _fishers(self.artefacts)

    @property
    def stored_fishers(self) -> tuple[Fisher, ...]:
        """What took gradients alone."""
        return _fishers(self.stored_artefacts)

    @property
    def empty(self) -> bool:
        """Whether everything asked for is there."""
        return not (self.recordings or self.artefacts or self.evaluations)

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

    def describe(self) -> str:
        """The plan in one line."""
        if self.empty:
            return f"nothing to compute: all {self.stored_evaluations:,} evaluations are stored"
        todo = (
            (len(self.recordings), "recording", f"{self.recorded_episodes:,} episodes"),
            (len(self.trainings), "training", f"{self.gradient_steps:,} gradient steps"),
            (len(self.others), "statistic", "Fisher estimates and imports"),
            (len(self.evaluations), "evaluation", f"{self.episodes:,} episodes"),
        )
        parts = [f"{count:,} {kind}{'s' * (count != 1)} ({size})" for count, kind, size in todo if count]
        return f"to compute: {', '.join(parts)}; stored: {self._stored()}"

    def _stored(self) -> str:
        counts = (self.stored_recordings, len(self.stored_artefacts), self.stored_evaluations)
        return "{:,} recordings, {:,} artefacts, {:,} evaluations".format(*counts)


@dataclass(frozen=True)
class Part:
    """A piece of a plan that leads to rows: evaluations, and what they still need, each after all it needs itself."""

    artefacts: tuple[Artefact, ...]
    evaluations: tuple[Evaluate, ...]

    @property
    def trainings(self) -> tuple[Job, ...]:
        """What takes gradient steps."""
        return _jobs(self.artefacts)


def parts_of(plan: Plan, trainings: int) -> list[Part]:
    """The plan cut, in its order, into parts of at least so many trainings but the last, so that the first rows are
    there long before the last training. What no evaluation needs comes last."""
    left = {artefact.id for artefact in plan.artefacts}
    found: list[Part] = []
    artefacts: list[Artefact] = []
    evaluations: list[Evaluate] = []

    def take(recipes: Iterable[Recipe]) -> int:
        taken = _missing(recipes, left.__contains__)
        left.difference_update(artefact.id for artefact in taken)
        artefacts.extend(taken)
        return len(_jobs(taken))

    count = 0
    for evaluation in plan.evaluations:
        count += take([evaluation])
        evaluations.append(evaluation)
        if count >= trainings:
            found.append(Part(tuple(artefacts), tuple(evaluations)))
            artefacts, evaluations, count = [], [], 0
    take(plan.artefacts)
    return [*found, Part(tuple(artefacts), tuple(evaluations))] if artefacts or evaluations else found


def make_plan(recipes: Iterable[Recipe], store: Store, tables: Tables) -> Plan:
    """What these recipes still need.

    An evaluation is missing when it has no rows. An artefact is missing when it is asked for, or something missing is
    made from it, and it is not in the store; a recording likewise when a missing artefact needs it.
    """
    asked = {recipe.id: recipe for recipe in recipes}
    evaluations = [recipe for recipe in asked.values() if isinstance(recipe, Evaluate)]
    answered, committed = tables.done("episodes"), store.stored()
    missing = tuple(evaluation for evaluation in evaluations if evaluation.id not in answered)

    wanted = [recipe for recipe in asked.values() if isinstance(recipe, AnyPolicy | Artefact)]
    artefacts = _missing(chain(wanted, (evaluation.policy for evaluation in missing)), lambda i: i not in committed)

    datasets = [recipe for recipe in asked.values() if isinstance(recipe, Recording)]
    sources = _by_id(chain.from_iterable(parts(d) for d in (*datasets, *datasets_of(artefacts))))
    recordings = tuple(recording for recording in sources.values() if not is_recorded(recording, store))

    reachable = _by_id(chain.from_iterable(ingredients(recipe) for recipe in (*wanted, *evaluations)))
    behind = _by_id(
        chain(sources.values(), chain.from_iterable(parts(dataset) for dataset in datasets_of(reachable.values())))
    )
    return Plan(
        recordings,
        artefacts,
        missing,
        stored_recordings=sum(is_recorded(recording, store) for recording in behind.values()),
        stored_artefacts=tuple(artefact for artefact in reachable.values() if artefact.id in committed),
        stored_evaluations=len(evaluations) - len(missing),
    )


def _missing(recipes: Iterable[Recipe], missing: Callable[[str], bool]) -> tuple[Artefact, ...]:
    """The artefacts that these recipes need and whose ids are missing, each after those it is made from itself."""
    found: dict[str, Artefact] = {}
    seen: set[int] = set()

    def visit(recipe: Recipe) -> None:
        for artefact in ingredients(recipe):
            if id(artefact) in seen:  # a sweep repeats the same few objects
                continue
            seen.add(id(artefact))
            if artefact.id not in found and missing(artefact.id):
                for needed in inputs(artefact):
                    visit(needed)
                found[artefact.id] = artefact

    kept = list(recipes)  # alive, so that no id is given twice
    for recipe in kept:
        visit(recipe)
    return tuple(found.values())


def _jobs(artefacts: Iterable[Artefact]) -> tuple[Job, ...]:
    return tuple(artefact for artefact in artefacts if isinstance(artefact, Job))


def _fishers(artefacts: Iterable[Artefact]) -> tuple[Fisher, ...]:
    return tuple(artefact for artefact in artefacts if isinstance(artefact, Fisher))


def datasets_of(artefacts: Iterable[Artefact]) -> Iterator[Dataset]:
    """The datasets that the artefacts are made from, repeats included."""
    for artefact in artefacts:
        if isinstance(artefact, Train | TrainTogether | FineTune | Fisher):
            yield from artefact.datasets


def parts(dataset: Dataset) -> tuple[Recording, ...]:
    """The recordings, of one behaviour policy each, that a dataset is made of; none for an imported one."""
    if not isinstance(dataset, Recording):
        return ()
    from dt.behaviour.record import parts_of  # heavy (Minari, MuJoCo), and not every plan has a dataset

    names = cast(tuple[Quality, ...], parts_of(dataset.quality))
    return tuple(dataset.model_copy(update={"quality": name}) for name in names)


def is_recorded(recording: Recording, store: Store) -> bool:
    """Whether the recording lies in the store, with all its parts."""
    return all(store.place.exists(path / "data" / "metadata.json") for path in recording_paths(recording, store))


def recording_paths(recording: Recording, store: Store) -> list[Path]:
    """The folders of what a dataset is made of."""
    from dt.behaviour import record

    of = (recording.task, recording.quality, recording.episodes, recording.seed, store.datasets)
    return record.recording_paths(*of)


def _by_id(recipes: Iterable[R]) -> dict[str, R]:
    return {recipe.id: recipe for recipe in recipes}
