"""HarmoDT against its published numbers, a step and a swap written out by hand, and what must never change."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

from dt.data.trajectories import Trajectories
from dt.data.windows import Windows
from dt.errors import UserError
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.model.flat import entries, flattened, unflattened
from dt.model.policy import Policy, load_policy, save_policy
from dt.model.shapes import trunk_shapes
from dt.tasks import get_task
from dt.training import masks
from dt.training.harmodt import HarmonyObjective, swap_count, train_harmodt, worth
from dt.training.harmony import RELEASED, Harmony
from dt.training.loop import TrainingState, initialised
from dt.training.loop import run as steps_of
from dt.training.objective import action_loss, train
from dt.training.optimisation import Optimisation

SMALL = Architecture(width=16, layers=2, context=5)
ENTRIES = entries(masks.masked_shapes(SMALL))
QUICK = Optimisation(steps=12, batch_size=4, learning_rate=1e-3, warmup_steps=2, weight_decay=0.1)
CALM = QUICK.model_copy(update={"dropout": 0.0})
LIVELY = Harmony(interval=3, swapped=0.1, score_batches=2)
LIVELY_RELEASED = RELEASED.model_copy(update={"interval": 3, "swapped": 0.1})
TASKS = ("halfcheetah", "hopper", "walker2d")


def trajectories(name: str) -> Trajectories:
    """Two short episodes of noise."""
    task, rng = get_task(name), np.random.default_rng(len(name))
    return Trajectories(
        observations=rng.normal(size=(40, task.state_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(40, task.action_dim)).astype(np.float32),
        rewards=rng.normal(size=40).astype(np.float32),
        offsets=np.array([0, 15, 40]),
        terminated=np.array([True, False]),
    )


Array = npt.NDArray[np.float64]
DATA = {name: trajectories(name) for name in TASKS}


def training(
    optimisation: Optimisation = QUICK, harmony: Harmony = LIVELY, seed: int = 0, tasks: tuple[str, ...] = TASKS
) -> TrainingState[Policy]:
    return train_harmodt({name: DATA[name] for name in tasks}, SMALL, optimisation, harmony, seed)


def objective_of(state: TrainingState[Policy]) -> HarmonyObjective:
    assert isinstance(state.objective, HarmonyObjective)
    return state.objective


def kept(policy: Policy) -> torch.Tensor:
    shapes = masks.masked_shapes(policy.architecture)
    return torch.stack([flattened(policy.masks[task], shapes) for task in policy.heads])


def same(a: Policy, b: Policy) -> bool:
    return a.arrays().keys() == b.arrays().keys() and all(
        array.tobytes() == b.arrays()[name].tobytes() for name, array in a.arrays().items()
    )


def windows(task: str) -> Windows:
    return Windows.of(DATA[task], get_task(task), SMALL.context)


@pytest.mark.parametrize(
    ("width", "vectors", "densities", "zeros"),
    [
        (128, True, (0.8170, 1.0, 0.7660, 0.7660), 119_014),
        (128, False, (0.8190, 1.0, 0.7679, 0.7679), 117_965),
        (512, True, (0.8185, 1.0, 0.7674, 0.7674), 1_891_635),
    ],
)
def test_densities_are_the_published_ones(width: int, vectors: bool, densities: tuple[float, ...], zeros: int) -> None:
    shapes = trunk_shapes(Architecture(width=width))
    if not vectors:
        shapes = masks.masked_shapes(Architecture(width=width))
    found = masks.erk_densities(shapes, 0.2)
    for module, expected in zip(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), densities, strict=True):
        assert {round(found[f"h.{i}.{module}.weight"], 4) for i in range(3)} == {expected}
    assert all(found[name] == 1 for name, shape in shapes.items() if len(shape) == 1)
    masked = sum(math.prod(shape) * (1 - found[name]) for name, shape in shapes.items())
    assert masked == pytest.approx(zeros, abs=1)


def test_independent_masks_share_entries_as_chance_has_it() -> None:
    shapes = trunk_shapes(Architecture())
    drawn = masks.drawn(shapes, 0.2, 3, seed=0)
    by_name = [unflattened(mask, shapes) for mask in drawn]
    for module, expected in (("mlp.c_fc", [0.013, 0.126, 0.41, 0.45]), ("attn.c_attn", [0.006, 0.082, 0.367, 0.545])):
        users = torch.stack([torch.stack([m[f"h.{i}.{module}.weight"] for i in range(3)]) for m in by_name]).sum(dim=0)
        shares = np.bincount(users.flatten().numpy(), minlength=4) / users.numel()
        np.testing.assert_allclose(shares, expected, atol=0.006)
    assert torch.equal(drawn, masks.drawn(shapes, 0.2, 3, seed=0))
    assert not torch.equal(drawn, masks.drawn(shapes, 0.2, 3, seed=1))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_a_sparsity_that_leaves_nothing_is_refused(sparsity: float) -> None:
    with pytest.raises(UserError, match="choose at least 0"):
        masks.erk_densities({"a": (2, 2)}, sparsity)
    with pytest.raises(ValidationError):
        Harmony(sparsity=sparsity)


def test_the_numbers_of_swaps_are_the_published_ones() -> None:
    def sequence(harmony: Harmony) -> list[int]:
        return [swap_count(harmony, step, 1000, 1000) for step in range(0, 1001, 100)]

    hundred = Harmony(interval=100, swapped=0.5)  # of 1000 entries, in 10 swaps: at most 100 at once
    assert sequence(hundred) == [0, 9, 34, 65, 90, 100, 90, 65, 34, 9, 0]
    assert sequence(hundred.model_copy(update={"schedule": "decay"})) == [100, 97, 90, 79, 65, 50, 34, 20, 9, 2, 0]
    assert sequence(hundred.model_copy(update={"importance": "random"})) == [0] * 11
    assert swap_count(hundred, 501, 1000, 1000) == 0
    peaks = {
        width: swap_count(Harmony(), 50_000, 100_000, entries) for width, entries in ((128, 589_824), (512, 9_437_184))
    }
    assert peaks == {128: 123, 512: 1981}
    release = [swap_count(RELEASED, step, 1_000_000, 4_739_328) for step in range(500, 1_000_001, 500)]
    assert max(release) == 99
    assert sum(release) == pytest.approx(99_000, rel=0.01)


def test_masked_entries_and_other_heads_stay_bit_for_bit_when_a_task_steps() -> None:
    state = training(harmony=Harmony())
    state.advance(4)  # until then all tasks' moments are there, and weight decay always is
    for turn in range(3):
        before = state.result()
        state.advance(1)
        after, task = state.result(), TASKS[(4 + turn) % 3]
        for name, mask in before.masks[task].items():
            assert torch.equal(after.trunk[name][~mask], before.trunk[name][~mask])
            assert (after.trunk[name][mask] != before.trunk[name][mask]).float().mean() > 0.99
            if not mask.all():
                assert before.trunk[name][~mask].all()  # θ itself is dense
        for other in TASKS:
            moved = [
                not torch.equal(after.heads[other][name], before.heads[other][name]) for name in before.heads[other]
            ]
            assert any(moved) == (other == task)


def test_a_task_sees_what_its_policy_alone_sees_and_no_masked_entry() -> None:
    """In the training's own forward pass."""
    state = training(CALM)
    state.advance(4)
    policy = state.result()
    name, masked = "h.0.mlp.c_fc.weight", ~policy.masks["hopper"]["h.0.mlp.c_fc.weight"]
    policy.trunk[name][masked] += 7
    model = DecisionTransformer.from_policy(policy.alone("hopper"))
    batch = windows("hopper").sample(CALM.batch_size, np.random.default_rng(3))
    expected = action_loss(model("hopper", batch), batch)
    objective = objective_of(state)
    assert objective.backward(1, np.random.default_rng(3))["loss"] == expected
    with torch.no_grad():
        objective.module.get_parameter(f"model.trunk.{name}")[masked] += 7
    assert objective.backward(1, np.random.default_rng(3))["loss"] == expected
    with torch.no_grad():
        objective.module.get_parameter(f"model.trunk.{name}")[~masked] += 7
    assert objective.backward(1, np.random.default_rng(3))["loss"] != expected


def dense_gradients(policy: Policy, task: str, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """By plain autograd, at the weights in which masked entries are zeros."""
    model = DecisionTransformer.from_policy(policy.alone(task))
    batch = windows(task).sample(CALM.batch_size, rng)
    action_loss(model(task, batch), batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def scored_gradient(policy: Policy, task: str, rng: np.random.Generator, batches: int, limit: float) -> Array:
    """(E,) the mean over that many batches of the gradient, its norm limited."""
    shapes, total = {f"trunk.{name}": shape for name, shape in masks.masked_shapes(SMALL).items()}, np.zeros(ENTRIES)
    for _ in range(batches):
        gradients = dense_gradients(policy, task, rng)
        scale = min(1.0, limit / norm_of(gradients))
        total += scale * flattened(gradients, shapes).double().numpy()
    return total / batches


@pytest.mark.parametrize("harmony", [LIVELY, RELEASED])
def test_gradients_are_clipped_before_the_mask_or_after_it(harmony: Harmony) -> None:
    optimisation = CALM.model_copy(update={"clip_norm": 0.01})
    state = training(optimisation, harmony)
    policy = state.result()
    expected = dense_gradients(policy, "hopper", np.random.default_rng(3))
    norm = norm_of(expected)
    scale = 0.01 / norm if harmony is RELEASED else 1.0
    assert norm > 0.02
    objective = objective_of(state)
    objective.backward(1, np.random.default_rng(3))
    for name, parameter in objective.module.named_parameters():
        name = name.removeprefix("model.")
        if name.startswith("heads.") and not name.startswith("heads.hopper."):
            assert parameter.grad is None
        else:
            mask = policy.masks["hopper"].get(name.removeprefix("trunk."), torch.tensor(True))
            torch.testing.assert_close(parameter.grad, expected[name] * scale * mask, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("optimisation", "harmony", "limit"),
    [(QUICK, LIVELY, math.inf), (CALM.model_copy(update={"clip_norm": 0.01}), LIVELY_RELEASED, 0.01)],
    ids=["no dropout in scores, no clipping", "clipped as the release has it"],
)
def test_a_swap_is_the_one_computed_by_hand(optimisation: Optimisation, harmony: Harmony, limit: float) -> None:
    """Scores in float64 NumPy, from gradients by plain autograd; compared by score, so that ties do not matter."""
    state = training(optimisation, harmony)
    state.advance(5)
    policy, objective = state.result(), objective_of(state)
    rng = np.random.default_rng(3)
    flat = [scored_gradient(policy, task, rng, harmony.score_batches, limit) for task in TASKS]
    objective.backward(5, np.random.default_rng(4))
    objective.updated(5, np.random.default_rng(3))
    before, after = kept(policy).numpy(), kept(objective.result()).numpy()
    count = int(2 * 0.1 * ENTRIES / (12 / 3) * (1 - math.cos(2 * math.pi * 6 / 12)) / 2)
    assert count == 307
    masked_mean, dense_mean = sum(g * b for g, b in zip(flat, before, strict=True)) / 3, sum(flat) / 3
    for task in range(3):
        given_up, taken_up = before[task] & ~after[task], after[task] & ~before[task]
        assert given_up.sum() == taken_up.sum() == count
        score = 10 * masked_mean * flat[task] + flat[task] ** 2
        promise = dense_mean * flat[task]
        np.testing.assert_allclose(
            np.sort(score[given_up]), np.sort(score[before[task]])[:count], rtol=1e-3, atol=1e-12
        )
        np.testing.assert_allclose(
            np.sort(promise[taken_up]), np.sort(promise[~before[task]])[-count:], rtol=1e-3, atol=1e-12
        )
        assert (promise[taken_up] > 0).any()
    at_odds = [(masked_mean * g < 0)[b].mean() for g, b in zip(flat, before, strict=True)]
    found = objective.diagnostics()
    np.testing.assert_allclose([found[f"negative_agreement/{task}"] for task in TASKS], at_odds, atol=1e-3)
    both, either = (
        [getattr(np, of)(after[a], after[b]).sum() for a, b in ((0, 1), (0, 2), (1, 2))]
        for of in ("logical_and", "logical_or")
    )
    assert found["mask_overlap"] == pytest.approx(np.mean(np.divide(both, either)))
    assert (found["swapped"], found["at_odds"]) == (count, pytest.approx(np.mean(at_odds), abs=1e-3))


def test_a_masked_entry_on_which_all_agree_is_taken_up_and_the_inputs_stay() -> None:
    torch.manual_seed(0)
    gradients, before = torch.randn(3, 50) * 1e-4, torch.rand(3, 50) < 0.8
    gradients[:, 7], before[:, 7] = 1e-3, torch.tensor([False, True, True])
    gradients[:, 9], before[:, 9] = torch.tensor([-1e-4, 1e-3, 1e-3]), True  # the others pull the first task along
    copies = gradients.clone(), before.clone()
    scores = worth(Harmony(), gradients * before, torch.ones(50))
    after = masks.swapped(before, scores, masks.agreement(gradients), 1)
    assert torch.equal(gradients, copies[0])
    assert torch.equal(before, copies[1])
    torch.testing.assert_close(masks.agreement(gradients)[0], gradients.mean(dim=0) * copies[0][0])
    assert after[0, 7]
    assert not after[0, 9]
    assert torch.equal(after.sum(dim=1), before.sum(dim=1))
    by_size = worth(Harmony(importance="magnitude", agreement_weight=0.0), gradients, -torch.arange(50.0))
    assert torch.equal(by_size[2], torch.arange(50.0))


@pytest.mark.parametrize("harmony", [LIVELY, LIVELY_RELEASED])
def test_masks_change_but_never_their_sizes_and_a_resumed_run_is_the_uninterrupted_one(
    harmony: Harmony, tmp_path: Path
) -> None:
    path, first = tmp_path / "state.safetensors", kept(training(harmony=harmony).result())
    sizes = first.sum(dim=1)
    for state in steps_of(training(harmony=harmony), log_every=5):
        assert torch.equal(kept(state.result()).sum(dim=1), sizes)
        if state.step == 5:
            state.save(path)
            torch.rand(7)  # what others do with the process's random numbers does not matter
    whole = state.result()
    assert not torch.equal(kept(whole), first)
    *_, resumed = steps_of(training(harmony=harmony), resume=path, log_every=4)
    assert same(resumed.result(), whole)
    assert objective_of(resumed).diagnostics() == objective_of(state).diagnostics()
    assert resumed.metrics["swapped"] == state.metrics["swapped"] > 0  # k_t is logged
    with safe_open(path, framework="pt") as file:
        older = {name: file.get_tensor(name) for name in file.keys() if not name.endswith(".swapped")}  # noqa: SIM118
        save_file(older, tmp_path / "older", file.metadata())
    with pytest.raises(UserError, match="of another version of mergedt: delete it"):
        training(harmony=harmony).load(tmp_path / "older")
    with pytest.raises(UserError, match="checkpoint of another harmony"):
        training(harmony=Harmony(sparsity=0.3)).load(path)
    save_policy(whole, path)
    assert same(load_policy(path), whole)


def test_random_masks_stay_and_few_masked_entries_limit_the_swaps() -> None:
    def trained(harmony: Harmony) -> tuple[Policy, Policy]:
        state = training(CALM, harmony)
        first = state.result()
        state.advance(6)
        return first, state.result()

    before, after = trained(LIVELY.model_copy(update={"importance": "random"}))
    assert torch.equal(kept(before), kept(after))
    before, after = trained(LIVELY.model_copy(update={"sparsity": 0.01, "swapped": 5.0}))
    assert torch.equal(kept(before).sum(dim=1), kept(after).sum(dim=1))


def test_without_sparsity_it_is_plain_training() -> None:
    """Of one task: `train`, dropout and all. Of three: a loop written by hand."""
    whole = Harmony(sparsity=0.0, interval=3, swapped=0.1)
    alone, plain = training(harmony=whole, tasks=("hopper",)), train({"hopper": DATA["hopper"]}, SMALL, QUICK, 0)
    for state in (alone, plain):
        state.advance(7)
    assert alone.result().masks["hopper"]["h.0.attn.c_attn.weight"].all()
    assert same(alone.result().alone("hopper"), plain.result())
    assert alone.metrics["loss"] == plain.metrics["loss"]

    state = training(CALM, whole)
    state.advance(5)
    model = initialised(0, lambda: DecisionTransformer(SMALL, map(get_task, TASKS)))
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(0).generate_state(3, np.uint64).tolist()[2]))
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True)
    for step in range(5):
        task = TASKS[step % 3]
        batch = windows(task).sample(4, rng)
        optimiser.zero_grad()
        action_loss(model(task, batch), batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimiser.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 2)
        optimiser.step()
    trained = state.result()
    for name, tensor in model.named_parameters():
        part, rest = name.split(".", 1)
        found = trained.trunk[rest] if part == "trunk" else trained.heads[rest.split(".")[0]][rest.split(".", 1)[1]]
        assert torch.equal(found, tensor), name


def test_tasks_vote_on_one_trunk() -> None:
    policy = training().result()
    users = kept(policy).sum(dim=0)
    assert set(users.tolist()) == {0, 1, 2, 3}
    shapes = masks.masked_shapes(SMALL)
    weights = flattened(policy.trunk, shapes)
    for threshold in (1, 2, 3):
        merged = masks.vote(policy, threshold)
        assert merged.plain
        assert merged.heads is policy.heads
        assert torch.equal(flattened(merged.trunk, shapes), weights * (users >= threshold))
        assert all(merged.trunk[name] is policy.trunk[name] for name in policy.trunk if name not in shapes)
    for threshold in (0, 4):
        with pytest.raises(UserError, match="choose 1 to 3"):
            masks.vote(policy, threshold)
    with pytest.raises(UserError, match="HarmoDT trained"):
        masks.vote(policy.alone("hopper"), 1)


def test_statistics_of_masks_are_shares() -> None:
    policy = training().result()
    found = masks.mask_statistics(policy)
    assert len(found) == 3 * 8 + 3
    assert found["density/hopper/h.1.attn.c_proj"] == 1
    cheetah, hopper = (kept(policy)[i].numpy() for i in (0, 1))
    assert found["iou/halfcheetah/hopper"] == pytest.approx((cheetah & hopper).sum() / (cheetah | hopper).sum())
    mask = policy.masks["walker2d"]["h.0.mlp.c_fc.weight"].numpy()
    assert found["density/walker2d/h.0.mlp.c_fc"] == pytest.approx(mask.mean())
