"""Training against a loop written out by hand, exact resume, and what happens when the loss is no number."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dt.behaviour.record import record_chunk
from dt.data.trajectories import Trajectories
from dt.data.windows import Windows
from dt.errors import UserError
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.model.policy import Policy
from dt.tasks import get_task
from dt.training.loop import NotFiniteLossError, TrainingState, learning_rate
from dt.training.loop import run as steps_of
from dt.training.objective import action_loss, train
from dt.training.optimisation import Optimisation

HOPPER = get_task("hopper")
SMALL = Architecture(width=16, layers=2, context=5)
QUICK = Optimisation(steps=12, batch_size=8, learning_rate=1e-3, warmup_steps=4, schedule="cosine", dropout=0.1)


@pytest.fixture(scope="module")
def data() -> Trajectories:
    return record_chunk("hopper", "medium", 0, 0, 2)


def training(
    data: Trajectories, optimisation: Optimisation = QUICK, seed: int = 0, architecture: Architecture = SMALL
) -> TrainingState[Policy]:
    return train({"hopper": data}, architecture, optimisation, seed)


def run(data: Trajectories, optimisation: Optimisation = QUICK, seed: int = 0, resume: Path | None = None) -> Policy:
    *_, last = steps_of(training(data, optimisation, seed), resume=resume, log_every=5)
    return last.result()


def same(a: Policy, b: Policy) -> bool:
    return all(np.array_equal(array, b.arrays()[name]) for name, array in a.arrays().items())


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(data: Trajectories, tmp_path: Path) -> None:
    whole = run(data)
    for state in steps_of(training(data), log_every=5):
        state.save(tmp_path / "state.safetensors")
        torch.rand(7)  # what others do with the process's random numbers does not matter
        if state.step == 5:
            break
    assert same(run(data, resume=tmp_path / "state.safetensors"), whole)
    assert not same(run(data, seed=1), whole)


def test_steps_are_those_of_a_loop_written_by_hand(data: Trajectories) -> None:
    """No dropout, float32: masked mean square, warm-up, clipping at 0.25, AdamW from its formula in float64."""
    optimisation = QUICK.model_copy(update={"dropout": 0.0, "steps": 3, "warmup_steps": 2, "weight_decay": 0.1})
    init, _, sampler = np.random.SeedSequence(0).generate_state(3, np.uint64).tolist()
    with torch.random.fork_rng():
        torch.manual_seed(init)
        model = DecisionTransformer(SMALL, [HOPPER])
    rng, windows = np.random.Generator(np.random.PCG64(sampler)), Windows.of(data, HOPPER, SMALL.context)
    moments = {name: (0.0, 0.0) for name, _ in model.named_parameters()}
    for step, rate in enumerate([0.5e-3, 1e-3, 1e-3]):  # warm-up over 2 updates, then the cosine's first value
        batch = windows.sample(8, rng)
        predicted = model("hopper", batch)
        errors = [(predicted[b, k] - batch.actions[b, k]) ** 2 for b in range(8) for k in range(5) if batch.mask[b, k]]
        model.zero_grad()
        torch.stack(errors).mean().backward()
        norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient = p.grad.double() * min(1.0, 0.25 / (norm + 1e-6))
                first = 0.9 * moments[name][0] + 0.1 * gradient
                second = 0.999 * moments[name][1] + 0.001 * gradient**2
                moments[name] = (first, second)
                update = (first / (1 - 0.9 ** (step + 1))) / (torch.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
                p.copy_(p.double() * (1 - rate * 0.1) - rate * update)
    trained = run(data, optimisation)
    for name, tensor in model.trunk.state_dict().items():
        torch.testing.assert_close(trained.trunk[name], tensor, atol=2e-5, rtol=1e-4)
    for name, tensor in model.heads["hopper"].state_dict().items():
        if name not in ("state_mean", "state_std", "best_return"):
            torch.testing.assert_close(trained.heads["hopper"][name], tensor, atol=2e-5, rtol=1e-4)


def test_the_head_carries_the_statistics_of_its_data(data: Trajectories) -> None:
    head = run(data).heads["hopper"]
    np.testing.assert_allclose(
        head["state_mean"], data.observations.mean(axis=0, dtype=np.float64), rtol=1e-4, atol=1e-5
    )
    assert float(head["best_return"]) == pytest.approx(data.returns.max(), rel=1e-6)


def test_the_time_step_table_may_begin_quietly(data: Trajectories) -> None:
    table = "embed_timestep.weight"
    loud, quiet = (training(data, QUICK.model_copy(update={"timestep_std": std})).result() for std in (None, 0.02))
    assert float(loud.heads["hopper"][table].std()) == pytest.approx(1.0, rel=0.05)
    torch.testing.assert_close(quiet.heads["hopper"][table], 0.02 * loud.heads["hopper"][table])
    assert all(torch.equal(tensor, loud.trunk[name]) for name, tensor in quiet.trunk.items())


def test_learning_rates_follow_the_schedule() -> None:
    paper = Optimisation()
    assert learning_rate(paper, 0) == pytest.approx(1e-8)
    assert learning_rate(paper, 9_999) == learning_rate(paper, 99_999) == 1e-4
    cosine = Optimisation(steps=100, warmup_steps=10, learning_rate=1.0, schedule="cosine")
    assert learning_rate(cosine, 10) == 1.0
    assert learning_rate(cosine, 55) == pytest.approx(0.5)
    assert learning_rate(cosine, 99) < 1e-3


def test_padding_counts_for_nothing_in_the_loss(data: Trajectories) -> None:
    batch = Windows.of(data, HOPPER, 5).sample(64, np.random.default_rng(0))
    predicted = torch.randn(batch.actions.shape)
    expected = ((predicted - batch.actions).numpy().astype(np.float64)[batch.mask.numpy()] ** 2).mean()
    assert float(action_loss(predicted, batch)) == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_no_number_stops_with_a_sentence_and_the_last_checkpoint_stays_good(
    data: Trajectories, tmp_path: Path
) -> None:
    path = tmp_path / "state.safetensors"
    diverging = QUICK.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0})

    def train_and_save() -> None:
        for state in steps_of(training(data, diverging), log_every=1):
            assert math.isfinite(state.metrics["loss"])
            state.save(path)

    with pytest.raises(NotFiniteLossError, match=r"hopper became (nan|inf) at step \d+: lower the learning rate"):
        train_and_save()
    with pytest.raises(NotFiniteLossError):  # the saved state is whole: resuming from it comes to the same end
        list(steps_of(training(data, diverging), resume=path, log_every=1))


def test_a_state_of_another_run_or_a_damaged_one_is_refused(data: Trajectories, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    next(steps_of(training(data), log_every=1)).save(path)
    other = Architecture(width=32, layers=2, context=5)
    with pytest.raises(UserError, match="checkpoint of another architecture"):
        next(steps_of(training(data, architecture=other), resume=path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        next(steps_of(training(data), resume=path))
    with pytest.raises(UserError):
        train({"walker2d": data}, SMALL, QUICK, 0)


def test_a_refused_state_changes_nothing_and_the_last_step_is_the_last(data: Trajectories, tmp_path: Path) -> None:
    path, run = tmp_path / "state.safetensors", training(data)
    run.advance(5)
    run.save(path)
    tensors, header = load_file(path), safe_open(path, framework="pt").metadata()
    gone = next(name for name in tensors if name.startswith("module."))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path, header)
    fresh = training(data)
    with pytest.raises(UserError, match="another version"):
        fresh.load(path)
    for state in (run, fresh):
        state.advance(1_000)
        assert (state.step, state.done) == (QUICK.steps, True)
        state.advance(1)
        assert state.step == QUICK.steps
    assert all(np.array_equal(a, b) for a, b in zip(*(s.result().arrays().values() for s in (run, fresh)), strict=True))


def test_freed_memory_is_kept() -> None:
    """Taken and given back again and again, a large buffer costs no new page. In another process: it is for good."""
    code = """
import resource, torch
from dt.memory import keep_freed_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    if kept == "False":
        pytest.skip("not the GNU C library")
    assert int(faults) < 100  # else ten thousand each time
