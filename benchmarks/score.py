"""`python -m benchmarks.score [TASK...]`: seconds from recorded episodes to a policy that does what they do.

Ours is the `laptop` profile's training, the field's way trains as `literal.py` does, by the paper's hyper-parameters;
each goes on until it is there, and evaluates once in its own way. So the ratio is that of two whole ways of working: of
their hyper-parameters as much as of their code. Both on one core, and timed in turn all along, so that what else the
machine does slows both alike. Whether they are there is looked up by our rollouts, which is not counted: ours every 50
steps, the literal way every 500. It takes hours: stop it at will, the same command goes on. With `--at-most 30` the
literal way is given up on when it has taken 30 times as long and is not there; its row says so.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
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
from dt.tasks import Task, get_task
from dt.training.objective import train
from orchestrator.profiles import Profile, get_profile

SHARE, EPISODES, SEED = 0.9, 25, 0
LITERAL_STEPS, OUR_STEPS = 500, 50  # between two looks, and timed in turn
QUALITY = "expert"
ROBOTS = ("halfcheetah", "hopper", "walker2d")  # whose behaviour policies ship with the project
NOT_REACHED = ", which the literal way has not reached"


def main(
    tasks: Annotated[list[str] | None, typer.Argument(help=f"Default: {', '.join(ROBOTS)}.")] = None,
    profile: Annotated[str, typer.Option(help="Whose training is ours.")] = "laptop",
    results: Annotated[Path, typer.Option(help="Folder of the datasets and of the rows.")] = Path("results"),
    state: Annotated[Path, typer.Option(help="Folder in which the literal training goes on.")] = Path(".benchmarks"),
    at_most: Annotated[
        float, typer.Option(min=1, help="Times as long as ours that the literal way is given.")
    ] = math.inf,
) -> None:
    """Time ours and the field's way to 90 % of the data's mean return."""
    torch.set_num_threads(1)
    keep_freed_memory()
    console, budget = Console(), get_profile(profile)
    for name in tasks or ROBOTS:
        task, started = get_task(name), datetime.now(UTC)
        record(task.name, QUALITY, budget.recorded_episodes, 0, results / "datasets")
        data = load_recorded(task.name, QUALITY, budget.recorded_episodes, 0, results / "datasets")
        goal = SHARE * float(data.returns.mean())
        policy, steps = our_training(task, data, budget, goal)
        console.print(f"{task.name}: ours takes {steps:,} steps")
        literal, seconds, reached = literal_training(task, data, budget, goal, state, console, at_most * steps)
        began = time.perf_counter()
        _returns(policy, task, budget)
        between = time.perf_counter()
        evaluation = LiteralEvaluation(task, literal.policy())
        mean = sum(evaluation.episode(SEED + i) for i in range(EPISODES)) / EPISODES
        console.print(f"{task.name}: a return of {mean:.0f} after {literal.steps:,} steps, by its own evaluation")
        whole = seconds * (steps, literal.steps) + (between - began, time.perf_counter() - between)
        name = f"{SHARE:.0%} of the data's return, {task.name}" + ("" if reached else NOT_REACHED)
        found = [Measurement(name, "policy", *whole.tolist())]
        console.print(table_of(found))
        commit(found, started, 1, results)


def our_training(task: Task, data: Trajectories, budget: Profile, goal: float) -> tuple[Policy, int]:
    """Our policy as soon as it is good enough, and the steps it took. Exits when it never is: no time to quote then."""
    training = train({task.name: data}, budget.architecture, budget.optimisation, seed=0)
    while not training.done:
        training.advance(OUR_STEPS)
        policy = training.result()
        if _returns(policy, task, budget) >= goal:
            return policy, training.step
    raise SystemExit(f"{task.name}: ours does not return {goal:.0f} in {training.step:,} steps")


def literal_training(
    task: Task, data: Trajectories, budget: Profile, goal: float, folder: Path, console: Console, limit: float
) -> tuple[LiteralTraining, NDArray[np.float64], bool]:
    """What came of it, the seconds that a step of ours and one of its own took on the way, and whether it reached the
    goal. limit: it may take as long as so many steps of ours."""
    endless = budget.optimisation.model_copy(update={"steps": 10**6})
    ours = train({task.name: data}, budget.architecture, endless, seed=0)
    ours.advance(OUR_STEPS)  # the first steps are slow
    training, seconds = LiteralTraining(task, data, budget.architecture), np.zeros(2)
    made_of = f"{data.content_hash}{budget.architecture.model_dump_json()}{platform.node()}"
    saved = folder / f"{task.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.pt"
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        seconds += state["step_seconds"]
        training.load(state)
    each = seconds * LITERAL_STEPS / max(1, training.steps)

    def there() -> bool:
        return training.steps > 0 and _returns(training.policy(), task, budget) >= goal

    while not (reached := there()) and training.steps * each[1] / limit <= each[0]:
        began = time.perf_counter()
        ours.advance(OUR_STEPS)
        between = time.perf_counter()
        for _ in range(LITERAL_STEPS):
            training.step()
        seconds += ((between - began) / OUR_STEPS, (time.perf_counter() - between) / LITERAL_STEPS)
        torch.save(training.state() | {"step_seconds": seconds.tolist()}, buffer := BytesIO())
        write_atomically(saved, buffer.getvalue())
        each = seconds * LITERAL_STEPS / training.steps
        ours_each, literal_each = 1000 * each
        console.print(f"{task.name}: {training.steps:,} steps of {literal_each:.0f} ms (ours: {ours_each:.0f} ms)")
    return training, each, reached


def _returns(policy: Policy, task: Task, budget: Profile) -> float:
    episodes = evaluate(policy, task, episodes=EPISODES, seed=SEED, precision=budget.evaluation_precision)
    return float(episodes.returns.mean())


if __name__ == "__main__":
    typer.run(main)
