"""Connecting to Ray: a configured cluster, else RAY_ADDRESS, else an embedded Ray that ends with the run."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dt.errors import UserError
from orchestrator.lifeline import lifeline, terminable
from orchestrator.place import Place, place_of
from orchestrator.witness import answers, end_processes, processes, witnessed

_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output engine prints boxes even when silenced
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no five log files for each trial: our tables are the log
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the run; Tune's handler would only stop scheduling
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's snapshots are never restored: resume is plan minus store
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": "300000",  # a busy laptop needs more than the 30 s after which a node gives up …
    "RAY_worker_register_timeout_seconds": "300",  # … and the 60 s that it gives a worker
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default, and it silences a warning
}
_FOLDER = "mergedt-ray"
HEAD, NODE = "the head of Ray", "this run's node of Ray"
PATIENCE_SECONDS = 900.0  # for an embedded Ray that is slow to start
AT_ONCE_SECONDS, QUICK_FAILURES = 10.0, 3  # for one that cannot: Ray's own patience is 30 s
ANSWER_SECONDS = 300.0  # of a node that is asked whether it sees the results
HEAD_PATIENCE_SECONDS = 45.0  # with a cluster's head that may be started again; Ray itself gives up after 60
EMBEDDED_PATIENCE_SECONDS = 10.0  # nobody starts that one again, but a network may be away for a moment


class Node(NamedTuple):
    """What a machine of the cluster has."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Session:
    """A live connection. embedded: to a Ray of our own on this machine, which ends with the run; nodes: those included
    that an autoscaler may add."""

    embedded: bool
    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> int:
        """Of all nodes."""
        return max(1, sum(node.cpus for node in self.nodes))

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return sum(node.gpus for node in self.nodes)


@contextmanager
def connect(address: str | None = None, *, cpus: int | None = None) -> Iterator[Session]:
    """Connect to Ray for the length of the block, or use the connection there is; ends only what it started.

    cpus: of an embedded Ray, all of the machine's when None. Raises UserError when the cluster cannot be reached.
    """
    where = address_of(address)
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        prepare(new_cluster=where == "local")
    import ray

    from orchestrator.messages import explain

    if ray.is_initialized():
        yield _session(embedded=False)
        return
    try:
        with terminable(), _embedded(cpus) if where == "local" else _connected(where) as session:
            yield session
    except ray.exceptions.RayError as error:
        raise UserError(f"the run failed in Ray: {explain(error)}") from error


def address_of(given: str | None) -> str:
    """Where Ray runs; `local` is an embedded one. Raises UserError when no run can go there."""
    where = given or os.environ.get("RAY_ADDRESS") or "local"
    if where.startswith("ray://"):
        raise UserError(f"{where} is an address of Ray's client: give host:port, or run the command on the cluster")
    return where


@contextmanager
def _embedded(cpus: int | None) -> Iterator[Session]:
    """A Ray of our own, which ends with the block."""
    import ray

    with own_folder() as folder, witnessed(folder) as witness:
        try:
            with lifeline(HEAD, partial(_embedded_head, folder), EMBEDDED_PATIENCE_SECONDS, witness):
                with _tamed():
                    _start(folder, cpus)
                with terminable():
                    _silence(folder)
                    with lifeline(NODE, _now(_node()), EMBEDDED_PATIENCE_SECONDS, witness):
                        yield _session(embedded=True)
        finally:
            ray.shutdown()


@contextmanager
def _connected(where: str) -> Iterator[Session]:
    """The Ray that runs there."""
    import ray

    with witnessed() as witness:
        try:
            with _tamed():
                ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            raise UserError(
                f"cannot reach the Ray cluster at {where}: check that it runs and that this machine has its token "
                "(~/.ray/auth_token or RAY_AUTH_TOKEN; for a cluster without one, RAY_AUTH_MODE=disabled)"
            ) from error
        try:
            with terminable():
                head, node = _now(str(ray.get_runtime_context().gcs_address)), _now(_node())
                with (
                    lifeline(HEAD, head, HEAD_PATIENCE_SECONDS, witness),
                    lifeline(NODE, node, HEAD_PATIENCE_SECONDS, witness),
                ):
                    yield _session(embedded=False)
        finally:
            ray.shutdown()


def _start(folder: Path, cpus: int | None) -> None:
    """Start an embedded Ray.

    Ray gives its node 30 seconds to come up. On a busy machine it needs more: as long as the node is still starting it
    is waited for and then joined; if it gave up, another is started. What fails at once, thrice, is not slow.
    """
    import ray

    from orchestrator.messages import explain

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    deadline, at_once = time.monotonic() + PATIENCE_SECONDS, 0
    while True:
        began = time.monotonic()
        try:
            # Without a dashboard, which is ten processes: what Ray Train wants it for, the end of the run does as well.
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=str(folder), **quiet)
            return
        except Exception as error:
            reason = error
        at_once += time.monotonic() - began < AT_ONCE_SECONDS
        while time.monotonic() < deadline and any(b"raylet/raylet" in command for _, command in processes(str(folder))):
            if head := _embedded_head(folder):
                with suppress(Exception):
                    ray.init(address=head, **quiet)
                    return
            time.sleep(1)
        for port in _ports(folder):  # this head is not missed
            port.unlink()
        end_processes(folder)
        if time.monotonic() > deadline or at_once == QUICK_FAILURES:
            raise UserError(
                f"Ray does not start on this machine ({explain(reason)}): mend that, or wait till it is less busy, and "
                "run the same command again"
            ) from reason


def _now(address: str) -> Callable[[], str | None]:
    """The address, if it answers now; else it is behind a proxy, and its silence means nothing."""
    found = address if answers(address) else None
    return lambda: found


def _node() -> str:
    """Address of the node that this process is connected to."""
    import ray

    mine = ray.get_runtime_context().get_node_id()
    (node,) = (each for each in ray.nodes() if each["NodeID"] == mine)  # type: ignore[no-untyped-call]
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def _embedded_head(folder: Path) -> str | None:
    """Address of the head of the Ray that lives there; None as long as it is not up."""
    import ray

    for path in reversed(_ports(folder)):
        with suppress(OSError):  # it is being given up
            return f"{ray.util.get_node_ip_address()}:{path.read_text().strip()}"  # type: ignore[no-untyped-call]
    return None


def _ports(folder: Path) -> list[Path]:
    return sorted(folder.glob("session_2*/gcs_server_port_*"))


def _silence(folder: Path) -> None:
    """End the log monitor, which polls every log ten times a second for a driver that shows none of them."""
    for process, command in processes(str(folder)):
        if b"log_monitor.py" in command:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)


@contextmanager
def _tamed() -> Iterator[None]:
    """Change Ray in two ways while it starts, by functions private to it that are put back; where they have gone, Ray
    starts as ever.

    It believes that the dashboard's packages are missing. An embedded Ray's agents then start in a third of the time;
    they are needed by nothing here, and where they take over half a minute the node gives up. And it does not take
    SIGTERM for itself in Python, either, on which it would wait and leave without a word.
    """
    from ray._private import utils

    ours: dict[str, Callable[..., object]] = {
        "get_dashboard_dependency_error": lambda: "not wanted",
        "set_sigterm_handler": lambda _: None,
    }
    theirs = {name: getattr(utils, name) for name in ours if hasattr(utils, name)}
    for name in theirs:
        setattr(utils, name, ours[name])
    try:
        yield
    finally:
        for name, former in theirs.items():
            setattr(utils, name, former)


def vanishes(folder: Path) -> bool:
    """Whether a folder is in the copy of a working directory that a Ray job is given, which goes when the job ends."""
    return "working_dir_files" in folder.parts  # where Ray's runtime environments put it


def check_visible(place: Place) -> None:
    """Refuse a place that some node of the cluster does not see: its training actors could not keep their checkpoints.

    The driver writes a mark and a task on every node reads it and writes beside it. Raises UserError naming the nodes.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mark, secret = place.root / f".visible-{secrets.token_hex(8)}", secrets.token_hex(16)
    place.put(mark, secret.encode())
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        on = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        see = ray.remote(num_cpus=0, max_retries=1)(_see)
        asked = [see.options(scheduling_strategy=where).remote(place.address, mark.name) for where in on]
        ray.wait(asked, num_returns=len(asked), timeout=ANSWER_SECONDS)
        said = [_answer(reference) for reference in asked]
    finally:
        place.remove(mark)
    blind = {node["NodeManagerAddress"]: why for node, why in zip(nodes, said, strict=True) if why != secret}
    if blind:
        raise UserError(
            f"the node{'s' * (len(blind) > 1)} {', '.join(sorted(blind))} of the Ray cluster cannot read and write "
            f"{place.address} ({blind[min(blind)]}): give a folder that all nodes share with --results, or "
            "s3://bucket/prefix"
        )


def _answer(reference: Any) -> str:
    import ray

    from orchestrator.messages import explain

    try:
        return str(ray.get(reference, timeout=0))
    except ray.exceptions.GetTimeoutError:
        return f"no answer in {ANSWER_SECONDS:.0f} s"
    except ray.exceptions.RayError as error:
        return explain(error)


def _see(results: str, name: str) -> str:
    """In a Ray task: what the mark says, or why it cannot be read or nothing be written beside it."""
    place = place_of(results)
    mark, mine = place.root / name, place.root / f"{name}-{secrets.token_hex(4)}"
    try:
        place.fetch(mark)
        said = mark.read_text()
        place.put(mine, b"")
        place.remove(mine)
    except (OSError, UserError) as error:
        return str(error)
    return said


def _session(*, embedded: bool) -> Session:
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    addable = [] if embedded else _addable_nodes(alive)
    return Session(embedded, (*(_node_with(node["Resources"]) for node in alive), *addable))


def _node_with(resources: Mapping[str, float]) -> Node:
    return Node(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def _addable_nodes(alive: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Those that the cluster's autoscaler may add to the ones that live; none where it has no autoscaler.

    From a private module of Ray: the public interface knows only nodes that run, and a cluster that scales down to its
    head would never be seen to have a GPU.
    """
    import ray

    try:
        config = ray._private.state.state.get_cluster_config()
        groups = list(config.node_group_configs) if config else []
        running = Counter(node["Labels"].get("ray.io/node-group") for node in alive)
    except Exception:  # another version of Ray, or a cluster that keeps it to itself
        return []
    # Its least are running or about to. (Nodes of Ray's first autoscaler do not say of which group they are.)
    left = [group.max_count - max(group.min_count, running[group.name]) for group in groups]
    return [_node_with(group.resources) for group, count in zip(groups, left, strict=True) for _ in range(count)]


def prepare(*, new_cluster: bool) -> None:
    """Set what Ray reads before it starts or connects.

    Token authentication is said explicitly: what Ray does by default depends on what ran on this machine before.
    """
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    if new_cluster and not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        _make_token()
    if "ray" in sys.modules:  # it read the mode when it was imported, and reads it again as its own switch makes it do
        from ray._raylet import Config  # type: ignore[attr-defined]

        Config.initialize("")


def _make_token() -> None:
    """A token for the clusters of this user, unless there is one; Ray itself would make it readable for everyone."""
    token = secrets.token_hex(32)
    try:
        path = Path.home() / ".ray" / "auth_token"
        if path.is_file():
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
    except FileExistsError:  # another process was first
        return
    except (OSError, RuntimeError):  # no home that can be written, as in many containers
        os.environ["RAY_AUTH_TOKEN"] = token


@contextmanager
def own_folder() -> Iterator[Path]:
    """A short path, for Ray's sockets may have 107 bytes, removed afterwards; and those of killed runs with it."""
    parent = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
    for leftover in parent.glob(f"{_FOLDER}-*-*"):
        if not _alive(leftover.name.split("-")[-2]):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
