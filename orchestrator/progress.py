"""Progress for people: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 15.0  # between two lines, where there is no terminal


class Phase:
    """One kind of work under way: so many units done of so many."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done, self.began = 0, time.monotonic()
        self.first: tuple[int, float] | None = None  # what was done when we first heard of it, and when that was

    def set(self, done: int, note: str = "") -> None:
        """So many are done in all."""
        self.done = min(done, self.total)
        self.first = self.first or (self.done, time.monotonic())
        self._show(note)

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many more are done."""
        self.set(self.done + count, note)

    def say(self, text: str) -> None:
        """A line of its own, that stays."""
        raise NotImplementedError

    def _show(self, note: str) -> None:
        raise NotImplementedError


class _Bar(Phase):
    def __init__(self, name: str, total: int, unit: str, progress: Progress) -> None:
        super().__init__(name, total, unit)
        self._progress, self._task = progress, progress.add_task(name, total=total, unit=unit, note="")

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, soft_wrap=True)

    def _show(self, note: str) -> None:
        self._progress.update(self._task, completed=self.done, note=note)


class _Lines(Phase):
    def __init__(self, name: str, total: int, unit: str, console: Console) -> None:
        super().__init__(name, total, unit)
        self._console, self._shown, self._ended = console, time.monotonic(), False
        console.print(f"{name}: {total:,} {unit}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def _show(self, note: str) -> None:
        now = time.monotonic()
        if self._ended or (now - self._shown < QUIET_SECONDS and self.done < self.total):
            return
        self._shown, self._ended = now, self.done == self.total
        text = f"{self.name}: {self.done:,} of {self.total:,} {self.unit} in {duration(now - self.began)}"
        self._console.print(f"{text}{self._left(now)}{f' ({note})' if note else ''}", highlight=False, soft_wrap=True)

    def _left(self, now: float) -> str:
        """By the pace since the first word of it: a resumed training begins with much of it done."""
        already, since = self.first or (0, now)
        if not already < self.done < self.total:
            return ""
        return f", about {duration((now - since) * (self.total - self.done) / (self.done - already))} left"


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
        yield _Lines(name, total, unit, console)
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
        yield _Bar(name, total, unit, progress)


def duration(seconds: float) -> str:
    """For a reader.

    >>> duration(42), duration(600), duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
