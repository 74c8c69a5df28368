"""Noticing that a run has lost its Ray. Of a head that is gone Ray tells nobody and aborts a minute later with a C++
stack; without the node that the run is connected to, what waits for a place to start waits for ever."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dt.errors import EXIT_STATUS
from orchestrator.witness import Witness, answers, tell

_PERIOD_SECONDS = 1.0


@contextmanager
def lifeline(what: str, address: Callable[[], str | None], patience: float, witness: Witness) -> Iterator[None]:
    """Leave the process with a sentence once nobody has answered there for that many seconds.

    what: the head of a cluster, say, without which calls to Ray neither return nor raise, so that there is no one to
    tell by an exception; and nothing is lost, for what was computed is committed at once. address: host:port, None as
    long as there is none to be missed. witness: ends what is left of it; and this process, where a call into C++ holds
    Python's lock for ever, so that nobody here can leave.
    """
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(what, address, patience, witness, over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        witness.say(what)


def _watch(
    what: str, address: Callable[[], str | None], patience: float, witness: Witness, over: threading.Event
) -> None:
    heard = time.monotonic()
    while not over.wait(_PERIOD_SECONDS):
        witness.say(what, where := address() or "")
        if not where or answers(where):
            heard = time.monotonic()
        elif time.monotonic() - heard > patience:
            tell(f"{what} at {where} is gone (of memory? with its machine?)")
            witness.farewell()
            os._exit(EXIT_STATUS)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM, as a scheduler sends it, end the block as Ctrl-C does.

    Ray, once it is up, takes the signal for itself in C++, to print a stack and be gone: then it takes another.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)
