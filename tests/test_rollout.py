"""Batched rollouts against a literal evaluation: one Gymnasium environment, batch 1, the whole window each step."""

import gymnasium
import numpy as np
import pytest
import torch

from dt.data.windows import Batch
from dt.errors import UserError
from dt.merging.merge import merge, perturb
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
def test_stacked_rollouts_equal_the_literal_evaluation(activation: str, layers: int, heads: int, context: int) -> None:
    policies = [lively(HOPPER, seed, activation, layers, heads, context) for seed in range(3)]
    short = HOPPER.model_copy(update={"horizon": 40})  # before rounding differences can grow
    results = evaluate(policies, short, episodes=2, seed=5, target_returns=3000.0)
    for policy, episodes in zip(policies, results, strict=True):
        for i in range(2):
            rewards, terminated = literal(policy, HOPPER, 5 + i, 3000.0, 40)
            assert episodes.lengths[i] == len(rewards)
            assert episodes.terminated[i] == terminated
            assert episodes.returns[i] == pytest.approx(sum(rewards), rel=1e-4, abs=1e-3)
    assert any(episodes.terminated.any() for episodes in results)  # the comparison covers episodes that end early


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_policy_gets_the_same_bits_in_whatever_company(precision: str, heads: int) -> None:
    """So a sweep resumed with only its missing points left gives the same numbers."""
    short = HOPPER.model_copy(update={"horizon": 60})
    a, b = (lively(HOPPER, seed, width=128, heads=heads) for seed in (1, 2))
    crowd = [a, b, merge([a, b], "attention", 0.5), merge([a, b], "trunk", 0.5)]
    together = evaluate(crowd, short, episodes=5, seed=3, precision=precision)
    assert (
        len({tuple(episodes.lengths) for episodes in together}) > 1
    )  # they end at different times: slots are repacked
    for policy, episodes in zip(crowd, together, strict=True):
        (alone,) = evaluate([policy], short, episodes=5, seed=3, precision=precision)
        for mine, theirs in zip(alone, episodes, strict=True):
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_attention_of_ones_is_no_attention(precision: str) -> None:
    """It adds the same to all features, which layer norms do not see; in bfloat16 it must not drown the others."""
    short = HOPPER.model_copy(update={"horizon": 30})
    policy = lively(HOPPER, 1, width=128)
    ones, none, plain = evaluate(
        [perturb(policy, "attention", "identity"), perturb(policy, "attention", "removed"), policy],
        short,
        episodes=3,
        seed=3,
        precision=precision,
    )
    assert np.array_equal(ones.returns, none.returns)
    assert not np.array_equal(ones.returns, plain.returns)


def test_starts_are_common_and_episodes_reproducible() -> None:
    short = HOPPER.model_copy(update={"horizon": 20})
    policy = lively(HOPPER, 3, width=128)
    first, second = evaluate([policy, policy], short, episodes=3, seed=11)
    assert np.array_equal(first.returns, second.returns)
    assert list(first.seeds) == [11, 12, 13]
    (later,) = evaluate([policy], short, episodes=2, seed=12)
    assert np.array_equal(later.returns, first.returns[1:])
    assert len(set(first.returns)) == 3


def test_best_target_is_the_heads() -> None:
    short = HOPPER.model_copy(update={"horizon": 15})
    policy = lively(HOPPER, 4)
    head = {**policy.heads["hopper"], "best_return": torch.tensor(1234.0)}
    (best,) = evaluate([Policy(policy.architecture, policy.trunk, {"hopper": head})], short, episodes=1, seed=0)
    (given,) = evaluate([policy], short, episodes=1, seed=0, target_returns=1234.0)
    assert best.returns[0] == given.returns[0]


def test_unknown_environments_run_on_plain_gymnasium() -> None:
    ant = get_task("ant").model_copy(update={"horizon": 12})
    policy = lively(get_task("ant"), 0)
    (episodes,) = evaluate([policy], ant, episodes=2, seed=4, target_returns=500.0)
    for i in range(2):
        rewards, _ = literal(policy, get_task("ant"), 4 + i, 500.0, 12)
        assert episodes.returns[i] == pytest.approx(sum(rewards), rel=1e-4, abs=1e-3)


def test_mistakes_are_named() -> None:
    policy = lively(HOPPER, 0)
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate([policy], HOPPER, episodes=0, seed=0)
    with pytest.raises(UserError, match="no head for walker2d: its heads are hopper"):
        evaluate([policy], get_task("walker2d"), episodes=1, seed=0)
    with pytest.raises(UserError, match="need one architecture"):
        evaluate([policy, lively(HOPPER, 0, layers=1)], HOPPER, episodes=1, seed=0)
