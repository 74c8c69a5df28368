"""What the commands do that compute or show: kept apart, because it imports what is heavy."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.table import Table as RichTable

from dt.behaviour.policy import load_behaviour_policy
from dt.errors import UserError, unknown
from dt.tasks import get_task
from dt.training.optimisation import Precision
from orchestrator.answers import Answer, answers, baseline, select, shown_labels
from orchestrator.cli_options import RESULTS, console, log
from orchestrator.costs import estimate, unit_costs
from orchestrator.data_choice import RECORDED, choose_data
from orchestrator.declarations import declare_experiment, declare_paper, state_datasets
from orchestrator.engine import Settings
from orchestrator.engine import run as run_engine
from orchestrator.estimates import sample_mean
from orchestrator.experiment import Experiment, Figure, Label, Measure, Setting, get_experiment, merged
from orchestrator.figures import draw, plain, spell
from orchestrator.plan import datasets_of, make_plan, parts
from orchestrator.profiles import get_profile
from orchestrator.progress import duration
from orchestrator.recipes import (
    AnyPolicy,
    Artefact,
    Evaluate,
    Recipe,
    Recording,
    closure,
    ingredients,
    read_policy,
)
from orchestrator.report import measured, number
from orchestrator.search import Objectives, ranked, run_search
from orchestrator.store import Store

MANY_ROWS = 24  # more are for the report


# --- planning -----------------------------------------------------------------------


def evaluations_of(experiments: Sequence[Experiment], setting: Setting, only: Sequence[str] = ()) -> list[Evaluate]:
    """What answers the experiments; of it, where labels are given as in policy=ChibiT, what has those: of a label given
    twice, either value. Policies before merging then come along, for retention is a share of theirs.

    Raises UserError for a label that no point has, or not with that value.
    """
    points = [point for experiment in experiments for point in experiment.points(setting)]
    if not only:
        return [point.evaluation for point in points]
    where: dict[str, tuple[Label, ...]] = {}
    for option in only:
        label, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--only takes a label and its value, as in policy=ChibiT: {option!r} given")
        known = {point.labels[label]: plain(point.labels[label]) for point in points if label in point.labels}
        if not known:
            raise unknown("label", label, {name for point in points for name in point.labels})
        if value not in known.values():
            raise unknown(label, value, set(known.values()))
        where[label] = (*where.get(label, ()), *(each for each, typed in known.items() if typed == value))
    chosen = [point.evaluation for point in select(points, where)]
    if not chosen:
        raise UserError(f"no point has all of these labels: {', '.join(only)}")
    return [*chosen, *map(baseline, chosen)]


def show_plan(evaluations: Sequence[Evaluate], store: Store) -> None:
    """What a run of these evaluations would compute."""
    tables = store.open_tables()
    planned = make_plan(evaluations, store, tables)
    cores = os.cpu_count() or 1
    seconds = estimate(planned, unit_costs(tables), cores)
    table = RichTable("", "to compute", "of", "already there", "about")

    def line(name: str, kind: str, recipes: Sequence[Recipe], size: str, stored: int) -> None:
        table.add_row(name, f"{len(recipes):,}", size, f"{stored:,}", duration(seconds[kind]))

    recorded, steps = f"{planned.recorded_episodes:,} episodes", f"{planned.gradient_steps:,} steps"
    line("recordings", "recording", planned.recordings, recorded, planned.stored_recordings)
    line("trainings", "train", planned.trainings, steps, len(planned.stored_trainings))
    if planned.fishers or planned.stored_fishers:
        batches = f"{sum(each.batches for each in planned.fishers):,} batches"
        line("estimates", "fisher", planned.fishers, batches, len(planned.stored_fishers))
    line("evaluations", "evaluate", planned.evaluations, f"{planned.episodes:,} episodes", planned.stored_evaluations)
    known = "from the runs in the tables" if tables.done("runs") else "a guess until something has run here"
    table.caption = f"in all about {duration(sum(seconds.values()))} on {cores} cores ({known})"
    console.print(table)


# --- computing -----------------------------------------------------------------------


def declare(experiments: Sequence[Experiment], setting: Setting, store: Store) -> None:
    """State which evaluations answer the experiments, the paper's numbers, and what the data at hand holds."""
    tables = store.open_tables()
    points = {experiment.name: list(experiment.points(setting)) for experiment in experiments}
    evaluations = [point.evaluation for some in points.values() for point in some]
    with store.lock():
        declare_paper(tables)
        state_datasets(tables, store, datasets_of(_artefacts(evaluations)))  # what came by other ways
        for name, some in points.items():
            declare_experiment(tables, name, setting.name, some)


def compute(recipes: Sequence[Recipe], store: Store, address: str | None, workers: int | None) -> None:
    """Run what these recipes need. Raises UserError, before anything starts, for data that nobody can record."""
    datasets = [recipe for recipe in recipes if isinstance(recipe, Recording)]
    datasets += [dataset for dataset in datasets_of(_artefacts(recipes)) if isinstance(dataset, Recording)]
    for task, quality in {(part.task, part.quality) for dataset in set(datasets) for part in parts(dataset)}:
        load_behaviour_policy(task, quality)
    run_engine(recipes, Settings(results=store.address, address=address, rollout_workers=workers), log)


def _artefacts(recipes: Sequence[Recipe]) -> list[Artefact]:
    """All that has to be made for them."""
    behind = {part.id: part for recipe in recipes for part in ingredients(recipe)}
    return [recipe for recipe in closure(behind.values()).values() if isinstance(recipe, Artefact)]


# --- showing -----------------------------------------------------------------------


def show_answers(
    experiments: Sequence[Experiment], setting: Setting, store: Store, figure: Path | None = None
) -> list[Answer]:
    """Print each experiment's numbers with their intervals, or only how its claims fared where there are many."""
    found = answers(experiments, setting, store.open_tables())
    for each in found:
        console.print(_table(each))
        if figure is not None and isinstance(each.experiment.show, Figure) and each.begun:
            draw(each, each.experiment.show, figure)
            console.print(f"figure: {figure}", soft_wrap=True, highlight=False)
    return found


def _table(each: Answer) -> RichTable:
    experiment, labels = each.experiment, shown_labels(each.experiment)
    measures: list[Measure] = list(dict.fromkeys(("score", experiment.show.value)))
    if isinstance(experiment.show, Figure):
        measures = ["score", "retention"]
    table = RichTable(title=experiment.title, title_justify="left")
    if sum(not cell.averaged for cell in each.cells) > MANY_ROWS and experiment.claims:
        for column in ("claim of the paper", "observed", "verdict"):
            table.add_column(column)
        for claim in experiment.claims:
            judged = each.judge(claim)
            observed, said = (
                (number(judged.sample, claim.value), judged.verdict) if judged else ("–", "cannot be computed")
            )
            table.add_row(claim.statement, observed, said)
        table.caption = f"{len(each.cells)} numbers: see `mergedt report`"
        return table
    for name in (
        *labels,
        *(measure.replace("of_data", "of the data's mean return") for measure in measures),
        "episodes",
        "runs",
    ):
        table.add_column(name)
    for cell in each.cells:
        table.add_row(
            *(spell(name, cell.labels[name]) for name in labels),
            *(measured(cell, measure) for measure in measures),
            str(cell.episodes),
            str(cell.runs),
        )
    table.caption = "mean ± standard error over runs, where there are several [95 % bootstrap interval over episodes]"
    if each.missing:
        table.caption += f"; {len(each.missing)} evaluations are missing"
    return table


def show_search(
    experiment: Experiment,
    setting: Setting,
    store: Store,
    address: str | None,
    workers: int | None,
    *,
    trials: int,
    batch: int,
    sampler: str,
    seed: int,
    objectives: Objectives,
) -> None:
    """Search, then print the trials and the best of them on starts that none has seen."""
    settings = Settings(results=store.address, address=address, rollout_workers=workers)
    outcome = run_search(
        experiment, setting, store, settings, log,
        trials=trials, batch=batch, sampler=sampler, seed=seed, objectives=objectives,
    )  # fmt: skip
    for title, found in (("Trials", ranked(outcome)), ("The best, on new starts", list(outcome.best))):
        table = RichTable("trial", *found[0].parameters, *outcome.objectives, title=title, title_justify="left")
        for trial in found:
            values = (number(trial.values.get(name), "retention") for name in outcome.objectives)
            table.add_row(str(trial.number), *(str(value) for value in trial.parameters.values()), *values)
        table.caption = "retention: mean [95 % bootstrap interval]"
        console.print(table)


# --- single policies -----------------------------------------------------------------------


def export_policy(prefix: str, store: Store, output: Path) -> None:
    """Make the policy of that id from the store and write it. Raises UserError on an unknown or ambiguous id."""
    from dt.model.policy import save_policy
    from dt.model.size import size_of
    from orchestrator.making import from_store, realise

    rows = store.open_tables().some("policies", ["policy", "recipe"]).to_pylist()
    if not rows:
        raise UserError(f"there are no policies in {store.address} yet: run an experiment first")
    found = [row for row in rows if row["policy"].startswith(prefix)]
    if not found:
        raise UserError(f"no policy's id begins with {prefix!r}: see `mergedt policies`")
    if len(found) > 1:
        raise UserError(f"{len(found)} policies begin with {prefix!r}: give more of the id")
    recipe = read_policy(found[0]["recipe"])
    _check_made(recipe, store)
    policy = realise(recipe, from_store(recipe, store))
    save_policy(policy, output, {"recipe": recipe.canonical_json(), "recipe_id": recipe.id})
    size = size_of(policy)
    console.print(
        f"{output}: {', '.join(policy.heads)}; transformer size {size.transformer:.2%} (the paper's count), "
        f"{size.total:,.0f} parameters in all",
        soft_wrap=True,
        highlight=False,
    )


def _check_made(policy: AnyPolicy, store: Store) -> None:
    """Raises UserError when something that a policy is made of is not stored: rows travel without policies."""
    from orchestrator.messages import describe

    for part in ingredients(policy):
        if not store.has(part):
            raise UserError(
                f"{describe(part)} is not in {store.address}: run an experiment or a sweep that needs it first"
            )


def convert_original(file: Path, task: str, source: str, output: Path, store: Store) -> None:
    """Read a checkpoint of the original code and write it as a policy of ours, with its data's statistics."""
    from dt.data.sources import load_imported
    from dt.model.original import read_original
    from dt.model.policy import save_policy

    data = load_imported(source, get_task(task).name, store.datasets)
    policy = read_original(file, task, state_mean=data.state_mean, state_std=data.state_std)
    save_policy(policy, output, {"converted_from": file.name})
    console.print(f"{output}: {policy.architecture}; try `mergedt evaluate {output}`", soft_wrap=True, highlight=False)


def evaluate_file(
    file: Path,
    tasks: Sequence[str] | None,
    *,
    episodes: int,
    seed: int,
    target_return: float | None,
    precision: Precision,
) -> None:
    """Roll out the policy in a file and print what it reaches on each task: asked for that return, or for the best in
    the task's data.

    Raises UserError for one target return of several tasks.
    """
    from dt.model.policy import load_policy
    from dt.rollout.evaluate import evaluate
    from dt.scores import normalised_score

    policy = load_policy(file)
    table = RichTable("task", "return", "score", "episodes", title=str(file), title_justify="left")
    chosen = [get_task(name) for name in dict.fromkeys(tasks or policy.heads)]
    if target_return is not None and len(chosen) > 1:
        raise UserError(f"--target-return is one task's: add --task, one of {', '.join(task.name for task in chosen)}")
    goal: float | Literal["best"] = "best" if target_return is None else target_return
    for task in chosen:
        result = evaluate(policy, task, episodes=episodes, seed=seed, target_return=goal, precision=precision)
        returns = sample_mean(result.returns.tolist(), together=task.name)
        scores = sample_mean(normalised_score(task, result.returns).tolist(), together=task.name)
        table.add_row(task.name, number(returns, "return"), number(scores, "score"), str(episodes))
    table.caption = "mean [95 % bootstrap interval]"
    console.print(table)


# --- the demo -----------------------------------------------------------------------


def film(evaluation: Evaluate, store: Store, output: Path, steps: int) -> None:
    """Record the first episode of an evaluation. Raises UserError when a policy it is made of is not trained yet."""
    from dt.rollout.video import record_video
    from orchestrator.making import from_store, realise

    _check_made(evaluation.policy, store)
    policy = realise(evaluation.policy, from_store(evaluation.policy, store))
    task, target_return = get_task(evaluation.task), evaluation.target_return
    record_video(policy, task, output, seed=evaluation.seed, steps=steps, target_return=target_return)


def run_demo(store: Store, address: str | None, workers: int | None, profile: str = "demo") -> None:
    """The demo: run, show, draw, film, and say what to try next."""
    began = time.monotonic()
    experiment = get_experiment("demo")
    setting = Setting(get_profile(profile), choose_data(RECORDED))
    target, source = "walker2d", "halfcheetah"
    console.print(f"{experiment.question} ({setting.profile.purpose})")
    declare([experiment], setting, store)
    compute(evaluations_of([experiment], setting), store, address, workers)
    show_answers([experiment], setting, store, store.root / "demo" / "demo.png")
    seed = setting.profile.sweep_seeds[0]
    policy = merged(setting.expert(target, seed), setting.expert(source, seed), "attention", 0.5)
    movie = store.root / "demo" / f"{target}-{policy.id[:8]}.webp"
    what = f"{movie}: {target} with the mean of its own and {source}'s attention"
    try:
        if not movie.is_file():
            film(setting.evaluate(policy, target), store, movie, steps=300)
    except UserError as error:  # a machine that cannot draw
        what = f"none: {error}"
    at = "" if store.root == Path(RESULTS).absolute() else f" --results {store.address}"
    console.print(f"film:   {what}", soft_wrap=True, highlight=False)
    console.print(f"rows:   {store.place.address_at('tables')}", soft_wrap=True, highlight=False)
    console.print(f"\nThat took {duration(time.monotonic() - began)}. Try next:")
    for line in (
        f"mergedt sweep --target {target} --source {source} --group mlp --alpha 0,0.5,1 --profile {profile}{at}",
        f"mergedt query 'select task, \"group\", alpha, mean_score from scores order by all'{at}",
        f"mergedt video --target {source} --source {target} --alpha 1 --output swapped.webp{at}",
        "mergedt plan all --profile laptop",
        "mergedt run figure_3 --profile laptop && mergedt report figure_3",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
