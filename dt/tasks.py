"""What a task is: one environment with its dimensions, return target and reference scores.

Reference returns are D4RL's (Fu et al. 2020, `d4rl/infos.py`); the environments are Gymnasium's v5. On HalfCheetah the
two agree exactly, on Hopper within 0.03 points; on Walker2d (other foot friction) the score is a scale, no comparison.
"""

from collections.abc import Mapping
from types import MappingProxyType

from dt.errors import unknown
from dt.frozen import Frozen


class Task(Frozen):
    """One environment and all that a Decision Transformer must know of it."""

    name: str
    environment: str  # Gymnasium id
    state_dim: int
    action_dim: int
    target_return: float  # the paper's return target, for data from D4RL or Minari
    random_return: float  # D4RL's reference returns: score 0 …
    expert_return: float  # … and score 100
    horizon: int = 1000  # steps before truncation; also the size of the time-step table
    return_scale: float = 1000.0  # returns-to-go are divided by this before they enter the model


_ALL = (
    Task(
        name="halfcheetah",
        environment="HalfCheetah-v5",
        state_dim=17,
        action_dim=6,
        target_return=12000.0,
        random_return=-280.178953,
        expert_return=12135.0,
    ),
    Task(
        name="hopper",
        environment="Hopper-v5",
        state_dim=11,
        action_dim=3,
        target_return=3600.0,
        random_return=-20.272305,
        expert_return=3234.3,
    ),
    Task(
        name="walker2d",
        environment="Walker2d-v5",
        state_dim=17,
        action_dim=6,
        target_return=5000.0,
        random_return=1.629008,
        expert_return=4592.3,
    ),
    Task(
        name="ant",
        environment="Ant-v5",
        state_dim=105,
        action_dim=8,
        target_return=6000.0,
        random_return=-325.6,
        expert_return=3879.7,
    ),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})


def get_task(name: str) -> Task:
    """The task of that name. Raises UserError naming the nearest valid ones."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
