"""What an experiment is: a question, the points that answer it, how to show them, and what the paper says to expect.

A declaration only. Planning, running and reporting read it; it computes nothing and knows nothing of Ray.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from dt.errors import unknown
from dt.frozen import Frozen
from orchestrator.data_choice import RECORDED, DataChoice
from orchestrator.profiles import Profile
from orchestrator.recipes import Evaluate, Merge, Perturb, Quality, Train

Label = str | float
Measure = Literal["score", "retention", "return", "of_data"]
Where = Mapping[str, Label | tuple[Label, ...]]  # label → the value, or the values, it may take


class Point(Frozen):
    """One evaluation of an experiment under the labels that place it in a figure or table."""

    labels: dict[str, Label]
    evaluation: Evaluate


@dataclass(frozen=True)
class Figure:
    """Panels of lines with intervals. Labels not named here are averaged over."""

    x: str
    series: str
    panel: str | None = None
    ticks: str | None = None  # the label written under each x, where it is not x itself
    kind: str | None = None  # the label that colours the ticks
    value: Measure = "retention"


@dataclass(frozen=True)
class Table:
    """Rows by some labels, columns by another, as the paper prints it."""

    rows: tuple[str, ...]
    column: str | None = None
    value: Measure = "score"


@dataclass(frozen=True)
class Claim:
    """A statement of the paper as a number: a weighted sum of means over points, against a bound.

    `at least` and `at most` agree when the whole interval is on that side of the bound and disagree when all of it is
    on the other; else they are inconclusive. `about` agrees when the paper's own number lies in the interval.
    """

    statement: str
    terms: tuple[tuple[float, Where], ...]
    expected: Literal["at least", "at most", "about"]
    bound: float
    value: Measure = "retention"


@dataclass(frozen=True)
class Setting:
    """A profile and a choice of data, with the recipes that experiments are made of."""

    profile: Profile
    data: DataChoice

    @property
    def name(self) -> str:
        """The profile's name, and where the data is not recorded here, that too."""
        return self.profile.name if self.data.name == RECORDED else f"{self.profile.name}-{self.data.name}"

    def expert(self, task: str, seed: int, quality: Quality = "expert") -> Train:
        """The single-task Decision Transformer of a task, dataset and training seed."""
        return Train(
            dataset=self.data.dataset(task, quality, self.profile),
            architecture=self.profile.architecture,
            optimisation=self.profile.optimisation,
            seed=seed,
        )

    def evaluate(self, policy: Train | Merge | Perturb, task: str) -> Evaluate:
        """The profile's evaluation of a policy: the same starts for every policy of a task."""
        return Evaluate(
            policy=policy,
            task=task,
            episodes=self.profile.evaluation_episodes,
            seed=self.profile.evaluation_seed,
            target_return=self.data.target_return(task),
            precision=self.profile.evaluation_precision,
        )


def merged(target: Train, source: Train, group: str, alpha: float) -> Train | Merge:
    """The target with `group` drawn towards the source; at α = 0 the target itself, evaluated once for all."""
    return target if alpha == 0 else Merge(sources=(target, source), group=group, alpha=alpha)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question of the paper, or one of our own."""

    name: str
    title: str
    paper: str  # where in the paper, or "" where it is our own
    question: str
    points: Callable[[Setting], Iterable[Point]]
    show: Figure | Table
    claims: tuple[Claim, ...] = ()


@cache
def experiments() -> Mapping[str, Experiment]:
    """Every module of the package `experiments` that declares an EXPERIMENT, by name."""
    import experiments as package

    modules = (importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__))
    found = [module.EXPERIMENT for module in modules if hasattr(module, "EXPERIMENT")]
    return {experiment.name: experiment for experiment in found}


def get_experiment(name: str) -> Experiment:
    """The experiment of that name. Raises UserError naming the nearest valid ones."""
    if name not in experiments():
        raise unknown("experiment", name, experiments())
    return experiments()[name]
