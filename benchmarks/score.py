"""`python -m benchmarks.score [TASK...]`: wall-clock from recorded episodes to a policy that does what they do.

Ours is the `laptop` profile's training and its evaluation. The field's way trains as `literal.py` does until it gets as
far, which takes hours: stop it at will, the same command goes on. Both on one core, 25 episodes from the same starts.
The literal way is looked at for nothing, by our rollouts, every thousand steps; its own evaluation counts once.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import torch
import typer
from rich.console import Console

from benchmarks.__main__ import table_of
from benchmarks.literal import LiteralEvaluation, LiteralTraining
from benchmarks.measure import Measurement
from dt.behaviour.record import is_recorded, record
from dt.data.sources import load_recorded
from dt.data.trajectories import Trajectories
from dt.files import write_atomically
from dt.memory import keep_freed_memory
from dt.model.policy import Policy
from dt.rollout.evaluate import evaluate
from dt.tasks import TASKS, Task, get_task
from dt.training.objective import train
from orchestrator.profiles import Profile, get_profile
from orchestrator.rows import machine
from orchestrator.tables import SCHEMAS, Tables

SHARE, EPISODES, SEED, LOOK_EVERY = 0.9, 25, 0, 1_000
QUALITY = "expert"


def main(
    tasks: Annotated[list[str] | None, typer.Argument(help="Default: all three.")] = None,
    profile: Annotated[str, typer.Option(help="Whose training is ours.")] = "laptop",
    results: Annotated[Path, typer.Option(help="Folder of the datasets and of the rows.")] = Path("results"),
    state: Annotated[Path, typer.Option(help="Folder in which the literal training goes on.")] = Path(".benchmarks"),
) -> None:
    """Time ours and the field's way to 90 % of the data's mean return."""
    torch.set_num_threads(1)
    keep_freed_memory()
    console, budget, started = Console(), get_profile(profile), datetime.now(UTC)
    found = []
    for task in map(get_task, tasks or TASKS):
        if not is_recorded(task.name, QUALITY, budget.recorded_episodes, 0, results / "datasets"):
            record(task.name, QUALITY, budget.recorded_episodes, 0, results / "datasets")
        data = load_recorded(task.name, QUALITY, budget.recorded_episodes, 0, results / "datasets")
        goal = SHARE * float(data.returns.mean())
        ours = our_seconds(task, data, budget, goal)
        console.print(f"{task.name}: ours took {ours:.0f} s; now the field's way, to a return of {goal:.0f}")
        literal = literal_seconds(task, data, budget, goal, state / f"{task.name}.pt", console)
        found.append(Measurement(f"{SHARE:.0%} of the data's return, {task.name}", "policy", ours, literal))
    console.print(table_of(found))
    run = f"{started:%Y%m%dT%H%M%S}-{os.getpid()}"
    rows = [
        {
            "run": run, "started": started, "rounds": 1, "name": each.name, "unit": each.unit, "seconds": each.ours,
            "literal_seconds": each.literal, "floor_seconds": each.floor, **machine(),
        }
        for each in found
    ]  # fmt: skip
    Tables(results / "tables").append("benchmarks", run, pa.Table.from_pylist(rows, SCHEMAS["benchmarks"]))


def our_seconds(task: Task, data: Trajectories, budget: Profile, goal: float) -> float:
    """Of training and evaluation. Exits when the policy is not good enough: there is no time to quote then."""
    began = time.perf_counter()
    training = train({task.name: data}, budget.architecture, budget.optimisation, seed=0)
    training.advance(budget.optimisation.steps)
    returns = _returns(training.result(), task, budget)
    if returns < goal:
        raise SystemExit(f"{task.name}: ours returns {returns:.0f}, less than {goal:.0f}")
    return time.perf_counter() - began


def literal_seconds(
    task: Task, data: Trajectories, budget: Profile, goal: float, saved: Path, console: Console
) -> float:
    """Of all training steps and of one evaluation in its own way."""
    training, seconds = LiteralTraining(task, data, budget.architecture), 0.0
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        seconds = state["seconds"]
        training.load(state)
    while True:
        if training.steps and _returns(training.policy(), task, budget) >= goal:
            began = time.perf_counter()
            evaluation = LiteralEvaluation(task, training.model, data)
            mean = sum(evaluation.episode(SEED + i) for i in range(EPISODES)) / EPISODES
            if mean >= goal:
                return seconds + time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(LOOK_EVERY):
            training.step()
        seconds += time.perf_counter() - began
        torch.save(training.state() | {"seconds": seconds}, buffer := BytesIO())
        write_atomically(saved, buffer.getvalue())
        console.print(f"{task.name}: {training.steps:,} steps in {seconds / 60:.0f} min")


def _returns(policy: Policy, task: Task, budget: Profile) -> float:
    (episodes,) = evaluate([policy], task, episodes=EPISODES, seed=SEED, precision=budget.evaluation_precision)
    return float(episodes.returns.mean())


if __name__ == "__main__":
    typer.run(main)
