"""Several tasks at once: joint training, fine-tuning of one, Merge-Freeze-Finetune from merge to a single file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dt.data.windows import Windows
from dt.errors import UserError
from dt.merging.groups import parameters_of
from dt.merging.merge import assemble, merge
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.model.policy import STATISTICS, Policy, load_policy, save_policy
from dt.model.size import size_of
from dt.tasks import get_task
from dt.training.loop import TrainingState, run
from dt.training.objective import fine_tune, train
from dt.training.optimisation import Optimisation
from tests.toy import noise

TASKS = ("hopper", "halfcheetah", "walker2d")
SMALL = Architecture(width=16, layers=2, context=5)
QUICK = Optimisation(steps=4, batch_size=8, learning_rate=1e-3, warmup_steps=0, dropout=0.1)


DATA = {task: noise(task) for task in TASKS}


def last(state: TrainingState[Policy], resume: Path | None = None) -> Policy:
    *_, end = run(state, resume=resume, log_every=2)
    return end.result()


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def same(a: Policy, b: Policy) -> bool:
    return {name: array.tobytes() for name, array in a.arrays().items()} == {
        name: array.tobytes() for name, array in b.arrays().items()
    }


def moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.fixture(scope="module")
def joint() -> Policy:
    return last(train(DATA, SMALL, QUICK, 0))


def test_all_heads_of_a_joint_policy_train(joint: Policy) -> None:
    """In the original the heads of all tasks but the last stay at their initialisation."""
    start = train(DATA, SMALL, QUICK, 0).result()
    assert moved(start.trunk, joint.trunk) == set(joint.trunk)
    for task in TASKS:
        head = joint.heads[task]
        assert moved(start.heads[task], head) == set(head) - set(STATISTICS)
        np.testing.assert_array_equal(head["state_mean"], DATA[task].state_mean)
        assert float(head["best_return"]) == pytest.approx(DATA[task].returns.max())


def test_joint_steps_are_those_of_a_loop_by_hand_on_the_sum_of_losses() -> None:
    plain = QUICK.model_copy(update={"dropout": 0.0, "steps": 3})
    state = train(DATA, SMALL, plain, 0)
    model = DecisionTransformer.from_policy(state.result())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    rng = np.random.Generator(np.random.PCG64(int(np.random.SeedSequence(0).generate_state(3, np.uint64)[2])))
    windows = {task: Windows.of(data, get_task(task), SMALL.context) for task, data in DATA.items()}
    for _ in range(3):
        losses = []
        for task in TASKS:  # one batch of each, in this order
            batch = windows[task].sample(8, rng)
            losses.append(((model(task, batch) - batch.actions)[batch.mask] ** 2).mean())
        whole = losses[0] + losses[1] + losses[2]
        optimiser.zero_grad()
        whole.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimiser.step()
        state.advance(1)
        for task, loss in zip(TASKS, losses, strict=True):
            assert state.metrics[f"loss_{task}"] == pytest.approx(loss.item(), rel=1e-4)
        assert state.metrics["loss"] == pytest.approx(whole.item(), rel=1e-4)
    expected = model.policy().arrays()
    for name, array in state.result().arrays().items():
        np.testing.assert_allclose(array, expected[name], atol=2e-5, rtol=1e-4)


def test_a_resumed_joint_run_is_the_uninterrupted_one_bit_for_bit(joint: Policy, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    next(run(train(DATA, SMALL, QUICK, 0), log_every=2)).save(path)
    assert same(last(train(DATA, SMALL, QUICK, 0), resume=path), joint)
    fewer = {task: DATA[task] for task in TASKS[:2]}
    with pytest.raises(UserError, match="checkpoint of another tasks"):
        last(train(fewer, SMALL, QUICK, 0), resume=path)


def test_fine_tuning_changes_its_tasks_and_what_is_not_frozen(joint: Policy) -> None:
    before = {name: array.copy() for name, array in joint.arrays().items()}
    shared = {f"trunk.{name}" for name in parameters_of("attention+mlp", SMALL)}
    frozen = shared | {"heads.hopper.embed_timestep.weight"}
    tuned = last(fine_tune(joint, {"hopper": noise("hopper", seed=1)}, QUICK, 1, frozen=frozen))
    assert all(np.array_equal(array, before[name]) for name, array in joint.arrays().items())
    assert bits(tuned.heads["halfcheetah"]) == bits(joint.heads["halfcheetah"])
    assert bits(tuned.heads["walker2d"]) == bits(joint.heads["walker2d"])
    assert {f"trunk.{name}" for name in moved(joint.trunk, tuned.trunk)} == {
        f"trunk.{name}" for name in joint.trunk
    } - shared
    stays = {"state_mean", "state_std", "embed_timestep.weight"}
    assert moved(joint.heads["hopper"], tuned.heads["hopper"]) == set(joint.heads["hopper"]) - stays
    assert float(tuned.heads["hopper"]["best_return"]) == pytest.approx(noise("hopper", seed=1).returns.max())


def test_a_resumed_fine_tuning_is_the_uninterrupted_one_bit_for_bit(joint: Policy, tmp_path: Path) -> None:
    def tuning() -> TrainingState[Policy]:
        return fine_tune(joint, {"hopper": DATA["hopper"]}, QUICK, 1, frozen={"trunk.ln_f.weight"})

    next(run(tuning(), log_every=2)).save(tmp_path / "state.safetensors")
    assert same(last(tuning(), resume=tmp_path / "state.safetensors"), last(tuning()))


def test_merge_freeze_finetune_gives_one_policy_that_is_each_of_its_parts(joint: Policy, tmp_path: Path) -> None:
    """§III-B: merge, freeze what was merged, fine-tune each on its own, keep what is shared once."""
    pair, shared = TASKS[:2], parameters_of("attention+mlp", SMALL)
    parts = {
        "hopper": joint.alone("hopper"),
        "halfcheetah": last(train({"halfcheetah": DATA["halfcheetah"]}, SMALL, QUICK, 3)),
    }
    tuned = {}
    for task in pair:
        merged = merge([parts[task], *(parts[other] for other in pair if other != task)], "attention+mlp")
        frozen = {f"trunk.{name}" for name in shared}
        tuned[task] = last(fine_tune(merged, {task: DATA[task]}, QUICK, 4, frozen=frozen))
    both = assemble(tuned, "attention+mlp")
    path = tmp_path / "both.safetensors"
    save_policy(both, path)
    read = load_policy(path)
    for made in (both, read, Policy.from_arrays(both.arrays(), SMALL)):
        assert same(made, both)
        for task in pair:
            assert same(made.alone(task), tuned[task])
        assert set(made.trunk) == set(shared)
        assert not any(set(made.specific[task]) & set(shared) for task in pair)
    norms = 4 * SMALL.layers * SMALL.width  # of one trunk's blocks: weight and bias of ln_1 and ln_2
    assert size_of(both).specific == 2 * (norms + 2 * SMALL.width)  # with ln_f
    assert size_of(both).transformer == pytest.approx(1 + norms / (size_of(tuned["hopper"]).shared - 2 * SMALL.width))
    with pytest.raises(UserError, match="is not the same in all policies"):
        assemble(tuned, "trunk")


def test_experts_of_a_joint_policy_merge_into_one_again(joint: Policy) -> None:
    """Table V: experts tuned from one policy with ln_f and time steps frozen; their mean serves all tasks."""
    experts = {}
    for task in TASKS:
        frozen = {"trunk.ln_f.weight", "trunk.ln_f.bias", f"heads.{task}.embed_timestep.weight"}
        experts[task] = last(fine_tune(joint, {task: DATA[task]}, QUICK, 5, frozen=frozen))
    merged = {
        task: merge([experts[task], *(experts[other] for other in TASKS if other != task)], "trunk") for task in TASKS
    }
    one = assemble(merged, "trunk")
    assert one.plain
    assert size_of(one).transformer == 1
    assert bits({n: one.trunk[n] for n in ("ln_f.weight", "ln_f.bias")}) == bits(
        {n: joint.trunk[n] for n in ("ln_f.weight", "ln_f.bias")}
    )
    for task in TASKS:
        assert bits(one.heads[task]) == bits(experts[task].heads[task])
        mean = np.mean([experts[other].trunk["h.0.attn.c_attn.weight"].double().numpy() for other in TASKS], axis=0)
        np.testing.assert_allclose(one.trunk["h.0.attn.c_attn.weight"], mean, rtol=1e-6, atol=1e-7)


def test_mistakes_are_named(joint: Policy) -> None:
    apart = Policy(SMALL, {}, {"hopper": joint.heads["hopper"]}, {"hopper": joint.trunk})
    hopper: dict[str, Any] = {"hopper": DATA["hopper"]}
    everything = [*(f"trunk.{n}" for n in joint.trunk), *(f"heads.hopper.{n}" for n in joint.heads["hopper"])]
    parameters = [name for name in everything if name.rsplit(".", 1)[-1] not in STATISTICS]
    for call, sentence in [
        (lambda: fine_tune(joint.alone("walker2d"), hopper, QUICK, 0), r"no head for hopper: its heads are walker2d"),
        (lambda: fine_tune(joint, {}, QUICK, 0), r"at least one task"),
        (lambda: train({}, SMALL, QUICK, 0), r"at least one task"),
        (lambda: fine_tune(joint, {"hopper": noise("walker2d")}, QUICK, 0), r"hopper"),
        (lambda: fine_tune(joint, hopper, QUICK, 0, frozen={"h.0.ln_1.weight"}), r"cannot freeze 'h.0.ln_1.weight'"),
        (lambda: fine_tune(joint, hopper, QUICK, 0, frozen=parameters), r"nothing is left to fine-tune"),
        (lambda: fine_tune(apart, hopper, QUICK, 0), r"take one task"),
    ]:
        with pytest.raises(UserError, match=sentence):
            call()
