"""The tables: every recipe's rows exactly once, and SQL that can read them and nothing else."""

import multiprocessing
import os
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from toy import OPTIMISATION, evaluation, expert, merged, recording, sweep

from dt.errors import UserError
from dt.model.size import Size
from orchestrator.costs import SECONDS, unit_costs
from orchestrator.recipes import Evaluate, Merge, Perturb
from orchestrator.rows import episode_rows, policy_row, processor, run_row, run_rows, training_rows
from orchestrator.tables import SCHEMAS, SPECS, Tables

SIZE = Size(shared=10, specific=0, heads=20, mask_bits=0, transformer=1.0)


def results(asked: Evaluate) -> pa.Table:
    rng = np.random.default_rng(int(asked.id[:8], 16))
    count = asked.episodes
    returns = rng.normal(1000, 300, count)
    seeds, lengths = np.arange(count) + asked.seed, np.full(count, 9)
    return episode_rows(
        asked, SimpleNamespace(seeds=seeds, returns=returns, lengths=lengths, terminated=returns > 1000)
    )


@pytest.fixture
def tables(tmp_path) -> Tables:
    return Tables(tmp_path / "tables")


def test_rows_are_there_once_however_often_they_come(tables):
    asked = sweep()
    for one in (*asked, *asked):
        tables.append("episodes", one.id, results(one))
    assert tables.done("episodes") == {one.id for one in asked}
    expected = pa.concat_tables([results(one) for one in asked])
    order = [(name, "ascending") for name in SPECS["episodes"].order]
    assert tables.read("episodes").equals(expected.sort_by(order))
    assert not list(tables.root.glob("**/.*"))


def test_facts_never_change(tables):
    asked = sweep()[0]
    assert tables.append("episodes", asked.id, results(asked))
    changed = results(asked).set_column(7, "return", pa.array([0.0, 0.0]))
    assert not tables.append("episodes", asked.id, changed)
    assert tables.read("episodes").equals(results(asked))
    tables.compact()
    assert not tables.append("episodes", asked.id, changed)
    assert tables.read("episodes").equals(results(asked))


def test_compaction_depends_on_the_rows_alone(tmp_path):
    asked = sweep()
    for name, order in (("a", asked), ("b", asked[::-1])):
        tables = Tables(tmp_path / name)
        for i, one in enumerate(order):
            tables.append("episodes", one.id, results(one))
            if name == "b" and i % 5 == 0:
                tables.compact()
        before = tables.read("episodes")
        tables.compact()
        assert tables.read("episodes").equals(before)
        assert tables.done("episodes") == {one.id for one in asked}
        assert list((tmp_path / name / "episodes").iterdir()) == []
    assert (tmp_path / "a" / "episodes.parquet").read_bytes() == (tmp_path / "b" / "episodes.parquet").read_bytes()


def test_a_part_left_behind_by_a_compaction_that_was_killed_counts_once(tables):
    asked = sweep()[:3]
    for one in asked:
        tables.append("episodes", one.id, results(one))
    part = tables.root / "episodes" / f"{asked[0].id}.parquet"
    content = part.read_bytes()
    tables.compact()
    part.write_bytes(content)
    assert tables.read("episodes").num_rows == 6
    assert tables.query("SELECT count(*) AS n FROM episodes").to_pylist() == [{"n": 6}]
    tables.compact()
    assert tables.read("episodes").num_rows == 6


def test_declarations_are_restated(tables):
    def declare(value: float, experiment: str = "table_1") -> None:
        row = {"experiment": experiment, "task": "hopper", "configuration": "random", "metric": "score", "value": value}
        tables.append("paper", experiment, pa.Table.from_pylist([row], SCHEMAS["paper"]))

    declare(1.0)
    declare(2.0, "table_2")
    declare(3.0)
    assert tables.read("paper")["value"].to_pylist() == [3.0, 2.0]
    tables.compact()
    declare(4.0)
    assert tables.read("paper")["value"].to_pylist() == [4.0, 2.0]
    assert tables.query("SELECT sum(value) AS s FROM paper").to_pylist() == [{"s": 6.0}]
    tables.compact()
    assert tables.read("paper")["value"].to_pylist() == [4.0, 2.0]
    assert tables.done("paper") == {"table_1", "table_2"}


def test_rows_of_another_recipe_or_shape_are_refused(tables):
    one, other = sweep()[:2]
    with pytest.raises(ValueError, match="given as those of"):
        tables.append("episodes", other.id, results(one))
    with pytest.raises(ValueError, match="given as those of"):
        tables.append("episodes", one.id, results(one)[:0])
    with pytest.raises(KeyError):
        tables.append("episodes", one.id, results(one).drop_columns(["score"]))
    with pytest.raises(ValueError, match="cannot name a part"):
        tables.append("episodes", "../escape", results(one))
    with pytest.raises(UserError, match="did you mean 'episodes'"):
        tables.append("episode", one.id, results(one))


def test_a_corrupt_file_is_named_with_its_remedy(tables):
    one, other = sweep()[:2]
    for asked in (one, other):
        tables.append("episodes", asked.id, results(asked))
    part = tables.root / "episodes" / f"{one.id}.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-20])
    for attempt in (lambda: tables.read("episodes"), lambda: tables.query("FROM scores"), tables.compact):
        with pytest.raises(UserError, match=f"{part} is truncated or not Parquet: delete it and run the same command"):
            attempt()
    damaged = whole[:4] + bytes(len(whole) - 8) + whole[-4:]  # its marks are right, its inside is not
    part.write_bytes(damaged)
    for attempt in (lambda: tables.read("episodes"), lambda: tables.query("FROM scores")):
        with pytest.raises(UserError, match=f"{part} is truncated or not Parquet"):
            attempt()
    part.write_bytes(whole)
    tables.compact()
    compacted = tables.root / "episodes.parquet"
    compacted.write_bytes(compacted.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{compacted} is truncated or not Parquet: restore it from a copy"):
        tables.done("episodes")


def append_for_ever(root: Path, acknowledge: Connection) -> None:
    tables = Tables(root)
    for i in range(10**6):
        asked = evaluation(expert("hopper", steps=i + 1))
        acknowledge.send((asked.id, tables.append("episodes", asked.id, results(asked))))
        if i % 10 == 9:
            tables.compact()


def test_appending_killed_at_any_moment_keeps_every_row_once(tables, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server of forks looks nowhere else
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_tables"])
    acknowledged: dict[str, int] = {}
    for attempt in range(4):
        heard, acknowledge = context.Pipe(duplex=False)
        process = context.Process(target=append_for_ever, args=(tables.root, acknowledge))
        process.start()
        acknowledge.close()
        said = [heard.recv() for _ in range(5 + 7 * attempt)]  # past the first compaction, later past the second
        time.sleep(0.004 * attempt)
        process.kill()
        with suppress(EOFError, OSError):  # OSError: killed in the middle of a word
            while True:
                said.append(heard.recv())
        process.join()
        for key, new in said:
            acknowledged[key] = acknowledged.get(key, 0) + new
    rows = tables.read("episodes")
    assert len(acknowledged) > 10
    assert set(acknowledged) <= set(rows["evaluation"].to_pylist())
    assert max(acknowledged.values()) == 1  # nobody was told twice that a row is new
    assert rows.num_rows == 2 * len(tables.done("episodes"))
    assert rows.group_by(["evaluation", "episode"]).aggregate([]).num_rows == rows.num_rows


def test_every_column_says_what_it_means():
    for spec in SPECS.values():
        assert all(field.metadata[b"meaning"] for field in spec.schema)
        assert set(spec.key) | set(spec.order) <= set(spec.schema.names)


def test_policies_unfold_their_recipes(tables):
    merge = merged("attention", 0.5)
    perturbed = Perturb(policy=merge, group="mlp", how="random", seed=4)
    for policy in (expert("hopper"), merge, Merge(sources=merge.sources, group="trunk"), perturbed):
        tables.append("policies", policy.id, policy_row(policy, SIZE))
    rows = tables.query(
        'SELECT kind, method, task, source_tasks, "group", alpha, perturbation_seed, width, steps, quality '
        "FROM policies ORDER BY kind, method"
    ).to_pylist()
    common = {"task": "hopper", "width": 16, "steps": OPTIMISATION.steps, "quality": "medium"}
    both = {"source_tasks": "hopper+walker2d", "perturbation_seed": None}
    alone = {"source_tasks": "hopper", "alpha": None, "perturbation_seed": None, "group": None}
    drawn = {"perturbation_seed": 4}
    assert rows == [
        {"kind": "merge", "method": "interpolate", "group": "attention", "alpha": 0.5} | common | both,
        {"kind": "merge", "method": "mean", "group": "trunk", "alpha": None} | common | both,
        {"kind": "perturb", "method": "random", "group": "mlp", "alpha": None} | common | both | drawn,
        {"kind": "train", "method": None} | common | alone,
    ]


def test_scores_are_the_means_of_the_episodes(tables):
    for asked in sweep():
        tables.append("episodes", asked.id, results(asked))
        if asked.policy.id not in tables.done("policies"):
            tables.append("policies", asked.policy.id, policy_row(asked.policy, SIZE))
    rows = tables.query("FROM scores").to_pylist()
    assert len(rows) == len(sweep())
    for row in rows:
        asked = next(one for one in sweep() if one.id == row["evaluation"])
        returns, scores = (results(asked)[name].to_numpy() for name in ("return", "score"))
        assert row["mean_return"] == pytest.approx(returns.mean(), rel=1e-12)
        assert row["mean_score"] == pytest.approx(scores.mean(), rel=1e-12)
        assert row["return_deviation"] == pytest.approx(returns.std(ddof=1), rel=1e-9)
        assert (row["episodes"], row["evaluation_seed"], row["kind"]) == (2, 100, asked.policy.kind)


def test_training_and_runs_keep_their_types(tables):
    train = expert("hopper")
    metrics = [
        {"step": step, "loss": 0.5, "gradient_norm": 1.0, "learning_rate": 1e-3, "seconds": 0.1} for step in (50, 100)
    ]
    tables.append("training", train.id, training_rows(train, metrics))
    started = datetime(2026, 11, 20, 12, 30, tzinfo=UTC)
    tables.append(
        "runs", recording("hopper").id, run_rows(run_row(recording("hopper"), started, 2.5, threads=1, precision=None))
    )
    assert tables.query("SELECT step, loss FROM training ORDER BY step").to_pylist() == [
        {"step": 50, "loss": 0.5},
        {"step": 100, "loss": 0.5},
    ]
    (run,) = tables.read("runs").to_pylist()
    assert (run["started"], run["seconds"], run["kind"], run["gpu"]) == (started, 2.5, "recording", None)
    assert run["mujoco"]
    assert run["ray"]
    assert run["processor"] == processor()


def test_the_processor_is_named_with_its_widest_products():
    """Beside what torch found out by itself."""
    found = torch.backends.cpu.get_cpu_capability()
    assert processor()
    assert ("avx512" in processor() or "amx" in processor()) == (found == "AVX512")
    assert ("avx2" in processor()) == (found == "AVX2")


def test_work_is_estimated_by_runs_of_this_processor_if_there_are_any(tables, monkeypatch):
    tokens = OPTIMISATION.steps * OPTIMISATION.batch_size * 3 * expert("hopper").architecture.context
    work = tokens * 3 * SIZE.shared
    runs = {processor(): 10.0, "another": 40.0, None: 80.0}
    assert unit_costs(tables)["train"] == SECONDS["train"]
    for (where, seconds), task in zip(runs.items(), ("hopper", "walker2d", "halfcheetah"), strict=True):
        policy = expert(task)
        row = run_row(policy, datetime(2026, 11, 20, tzinfo=UTC), seconds, threads=1, precision="float32")
        tables.append("policies", policy.id, policy_row(policy, SIZE))
        tables.append("runs", policy.id, run_rows({**row, "processor": where}))
    assert unit_costs(tables)["train"] == pytest.approx(10 / work)
    monkeypatch.setattr("orchestrator.costs.processor", lambda: "a third")
    assert unit_costs(tables)["train"] == pytest.approx((10 + 40 + 80) / (3 * work))


@pytest.mark.parametrize("table", SPECS)
def test_a_table_without_rows_has_its_columns(tables, table):
    assert tables.query(f"SELECT * FROM {table}").schema.names == SCHEMAS[table].names
    assert tables.read(table).num_rows == 0


REFUSED = {
    "copy": "COPY (SELECT 1) TO '{out}'",
    "attach": "ATTACH '{out}'",
    "csv": "SELECT * FROM read_csv('/etc/passwd')",
    "text": "SELECT * FROM read_text('/etc/passwd')",
    "glob": "SELECT * FROM glob('/etc/*')",
    "file as table": "SELECT * FROM '{out}'",
    "parquet": "SELECT * FROM read_parquet('{out}')",
    "install": "INSTALL httpfs",
    "load": "LOAD httpfs",
    "pragma": "PRAGMA database_list",
    "set": "SET enable_external_access=true",
    "two": "SELECT 1; SELECT 2",
    "select, then drop": "SELECT 1; DROP VIEW scores",
    "insert": "INSERT INTO episodes SELECT * FROM episodes",
    "create": "CREATE TABLE t AS SELECT 1",
    "call": "CALL pragma_version()",
    "export": "EXPORT DATABASE '{out}'",
    "nothing": "",
    "environment": "SELECT getenv('HOME')",
    "python": "SELECT * FROM tables",
}


@pytest.mark.parametrize("sql", REFUSED.values(), ids=REFUSED)
def test_a_query_reads_tables_and_nothing_else(tables, tmp_path, sql):
    out = tmp_path / "out.parquet"
    with pytest.raises(UserError) as refusal:
        tables.query(sql.format(out=out))
    assert "\n" not in str(refusal.value)
    assert not out.exists()


def test_a_mistake_in_a_query_is_told_with_a_suggestion(tables):
    with pytest.raises(UserError, match='Candidate bindings: "score"'):
        tables.query("SELECT scor FROM episodes")
    with pytest.raises(UserError, match='Did you mean "episodes"'):
        tables.query("SELECT * FROM episode")
    with pytest.raises(UserError, match='written "group", with the quotes'):
        tables.query("SELECT group, alpha FROM policies")
    assert tables.query('SELECT "group", count(*) FROM policies GROUP BY "group"').num_rows == 0
    assert tables.query("WITH a AS (FROM episodes) SELECT count(*) FROM a").num_rows == 1
    assert tables.query("EXPLAIN SELECT 1").num_rows == 1


def test_a_query_has_bounded_memory_and_spills_nothing_to_disk(tables):
    names = ("memory_limit", "temp_directory", "enable_external_access", "lock_configuration")
    (row,) = tables.query(f"SELECT {', '.join(f'current_setting({name!r}) AS {name}' for name in names)}").to_pylist()
    assert row == {
        "memory_limit": "1.8 GiB",
        "temp_directory": "",
        "enable_external_access": False,
        "lock_configuration": True,
    }
