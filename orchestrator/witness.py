"""Someone to tidy up after a run, and to speak for one that cannot: killed, ended by Ray's C++, or stuck in it.

Run as a program, which imports nothing of ours, it waits beside a run for its end.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SILENCE_SECONDS = 30.0  # of a run that says every second that it lives: it may be suspended, or stuck in C++
_ANSWER_SECONDS = 5.0
_FOLDER, _FAREWELL = "folder", "farewell"  # all other subjects are what has to answer
_SHOW_CURSOR = "\x1b[?25h\n"  # below a progress bar, which had hidden it


@dataclass(frozen=True)
class Witness:
    """Our end of the line to the process beside this one. What is said of a subject replaces what was said before."""

    pipe: IO[bytes]

    def say(self, subject: str, value: str = "") -> None:
        """An address that this process cannot live without, by what answers there; none, by an empty one."""
        with suppress(OSError):  # the witness was killed
            self.pipe.write(f"{subject}\t{value}\n".encode())
            self.pipe.flush()

    def farewell(self) -> None:
        """This process ends, and has said why."""
        self.say(_FAREWELL)


@contextmanager
def witnessed(folder: Path | None = None, silence: float = SILENCE_SECONDS) -> Iterator[Witness]:
    """A process beside this one that ends what is left of its Ray after the block, and tells the user should this one
    end within it, or get stuck for want of an answer.

    folder: of that Ray, if it is our own. silence: seconds without a word after which what should answer is asked.
    """
    command = [sys.executable, "-I", __file__, str(silence)]  # without the folder, by which Ray's processes are found
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # out of the reach of Ctrl-C
    assert process.stdin is not None
    witness = Witness(process.stdin)
    try:
        if folder:
            witness.say(_FOLDER, str(folder))
        yield witness
    finally:
        witness.farewell()
        with suppress(OSError):
            process.stdin.close()
        process.wait()


def tell(message: str) -> None:
    """Say a last word of this program, if there is anyone to hear it."""
    with suppress(OSError, AttributeError):
        cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
        print(f"{cursor}mergedt: {message}: run the same command again to go on", file=sys.stderr, flush=True)


def answers(address: str) -> bool:
    """Whether someone takes a connection there; a process too busy to serve it still does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def processes(mark: str) -> list[tuple[int, bytes]]:
    """Id and command of the processes whose command contains that: the folder of a Ray, say, or an actor's name."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            command = (process / "cmdline").read_bytes()
            if mark.encode() in command:
                found.append((int(process.name), command))
    return found


def end_processes(folder: Path) -> None:
    """End what is left of the Ray in that folder, with the children, whose commands Ray overwrites."""
    parents, found = _parents(), {process for process, _ in processes(str(folder))}
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    for process in found:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)


def stat(process: int) -> list[str]:
    """State, parent, group, session and more of a process, as Linux tells them after its name."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _parents() -> dict[int, int]:
    """Process → its parent."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found[int(process.name)] = int(stat(int(process.name))[1])
    return found


def _listen(silence: float, run: int) -> dict[str, str]:
    """What was said last of each subject, once the run has ended; which is made to, if it is stuck."""
    said, rest = dict[str, str](), b""
    while True:
        if select.select([sys.stdin], [], [], silence)[0]:
            if not (more := os.read(sys.stdin.fileno(), 65536)):
                return said
            *lines, rest = (rest + more).split(b"\n")
            said |= dict(line.decode().split("\t") for line in lines)
        elif any(where and not answers(where) for what, where in said.items() if what not in (_FOLDER, _FAREWELL)):
            with suppress(OSError):
                os.kill(run, signal.SIGKILL)


def _main() -> None:
    run = os.getppid()
    for meant_for_the_run in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(meant_for_the_run, signal.SIG_IGN)
    said = _listen(float(sys.argv[1]), run)
    if folder := said.get(_FOLDER):
        end_processes(Path(folder))
        shutil.rmtree(folder, ignore_errors=True)
    if _FAREWELL not in said:
        tell("the run ended without a word (killed? of memory? by Ray, or stuck in it, when its node was gone?)")


if __name__ == "__main__":
    _main()
