"""Where results live: in a folder that all machines see, or in an object store (`s3://…`, `gs://…`).

Of an object store, every machine works in a folder of its own that mirrors it. What is committed is whole when it
appears and never changes, so a mirror cannot be stale; what does change (declarations, compacted tables, checkpoints)
is told apart by size and time, and fetched again.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from dt.errors import UserError
from dt.files import write_atomically

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

SCHEMES = ("s3", "gs", "abfs")  # whose files appear whole
VARIABLE = "MERGEDT_MIRROR"  # the folder of all mirrors on a machine
HEARTBEAT_SECONDS, LEASE_SECONDS = 10.0, 60.0
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)")


class UnreachableError(UserError):
    """An object store cannot be reached, or refuses: perhaps for a moment."""


class Place(Protocol):
    """Of files under `root`, on this machine: who writes one pushes it, who reads one fetches it before."""

    @property
    def root(self) -> Path:
        """All paths are below it."""
        ...

    @property
    def address(self) -> str:
        """The same on all machines."""
        ...

    def address_at(self, below: str) -> str:
        """The address of what lies below."""
        ...

    def put(self, path: Path, content: bytes, *, keep: bool = False) -> bool:
        """Write a file for all; keep: leave one that is there. Returns whether it was written."""
        ...

    def push(self, path: Path) -> None:
        """Let all machines have a file, or all files of a folder, that were written here."""
        ...

    def fetch(self, path: Path) -> None:
        """Have a file or folder here, if there is one."""
        ...

    def fetch_named(self, folder: Path, names: Iterable[str]) -> None:
        """Have here the files of these names, at any depth of a folder."""
        ...

    def pull(self, folder: Path) -> None:
        """Have a folder here as it is there, without what is gone."""
        ...

    def exists(self, path: Path) -> bool:
        """Whether there is such a file."""
        ...

    def find(self, folder: Path, names: Iterable[str]) -> list[Path]:
        """The files of these names in the folders of a folder; they need not be here."""
        ...

    def remove(self, path: Path) -> None:
        """Delete a file or a folder, for all, if it exists."""
        ...

    def lease(self) -> AbstractContextManager[None]:
        """Hold the place for one writer of all machines. Raises UserError naming the other."""
        ...


def place_of(results: str | Path) -> Place:
    """A folder, or what has the form of an address. Raises UserError for an address that cannot hold results."""
    address = _address(results)
    if address is None:
        folder = Path(results).absolute()  # workers run in another folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"results live in a folder, and {folder} is a file: give another --results")
        return Folder(folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mergedt")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", address.partition("?")[0])
    return Mirror(address, Path(os.environ.get(VARIABLE) or cache).absolute() / name)


def _address(results: str | Path) -> str | None:
    """`scheme://bucket/…` of results in an object store; None for a folder. Raises UserError on a scheme of neither.

    >>> _address(Path("s3://bucket/results"))  # which `Path` has shortened to s3:/
    's3://bucket/results'
    """
    found = _ADDRESS.fullmatch(str(results))
    if found is None:
        return None
    scheme, rest = found.groups()
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"results live in a folder or an object store ({known}), not at {scheme}://{rest}")
    return f"{scheme}://{rest.rstrip('/')}"


@dataclass(frozen=True)
class Folder:
    """One that all machines see: what is written is there for all."""

    root: Path

    @property
    def address(self) -> str:
        """Its path."""
        return str(self.root)

    def address_at(self, below: str) -> str:
        """A path."""
        return str(self.root / below)

    def put(self, path: Path, content: bytes, *, keep: bool = False) -> bool:
        """Write it at once or not at all."""
        return write_atomically(path, content, keep=keep)

    def push(self, path: Path) -> None:
        """Nothing to do."""

    def fetch(self, path: Path) -> None:
        """Nothing to do."""

    def fetch_named(self, folder: Path, names: Iterable[str]) -> None:
        """Nothing to do."""

    def pull(self, folder: Path) -> None:
        """Nothing to do."""

    def exists(self, path: Path) -> bool:
        """Whether there is such a file."""
        return path.is_file()

    def find(self, folder: Path, names: Iterable[str]) -> list[Path]:
        """By their names."""
        return [path for name in names for path in folder.glob(f"*/{name}")]

    def remove(self, path: Path) -> None:
        """Whatever it is, as far as that is possible."""
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def lease(self) -> AbstractContextManager[None]:
        """Nothing to do: see `Store.lock`, which the kernel keeps."""
        return nullcontext()


@dataclass(frozen=True)
class Mirror:
    """The folder `root` and the object store it mirrors: paths are given as those in the folder.

    Raises UnreachableError when the object store cannot be reached or refuses.
    """

    address: str
    root: Path

    def address_at(self, below: str) -> str:
        """The address of a place in it; what follows a `?` stays at the end."""
        place, *options = self.address.split("?", 1)
        return "?".join([f"{place}/{below}", *options])

    def put(self, path: Path, content: bytes, *, keep: bool = False) -> bool:
        """Write it there first, so that nothing is here that is not there."""
        if keep and self.exists(path):
            return False
        self._upload(path, content)
        write_atomically(path, content)
        self._date(path)
        return True

    def push(self, path: Path) -> None:
        """In the order of their names."""
        for file in _files(path):
            self._upload(file, file.read_bytes())
            self._date(file)

    def fetch(self, path: Path) -> None:
        """Bring it here, unless the same is here."""
        with self._reached():
            info = self._filesystem.get_file_info(self._key(path))
        self._bring(self._files_under(path) if info.type.name == "Directory" else [info] * info.is_file)

    def fetch_named(self, folder: Path, names: Iterable[str]) -> None:
        """Bring them here, unless the same are here."""
        self._bring(self._named(folder, names))

    def pull(self, folder: Path) -> None:
        """Bring what is missing here or different, remove what is gone there."""
        there = self._files_under(folder)
        self._bring(there)
        gone = {self._key(file) for file in _files(folder)} - {info.path for info in there}
        if gone:
            with self._reached():  # again: it may have come since
                infos = self._filesystem.get_file_info(sorted(gone))
            for info in infos:
                if not info.is_file:
                    self._path(info).unlink(missing_ok=True)

    def exists(self, path: Path) -> bool:
        """Whether there is, not whether it is here."""
        with self._reached():
            return bool(self._filesystem.get_file_info(self._key(path)).is_file)

    def find(self, folder: Path, names: Iterable[str]) -> list[Path]:
        """In one listing."""
        return [self._path(info) for info in self._named(folder, names)]

    def remove(self, path: Path) -> None:
        """There first, then here."""
        with self._reached():
            info = self._filesystem.get_file_info(self._key(path))
            if info.type.name == "Directory":
                self._filesystem.delete_dir(info.path)
            elif info.is_file:
                self._filesystem.delete_file(info.path)
        Folder(self.root).remove(path)

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the place for one writer: a claim, renewed while the block runs; one not renewed for a minute is void.

        Should two be made at once, both writers may be turned away, never neither. Raises UserError naming the other.
        """
        folder = self.root / ".claims"
        mine = folder / secrets.token_hex(8)
        self._claim(mine)
        try:
            for other in {self._path(info) for info in self._files_under(folder)} - {mine}:
                self._give_way(other, mine)
        except UserError:
            self._withdraw(mine)
            raise
        over = threading.Event()
        heart = threading.Thread(target=self._beat, args=(mine, over), daemon=True)
        heart.start()
        try:
            yield
        finally:
            over.set()
            heart.join()
            self._withdraw(mine)

    def _claim(self, mine: Path) -> None:
        self.put(mine, f"{os.getpid()} on {os.uname().nodename}\n{_machine()}".encode())

    def _give_way(self, other: Path, mine: Path) -> None:
        """Raise UserError if another claim is alive; withdraw it if its process has died here."""
        self.fetch(other)
        if not other.is_file():
            return
        holder, _, machine = other.read_text().partition("\n")
        if machine and machine == _machine() and not Path("/proc", holder.split()[0]).exists():
            self._withdraw(other)
        elif mine.stat().st_mtime - other.stat().st_mtime < LEASE_SECONDS:  # both by the object store's clock
            raise UserError(
                f"another mergedt (process {holder}) is computing into {self.address}: wait for it (a minute, if it "
                "was killed), or give another place with --results"
            )
        else:
            self._withdraw(other)

    def _beat(self, mine: Path, over: threading.Event) -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            with suppress(UnreachableError):  # there may be a network again in time
                self._claim(mine)

    def _withdraw(self, claim: Path) -> None:
        with suppress(UnreachableError):
            self.remove(claim)
        claim.unlink(missing_ok=True)

    def _upload(self, path: Path, content: bytes) -> None:
        with self._reached(), self._filesystem.open_output_stream(self._key(path)) as stream:
            stream.write(content)

    def _bring(self, infos: Iterable[FileInfo]) -> None:
        for info in infos:
            path = self._path(info)
            if path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (info.size, info.mtime_ns):
                continue
            with self._reached(), suppress(FileNotFoundError):  # gone since it was listed
                with self._filesystem.open_input_stream(info.path) as stream:
                    content = stream.read()
                write_atomically(path, content)
                os.utime(path, ns=(info.mtime_ns, info.mtime_ns))

    def _files_under(self, folder: Path) -> list[FileInfo]:
        from pyarrow.fs import FileSelector

        with self._reached():
            found = self._filesystem.get_file_info(
                FileSelector(self._key(folder), allow_not_found=True, recursive=True)
            )
        return [info for info in found if info.is_file]

    def _named(self, folder: Path, names: Iterable[str]) -> list[FileInfo]:
        wanted = set(names)
        return [info for info in self._files_under(folder) if info.base_name in wanted]

    def _date(self, path: Path) -> None:
        """Give the file here the time that it has there."""
        with self._reached():
            time = self._filesystem.get_file_info(self._key(path)).mtime_ns
        with suppress(FileNotFoundError):
            if time is not None:  # else it is gone again
                os.utime(path, ns=(time, time))

    def _key(self, path: Path) -> str:
        return str(PurePosixPath(self._place[1], path.relative_to(self.root).as_posix()))

    def _path(self, info: FileInfo) -> Path:
        return self.root / str(info.path).removeprefix(f"{self._place[1]}/")

    @property
    def _filesystem(self) -> FileSystem:
        return self._place[0]

    @cached_property
    def _place(self) -> tuple[FileSystem, str]:
        from pyarrow.fs import FileSystem

        with self._reached():
            filesystem, prefix = FileSystem.from_uri(self.address)
        return filesystem, prefix.rstrip("/")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (OSError, pa.ArrowException) as error:
            said = str(error).splitlines()[0]
            raise UnreachableError(
                f"cannot use {self.address}: {said}; check the address, the network and the credentials"
            ) from error


def _files(path: Path) -> list[Path]:
    """The file itself, or all files of a folder but hidden ones (half-written, or another process's)."""
    if path.is_file():
        return [path]
    return [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]


def _machine() -> str:
    """The kernel and its process ids that this process lives under, for names of machines and containers repeat; empty
    where that is not told."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    with suppress(OSError):
        return f"{boot.read_text().strip()} {namespace.readlink()}"
    return ""
