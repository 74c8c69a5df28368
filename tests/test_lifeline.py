"""A head that is gone ends the run with a sentence; one that never answered is not missed."""

import socket
import subprocess
import sys
from pathlib import Path

CODE = """
import sys, time
from orchestrator.lifeline import lifeline
with lifeline(sys.argv[1], 1.5, lambda: print("farewell", flush=True)):
    print("watched", flush=True)
    time.sleep(float(sys.argv[2]))
print("through")
"""


def watching(address: str, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CODE, address, str(seconds)],
        cwd=Path(__file__).parents[1],
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
    assert said == "farewell\n"
    assert told == (
        f"mergedt: the head of Ray at {address} is gone (of memory? with its machine?): "
        "run the same command again to go on\n"
    )


def test_a_head_that_answers_or_never_did_ends_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head, socket.create_server(("127.0.0.1", 0)) as other:
        silent = f"127.0.0.1:{other.getsockname()[1]}"
        other.close()
        watched = [watching(f"127.0.0.1:{head.getsockname()[1]}", 3), watching(silent, 3)]
        for process in watched:
            said, told = process.communicate(timeout=60)
            assert (process.returncode, told) == (0, "")
            assert said == "watched\nthrough\n"
