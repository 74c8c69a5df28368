"""Batched rollouts against a literal evaluation: one Gymnasium environment, batch 1, the whole window each step."""

import gymnasium
import numpy as np
import pytest
import torch

from dt.data.windows import Batch
from dt.errors import UserError
from dt.merging.merge import perturb
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.model.policy import Policy
from dt.rollout.evaluate import evaluate
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
    head["state_mean"], head["state_std"] = 0.1 * torch.randn(task.state_dim), 0.5 + torch.rand(task.state_dim)
    return Policy(architecture, trunk, {task.name: head})


def literal(policy: Policy, task: Task, seed: int, target: float, limit: int) -> tuple[list[float], bool]:
    """The evaluation loop of the facts §9 for one episode. Returns its rewards and whether it terminated."""
    model, head, k = (
        DecisionTransformer.from_policy(policy).eval(),
        policy.heads[task.name],
        policy.architecture.context,
    )
    environment = gymnasium.make(task.environment)
    observation, _ = environment.reset(seed=seed)
    states, actions, goals, rewards, terminated = [], [], [target], [], False
    while len(rewards) < limit and not terminated:
        states.append((torch.tensor(observation, dtype=torch.float32) - head["state_mean"]) / head["state_std"])
        actions.append(torch.zeros(task.action_dim))
        n = min(k, len(states))
        pad = k - n

        def window(items: list[torch.Tensor], n: int = n, pad: int = pad) -> torch.Tensor:
            recent = torch.stack(items[-n:])
            return torch.cat([torch.zeros(pad, recent.shape[1]), recent])[None]

        times = torch.cat([torch.zeros(pad, dtype=torch.long), torch.arange(len(states) - n, len(states))])[None]
        mask = (torch.arange(k) >= pad)[None]
        goal_tokens = [torch.tensor([goal / task.return_scale], dtype=torch.float32) for goal in goals]
        with torch.inference_mode():
            action = model(task.name, Batch(window(goal_tokens), window(states), window(actions), times, mask))[0, -1]
        actions[-1] = action
        observation, reward, terminated, _, _ = environment.step(action.numpy())
        rewards.append(float(reward))
        goals.append(goals[-1] - float(reward))
    return rewards, terminated


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


@pytest.mark.parametrize(("heads", "seed"), [(1, 6), (4, 5)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_again_is_the_same_to_the_last_bit(precision: str, heads: int, seed: int) -> None:
    short = HOPPER.model_copy(update={"horizon": 60})
    policy = lively(HOPPER, seed, width=128, heads=heads)
    first, second = (evaluate(policy, short, episodes=12, seed=3, precision=precision) for _ in range(2))
    assert len(set(first.lengths)) > 1  # they end at different times: some are forgotten on the way
    assert all(np.array_equal(mine, again) for mine, again in zip(first, second, strict=True))


@pytest.mark.parametrize("heads", [1, 4])
def test_an_episode_is_the_same_in_whatever_company(heads: int) -> None:
    short = HOPPER.model_copy(update={"horizon": 60})
    policy = lively(HOPPER, 4, heads=heads)
    together = evaluate(policy, short, episodes=12, seed=3)
    assert list(together.seeds) == list(range(3, 15))
    assert len(set(together.lengths)) > 1
    for i in (0, 5, 11):
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


def test_unknown_environments_run_on_plain_gymnasium() -> None:
    ant = get_task("ant").model_copy(update={"horizon": 12})
    policy = lively(get_task("ant"), 0)
    episodes = evaluate(policy, ant, episodes=2, seed=4, target_return=500.0)
    for i in range(2):
        rewards, _ = literal(policy, get_task("ant"), 4 + i, 500.0, 12)
        assert episodes.returns[i] == pytest.approx(sum(rewards), rel=1e-4, abs=1e-3)


def test_mistakes_are_named() -> None:
    policy = lively(HOPPER, 0)
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(policy, HOPPER, episodes=0, seed=0)
    with pytest.raises(UserError, match="no head for walker2d: its heads are hopper"):
        evaluate(policy, get_task("walker2d"), episodes=1, seed=0)
