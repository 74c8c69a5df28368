"""Mistakes a user can make, each said in one sentence that names what to change."""

from collections.abc import Iterable
from difflib import get_close_matches

EXIT_STATUS = 2  # of a program that a `UserError` ends


class UserError(Exception):
    """Something only the user can mend. The command line prints the message alone and leaves with `EXIT_STATUS`."""


def unknown(kind: str, given: str, valid: Iterable[str]) -> UserError:
    """The error for a name that does not exist, suggesting the nearest ones that do.

    >>> str(unknown("task", "hoper", ["hopper", "walker2d"]))
    "unknown task 'hoper': did you mean 'hopper'? (valid: hopper, walker2d)"
    """
    names = sorted(valid)
    near = get_close_matches(given, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return UserError(f"unknown {kind} {given!r}: {hint}(valid: {shown})")
