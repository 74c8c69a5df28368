"""`python -m benchmarks.score [TASK...]`: wall-clock from recorded episodes to a policy that does what they do.

Ours is the `laptop` profile's training and one evaluation of 25 episodes. The field's way trains as `literal.py` does,
by the paper's hyper-parameters, until it gets as far, and evaluates once in its own way. So the ratio is that of two
whole ways of working: of their hyper-parameters as much as of their code. Both on one core. Whether the literal policy
is there is looked up every 500 steps by our rollouts, which is not counted. It takes hours: stop it at will, the same
command goes on.
"""

from __future__ import annotations

import hashlib
import platform
import time
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.__main__ import commit, table_of
from benchmarks.literal import LiteralEvaluation, LiteralTraining
from benchmarks.measure import Measurement
from dt.behaviour.record import record
from dt.data.sources import load_recorded
from dt.data.trajectories import Trajectories
from dt.files import write_atomically
from dt.memory import keep_freed_memory
from dt.model.policy import Policy
from dt.rollout.evaluate import evaluate
from dt.tasks import TASKS, Task, get_task
from dt.training.objective import train
from orchestrator.profiles import Profile, get_profile

SHARE, EPISODES, SEED, LOOK_EVERY = 0.9, 25, 0, 500
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
    console, budget = Console(), get_profile(profile)
    for name in tasks or TASKS:
        task, started = get_task(name), datetime.now(UTC)
        record(task.name, QUALITY, budget.recorded_episodes, 0, results / "datasets")
        data = load_recorded(task.name, QUALITY, budget.recorded_episodes, 0, results / "datasets")
        goal = SHARE * float(data.returns.mean())
        ours = our_seconds(task, data, budget, goal)
        console.print(f"{task.name}: ours took {ours:.0f} s; now the field's way, to a return of {goal:.0f}")
        literal = literal_seconds(task, data, budget, goal, state, console)
        found = [Measurement(f"{SHARE:.0%} of the data's return, {task.name}", "policy", ours, literal)]
        console.print(table_of(found))
        commit(found, started, 1, results)


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
    task: Task, data: Trajectories, budget: Profile, goal: float, folder: Path, console: Console
) -> float:
    """Of all training steps and of one evaluation in its own way."""
    training, seconds = LiteralTraining(task, data, budget.architecture), 0.0
    made_of = f"{data.content_hash}{budget.architecture.model_dump_json()}{platform.node()}"
    saved = folder / f"{task.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.pt"
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        seconds = state["seconds"]
        training.load(state)
    while not training.steps or _returns(training.policy(), task, budget) < goal:
        began = time.perf_counter()
        for _ in range(LOOK_EVERY):
            training.step()
        seconds += time.perf_counter() - began
        torch.save(training.state() | {"seconds": seconds}, buffer := BytesIO())
        write_atomically(saved, buffer.getvalue())
        console.print(f"{task.name}: {training.steps:,} steps in {seconds / 60:.0f} min")
    began = time.perf_counter()
    evaluation = LiteralEvaluation(task, training.policy())
    mean = sum(evaluation.episode(SEED + i) for i in range(EPISODES)) / EPISODES
    console.print(f"{task.name}: a return of {mean:.0f} after {training.steps:,} steps, by its own evaluation")
    return seconds + time.perf_counter() - began


def _returns(policy: Policy, task: Task, budget: Profile) -> float:
    (episodes,) = evaluate([policy], task, episodes=EPISODES, seed=SEED, precision=budget.evaluation_precision)
    return float(episodes.returns.mean())


if __name__ == "__main__":
    typer.run(main)
