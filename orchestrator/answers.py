"""From rows to what an experiment asked: estimates for the cells of its figure or table, and verdicts on its claims."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import TYPE_CHECKING, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dt.errors import UserError
from orchestrator.estimates import Sample, constant, mean_of, reach, sample_mean, standard_error
from orchestrator.experiment import Claim, Experiment, Figure, Label, Measure, Point, Setting, Table, Where
from orchestrator.recipes import Evaluate, Trained, dataset_of, origin
from orchestrator.rows import SIZES, size_in
from orchestrator.tables import Tables

if TYPE_CHECKING:
    from dt.model.size import Size

Verdict = Literal["agrees", "disagrees", "inconclusive"]
Run = tuple[Label, Label]  # training seed, and instance of what was made at it
AVERAGE = "average"  # in the place of a label that a table averages over
ABOUT = 0.05  # as far from a number of the paper is still about it


class Judgement(NamedTuple):
    """A claim's number with its standard error over runs, if there are several; what they say, and of how many runs
    each of its terms is at least."""

    sample: Sample
    error: float | None
    verdict: Verdict
    runs: int


@dataclass(frozen=True)
class Cell:
    """One number of a figure or table: the mean over all points under its labels."""

    labels: Mapping[str, Label]
    estimates: Mapping[Measure, Sample]  # only what could be computed
    episodes: int
    runs: int  # training seeds, and instances at each
    errors: Mapping[Measure, float]  # standard error over training seeds, or over the instances at the only one
    size: float | None = None  # of the transformer, as the paper counts it; None where it differs among the points
    parameters: float | None = None  # of all that is stored, likewise

    @property
    def averaged(self) -> bool:
        """Whether it is of a line for the mean."""
        return AVERAGE in self.labels.values()


@dataclass(frozen=True)
class Answer:
    """What the rows say about an experiment at a setting."""

    experiment: Experiment
    setting: Setting
    points: tuple[Point, ...]
    rows: Mapping[str, tuple[list[float], list[float]]]  # evaluation → its episodes' returns and scores
    sizes: Mapping[str, Size]  # of policies; not of all, in tables of older versions
    data_returns: Mapping[str, float]  # dataset → mean return of its episodes

    @cached_property
    def asked(self) -> frozenset[str]:
        """Ids of the evaluations it takes."""
        return frozenset(point.evaluation.id for point in self.points)

    @cached_property
    def missing(self) -> frozenset[str]:
        """Ids of those without rows."""
        return self.asked - self.rows.keys()

    @property
    def begun(self) -> bool:
        """Whether there is anything to show."""
        return any(cell.estimates for cell in self.cells)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """One for each combination of the labels shown, in the order of the points, averages last.

        Over the runs all of whose rows are there; without estimates while there is none.
        """
        shown, average = shown_labels(self.experiment), averaged_label(self.experiment)
        groups: dict[tuple[Label, ...], list[Point]] = {}
        for over in dict.fromkeys((None, average)):
            for point in self.points:
                if not _is_baseline_only(point, self.experiment):
                    key = tuple(AVERAGE if name == over else point.labels[name] for name in shown)
                    groups.setdefault(key, []).append(point)
        return tuple(self._cell(dict(zip(shown, key, strict=True)), points) for key, points in groups.items())

    def judge(self, claim: Claim) -> Judgement | None:
        """The claim's number and what it says: each term over its runs all of whose rows are there, at the training
        seeds that all terms have.

        None where it cannot be computed.
        """
        terms = [(w, self._of_whole_runs(select(self.points, where), claim.value)) for w, where in claim.terms]
        common = set.intersection(*({_run(point)[0] for point in points} for _, points in terms))
        there = [(weight, [p for p in points if _run(p)[0] in common]) for weight, points in terms]
        if not common:
            return None
        means = [mean_of([self._sample(point, claim.value) for point in points]) * weight for weight, points in there]
        total = sum(means[1:], start=means[0])
        if not total.finite:
            return None
        error = self._error_of(there, claim.value)
        runs = min(len({_run(point) for point in points}) for _, points in there)
        return Judgement(total, error, verdict(reach(total, error), claim), runs)

    def _error_of(self, terms: Sequence[tuple[float, Sequence[Point]]], measure: Measure) -> float | None:
        """Of a weighted sum of means over points: over training seeds, or at one seed over its instances, with each of
        which a term that has but one takes part."""
        runs = {_run(point) for _, points in terms for point in points}
        again = 0 if len({seed for seed, _ in runs}) > 1 else 1

        def at(name: Label) -> float:
            mine = ((w, [p for p in points if _run(p)[again] == name] or points) for w, points in terms)
            return sum(w * mean(self._sample(point, measure).value for point in points) for w, points in mine)

        values = [at(name) for name in sorted({run[again] for run in runs}, key=str)]
        return standard_error(values) if len(values) > 1 else None

    def _cell(self, labels: Mapping[str, Label], points: Sequence[Point]) -> Cell:
        shown = self._of_whole_runs(points, self.experiment.show.value) or self._of_whole_runs(points, "score")
        of_runs = self._of_runs(points)
        sizes = [self.sizes.get(point.evaluation.policy.id) for point in shown]
        return Cell(
            labels=labels,
            estimates={measure: mean_of(list(runs.values())) for measure, runs in of_runs.items()},
            episodes=sum(len(self.rows[point.evaluation.id][0]) for point in shown),
            runs=len({_run(point) for point in shown}),
            errors={measure: error for measure, runs in of_runs.items() if (error := _error(runs)) is not None},
            size=_only(size.transformer if size else None for size in sizes),
            parameters=_only(size.total if size else None for size in sizes),
        )

    def _of_whole_runs(self, points: Sequence[Point], measure: Measure) -> list[Point]:
        """Without those of runs of which the measure of some point is not known."""
        partial = {_run(point) for point in points if not self._known(point, measure)}
        return [point for point in points if _run(point) not in partial]

    def _of_runs(self, points: Sequence[Point]) -> dict[Measure, dict[Run, Sample]]:
        """By measure, each run's mean over its points; without what is not defined for one of them."""
        measures: set[Measure] = {"return", "score", "retention", self.experiment.show.value}
        found: dict[Measure, dict[Run, Sample]] = {}
        for measure in measures:
            runs: dict[Run, list[Sample]] = {}
            for point in self._of_whole_runs(points, measure):
                runs.setdefault(_run(point), []).append(self._sample(point, measure))
            means = {run: mean_of(samples) for run, samples in runs.items()}
            if means and all(sample.finite for sample in means.values()):
                found[measure] = means
        return found

    def _known(self, point: Point, measure: Measure) -> bool:
        evaluation = point.evaluation
        beside = measure != "retention" or baseline(evaluation).id in self.rows
        return (
            evaluation.id in self.rows and beside and (measure != "of_data" or _data(evaluation) in self.data_returns)
        )

    def _sample(self, point: Point, measure: Measure) -> Sample:
        """Of a measure that is known."""
        evaluation = point.evaluation
        match measure:
            case "return":
                return self._mean(evaluation, 0)
            case "score":
                return self._mean(evaluation, 1)
            case "retention":
                return self._mean(evaluation, 1) / self._mean(baseline(evaluation), 1)
            case "of_data":
                return self._mean(evaluation, 0) / constant(self.data_returns[_data(evaluation)])

    def _mean(self, evaluation: Evaluate, column: int) -> Sample:
        stratum = f"{evaluation.task} {evaluation.seed} {_target(evaluation).id}"
        return sample_mean(self.rows[evaluation.id][column], together=stratum)


def answers(experiments: Sequence[Experiment], setting: Setting, tables: Tables) -> list[Answer]:
    """Read the rows of the experiments' evaluations, all in one go, and of the unmerged policies' beside them."""
    points = {experiment.name: tuple(experiment.points(setting)) for experiment in experiments}
    wanted = {
        e.id for some in points.values() for point in some for e in (point.evaluation, baseline(point.evaluation))
    }
    episodes = tables.some("episodes", ["evaluation", "episode", "return", "score"], among("evaluation", wanted))
    rows: dict[str, tuple[list[float], list[float]]] = {}
    for row in episodes.sort_by([("evaluation", "ascending"), ("episode", "ascending")]).to_pylist():
        returns, scores = rows.setdefault(row["evaluation"], ([], []))
        returns.append(row["return"])
        scores.append(row["score"])
    policies = {point.evaluation.policy.id for some in points.values() for point in some}
    known = tables.some("policies", ["policy", *SIZES], among("policy", policies))
    sizes = {row["policy"]: size_in(row) for row in known.to_pylist() if row["transformer_size"] is not None}
    data = tables.some("datasets", ["dataset", "mean_return"])
    means = dict(zip(data["dataset"].to_pylist(), data["mean_return"].to_pylist(), strict=True))
    return [Answer(each, setting, points[each.name], rows, sizes, means) for each in experiments]


def among(column: str, ids: Iterable[str]) -> pc.Expression:
    """The filter for rows whose `column` is one of the ids, of which there may be none."""
    return pc.field(column).isin(pa.array(sorted(ids), pa.string()))


def baseline(evaluation: Evaluate) -> Evaluate:
    """The same evaluation of the policy as it was trained, before anything was merged into it or perturbed."""
    return evaluation.model_copy(update={"policy": _target(evaluation)})


def _target(evaluation: Evaluate) -> Trained:
    return origin(evaluation.policy, evaluation.task)


def _data(evaluation: Evaluate) -> str:
    """Id of the dataset that the evaluated policy learnt its task from."""
    return dataset_of(_target(evaluation), evaluation.task).id


def shown_labels(experiment: Experiment) -> tuple[str, ...]:
    """The labels of an experiment's cells."""
    show = experiment.show
    if isinstance(show, Figure):
        names: tuple[str | None, ...] = (show.panel, show.series, show.x, show.ticks, show.kind)
    else:
        names = (*show.rows, show.column)
    return tuple(dict.fromkeys(name for name in names if name is not None))


def averaged_label(experiment: Experiment) -> str | None:
    """The label over which a table has lines for the mean."""
    return experiment.show.average if isinstance(experiment.show, Table) else None


def select(points: Sequence[Point], where: Where) -> list[Point]:
    """The points whose labels take the given values. Raises UserError on a label that no point has."""
    for name in where:
        if not any(name in point.labels for point in points):
            raise UserError(f"no point has the label {name!r}")

    def fits(point: Point) -> bool:
        return all(
            point.labels.get(name) in (values if isinstance(values, tuple) else (values,))
            for name, values in where.items()
        )

    return [point for point in points if fits(point)]


def verdict(interval: tuple[float, float], claim: Claim) -> Verdict:
    """By how far a claim's number reaches: see `Claim`."""
    low, high = interval
    match claim.expected:
        case "at least":
            return "agrees" if low >= claim.bound else "disagrees" if high < claim.bound else "inconclusive"
        case "at most":
            return "agrees" if high <= claim.bound else "disagrees" if low > claim.bound else "inconclusive"
        case "about":
            near, far = claim.bound - ABOUT, claim.bound + ABOUT
            return (
                "agrees" if near <= low and high <= far else "disagrees" if high < near or low > far else "inconclusive"
            )


def _run(point: Point) -> Run:
    return point.labels.get("seed", 0), point.labels.get("instance", 0)


def _error(runs: Mapping[Run, Sample]) -> float | None:
    """Of their mean: over training seeds, each the mean of its instances; at one seed, over the instances."""
    of_seeds: dict[Label, list[float]] = {}
    for (seed, _), sample in runs.items():
        of_seeds.setdefault(seed, []).append(sample.value)
    values = [mean(each) for each in of_seeds.values()] if len(of_seeds) > 1 else next(iter(of_seeds.values()))
    return standard_error(values) if len(values) > 1 else None


def _only(values: Iterable[float | None]) -> float | None:
    """The value that all share; None where there is none."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _is_baseline_only(point: Point, experiment: Experiment) -> bool:
    """Unmerged policies are 1 by definition; a figure over units has no place for them on its axis."""
    return isinstance(experiment.show, Figure) and point.labels.get(experiment.show.x) == "none"
