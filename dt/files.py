"""Files that are whole or not there: writing them, and reading our own safetensors ones."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dt.errors import UserError, reason

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, content: bytes, *, keep: bool = False) -> bool:
    """Write `content` to `path` so that no reader, and no run after a kill, ever sees half of it.

    keep: leave a file that is there already as it is (the first writer wins). Returns whether `path` was written.
    Raises UserError when the disk is full, read-only or forbidden.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if not keep:
                temporary.replace(path)
            elif not _link(temporary, path):
                return False
            flush_folder(path.parent)
            return True
        finally:
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    """Give the file its final name unless that is taken."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):  # a file system without hard links
            raise
        temporary.replace(path)
    return True


def flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the disk refuses inside the block into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"no space left to write {path}: make room and run the same command again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"may not write {path} ({error.strerror}): give another place (as with --results)"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cannot write {path}: a file stands where a folder is needed") from error
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def opened(path: Path, kind: str, form: str) -> Iterator[tuple[dict[str, str], dict[str, Tensor]]]:
    """Header and tensors of one of our files; nothing is ever unpickled.

    kind: what it should be, for messages; form: what its header names as its format. What the block misses in either
    (KeyError) or finds invalid counts as damage. Raises UserError on a missing, truncated or foreign file.
    """
    from pydantic import ValidationError
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"no {kind} at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != form:
                raise UserError(f"{path} is not a mergedt {kind} (its header lacks format={form!r})")
            yield header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValidationError) as error:
        raise UserError(
            f"{path} is truncated or corrupt ({reason(error)}): restore it, or delete it and run the same command again"
        ) from error


def expanded(path: str | Path) -> Path:
    """With a leading `~` or `~user` as that home folder. Raises UserError when there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"there is no home folder for the path {str(path)!r}: give it without ~") from error


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin so, without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
