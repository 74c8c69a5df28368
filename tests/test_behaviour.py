"""Behaviour policies, recording, the Minari dataset on disk, and the export of newly trained policies."""

import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import gymnasium
import minari
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import dt.behaviour
from dt.behaviour.policy import BehaviourPolicy, load_behaviour_policy, shipped_policies
from dt.behaviour.record import (
    EPISODE_BYTES,
    chunks,
    environment_seed,
    is_recorded,
    parts_of,
    play,
    record,
    record_chunk,
    recording_id,
    recording_path,
    write_recording,
)
from dt.behaviour.train import (
    Checkpoint,
    Settings,
    select,
    train,
    train_behaviour_policies,
    weights_of,
    write_policy,
)
from dt.data.trajectories import Trajectories, concatenate
from dt.errors import UserError
from dt.files import explained
from dt.tasks import get_task
from orchestrator.cli import app
from orchestrator.recipes import Recording

SHIPPED = [(task, quality) for task in ("halfcheetah", "hopper", "walker2d") for quality in ("expert", "medium")]


def test_two_policies_are_shipped_for_each_of_the_three_tasks() -> None:
    assert list(shipped_policies()) == SHIPPED


@pytest.mark.parametrize(("task", "quality"), SHIPPED)
def test_actions_follow_the_published_form(task: str, quality: str) -> None:
    """In float64, from the tensors in the file: h = relu(W1 relu(W0 o + b0) + b1), tanh(Wm h + bm + std·ε)."""
    policy = load_behaviour_policy(task, quality)
    file = load_file(str(Path(dt.behaviour.__file__).parent / f"{task}-{quality}.safetensors"))
    tensors = {name: tensor.double() for name, tensor in file.items()}
    rng = np.random.default_rng(0)
    observations = rng.normal(0, 3, (40, get_task(task).state_dim)).astype(np.float32)
    noise = rng.standard_normal((40, get_task(task).action_dim)).astype(np.float32)
    hidden = torch.from_numpy(observations).double()
    for layer in ("hidden_0", "hidden_1"):
        hidden = torch.relu(torch.nn.functional.linear(hidden, tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]))
    mean = torch.nn.functional.linear(hidden, tensors["mean.weight"], tensors["mean.bias"])
    log_std = torch.nn.functional.linear(hidden, tensors["log_std.weight"], tensors["log_std.bias"]).clip(-20, 2)
    sampled = torch.tanh(mean + log_std.exp() * torch.from_numpy(noise).double())
    assert policy.act(observations) == pytest.approx(torch.tanh(mean).numpy(), abs=2e-5)
    assert policy.act(observations, noise) == pytest.approx(sampled.numpy(), abs=2e-5)
    assert policy.act(observations).dtype == np.float32
    assert (policy.provenance["task"], policy.provenance["quality"]) == (task, quality)


def test_a_missing_policy_is_said_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"no behaviour policy is shipped for 'ant' \(shipped: halfcheetah, hopper"):
        load_behaviour_policy("ant", "expert")
    with pytest.raises(UserError, match=r"unknown quality 'exprt': did you mean 'expert'\?"):
        load_behaviour_policy("hopper", "exprt")


# --- recording --------------------------------------------------------------------------------------------------------


def test_a_recording_is_what_gymnasium_gives_when_the_policy_acts() -> None:
    """One step at a time in a plain environment; its own time limit cuts, ours must cut at the same step."""
    settings, policy = get_task("hopper"), load_behaviour_policy("hopper", "medium")
    recorded = record_chunk("hopper", "medium", 7, 0, 3)
    env = gymnasium.make(settings.environment)
    for episode in range(3):
        stream = np.random.default_rng(np.random.SeedSequence([7, episode]).spawn(1)[0])
        noise = stream.standard_normal((1000, 3), np.float32)
        observation, _ = env.reset(seed=environment_seed(7, episode))
        observations, actions, rewards, ended, step = [], [], [], False, 0
        while not ended:
            observations.append(observation.astype(np.float32))
            actions.append(policy.act(observations[-1][None], noise[step : step + 1])[0])
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            rewards.append(reward)
            ended, step = terminated or truncated, step + 1
        rows = slice(recorded.offsets[episode], recorded.offsets[episode + 1])
        assert np.array_equal(recorded.observations[rows], observations)
        assert np.array_equal(recorded.actions[rows], actions)
        assert np.array_equal(recorded.rewards[rows], np.float32(rewards))
        assert recorded.terminated[episode] == terminated
        assert recorded.final_observations is not None
        assert np.array_equal(recorded.final_observations[episode], observation.astype(np.float32))


def test_episodes_that_reach_the_horizon_are_truncated() -> None:
    task = get_task("halfcheetah").model_copy(update={"horizon": 12})
    played = play(load_behaviour_policy("halfcheetah", "medium"), task, 0, range(3))
    assert played.lengths.tolist() == [12, 12, 12]
    assert not played.terminated.any()


def test_a_recording_does_not_depend_on_how_it_is_cut_into_chunks_or_on_threads() -> None:
    whole = record_chunk("hopper", "medium", 0, 0, 5)
    parts = [record_chunk("hopper", "medium", 0, first, count) for first, count in ((0, 1), (1, 3), (4, 1))]
    assert concatenate(parts).content_hash == whole.content_hash
    assert record_chunk("hopper", "medium", 1, 0, 1).content_hash != parts[0].content_hash


def test_chunks_cover_all_episodes_once() -> None:
    assert chunks(60) == [(0, 25), (25, 25), (50, 10)]
    assert chunks(25) == [(0, 25)]


@pytest.fixture(scope="module")
def small() -> Trajectories:
    """Two whole episodes of Hopper: one that falls, one made to look cut by the time limit."""
    recorded = record_chunk("hopper", "medium", 0, 0, 2)
    return Trajectories(
        recorded.observations,
        recorded.actions,
        recorded.rewards,
        recorded.offsets,
        np.array([True, False]),
        recorded.final_observations,
    )


def test_a_recording_is_a_minari_dataset_like_any_other(
    small: Trajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    path = write_recording(small, "hopper", "medium", 2, 0, tmp_path)
    assert path == recording_path("hopper", "medium", 2, 0, tmp_path) == tmp_path / "mergedt/hopper/medium-e2-s0-v0"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert list(minari.list_local_datasets()) == ["mergedt/hopper/medium-e2-s0-v0"]
    dataset = minari.load_dataset(recording_id("hopper", "medium", 2, 0))
    assert (dataset.total_episodes, dataset.total_steps) == (2, small.steps)
    assert dataset.recover_environment().spec.id == "Hopper-v5"
    for episode, stored in enumerate(dataset.iterate_episodes()):
        rows = slice(small.offsets[episode], small.offsets[episode + 1])
        assert np.array_equal(stored.observations[:-1], small.observations[rows])
        assert np.array_equal(stored.observations[-1], small.final_observations[episode])  # type: ignore[index]
        assert np.array_equal(stored.actions, small.actions[rows])
        assert np.array_equal(stored.rewards, small.rewards[rows])
        ends = (stored.terminations, stored.truncations)
        assert [flags[:-1].any() for flags in ends] == [False, False]
        assert [bool(flags[-1]) for flags in ends] == ([True, False] if episode == 0 else [False, True])
    seeds = [metadata["seed"] for metadata in dataset.storage.get_episode_metadata(range(2))]
    assert seeds == [environment_seed(0, episode) for episode in range(2)]
    assert minari.get_normalized_score(dataset, np.array([3234.3])) == pytest.approx(1.0)


def test_the_metadata_tells_where_every_number_comes_from(small: Trajectories, tmp_path: Path) -> None:
    path = write_recording(small, "hopper", "medium", 2, 0, tmp_path)
    metadata = json.loads((path / "data" / "metadata.json").read_text())
    assert metadata["content_hash"] == small.content_hash
    assert metadata["recording"] == {"task": "hopper", "quality": "medium", "episodes": 2, "seed": 0}
    assert metadata["behaviour_policy"]["sha256"] == load_behaviour_policy("hopper", "medium").digest
    assert metadata["behaviour_policy"]["algorithm"] == metadata["algorithm_name"] == "SAC"
    assert set(metadata["versions"]) == {"mujoco", "gymnasium", "numpy", "minari"}
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)


def test_a_recording_that_fails_halfway_leaves_nothing(
    small: Trajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_seed: int, episode: int) -> int:
        if episode:  # the first is written by then
            raise OSError("no space left on device")
        return 0

    monkeypatch.setattr("dt.behaviour.record.environment_seed", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_recording(small, "hopper", "medium", 2, 0, tmp_path)
    assert not is_recorded("hopper", "medium", 2, 0, tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_recording_on_a_really_full_disk_is_an_error_and_no_crash(small: Trajectories, tmp_path: Path) -> None:
    """HDF5 would end the process: room is looked for before."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount a small disk here")
    try:
        with pytest.raises(UserError, match="no space left"), explained(disk):
            write_recording(small, "hopper", "medium", 2, 0, disk)
        assert [path.name for path in disk.rglob("*") if path.is_file()] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_room_is_looked_for_generously(small: Trajectories, tmp_path: Path) -> None:
    written = write_recording(small, "hopper", "medium", 2, 0, tmp_path)
    size = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    arrays = (small.observations, small.actions, small.rewards, small.terminated)
    assert size < 2 * sum(array.nbytes for array in arrays) + EPISODE_BYTES * small.episodes


def test_who_ships_another_policy_raises_the_revision_of_recordings() -> None:
    """Policies trained on an old one's data would else pass for those of the new one's: see `Recording`."""
    digests = "".join(load_behaviour_policy(*which).digest for which in sorted(shipped_policies()))
    assert (hashlib.sha256(digests.encode()).hexdigest()[:16], Recording.revision) == ("79cab0b3aa8f22b8", 1)


def test_a_recording_that_is_there_stays(small: Trajectories, tmp_path: Path) -> None:
    path = write_recording(small, "hopper", "medium", 2, 0, tmp_path)
    before = (path / "data" / "main_data.hdf5").stat()
    assert write_recording(small, "hopper", "medium", 2, 0, tmp_path) == path
    assert (path / "data" / "main_data.hdf5").stat() == before


def test_trajectories_that_are_not_that_recording_are_refused(small: Trajectories, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a recording of 3 episodes"):
        write_recording(small, "hopper", "medium", 3, 0, tmp_path)
    with pytest.raises(ValueError, match="has no recording of its own"):
        write_recording(small, "hopper", "medium-expert", 2, 0, tmp_path)


def test_medium_expert_is_both_recordings_and_no_third(tmp_path: Path) -> None:
    assert parts_of("medium-expert") == ("medium", "expert")
    record("hopper", "medium", 1, 0, tmp_path)
    assert not is_recorded("hopper", "medium-expert", 1, 0, tmp_path)
    record("hopper", "medium-expert", 1, 0, tmp_path)
    assert is_recorded("hopper", "medium-expert", 1, 0, tmp_path)
    assert sorted(path.name for path in (tmp_path / "mergedt/hopper").iterdir()) == [
        "expert-e1-s0-v0",
        "medium-e1-s0-v0",
    ]
    with pytest.raises(UserError, match="unknown quality 'best'"):
        parts_of("best")


# --- training a policy ------------------------------------------------------------------------------------------------


def flax_tree(state_dim: int, action_dim: int, width: int = 256) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    rng = np.random.default_rng(0)
    sizes = [(state_dim, width), (width, width), (width, action_dim), (width, action_dim)]
    return {
        "params": {
            f"Dense_{i}": {"kernel": rng.normal(0, 0.1, size), "bias": rng.normal(0, 0.1, size[1])}
            for i, size in enumerate(sizes)
        }
    }


def test_exported_weights_act_as_flax_would() -> None:
    """flax's Dense is x @ kernel + bias."""
    tree = flax_tree(11, 3)
    weights = weights_of(tree)
    assert {name: array.shape for name, array in weights.items() if name.endswith("weight")} == {
        "hidden_0.weight": (256, 11),
        "hidden_1.weight": (256, 256),
        "mean.weight": (3, 256),
        "log_std.weight": (3, 256),
    }
    observations = np.random.default_rng(1).normal(size=(9, 11))
    hidden = observations
    dense = [tree["params"][f"Dense_{i}"] for i in range(4)]
    for layer in dense[:2]:
        hidden = np.maximum(hidden @ layer["kernel"] + layer["bias"], 0)
    mean, log_std = (hidden @ layer["kernel"] + layer["bias"] for layer in dense[2:])
    policy, noise = BehaviourPolicy(weights, {}, ""), np.full((9, 3), 0.5, np.float32)
    assert policy.act(observations.astype(np.float32)) == pytest.approx(np.tanh(mean), abs=1e-5)
    sampled = np.tanh(mean + 0.5 * np.exp(log_std))
    assert policy.act(observations.astype(np.float32), noise) == pytest.approx(sampled, abs=1e-5)


def test_another_actor_is_not_exported() -> None:
    with pytest.raises(ValueError, match="not an actor of two hidden layers"):
        weights_of(flax_tree(11, 3, width=64))
    deeper = flax_tree(11, 3)
    deeper["params"]["Dense_4"] = deeper["params"]["Dense_3"]
    with pytest.raises(ValueError, match="not an actor of two hidden layers"):
        weights_of(deeper)


def test_medium_is_the_nearest_checkpoint_and_expert_the_last_good_one() -> None:
    reached = [-50.0, 900.0, 1500.0, 3200.0, 3100.0, 2000.0]
    checkpoints = [Checkpoint(i, {}, {"stochastic": {"mean_return": value}}) for i, value in enumerate(reached)]
    chosen = select(checkpoints, medium_return=1422.0)
    assert (chosen["medium"].steps, chosen["expert"].steps) == (2, 4)
    assert select(checkpoints[:1], 1422.0)["expert"].steps == 0


def test_a_written_policy_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"sbx-rl": "0.28.0", "mujoco": "4.0.0", "gymnasium": "1.4.0"}
    monkeypatch.setattr("dt.behaviour.train.version", versions.__getitem__)
    monkeypatch.setattr("dt.behaviour.policy._package", lambda: tmp_path)
    numbers = {"stochastic": {"mean_return": 12.5}, "deterministic": {"mean_return": 13.0}}
    weights = weights_of(flax_tree(11, 3))
    write_policy(tmp_path, get_task("hopper"), "expert", Checkpoint(20_000, weights, numbers), Settings())
    load_behaviour_policy.cache_clear(), shipped_policies.cache_clear()
    try:
        policy = load_behaviour_policy("hopper", "expert")
    finally:
        load_behaviour_policy.cache_clear(), shipped_policies.cache_clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hopper-expert.json", "hopper-expert.safetensors"]
    assert all(np.array_equal(policy.weights[name], weights[name]) for name in weights)
    assert policy.provenance["environment_steps"] == 20_000
    assert policy.provenance["evaluation"] == numbers
    assert policy.provenance["versions"] == versions


def test_training_without_sbx_names_what_to_install_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sbx", None)
    with pytest.raises(UserError, match=r"pip install 'mergedt\[behaviour\]'"):
        train(get_task("hopper"), Settings())
    with pytest.raises(UserError, match=r"pip install 'mergedt\[behaviour\]'"):
        train_behaviour_policies(get_task("hopper"), 1422, tmp_path / "hopper")
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_no_folder_is_told_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Untrained:
        num_timesteps = 0

        def __init__(self, *_: object, **__: object) -> None: ...

        def learn(self, *_: object, **__: object) -> None:
            pytest.fail("it trains")

    monkeypatch.setitem(sys.modules, "sbx", types.SimpleNamespace(SAC=Untrained))
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match=f"cannot write .*{place}: a file stands where a folder is needed"):
            train_behaviour_policies(get_task("hopper"), 1422, tmp_path / place)


def test_the_command_says_what_is_wrong_and_exits_with_2(tmp_path: Path) -> None:
    arguments = ["behaviour", "train", "--task", "hoper", "--medium-return", "1422", "-o", str(tmp_path / "hopper")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "unknown task 'hoper': did you mean 'hopper'?" in done.stderr


@pytest.mark.parametrize("algorithm", ["SAC", "TQC"])
def test_an_exported_policy_acts_as_the_one_that_was_trained(algorithm: str) -> None:
    """With the real library, where the optional extra is installed."""
    sbx = pytest.importorskip("sbx")
    model = getattr(sbx, algorithm)("MlpPolicy", "Hopper-v5", seed=1, learning_starts=50)
    model.learn(100)
    policy = BehaviourPolicy(weights_of(model.policy.actor_state.params), {}, "")
    observations = np.random.default_rng(0).normal(0, 2, (64, 11)).astype(np.float32)
    assert policy.act(observations) == pytest.approx(model.predict(observations, deterministic=True)[0], abs=1e-5)
