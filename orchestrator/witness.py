"""Someone to tidy up after a run, and to speak for one that ends without a word: killed, or by Ray's C++, which exits
where its node is gone.

Run as a program, which imports nothing of ours, it waits beside a run for its end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FAREWELL = "farewell"
_SHOW_CURSOR = "\x1b[?25h\n"  # below a progress bar, which had hidden it


@contextmanager
def witnessed(folder: Path | None = None) -> Iterator[Callable[[], None]]:
    """A process beside this one that ends what is left of its Ray after the block, and tells the user should this one
    end within it.

    folder: of that Ray, if it is our own. Yields the farewell, for who leaves the process from within.
    """
    command = [sys.executable, "-I", __file__]  # without the folder, by which that Ray's processes are found
    witness = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # out of the reach of Ctrl-C
    assert witness.stdin is not None
    pipe = witness.stdin

    def farewell() -> None:
        with suppress(OSError, ValueError):  # the witness was killed; it has been said
            pipe.write(_FAREWELL.encode())
            pipe.close()

    try:
        with suppress(OSError):  # the witness was killed
            pipe.write(f"{folder or ''}\n".encode())
            pipe.flush()
        yield farewell
    finally:
        farewell()
        witness.wait()


def tell(message: str) -> None:
    """Say a last word of this program, if there is anyone to hear it."""
    with suppress(OSError, AttributeError):
        cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
        print(f"{cursor}mergedt: {message}: run the same command again to go on", file=sys.stderr, flush=True)


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


def _parents() -> dict[int, int]:
    """Process → its parent."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def _main() -> None:
    for meant_for_the_run in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(meant_for_the_run, signal.SIG_IGN)
    folder, _, farewell = sys.stdin.read().partition("\n")
    if folder:
        end_processes(Path(folder))
        shutil.rmtree(folder, ignore_errors=True)
    if not farewell:
        tell("the run ended without a word (killed? of memory? by Ray, when its node was gone?)")


if __name__ == "__main__":
    _main()
