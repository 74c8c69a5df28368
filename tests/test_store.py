"""The store: whole or not at all, whatever happens to the disk or the process."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from toy import expert

from dt.errors import UserError
from dt.files import write_atomically
from dt.model.decision_transformer import DecisionTransformer
from dt.model.policy import Policy
from dt.tasks import get_task
from orchestrator.recipes import Train
from orchestrator.store import Store

ROOT = Path(__file__).parents[1]


def fresh_policy(recipe: Train, seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    return DecisionTransformer(recipe.architecture, [get_task(recipe.task)], 0.0).policy()


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_policy_comes_back_with_its_recipe_in_the_header(tmp_path):
    store, recipe = Store(tmp_path), expert("hopper")
    policy = fresh_policy(recipe)
    path = store.save(recipe, policy)
    assert path == tmp_path / "artefacts" / recipe.id / "policy.safetensors"
    loaded = store.load_policy(recipe).arrays()
    assert loaded.keys() == policy.arrays().keys()
    assert all((loaded[name] == array).all() for name, array in policy.arrays().items())
    with safe_open(path, framework="np") as file:
        assert file.metadata()["recipe"] == recipe.canonical_json()
    assert store.stored() == {recipe.id}
    assert not list(tmp_path.glob("**/.*"))


def test_a_truncated_policy_is_named(tmp_path):
    store, recipe = Store(tmp_path), expert("hopper")
    path = store.save(recipe, fresh_policy(recipe))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{path}.*delete it and run the same command again"):
        store.load_policy(recipe)


def test_a_policy_under_the_wrong_name_is_refused(tmp_path):
    store, hopper, other = Store(tmp_path), expert("hopper"), expert("hopper", steps=7)
    path = store.save(hopper, fresh_policy(hopper))
    store.path(other).parent.mkdir()
    store.path(other).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=f"holds what recipe {hopper.id}"):
        store.load_policy(other)


def test_a_finished_training_is_adopted_once_and_again_after_a_kill_in_between(tmp_path):
    store, recipe = Store(tmp_path), expert("hopper")
    assert store.adopt_trained(recipe) is None
    store.save_trained(recipe, fresh_policy(recipe), {"metrics": [1.5]})
    assert store.unfinished() == {recipe.id}
    assert store.adopt_trained(recipe) == {"metrics": [1.5]}
    assert store.has(recipe)
    assert store.adopt_trained(recipe) == {"metrics": [1.5]}  # killed before its rows were written
    store.discard_training(recipe)
    assert store.unfinished() == frozenset()
    store.load_policy(recipe)


def test_a_recording_that_was_cut_off_is_swept_away_and_others_stay(tmp_path):
    store = Store(tmp_path)
    for name in (".recording-x1", "mergedt/hopper"):
        (store.datasets / name / "data").mkdir(parents=True)
        (store.datasets / name / "data" / "main_data.hdf5").write_bytes(b"half")
    store.sweep()
    assert [path.name for path in store.datasets.iterdir()] == ["mergedt"]
    assert (store.datasets / "mergedt" / "hopper" / "data" / "main_data.hdf5").exists()


def test_writing_killed_at_any_moment_leaves_whole_files_only(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from dt.files import write_atomically
        folder, first = Path(sys.argv[1]), int(sys.argv[2])
        print("ready", flush=True)
        for i in range(first, 10**6):
            write_atomically(folder / f"{i}.bin", str(i).encode() * 200_000, keep=i % 2 == 0)
    """
    first = 0
    for attempt in range(6):
        process = python(code, tmp_path, first)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.07 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        written = sorted(tmp_path.glob("*.bin"), key=lambda path: int(path.stem))
        assert [int(path.stem) for path in written] == list(range(len(written)))
        assert all(path.read_bytes() == path.stem.encode() * 200_000 for path in written)
        first = len(written)
    assert first > 0
    (tmp_path / "tables").mkdir()
    for leftover in tmp_path.glob(".*.tmp"):
        leftover.rename(tmp_path / "tables" / leftover.name)
    Store(tmp_path).sweep()
    assert not list(tmp_path.glob("**/.*.tmp"))


def test_the_first_writer_wins_where_files_are_kept(tmp_path):
    path = tmp_path / "folder" / "file"
    assert write_atomically(path, b"first", keep=True)
    assert not write_atomically(path, b"second", keep=True)
    assert path.read_bytes() == b"first"
    assert write_atomically(path, b"third")
    assert path.read_bytes() == b"third"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    """A limit on file size stands in for the disk where the test may not mount one; the kernel's answer is as final."""
    code = """
        import resource, sys
        from pathlib import Path
        from dt.errors import UserError
        from dt.files import write_atomically
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write_atomically(Path(sys.argv[1], "table.parquet"), bytes(10**6))
        except UserError as error:
            print(error)
    """
    out, errors = python(code, tmp_path).communicate(timeout=600)
    assert "no space left to write" in out, errors
    assert "table.parquet" in out
    assert list(tmp_path.iterdir()) == []


def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount a small disk here")
    try:
        store, recipe = Store(disk), expert("hopper")
        with pytest.raises(UserError, match=r"no space left|No space left"):
            store.save(recipe, fresh_policy(recipe))
        assert not store.has(recipe)
        with pytest.raises(UserError, match=r"no space left to write .* make room and run the same command again"):
            write_atomically(disk / "tables" / "rows.parquet", bytes(10**6))
        assert [path for path in disk.glob("**/*") if path.is_file()] == []
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(UserError, match=r"may not write .* give another place \(as with --results\)"):
            write_atomically(disk / "rows.parquet", b"")
        with pytest.raises(UserError, match="may not write"), store.lock():
            pass
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match="results is a file"), Store(tmp_path / "results").lock():
        pass


def test_one_writer_at_a_time_until_it_ends(tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from orchestrator.store import Store
        with Store(Path(sys.argv[1])).lock():
            print("locked", flush=True)
            time.sleep(600)
    """
    holder = python(code, tmp_path)
    assert holder.stdout.readline() == "locked\n"
    said = f"another mergedt .process {holder.pid} on .* is computing into {tmp_path}"
    with pytest.raises(UserError, match=said), Store(tmp_path).lock():
        pass
    holder.kill()
    holder.wait()
    with Store(tmp_path).lock():
        assert json.dumps((tmp_path / ".lock").read_text()).startswith(f'"{os.getpid()} on ')
