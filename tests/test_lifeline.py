"""A head that is gone ends the run with a sentence; one that is not up yet is not missed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.witness import processes

ROOT = Path(__file__).parents[1]
ALONE = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
CODE = """
import ctypes, sys, time
from orchestrator.lifeline import lifeline
from orchestrator.witness import witnessed
with witnessed(silence=3.0) as witness, lifeline('the head', lambda: sys.argv[1] or None, 1.5, witness):
    time.sleep(1.5)  # the first word
    print("watched", flush=True)
    (time if sys.argv[3] == "free" else ctypes.PyDLL(None)).sleep(int(sys.argv[2]))
print("through")
"""


def watching(address: str, seconds: int, python: str = "free") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CODE, address, str(seconds), python],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_head_that_is_gone_ends_the_run_with_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        process = watching(address, 600)
        assert process.stdout is not None
        assert process.stdout.readline() == "watched\n"
    said, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said == ""
    assert told == (
        f"mergedt: the head at {address} is gone (of memory? with its machine?): run the same command again to go on\n"
    )


def test_a_run_that_is_stuck_in_c_when_its_head_is_gone_is_ended_by_its_witness() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        process = watching(f"127.0.0.1:{head.getsockname()[1]}", 600, python="locked")
        assert process.stdout is not None
        assert process.stdout.readline() == "watched\n"
    _, told = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert told.startswith("mergedt: the run ended without a word (killed? of memory? by Ray, or stuck in it")


def test_a_run_that_says_nothing_for_a_while_but_has_its_head_goes_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        process = watching(f"127.0.0.1:{head.getsockname()[1]}", 8, python="locked")
        said, told = process.communicate(timeout=60)
    assert (process.returncode, said, told) == (0, "watched\nthrough\n", "")


def test_a_head_that_answers_or_is_not_there_yet_ends_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        watched = [watching(f"127.0.0.1:{head.getsockname()[1]}", 3), watching("", 3)]
        for process in watched:
            said, told = process.communicate(timeout=60)
            assert (process.returncode, told) == (0, "")
            assert said == "watched\nthrough\n"


@contextmanager
def embedded() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that starts a Ray and stays; the folder of that, as soon as its head is up."""
    code = """if True:
        from orchestrator.session import connect
        with connect('local', cpus=1):
            import os, ray
            actor = ray.remote(type('Actor', (), {'process': lambda self: os.getpid()})).remote()
            print(ray.get(actor.process.remote()), flush=True)
            input()
    """
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ALONE,
    )
    try:
        deadline = time.monotonic() + 300
        while not (ports := list(Path("/tmp").glob(f"mergedt-ray-{run.pid}-*/session_2*/gcs_server_port_*"))):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield run, ports[0].parents[1]
    finally:
        run.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("up", "program", "what"),
    [(False, b"gcs_server", "the head of Ray"), (True, b"raylet/raylet", "this run's node of Ray")],
)
def test_an_embedded_ray_that_falls_apart_is_missed(up: bool, program: bytes, what: str) -> None:
    """While Ray starts it would wait for its head for a minute, then end the process without a word of ours; without
    its node it waits for ever."""
    with embedded() as (run, folder):
        if up:
            assert run.stdout is not None
            run.stdout.readline()
        (victim,) = (process for process, command in processes(str(folder)) if program in command.split(b"\0")[0])
        os.kill(victim, signal.SIGKILL)
        assert run.wait(timeout=300) == 2
        assert run.stderr is not None
        assert run.stderr.read().splitlines()[-1].startswith(f"mergedt: {what} at ")
        assert processes(str(folder)) == []


@pytest.mark.slow
def test_for_a_run_that_is_killed_a_witness_speaks_and_tidies_up() -> None:
    with embedded() as (run, folder):
        assert run.stdout is not None
        actor = Path("/proc") / run.stdout.readline().strip()
        assert actor.exists()
        run.kill()
        assert run.stderr is not None
        said = run.stderr.read()  # to the end of all that run under it
        assert said.splitlines()[-1].startswith("mergedt: the run ended without a word")
        assert processes(str(folder)) == []
        deadline = time.monotonic() + 10
        while actor.exists():  # a process that was killed takes a moment to leave
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert not folder.exists()


@pytest.mark.slow
def test_termination_while_ray_starts_is_an_interruption_that_leaves_nothing() -> None:
    """Ray, which takes the signal for itself there, would leave with a status of its own."""
    with embedded() as (run, folder):
        run.terminate()
        assert run.wait(timeout=120) in (-signal.SIGINT, 128 + signal.SIGINT)  # what Python does of KeyboardInterrupt
        assert processes(str(folder)) == []
        assert not folder.exists()


@pytest.mark.slow
def test_a_ray_that_cannot_start_is_given_up_at_once() -> None:
    code = "from orchestrator.session import connect\nwith connect('local', cpus=-1): pass"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=ALONE, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "UserError: Ray does not start on this machine (ValueError: " in done.stderr
