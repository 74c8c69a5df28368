"""The tables: Arrow schemas, exactly-once append, SQL.

A table is one compacted file, `<table>.parquet`, and parts, `<table>/<recipe id>.parquet`, one for each recipe whose
rows came since. Facts never change, so a part whose recipe is in the compacted file says nothing new and is ignored.
Declarations (which evaluations answer which experiment, the paper's numbers) may be restated: there the part counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dt.errors import UserError, unknown
from orchestrator.place import Folder, Place

if TYPE_CHECKING:
    import pyarrow.dataset as pads

TEXT, INTEGER, SHORT, REAL, TRUTH = pa.string(), pa.int64(), pa.int32(), pa.float64(), pa.bool_()
TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class TableSpec:
    """A table's columns, the columns that name its parts, the order of its rows, and whether it holds facts."""

    schema: pa.Schema
    key: tuple[str, ...]
    order: tuple[str, ...]
    facts: bool = True


def _schema(columns: Mapping[str, tuple[pa.DataType, str]]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"meaning": text}) for name, (kind, text) in columns.items()])


_MACHINE = {
    "host": (TEXT, "machine"),
    "processor": (TEXT, "its model, and the widest products it has; null in rows of before 2026-11-27"),
}
_VERSIONS = dict.fromkeys(("mergedt", "torch", "ray", "mujoco", "gymnasium"), (TEXT, "version"))

SPECS: Mapping[str, TableSpec] = MappingProxyType(
    {
        "episodes": TableSpec(
            _schema(
                {
                    "evaluation": (TEXT, "id of the Evaluate recipe"),
                    "policy": (TEXT, "id of the policy's recipe: key of `policies`"),
                    "task": (TEXT, "task whose environment it ran in"),
                    "episode": (SHORT, "index in the evaluation, from 0"),
                    "environment_seed": (INTEGER, "seed of the environment's reset: the evaluation's seed + episode"),
                    "target_return": (
                        REAL,
                        "return asked of the policy; null: the best episode's of its training data",
                    ),
                    "precision": (TEXT, "of the matrix products: float32 or bfloat16"),
                    "return": (REAL, "undiscounted sum of rewards"),
                    "length": (INTEGER, "steps"),
                    "terminated": (TRUTH, "ended by falling, not by the time limit"),
                    "score": (REAL, "D4RL-normalised return: 0 random, 100 expert"),
                }
            ),
            ("evaluation",),
            ("task", "policy", "evaluation", "episode"),
        ),
        "training": TableSpec(
            _schema(
                {
                    "policy": (TEXT, "id of the recipe that was trained"),
                    "task": (TEXT, "task it was trained for; several joined by +; `language` for a language model"),
                    "step": (INTEGER, "optimiser steps taken"),
                    "loss": (REAL, "mean over the steps since the row before: action loss, plus weighted others"),
                    "cosine": (REAL, "the cosine loss alone, unweighted; null where there is none"),
                    "language": (REAL, "the language loss alone"),
                    "distance": (REAL, "the distance to the start alone"),
                    "swapped": (INTEGER, "HarmoDT: entries that each task's mask exchanged at the last swap, k_t"),
                    "mask_overlap": (REAL, "HarmoDT: entries two tasks keep / entries either keeps, mean over pairs"),
                    "at_odds": (REAL, "HarmoDT: share of a task's kept entries at odds with the others, at that swap"),
                    "gradient_norm": (REAL, "of the last step, before clipping"),
                    "learning_rate": (REAL, "of the last step"),
                    "seconds": (REAL, "wall time of the steps since the row before"),
                }
            ),
            ("policy",),
            ("task", "policy", "step"),
        ),
        "policies": TableSpec(
            _schema(
                {
                    "policy": (TEXT, "id of the policy's recipe"),
                    "kind": (TEXT, "train, train-together, fine-tune, merge, perturb, assemble or vote"),
                    "task": (TEXT, "task of its head: the target's, for a merge; of several, joined by +"),
                    "source_tasks": (TEXT, "tasks of all trained policies it is made of, target first, joined by +"),
                    "sources": (TEXT, "ids of those policies, joined by +"),
                    "quality": (TEXT, "quality of the target's dataset: medium, expert, medium-expert"),
                    "dataset": (TEXT, "recorded, or where the target's dataset was imported from"),
                    "recorded_episodes": (INTEGER, "episodes asked of each behaviour policy; null when imported"),
                    "group": (TEXT, "parameters merged or perturbed; null when trained"),
                    "alpha": (REAL, "weight of the source in a pair; null for the uniform mean and when not merged"),
                    "method": (
                        TEXT,
                        "mean, interpolate, Fisher with its variant, random, identity, removed, multi-task or HarmoDT "
                        "with its variant; null for a single-task policy",
                    ),
                    "frozen": (TEXT, "group frozen while fine-tuning; null otherwise"),
                    "initialisation": (TEXT, "of the first training behind the target: random, or a language model"),
                    "cosine": (REAL, "λ1 of the target's training: cosine to token clusters"),
                    "co_training": (REAL, "λ2 of the target's training: language loss"),
                    "distance": (REAL, "λ3 of the target's training: distance to the start"),
                    "seed": (INTEGER, "of the target's training"),
                    "perturbation_seed": (INTEGER, "of the random draw; null otherwise"),
                    "width": (SHORT, "of the residual stream"),
                    "layers": (SHORT, "transformer blocks"),
                    "heads": (SHORT, "attention heads a block"),
                    "activation": (TEXT, "of the MLP"),
                    "context": (SHORT, "time steps in a window"),
                    "steps": (INTEGER, "optimiser steps of the target's training"),
                    "batch_size": (INTEGER, "windows a step"),
                    "learning_rate": (REAL, "peak"),
                    "warmup_steps": (INTEGER, "linear from 0"),
                    "schedule": (TEXT, "after the warm-up: constant or cosine"),
                    "weight_decay": (REAL, "AdamW's"),
                    "clip_norm": (REAL, "global gradient norm"),
                    "timestep_std": (REAL, "of the time-step table at the start; null: N(0, 1)"),
                    "dropout": (REAL, "probability"),
                    "precision": (TEXT, "of the matrix products in training"),
                    "trunk_parameters": (INTEGER, "count, shared and of single tasks"),
                    "head_parameters": (INTEGER, "count, of all its heads"),
                    "specific_parameters": (INTEGER, "of the trunk's: those of single tasks"),
                    "mask_bits": (INTEGER, "entries of all tasks' masks"),
                    "transformer_size": (REAL, "blocks stored / blocks of one trunk: the paper's measure"),
                    "recipe": (TEXT, "canonical JSON of the recipe: its SHA-256 begins with the id"),
                }
            ),
            ("policy",),
            ("kind", "task", "policy"),
        ),
        "datasets": TableSpec(
            _schema(
                {
                    "dataset": (TEXT, "id of its recipe"),
                    "task": (TEXT, "task it is of"),
                    "quality": (TEXT, "of the policies behind it: medium, expert, medium-expert"),
                    "source": (TEXT, "recorded, or where it was imported from"),
                    "episodes": (INTEGER, "count"),
                    "steps": (INTEGER, "of all episodes together"),
                    "mean_return": (REAL, "of its episodes, undiscounted"),
                    "return_deviation": (REAL, "standard deviation of the episodes' returns"),
                    "best_return": (REAL, "of its best episode"),
                    "content": (TEXT, "SHA-256 of all that training sees of it"),
                }
            ),
            ("dataset",),
            ("task", "quality", "dataset"),
        ),
        "texts": TableSpec(
            _schema(
                {
                    "text": (TEXT, "what was read of what is installed here: docstrings, and how many characters"),
                    "documents": (INTEGER, "count"),
                    "content": (TEXT, "SHA-256 of them: what language models of these tables learn from"),
                }
            ),
            ("text",),
            ("text",),
        ),
        "runs": TableSpec(
            _schema(
                {
                    "recipe": (TEXT, "id of what was computed"),
                    "kind": (TEXT, "of the recipe: recording, train, fine-tune, fisher, evaluate, …"),
                    "started": (TIME, "UTC"),
                    "seconds": (
                        REAL,
                        "of work: wall time, summed over the parts of a recording and the attempts of a training",
                    ),
                    **_MACHINE,
                    "cpus": (SHORT, "of that machine"),
                    "gpu": (TEXT, "model; null on CPU"),
                    "threads": (SHORT, "torch threads"),
                    "precision": (TEXT, "of the matrix products; null for a recording"),
                    **_VERSIONS,
                }
            ),
            ("recipe",),
            ("kind", "started", "recipe"),
        ),
        "benchmarks": TableSpec(
            _schema(
                {
                    "run": (TEXT, "one call of a benchmark"),
                    "name": (TEXT, "what was measured"),
                    "unit": (TEXT, "of work: a step, an action, …"),
                    "seconds": (REAL, "ours, for one unit: the median over the rounds"),
                    "literal_seconds": (REAL, "the field's way, in the same run; null where there is none"),
                    "floor_seconds": (REAL, "its products alone at the rate measured in the same run"),
                    "rounds": (SHORT, "of each, in turn"),
                    "started": (TIME, "UTC"),
                    **_MACHINE,
                    "cpus": (SHORT, "of that machine; one is used"),
                    **_VERSIONS,
                }
            ),
            ("run",),
            ("started", "run", "name"),
        ),
        "experiments": TableSpec(
            _schema(
                {
                    "experiment": (TEXT, "name of the figure, table or study"),
                    "profile": (TEXT, "budget it was asked at"),
                    "point": (SHORT, "index in the experiment, from 0"),
                    "evaluation": (TEXT, "id of the evaluation that answers it: key of `episodes`"),
                    "policy": (TEXT, "id of the evaluated policy: key of `policies`"),
                    "task": (TEXT, "task evaluated"),
                    "target": (TEXT, "task whose policy the merge goes into; null when it has none"),
                    "source": (TEXT, "task(s) merged into it; null when it has none"),
                    "group": (TEXT, "group or unit merged or perturbed; null when none"),
                    "alpha": (REAL, "weight of the source; null when none"),
                    "dataset": (TEXT, "quality of the data"),
                    "labels": (TEXT, "all the experiment's own labels of the point, as JSON"),
                }
            ),
            ("experiment", "profile"),
            ("experiment", "profile", "point"),
            facts=False,
        ),
        "paper": TableSpec(
            _schema(
                {
                    "experiment": (TEXT, "name of our experiment that reproduces it"),
                    "task": (TEXT, "task, or the row's own label"),
                    "dataset": (TEXT, "quality of the data; null when the paper does not say"),
                    "configuration": (TEXT, "the column's label: what was merged, how"),
                    "metric": (TEXT, "score, return, retention, …"),
                    "value": (REAL, "as printed"),
                    "standard_error": (REAL, "as printed; null when not"),
                }
            ),
            ("experiment",),
            ("experiment", "task", "dataset", "configuration", "metric"),
            facts=False,
        ),
    }
)
SCHEMAS: Mapping[str, pa.Schema] = MappingProxyType({name: spec.schema for name, spec in SPECS.items()})

SCORES = """
CREATE VIEW scores AS
WITH evaluations AS (
    SELECT evaluation, policy, task, target_return, precision AS evaluation_precision,
           min(environment_seed) AS evaluation_seed, count(*) AS episodes,
           avg("return") AS mean_return, stddev_samp("return") AS return_deviation,
           avg(score) AS mean_score, stddev_samp(score) AS score_deviation, avg(length) AS mean_length
    FROM episodes GROUP BY evaluation, policy, task, target_return, precision
)
SELECT evaluations.*, policies.* EXCLUDE (policy, task) FROM evaluations LEFT JOIN policies USING (policy)
"""
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_BARE_GROUP = re.compile(r"(?<![\"\w])group(?!\s+by\b)(?![\"\w])", re.IGNORECASE)
_MAGIC = b"PAR1"


class Tables:
    """The tables under a folder. Makes nothing on disk until something is written.

    place: where all machines find what is written; by default, they see the folder.
    """

    def __init__(self, root: Path, place: Place | None = None) -> None:
        self.root = Path(root).absolute()
        self._place = place or Folder(self.root)
        self._compacted_keys: dict[str, tuple[tuple[int, int], frozenset[str]]] = {}

    def append(self, table: str, key: str, rows: pa.Table) -> bool:
        """Commit the rows of one recipe (`key`: its id); again, it does nothing, unless the table holds declarations.

        For declarations `key` is the key columns joined by `-`. Returns whether something was written.
        Raises UserError when the disk refuses, ValueError when the rows are not those of `key` in the table's schema.
        """
        spec = _spec(table)
        if not _PART.fullmatch(key):
            raise ValueError(f"{key!r} cannot name a part")
        rows = rows.select(spec.schema.names).cast(spec.schema)
        if _keys(rows, spec) != {key}:
            raise ValueError(f"rows of {sorted(_keys(rows, spec))} given as those of {key}")
        if spec.facts and key in self._compacted(table):
            return False
        return self._place.put(self._part(table, key), _parquet(rows), keep=spec.facts)

    def done(self, table: str) -> frozenset[str]:
        """Keys of all recipes whose rows are in the table."""
        return self._compacted(table) | frozenset(self._parts(table))

    def dataset(self, table: str) -> pads.Dataset:
        """The table, each recipe's rows once; empty when none were written. Raises UserError naming a corrupt file."""
        import pyarrow.dataset as pads  # brings pandas along, which no worker that only writes should have to wait for

        spec = _spec(table)
        parts, compacted = self._parts(table), self._file(table)
        if not spec.facts:
            old = self._read(compacted, spec) if compacted.is_file() else spec.schema.empty_table()
            kept = old.filter(pa.array([key not in parts for key in _row_keys(old, spec)], TRUTH))
            newer = [self._read(path, spec) for _, path in sorted(parts.items())]
            return pads.dataset(pa.concat_tables([kept, *newer]))
        known = self._compacted(table)
        files = [path for key, path in sorted(parts.items()) if key not in known]
        for path in files:
            _check_ends(path)
        if compacted.is_file():
            files.insert(0, compacted)
        if not files:
            return pads.dataset(spec.schema.empty_table())
        return pads.dataset([str(path) for path in files], schema=spec.schema, format="parquet")

    def read(self, table: str) -> pa.Table:
        """The whole table in memory, in its order. Raises UserError naming a corrupt file."""
        return self.some(table).sort_by([(name, "ascending") for name in _spec(table).order])

    def some(self, table: str, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """Columns and rows of a table, in no order. Raises UserError naming a corrupt file."""
        try:
            with suppress(FileNotFoundError):  # its parts were compacted meanwhile
                return self.dataset(table).to_table(columns=columns, filter=where)
            return self.dataset(table).to_table(columns=columns, filter=where)
        except (pa.ArrowException, OSError) as error:
            raise self._corrupt(table) or error from error

    def compact(self) -> None:
        """Rewrite every table as one file, in a fixed order, then remove its parts. A kill in between loses nothing."""
        for table, spec in SPECS.items():
            parts = self._parts(table)
            if parts:
                self._place.put(self._file(table), _parquet(self.read(table).cast(spec.schema)))
                for path in parts.values():
                    self._place.remove(path)

    def query(self, sql: str) -> pa.Table:
        """The answer to one SELECT over the tables and the view `scores`, by DuckDB, which can reach nothing else.

        Raises UserError in one line on anything but a single SELECT or EXPLAIN, and on an error in it.
        """
        import duckdb

        with duckdb.connect(":memory:") as connection:
            for table in SPECS:
                connection.register(table, self.dataset(table))
            connection.execute(SCORES)
            # In this order: a locked configuration cannot be changed. Without a temporary folder nothing spills.
            connection.execute("SET memory_limit='2GB'; SET temp_directory=''")
            connection.execute("SET enable_external_access=false; SET lock_configuration=true")
            try:
                statements = duckdb.extract_statements(sql)
                allowed = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
                if len(statements) != 1 or statements[0].type not in allowed:
                    raise UserError("one SELECT at a time, please: the tables can be read and not changed")
                return connection.sql(sql).to_arrow_table()
            except duckdb.Error as error:
                corrupt = any(type(error) is kind for kind in (duckdb.IOException, duckdb.InvalidInputException))
                raise (corrupt and self._diagnosed()) or UserError(_one_line(str(error), sql)) from error

    # files

    def _file(self, table: str) -> Path:
        return self.root / f"{table}.parquet"

    def _part(self, table: str, key: str) -> Path:
        return self.root / table / f"{key}.parquet"

    def _parts(self, table: str) -> dict[str, Path]:
        folder = self.root / _known(table)
        if not folder.is_dir():
            return {}
        return {path.stem: path for path in folder.iterdir() if path.suffix == ".parquet" and path.name[0] != "."}

    def _compacted(self, table: str) -> frozenset[str]:
        """Keys in the compacted file, read again only when it changed."""
        path, spec = self._file(_known(table)), _spec(table)
        if not path.is_file():
            return frozenset()
        version = (path.stat().st_mtime_ns, path.stat().st_size)
        if self._compacted_keys.get(table, (None,))[0] != version:
            keys = _keys(self._read(path, spec, columns=list(spec.key)), spec)
            self._compacted_keys[table] = (version, keys)
        return self._compacted_keys[table][1]

    def _read(self, path: Path, spec: TableSpec, columns: list[str] | None = None) -> pa.Table:
        try:
            return pq.read_table(path, schema=spec.schema, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise _corrupt_file(path) from error

    def _corrupt(self, table: str) -> UserError | None:
        """The error for the first file of a table that cannot be read, if any."""
        for path in (self._file(table), *sorted(self._parts(table).values())):
            if path.is_file():
                try:
                    pq.read_table(path)
                except (pa.ArrowException, OSError):
                    return _corrupt_file(path)
        return None

    def _diagnosed(self) -> UserError | None:
        return next((found for table in SPECS if (found := self._corrupt(table))), None)


def _known(table: str) -> str:
    if table not in SPECS:
        raise unknown("table", table, SPECS)
    return table


def _spec(table: str) -> TableSpec:
    return SPECS[_known(table)]


def _row_keys(rows: pa.Table, spec: TableSpec) -> list[str]:
    columns: list[Any] = [rows[name] for name in spec.key]
    joined = columns[0] if len(columns) == 1 else pc.binary_join_element_wise(*columns, "-")
    return [str(key) for key in joined.to_pylist()]


def _keys(rows: pa.Table, spec: TableSpec) -> frozenset[str]:
    return frozenset(_row_keys(rows.select(list(spec.key)).group_by(list(spec.key)).aggregate([]), spec))


def _parquet(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    return bytes(sink.getvalue())


def _check_ends(path: Path) -> None:
    """Refuse a truncated file by its two marks: much cheaper than opening each as Parquet."""
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(-4, -path.stat().st_size), 2)
        if head != _MAGIC or file.read() != _MAGIC or path.stat().st_size < 12:
            raise _corrupt_file(path)


def _corrupt_file(path: Path) -> UserError:
    remedy = (
        "restore it from a copy (ours: from git)"
        if path.parent.name == "tables"
        else "delete it and run the same command again"
    )
    return UserError(f"{path} is truncated or not Parquet: {remedy}")


def _one_line(message: str, sql: str) -> str:
    """DuckDB's message with its suggestion, without the excerpt that points into the query."""
    said = " ".join(line.strip() for line in message.split("\nLINE ")[0].splitlines() if line.strip())
    if said.startswith("Parser Error") and _BARE_GROUP.search(sql):
        said += ' (the column is written "group", with the quotes: GROUP is a word of SQL)'
    return said
