"""The command line as a user meets it: by subprocess, on real folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image
from typer.testing import CliRunner

from dt.behaviour.record import record
from dt.data.sources import load_recorded
from orchestrator.cli import TABLES, app
from orchestrator.cli_options import console
from orchestrator.cli_work import run_demo
from orchestrator.profiles import get_profile
from orchestrator.store import Store
from orchestrator.tables import SPECS

ROOT = Path(__file__).parents[1]
COMMITTED = str(ROOT / "results")
Done = subprocess.CompletedProcess[str]
ENVIRONMENT = {**os.environ, "COLUMNS": "200", "RAY_ADDRESS": ""}


def mergedt(*arguments: str, cwd: Path = ROOT, timeout: float = 1500) -> Done:
    command = [sys.executable, "-m", "orchestrator", *arguments]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout)


def succeeded(*arguments: str, timeout: float = 1500) -> Done:
    done = mergedt(*arguments, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done


def test_list_names_experiments_and_profiles() -> None:
    text = succeeded("list").stdout
    for name in ("figure_2a", "figure_2b", "figure_3", "table_1", "experts", "demo", "smoke", "laptop", "paper"):
        assert name in text


SWEEP = ("sweep", "--target", "hopper", "--source", "halfcheetah", "--group", "attention", "--alpha", "0.5")
MISTAKES = {
    "experiment": (("run", "figre_3"), "did you mean 'figure_3'"),
    "profile": (("run", "figure_3", "--profile", "labtop"), "did you mean 'laptop'"),
    "target": ((*SWEEP, "--target", "hoper"), "did you mean 'hopper'"),
    "source": ((*SWEEP, "--source", "cheetah"), "did you mean 'halfcheetah'"),
    "group": ((*SWEEP, "--group", "atention"), "did you mean 'attention'"),
    "group at alpha 0": ((*SWEEP, "--alpha", "0", "--group", "atention"), "did you mean 'attention'"),
    "alpha above": ((*SWEEP, "--alpha", "0,1.5"), "alpha must lie in [0, 1], 1.5 given"),
    "alpha below": ((*SWEEP, "--alpha=-0.1"), "alpha must lie in [0, 1], -0.1 given"),
    "alpha in words": ((*SWEEP, "--alpha", "half"), "numbers separated by commas"),
    "alpha of several": ((*SWEEP, "--source", "walker2d"), "several take their uniform mean"),
    "itself": (
        ("sweep", "--target", "hopper", "--source", "hopper", "--group", "mlp", "--alpha", "1"),
        "different tasks",
    ),
    "seeds": (("plan", "figure_3", "--seeds", "a,b"), "whole numbers separated by commas"),
    "no seeds": (("plan", "figure_3", "--seeds", ","), "at least one"),
    "no label": (("plan", "table_1", "--only", "hopper"), "--only takes a label and its value"),
    "a label": (("run", "table_1", "--only", "robot=hopper"), "unknown label 'robot'"),
    "a label's value": (("run", "table_1", "--only", "task=hoper"), "unknown task 'hoper': did you mean 'hopper'"),
    "labels apart": (
        ("plan", "table_1", "figure_2a", "--only", "unit=h.0.mlp", "--only", "attention=removed"),
        "no point has all of these labels: unit=h.0.mlp, attention=removed",
    ),
    "data": (("plan", "figure_3", "--data", "minarri:x"), "unknown data"),
    "data file": (("plan", "figure_3", "--data", "/no/{task}-{quality}.hdf5"), "/no/halfcheetah-expert.hdf5"),
    "no policy for the task": (
        ("data", "record", "--task", "ant", "--quality", "expert", "--episodes", "1"),
        "no behaviour policy is shipped for 'ant'",
    ),
    "zero episodes": (
        ("data", "record", "--task", "hopper", "--quality", "expert", "--episodes", "0"),
        "at least one episode",
    ),
    "column": (("query", "select scor from episodes", "--results", COMMITTED), "score"),
    "table": (("query", "select * from episode", "--results", COMMITTED), "episodes"),
    "two statements": (("query", "select 1; select 2", "--results", COMMITTED), "one SELECT"),
    "a write": (("query", "drop table episodes", "--results", COMMITTED), "one SELECT"),
    "a file": (("query", "select * from read_csv('/etc/hostname')", "--results", COMMITTED), "disabled"),
    "two columns of a name": (("query", "select 1 as a, 2 as a", "--results", COMMITTED), "two columns are called 'a'"),
    "no such column of CSV": (
        ("query", "select interval 1 day as a", "--format", "csv", "--results", COMMITTED),
        "csv cannot hold these rows",
    ),
    "format": (("query", "select 1", "--format", "jsn"), "did you mean 'json'"),
    "parquet to a terminal": (("query", "select 1", "--format", "parquet"), "--output"),
    "nothing recorded": (
        ("data", "describe", "--task", "hopper", "--quality", "expert", "--episodes", "9"),
        "no expert recording for hopper",
    ),
    "no dataset named": (("data", "describe", "--task", "hopper"), "say which dataset"),
    "film of the untrained": (
        ("video", "--target", "hopper", "--output", "x.webp"),
        "run an experiment or a sweep that needs it first",
    ),
    "option": (("run", "figure_3", "--profil", "smoke"), "No such option"),
    "workers": (("run", "figure_3", "--workers", "0"), "--workers"),
    "command": (("rum",), "No such command"),
    "nothing to search": (("search", "table_1"), "has no coefficients to search over"),
    "sampler": (("search", "regularisation", "--profile", "smoke", "--sampler", "tp"), "did you mean 'tpe'"),
    "trials": (("search", "regularisation", "--trials", "0"), "--trials"),
    "no policies yet": (("export", "abc", "--output", "x.safetensors"), "no policies"),
    "no such file": (("evaluate", "no.safetensors"), "no policy at no.safetensors"),
    "no tables to ask": (("query", "select count(*) from scores"), "there are no tables in"),
    "no tables to compact": (("compact",), "there are no tables in"),
    "results in a file": (("plan", "figure_3", "--results", "README.md"), "README.md is a file"),
    "another kind of film": (("video", "--target", "hopper", "--output", "x.gif"), "should end in .webp"),
    "seeds too large": (("plan", "figure_3", "--seeds", str(10**20)), "below 2**32"),
    "episodes of others": (
        ("data", "describe", "--task", "hopper", "--source", "no.pkl", "--episodes", "3"),
        "--episodes is of a recording",
    ),
    "no original": (
        ("convert", "no.pt", "--task", "hopper", "--source", "no.hdf5", "--output", "x.safetensors"),
        "no.hdf5",
    ),
    "no language model": (("plan", "table_3", "--init", "no/folder"), "cannot get the model 'no/folder'"),
    "no place for results": (
        ("plan", "figure_3", "--results", "https://host/x"),
        "results live in a folder or",
    ),
    "an address of Ray's client": (("run", "figure_3", "--address", "ray://head:10001"), "give host:port"),
    "no text": (("plan", "table_3", "--text", "no/folder"), "no/folder"),
}
WITHOUT_RESULTS = ("rum", "evaluate")


def test_brackets_are_printed_as_they_are() -> None:
    done = CliRunner().invoke(app, ["query", "select '[/x]' as a, '[red]y' as b", "--results", COMMITTED])
    assert done.exit_code == 0, done.output
    assert "[/x]" in done.stdout
    assert "[red]y" in done.stdout


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_a_sentence(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    arguments, says = MISTAKES[mistake]
    takes_results = arguments[0] not in WITHOUT_RESULTS and not {"--profil", "--results"} & set(arguments)
    options = ("--results", str(tmp_path / "results")) if takes_results else ()
    done = CliRunner().invoke(app, [*arguments, *options])
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 or "Usage:" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "results").exists()  # nothing half-begun


def test_a_mistake_leaves_by_the_front_door() -> None:
    done = mergedt("plan", "figre_3")
    assert done.returncode == 2
    assert done.stderr.startswith("mergedt: unknown experiment 'figre_3'")
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    recording = ("--task", "hopper", "--quality", "expert", "--episodes", "1")
    done = mergedt("data", "record", *recording, "--results", str(tmp_path / "results"))
    assert done.returncode == 2
    assert "results" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_counts_and_computes_nothing(tmp_path: Path) -> None:
    text = succeeded("plan", "figure_3", "experts", "--profile", "smoke", "--results", str(tmp_path / "r")).stdout
    assert "9 episodes" not in text
    lines = {line.split()[1]: line for line in text.splitlines() if "│" in line}
    assert "6" in lines["recordings"].split("│")[2]  # medium and expert of three robots, two episodes each
    assert lines["recordings"].split("│")[2].strip() == "6"
    assert lines["trainings"].split("│")[2].strip() == "9"
    assert lines["evaluations"].split("│")[2].strip() == "21"  # 9 experts, 6 pairs at two weights
    assert "estimates" not in lines
    with_fisher = succeeded("plan", "table_5", "--profile", "smoke", "--results", str(tmp_path / "r")).stdout
    (line,) = (line for line in with_fisher.splitlines() if "estimates" in line)
    assert line.split("│")[2].strip() == "6"  # of three experts of two bases, for the Fisher merges
    assert not (tmp_path / "r").exists()


# --- the whole line ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder after the demo's experiment at the smoke profile."""
    folder = tmp_path_factory.mktemp("line") / "results"
    done = succeeded("run", "demo", "--profile", "smoke", "--results", str(folder))
    assert "2 recordings" in done.stderr
    return folder


@pytest.mark.slow
def test_a_run_answers_and_a_second_one_computes_nothing(results: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*.safetensors")}
    assert len(before) == 2
    again = succeeded("run", "demo", "--profile", "smoke", "--results", str(results))
    assert "nothing to compute" in again.stderr
    assert "halfcheetah" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*.safetensors")} == before


@pytest.mark.slow
def test_rows_answer_in_every_format(results: Path, tmp_path: Path) -> None:
    sql = "select task, alpha, mean_score, episodes from scores order by task, alpha nulls first"
    common = ("query", sql, "--results", str(results))
    rows = json.loads(succeeded(*common, "--format", "json").stdout)
    assert [(row["task"], row["alpha"], row["episodes"]) for row in rows] == [
        (task, alpha, 2) for task in ("halfcheetah", "walker2d") for alpha in (None, 0.5, 1.0)
    ]
    csv = succeeded(*common, "--format", "csv").stdout.splitlines()
    assert csv[0] == '"task","alpha","mean_score","episodes"'
    assert len(csv) == 7
    succeeded(*common, "--format", "parquet", "--output", str(tmp_path / "rows.parquet"))
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == rows
    assert "6 rows" in succeeded(*common).stdout
    odd = "select sum(episodes) as n, list(task order by task) as tasks, 'nan'::double as none from scores"
    (row,) = json.loads(succeeded("query", odd, "--results", str(results), "--format", "json").stdout)
    assert row == {"n": 12, "tasks": ["halfcheetah"] * 3 + ["walker2d"] * 3, "none": None}
    assert '""halfcheetah""' in succeeded("query", odd, "--results", str(results), "--format", "csv").stdout
    declared = "select labels, evaluation in (select evaluation from episodes) as there from experiments"
    points = json.loads(succeeded("query", declared, "--results", str(results), "--format", "json").stdout)
    assert len(points) == 6
    assert all(point["there"] for point in points)


@pytest.mark.slow
def test_an_exported_policy_reaches_what_its_row_says(results: Path, tmp_path: Path) -> None:
    """Of the same starts and target, in float32, as the smoke profile acts."""
    half = "select policy, mean_return from scores where task = 'walker2d' and alpha = 0.5"
    (row,) = json.loads(succeeded("query", half, "--results", str(results), "--format", "json").stdout)
    file = str(tmp_path / "half.safetensors")
    assert "walker2d" in succeeded("export", row["policy"], "--output", file, "--results", str(results)).stdout
    profile = get_profile("smoke")
    starts = ("--episodes", str(profile.evaluation_episodes), "--seed", str(profile.evaluation_seed))

    def reached(*options: str) -> str:
        """The mean return and its interval."""
        text = succeeded("evaluate", file, *starts, *options).stdout
        return next(line for line in text.splitlines() if "walker2d" in line).split("│")[2]

    usual = reached()
    assert float(usual.split()[0]) == round(row["mean_return"])
    assert reached("--target-return", "100000") != usual


@pytest.mark.slow
def test_a_sweep_reuses_the_experts_and_the_ends(results: Path, tmp_path: Path) -> None:
    asked = ("--target", "walker2d", "--source", "halfcheetah", "--group", "attention", "--alpha", "0,0.25,1")
    figure = tmp_path / "sweep.png"
    options = ("--profile", "smoke", "--results", str(results), "--figure", str(figure))
    done = succeeded("sweep", *asked, *options)
    assert "1 evaluation (2 episodes)" in done.stderr
    assert "training" not in done.stderr.split("stored")[0]
    with Image.open(figure) as image:
        assert image.format == "PNG"


@pytest.mark.slow
def test_the_mean_of_several_sources_is_shown_beside_the_policy_it_is_a_share_of(results: Path, tmp_path: Path) -> None:
    """Two experts of three are there; the third is trained, and evaluated unmerged, too."""
    results = shutil.copytree(results, tmp_path / "results")
    asked = ("--target", "hopper", "--source", "halfcheetah", "--source", "walker2d", "--group", "layernorm")
    done = succeeded("sweep", *asked, "--profile", "smoke", "--results", str(results))
    assert "halfcheetah+walker2d" in done.stdout
    assert "α = mean" in done.stdout
    sql = "select kind, method from scores where task = 'hopper' order by kind"
    rows = json.loads(succeeded("query", sql, "--results", str(results), "--format", "json").stdout)
    assert rows == [{"kind": "merge", "method": "mean"}, {"kind": "train", "method": None}]


@pytest.mark.slow
def test_the_demo_shows_draws_films_and_reuses(tmp_path: Path) -> None:
    store, films = Store(tmp_path / "results"), list[dict[Path, int]]()
    for _ in range(2):
        with console.capture() as shown:
            run_demo(store, "local", None, profile="smoke")
        told = shown.get()
        assert "Try next" in told
        assert f"rows:   {store.tables}" in told
        films.append({path: path.stat().st_mtime_ns for path in store.root.rglob("*.webp")})
        (film,) = films[-1]
        assert str(film) in told
        assert (store.root / "demo" / "demo.png").is_file()
    assert films[0] == films[1]


@pytest.mark.slow
def test_a_recording_by_several_processes_is_the_one_by_one(tmp_path: Path) -> None:
    asked = ("--task", "hopper", "--quality", "medium", "--episodes", "30", "--seed", "4")
    done = succeeded("data", "record", *asked, "--results", str(tmp_path / "results"))
    record("hopper", "medium", 30, 4, tmp_path / "alone")
    alone = load_recorded("hopper", "medium", 30, 4, tmp_path / "alone")
    assert alone.content_hash[:12] in done.stdout
    longest = succeeded(
        "data", "describe", "--task", "hopper", "--quality", "medium", "--seed", "4", "--results",
        str(tmp_path / "results"),
    )  # fmt: skip
    assert alone.content_hash[:12] in longest.stdout
    data = next((tmp_path / "results").rglob("main_data.hdf5"))
    data.write_bytes(data.read_bytes()[:1000])
    listed = succeeded("data", "list", "--results", str(tmp_path / "results"))
    assert "damaged" in listed.stdout
    assert "record it again" in listed.stderr


@pytest.mark.slow
def test_data_is_listed_and_described(results: Path) -> None:
    listed = succeeded("data", "list", "--results", str(results)).stdout
    assert listed.count("expert") == 2
    described = succeeded(
        "data", "describe", "--task", "walker2d", "--quality", "expert", "--episodes", "2", "--results", str(results)
    ).stdout
    for word in ("episodes", "return 50", "score", "content hash"):
        assert word in described
    digest = next(line.split("│")[2].strip() for line in described.splitlines() if "content hash" in line)
    assert digest[:12] in listed


@pytest.mark.slow
def test_a_merged_policy_is_filmed(results: Path, tmp_path: Path) -> None:
    film = tmp_path / "merged.webp"
    asked = ("--target", "walker2d", "--source", "halfcheetah", "--alpha", "0.5", "--steps", "12")
    succeeded("video", *asked, "--profile", "smoke", "--output", str(film), "--results", str(results))
    with Image.open(film) as image:
        assert image.format == "WEBP"
        assert getattr(image, "n_frames", 1) > 1


def test_the_help_names_every_table() -> None:
    assert set(TABLES.split(", ")) == {*SPECS, "scores"}


@pytest.mark.slow
def test_reports_and_compaction(results: Path, tmp_path: Path) -> None:
    copy = tmp_path / "results"
    shutil.copytree(results / "tables", copy / "tables")
    options = ("--profile", "smoke", "--results", str(copy))
    first = succeeded("report", "demo", *options, "--output", str(tmp_path / "before"))
    assert str(tmp_path / "before") in first.stdout.replace("\n", "")
    succeeded("compact", "--results", str(copy))
    assert {path.name for path in (copy / "tables").iterdir() if path.is_file()} >= {
        f"{table}.parquet" for table in ("episodes", "policies", "runs", "experiments", "datasets", "paper", "training")
    }
    succeeded("report", "demo", *options, "--output", str(tmp_path / "after"))
    page = (tmp_path / "after" / "README.md").read_text()
    assert page == (tmp_path / "before" / "README.md").read_text()
    assert "gymnasium" in page


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_interrupted_while_it_imports_it_leaves_without_a_traceback() -> None:
    process = subprocess.Popen([sys.executable, "-m", "orchestrator", "list"], cwd=ROOT, stderr=subprocess.PIPE)
    while process.poll() is None and "pydantic_core" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (-signal.SIGINT, b"")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_says_that_it_resumes(how: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestrator", "run", "demo", "--profile", "smoke", "--results", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("tables/runs/*.parquet")) and time.monotonic() < deadline:  # Ray is up, and at work
        time.sleep(0.2)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted; the same command resumes"
    assert "Traceback" not in stderr
    assert "Stack" not in stderr
