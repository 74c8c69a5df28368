"""The results folder: content-addressed artefacts, written whole or not at all.

<root>/artefacts/<recipe id>/*.safetensors        a policy, a language model or a Fisher, its recipe in the header
<root>/datasets/                                  Minari root of what was recorded here
<root>/training/<recipe id>/                      a training's checkpoint, until the policy is committed
<root>/training/.ray/                             what Ray Train writes beside it
<root>/tables/                                    rows (tables.py)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dt.errors import UserError
from dt.files import explained, flush_folder, write_atomically

if TYPE_CHECKING:  # torch takes a second to import, and `mergedt query` does not need it
    from dt.language.model import LanguageModel
    from dt.merging.merge import Fisher
    from dt.model.policy import Policy
    from orchestrator.recipes import Artefact, Job, Language, Recipe, Trained
    from orchestrator.recipes import Fisher as FisherRecipe

    Value = Policy | LanguageModel | Fisher

V = TypeVar("V")
OUTCOME = "outcome.json"
_FILES = {"pretrain": "language.safetensors", "import-language": "language.safetensors", "fisher": "fisher.safetensors"}
POLICY = "policy.safetensors"  # of all other kinds


class Store:
    """The results folder at `root`. Makes nothing on disk until something is written.

    Raises UserError for the address of an object store: locks and renames need a file system.
    """

    def __init__(self, root: Path) -> None:
        if re.match(r"[a-z][a-z0-9+.-]+:/", str(root)):
            raise UserError(f"results live in a folder, not at {root}: mount it on all machines and give that folder")
        self.root = Path(root).absolute()  # workers have another working directory
        self.artefacts = self.root / "artefacts"
        self.datasets = self.root / "datasets"
        self.training = self.root / "training"
        self.scratch = self.training / ".ray"
        self.tables = self.root / "tables"

    def path(self, recipe: Artefact) -> Path:
        """Where the recipe's artefact is or will be."""
        return self.artefacts / recipe.id / file_name(recipe)

    def training_path(self, recipe: Recipe) -> Path:
        """Where the recipe's unfinished training lives."""
        return self.training / recipe.id

    def has(self, recipe: Artefact) -> bool:
        """Whether the recipe's artefact has been committed."""
        return self.path(recipe).is_file()

    def stored(self) -> frozenset[str]:
        """The ids of all committed artefacts, in one listing."""
        if not self.artefacts.is_dir():
            return frozenset()
        files = {POLICY, *_FILES.values()}
        return frozenset(path.parent.name for name in files for path in self.artefacts.glob(f"*/{name}"))

    def save(self, recipe: Artefact, value: Value) -> Path:
        """Commit an artefact under its recipe's id. Raises UserError when the disk refuses; no half of it stays."""
        path = self.path(recipe)
        _save(recipe, value, path)
        return path

    def save_trained(self, recipe: Job, value: Value, outcome: Mapping[str, Any]) -> None:
        """Leave a finished training in its own folder, from where the driver adopts it; the outcome, as JSON, last."""
        folder = self.training_path(recipe)
        _save(recipe, value, folder / file_name(recipe))
        write_atomically(folder / OUTCOME, json.dumps(outcome).encode())

    def finished(self, recipe: Job) -> bool:
        """Whether its training is through, though perhaps not committed."""
        return (self.training_path(recipe) / OUTCOME).is_file()

    def adopt_trained(self, recipe: Job) -> dict[str, Any] | None:
        """Commit what a finished training made and return its outcome; None when it has not finished."""
        folder, path = self.training_path(recipe), self.path(recipe)
        if not self.finished(recipe):
            return None
        outcome: dict[str, Any] = json.loads((folder / OUTCOME).read_text())
        if (folder / path.name).is_file():  # not when a kill came right after the move
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                (folder / path.name).replace(path)
                flush_folder(path.parent)
        return outcome

    def unfinished(self) -> frozenset[str]:
        """Ids of the recipes whose training has begun and is not committed."""
        return frozenset(path.name for path in self.training.glob("[!.]*"))

    def load_policy(self, recipe: Trained) -> Policy:
        """The recipe's committed policy.

        Raises UserError naming the file when it is missing, truncated, or that of another recipe.
        """
        from dt.model.policy import load_policy

        return self._load(recipe, load_policy)

    def load_language(self, recipe: Language) -> LanguageModel:
        """The recipe's committed language model; errors as for a policy."""
        from dt.language.model import load_language_model

        return self._load(recipe, load_language_model)

    def load_fisher(self, recipe: FisherRecipe) -> Fisher:
        """The recipe's committed estimate; errors as for a policy."""
        from dt.merging.fisher import load_fisher

        return self._load(recipe, load_fisher)

    def _load(self, recipe: Artefact, load: Callable[[Path], V]) -> V:
        from safetensors import safe_open

        path = self.path(recipe)
        value = load(path)
        with safe_open(path, framework="np") as file:
            found = (file.metadata() or {}).get("recipe_id")
        if found != recipe.id:
            raise UserError(f"{path} holds what recipe {found} made: delete it and run the same command again")
        return value

    def discard_training(self, recipe: Recipe) -> None:
        """Remove the checkpoints of a training whose policy is committed."""
        shutil.rmtree(self.training_path(recipe), ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed writers left behind. Only while the lock is held: there is no other writer then."""
        for folder in (self.artefacts, self.tables):
            for leftover in folder.glob("**/.*.tmp"):
                leftover.unlink(missing_ok=True)
        for leftover in (self.scratch, *self.datasets.glob(".recording-*")):
            shutil.rmtree(leftover, ignore_errors=True)

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


def file_name(recipe: Artefact) -> str:
    """Of the recipe's artefact in its folder."""
    return _FILES.get(recipe.kind, POLICY)


def _save(recipe: Artefact, value: Value, path: Path) -> None:
    from dt.language.model import LanguageModel, save_language_model
    from dt.merging.fisher import save_fisher
    from dt.model.policy import Policy, save_policy

    header = {"recipe": recipe.canonical_json(), "recipe_id": recipe.id}
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, Policy):
            save_policy(value, path, header)
        elif isinstance(value, LanguageModel):
            save_language_model(value, path, header)
        else:
            save_fisher(value, path, header)
        flush_folder(path.parent)
