"""`mergedt data …` and `mergedt behaviour …`: the offline data and the policies that record it."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table as RichTable

from dt.errors import UserError
from dt.tasks import get_task
from orchestrator.cli_options import RESULTS, AddressOption, ResultsOption, console, log
from orchestrator.recipes import Quality, Recording
from orchestrator.store import Store

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Record, list and describe offline datasets.")
behaviour = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The policies that record offline data.")

TaskOption = Annotated[str, typer.Option("--task", help="halfcheetah, hopper, walker2d, …")]
QualityOption = Annotated[Quality, typer.Option("--quality")]
EpisodesOption = Annotated[int, typer.Option("--episodes", help="Episodes of each behaviour policy.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1)]


@data.command()
def record(
    task: TaskOption,
    quality: QualityOption,
    episodes: EpisodesOption,
    seed: SeedOption = 0,
    results: ResultsOption = RESULTS,
    address: AddressOption = None,
) -> None:
    """Record a Minari dataset from the shipped behaviour policies, in parallel; the same whatever the parallelism."""
    from orchestrator.cli_work import compute

    if episodes < 1:
        raise UserError(f"a dataset needs at least one episode, --episodes {episodes} given")
    recording = Recording(task=task, quality=quality, episodes=episodes, seed=seed)
    store = Store(results)
    compute([recording], store, address, workers=None)
    _show_description(_describe_recording(recording, store))


@data.command("list")
def list_(results: ResultsOption = RESULTS) -> None:
    """The recordings there are."""
    from dt.data.description import describe, list_recordings
    from dt.data.sources import load_recorded

    store, damaged = Store(results), list[str]()
    root = store.datasets
    store.place.fetch(root)
    table = RichTable("task", "quality", "episodes", "seed", "steps", "mean return", "score", "content")
    for entry in list_recordings(root):
        which = (entry.task, entry.quality, str(entry.episodes), str(entry.seed), f"{entry.steps:,}")
        try:
            loaded = load_recorded(entry.task, entry.quality, entry.episodes, entry.seed, root)
        except UserError as error:
            table.add_row(*which, "–", "–", "damaged")
            damaged.append(str(error))
            continue
        found = describe(loaded, get_task(entry.task))
        table.add_row(*which, f"{found.return_mean:.1f}", f"{found.score:.1f}", entry.content_hash[:12])
    table.caption = f"under {root}; more: mergedt data describe"
    console.print(table)
    for sentence in damaged:
        log.print(sentence, soft_wrap=True, highlight=False)


@data.command()
def describe(
    task: TaskOption,
    quality: Annotated[Quality | None, typer.Option("--quality", help="Of a recording made here.")] = None,
    episodes: Annotated[
        int | None, typer.Option("--episodes", min=1, help="Of a recording made here; default: the longest.")
    ] = None,
    seed: SeedOption = 0,
    source: Annotated[str | None, typer.Option("--source", help="A Minari id, or a .hdf5 or .pkl file.")] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Sizes, return quantiles, score and content hash of a dataset: of a recording, or of others' with --source."""
    store = Store(results)
    if (source is None) == (quality is None):
        raise UserError("say which dataset: --quality and --episodes of a recording, or --source of one made elsewhere")
    if source is not None:
        if episodes is not None:
            raise UserError("--episodes is of a recording made here: leave it out, all of --source is described")
        from dt.data.description import describe as describe_trajectories
        from dt.data.sources import load_imported

        _show_description(describe_trajectories(load_imported(source, task, store.datasets), get_task(task)))
    elif quality is not None:
        count = episodes or _longest(get_task(task).name, quality, seed, store)
        _show_description(_describe_recording(Recording(task=task, quality=quality, episodes=count, seed=seed), store))


def _longest(task: str, quality: Quality, seed: int, store: Store) -> int:
    """The episodes of the longest recording of that kind. Raises UserError when there is none."""
    from dt.behaviour.record import parts_of
    from dt.data.description import list_recordings

    store.place.fetch_named(store.datasets, ["metadata.json"])
    found = [entry for entry in list_recordings(store.datasets) if (entry.task, entry.seed) == (task, seed)]
    lengths = [{entry.episodes for entry in found if entry.quality == part} for part in parts_of(quality)]
    if common := set.intersection(*lengths):
        return max(common)
    raise UserError(
        f"there is no {quality} recording of {task} with seed {seed} in {store.datasets}: make one with `mergedt data "
        f"record --task {task} --quality {quality} --episodes 200 --seed {seed}`, or see `mergedt data list`"
    )


def _describe_recording(recording: Recording, store: Store) -> object:
    from dt.data.description import describe as describe_trajectories
    from orchestrator.making import load_dataset

    return describe_trajectories(load_dataset(recording, store), get_task(recording.task))


def _show_description(description: object) -> None:
    table = RichTable(show_header=False)
    for field in fields(description):  # type: ignore[arg-type]
        value = getattr(description, field.name)
        table.add_row(field.name.replace("_", " "), f"{value:,.1f}" if isinstance(value, float) else str(value))
    console.print(table)


@behaviour.command()
def train(
    task: TaskOption,
    medium_return: Annotated[float, typer.Option("--medium-return", help="The return that `medium` should have.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the two policies.")],
    algorithm: Annotated[Literal["SAC", "TQC"], typer.Option("--algorithm")] = "SAC",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Environment steps.")] = 1_000_000,
    seed: SeedOption = 0,
) -> None:
    """Train medium and expert behaviour policies for an environment (needs the extra `behaviour`)."""
    from dt.behaviour.train import Settings, show_progress, train_behaviour_policies

    settings = Settings(algorithm=algorithm, steps=steps, seed=seed)
    train_behaviour_policies(get_task(task), medium_return, output, settings, report=show_progress)
    console.print(
        f"to ship them: copy what is in {output} to dt/behaviour/; a new environment needs a task in dt/tasks.py, too",
        soft_wrap=True,
        highlight=False,
    )


@behaviour.command("list")
def list_policies() -> None:
    """The behaviour policies that ship with the project."""
    from dt.behaviour.policy import load_behaviour_policy, shipped_policies

    table = RichTable("task", "quality", "algorithm", "steps", "return", "score")
    for task, quality in sorted(shipped_policies()):
        found = load_behaviour_policy(task, quality).provenance
        scored = found["evaluation"]["stochastic"]
        steps = f"{found['environment_steps']:,}"
        table.add_row(
            task, quality, found["algorithm"], steps, f"{scored['mean_return']:.0f}", f"{scored['score']:.1f}"
        )
    console.print(table)
