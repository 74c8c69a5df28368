"""Mistakes a user can make, each said in one sentence that names what to change."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

EXIT_STATUS = 2  # of a program that a `UserError` ends


class UserError(Exception):
    """Something only the user can mend. The command line prints the message alone and leaves with `EXIT_STATUS`."""


def unknown(kind: str, given: str, valid: Iterable[str]) -> UserError:
    """The error for a name that does not exist, suggesting the nearest ones that do.

    >>> str(unknown("task", "hoper", ["hopper", "walker2d"]))
    "unknown task 'hoper': did you mean 'hopper'? Valid are hopper, walker2d"
    >>> str(unknown("sampler", "foo", ["grid"]))
    "unknown sampler 'foo': valid are grid"
    """
    names = sorted(set(valid))
    near = get_close_matches(given, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? Valid" if near else "valid"
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return UserError(f"unknown {kind} {given!r}: {hint} are {shown or 'none'}")


def sentence(error: ValidationError) -> str:
    """The first mistake pydantic found, as one sentence."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    text = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" ({given!r} given)" if isinstance(given, str | int | float) else ""
    return f"{where}: {text}{shown}" if where else text


def reason(error: Exception) -> str:
    """Why something failed, short enough to stand in brackets: pydantic's first mistake, else the first line of the
    message."""
    from pydantic import ValidationError  # heavy, and seldom needed

    if isinstance(error, ValidationError):
        return sentence(error)
    first = (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".")
    return first if len(first) <= 200 else f"{first[:199]}…"
