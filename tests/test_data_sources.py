"""Reading recordings, Minari datasets, D4RL files and the original code's pickles; refusing all else."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections import OrderedDict, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pytest
from test_data_trajectories import make

from dt.behaviour.record import record_chunk, recording_path, write_recording
from dt.data.description import describe, list_recordings
from dt.data.sources import load_imported, load_recorded
from dt.data.trajectories import Trajectories, concatenate
from dt.errors import UserError
from dt.tasks import get_task

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def recordings() -> dict[str, Trajectories]:
    return {quality: record_chunk("hopper", quality, 0, 0, 2) for quality in ("medium", "expert")}


@pytest.fixture
def root(recordings: dict[str, Trajectories], tmp_path: Path) -> Path:
    for quality, trajectories in recordings.items():
        write_recording(trajectories, "hopper", quality, 2, 0, tmp_path)
    return tmp_path


def one_sentence(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


# --- recorded ---------------------------------------------------------------------------------------------------------


def test_recordings_come_back_as_they_were(recordings: dict[str, Trajectories], root: Path) -> None:
    for quality, trajectories in recordings.items():
        loaded = load_recorded("hopper", quality, 2, 0, root)
        assert loaded.content_hash == trajectories.content_hash
        assert np.array_equal(loaded.final_observations, trajectories.final_observations)  # type: ignore[arg-type]


def test_medium_expert_is_medium_then_expert(recordings: dict[str, Trajectories], root: Path) -> None:
    loaded = load_recorded("hopper", "medium-expert", 2, 0, root)
    assert loaded.content_hash == concatenate([recordings["medium"], recordings["expert"]]).content_hash


def test_a_missing_recording_names_where_it_should_be(root: Path) -> None:
    with pytest.raises(UserError) as error:
        load_recorded("hopper", "medium", 3, 0, root)
    one_sentence(error, str(root / "mergedt/hopper/medium-e3-s0-v0"), "record it first")


@pytest.mark.parametrize("damage", ["truncated", "empty", "no data", "no metadata", "half metadata", "another value"])
def test_a_damaged_recording_names_the_folder_to_delete(root: Path, damage: str) -> None:
    path = recording_path("hopper", "medium", 2, 0, root)
    data, metadata = path / "data" / "main_data.hdf5", path / "data" / "metadata.json"
    match damage:
        case "truncated":
            data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
        case "empty":
            data.write_bytes(b"")
        case "no data":
            data.unlink()
        case "no metadata":
            metadata.unlink()
        case "half metadata":
            metadata.write_text(metadata.read_text()[:200])
        case "another value":
            with h5py.File(data, "a") as file:
                file["episode_1/rewards"][3] += 1e-3
    with pytest.raises(UserError) as error:
        load_recorded("hopper", "medium", 2, 0, root)
    one_sentence(error, f"delete {path} and record it again")


def test_a_recording_of_another_behaviour_policy_is_refused(root: Path) -> None:
    path = recording_path("hopper", "expert", 2, 0, root)
    file = path / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata["behaviour_policy"]["sha256"] = "0" * 64
    file.write_text(json.dumps(metadata))
    with pytest.raises(UserError) as error:
        load_recorded("hopper", "expert", 2, 0, root)
    one_sentence(error, "another behaviour policy", f"delete {path}")


@pytest.mark.parametrize("asked", [("hopper", "medium", 2, 1), ("hopper", "medium", 3, 0), ("hopper", "expert", 2, 1)])
def test_a_recording_under_the_name_of_another_is_refused(root: Path, asked: tuple[str, str, int, int]) -> None:
    path = recording_path(*asked, root)
    shutil.copytree(recording_path("hopper", "medium", 2, 0, root), path)
    with pytest.raises(UserError) as error:
        load_recorded(*asked, root)
    one_sentence(error, str(path), "another recording than its name says", f"delete {path} and record it again")


def test_recordings_are_listed_from_their_metadata(recordings: dict[str, Trajectories], root: Path) -> None:
    (root / ".recording-left-by-a-kill" / "x" / "data").mkdir(parents=True)
    assert list_recordings(root / "nowhere") == ()
    found = list_recordings(root)
    assert [(entry.task, entry.quality, entry.episodes, entry.seed) for entry in found] == [
        ("hopper", "expert", 2, 0),
        ("hopper", "medium", 2, 0),
    ]
    assert found[0].content_hash == recordings["expert"].content_hash
    assert found[0].steps == recordings["expert"].steps
    assert found[0].path == recording_path("hopper", "expert", 2, 0, root)
    (found[0].path / "data" / "metadata.json").write_text("{")
    with pytest.raises(UserError) as error:
        list_recordings(root)
    one_sentence(error, str(found[0].path), "delete it")


def test_a_description_is_the_distribution_of_returns() -> None:
    task, data = get_task("hopper"), make([10, 20, 30, 40, 50])
    found, returns = describe(data, task), np.sort(data.returns)
    assert (found.task, found.episodes, found.steps, found.mean_length) == ("hopper", 5, 150, 30.0)
    assert (found.return_min, found.return_50, found.return_max) == pytest.approx((returns[0], returns[2], returns[4]))
    assert (found.return_25, found.return_75) == pytest.approx((returns[1], returns[3]))
    assert (found.return_mean, found.return_std) == pytest.approx((returns.mean(), returns.std()))
    assert found.score == pytest.approx(100 * (returns.mean() + 20.272305) / (3234.3 + 20.272305))
    assert found.terminated == data.terminated.sum()
    assert found.content_hash == data.content_hash


# --- Minari -----------------------------------------------------------------------------------------------------------


def test_a_local_minari_dataset_is_found_under_the_root_or_in_minaris_folder(
    recordings: dict[str, Trajectories], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, expected = "mergedt/hopper/expert-e2-s0-v0", recordings["expert"].content_hash
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "elsewhere"))
    assert load_imported(name, "hopper", root).content_hash == expected
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    assert load_imported(name, "hopper").content_hash == expected
    assert load_imported(name, "hopper", tmp_path / "elsewhere").content_hash == expected
    with pytest.raises(UserError, match="observations have 11 dimensions but those of walker2d"):
        load_imported(name, "walker2d", root)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minari, "download_dataset", lambda _: pytest.fail("asked the network"))


def test_offline_a_missing_minari_dataset_says_at_once_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = dict(os.environ)
    with pytest.raises(UserError) as error:
        load_imported("mujoco/hopper/expert-v0", "hopper", tmp_path)
    one_sentence(
        error, "mujoco/hopper/expert-v0", "HF_HUB_OFFLINE", str(tmp_path / "mujoco/hopper/expert-v0"), "record"
    )
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


def test_without_network_it_takes_seconds_not_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a port of this machine where nobody listens."""
    forbid(monkeypatch)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for name in ("HF_HUB_OFFLINE", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "MINARI_REMOTE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        load_imported("mujoco/hopper/expert-v0", "hopper", tmp_path)
    assert time.monotonic() - began < 30  # five retries with pauses take 35
    one_sentence(error, "127.0.0.1 cannot be reached", "connect to the internet")


def test_a_download_arrives_whole_under_the_root(
    recordings: dict[str, Trajectories], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stands in as a copy on disk, put where Minari was told to download to."""
    name, target = "mergedt/hopper/expert-e2-s0-v0", tmp_path / "downloads"
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("MINARI_REMOTE", "gcp://mirror")
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def download(dataset_id: str) -> None:
        shutil.copytree(root / dataset_id, Path(os.environ["MINARI_DATASETS_PATH"]) / dataset_id)

    monkeypatch.setattr(minari, "download_dataset", download)
    assert load_imported(name, "hopper", target).content_hash == recordings["expert"].content_hash
    assert "MINARI_DATASETS_PATH" not in os.environ
    assert [path.name for path in target.iterdir()] == ["mergedt"]

    def fail(dataset_id: str) -> None:
        Path(os.environ["MINARI_DATASETS_PATH"], dataset_id).mkdir(parents=True)
        raise ValueError("the server is on fire\nand more")

    monkeypatch.setattr(minari, "download_dataset", fail)
    with pytest.raises(UserError) as error:
        load_imported("mujoco/hopper/expert-v0", "hopper", target)
    one_sentence(error, "could not download mujoco/hopper/expert-v0 (the server is on fire)")
    assert [path.name for path in target.iterdir()] == ["mergedt"]


@pytest.mark.parametrize("source", ["mujoco/hopper/expert", "../../etc/passwd-v0", "hopper.npz", "", "a b-v0"])
def test_a_source_of_no_known_kind_lists_the_kinds(source: str) -> None:
    with pytest.raises(UserError) as error:
        load_imported(source, "hopper")
    one_sentence(error, ".hdf5", ".pkl", "mujoco/hopper/expert-v0")


# --- D4RL -------------------------------------------------------------------------------------------------------------


def d4rl_rows(steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(steps, 11)).astype(np.float32),
        "next_observations": rng.normal(size=(steps, 11)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        "rewards": rng.normal(size=steps).astype(np.float32),
        "terminals": rng.random(steps) < 0.01,
        "timeouts": rng.random(steps) < 0.01,
    }


def write_hdf5(path: Path, rows: dict[str, Any]) -> str:
    with h5py.File(path, "w") as file:
        for name, array in rows.items():
            file.create_dataset(name, data=array, compression="gzip")
    return str(path)


def split_by_hand(rows: dict[str, np.ndarray], horizon: int) -> list[dict[str, np.ndarray]]:
    """Row by row: an episode ends at a terminal or a timeout (or after `horizon` rows when there are no timeouts)."""
    episodes, begin = [], 0
    for i in range(len(rows["rewards"])):
        out_of_time = rows["timeouts"][i] if "timeouts" in rows else i - begin + 1 == horizon
        if rows["terminals"][i] or out_of_time:
            episodes.append({name: array[begin : i + 1] for name, array in rows.items()})
            begin = i + 1
    return episodes


def assert_equals_by_hand(found: Trajectories, episodes: list[dict[str, np.ndarray]]) -> None:
    assert found.lengths.tolist() == [len(episode["rewards"]) for episode in episodes]
    for name in ("observations", "actions"):
        assert np.array_equal(getattr(found, name), np.concatenate([episode[name] for episode in episodes]))
    assert np.array_equal(found.rewards, np.concatenate([episode["rewards"].ravel() for episode in episodes]))
    assert found.terminated.tolist() == [bool(episode["terminals"].ravel()[-1]) for episode in episodes]


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("timeouts", [True, False])
def test_d4rl_files_are_cut_where_episodes_end(tmp_path: Path, timeouts: bool, shape: tuple[int, ...]) -> None:
    rows = d4rl_rows(5000)
    rows["terminals"][3500:] = False  # leaves room for two cuts at the horizon
    rows["rewards"] = rows["rewards"].reshape(shape)
    if not timeouts:
        del rows["timeouts"]
    found = load_imported(write_hdf5(tmp_path / "hopper-medium-v2.hdf5", rows), "hopper")
    episodes = split_by_hand(rows, 1000)
    assert_equals_by_hand(found, episodes)
    assert found.steps < 5000  # the rows after the last end are dropped
    finals = [episode["next_observations"][-1] for episode in episodes]
    assert np.array_equal(found.final_observations, finals)  # type: ignore[arg-type]
    if not timeouts:
        assert found.lengths.max() == 1000


def test_d4rl_episodes_of_exactly_the_horizon_are_cut_once(tmp_path: Path) -> None:
    rows = d4rl_rows(4000)
    del rows["timeouts"], rows["next_observations"]
    rows["terminals"][:] = False
    rows["terminals"][[1999, 2004]] = True  # falls on its last step; then a short one
    found = load_imported(write_hdf5(tmp_path / "a.h5", rows), "hopper")
    assert found.lengths.tolist() == [1000, 1000, 5, 1000]
    assert found.terminated.tolist() == [False, True, True, False]
    assert found.final_observations is None


def test_damaged_and_foreign_hdf5_files_are_named(tmp_path: Path) -> None:
    good = Path(write_hdf5(tmp_path / "good.hdf5", d4rl_rows(500)))
    damaged = {
        "truncated": good.read_bytes()[: good.stat().st_size // 2],
        "empty": b"",
        "text": b"<html>404 Not Found</html>",
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.hdf5"
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_imported(str(path), "hopper")
        one_sentence(error, str(path), "download it again")
    with pytest.raises(UserError) as error:
        load_imported(write_hdf5(tmp_path / "foreign.hdf5", {"images": np.zeros(3)}), "hopper")
    one_sentence(error, "foreign.hdf5", "no actions and no observations and no rewards and no terminals")
    uneven = d4rl_rows(500) | {"actions": np.zeros((400, 3))}
    with pytest.raises(UserError, match=r"uneven.hdf5"):
        load_imported(write_hdf5(tmp_path / "uneven.hdf5", uneven), "hopper")
    for name in ("timeouts", "next_observations"):
        for rows in (1, 499):
            uneven = d4rl_rows(500)
            uneven[name] = uneven[name][:rows]
            with pytest.raises(UserError) as error:
                load_imported(write_hdf5(tmp_path / "uneven.hdf5", uneven), "hopper")
            one_sentence(error, "uneven.hdf5", f"its arrays have [{rows}, 500] rows")
    endless = d4rl_rows(500) | {"terminals": np.zeros(500, bool), "timeouts": np.zeros(500, bool)}
    with pytest.raises(UserError, match="no complete episode"):
        load_imported(write_hdf5(tmp_path / "endless.hdf5", endless), "hopper")
    with pytest.raises(UserError, match=r"no dataset file .*missing.hdf5"):
        load_imported(str(tmp_path / "missing.hdf5"), "hopper")


# --- pickles ----------------------------------------------------------------------------------------------------------


def pickled_episodes() -> list[dict[str, np.ndarray]]:
    return split_by_hand(d4rl_rows(2000, seed=1), 1000)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    episodes, path = pickled_episodes(), tmp_path / "hopper-medium-v2.pkl"
    path.write_bytes(pickle.dumps(episodes, protocol))
    found = load_imported(str(path), "hopper")
    assert_equals_by_hand(found, episodes)
    finals = [episode["next_observations"][-1] for episode in episodes]
    assert np.array_equal(found.final_observations, finals)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_layout_and_number_are_read(tmp_path: Path, protocol: int) -> None:
    """Fortran order, reversed bytes, read-only, doubles, integers; lists of arrays and scalars."""
    (episode, *_), path = pickled_episodes(), tmp_path / "a.pkl"
    observations, rewards = episode["observations"].copy(), episode["rewards"]
    observations.flags.writeable = False
    varied: dict[str, Any] = {
        "observations": observations,
        "next_observations": list(episode["next_observations"]),
        "actions": np.asfortranarray(episode["actions"].astype(">f8")),
        "rewards": [*rewards[:-1], float(rewards[-1])],
        "terminals": episode["terminals"].astype(np.int64),
        "unread": [np.float64(1.5), np.bool_(True), np.uint8(3)],
    }
    path.write_bytes(pickle.dumps([varied], protocol))
    found = load_imported(str(path), "hopper")
    assert_equals_by_hand(found, [episode])
    assert np.array_equal(found.final_observations, episode["next_observations"][-1:])  # type: ignore[arg-type]


def test_pickles_written_with_numpy_1_are_read(tmp_path: Path) -> None:
    """Their modules had other names, and their dtypes integers for booleans."""
    episodes, path = pickled_episodes(), tmp_path / "a.pkl"
    episodes[0]["actions"] = np.asfortranarray(episodes[0]["actions"])
    modern = pickle.dumps(episodes, 2)
    old = modern.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    booleans, integers = b"\x89\x88\x87", b"K\x00K\x01\x87"  # (…, False, True) and (…, 0, 1)
    assert booleans in old
    old = old.replace(booleans, integers)
    path.write_bytes(old)
    assert_equals_by_hand(load_imported(str(path), "hopper"), episodes)
    path.write_bytes(pickle.dumps(episodes, 5).replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric"))
    assert_equals_by_hand(load_imported(str(path), "hopper"), episodes)


def test_other_containers_and_dones_are_read(tmp_path: Path) -> None:
    episodes = pickled_episodes()
    variants: list[Any] = []
    for i, episode in enumerate(episodes):
        renamed = {("dones" if name == "terminals" else name): value for name, value in episode.items()}
        variants.append(defaultdict(list, renamed) if i % 2 else OrderedDict(renamed))
        variants[-1]["score"] = np.float32(1.5)  # a NumPy scalar
    path = tmp_path / "a.pickle"
    path.write_bytes(pickle.dumps(variants))
    assert_equals_by_hand(load_imported(str(path), "hopper"), episodes)


class Malicious:
    """What it returns is called when it is unpickled, and what that returns is given the state."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_a_malicious_pickle_does_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')"
    attacks = {
        "posix.system": Malicious(os.system, f"touch {mark}"),
        "builtins.exec": Malicious(exec, code),
        "builtins.eval": Malicious(eval, code),
        "builtins.getattr": Malicious(getattr, "text", "upper"),
        "numpy.load": Malicious(np.load, str(mark)),
    }
    for name, attack in attacks.items():
        for protocol in (0, 2, 4):
            path = tmp_path / "bad.pkl"
            path.write_bytes(pickle.dumps([{"observations": np.zeros((1, 11)), "rewards": attack}], protocol))
            with pytest.raises(UserError) as error:
                load_imported(str(path), "hopper")
            one_sentence(error, str(path), "asks for")
            if protocol == 4 and name != "numpy.load":
                assert name in str(error.value)
    assert not mark.exists()
    dotted = b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93."  # protocol 4 would follow the dot
    (tmp_path / "bad.pkl").write_bytes(dotted)
    with pytest.raises(UserError, match=r"asks for numpy.ndarray.dump"):
        load_imported(str(tmp_path / "bad.pkl"), "hopper")


def forged_arrays() -> dict[str, bytes]:
    """Pickles of arrays whose elements, or whose whole memory, lie where the file says."""
    array = Malicious(np.ndarray, (1,), np.dtype("O"), b"AAAAAAAA")
    unflagged = (3, "|", None, ("x",), {"x": (np.dtype("O"), 0)}, 8, 1, 0)  # an object inside, which the flags deny
    element = Malicious(
        np._core.numeric._frombuffer, b"AAAAAAAA", Malicious(np.dtype, "V8", state=unflagged), (1,), "C"
    )
    names = ("observations", "actions", "rewards", "terminals")
    memory = {"__array_interface__": {"data": (4096, True), "shape": (8,), "typestr": "<f4", "version": 3}}
    items = [pickle.dumps(name, 1)[:-1] + b"cnumpy\ndtype\n" + pickle.dumps(memory, 1)[:-1] + b"b" for name in names]
    return {
        "array": pickle.dumps([dict.fromkeys(names, array)]),
        "element": pickle.dumps([dict.fromkeys(names, element)]),
        "memory": b"]}(" + b"".join(items) + b"ua.",
    }


@pytest.mark.parametrize("forgery", forged_arrays())
def test_a_forged_array_is_an_error_and_no_crash(tmp_path: Path, forgery: str) -> None:
    """In a process of its own, which such a file could kill."""
    path = tmp_path / "forged.pkl"
    path.write_bytes(forged_arrays()[forgery])
    program = (
        "import sys\n"
        "from dt.data.sources import load_imported\n"
        "from dt.errors import UserError\n"
        "try:\n"
        "    load_imported(sys.argv[1], 'hopper')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"cannot read {path} as a pickle of the original code (")
    assert ended.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("shape", "data"), [((2, 2), 12), ((2, 2), 20), ((-1, 2), 16), ((2**62, 2), 16), ((0, 2), 16), (4, 16)]
)
def test_an_array_of_another_size_than_its_shape_is_refused(tmp_path: Path, shape: Any, data: int) -> None:
    path = tmp_path / "bad.pkl"
    array = Malicious(np._core.numeric._frombuffer, b"\0" * data, np.dtype("f4"), shape, "C")
    path.write_bytes(pickle.dumps([{"observations": array}]))
    with pytest.raises(UserError) as error:
        load_imported(str(path), "hopper")
    one_sentence(error, str(path), "shape")


def test_a_pickle_cannot_alter_numpys_functions(tmp_path: Path) -> None:
    """BUILD with a pair sets attributes of whatever lies on the stack."""
    before = np._core.numeric._frombuffer.__defaults__
    name = b"\x8c\x13numpy._core.numeric\x8c\x0b_frombuffer\x93"
    state = b"N}\x8c\x0c__defaults__\x8c\x01x\x85s\x86b"
    path = tmp_path / "bad.pkl"
    path.write_bytes(b"\x80\x04" + name + state + b".")
    with pytest.raises(UserError):
        load_imported(str(path), "hopper")
    assert np._core.numeric._frombuffer.__defaults__ == before


def test_damaged_and_foreign_pickles_are_named(tmp_path: Path) -> None:
    good = pickle.dumps(pickled_episodes())
    contents = {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "text": b"<html>",
        "not a list": pickle.dumps({"observations": np.zeros(3)}),
        "list of numbers": pickle.dumps([1, 2]),
        "no episodes": pickle.dumps([]),
        "no rewards": pickle.dumps([{"observations": np.zeros((2, 11)), "actions": np.zeros((2, 3))}]),
        "strings": pickle.dumps([{name: ["a", "b"] for name in ("observations", "actions", "rewards", "terminals")}]),
        "uneven": pickle.dumps([pickled_episodes()[0] | {"actions": np.zeros((1, 3))}]),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_imported(str(path), "hopper")
        one_sentence(error, str(path))


def test_an_episode_whose_arrays_differ_in_length_is_named(tmp_path: Path) -> None:
    """Even when the totals of the file agree."""
    episodes, path = pickled_episodes()[:3], tmp_path / "a.pkl"
    steps = [len(episode["rewards"]) for episode in episodes]
    for name in ("observations", "actions", "rewards"):
        shifted = [dict(episode) for episode in episodes]
        shifted[1][name] = np.concatenate([episodes[1][name], episodes[2][name][:1]])
        shifted[2][name] = episodes[2][name][1:]
        path.write_bytes(pickle.dumps(shifted))
        with pytest.raises(UserError) as error:
            load_imported(str(path), "hopper")
        one_sentence(error, str(path), "episode 1 has", f"{steps[1] + 1} {name}")


def test_every_source_is_validated_against_the_task(tmp_path: Path) -> None:
    rows = d4rl_rows(1000)
    rows["rewards"][7] = np.nan
    with pytest.raises(UserError, match="rewards hold 1 values that are not finite"):
        load_imported(write_hdf5(tmp_path / "a.hdf5", rows), "hopper")
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(pickled_episodes()))
    with pytest.raises(UserError, match="observations have 11 dimensions but those of walker2d"):
        load_imported(str(path), "walker2d")
    assert replace(load_imported(str(path), "hopper")).episodes == len(pickled_episodes())
