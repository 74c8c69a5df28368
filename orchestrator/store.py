"""The results: content-addressed artefacts, written whole or not at all. A folder, or the mirror of an object store.

<root>/artefacts/<recipe id>/*.safetensors        a policy, a language model or a Fisher, its recipe in the header
<root>/datasets/                                  Minari root of what was recorded here
<root>/training/<recipe id>/                      a training's checkpoint, until the policy is committed
<root>/training/.ray/                             what Ray Train writes beside it
<root>/tables/                                    rows (tables.py)
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dt.errors import UserError
from dt.files import explained, flush_folder
from orchestrator.place import place_of

if TYPE_CHECKING:  # torch takes a second to import, and `mergedt query` does not need it
    from dt.language.model import LanguageModel
    from dt.merging.merge import Fisher
    from dt.model.policy import Policy
    from orchestrator.recipes import Artefact, Job, Language, Recipe, Trained
    from orchestrator.recipes import Fisher as FisherRecipe
    from orchestrator.tables import Tables

    Value = Policy | LanguageModel | Fisher

V = TypeVar("V")
OUTCOME, PROGRESS = "outcome.json", "progress.json"
SCRATCH = "training/.ray"
POLICY, LANGUAGE, FISHER = _FILES = ("policy.safetensors", "language.safetensors", "fisher.safetensors")
_FILE_OF = {"pretrain": LANGUAGE, "import-language": LANGUAGE, "fisher": FISHER}  # of all other kinds: a policy


class Store:
    """The results at a folder, or at the address of an object store, which is mirrored in the folder `root`.

    Makes nothing until something is written. Raises UserError for an address that cannot hold results.
    """

    def __init__(self, results: str | Path) -> None:
        self.place = place_of(results)
        self.root, self.address = self.place.root, self.place.address
        self.artefacts = self.root / "artefacts"
        self.datasets = self.root / "datasets"
        self.training = self.root / "training"
        self.tables = self.root / "tables"

    def path(self, recipe: Artefact) -> Path:
        """Where the recipe's artefact is or will be."""
        return self.artefacts / recipe.id / file_name(recipe)

    def training_path(self, recipe: Recipe) -> Path:
        """Where the recipe's unfinished training lives."""
        return self.training / recipe.id

    @property
    def scratch(self) -> str:
        """Address of what Ray Train writes beside a training."""
        return self.place.address_at(SCRATCH)

    def open_tables(self) -> Tables:
        """The tables, as they are now."""
        from orchestrator.tables import Tables  # Arrow takes a second to import, and not every worker needs it

        self.place.pull(self.tables)
        return Tables(self.tables, self.place)

    def fetch_notes(self) -> None:
        """Have here what training workers left: notes of how far they are, and what is finished."""
        self.place.fetch_named(self.training, (PROGRESS, OUTCOME, *_FILES))

    def has(self, recipe: Artefact) -> bool:
        """Whether the recipe's artefact has been committed."""
        return self.place.exists(self.path(recipe))

    def stored(self) -> frozenset[str]:
        """The ids of all committed artefacts, in one listing."""
        return frozenset(path.parent.name for path in self.place.find(self.artefacts, _FILES))

    def save(self, recipe: Artefact, value: Value) -> Path:
        """Commit an artefact under its recipe's id. Raises UserError when the disk refuses; no half of it stays."""
        path = self.path(recipe)
        _save(recipe, value, path)
        self.place.push(path)
        return path

    def save_trained(self, recipe: Job, value: Value, outcome: Mapping[str, Any]) -> None:
        """Leave a finished training in its own folder, from where the driver adopts it; the outcome, as JSON, last."""
        folder = self.training_path(recipe)
        _save(recipe, value, folder / file_name(recipe))
        self.place.push(folder / file_name(recipe))
        self.place.put(folder / OUTCOME, json.dumps(outcome).encode())

    def finished(self, recipe: Job) -> bool:
        """Whether its training is through, though perhaps not committed."""
        return self.place.exists(self.training_path(recipe) / OUTCOME)

    def adopt_trained(self, recipe: Job) -> dict[str, Any] | None:
        """Commit what a finished training made and return its outcome; None when it has not finished, as far as is
        known here: see `fetch_notes`."""
        folder, path = self.training_path(recipe), self.path(recipe)
        if not (folder / OUTCOME).is_file():
            return None
        outcome: dict[str, Any] = json.loads((folder / OUTCOME).read_text())
        if (folder / path.name).is_file():  # not when a kill came right after the move
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                (folder / path.name).replace(path)
                flush_folder(path.parent)
        if not self.has(recipe):
            self.place.push(path)
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
        self.place.fetch(path)
        value = load(path)
        with safe_open(path, framework="np") as file:
            found = (file.metadata() or {}).get("recipe_id")
        if found != recipe.id:
            raise UserError(f"{path} holds what recipe {found} made: delete it and run the same command again")
        return value

    def discard_training(self, recipe: Recipe) -> None:
        """Remove the checkpoints of a training whose policy is committed."""
        self.place.remove(self.training_path(recipe))

    def clear_scratch(self) -> None:
        """Remove what Ray Train wrote."""
        self.place.remove(self.root / SCRATCH)

    def sweep(self) -> None:
        """Remove what killed writers left behind. Only while the lock is held: there is no other writer then.

        (Of downloads, which take none, what is older than a day.)
        """
        yesterday = time.time() - 24 * 3600
        for folder in (self.artefacts, self.tables, self.training):
            for leftover in folder.glob("**/.*.tmp"):
                leftover.unlink(missing_ok=True)
        for mark in self.root.glob(".visible-*"):
            mark.unlink(missing_ok=True)
        old = [path for path in self.datasets.glob(".download-*") if path.stat().st_mtime < yesterday]
        for leftover in chain(self.datasets.glob(".recording-*"), old):
            shutil.rmtree(leftover, ignore_errors=True)
        self.clear_scratch()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the results for one writer; released by the kernel when the process ends, however it ends.

        Raises UserError naming the other process when the folder is taken or cannot be written.
        """
        import fcntl

        path = self.root / ".lock"
        with explained(path):
            self.root.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        with file:
            with explained(path):
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
            with self.place.lease():
                yield


def file_name(recipe: Artefact) -> str:
    """Of the recipe's artefact in its folder."""
    return _FILE_OF.get(recipe.kind, POLICY)


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
