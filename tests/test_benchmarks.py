"""The field's way, which benchmarks compare with, is the same policy as ours."""

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import score
from benchmarks.literal import LiteralEvaluation, LiteralTraining
from dt.behaviour.record import record_chunk
from dt.model.architecture import Architecture
from dt.rollout.evaluate import evaluate
from dt.tasks import get_task
from orchestrator.data_choice import choose_data
from orchestrator.experiment import Setting
from orchestrator.profiles import get_profile
from orchestrator.store import Store

SMALL = Architecture(width=16, layers=2)
RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize("task", ["hopper", "halfcheetah"])
def test_the_literal_way_returns_what_our_rollouts_of_its_weights_return(task: str) -> None:
    """Hugging Face's trunk, one environment at batch 1, against ours; over as many steps as floats agree."""
    short = get_task(task).model_copy(update={"horizon": 30})
    data = record_chunk(task, "expert", 0, 0, 1)
    training = LiteralTraining(get_task(task), data, SMALL)
    for _ in range(3):
        training.step()
    literal = LiteralEvaluation(get_task(task), training.policy())
    ours = evaluate(training.policy(), short, episodes=2, seed=5)
    assert ours.returns == pytest.approx([literal.episode(seed, 30) for seed in (5, 6)], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "tolerance"), [("hopper", 0.02), ("halfcheetah", 0.05)])
def test_a_trained_policy_returns_the_same_over_whole_episodes(task: str, tolerance: float) -> None:
    """The committed experts, a thousand steps each: floats part on the way, what is reached does not."""
    setting, store = Setting(get_profile("laptop"), choose_data("recorded")), Store(RESULTS)
    recipe = setting.expert(task, 0)
    if not store.has(recipe):
        pytest.skip("the committed policies are not here")
    policy = store.load_policy(recipe)
    ours = evaluate(policy, get_task(task), episodes=3, seed=0)
    literal = LiteralEvaluation(get_task(task), policy)
    assert ours.returns.mean() == pytest.approx(sum(literal.episode(seed) for seed in range(3)) / 3, rel=tolerance)
    short = get_task(task).model_copy(update={"horizon": 20})
    begun = evaluate(policy, short, episodes=3, seed=0)
    assert begun.returns == pytest.approx([literal.episode(seed, 20) for seed in range(3)], rel=1e-3)


def test_literal_training_goes_on_where_it_was() -> None:
    data = record_chunk("hopper", "expert", 0, 0, 1)
    whole, begun, resumed = (LiteralTraining(get_task("hopper"), data, SMALL) for _ in range(3))
    for training in (whole, begun):
        torch.manual_seed(2)  # dropout
        training.step()
    file = io.BytesIO()
    torch.save(begun.state(), file)
    file.seek(0)
    resumed.load(torch.load(file, weights_only=True))
    for training in (whole, resumed):
        torch.manual_seed(3)
        training.step()
    assert resumed.steps == 2
    assert all(torch.equal(t, resumed.policy().trunk[name]) for name, t in whole.policy().trunk.items())


def test_the_literal_way_is_given_up_on_when_it_has_taken_so_many_times_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "LITERAL_STEPS", 2)
    monkeypatch.setattr(score, "OUR_STEPS", 2)
    data, task = record_chunk("hopper", "expert", 0, 0, 1), get_task("hopper").model_copy(update={"horizon": 20})

    def steps(goal: float, limit: float) -> tuple[int, bool]:
        training, (ours, literal), reached = score.literal_training(
            task, data, get_profile("smoke"), goal, tmp_path, Console(), limit
        )
        assert reached or training.steps * literal > limit * ours
        return training.steps, reached

    first = steps(goal=math.inf, limit=3)
    assert not first[1]
    further, reached = steps(goal=math.inf, limit=50)  # goes on from there
    assert further > first[0]
    assert not reached
    assert steps(goal=-math.inf, limit=math.inf) == (further, True)  # there already
