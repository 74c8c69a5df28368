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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from dt.errors import UserError, reason
from dt.files import expanded
from dt.tasks import Task, get_task

_MINARI_ID = re.compile(r"[-\w]+(/[-\w]+)*-v\d+")
AND = " + "  # between the sources of one dataset
_NUMBERS = re.compile(r"[biuf]\d{1,2}")  # NumPy's names for plain dtypes in pickles: "f4"
_D4RL_NEEDED = ("actions", "observations", "rewards", "terminals")
_OFFLINE_TIMEOUT = 3.0  # seconds a connection to the hub may take before we call it unreachable


# --- recorded here ----------------------------------------------------------------------------------------------------


def load_recorded(task: str, quality: str, episodes: int, seed: int, root: Path) -> Trajectories:
    """The dataset recorded under that Minari root; `medium-expert` is the medium recording followed by the expert one.

    Raises UserError when a part is missing, damaged, another than its folder's name says, or was recorded by another
    behaviour policy than the one shipped now.
    """
    parts = [_load_recording(task, part, episodes, seed, root) for part in parts_of(quality)]
    return concatenate(parts) if len(parts) > 1 else parts[0]


def _load_recording(task: str, quality: str, episodes: int, seed: int, root: Path) -> Trajectories:
    path = recording_path(task, quality, episodes, seed, root)
    again = f"delete {path} and record it again"
    if not path.is_dir():
        raise UserError(f"there is no {quality} recording for {task} at {path}: record it first")
    with _reading(path, "as a recording", again):
        metadata = json.loads((path / "data" / "metadata.json").read_text(encoding="utf-8"))
        recorded_by, content_hash = metadata["behaviour_policy"]["sha256"], metadata["content_hash"]
        recorded = metadata["recording"]
    if recorded != {"task": task, "quality": quality, "episodes": episodes, "seed": seed}:
        raise UserError(f"the folder {path} holds another recording than its name says: {again}")
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
    path = expanded(source)
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
        raise UserError(f"cannot read {path} {what} ({reason(error)}): {remedy}") from error


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
    if (obstacle := _unreachable()) is not None:
        raise UserError(f"the Minari dataset {dataset_id} is not on this machine and {obstacle}: {instead}")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
        try:
            with _environment("MINARI_DATASETS_PATH", temporary):
                minari.download_dataset(dataset_id)
        except Exception as error:
            raise UserError(f"Minari could not download {dataset_id} ({reason(error)}): {instead}") from error
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
        return f"{address.hostname} cannot be reached to download it ({reason(error)})"
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
        missing = [name for name in _D4RL_NEEDED if name not in file]
        if missing:
            raise UserError(f"{path} is not a D4RL dataset, it has no {' and no '.join(missing)}: give another file")
        columns = {name: file[name][:] for name in (*_D4RL_NEEDED, "timeouts", "next_observations") if name in file}
        columns |= {name: columns[name].reshape(-1) for name in ("rewards", "terminals", "timeouts") if name in columns}
        if len(lengths := {len(column) for column in columns.values()}) > 1:
            raise UserError(f"{path} is damaged, its arrays have {sorted(lengths)} rows: download it again")
        terminals = columns["terminals"].astype(np.bool_)
        cuts = columns["timeouts"].astype(np.bool_) if "timeouts" in columns else _cuts(terminals, task.horizon)
        ends = np.flatnonzero(terminals | cuts)
        steps = int(ends[-1]) + 1 if len(ends) else 0
        following = columns.get("next_observations")
        return Trajectories(
            observations=columns["observations"][:steps],
            actions=columns["actions"][:steps],
            rewards=columns["rewards"][:steps],
            offsets=np.concatenate([[0], ends + 1]),
            terminated=terminals[ends],
            final_observations=None if following is None else following[ends],
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
        if not isinstance(episodes, list) or not all(isinstance(episode, dict) for episode in episodes):
            raise UserError(
                f"{path} is not a dataset of the original code, which is a list of dicts: give another file"
            )
        if not episodes:
            raise UserError(f"{path} holds no episode: give another file")
        followed = all("next_observations" in episode for episode in episodes)
        return _joined(
            [_plain(episode["observations"]) for episode in episodes],
            [_plain(episode["actions"]) for episode in episodes],
            [np.reshape(_plain(episode["rewards"]), -1) for episode in episodes],
            [np.reshape(_plain(episode[_ended(episode)]), -1)[-1] for episode in episodes],
            [_plain(episode["next_observations"])[-1] for episode in episodes] if followed else None,
        )


def _ended(episode: Mapping[str, Any]) -> str:
    """What an episode calls its ends."""
    return "terminals" if "terminals" in episode else "dones"


class _Kind:
    """Stands in for a NumPy dtype, of plain numbers or booleans only."""

    __slots__ = ("dtype",)

    def __init__(self, spec: Any, *_: Any) -> None:
        if not isinstance(spec, str) or not _NUMBERS.fullmatch(spec):
            raise pickle.UnpicklingError(f"it holds an array of {str(spec)[:20]!r}, which is no kind of number")
        self.dtype: np.dtype[Any] = np.dtype(spec)

    def __setstate__(self, state: Any) -> None:
        """Of a dtype's state, the byte order; the rest could forge what its elements are."""
        _, order, *_ = state
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("it holds an array of unknown byte order")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for a NumPy array or scalar, and holds its numbers once they have come."""

    __slots__ = ("numbers",)

    def __init__(self) -> None:
        self.numbers: npt.NDArray[Any] = np.zeros(0)

    @classmethod
    def of(cls, kind: Any, data: Any, shape: Any, order: Any) -> "_Array":
        """An array of exactly these bytes."""
        if not isinstance(kind, _Kind) or not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError("it holds an array without its kind of number or its bytes")
        if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise pickle.UnpicklingError("it holds an array whose shape is not one")
        array = cls()
        array.numbers = np.frombuffer(data, kind.dtype).reshape(shape, order=order)  # refuses too few and too many
        return array

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        self.numbers = _Array.of(kind, data, shape, "F" if fortran else "C").numbers


def _plain(value: Any) -> Any:
    """A number, an array or lists of them, out of what the pickle built.

    Nothing else may reach NumPy, which would ask it for its `__array_interface__`: where in memory to read.
    """
    if isinstance(value, _Array):
        return value.numbers
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, int | float):
        return value
    raise ValueError(f"it holds a {type(value).__name__} where numbers should be")


class _ArraysOnly(pickle.Unpickler):
    """Builds `_Kind` and `_Array` in lists and dicts. Any other global is refused before it is even imported.

    NumPy's own types are kept from the pickle: with them it could make arrays of pointers. Functions are handed out as
    fresh ones of our own, so that a crafted pickle can alter nothing else (BUILD sets attributes of whatever lies on
    the stack).
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): "numpy.ndarray",  # only ever handed to `_reconstruct`
            ("numpy", "dtype"): lambda *spec: _Kind(*spec),
            ("_codecs", "encode"): lambda text, *_: str.encode(text, "latin1"),  # bytes, in protocols 0 to 2
            ("collections", "defaultdict"): lambda *_: {},
            ("collections", "OrderedDict"): lambda *pairs: dict(*pairs),
            ("builtins", "list"): list,
            ("builtins", "dict"): dict,
        }
        for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
            allowed[f"{core}.multiarray", "_reconstruct"] = lambda *_: _Array()
            allowed[f"{core}.multiarray", "scalar"] = lambda kind, data: _Array.of(kind, data, (), "C")
            allowed[f"{core}.numeric", "_frombuffer"] = lambda data, kind, shape, order: _Array.of(
                kind, data, shape, order
            )
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
    """Trajectories of one array an episode. Raises ValueError when the arrays do not fit together."""
    columns = [[np.asarray(part, np.float32) for part in parts] for parts in (observations, actions, rewards)]
    for episode, arrays in enumerate(zip(*columns, strict=True)):
        seen, acted, rewarded = (len(array) for array in arrays)
        if not seen == acted == rewarded:
            raise ValueError(f"episode {episode} has {seen} observations, {acted} actions and {rewarded} rewards")
    return Trajectories(
        observations=np.concatenate(columns[0]),
        actions=np.concatenate(columns[1]),
        rewards=np.concatenate(columns[2]),
        offsets=np.cumsum([0, *(len(part) for part in columns[2])]),
        terminated=np.array([bool(flag) for flag in terminated]),
        final_observations=None
        if final_observations is None
        else np.stack([np.asarray(o) for o in final_observations]),
    )
