"""Training behaviour policies for an environment that has none, with the settings the shipped ones were trained with.

    pip install 'mergedt[behaviour]'
    mergedt behaviour train --task hopper --medium-return 1422 --steps 400000 -o hopper

Soft Actor-Critic (Haarnoja et al. 2018) or TQC (Kuznetsov et al. 2020), from `sbx-rl`. `medium` is the checkpoint whose
return is nearest to the one asked for, `expert` the last good one. Both are written anew after every checkpoint, so a
run may be stopped at any time.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from dt.behaviour.policy import LAYERS, BehaviourPolicy
from dt.behaviour.record import play
from dt.errors import UserError
from dt.files import explained, write_atomically
from dt.rollout.physics import make_environment
from dt.scores import normalised_score
from dt.tasks import Task

Float32 = npt.NDArray[np.float32]

WIDTH = 256  # of both hidden layers
GOOD = 0.95  # a checkpoint is good when its return is at least so much of the best one's
_EVALUATION_SEED = 1_000_000  # far from the seeds that recordings take


@dataclass(frozen=True)
class Settings:
    """How long and with what to train; every other setting is the algorithm's default in `sbx-rl`."""

    algorithm: Literal["SAC", "TQC"] = "SAC"
    steps: int = 1_000_000  # of the environment
    seed: int = 0
    random_steps: int = 5_000  # before the first gradient
    update_every: int = 4  # environment steps, followed by as many gradient steps
    checkpoint_every: int = 20_000  # environment steps
    quantiles_dropped: int = 5  # top quantiles a critic, TQC only: 5 for Hopper
    evaluation_episodes: int = 20


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The policy after some steps, and its evaluation: return and length by `sampled` and by mean actions."""

    steps: int
    weights: Mapping[str, Float32]
    evaluation: Mapping[str, Mapping[str, float]]

    @property
    def mean_return(self) -> float:
        """Of sampled actions, as a dataset is recorded."""
        return self.evaluation["stochastic"]["mean_return"]


def train_behaviour_policies(
    task: Task,
    medium_return: float,
    folder: Path,
    settings: Settings | None = None,
    report: Callable[[Checkpoint], None] = lambda _: None,
) -> None:
    """Train, and write `{task}-medium` and `{task}-expert` (.safetensors and .json) into `folder` at each checkpoint.

    Each checkpoint is then reported. Copied into `dt/behaviour/` the files are found by name. Raises UserError when
    `sbx-rl` is not installed, when the environment's actions do not range over [−1, 1], which is all that the policies
    can act, or when the folder cannot be written.
    """
    settings = settings or Settings()
    checkpoints = train(task, settings)
    _ensure_writable(folder)
    so_far: list[Checkpoint] = []
    for checkpoint in checkpoints:
        so_far.append(checkpoint)
        for quality, chosen in select(so_far, medium_return).items():
            write_policy(folder, task, quality, chosen, settings)
        report(checkpoint)


def _ensure_writable(folder: Path) -> None:
    """Make the folder and a file in it, which vanishes: said before the hours of training, not after."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass


def train(task: Task, settings: Settings) -> Iterator[Checkpoint]:
    """A checkpoint every so many steps. Raises UserError as above, at once and not at the first checkpoint."""
    try:
        import sbx  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UserError("training a behaviour policy needs sbx-rl: pip install 'mergedt[behaviour]'") from error
    environment = gymnasium.wrappers.TimeLimit(make_environment(task.environment), task.horizon)
    space = environment.action_space
    if not (isinstance(space, gymnasium.spaces.Box) and (space.low == -1).all() and (space.high == 1).all()):
        raise UserError(
            f"the actions of {task.environment} range over {space}, a behaviour policy acts only in [-1, 1]"
        )
    model = getattr(sbx, settings.algorithm)(
        "MlpPolicy",
        environment,
        learning_starts=settings.random_steps,
        train_freq=settings.update_every,
        gradient_steps=settings.update_every,
        seed=settings.seed,
        **({"top_quantiles_to_drop_per_net": settings.quantiles_dropped} if settings.algorithm == "TQC" else {}),
    )
    return _checkpoints(model, task, settings)


def _checkpoints(model: Any, task: Task, settings: Settings) -> Iterator[Checkpoint]:
    while model.num_timesteps < settings.steps:
        model.learn(settings.checkpoint_every, reset_num_timesteps=False)
        weights = weights_of(model.policy.actor_state.params)
        evaluation = evaluate(weights, task, settings.evaluation_episodes)
        yield Checkpoint(int(model.num_timesteps), weights, evaluation)


def weights_of(parameters: Mapping[str, Any]) -> dict[str, Float32]:
    """The tensors of our form from the parameter tree of sbx's actor, whose kernels are (in, out).

    flax numbers the dense layers as they are called: the hidden ones, then the mean and the log standard deviation.
    Raises ValueError when the tree is not that of two hidden layers of 256.
    """
    layers = parameters["params"]
    shapes = {name: tuple(np.shape(layers[name]["kernel"])) for name in layers}
    expected = [f"Dense_{i}" for i in range(len(LAYERS))]
    if sorted(shapes) != expected or [shapes[name][1] for name in expected[:2]] != [WIDTH, WIDTH]:
        raise ValueError(f"not an actor of two hidden layers of {WIDTH}: {shapes}")
    weights = {}
    for layer, name in zip(LAYERS, expected, strict=True):
        weights[f"{layer}.weight"] = np.ascontiguousarray(np.asarray(layers[name]["kernel"], np.float32).T)
        weights[f"{layer}.bias"] = np.array(layers[name]["bias"], np.float32)
    return weights


def evaluate(weights: Mapping[str, Float32], task: Task, episodes: int) -> dict[str, dict[str, float]]:
    """Return, length and score over so many episodes, acting by the mean and by samples."""
    policy = BehaviourPolicy(weights, provenance={}, digest="")
    result = {}
    for name, sampled in (("deterministic", False), ("stochastic", True)):
        played = play(policy, task, _EVALUATION_SEED, range(episodes), sampled)
        result[name] = {
            "mean_return": round(float(played.returns.mean()), 1),
            "std_return": round(float(played.returns.std()), 1),
            "mean_length": float(played.lengths.mean()),
            "episodes": episodes,
            "score": round(normalised_score(task, float(played.returns.mean())), 1),
        }
    return result


def select(checkpoints: Sequence[Checkpoint], medium_return: float) -> dict[str, Checkpoint]:
    """`medium`: the nearest to that return; `expert`: the last one that is nearly as good as the best."""
    best = max(checkpoint.mean_return for checkpoint in checkpoints)
    good = [checkpoint for checkpoint in checkpoints if checkpoint.mean_return >= best - (1 - GOOD) * abs(best)]
    return {
        "medium": min(checkpoints, key=lambda checkpoint: abs(checkpoint.mean_return - medium_return)),
        "expert": good[-1],
    }


def write_policy(folder: Path, task: Task, quality: str, checkpoint: Checkpoint, settings: Settings) -> None:
    """The weights with their provenance in the metadata, and the provenance beside them; each whole or not at all."""
    provenance = {
        "task": task.name,
        "environment": task.environment,
        "quality": quality,
        "algorithm": settings.algorithm,
        "environment_steps": checkpoint.steps,
        "seed": settings.seed,
        "architecture": f"tanh-squashed Gaussian, MLP {WIDTH}-{WIDTH} ReLU, log_std clipped to [-20, 2]",
        "evaluation": {name: dict(numbers) for name, numbers in checkpoint.evaluation.items()},
        "settings": asdict(settings),
        "versions": {name: version(name) for name in ("sbx-rl", "mujoco", "gymnasium")},
    }
    contents = {
        "safetensors": save(dict(checkpoint.weights), {"provenance": json.dumps(provenance)}),
        "json": json.dumps(provenance, indent=1).encode(),
    }
    for suffix, content in contents.items():
        write_atomically(folder / f"{task.name}-{quality}.{suffix}", content)


def show_progress(checkpoint: Checkpoint) -> None:
    numbers = checkpoint.evaluation["stochastic"]
    print(
        f"{checkpoint.steps} steps: return {numbers['mean_return']} ± {numbers['std_return']}, score {numbers['score']}"
    )
