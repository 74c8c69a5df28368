"""What is measured. Every case is a function of how many rounds to take, and gives rows of the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.literal import LiteralEvaluation, LiteralTraining
from benchmarks.measure import Measurement, interleaved, product_rate
from dt.behaviour.record import record_chunk
from dt.data.trajectories import Trajectories
from dt.merging.merge import merge, merge_many
from dt.model.architecture import BASE
from dt.model.policy import Policy
from dt.model.shapes import block_parameters
from dt.rollout.actor import DTYPES
from dt.rollout.evaluate import evaluate
from dt.tasks import get_task
from dt.training.loop import TrainingState
from dt.training.objective import train
from dt.training.optimisation import Optimisation
from dt.training.together import Crowd
from orchestrator.plan import make_plan
from orchestrator.recipes import Evaluate, Merge, Recording, Train
from orchestrator.store import Store
from orchestrator.tables import Tables

TASK = get_task("halfcheetah")  # never ends early, so every round is the same work
WINDOWS, TOKENS = 64, 60
PARAMETERS = block_parameters(BASE)
# Multiplications that a token costs in a block, over the width squared: to ask, to write what was found, and the MLP's.
ASK, WRITE, MLP = 1, 1, 8
# Forward and twice as much backward; of the last block a third of the tokens is read.
STEP_FLOP = 6 * WINDOWS * TOKENS * (BASE.layers - 1 + 1 / 3) * (ASK + WRITE + MLP) * BASE.width**2
# At a full context, nothing computed twice: the first block has asked and written before, the last has one token.
ACTION_FLOP = 2 * TOKENS * ((BASE.layers - 1) * (ASK + WRITE + MLP) - ASK - WRITE) * BASE.width**2
SWEPT = 48  # evaluations


def training(rounds: int) -> Iterator[Measurement]:
    """One update: sampling, forward, backward, clipping, optimiser."""
    data = record_chunk(TASK.name, "expert", 0, 0, 4)
    literal = LiteralTraining(TASK, data, BASE)
    for precision in DTYPES:
        optimisation = Optimisation(steps=10**6, dropout=0.0, precision=precision)
        state = train({TASK.name: data}, BASE, optimisation, seed=0)
        seconds = interleaved({"ours": partial(state.advance, 1), "literal": literal.step}, rounds)
        floor = STEP_FLOP / product_rate(precision, WINDOWS * TOKENS)
        yield Measurement(f"training step, {precision}", "step", seconds["ours"], seconds["literal"], floor)


def evaluation(rounds: int) -> Iterator[Measurement]:
    """Actions of a policy in 25 environments, and in a hundred, against one at a time."""
    policy = _untrained(record_chunk(TASK.name, "expert", 0, 0, 2), 0)
    short = TASK.model_copy(update={"horizon": 60})
    literal = LiteralEvaluation(TASK, policy)
    for precision in DTYPES:
        for episodes in (25, 100):
            ours = partial(evaluate, policy, short, episodes=episodes, seed=0, precision=precision)
            seconds = interleaved({"ours": ours, "literal": partial(literal.episode, 0, short.horizon)}, rounds)
            mine, theirs = seconds["ours"] / (episodes * short.horizon), seconds["literal"] / short.horizon
            floor = ACTION_FLOP / product_rate(precision, episodes * TOKENS)
            yield Measurement(f"action, {precision}, {episodes} episodes", "action", mine, theirs, floor)


def merging(rounds: int) -> Iterator[Measurement]:
    """A merged candidate of a pair, one by one and all in one product, against the original's loop over state dicts."""
    data = record_chunk(TASK.name, "expert", 0, 0, 1)
    pair = [_untrained(data, seed) for seed in (0, 1)]
    alphas = [step / 100 for step in range(1, 100)]

    def one_by_one() -> None:
        for alpha in alphas:
            merge(pair, "attention+mlp", alpha)

    def at_once() -> None:
        merge_many(pair, "attention+mlp", [[1 - alpha, alpha] for alpha in alphas])

    def literal() -> None:
        first, second = (dict(policy.trunk) for policy in pair)
        for alpha in alphas:
            merged = {name: tensor.clone() for name, tensor in first.items()}
            for name in merged:
                if "attn" in name or "mlp" in name:
                    merged[name] = (1 - alpha) * first[name] + alpha * second[name]

    seconds = interleaved({"one by one": one_by_one, "at once": at_once, "literal": literal}, rounds)
    source = torch.zeros(25_000_000)
    target = source.clone()  # touched once, so that what is timed is copying and not the kernel's giving of pages
    began = time.perf_counter()
    target.copy_(source)
    a_byte = (time.perf_counter() - began) / (2 * 4 * source.numel())
    # one by one two are read and one written; at once both stay in the cache
    for name, moved in (("one by one", 3 * 4 * PARAMETERS), ("at once", 4 * PARAMETERS)):
        each, literal_each = seconds[name] / len(alphas), seconds["literal"] / len(alphas)
        yield Measurement(f"merge of a pair, {name}", "candidate", each, literal_each, moved * a_byte)


def together(rounds: int) -> Iterator[Measurement]:
    """A step of each of eight policies in one process, against one policy after the other."""
    data = record_chunk(TASK.name, "expert", 0, 0, 4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for precision in DTYPES:
        optimisation = Optimisation(steps=10**6, batch_size=16, dropout=0.0, precision=precision)
        crowd, others = (
            [train({TASK.name: data}, BASE, optimisation, seed, device=device) for seed in range(8)] for _ in range(2)
        )

        def one_by_one(runs: Sequence[TrainingState[Policy]] = others) -> None:
            for state in runs:
                state.advance(4)

        work: dict[str, Callable[[], object]] = {
            "together": partial(Crowd(crowd).advance, 4),
            "one by one": one_by_one,
        }
        seconds = {name: found / (4 * len(crowd)) for name, found in interleaved(work, rounds).items()}
        for name, each in seconds.items():
            yield Measurement(f"8 policies {name} on {device}, {precision}", "step", each)


def planning(rounds: int) -> Iterator[Measurement]:
    """A recipe in a plan of many."""
    count = 20_000
    experts = [Train(dataset=Recording(task=name, quality="expert", episodes=9)) for name in ("hopper", "walker2d")]

    def plan() -> None:
        asked = [
            Evaluate(
                policy=Merge(sources=tuple(experts), group="mlp", alpha=i / count), task="hopper", episodes=1, seed=0
            )
            for i in range(count)
        ]
        with TemporaryDirectory() as folder:
            make_plan(asked, Store(Path(folder)), Tables(Path(folder, "tables")))

    yield Measurement("planning", "recipe", interleaved({"ours": plan}, max(1, rounds // 3))["ours"] / count)


def orchestration(rounds: int) -> Iterator[Measurement]:
    """A sweep of merges through Tune, pool and commits, on one worker and on two; its floor is what the rollouts took.

    On two the literal way is one worker, so that "× faster" says how it scales. Of the size of a small experiment, for
    Tune and the workers take some seconds to start; so it takes minutes, and one round where others take nine.
    """
    from benchmarks.scale import Curve
    from orchestrator.progress import Phase
    from orchestrator.session import connect
    from orchestrator.sweeps import sweep

    data = record_chunk(TASK.name, "expert", 0, 0, 1)
    experts = [Train(dataset=Recording(task=TASK.name, quality="expert", episodes=1), seed=seed) for seed in (0, 1)]
    policies = [_untrained(data, expert.seed) for expert in experts]
    asked = [
        Evaluate(
            policy=Merge(sources=tuple(experts), group="mlp", alpha=i / SWEPT), task=TASK.name, episodes=25, seed=0,
            precision="bfloat16",
        )
        for i in range(SWEPT)
    ]  # fmt: skip

    def swept(evaluations: Sequence[Evaluate], workers: int) -> tuple[float, float]:
        """Seconds of the sweep, and of its rollouts added up; an evaluation."""
        with TemporaryDirectory() as folder:
            store, tables = Store(folder), Tables(Path(folder, "tables"))
            for expert, policy in zip(experts, policies, strict=True):
                store.save(expert, policy)
            began = time.perf_counter()
            unseen = Phase(len(evaluations), Curve(len(evaluations)))
            failures = sweep(evaluations, store, tables, workers=workers, phase=unseen)
            seconds = time.perf_counter() - began
            (row,) = tables.query("SELECT sum(seconds) AS seconds FROM runs").to_pylist()
        assert not failures
        return seconds / len(evaluations), row["seconds"] / len(evaluations)

    with connect("local", cpus=2):
        swept(asked[:2], 2)
        found = [(*swept(asked, 1), *swept(asked, 2)) for _ in range(max(1, rounds // 9))]
    one, rollouts_of_one, two, rollouts_of_two = map(median, zip(*found, strict=True))
    yield Measurement(f"{SWEPT} evaluations on 1 worker", "evaluation", one, None, rollouts_of_one)
    yield Measurement(f"{SWEPT} evaluations on 2 workers", "evaluation", two, one, rollouts_of_two / 2)


def _untrained(data: Trajectories, seed: int) -> Policy:
    return train({TASK.name: data}, BASE, Optimisation(), seed).result()


CASES: Mapping[str, Callable[[int], Iterator[Measurement]]] = {
    "training": training,
    "evaluation": evaluation,
    "together": together,
    "merging": merging,
    "planning": planning,
    "orchestration": orchestration,
}
