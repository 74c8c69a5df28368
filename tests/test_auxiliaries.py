"""The auxiliary losses against their formulas in float64, and a run with all three that resumes bit for bit."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dt.data.trajectories import Trajectories
from dt.data.windows import Batch, Windows
from dt.errors import UserError
from dt.language.blocks import TextBlocks
from dt.language.model import LanguageModel, LanguageNetwork
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer, Prediction
from dt.model.policy import Policy
from dt.tasks import get_task
from dt.training.auxiliaries import CosineToClusters, CoTraining, DistanceToStart
from dt.training.loop import TrainingState, run
from dt.training.objective import Auxiliary, fine_tune, train
from dt.training.optimisation import Optimisation

TASKS = [get_task("hopper"), get_task("walker2d")]
SMALL = Architecture(width=16, layers=2, heads=2, activation="gelu_new", context=4)
VOCABULARY = 40
QUICK = Optimisation(steps=6, batch_size=4, learning_rate=1e-3, warmup_steps=2, dropout=0.1)
TEXT = np.random.default_rng(3).integers(VOCABULARY, size=200, dtype=np.int32)


def language_model() -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return LanguageNetwork(SMALL, VOCABULARY, 30).model("").with_clusters(5)


def trajectories(task_dims: tuple[int, int], seed: int = 0) -> Trajectories:
    draw, (state_dim, action_dim) = np.random.default_rng(seed), task_dims
    return Trajectories(
        observations=draw.normal(size=(40, state_dim)).astype(np.float32),
        actions=draw.uniform(-0.9, 0.9, size=(40, action_dim)).astype(np.float32),
        rewards=draw.uniform(size=40).astype(np.float32),
        offsets=np.array([0, 3, 19, 40]),
        terminated=np.array([True, False, True]),
    )


DATA = {task.name: trajectories((task.state_dim, task.action_dim)) for task in TASKS}


def seen(model: DecisionTransformer) -> dict[str, tuple[Batch, Prediction]]:
    batches = {
        task.name: Windows.of(DATA[task.name], task, SMALL.context).sample(6, np.random.default_rng(1))
        for task in TASKS
    }
    return {task: (batch, model.predict(task, batch)) for task, batch in batches.items()}


@pytest.fixture
def model() -> DecisionTransformer:
    torch.manual_seed(5)
    return DecisionTransformer(SMALL, TASKS).eval()


def test_cosine_is_the_mean_over_real_tokens_of_the_nearest_centre(model: DecisionTransformer) -> None:
    centres = 3 * torch.randn(5, 16)
    parts = seen(model)
    cosines = []
    for batch, prediction in parts.values():
        assert not batch.mask.all()
        for b, k in batch.mask.nonzero().tolist():
            for token in prediction.embedded[b, k].detach().double():
                cosines.append(max(float(token @ c / (token.norm() * c.norm())) for c in centres.double()))
    loss = CosineToClusters(centres).loss(model, parts, np.random.default_rng(0))
    assert loss.item() == pytest.approx(-np.mean(cosines), rel=1e-5)
    with pytest.raises(UserError, match="no clusters"):
        CosineToClusters(torch.zeros(0, 16))


def test_the_weight_of_the_cosine_falls_as_in_the_original() -> None:
    """Facts §4.3 give the values for T = 5000."""
    loss = CosineToClusters(torch.ones(1, 4), weight=1.0, decay=5000)
    for step, expected in [(1, 0.9933), (2500, 0.5), (5000, 0.0067), (7500, 4.5e-5)]:
        assert loss.weight(step) == pytest.approx(expected, rel=1e-2)
    assert loss.weight(9_999) < 1e-6
    assert loss.weight(10_000) == loss.weight(100_000) == 0
    assert CosineToClusters(torch.ones(1, 4), decay=None).weight(10**6) == 0.1


def test_cotraining_is_gpt2_with_the_policys_trunk_and_time_steps(model: DecisionTransformer) -> None:
    language, rng, twin = language_model(), np.random.default_rng(2), np.random.default_rng(2)
    loss = CoTraining(language, TEXT, sequences=3, block=8)
    value = loss.loss(model, seen(model), rng)
    head = model.head(["hopper", "walker2d"][twin.integers(2)])
    batch = TextBlocks(TEXT, 8).sample(3, 1000, twin)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=1000, n_embd=16, n_layer=2, n_head=2)
    oracle = GPT2LMHeadModel(config).eval()
    tables = {"wte.weight": language.token_embedding, "wpe.weight": head.embed_timestep.weight}
    oracle.transformer.load_state_dict({**model.trunk.state_dict(), **tables})
    logits = oracle(batch.tokens, position_ids=batch.positions).logits.detach().double().numpy()
    chosen = np.take_along_axis(logits, batch.following.numpy()[..., None], axis=-1)[..., 0]
    expected = (np.log(np.exp(logits).sum(axis=-1)) - chosen).mean()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[0] for name in moved} == {"trunk", "heads"}
    assert [name for name in moved if name.startswith("heads")] == [
        name for name, p in model.named_parameters() if p is head.embed_timestep.weight
    ]
    assert loss.token_embedding.grad is not None
    with pytest.raises(UserError, match="encode it with the model's own tokenizer"):
        CoTraining(language, TEXT + VOCABULARY, block=8)
    with pytest.raises(UserError, match="take more text"):
        CoTraining(language, TEXT, block=200)


def test_cotraining_may_fade_out() -> None:
    faded = CoTraining(language_model(), TEXT, weight=2.0, block=8, decay_steps=100)
    assert [faded.weight(step) for step in (0, 25, 100, 500)] == [2.0, 1.5, 0.0, 0.0]
    assert CoTraining(language_model(), TEXT, block=8).weight(500) == 1.0


@pytest.mark.parametrize("formula", ["sum of norms", "norm"])
def test_distance_is_the_norm_of_what_the_blocks_moved(model: DecisionTransformer, formula: str) -> None:
    start = {name: tensor.clone() for name, tensor in model.trunk.state_dict().items()}
    distance = DistanceToStart(SMALL, start, formula=formula)
    blocks = [p for name, p in model.trunk.named_parameters() if name.startswith("h.")]
    assert distance.weight(3) == 1e-4
    still = distance.loss(model, {}, np.random.default_rng(0))
    still.backward()
    assert still.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in blocks)  # zeros, not NaN
    with torch.no_grad():
        for p in model.trunk.parameters():
            p += 0.1 * torch.randn(p.shape)
    moved = {name: (tensor - start[name]).double() for name, tensor in model.trunk.state_dict().items()}
    norms = [float(delta.norm()) for name, delta in moved.items() if name.startswith("h.")]
    expected = sum(norms) if formula == "sum of norms" else math.sqrt(sum(norm**2 for norm in norms))
    loss = distance.loss(model, {}, np.random.default_rng(0))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    length = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in blocks if p.grad is not None))
    assert length == pytest.approx(math.sqrt(len(blocks)) if formula == "sum of norms" else 1.0, rel=1e-4)
    assert all(p.grad is None for p in model.trunk.ln_f.parameters())


def training(tasks: Sequence[str], text: int = 1) -> TrainingState[Policy]:
    language = language_model()
    auxiliaries: list[Auxiliary] = [
        CosineToClusters(language.clusters, decay=2),
        CoTraining(language, TEXT, weight=float(text), block=8),
        DistanceToStart(SMALL, language.trunk),
    ]
    data = {task: DATA[task] for task in tasks}
    return train(
        data, SMALL, QUICK, 0, trunk=language.trunk, timesteps=language.timestep_table(), auxiliaries=auxiliaries
    )


@pytest.mark.parametrize("tasks", [["hopper"], ["hopper", "walker2d"]])
def test_a_run_with_all_three_resumes_bit_for_bit(tasks: list[str], tmp_path: Path) -> None:
    path, columns = tmp_path / "state.safetensors", set[str]()
    for whole in run(training(tasks), log_every=3):
        columns |= set(whole.metrics)
        if whole.step == 3:
            whole.save(path)
    assert {"cosine", "language", "distance"} <= columns
    *_, resumed = run(training(tasks), resume=path, log_every=3)
    expected = whole.result().arrays()
    assert all(np.array_equal(array, expected[name]) for name, array in resumed.result().arrays().items())
    *_, without = run(training(tasks, text=0), log_every=3)
    assert not np.array_equal(without.result().arrays()["trunk.h.0.ln_1.weight"], expected["trunk.h.0.ln_1.weight"])


def test_fine_tuning_takes_them_too() -> None:
    """The distance to where it starts, as for Table V: the heavier it weighs, the less the trunk moves."""
    start, moved = train(DATA, SMALL, QUICK, 0).result().alone("hopper"), []
    for strength in (0.0, 1e3):
        distance = [DistanceToStart(SMALL, start.trunk, strength, "norm")] if strength else []
        state = fine_tune(start, {"hopper": DATA["hopper"]}, QUICK, 1, auxiliaries=distance)
        state.advance(QUICK.steps)
        assert ("distance" in state.metrics) == (strength > 0)
        trunk = state.result().trunk
        moved.append(sum(float((trunk[n] - t).square().sum()) for n, t in start.trunk.items() if n.startswith("h.")))
    assert moved[1] < 0.9 * moved[0]


def test_time_steps_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match=r"time steps to begin with are \(1, 16\): hopper wants 1000 of 16"):
        train({"hopper": DATA["hopper"]}, SMALL, QUICK, 0, timesteps=torch.zeros(1, 16))


class Quiet(torch.nn.Module):
    """A loss of a user's own: how large the predicted actions are. What it learns is saved with the run."""

    name = "quiet"

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.offset, self._strength = torch.nn.Parameter(torch.zeros(())), strength

    def weight(self, step: int) -> float:
        return self._strength if step < 4 else 0.0

    def loss(
        self, model: DecisionTransformer, seen: Mapping[str, tuple[Batch, Prediction]], rng: np.random.Generator
    ) -> torch.Tensor:
        del model, rng
        return sum((predicted.actions - self.offset).square().mean() for _, predicted in seen.values())


def test_a_loss_of_ones_own_takes_part_and_its_run_resumes(tmp_path: Path) -> None:
    def begun(*losses: Auxiliary) -> TrainingState[Policy]:
        return train(DATA, SMALL, QUICK, seed=0, auxiliaries=losses)

    def weights(state: TrainingState[Policy]) -> torch.Tensor:
        return torch.cat([tensor.flatten() for tensor in state.result().trunk.values()])

    whole, plain = begun(Quiet(5.0)), begun()
    whole.advance(3)
    whole.save(tmp_path / "state")
    assert whole.metrics["quiet"] > 0
    resumed = begun(Quiet(5.0))
    resumed.load(tmp_path / "state")
    for state, steps in ((whole, 3), (resumed, 3), (plain, 6)):
        state.advance(steps)
    assert torch.equal(weights(whole), weights(resumed))
    assert not torch.equal(weights(whole), weights(plain))


def test_training_begins_at_the_language_model() -> None:
    language, policy = language_model(), training(["hopper"]).result()
    assert all(torch.equal(tensor, language.trunk[name]) for name, tensor in policy.trunk.items())
    assert torch.equal(policy.heads["hopper"]["embed_timestep.weight"], language.timestep_table())
