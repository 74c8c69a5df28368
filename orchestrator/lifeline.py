"""Noticing that the head of a Ray cluster is gone: Ray tells nobody, and aborts a minute later with a C++ stack."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PERIOD_SECONDS = 1.0
_ANSWER_SECONDS = 5.0
_SHOW_CURSOR = "\x1b[?25h\n"  # below a progress bar, which had hidden it
EXIT_STATUS = 2


@contextmanager
def lifeline(address: str, patience: float, farewell: Callable[[], None]) -> Iterator[None]:
    """Leave the process with a sentence once nobody has answered at the head's address (host:port) for that long.

    Without a head, calls to Ray neither return nor raise, so there is no one to tell by an exception; and nothing is
    lost, for what was computed is committed at once. farewell: called before leaving, to end what is left of it.
    """
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(address, patience, farewell, over), daemon=True)
    if answers(address):  # else it is behind a proxy, and its silence means nothing
        watcher.start()
    try:
        yield
    finally:
        over.set()
        if watcher.ident:
            watcher.join()


def answers(address: str) -> bool:
    """Whether someone takes a connection there; a process too busy to serve it still does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def _watch(address: str, patience: float, farewell: Callable[[], None], over: threading.Event) -> None:
    heard = time.monotonic()
    while not over.wait(_PERIOD_SECONDS):
        if answers(address):
            heard = time.monotonic()
        elif time.monotonic() - heard > patience:
            cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
            print(
                f"{cursor}mergedt: the head of Ray at {address} is gone (of memory? with its machine?): "
                "run the same command again to go on",
                file=sys.stderr,
                flush=True,
            )
            farewell()
            os._exit(EXIT_STATUS)
