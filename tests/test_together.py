"""Runs advanced together against the same runs alone."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dt.errors import UserError
from dt.model.architecture import Architecture
from dt.model.policy import STATISTICS, Policy
from dt.training.loop import NotFiniteLossError, TrainingState
from dt.training.objective import fine_tune, train
from dt.training.optimisation import Optimisation
from dt.training.together import Crowd
from tests.toy import noise

SMALL = Architecture(width=16, layers=2, context=5)
DRY = Optimisation(
    steps=30, batch_size=8, learning_rate=1e-3, warmup_steps=4, schedule="cosine", weight_decay=0.1, dropout=0.0
)
WET = DRY.model_copy(update={"dropout": 0.2})
PAIR = (("halfcheetah", 0), ("walker2d", 5))  # of one shape
TRIO = (*PAIR, ("halfcheetah", 7))


def runs(
    optimisation: Optimisation = DRY, which: Sequence[tuple[str, int]] = TRIO, architecture: Architecture = SMALL
) -> list[TrainingState[Policy]]:
    return [train({task: noise(task)}, architecture, optimisation, seed) for task, seed in which]


def assert_close(a: Policy, b: Policy) -> None:
    for name, array in a.arrays().items():
        torch.testing.assert_close(torch.from_numpy(array), torch.from_numpy(b.arrays()[name]), atol=1e-5, rtol=1e-4)


def same(a: Policy, b: Policy) -> bool:
    return all((array == b.arrays()[name]).all() for name, array in a.arrays().items())


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "geglu"])
def test_together_is_what_each_is_alone(activation: str) -> None:
    """Without dropout: same windows, losses, clipping, schedule, AdamW; in two calls, and alone between."""
    architecture = Architecture.model_validate({**SMALL.model_dump(), "activation": activation})
    crowd, alone = runs(architecture=architecture), runs(architecture=architecture)
    Crowd(crowd).advance(6)
    for state in crowd:
        state.advance(2)
    Crowd(crowd).advance(2)
    for ours, theirs in zip(crowd, alone, strict=True):
        theirs.advance(8)
        theirs.advance(2)
        assert_close(ours.result(), theirs.result())
        for name in ("step", "loss", "gradient_norm", "learning_rate"):
            assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-4)
    assert not same(crowd[0].result(), crowd[2].result())


def test_what_is_frozen_stays_and_other_heads_are_left_alone() -> None:
    """Fine-tuning of a joint policy on one task with its attention frozen, two seeds together."""
    joint = train({task: noise(task) for task, _ in PAIR}, SMALL, DRY, 0).result()
    frozen = [f"trunk.{name}" for name in joint.trunk if ".attn." in name]

    def tuning(seed: int) -> TrainingState[Policy]:
        return fine_tune(joint, {"walker2d": noise("walker2d")}, DRY, seed, frozen=frozen)

    crowd = [tuning(seed) for seed in (0, 1)]
    Crowd(crowd).advance(4)
    for seed, state in enumerate(crowd):
        alone = tuning(seed)
        alone.advance(4)
        assert_close(state.result(), alone.result())
        assert all(torch.equal(state.result().trunk[name], joint.trunk[name]) for name in joint.trunk if "attn" in name)
        head = state.result().heads["halfcheetah"]
        assert all(torch.equal(head[name], tensor) for name, tensor in joint.heads["halfcheetah"].items())


def test_a_resumed_crowd_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole, begun, resumed = runs(WET), runs(WET), runs(WET)
    for _ in range(2):
        Crowd(whole).advance(5)
    Crowd(begun).advance(5)
    for index, (state, again) in enumerate(zip(begun, resumed, strict=True)):
        state.save(tmp_path / f"{index}.safetensors")
        again.load(tmp_path / f"{index}.safetensors")
    torch.rand(7)  # what others do with the process's random numbers does not matter
    Crowd(resumed).advance(5)
    assert all(same(a.result(), b.result()) for a, b in zip(whole, resumed, strict=True))


def test_dropout_differs_between_policies() -> None:
    """Twins, but for dropout, part."""
    twins = [runs(WET)[0] for _ in range(2)]
    Crowd(twins).advance(3)
    assert not same(twins[0].result(), twins[1].result())
    apart = runs(WET)
    Crowd(apart).advance(3)
    assert not torch.equal(apart[0].random[0], apart[1].random[0])  # each goes on with masks of its own
    again = runs(WET)  # of the same parameters, but drawing other masks
    again[1].random = [torch.Generator().manual_seed(5).get_state()]
    Crowd(again).advance(3)
    assert not same(again[0].result(), apart[0].result())
    dry = [runs()[0] for _ in range(2)]
    Crowd(dry).advance(3)
    assert_close(dry[0].result(), dry[1].result())


def test_bfloat16_learns_what_float32_learns() -> None:
    fast, exact = runs(DRY.model_copy(update={"precision": "bfloat16"})), runs()
    for crowd in (fast, exact):
        Crowd(crowd).advance(20)
    for a, b in zip(fast, exact, strict=True):
        assert a.metrics["loss"] != b.metrics["loss"]
        assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=0.02)


def test_a_loss_that_is_no_number_changes_no_run() -> None:
    crowd = runs()
    Crowd(crowd).advance(2)
    with torch.no_grad():
        for parameter in crowd[1].objective.module.parameters():
            parameter.fill_(float("nan"))
    before = [state.result() for state in crowd]
    with pytest.raises(
        NotFiniteLossError, match=r"the loss of run 1 \(walker2d\) became no number between steps 3 and 5: lower"
    ):
        Crowd(crowd).advance(3)
    assert same(crowd[0].result(), before[0])
    assert [state.step for state in crowd] == [2, 2, 2]
    crowd, alone = [crowd[0], crowd[2]], runs(which=TRIO[:1])[0]
    Crowd(crowd).advance(3)  # their samplers, too, are where they were
    alone.advance(5)
    assert_close(crowd[0].result(), alone.result())


def test_nobody_goes_beyond_the_last_step() -> None:
    states = runs(which=PAIR)
    crowd = Crowd(states)
    while not crowd.done:
        crowd.advance(20)
    crowd.advance(20)
    assert [state.step for state in states] == [30, 30]
    assert states[0].metrics["learning_rate"] > 0


def _head_frozen(task: str) -> TrainingState[Policy]:
    policy = train({task: noise(task)}, SMALL, DRY, 0).result()
    head = [f"heads.{task}.{name}" for name in policy.heads[task] if name not in STATISTICS]
    return fine_tune(policy, {task: noise(task)}, DRY, 0, frozen=head)


def test_runs_that_do_not_fit_are_refused() -> None:
    ahead = runs()[0]
    ahead.advance(1)
    wide = runs(architecture=Architecture(width=32, layers=2, context=5))[0]
    hopper = train({"hopper": noise("hopper")}, SMALL, DRY, 0)
    joint = train({task: noise(task) for task, _ in PAIR}, SMALL, DRY, 0)
    for others, sentence in (
        ([ahead], "runs of different step"),
        ([wide], "runs of different architecture"),
        ([hopper], "runs of different trained parameters"),
        (runs(WET), "runs of different optimisation"),
        ([joint], "halfcheetah and walker2d: only one task's action error"),
    ):
        with pytest.raises(UserError, match=sentence):
            Crowd([*runs(which=PAIR), *others]).advance(1)
    tuned = [_head_frozen(task) for task in ("hopper", "walker2d")]  # what is trained has the same shapes
    with pytest.raises(UserError, match="runs of different frozen parameters"):
        Crowd(tuned)
    with pytest.raises(UserError, match="the same run twice"):
        Crowd([ahead, ahead])
    with pytest.raises(UserError, match="no runs"):
        Crowd([])
