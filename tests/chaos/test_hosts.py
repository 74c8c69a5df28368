"""Several nodes: the rows are those of one machine, also when a node is lost; who has no token stays outside."""

import subprocess
from pathlib import Path
from shutil import which

import pytest
from attack import PATIENCE, check_equal, program


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), [("nodes", "killed"), ("namespaces", "cut off")])
def test_a_lost_node_changes_no_row_and_a_stranger_is_refused(
    finished: Path, tmp_path: Path, kind: str, how: str
) -> None:
    if kind == "namespaces" and not _may_make_namespaces():
        pytest.skip("network namespaces take root and iproute2")
    hosts = program("hosts.py", tmp_path / "results", kind)
    done = subprocess.run(**hosts, capture_output=True, text=True, timeout=3 * PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    stranger, lost, *runs = done.stdout.splitlines()
    assert stranger.startswith("stranger: status 2: mergedt: cannot reach the Ray cluster at")
    assert lost == f"a node {how}, another added"
    assert runs[-1].startswith("run: status 0")
    assert check_equal(tmp_path / "results", finished) > 0


def _may_make_namespaces() -> bool:
    made = subprocess.run(["unshare", "--net", "ip", "link"], capture_output=True, check=False) if which("ip") else None
    return made is not None and made.returncode == 0
