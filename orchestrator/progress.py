"""Progress for people: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 15.0  # between two lines, where there is no terminal


class Screen(Protocol):
    """Where a kind of work is seen."""

    def show(self, done: int, note: str) -> None:
        """So many units are done in all."""
        ...

    def say(self, text: str) -> None:
        """A line of its own, that stays."""
        ...


class Phase:
    """One kind of work under way: so many units done of so many."""

    def __init__(self, total: int, screen: Screen) -> None:
        self._done, self._total, self._screen = 0, total, screen

    def set(self, done: int, note: str = "") -> None:
        """So many are done in all."""
        self._done = min(done, self._total)
        self._screen.show(self._done, note)

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many more are done."""
        self.set(self._done + count, note)

    def say(self, text: str) -> None:
        """A line of its own, that stays."""
        self._screen.say(text)


class _Bar:
    """On a terminal."""

    def __init__(self, name: str, total: int, unit: str, progress: Progress) -> None:
        self._progress, self._task = progress, progress.add_task(name, total=total, unit=unit, note="")

    def show(self, done: int, note: str) -> None:
        self._progress.update(self._task, completed=done, note=note)

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, soft_wrap=True)


class _Lines:
    """In a log: a line now and then, and one at the end."""

    def __init__(self, name: str, total: int, unit: str, console: Console) -> None:
        self._name, self._total, self._unit, self._console = name, total, unit, console
        self._began = self._shown = time.monotonic()
        self._first: tuple[int, float] | None = None  # what was done when we first heard of it, and when that was
        self._ended = False
        self.say(f"{name}: {total:,} {unit}")

    def show(self, done: int, note: str) -> None:
        now = time.monotonic()
        self._first = self._first or (done, now)
        if self._ended or (now - self._shown < QUIET_SECONDS and done < self._total):
            return
        self._shown, self._ended = now, done == self._total
        text = f"{self._name}: {done:,} of {self._total:,} {self._unit} in {duration(now - self._began)}"
        self.say(f"{text}{self._left(done, now)}{f' ({note})' if note else ''}")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def _left(self, done: int, now: float) -> str:
        """By the pace since the first word of it: a resumed training begins with much of it done."""
        already, since = self._first or (0, now)
        if not already < done < self._total:
            return ""
        return f", about {duration((now - since) * (self._total - done) / (done - already))} left"


class Pace:
    """How long the rest of several parts takes: as estimated, and as much longer or shorter as those before it took."""

    def __init__(self, estimates: Sequence[float]) -> None:
        """Seconds of each part."""
        self._estimates, self._began = estimates, time.monotonic()

    def left(self, done: int) -> float:
        """Seconds, when so many parts are done."""
        expected = sum(self._estimates[:done])
        slower = (time.monotonic() - self._began) / expected if expected else 1.0
        return sum(self._estimates[done:]) * slower


@contextmanager
def phase(console: Console, name: str, total: int, unit: str) -> Iterator[Phase]:
    """Show one kind of work while the block runs."""
    if not console.is_terminal:
        yield Phase(total, _Lines(name, total, unit, console))
        return
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        yield Phase(total, _Bar(name, total, unit, progress))


def duration(seconds: float) -> str:
    """For a reader.

    >>> duration(42), duration(600), duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
