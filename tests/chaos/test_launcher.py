"""`cluster-onprem.yaml`, really started and used: `ray up`, `exec`, `submit`, and `ray job submit` beside them.

ssh and rsync are stand-ins that stay on this machine (`bin/`). Of the file are changed: the address, the ports, how the
package gets there (this environment instead of a new one), and `ray stop`, which would end every other Ray here.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from attack import PATIENCE

from orchestrator.tables import Tables
from orchestrator.witness import end_processes

ROOT = Path(__file__).parents[2]
BIN = Path(sys.prefix, "bin")
DEMO = "run demo --profile smoke --results"


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


class Launcher:
    """Ray's command line as a user has it before the machines of `file`."""

    def __init__(self, folder: Path, session: Path) -> None:
        self.home, self.remote = folder / "home", folder / "remote"
        port, self.dashboard, agent = free_ports(3)
        own = f"--port={port} --dashboard-port={self.dashboard} --dashboard-agent-listen-port={agent}"
        text = (ROOT / "cluster-onprem.yaml").read_text().replace("--port=6379", own).replace(":6379", f":{port}")
        config = yaml.safe_load(text.replace(own, f"{own} --num-cpus=2 --temp-dir={session}"))
        config |= {"cluster_name": f"mergedt-{port}", "min_workers": 0, "max_workers": 0}
        config["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
        config["file_mounts"]["~/mergedt"] = str(ROOT)
        install = config["setup_commands"].index("cd ~/mergedt && make venv")
        config["setup_commands"][install] = f"ln -sfn {sys.prefix} ~/mergedt/.venv"
        config["head_start_ray_commands"] = [each for each in config["head_start_ray_commands"] if "stop" not in each]
        self.file = folder / "cluster.yaml"
        self.file.write_text(yaml.safe_dump(config))
        key = self.home / ".ssh" / "id_ed25519"
        key.parent.mkdir(parents=True)
        key.touch()
        self.remote.mkdir()
        self.ray("get-auth-token", "--generate")

    def ray(self, *words: str | Path) -> str:
        """What a command says; fails with it when it fails."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_"))}
        environment = kept | {
            "HOME": str(self.home),
            "REMOTE_HOME": str(self.remote),
            "PATH": f"{Path(__file__).parent / 'bin'}:{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [BIN / "ray", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, umask=0o077
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{words}: {said[-3000:]}"
        return said


@pytest.fixture
def session() -> Iterator[Path]:
    """Ray's folder of that cluster, short because of its sockets; what runs there ends with it."""
    folder = Path(tempfile.mkdtemp(prefix="mergedt-launcher-", dir="/tmp"))
    yield folder
    end_processes(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.chaos
@pytest.mark.slow
def test_the_on_premise_file_starts_a_cluster_that_runs_our_commands(session: Path, tmp_path: Path) -> None:
    launcher, results = Launcher(tmp_path, session), tmp_path / "results"
    launcher.ray("up", "-y", "--no-config-cache", launcher.file)
    assert (launcher.remote / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    launcher.ray("exec", launcher.file, f"mergedt {DEMO} {results}")
    assert len(Tables(results / "tables").done("episodes")) == 6
    again = launcher.ray("submit", launcher.file, "orchestrator/__main__.py", "--", *DEMO.split(), str(results))
    assert "nothing to compute: all 6 evaluations are stored" in again
    between = "mergedt sweep --target walker2d --source halfcheetah --group attention --alpha 0.25 --profile smoke"
    address = f"http://127.0.0.1:{launcher.dashboard}"
    submit = ("job", "submit", "--address", address, "--working-dir", ".", "--")
    launcher.ray(*submit, *between.split(), "--results", str(results))
    assert len(Tables(results / "tables").done("episodes")) == 7
    drivers = list(session.glob("session_2*/logs/python-core-driver-*.log"))
    assert len(drivers) >= 2  # exec's and the job's: neither in a Ray of its own
