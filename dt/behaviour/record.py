"""Recording a dataset from a behaviour policy, and keeping it as a Minari dataset that Minari itself can open.

An episode depends on nothing but (task, quality, seed, its number), so a dataset is the same however many processes
record it, in whatever chunks and order, and a longer one begins with the shorter one.
"""

import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium
import numpy as np

from dt.behaviour.policy import BehaviourPolicy, load_behaviour_policy
from dt.data.trajectories import Trajectories, concatenate
from dt.errors import unknown
from dt.rollout.physics import make_physics
from dt.tasks import Task, get_task

if TYPE_CHECKING:
    from minari.data_collector import EpisodeBuffer

CHUNK = 25  # episodes recorded together: enough to share the cost of Python, few enough to keep every worker busy

EPISODE_BYTES = 64_000  # of HDF5's own, for an episode, at most

_PARTS = {"medium": ("medium",), "expert": ("expert",), "medium-expert": ("medium", "expert")}


def parts_of(quality: str) -> tuple[str, ...]:
    """The recordings a quality is made of: `medium-expert` is both, and has no copy of its own. Raises UserError."""
    if quality not in _PARTS:
        raise unknown("quality", quality, _PARTS)
    return _PARTS[quality]


def chunks(episodes: int) -> list[tuple[int, int]]:
    """(first, count) of the chunks that make up so many episodes; always the same, as each is one unit of work."""
    return [(first, min(CHUNK, episodes - first)) for first in range(0, episodes, CHUNK)]


def record_chunk(task: str, quality: str, seed: int, first: int, count: int) -> Trajectories:
    """Episodes first … first + count − 1 of the recording with that seed, acting stochastically as D4RL's did.

    Raises UserError for an unknown task or a quality that no shipped policy has.
    """
    return play(load_behaviour_policy(task, quality), get_task(task), seed, range(first, first + count))


def play(policy: BehaviourPolicy, task: Task, seed: int, episodes: range, sampled: bool = True) -> Trajectories:
    """The episodes of these numbers, to their end or the task's horizon; the mean action is taken unless `sampled`."""
    horizon, count = task.horizon, len(episodes)
    noise = np.stack(
        [_noise_generator(seed, i).standard_normal((horizon, task.action_dim), np.float32) for i in episodes]
    )
    observations = np.zeros((count, horizon + 1, task.state_dim), np.float32)
    actions = np.zeros((count, horizon, task.action_dim), np.float32)
    rewards = np.zeros((count, horizon), np.float32)
    lengths = np.full(count, horizon)
    terminated = np.zeros(count, np.bool_)

    physics = make_physics(task, count)
    running = np.arange(count)
    observations[:, 0] = physics.reset([environment_seed(seed, i) for i in episodes])
    for t in range(horizon):
        actions[running, t] = policy.act(observations[running, t], noise[running, t] if sampled else None)
        step = physics.step(running, actions[running, t])
        observations[running, t + 1] = step.observations
        rewards[running, t] = step.rewards
        lengths[running[step.terminated]] = t + 1
        terminated[running[step.terminated]] = True
        running = running[~step.terminated]
        if not len(running):
            break

    happened = np.arange(horizon) < lengths[:, None]
    return Trajectories(
        observations=observations[:, :-1][happened],
        actions=actions[happened],
        rewards=rewards[happened],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        terminated=terminated,
        final_observations=observations[np.arange(count), lengths],
    )


def environment_seed(seed: int, episode: int) -> int:
    """The environment seed of one episode of a recording; the same for every task and quality."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])


def _noise_generator(seed: int, episode: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, episode]).spawn(1)[0])


def record(task: str, quality: str, episodes: int, seed: int, root: Path) -> None:
    """Record and write what is missing of a dataset, in this process. The orchestrator does the same in parallel."""
    for part in parts_of(quality):
        if not is_recorded(task, part, episodes, seed, root):
            parts = [record_chunk(task, part, seed, first, count) for first, count in chunks(episodes)]
            write_recording(concatenate(parts), task, part, episodes, seed, root)


# --- on disk ----------------------------------------------------------------------------------------------------------


def recording_id(task: str, quality: str, episodes: int, seed: int) -> str:
    """The Minari id of a recording, as `mergedt/hopper/expert-e200-s0-v0`. Raises ValueError for a compound quality."""
    if parts_of(quality) != (quality,):
        raise ValueError(f"{quality} has no recording of its own: it is {' and '.join(parts_of(quality))}")
    return f"mergedt/{get_task(task).name}/{quality}-e{episodes}-s{seed}-v0"


def recording_path(task: str, quality: str, episodes: int, seed: int, root: Path) -> Path:
    """Where that recording lies under a Minari root."""
    return root / recording_id(task, quality, episodes, seed)


def recording_paths(task: str, quality: str, episodes: int, seed: int, root: Path) -> list[Path]:
    """Where the recordings lie that a dataset is made of."""
    return [recording_path(task, part, episodes, seed, root) for part in parts_of(quality)]


def is_recorded(task: str, quality: str, episodes: int, seed: int, root: Path) -> bool:
    """Whether every part of that dataset lies under the root; a recording is there whole or not at all."""
    return all(path.is_dir() for path in recording_paths(task, quality, episodes, seed, root))


def write_recording(trajectories: Trajectories, task: str, quality: str, episodes: int, seed: int, root: Path) -> Path:
    """Write a recording as a Minari dataset and return its path; one that is there already stays as it is.

    `minari.load_dataset(recording_id(...))` opens it when MINARI_DATASETS_PATH is `root`. It is written under a hidden
    name and renamed. Raises ValueError when the trajectories are not such a recording.
    """
    from minari.dataset.minari_storage import MinariStorage  # seconds to import, which no other function here needs

    if trajectories.episodes != episodes or trajectories.final_observations is None:
        raise ValueError(
            f"a recording of {episodes} episodes with final observations was due, not {trajectories.episodes}"
        )
    path = recording_path(task, quality, episodes, seed, root)
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_room(root, trajectories)
    # Minari's listings skip hidden folders. The storage is made by its path: `create_dataset_from_buffers` knows its
    # root only through an environment variable, which would be everyone's.
    with tempfile.TemporaryDirectory(prefix=".recording-", dir=root) as temporary:
        data = Path(temporary, path.name, "data")
        data.mkdir(parents=True)
        settings = get_task(task)
        storage = MinariStorage.new(
            data,
            observation_space=_box(np.inf, settings.state_dim),
            action_space=_box(1.0, settings.action_dim),
            env_spec=gymnasium.spec(settings.environment),
            data_format="hdf5",
        )
        storage.update_metadata(_metadata(trajectories, task, quality, episodes, seed))
        storage.update_episodes(_episode_buffers(trajectories, seed))
        try:
            data.parent.rename(path)
        except OSError:  # another process was first; a folder that holds something is never replaced
            if not path.is_dir():
                raise
    return path


def _check_room(folder: Path, trajectories: Trajectories) -> None:
    """Raises OSError when the disk is too full for a recording: HDF5 itself takes the process down when it is."""
    arrays = (trajectories.observations, trajectories.actions, trajectories.rewards, trajectories.terminated)
    size = 2 * sum(array.nbytes for array in arrays) + EPISODE_BYTES * trajectories.episodes
    if hasattr(os, "posix_fallocate"):  # not on a Mac
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)


def _episode_buffers(trajectories: Trajectories, seed: int) -> Iterator["EpisodeBuffer"]:
    from minari.data_collector import EpisodeBuffer

    finals = trajectories.final_observations
    assert finals is not None
    bounds = pairwise(trajectories.offsets.tolist())
    for episode, ((start, end), terminated) in enumerate(zip(bounds, trajectories.terminated, strict=True)):
        last = np.arange(end - start) == end - start - 1
        yield EpisodeBuffer(
            id=episode,
            seed=environment_seed(seed, episode),
            observations=np.concatenate([trajectories.observations[start:end], finals[episode : episode + 1]]),
            actions=trajectories.actions[start:end],
            rewards=trajectories.rewards[start:end],
            terminations=last & terminated,
            truncations=last & ~terminated,
        )


def _metadata(trajectories: Trajectories, task: str, quality: str, episodes: int, seed: int) -> dict[str, object]:
    """Minari's own keys, and the provenance of every number in the dataset."""
    settings, policy = get_task(task), load_behaviour_policy(task, quality)
    versions = {name: version(name) for name in ("mujoco", "gymnasium", "numpy", "minari")}
    return {
        "dataset_id": recording_id(task, quality, episodes, seed),
        "minari_version": versions["minari"],
        "algorithm_name": str(policy.provenance["algorithm"]),
        "author": {"mergedt"},
        "description": f"{episodes} episodes of mergedt's {quality} behaviour policy in {settings.environment}.",
        "requirements": [f"{name}=={versions[name]}" for name in ("mujoco", "gymnasium")],
        "ref_min_score": settings.random_return,  # D4RL's reference returns, as everywhere in this project
        "ref_max_score": settings.expert_return,
        "content_hash": trajectories.content_hash,
        "recording": {"task": task, "quality": quality, "episodes": episodes, "seed": seed},
        "behaviour_policy": {"sha256": policy.digest, **policy.provenance},
        "versions": versions,
    }


def _box(bound: float, size: int) -> gymnasium.spaces.Box:
    return gymnasium.spaces.Box(-bound, bound, (size,), np.float32)
