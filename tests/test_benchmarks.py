"""The field's way, which benchmarks compare with, is the same policy as ours."""

import io

import pytest
import torch

from benchmarks.literal import LiteralEvaluation, LiteralTraining
from dt.behaviour.record import record_chunk
from dt.model.architecture import Architecture
from dt.rollout.evaluate import evaluate
from dt.tasks import get_task

SMALL = Architecture(width=16, layers=2)


@pytest.mark.parametrize("task", ["hopper", "halfcheetah"])
def test_the_literal_way_returns_what_our_rollouts_of_its_weights_return(task: str) -> None:
    """Hugging Face's trunk, one environment at batch 1, against ours; over as many steps as floats agree."""
    short = get_task(task).model_copy(update={"horizon": 30})
    data = record_chunk(task, "expert", 0, 0, 1)
    training = LiteralTraining(get_task(task), data, SMALL)
    for _ in range(3):
        training.step()
    literal = LiteralEvaluation(get_task(task), training.model, data)
    (ours,) = evaluate([training.policy()], short, episodes=2, seed=5)
    assert ours.returns == pytest.approx([literal.episode(seed, 30) for seed in (5, 6)], rel=1e-4)


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
