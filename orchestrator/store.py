"""The results folder: content-addressed artefacts, written whole or not at all.

<root>/artefacts/<recipe id>/policy.safetensors   a trained policy, its recipe in the header
<root>/datasets/                                  Minari root of what was recorded here
<root>/training/<recipe id>/                      Ray Train's checkpoints, until the policy is committed
<root>/tables/                                    rows (tables.py)
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dt.errors import UserError

if TYPE_CHECKING:  # torch takes a second to import, and `mergedt query` does not need it
    from dt.model.policy import Policy
    from orchestrator.recipes import Recipe, Train

POLICY, OUTCOME = "policy.safetensors", "outcome.json"


class Store:
    """The results folder at `root`. Makes nothing on disk until something is written."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()  # workers have another working directory
        self.artefacts = self.root / "artefacts"
        self.datasets = self.root / "datasets"
        self.training = self.root / "training"
        self.tables = self.root / "tables"

    def policy_path(self, recipe: Recipe) -> Path:
        """Where the recipe's policy is or will be."""
        return self.artefacts / recipe.id / POLICY

    def training_path(self, recipe: Recipe) -> Path:
        """Where the recipe's unfinished training lives."""
        return self.training / recipe.id

    def has_policy(self, recipe: Recipe) -> bool:
        """Whether the recipe's policy has been committed."""
        return self.policy_path(recipe).is_file()

    def policies(self) -> frozenset[str]:
        """The ids of all committed policies, in one listing."""
        if not self.artefacts.is_dir():
            return frozenset()
        return frozenset(folder.name for folder in self.artefacts.iterdir() if (folder / POLICY).is_file())

    def save_policy(self, recipe: Recipe, policy: Policy) -> Path:
        """Commit a policy under its recipe's id. Raises UserError when the disk refuses; nothing half-written stays."""
        path = self.policy_path(recipe)
        _save(recipe, policy, path)
        return path

    def save_trained(self, recipe: Train, policy: Policy, outcome: Mapping[str, Any]) -> None:
        """Leave a finished training in its own folder, from where the driver adopts it; the outcome, as JSON, last."""
        folder = self.training_path(recipe)
        _save(recipe, policy, folder / POLICY)
        write_atomically(folder / OUTCOME, json.dumps(outcome).encode())

    def adopt_trained(self, recipe: Train) -> dict[str, Any] | None:
        """Commit the policy of a finished training and return its outcome; None when it has not finished."""
        folder, path = self.training_path(recipe), self.policy_path(recipe)
        if not (folder / OUTCOME).is_file():
            return None
        outcome: dict[str, Any] = json.loads((folder / OUTCOME).read_text())
        if (folder / POLICY).is_file():  # not when a kill came right after the move
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                (folder / POLICY).replace(path)
                flush_folder(path.parent)
        return outcome

    def unfinished(self) -> frozenset[str]:
        """Ids of the recipes whose training has begun and is not committed."""
        return frozenset(path.name for path in self.training.iterdir()) if self.training.is_dir() else frozenset()

    def load_policy(self, recipe: Train) -> Policy:
        """The recipe's committed policy.

        Raises UserError naming the file when it is missing, truncated, or the policy of another recipe.
        """
        from safetensors import safe_open

        from dt.model.policy import load_policy

        path = self.policy_path(recipe)
        policy = load_policy(path)
        with safe_open(path, framework="np") as file:
            found = (file.metadata() or {}).get("recipe_id")
        if found != recipe.id:
            raise UserError(f"{path} holds the policy of recipe {found}: delete it and run the same command again")
        return policy

    def discard_training(self, recipe: Recipe) -> None:
        """Remove the checkpoints of a training whose policy is committed."""
        shutil.rmtree(self.training_path(recipe), ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed writers left behind. Only while the lock is held: there is no other writer then."""
        for folder in (self.artefacts, self.tables):
            for leftover in folder.glob("**/.*.tmp"):
                leftover.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one writer; released by the kernel when the process ends, however it ends.

        Raises UserError naming the other process when the folder is taken or cannot be written.
        """
        import fcntl

        path = self.root / ".lock"
        with explained(path):
            self.root.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"another mergedt (process {file.read().strip() or 'unknown'}) is computing into {self.root}: "
                    "wait for it, or give another folder with --results"
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()} on {os.uname().nodename}")
            file.flush()
            yield


def _save(recipe: Recipe, policy: Policy, path: Path) -> None:
    from dt.model.policy import save_policy

    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_policy(policy, path, {"recipe": recipe.canonical_json(), "recipe_id": recipe.id})
        flush_folder(path.parent)


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
            remedy = "make room and run the same command again, it continues where it stopped"
            raise UserError(f"no space left to write {path}: {remedy}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"may not write {path} ({error.strerror}): give another folder with --results") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cannot write {path}: a file stands where a folder is needed") from error
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
