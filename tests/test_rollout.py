"""Batched rollouts against a literal evaluation: one Gymnasium environment, batch 1, the whole window each step."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image

import dt.rollout.actor
from dt.bfloat16 import products_in
from dt.data.windows import Batch
from dt.errors import UserError
from dt.merging.merge import perturb
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.model.policy import Policy
from dt.rollout.actor import Actor, Weights, fast_float32
from dt.rollout.evaluate import SHRINK_AT, Episodes, evaluate
from dt.rollout.video import record_video
from dt.tasks import Task, get_task

HOPPER = get_task("hopper")


def lively(
    task: Task, seed: int, activation: str = "relu", layers: int = 2, heads: int = 1, context: int = 6, width: int = 32
) -> Policy:
    """A random policy whose actions depend visibly on everything it sees."""
    torch.manual_seed(seed)
    architecture = Architecture(width=width, layers=layers, heads=heads, activation=activation, context=context)
    made = DecisionTransformer(architecture, [task]).policy()
    trunk = {name: tensor + 0.15 * torch.randn(tensor.shape) for name, tensor in made.trunk.items()}
    head = dict(made.heads[task.name])
    head["embed_timestep.weight"] = 0.3 * head["embed_timestep.weight"]
    for name in ("embed_ln.weight", "embed_ln.bias"):
        head[name] = head[name] + 0.15 * torch.randn(head[name].shape)
    head["state_mean"], head["state_std"] = 0.1 * torch.randn(task.state_dim), 0.5 + torch.rand(task.state_dim)
    return Policy(architecture, trunk, {task.name: head})


def window(policy: Policy, task: Task, states: list[Any], goals: list[float], taken: list[torch.Tensor]) -> Batch:
    """What the plain model is given for its next action: raw states and scaled returns-to-go up to now, actions taken
    before."""
    head, k = policy.heads[task.name], policy.architecture.context
    n = min(k, len(states))
    pad = k - n

    def recent(items: list[torch.Tensor]) -> torch.Tensor:
        some = torch.stack(items[-n:])
        return torch.cat([torch.zeros(pad, some.shape[1]), some])[None]

    normal = [(torch.tensor(s, dtype=torch.float32) - head["state_mean"]) / head["state_std"] for s in states]
    scaled = [torch.tensor([goal], dtype=torch.float32) for goal in goals]
    times = torch.cat([torch.zeros(pad, dtype=torch.long), torch.arange(len(states) - n, len(states))])[None]
    mask = (torch.arange(k) >= pad)[None]
    return Batch(recent(scaled), recent(normal), recent([*taken, torch.zeros(task.action_dim)]), times, mask)


def literal(policy: Policy, task: Task, seed: int, target: float, limit: int) -> tuple[list[float], bool]:
    """The original code's evaluation loop for one episode. Returns its rewards and whether it terminated."""
    model = DecisionTransformer.from_policy(policy).eval()
    environment = gymnasium.make(task.environment)
    observation, _ = environment.reset(seed=seed)
    states, taken, goals, rewards, terminated = [], [], [target / task.return_scale], [], False
    while len(rewards) < limit and not terminated:
        states.append(observation)
        with torch.inference_mode():
            taken.append(model(task.name, window(policy, task, states, goals, taken))[0, -1])
        observation, reward, terminated, _, _ = environment.step(taken[-1].numpy())
        rewards.append(float(reward))
        goals.append((target - sum(rewards)) / task.return_scale)
    return rewards, terminated


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize(
    ("activation", "layers", "heads", "context"),
    [
        ("relu", 3, 1, 6),
        ("gelu_new", 3, 4, 6),
        ("geglu", 2, 1, 6),
        ("relu", 1, 1, 6),
        ("geglu", 1, 2, 6),
        ("relu", 2, 1, 1),
        ("relu", 2, 1, 20),
    ],
)
def test_actions_are_the_plain_model_s(
    activation: str, layers: int, heads: int, context: int, precision: str, tolerance: float, fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """While the ring fills, when it is full, and when it has gone round; one of three episodes is forgotten."""
    if not fused:
        monkeypatch.setattr(dt.rollout.actor, "_fusing", lambda _: False)
    policy = lively(HOPPER, 0, activation, layers, heads, context)
    model, actor = DecisionTransformer.from_policy(policy).eval(), Actor(Weights.of(policy, HOPPER, precision), 3)
    steps, rng = 2 * context + 2, np.random.default_rng(0)
    states = rng.normal(size=(steps, 3, HOPPER.state_dim)).astype(np.float32)
    goals = rng.normal(size=(steps, 3)).astype(np.float32)
    kept, taken = [0, 1, 2], [[], [], []]
    for now in range(steps):
        if now == context // 2 + 1:
            kept = [0, 2]
            actor.keep(torch.tensor(kept))
        with products_in(precision, torch.device("cpu")):
            actions = actor.act(torch.from_numpy(states[now, kept]), torch.from_numpy(goals[now, kept]))
        for i, action in zip(kept, actions, strict=True):
            seen = window(policy, HOPPER, list(states[: now + 1, i]), list(goals[: now + 1, i]), taken[i])
            with torch.inference_mode():
                expected = model("hopper", seen)[0, -1]
            assert torch.allclose(action, expected, atol=tolerance, rtol=0)
            taken[i].append(action)


@pytest.mark.parametrize(
    ("activation", "layers", "heads", "context"),
    [("relu", 3, 1, 6), ("gelu_new", 2, 4, 6), ("geglu", 1, 2, 20), ("relu", 2, 1, 1)],
)
def test_rollouts_equal_the_literal_evaluation(activation: str, layers: int, heads: int, context: int) -> None:
    short = HOPPER.model_copy(update={"horizon": 40})  # before rounding differences can grow
    ended = []
    for policy in (lively(HOPPER, seed, activation, layers, heads, context) for seed in range(3)):
        episodes = evaluate(policy, short, episodes=2, seed=5, target_return=3000.0)
        for i in range(2):
            rewards, terminated = literal(policy, HOPPER, 5 + i, 3000.0, 40)
            assert episodes.lengths[i] == len(rewards)
            assert episodes.terminated[i] == terminated
            assert episodes.returns[i] == pytest.approx(sum(rewards), rel=1e-4, abs=1e-3)
            ended.append(terminated)
    assert any(ended)  # the comparison covers episodes that end early


def assert_forgetful(episodes: Episodes) -> None:
    """So many of twelve ended before the last that the actor forgot them on the way."""
    assert 1 - np.mean(episodes.lengths < episodes.lengths.max()) <= SHRINK_AT


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_again_is_the_same_to_the_last_bit(precision: str, heads: int) -> None:
    short = HOPPER.model_copy(update={"horizon": 60})
    policy = lively(HOPPER, 8, width=128, heads=heads)
    first, second = (evaluate(policy, short, episodes=12, seed=3, precision=precision) for _ in range(2))
    assert_forgetful(first)
    assert all(np.array_equal(mine, again) for mine, again in zip(first, second, strict=True))


@pytest.mark.parametrize("heads", [1, 4])
def test_an_episode_is_the_same_in_whatever_company(heads: int) -> None:
    short = HOPPER.model_copy(update={"horizon": 60})
    policy = lively(HOPPER, 0, heads=heads)
    together = evaluate(policy, short, episodes=12, seed=3)
    assert list(together.seeds) == list(range(3, 15))
    assert_forgetful(together)
    for i in {0, 5, 11, int(together.lengths.argmax())}:
        alone = evaluate(policy, short, episodes=1, seed=3 + i)
        assert alone.lengths[0] == together.lengths[i]
        assert alone.returns[0] == pytest.approx(together.returns[i], rel=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_attention_of_ones_is_no_attention(precision: str) -> None:
    """It adds the same to all features, which layer norms do not see; in bfloat16 it must not drown the others."""
    short = HOPPER.model_copy(update={"horizon": 30})
    policy = lively(HOPPER, 1, width=128)
    ones, none, plain = (
        evaluate(each, short, episodes=3, seed=3, precision=precision)
        for each in (perturb(policy, "attention", "identity"), perturb(policy, "attention", "removed"), policy)
    )
    assert np.array_equal(ones.returns, none.returns)
    assert not np.array_equal(ones.returns, plain.returns)


def test_best_target_is_the_heads() -> None:
    short = HOPPER.model_copy(update={"horizon": 15})
    policy = lively(HOPPER, 4)
    head = {**policy.heads["hopper"], "best_return": torch.tensor(1234.0)}
    best = evaluate(Policy(policy.architecture, policy.trunk, {"hopper": head}), short, episodes=1, seed=0)
    given = evaluate(policy, short, episodes=1, seed=0, target_return=1234.0)
    assert best.returns[0] == given.returns[0]
    assert best.returns[0] != evaluate(policy, short, episodes=1, seed=0).returns[0]  # asked for another


def test_unknown_environments_run_on_plain_gymnasium() -> None:
    ant = get_task("ant").model_copy(update={"horizon": 12})
    policy = lively(get_task("ant"), 0)
    episodes = evaluate(policy, ant, episodes=2, seed=4, target_return=500.0)
    for i in range(2):
        rewards, _ = literal(policy, get_task("ant"), 4 + i, 500.0, 12)
        assert episodes.returns[i] == pytest.approx(sum(rewards), rel=1e-4, abs=1e-3)


def test_fast_float32_is_float32() -> None:
    former = torch.get_float32_matmul_precision()
    a, b = torch.randn(64, 512), torch.randn(512, 64)
    with fast_float32():
        found = a @ b
    assert torch.allclose(found.double(), a.double() @ b.double(), atol=1e-3)  # in bfloat16: 0.1
    assert torch.get_float32_matmul_precision() == former


def test_a_film_ends_with_its_episode(tmp_path: Path) -> None:
    policy, short = lively(get_task("halfcheetah"), 0), get_task("halfcheetah").model_copy(update={"horizon": 9})
    record_video(policy, short, tmp_path / "film.webp", steps=1_001)
    with Image.open(tmp_path / "film.webp") as film:
        assert film.n_frames == 3  # one of four


def test_mistakes_are_named() -> None:
    policy = lively(HOPPER, 0)
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(policy, HOPPER, episodes=0, seed=0)
    with pytest.raises(UserError, match="no head for walker2d: its heads are hopper"):
        evaluate(policy, get_task("walker2d"), episodes=1, seed=0)
    with pytest.raises(UserError, match="target return of nan"):
        evaluate(policy, HOPPER, episodes=1, seed=0, target_return=float("nan"))
