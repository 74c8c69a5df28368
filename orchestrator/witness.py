"""Someone to speak for a run that ends without a word: killed, or by Ray's C++, which exits where its node is gone.

Run as a program, which imports nothing of ours, it waits beside a run for a farewell or for its end.
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
    """A process beside this one that tells the user if it ends within the block, and ends what is left of its Ray.

    folder: of that Ray, if it is our own. Yields the farewell, for who leaves the process from within.
    """
    command = [sys.executable, "-I", __file__]  # without the folder, by which that Ray's processes are found
    witness = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # out of the reach of Ctrl-C
    assert witness.stdin is not None
    pipe = witness.stdin
    pipe.write(f"{folder or ''}\n".encode())
    pipe.flush()

    def farewell() -> None:
        with suppress(OSError, ValueError):  # it was killed; it has been said
            pipe.write(_FAREWELL.encode())
            pipe.close()

    try:
        yield farewell
    finally:
        farewell()
        witness.wait()


def tell(message: str) -> None:
    """Say a last word of this program."""
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
    """End what is left of the Ray in that folder: of a start that failed, or the detached actors of Train."""
    for pid, _ in processes(str(folder)):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _main() -> None:
    folder, _, farewell = sys.stdin.read().partition("\n")
    if farewell:
        return
    with suppress(OSError):  # its terminal is gone, too
        tell("the run ended without a word (killed? of memory? by Ray, when its node was gone?)")
    if folder:
        end_processes(Path(folder))
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main()
