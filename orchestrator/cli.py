"""The command line `mergedt`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table as RichTable

from dt.errors import UserError, unknown
from dt.tasks import get_task
from dt.training.optimisation import Precision
from orchestrator import cli_data
from orchestrator.cli_options import (
    RESULTS,
    AddressOption,
    Asked,
    Courteous,
    DataOption,
    InitLargeOption,
    InitOption,
    OnlyOption,
    ProfileOption,
    ResultsOption,
    SeedsOption,
    TextOption,
    WorkersOption,
    console,
    experiments_of,
    numbers,
)
from orchestrator.data_choice import RECORDED
from orchestrator.experiment import Experiment, Figure, Point, Setting, Table, experiments, get_experiment, merged
from orchestrator.profiles import PROFILES
from orchestrator.recipes import Merge, Quality, Train
from orchestrator.store import Store

if TYPE_CHECKING:
    from orchestrator.tables import Tables

app = typer.Typer(
    cls=Courteous,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Train Decision Transformers per robot task, merge their weights, evaluate the merges.",
)
app.add_typer(cli_data.data, name="data")
app.add_typer(cli_data.behaviour, name="behaviour")

TABLES = "episodes, training, policies, datasets, texts, runs, experiments, paper, benchmarks, scores"
Names = Annotated[list[str], typer.Argument(metavar="EXPERIMENT...", help="By name, or `all`: see `mergedt list`.")]
Group = Annotated[
    str, typer.Option("--group", help="attention, mlp, layernorm, trunk, a unit, or several joined by +.")
]
TargetOption = Annotated[str, typer.Option("--target", help="Task whose policy is merged into and evaluated.")]
QualityOption = Annotated[Quality, typer.Option("--quality", help="Data the policies are trained on.")]


@app.command("list")
def list_() -> None:
    """The experiments and the profiles."""
    table = RichTable("experiment", "paper", "question", title="Experiments: mergedt run NAME", title_justify="left")
    for experiment in experiments().values():
        table.add_row(experiment.name, experiment.paper or "–", experiment.question)
    console.print(table)
    table = RichTable(
        "profile", "for", "steps", "episodes", "seeds", title="Profiles: --profile NAME", title_justify="left"
    )
    for profile in PROFILES.values():
        seeds = ",".join(map(str, profile.training_seeds))
        evaluated = str(profile.evaluation_episodes)
        table.add_row(profile.name, profile.purpose, f"{profile.optimisation.steps:,}", evaluated, seeds)
    console.print(table)


@app.command()
def plan(
    names: Names,
    profile: ProfileOption = "laptop",
    results: ResultsOption = RESULTS,
    data: DataOption = RECORDED,
    seeds: SeedsOption = None,
    init: InitOption = None,
    init_large: InitLargeOption = None,
    text: TextOption = None,
    only: OnlyOption = None,
) -> None:
    """What a run would compute, how long it may take, and what is already there."""
    from orchestrator.cli_work import evaluations_of, show_plan

    setting = Asked(
        profile=profile, results=results, data=data, seeds=seeds, init=init, init_large=init_large, text=text
    ).setting
    show_plan(evaluations_of(experiments_of(names), setting, only or ()), Store(results))


@app.command()
def run(
    names: Names,
    profile: ProfileOption = "laptop",
    results: ResultsOption = RESULTS,
    data: DataOption = RECORDED,
    seeds: SeedsOption = None,
    init: InitOption = None,
    init_large: InitLargeOption = None,
    text: TextOption = None,
    only: OnlyOption = None,
    address: AddressOption = None,
    workers: WorkersOption = None,
) -> None:
    """Compute experiments; what is already there is not computed again."""
    from orchestrator.cli_work import compute, declare, evaluations_of, show_answers

    asked, chosen = (
        Asked(profile=profile, results=results, data=data, seeds=seeds, init=init, init_large=init_large, text=text),
        experiments_of(names),
    )
    setting, store = asked.setting, Store(results)
    evaluations = evaluations_of(chosen, setting, only or ())
    declare(chosen, setting, store)
    compute(evaluations, store, address, workers)
    show_answers(chosen, setting, store)
    console.print(f"rows:    {store.place.address_at('tables')}", soft_wrap=True, highlight=False)
    console.print(f"figures: mergedt report {' '.join(names)} {asked.again}", soft_wrap=True, highlight=False)


@app.command()
def sweep(
    target: TargetOption,
    source: Annotated[
        list[str], typer.Option("--source", help="Task merged into it; several take their uniform mean.")
    ],
    group: Annotated[list[str], typer.Option("--group", help="What is merged; give it again for another line.")],
    alpha: Annotated[str | None, typer.Option("--alpha", help="Weights of the source, as in 0,0.5,1.")] = None,
    quality: QualityOption = "expert",
    profile: ProfileOption = "laptop",
    results: ResultsOption = RESULTS,
    data: DataOption = RECORDED,
    seeds: SeedsOption = None,
    address: AddressOption = None,
    workers: WorkersOption = None,
    figure: Annotated[Path | None, typer.Option("--figure", help="Also draw the sweep to this PNG.")] = None,
) -> None:
    """Ask a new question: merge GROUP of a target's policy with a source's, over weights ALPHA."""
    from orchestrator.answers import baseline
    from orchestrator.cli_work import compute, evaluations_of, show_answers

    setting = Asked(profile=profile, results=results, data=data, seeds=seeds).setting
    _check_tasks(target, *source)
    weights = _weights(alpha, source)
    if figure is not None:
        _check_suffix(figure, ".png", "figures are PNG files")

    def points(at: Setting) -> list[Point]:
        return [
            Point(
                labels={
                    "target": target,
                    "source": "+".join(source),
                    "group": part,
                    "alpha": "mean" if weight is None else weight,
                    "seed": seed,
                },
                evaluation=at.evaluate(_merge(at, target, source, part, weight, seed, quality), target),
            )
            for part in dict.fromkeys(group)
            for weight in dict.fromkeys(weights)
            for seed in at.profile.training_seeds
        ]

    rows = ("target", "source", "group", "alpha")
    show = Figure(x="alpha", series="group") if figure else Table(rows=rows, value="retention")
    asked = Experiment(
        name="sweep", title=f"{'+'.join(source)} → {target}", paper="", question="", points=points, show=show
    )
    merges = evaluations_of([asked], setting)
    unmerged = map(baseline, merges)  # what retention is a share of
    compute([*merges, *unmerged], Store(results), address, workers)
    show_answers([asked], setting, Store(results), figure)


@app.command()
def search(
    name: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="One with coefficients, as `regularisation`.")],
    trials: Annotated[int, typer.Option("--trials", min=1)] = 16,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Trials asked for, and run, at once.")] = 4,
    sampler: Annotated[str, typer.Option("--sampler", help="Of Optuna: tpe, random or nsga2.")] = "tpe",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sampler.")] = 0,
    each: Annotated[
        bool, typer.Option("--each", help="Keep every target's retention an objective of its own.")
    ] = False,
    profile: ProfileOption = "laptop",
    results: ResultsOption = RESULTS,
    data: DataOption = RECORDED,
    seeds: SeedsOption = None,
    init: InitOption = None,
    init_large: InitLargeOption = None,
    text: TextOption = None,
    address: AddressOption = None,
    workers: WorkersOption = None,
) -> None:
    """Search an experiment's coefficients with Optuna instead of running its whole grid; resumes from the tables."""
    from orchestrator.cli_work import show_search

    setting = Asked(
        profile=profile, results=results, data=data, seeds=seeds, init=init, init_large=init_large, text=text
    ).setting
    show_search(
        get_experiment(name), setting, Store(results), address, workers,
        trials=trials, batch=batch, sampler=sampler, seed=seed, objectives="each" if each else "mean",
    )  # fmt: skip


def _check_suffix(file: Path, suffix: str, what: str) -> None:
    if file.suffix.lower() != suffix:
        raise UserError(f"{what}: {file} should end in {suffix}")


def _check_tasks(*tasks: str) -> None:
    for task in tasks:
        get_task(task)
    if len(set(tasks)) < len(tasks):
        raise UserError("target and sources must be different tasks: their policies are otherwise the same")


def _weights(alpha: str | None, source: list[str]) -> tuple[float | None, ...]:
    if alpha is None:
        if len(source) == 1:
            raise UserError("give the weights of the source, as in --alpha 0,0.5,1")
        return (None,)
    if len(source) > 1:
        raise UserError("--alpha weighs one source; several take their uniform mean: leave it out")
    weights = numbers(alpha, "--alpha")
    if not weights:
        raise UserError("--alpha names no weight: give some, as in 0,0.5,1")
    if outside := [weight for weight in weights if not 0 <= weight <= 1]:
        raise UserError(f"alpha must lie in [0, 1], {outside[0]:g} given")
    return weights


def _merge(
    at: Setting, target: str, source: list[str], group: str, weight: float | None, seed: int, quality: Quality
) -> Train | Merge:
    experts = [at.expert(task, seed, quality) for task in (target, *source)]
    if weight is None:
        return Merge(sources=tuple(experts), group=group, alpha=None)
    Merge(
        sources=tuple(experts), group=group, alpha=weight
    )  # names a wrong group even at alpha = 0, where nothing is merged
    return merged(experts[0], experts[1], group, weight)


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help=f"One SELECT over {TABLES}.")],
    results: ResultsOption = RESULTS,
    form: Annotated[str, typer.Option("--format", help="table, csv, json or parquet.")] = "table",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write there instead of to the terminal.")
    ] = None,
) -> None:
    """Ask the tables in SQL."""
    from orchestrator.cli_query import FORMS, write_rows

    if form not in FORMS:
        raise unknown("format", form, FORMS)
    if form == "parquet" and output is None:
        raise UserError("Parquet is binary: name a file with --output rows.parquet")
    write_rows(_tables_of(Store(results)).query(sql), form, output)


def _tables_of(store: Store) -> "Tables":
    """Raises UserError where there are none: a mistyped place, most likely."""
    tables = store.open_tables()
    if not store.tables.is_dir():
        raise UserError(f"there are no tables in {store.address} yet: check --results, or run an experiment first")
    return tables


@app.command()
def policies(results: ResultsOption = RESULTS) -> None:
    """The policies there are, with their mean scores."""
    from orchestrator.cli_query import write_rows

    rows = _tables_of(Store(results)).query(
        'SELECT p.policy, p.kind, p.source_tasks, p.quality, p."group", p.alpha, p.method, p.seed, p.steps, '
        "round(avg(s.mean_score), 1) AS score, sum(s.episodes)::BIGINT AS episodes "
        "FROM policies p LEFT JOIN scores s USING (policy) GROUP BY ALL ORDER BY ALL"
    )
    write_rows(rows, "table", None)


@app.command()
def export(
    policy: Annotated[str, typer.Argument(help="Id, or the beginning of one: see `mergedt policies`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, .safetensors.")],
    results: ResultsOption = RESULTS,
) -> None:
    """Write a policy, merged or assembled as its recipe says, to one file of its own."""
    from orchestrator.cli_work import export_policy

    export_policy(policy, Store(results), output)


@app.command()
def convert(
    file: Annotated[
        Path, typer.Argument(help="A checkpoint of the original code: .pt, the whole model or its weights.")
    ],
    task: Annotated[str, typer.Option("--task", help="What it was trained for.")],
    source: Annotated[
        str, typer.Option("--source", help="Its data, for the states' mean and deviation: Minari id, .hdf5 or .pkl.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, .safetensors.")],
    results: ResultsOption = RESULTS,
) -> None:
    """Turn a checkpoint of the original code into a policy; nothing in it is run."""
    from orchestrator.cli_work import convert_original

    convert_original(file, task, source, output, Store(results))


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(help="A policy that `mergedt export` or `convert` wrote.")],
    task: Annotated[list[str] | None, typer.Option("--task", help="Default: all that it has heads for.")] = None,
    episodes: Annotated[int, typer.Option("--episodes", min=1)] = 25,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the first episode's start.")] = 1_000_000,
    target_return: Annotated[
        float | None, typer.Option("--target-return", help="That is asked for; default: the best in the task's data.")
    ] = None,
    precision: Annotated[Precision, typer.Option("--precision", help="Of the matrix products.")] = "float32",
) -> None:
    """Roll out a policy from its file alone."""
    from orchestrator.cli_work import evaluate_file

    evaluate_file(file, task, episodes=episodes, seed=seed, target_return=target_return, precision=precision)


@app.command()
def report(
    names: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT]...", help="By name; default: all.")] = None,
    profile: ProfileOption = "laptop",
    results: ResultsOption = RESULTS,
    data: DataOption = RECORDED,
    seeds: SeedsOption = None,
    init: InitOption = None,
    init_large: InitLargeOption = None,
    text: TextOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder; default: report/ under the results, report-NAME/ for some alone."),
    ] = None,
) -> None:
    """Render figures and tables next to the paper's numbers, as Markdown and PNG."""
    from orchestrator.report import write_report

    asked, chosen = (
        Asked(profile=profile, results=results, data=data, seeds=seeds, init=init, init_large=init_large, text=text),
        experiments_of(names or ["all"]),
    )
    store = Store(results)
    named = [] if chosen == experiments_of(["all"]) else [experiment.name for experiment in chosen]
    folder = output or store.root / "-".join(["report", *named])
    path = write_report(chosen, asked.setting, store, folder, asked.again)
    if output is None:
        store.place.push(folder)
    console.print(str(path), soft_wrap=True, highlight=False)


@app.command()
def compact(results: ResultsOption = RESULTS) -> None:
    """Rewrite the tables as one Parquet file each: for a repository, and to read faster."""
    from orchestrator.declarations import declare_paper

    store = Store(results)
    _tables_of(store)
    with store.lock():
        tables = store.open_tables()
        declare_paper(tables)
        tables.compact()
    console.print(f"tables: {store.place.address_at('tables')}")


@app.command()
def video(
    target: TargetOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The animated WebP to write.")],
    source: Annotated[
        str | None, typer.Option("--source", help="Task merged into it; none: the policy as trained.")
    ] = None,
    group: Group = "attention",
    alpha: Annotated[float, typer.Option("--alpha", min=0.0, max=1.0)] = 0.5,
    quality: QualityOption = "expert",
    profile: ProfileOption = "demo",
    results: ResultsOption = RESULTS,
    data: DataOption = RECORDED,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Training seed of the policies.")] = 0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Environment steps shown.")] = 300,
) -> None:
    """Film a policy, merged or as trained."""
    from orchestrator.cli_work import film

    _check_suffix(output, ".webp", "films are WebP files")
    setting = Asked(profile=profile, results=results, data=data, seeds=str(seed)).setting
    _check_tasks(target, *([source] if source else []))
    policy = (
        _merge(setting, target, [source], group, alpha, seed, quality)
        if source
        else setting.expert(target, seed, quality)
    )
    film(setting.evaluate(policy, target), Store(results), output, steps)
    console.print(output)


@app.command()
def demo(results: ResultsOption = RESULTS, address: AddressOption = None, workers: WorkersOption = None) -> None:
    """Two robots, from offline data to a merged policy, its scores, its figure and its video, in minutes."""
    from orchestrator.cli_work import run_demo

    run_demo(Store(results), address, workers)
