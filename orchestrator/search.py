"""Searches over the coefficients of an experiment with Optuna: an alternative to running its whole grid.

A search asks for trials in fixed batches and is told their values in the order they were asked for, so it is a function
of its seed and of the tables: the same command after a kill asks the same, finds the rows, and goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from statistics import mean
from typing import TYPE_CHECKING, Literal, cast

from dt.errors import UserError
from orchestrator.answers import answers, baseline
from orchestrator.declarations import declare_experiment
from orchestrator.engine import Settings, run
from orchestrator.experiment import Experiment, Label, Point, Search, Setting, Table
from orchestrator.store import Store

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial
    from rich.console import Console

    from orchestrator.estimates import Sample

Objectives = Literal["mean", "each"]
HELD_OUT = 1_000_000  # added to the evaluation seed: starts that no trial has seen
SAMPLERS = ("tpe", "random", "nsga2")
UNDEFINED = "that score nothing before they are merged"  # of which a share means nothing


@dataclass(frozen=True)
class Trial:
    """One choice of coefficients, and the retention it was found to leave."""

    number: int
    parameters: Mapping[str, Label]
    values: Mapping[str, Sample]  # objective → what the trial reached; without those of policies that score nothing


@dataclass(frozen=True)
class Outcome:
    """All trials, and the best of them again, on starts that had no part in choosing them."""

    objectives: tuple[str, ...]
    trials: tuple[Trial, ...]
    best: tuple[Trial, ...]  # one, or the Pareto front


def run_search(
    experiment: Experiment,
    setting: Setting,
    store: Store,
    settings: Settings,
    console: Console,
    *,
    trials: int,
    batch: int = 4,
    sampler: str = "tpe",
    seed: int = 0,
    objectives: Objectives = "mean",
) -> Outcome:
    """Maximise the retention that an experiment's coefficients leave: of all targets on average, or of each.

    Its trials are in the table `experiments`, under a name of all that it is a function of. Raises UserError when the
    experiment has nothing to search over, or on an unknown sampler.
    """
    import optuna

    search = experiment.search
    if search is None:
        raise UserError(f"{experiment.name} has no coefficients to search over: run it instead")
    names = (objectives,) if objectives == "mean" else search.targets
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize"] * len(names), sampler=make_sampler(sampler, seed))
    called = f"{experiment.name}-search-{sampler}-{seed}-{objectives}-{batch}"  # all that it is a function of
    done: dict[int, Trial] = {}
    while len(done) < trials:
        asked = [study.ask() for _ in range(min(batch, trials - len(done)))]
        chosen = {trial.number: _suggested(trial, search) for trial in asked}
        reached = evaluate(search, chosen, setting, store, settings, console, objectives)
        for trial in asked:
            values = reached[trial.number]
            if values.keys() >= set(names):
                study.tell(trial, [values[name].value for name in names])
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            done[trial.number] = Trial(trial.number, chosen[trial.number], values)
            console.print(describe(done[trial.number]), highlight=False, soft_wrap=True)
        _declare(search, called, setting, store, done.values())
    best = [_first_alike(trial, done) for trial in study.best_trials]
    if not best:
        raise UserError(f"no trial of {experiment.name} keeps anything of policies {UNDEFINED}: train them for longer")
    again = {trial.number: dict(trial.parameters) for trial in best}
    elsewhere = evaluate(search, again, setting, store, settings, console, objectives, shift=HELD_OUT)
    return Outcome(
        names,
        tuple(done.values()),
        tuple(Trial(number, parameters, elsewhere[number]) for number, parameters in again.items()),
    )


def _declare(search: Search, name: str, setting: Setting, store: Store, trials: Iterable[Trial]) -> None:
    points = [
        Point(labels={**point.labels, "trial": trial.number}, evaluation=point.evaluation)
        for trial in trials
        for point in search.points(setting, trial.parameters)
    ]
    with store.lock():
        declare_experiment(store.open_tables(), name, setting.name, points)


def _suggested(trial: OptunaTrial, search: Search) -> dict[str, Label]:
    chosen = {name: trial.suggest_categorical(name, values) for name, values in search.space.items()}
    return cast(dict[str, Label], chosen)


def make_sampler(name: str, seed: int) -> BaseSampler:
    """An Optuna sampler by name. Raises UserError naming those there are."""
    from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

    from dt.errors import unknown

    match name:
        case "tpe":
            return TPESampler(seed=seed)
        case "random":
            return RandomSampler(seed=seed)
        case "nsga2":
            return NSGAIISampler(seed=seed)
    raise unknown("sampler", name, SAMPLERS)


def evaluate(
    search: Search,
    chosen: Mapping[int, Mapping[str, Label]],
    setting: Setting,
    store: Store,
    settings: Settings,
    console: Console,
    objectives: Objectives,
    *,
    shift: int = 0,
) -> dict[int, dict[str, Sample]]:
    """Trial → objective → retention where there is one, computed where it is not in the tables yet.

    shift: added to the seeds of the evaluations, for starts that no trial has seen.
    """
    points = [
        Point(
            labels={"trial": number, "target": point.evaluation.task},
            evaluation=point.evaluation.model_copy(update={"seed": point.evaluation.seed + shift}),
        )
        for number, parameters in chosen.items()
        for point in search.points(setting, parameters)
    ]
    wanted = {e.id: e for point in points for e in (point.evaluation, baseline(point.evaluation))}
    run(list(wanted.values()), settings, console)
    rows = ("trial",) if objectives == "mean" else ("trial", "target")
    asked = Experiment(
        name="search",
        title="",
        paper="",
        question="",
        points=lambda _: points,
        show=Table(rows=rows, value="retention"),
    )
    (answer,) = answers([asked], setting, store.open_tables())
    found: dict[int, dict[str, Sample]] = {number: {} for number in chosen}
    for cell in answer.cells:
        number = cell.labels["trial"]
        assert isinstance(number, int | float)
        if "retention" in cell.estimates:
            found[int(number)][str(cell.labels.get("target", "mean"))] = cell.estimates["retention"]
    return found


def describe(trial: Trial) -> str:
    """A trial in one line."""
    parameters = ", ".join(f"{name} {value}" for name, value in trial.parameters.items())
    values = ", ".join(f"{name} {sample.value:.3f}" for name, sample in trial.values.items())
    return f"trial {trial.number}: {parameters}: retention {values or f'undefined, of policies {UNDEFINED}'}"


def _first_alike(trial: FrozenTrial, done: Mapping[int, Trial]) -> Trial:
    """The first trial of the same coefficients: a sampler may ask for the same again."""
    return next(each for each in done.values() if each.parameters == trial.params)


def ranked(outcome: Outcome) -> list[Trial]:
    """Its trials, best first, by the mean over objectives; last those of which one is undefined."""

    def worth(trial: Trial) -> float:
        whole = trial.values.keys() >= set(outcome.objectives)
        return mean(sample.value for sample in trial.values.values()) if whole else -inf

    return sorted(outcome.trials, key=worth, reverse=True)
