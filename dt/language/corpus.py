"""Text to pre-train on: documentation strings of what is installed, a folder, or a data set of the Hugging Face hub."""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from dt.errors import UserError, reason
from dt.files import expanded
from dt.language.hub import downloaded

DOCSTRINGS = "docstrings"
SOURCES = f"give {DOCSTRINGS!r}, a folder of .txt or .md files, or hf:<dataset id>/<config>"
PACKAGES = ("numpy", "scipy", "torch", "matplotlib", "gymnasium", "transformers")  # read after the standard library
MINIMUM = 1000  # characters
DEFAULT_CHARACTERS = 20_000_000

_NO_DOCUMENTATION = {"test", "tests", "site-packages"}
_TEXT_FILES = {".txt", ".md"}


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order."""

    documents: tuple[str, ...]

    @property
    def characters(self) -> int:
        """In all documents."""
        return sum(map(len, self.documents))

    @property
    def content_hash(self) -> str:
        """SHA-256 of the documents and where they end."""
        digest = hashlib.sha256()
        for document in self.documents:
            content = document.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()


def read_corpus(source: str, characters: int = DEFAULT_CHARACTERS) -> Corpus:
    """The first so many characters of a source, the same every time.

    source: `docstrings`, the documentation of the installed standard library and packages, which needs no network; a
    folder, with all `*.txt` and `*.md` below it; or `hf:<dataset id>/<config>`, the column `text` of the training split
    (`hf:Salesforce/wikitext/wikitext-103-raw-v1` is the paper's). Raises UserError when there is no such source, it
    cannot be fetched or read, or holds too little text.
    """
    if source == DOCSTRINGS:
        documents = _docstrings(_python_sources())
    elif source.startswith("hf:"):
        documents = _hugging_face(source.removeprefix("hf:"))
    else:
        documents = _folder(expanded(source))
    corpus = Corpus(tuple(_first(characters, documents)))
    if corpus.characters < MINIMUM:
        raise UserError(
            f"the text source {source!r} gives {corpus.characters} characters, but at least {MINIMUM} are needed: "
            "take a larger source or allow more characters of it"
        )
    return corpus


def _first(characters: int, documents: Iterable[str]) -> Iterator[str]:
    left = characters
    for document in documents:
        if document:
            yield document[:left]
            left -= len(document)
        if left <= 0:
            return


def _python_sources() -> Iterator[Path]:
    specs = (find_spec(name) for name in PACKAGES)  # finds a package without importing it
    packages = (Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ())
    for root in chain([Path(sysconfig.get_path("stdlib"))], packages):
        for path in sorted(root.rglob("*.py")):
            if not _NO_DOCUMENTATION.intersection(path.relative_to(root).parts):
                yield path


def _docstrings(sources: Iterable[Path]) -> Iterator[str]:
    """One document per file; a text that several places share only where it comes first."""
    seen: set[str] = set()
    for path in sources:
        texts = [text for text in dict.fromkeys(_docstrings_of(path)) if text not in seen]
        seen.update(texts)
        if texts:
            yield "\n\n".join(texts)


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):  # a file no Python reads, kept as a template, say
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text.encode("utf-8", "replace").decode()  # lone surrogates are no text


def _folder(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        raise UserError(f"there is no folder of text {folder}: {SOURCES}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix in _TEXT_FILES and path.is_file())
    if not paths:
        raise UserError(f"the folder {folder} has no .txt or .md files: put some there, or {SOURCES}")
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path} as UTF-8 text ({error}): convert or remove it") from error


def _hugging_face(name: str) -> Iterator[str]:
    """A document per row group, its rows joined as they are: rows of WikiText are lines, and the original joins all."""
    identifier, _, config = name.rpartition("/")
    if not identifier:
        raise UserError(f"'hf:{name}' names no data set and configuration: {SOURCES}")
    folder = downloaded(identifier, "dataset", [f"{config}/train*.parquet"], f"take another source: {SOURCES}")
    yield from read_parquet(folder / config)


def read_parquet(folder: Path) -> Iterator[str]:
    """Column `text` of `train*.parquet`, a string per row group. Raises UserError when it is missing or damaged."""
    paths = sorted(folder.glob("train*.parquet"))
    if not paths:
        raise UserError(f"{folder.name!r} has no train*.parquet in that data set: check the configuration's name")
    for path in paths:
        try:
            yield from _row_groups(path)
        except UserError:
            raise
        except Exception as error:  # pyarrow raises many kinds
            raise UserError(
                f"cannot read the text in {path} ({reason(error)}): delete it and run the same command again"
            ) from error


def _row_groups(path: Path) -> Iterator[str]:
    """The texts of each row group, joined; a row without one adds nothing."""
    import pyarrow.parquet as pq  # heavy, and seldom needed

    with pq.ParquetFile(path) as file:
        if "text" not in file.schema_arrow.names:
            raise UserError(f"{path} has no column 'text', only {', '.join(file.schema_arrow.names)}")
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=["text"]).column("text").to_pylist()
            yield "".join(text for text in rows if text is not None)
