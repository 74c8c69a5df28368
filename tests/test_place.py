"""Results in a folder and in an object store: a real S3 server, and machines that share nothing else."""

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from pyarrow.fs import FileSystem
from rich.console import Console
from toy import TASKS, evaluation, expert, recording, shared
from typer.testing import CliRunner

from dt.behaviour.record import write_recording
from dt.data.sources import load_recorded
from dt.errors import UserError
from orchestrator import place as places
from orchestrator.cli import app
from orchestrator.engine import Settings, run
from orchestrator.making import begin
from orchestrator.place import VARIABLE, Folder, Mirror, Place, place_of
from orchestrator.recipes import Evaluate
from orchestrator.session import check_visible
from orchestrator.store import Store
from orchestrator.tables import Tables
from orchestrator.training import Lane, _Attempts, commit_outcome, train_lane
from orchestrator.witness import answers

CREATING = "&allow_bucket_creation=true"
SERVER = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app))
"""


@pytest.fixture(scope="module")
def bucket(credentials: None) -> Iterator[str]:  # noqa: ARG001
    """The address of an object store; `{}` stands for a place in it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http{CREATING}"
    deadline = time.monotonic() + 120
    while not answers(f"127.0.0.1:{port}"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    filesystem, name = FileSystem.from_uri(f"s3://results?{options}")
    filesystem.create_dir(name)
    yield f"s3://results/{{}}?{options}"
    server.kill()
    server.wait()


@pytest.fixture
def machines(credentials: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: ARG001
    """A function that moves this process, and those it starts, to another machine's mirrors."""

    def move(name: str) -> None:
        monkeypatch.setenv(VARIABLE, str(tmp_path / name))

    move("first")
    return move


@pytest.fixture(params=["folder", "object store"])
def two(request: pytest.FixtureRequest, tmp_path: Path, machines) -> tuple[Place, Place]:
    """One place, as two machines see it."""
    if request.param == "folder":
        return place_of(tmp_path / "shared"), place_of(tmp_path / "shared")
    address = request.getfixturevalue("bucket").format(tmp_path.name)
    here = place_of(address)
    machines("second")
    return here, place_of(address)


def test_what_one_writes_another_reads(two):
    here, there = two
    file = Path("tables", "runs", "a.parquet")
    assert here.put(here.root / file, b"first", keep=True)
    assert not here.put(here.root / file, b"second", keep=True)
    assert there.exists(there.root / file)
    assert not there.exists(there.root / "tables" / "runs")
    there.fetch(there.root / file)
    assert (there.root / file).read_bytes() == b"first"
    there.fetch(there.root / "nothing")
    assert here.put(here.root / file, b"third!")
    there.fetch(there.root / "tables")
    assert (there.root / file).read_bytes() == b"third!"


def test_folders_are_pushed_found_and_removed(two):
    here, there = two
    for name in ("one", "two"):
        (here.root / "artefacts" / name).mkdir(parents=True)
        for file in ("policy.safetensors", ".half.tmp"):
            (here.root / "artefacts" / name / file).write_text(name)
    here.push(here.root / "artefacts")
    found = there.find(there.root / "artefacts", ["policy.safetensors", "fisher.safetensors"])
    assert sorted(path.parent.name for path in found) == ["one", "two"]
    there.fetch_named(there.root, ["policy.safetensors"])
    assert (there.root / "artefacts" / "one" / "policy.safetensors").read_text() == "one"
    here.remove(here.root / "artefacts" / "one")
    here.remove(here.root / "artefacts" / "one")  # no more
    there.pull(there.root / "artefacts")
    assert [path.name for path in (there.root / "artefacts").glob("*/policy*")] == ["policy.safetensors"]
    assert not there.exists(there.root / "artefacts" / "one" / "policy.safetensors")
    assert not (here.root / "artefacts" / "one").exists()


def test_the_address_is_the_same_on_all_machines_and_paths_are_not(two):
    here, there = two
    assert here.address == there.address
    if isinstance(here, Mirror):
        assert here.root != there.root
        assert here.address_at("training/.ray").split("?")[0].endswith("/training/.ray")
        assert place_of(Path(here.address)) == there  # a Path has one slash less


def test_what_is_the_same_is_not_brought_again(bucket, machines, tmp_path):
    here = place_of(bucket.format(tmp_path.name))
    here.put(here.root / "tables" / "a", b"content")
    machines("second")
    there = place_of(here.address)
    there.pull(there.root / "tables")
    before = (there.root / "tables" / "a").stat().st_ino
    there.pull(there.root / "tables")
    assert (there.root / "tables" / "a").stat().st_ino == before
    there.put(there.root / "tables" / "a", b"another one")
    here.pull(here.root / "tables")
    assert (here.root / "tables" / "a").read_bytes() == b"another one"


def test_one_writer_at_a_time(bucket, machines, tmp_path, monkeypatch):
    here = place_of(bucket.format(tmp_path.name))
    machines("second")
    there = place_of(here.address)
    with here.lease(), pytest.raises(UserError, match=rf"another mergedt \(process {os.getpid()} on .* is computing"):
        there.lease().__enter__()
    with there.lease():  # given back
        pass
    code = (
        "import sys; from orchestrator.place import *\nwith place_of(sys.argv[1]).lease(): print(flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, here.address], **pipes) as killed:
        killed.stdout.readline()
        here.pull(here.root / ".claims")
        (claim,) = (here.root / ".claims").iterdir()
        with pytest.raises(UserError, match=f"process {killed.pid} on "):
            there.lease().__enter__()
        killed.kill()
    with there.lease():
        assert not here.exists(claim)
    here.put(claim, f"{killed.pid} on {os.uname().nodename}\nof the same name".encode())
    with pytest.raises(UserError, match=f"process {killed.pid} on "):
        there.lease().__enter__()
    monkeypatch.setattr(places, "LEASE_SECONDS", 1.0)
    time.sleep(2.5)  # an object store's clock may count in seconds
    with there.lease():
        pass


@pytest.mark.usefixtures("machines")
def test_a_claim_is_renewed(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(places, "LEASE_SECONDS", 2.0)
    here = place_of(bucket.format(tmp_path.name))
    with here.lease():
        time.sleep(4.0)
        with pytest.raises(UserError, match="is computing"):
            here.lease().__enter__()


@pytest.mark.parametrize("address", ["https://host/x", "ftp://host/x"])
def test_an_address_that_cannot_hold_results_is_refused(address):
    with pytest.raises(UserError, match="results live in a folder or an object store"):
        Store(address)


@pytest.mark.usefixtures("machines")
def test_who_names_no_bucket_is_told(bucket):
    place = place_of(bucket.format("x").replace("//results/", "//no-such-bucket/").removesuffix(CREATING))
    with pytest.raises(UserError, match=r"cannot use s3://no-such-bucket/x.*check the address"):
        place.put(place.root / "a", b"")


# --- the whole line ---------------------------------------------------------------------------------------------------


def asked() -> list[Evaluate]:
    """Two trainings, two estimates, two fine-tunings, three evaluations."""
    return [evaluation(expert("hopper")), *(evaluation(shared(), task) for task in TASKS)]


@pytest.mark.slow
def test_a_run_in_an_object_store_is_the_run_in_a_folder(bucket, machines, finished, tmp_path):
    address = bucket.format(tmp_path.name)
    run(asked(), Settings(results=address, threads=1), Console(file=io.StringIO()))
    machines("second")  # which has nothing but the address
    out = io.StringIO()
    assert run(asked(), Settings(results=address), Console(file=out)).empty
    assert out.getvalue() == "nothing to compute: all 3 evaluations are stored\n"
    store = Store(address)
    tables, reference = store.open_tables(), Tables(finished / "tables")
    for table, key in (("episodes", "evaluation"), ("policies", "policy")):
        mine, theirs = tables.read(table), reference.read(table)
        assert mine.equals(theirs.filter(pc.is_in(theirs[key], mine[key].combine_chunks())))
    assert tables.done("episodes") == {one.id for one in asked()}
    mine, theirs = (each.load_policy(expert("hopper")).arrays() for each in (store, Store(finished)))
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert store.unfinished() == frozenset()
    tables.compact()
    machines("third")
    asking = ["query", "select count(*) as n from episodes", "--format", "csv", "--results", address]
    done = CliRunner().invoke(app, asking)
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == ['"n"', str(2 * len(asked()))]
    assert not list((Store(address).tables / "episodes").glob("*"))  # compacted, and one file was brought


@pytest.mark.slow
def test_a_training_goes_on_on_another_machine(bucket, machines, finished, tmp_path):
    recipe, data = expert("hopper"), recording("hopper")
    store = Store(bucket.format(tmp_path.name))
    of = (data.task, data.quality, data.episodes, data.seed)
    store.place.push(write_recording(load_recorded(*of, finished / "datasets"), *of, store.datasets))
    config = asdict(Lane((recipe.model_dump_json(),), store.address, threads=1, gpu=False, checkpoint_seconds=0.0))
    begun = begin(recipe, store, "cpu")
    begun.advance(100)
    folder = store.training_path(recipe)
    begun.save(folder / "state.safetensors")
    log = b'{"metrics": [{"step": 50}, {"step": 100}], "started": "2026-01-01T00:00:00+00:00", "seconds": 7.0}'
    store.place.put(folder / "log.json", log)
    store.place.push(folder)
    machines("second")
    assert train_lane(config) == {}
    machines("third")  # the driver's
    driver = Store(store.address)
    tables = driver.open_tables()
    assert not commit_outcome(recipe, driver, tables, print)  # not known here yet
    driver.fetch_notes()
    assert driver.unfinished() == {recipe.id}
    assert commit_outcome(recipe, driver, tables, print)
    assert driver.stored() == {recipe.id}
    (ran,) = tables.read("runs")["seconds"].to_pylist()
    assert ran > 7.0  # it went on
    mine, theirs = (each.load_policy(recipe).arrays() for each in (driver, Store(finished)))
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    driver.fetch_notes()
    assert driver.unfinished() == frozenset()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session", "machines")
def test_nodes_are_asked_whether_they_see_it(bucket, tmp_path):
    for place in (Folder(tmp_path / "shared"), place_of(bucket.format(tmp_path.name))):
        check_visible(place)
        assert not [path for path in place.root.rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_node_that_sees_nothing_is_named_with_its_reason(tmp_path):
    class Elsewhere(Folder):
        """A place whose address means another folder to everyone else."""

        @property
        def address(self) -> str:
            return str(tmp_path / "theirs")

    with pytest.raises(UserError, match=r"the node \S+ of the Ray cluster cannot .*No such file.*--results"):
        check_visible(Elsewhere(tmp_path / "mine"))


def test_a_mistake_that_another_machine_forgot_is_not_told_again(bucket, machines, tmp_path):
    """The worker's mirror still has the books of a run before, which the driver of the next one closed."""
    recipe, worker = expert("hopper"), Store(bucket.format(tmp_path.name))
    _Attempts(1, ("died",), "the disk was full").write(worker, recipe)
    machines("second")
    _Attempts.forget(Store(worker.address), recipe)
    assert _Attempts.read(worker, recipe) == _Attempts()
