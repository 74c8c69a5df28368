"""Where offline data comes from: recorded here, a Minari dataset, a D4RL HDF5 file, or a pickle of the original code.

Whatever is wrong with a file is said in one sentence that names it and the remedy; nothing a file holds is ever
executed.
"""

import json
import os
import pickle
import re
import socket
import tempfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import h5py
import minari
import numpy as np
import numpy.typing as npt

from dt.behaviour.policy import load_behaviour_policy
from dt.behaviour.record import parts_of, recording_path
from dt.data.trajectories import Trajectories, concatenate
from dt.errors import UserError
from dt.tasks import Task, get_task

_MINARI_ID = re.compile(r"[-\w]+(/[-\w]+)*-v\d+")
AND = " + "  # between the sources of one dataset
_OFFLINE_TIMEOUT = 3.0  # seconds a connection to the hub may take before we call it unreachable


# --- recorded here ----------------------------------------------------------------------------------------------------


def load_recorded(task: str, quality: str, episodes: int, seed: int, root: Path) -> Trajectories:
    """The dataset recorded under that Minari root; `medium-expert` is the medium recording followed by the expert one.

    Raises UserError when a part is missing, damaged, or was recorded by another behaviour policy than the one shipped
    now.
    """
    parts = [
        _load_recording(task, part, recording_path(task, part, episodes, seed, root)) for part in parts_of(quality)
    ]
    return concatenate(parts) if len(parts) > 1 else parts[0]


def _load_recording(task: str, quality: str, path: Path) -> Trajectories:
    again = f"delete {path} and record it again"
    if not path.is_dir():
        raise UserError(f"there is no {quality} recording for {task} at {path}: record it first")
    with _reading(path, "as a recording", again):
        metadata = json.loads((path / "data" / "metadata.json").read_text(encoding="utf-8"))
        recorded_by, content_hash = metadata["behaviour_policy"]["sha256"], metadata["content_hash"]
    if recorded_by != load_behaviour_policy(task, quality).digest:
        raise UserError(
            f"the recording at {path} was made by another behaviour policy than the {quality} one of now: {again}"
        )
    trajectories = _read_minari(path, again)
    if trajectories.content_hash != content_hash:
        raise UserError(
            f"the recording at {path} is damaged, its content hash is not the one it was written with: {again}"
        )
    return trajectories.validate(get_task(task))


# --- recorded by others -----------------------------------------------------------------------------------------------


def load_imported(source: str, task: str, root: Path | None = None) -> Trajectories:
    """A dataset that others recorded.

    `source` is a path to D4RL's `.hdf5` (`.h5`) or to the original code's `.pkl` (`.pickle`), or a Minari id such as
    `mujoco/hopper/expert-v0`. An id is looked up under `root`, then in Minari's own folder, and downloaded to the first
    of these that applies when neither has it. Several joined by ` + ` follow each other. Raises UserError when the
    source cannot be found, fetched or read, or does not fit the task.
    """
    if AND in source:
        return concatenate([load_imported(part, task, root) for part in source.split(AND)])
    settings = get_task(task)
    match Path(source).suffix.lower():
        case ".hdf5" | ".h5":
            trajectories = _read_d4rl(_existing(source), settings)
        case ".pkl" | ".pickle":
            trajectories = _read_pickle(_existing(source))
        case _ if _MINARI_ID.fullmatch(source):
            trajectories = _load_minari(source, root)
        case _:
            raise UserError(
                f"cannot tell what dataset {source!r} is: give a path to a .hdf5 (D4RL) or .pkl (original code) file, "
                "or a Minari id with its version such as mujoco/hopper/expert-v0"
            )
    return trajectories.validate(settings)


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"there is no dataset file {path}: check the path")
    return path


@contextmanager
def _reading(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged or foreign file into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _sentence(error) or "nothing more is known"
        raise UserError(f"cannot read {path} {what} ({reason}): {remedy}") from error


def _sentence(error: BaseException) -> str:
    """The first line of an error's message, short enough to stand in a sentence."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".")
    return first if len(first) <= 200 else f"{first[:199]}…"


# --- Minari -----------------------------------------------------------------------------------------------------------


def _load_minari(dataset_id: str, root: Path | None) -> Trajectories:
    roots = [*([root] if root else []), _minari_root()]
    local = next((path for path in (folder / dataset_id for folder in roots) if (path / "data").is_dir()), None)
    path = local or _download(dataset_id, roots[0])
    return _read_minari(path, f"delete {path} and import it again")


def _read_minari(path: Path, remedy: str) -> Trajectories:
    """All episodes of the Minari dataset in that folder."""
    with _reading(path, "as a Minari dataset", remedy):
        episodes = list(minari.MinariDataset(path / "data").iterate_episodes())
        if not episodes:
            raise UserError(f"the dataset at {path} holds no episode: {remedy}")
        return _joined(
            [episode.observations[:-1] for episode in episodes],
            [episode.actions for episode in episodes],
            [episode.rewards for episode in episodes],
            [episode.terminations[-1] for episode in episodes],
            [episode.observations[-1] for episode in episodes],
        )


def _minari_root() -> Path:
    """Minari's own rule, without its side effect of making the folder."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def _download(dataset_id: str, root: Path) -> Path:
    """Fetch a dataset from Minari's server into `root`: whole or not at all."""
    instead = (
        f"connect to the internet, or copy the dataset's folder to {root / dataset_id}, or record one here from "
        "the shipped behaviour policies"
    )
    if (reason := _unreachable()) is not None:
        raise UserError(f"the Minari dataset {dataset_id} is not on this machine and {reason}: {instead}")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
        try:
            with _environment("MINARI_DATASETS_PATH", temporary):
                minari.download_dataset(dataset_id)
        except Exception as error:
            raise UserError(f"Minari could not download {dataset_id} ({_sentence(error)}): {instead}") from error
        path = root / dataset_id
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(temporary, dataset_id).rename(path)
    return path


def _unreachable() -> str | None:
    """Why Minari's server cannot be asked, found within seconds: its own retries take 35 and end in a traceback."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE forbids to download it"
    if any(name.lower() in {"https_proxy", "all_proxy"} for name in os.environ):
        return None  # only the proxy knows
    if not os.environ.get("MINARI_REMOTE", "hf://").startswith("hf://"):
        return None  # another server than the one below
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "huggingface.co", port), timeout=_OFFLINE_TIMEOUT).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached to download it ({_sentence(error)})"
    return None


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable set for a while: the only way to tell Minari where to download to."""
    former = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if former is None:
            del os.environ[name]
        else:
            os.environ[name] = former


# --- D4RL HDF5 --------------------------------------------------------------------------------------------------------


def _read_d4rl(path: Path, task: Task) -> Trajectories:
    """Flat arrays cut where an episode ends; the rows after the last end are a cut episode and dropped, as everywhere.

    Files of v0 have no `timeouts`: an episode that did not end by then was cut at the horizon.
    """
    with _reading(path, "as a D4RL HDF5 file", "download it again"), h5py.File(path, "r") as file:
        missing = {"observations", "actions", "rewards", "terminals"} - file.keys()
        if missing:
            raise UserError(
                f"{path} is not a D4RL dataset, it has no {' and no '.join(sorted(missing))}: give another file"
            )
        observations, actions = file["observations"][:], file["actions"][:]
        rewards, terminals = file["rewards"][:].reshape(-1), file["terminals"][:].reshape(-1).astype(np.bool_)
        timeouts = file["timeouts"][:].reshape(-1).astype(np.bool_) if "timeouts" in file else None
        if len(lengths := {len(observations), len(actions), len(rewards), len(terminals)}) > 1:
            raise UserError(f"{path} is damaged, its arrays have {sorted(lengths)} rows: download it again")
        ends = np.flatnonzero(terminals | (_cuts(terminals, task.horizon) if timeouts is None else timeouts))
        steps = int(ends[-1]) + 1 if len(ends) else 0
        following = file.get("next_observations")
        return Trajectories(
            observations=observations[:steps],
            actions=actions[:steps],
            rewards=rewards[:steps],
            offsets=np.concatenate([[0], ends + 1]),
            terminated=terminals[ends],
            final_observations=None if following is None else following[:][ends],
        )


def _cuts(terminals: npt.NDArray[np.bool_], horizon: int) -> npt.NDArray[np.bool_]:
    """Where a time limit of `horizon` steps ended an episode, when only the terminals are known."""
    step = np.arange(len(terminals))
    last_end = np.maximum.accumulate(np.where(terminals, step, -1))
    elapsed = step - np.concatenate([[-1], last_end[:-1]])  # 1 at the first step after a terminal
    cuts: npt.NDArray[np.bool_] = elapsed % horizon == 0
    return cuts


# --- the original code's pickles --------------------------------------------------------------------------------------


def _read_pickle(path: Path) -> Trajectories:
    """A list of one dict an episode: observations, actions, rewards, terminals (or dones), next_observations."""
    with _reading(path, "as a pickle of the original code", "download it again"):
        with path.open("rb") as file:
            episodes = _ArraysOnly(file).load()
        if not isinstance(episodes, list) or not all(isinstance(episode, Mapping) for episode in episodes):
            raise UserError(
                f"{path} is not a dataset of the original code, which is a list of dicts: give another file"
            )
        if not episodes:
            raise UserError(f"{path} holds no episode: give another file")
        followed = all("next_observations" in episode for episode in episodes)
        return _joined(
            [episode["observations"] for episode in episodes],
            [episode["actions"] for episode in episodes],
            [np.reshape(episode["rewards"], -1) for episode in episodes],
            [np.reshape(episode["terminals" if "terminals" in episode else "dones"], -1)[-1] for episode in episodes],
            [episode["next_observations"][-1] for episode in episodes] if followed else None,
        )


class _ArraysOnly(pickle.Unpickler):
    """Opens pickles of NumPy arrays in lists and dicts. Any other global is refused before it is even imported.

    Functions are handed out as fresh ones of our own, so that a crafted pickle can neither call nor alter one of
    NumPy's.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): lambda spec, *_: np.dtype(spec),
            ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),  # bytes, in protocols 0 to 2
            ("collections", "defaultdict"): defaultdict,
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "list"): list,
            ("builtins", "dict"): dict,
        }
        for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
            allowed[f"{core}.multiarray", "_reconstruct"] = lambda _type, shape, dtype: np.ndarray(shape, dtype)
            allowed[f"{core}.multiarray", "scalar"] = lambda dtype, data: np.frombuffer(data, dtype)[0]
            allowed[f"{core}.numeric", "_frombuffer"] = lambda data, dtype, shape, order: np.frombuffer(
                data, dtype
            ).reshape(shape, order=order)
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs, so nothing of it was run")
        return allowed[module, name]


# --- common -----------------------------------------------------------------------------------------------------------


def _joined(
    observations: Sequence[npt.ArrayLike],
    actions: Sequence[npt.ArrayLike],
    rewards: Sequence[npt.ArrayLike],
    terminated: Iterable[Any],
    final_observations: Sequence[npt.ArrayLike] | None,
) -> Trajectories:
    """Trajectories of one array an episode; the shapes are checked where they meet."""
    return Trajectories(
        observations=np.concatenate([np.asarray(part, np.float32) for part in observations]),
        actions=np.concatenate([np.asarray(part, np.float32) for part in actions]),
        rewards=np.concatenate([np.asarray(part, np.float32) for part in rewards]),
        offsets=np.cumsum([0, *(len(np.asarray(part)) for part in rewards)]),
        terminated=np.array([bool(flag) for flag in terminated]),
        final_observations=None
        if final_observations is None
        else np.stack([np.asarray(o) for o in final_observations]),
    )
