"""The engine on a real Ray: its rows are those that the science gives without it."""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import ray
import torch
from ray.core.generated import autoscaler_pb2
from rich.console import Console
from toy import ARCHITECTURE, OPTIMISATION, TASKS, evaluation, everything, expert, merged, recording, shared, sweep

from dt.behaviour.record import record
from dt.data.sources import load_recorded
from dt.errors import UserError
from dt.merging.merge import merge, perturb
from dt.model.policy import Policy
from dt.model.size import size_of
from dt.rollout.evaluate import evaluate
from dt.scores import normalised_score
from dt.tasks import get_task
from dt.training.loop import run as steps_of
from dt.training.objective import train
from orchestrator import engine, session
from orchestrator.costs import multiply_adds
from orchestrator.engine import Settings, run, slots_for
from orchestrator.making import begin, from_store, realise
from orchestrator.messages import describe
from orchestrator.place import Folder, UnreachableError
from orchestrator.progress import Pace, phase
from orchestrator.recipes import Evaluate, FineTune, Fisher, Merge, Perturb, Pretrain, Train, closure, ingredients
from orchestrator.rollouts import RolloutPool
from orchestrator.rows import run_row
from orchestrator.session import Node, Session
from orchestrator.store import Store
from orchestrator.sweeps import IN_FLIGHT, bundles_of, concurrent_trials
from orchestrator.tables import Tables
from orchestrator.training import LOG_EVERY, MAX_ATTEMPTS, MAX_FAILURES, Lane, commit_outcome, lanes_of, train_lane

ROOT = Path(__file__).parents[1]
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Policy], dict[str, list[dict[str, float]]]]:
    """The experts and their logs, trained in this process by the library alone."""
    root, policies, logs = tmp_path_factory.mktemp("by_hand"), {}, {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for task in TASKS:
        record(task, "medium", 3, 0, root)
        data = load_recorded(task, "medium", 3, 0, root)
        states = steps_of(train({task: data}, ARCHITECTURE, OPTIMISATION, 0), log_every=LOG_EVERY)
        logs[task] = [dict(state.metrics) | {"state": state} for state in states]
        policies[task] = logs[task][-1]["state"].result()
    torch.set_num_threads(threads)
    return policies, logs


def made_by_hand(recipe: Train | Merge | Perturb, experts: dict[str, Policy]) -> Policy:
    if isinstance(recipe, Merge):
        return merge([experts[source.task] for source in recipe.sources], recipe.group, recipe.alpha)
    if isinstance(recipe, Perturb):
        return perturb(experts[recipe.policy.task], recipe.group, recipe.how, recipe.seed)
    return experts[recipe.task]


def check_episodes(results: Path, asked: list[Evaluate], experts: dict[str, Policy]) -> None:
    rows = Tables(results / "tables").read("episodes")
    torch.set_num_threads(1)
    for one in asked:
        policy = made_by_hand(one.policy, experts)
        episodes = evaluate(policy, get_task(one.task), episodes=one.episodes, seed=one.seed)
        mine = rows.filter([value == one.id for value in rows["evaluation"].to_pylist()])
        assert mine["return"].to_pylist() == episodes.returns.tolist()
        assert mine["length"].to_pylist() == episodes.lengths.tolist()
        assert mine["terminated"].to_pylist() == episodes.terminated.tolist()
        assert mine["environment_seed"].to_pylist() == [100 + i for i in range(one.episodes)]
        assert mine["score"].to_pylist() == normalised_score(get_task(one.task), episodes.returns).tolist()


def test_trainings_are_bit_for_bit_the_library_s(finished, by_hand):
    experts, logs = by_hand
    store, tables = Store(finished), Tables(finished / "tables")
    training = tables.read("training")
    for task in TASKS:
        stored = store.load_policy(expert(task)).arrays()
        assert all(np.array_equal(stored[name], array) for name, array in experts[task].arrays().items())
        rows = [row for row in training.to_pylist() if row["policy"] == expert(task).id]
        for name in ("step", "loss", "gradient_norm", "learning_rate"):
            assert [row[name] for row in rows] == [row[name] for row in logs[task]]
    assert store.unfinished() == frozenset()


def test_evaluations_are_bit_for_bit_the_library_s(finished, by_hand):
    check_episodes(finished, sweep(), by_hand[0])


def test_every_recipe_has_its_rows_once(finished):
    tables, parts = Tables(finished / "tables"), list(closure(everything()).values())
    evaluations = {one.id for one in everything()}
    policies = {one.policy.id for one in everything()}
    trainings = {part.id for part in parts if isinstance(part, Train | FineTune)}
    fishers = {part.id for part in parts if isinstance(part, Fisher)}
    assert (len(evaluations), len(trainings), len(fishers)) == (32, 4, 2)
    assert tables.done("episodes") == evaluations
    assert tables.done("policies") == policies | trainings
    assert tables.done("training") == trainings
    assert tables.done("runs") == evaluations | trainings | fishers | {recording(task).id for task in TASKS}
    (counts,) = tables.query(
        "SELECT DISTINCT trunk_parameters, head_parameters FROM policies WHERE task = 'hopper' AND kind <> 'assemble'"
    ).to_pylist()
    trunk = 2 * 16 + (16 * 48 + 48) + (16 * 16 + 16) + 2 * 16 + (16 * 64 + 64) + (64 * 16 + 16) + 2 * 16
    head = (11 * 16 + 16) + (3 * 16 + 16) + (16 + 16) + 2 * 16 + 1000 * 16 + (16 * 3 + 3)
    assert counts == {"trunk_parameters": trunk, "head_parameters": head}


def test_in_parts_the_rows_are_the_same(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "PART", 1)
    asked, out = [*(evaluation(expert(task), task) for task in TASKS), evaluation(shared())], io.StringIO()
    run(asked, Settings(results=tmp_path, threads=1), Console(file=out))
    told = [line.split("; about ") for line in out.getvalue().splitlines() if line.startswith("part ")]
    assert [what for what, _ in told] == [
        "part 1 of 2, with 2 trainings and 2 evaluations",
        "part 2 of 2, with 2 trainings and 1 evaluations",
    ]
    assert all(re.fullmatch(r"\d+ s left in all", left) for _, left in told)
    assert re.search(r"\(the last on \w+: score -?\d+\.\d\)", out.getvalue())
    mine, theirs = (Tables(root / "tables").read("episodes") for root in (tmp_path, finished))
    assert mine.equals(theirs.filter(pc.is_in(theirs["evaluation"], mine["evaluation"].combine_chunks())))
    assert Tables(tmp_path / "tables").done("episodes") == {one.id for one in asked}


def test_what_is_done_is_not_done_again(finished):
    files = {path: path.stat().st_mtime_ns for path in finished.glob("**/*") if path.is_file()}
    out = io.StringIO()
    plan = run(everything(), Settings(results=finished), Console(file=out))
    assert plan.empty
    assert out.getvalue() == "nothing to compute: all 32 evaluations are stored\n"
    assert files == {path: path.stat().st_mtime_ns for path in finished.glob("**/*") if path.is_file()}


def test_merge_freeze_finetune_by_fisher_is_bit_for_bit_the_library_s(finished):
    """It takes three waves: experts, estimates, fine-tuning."""
    whole, store, tables = shared(), Store(finished), Tables(finished / "tables")
    torch.set_num_threads(1)
    for part in whole.policies:
        assert isinstance(part, FineTune)
        *_, last = steps_of(begin(part, store, "cpu"))
        stored = store.load_policy(part).arrays()
        assert all(np.array_equal(stored[name], array) for name, array in last.result().arrays().items())
    for one in (evaluation(whole, task) for task in TASKS):
        policy = realise(whole, from_store(whole, store))
        episodes = evaluate(policy, get_task(one.task), episodes=one.episodes, seed=one.seed)
        rows = tables.query(f"SELECT \"return\" FROM episodes WHERE evaluation = '{one.id}' ORDER BY episode")
        assert rows["return"].to_pylist() == episodes.returns.tolist()
    (row,) = tables.query("SELECT method, frozen, task FROM policies WHERE kind = 'assemble'").to_pylist()
    assert row == {"method": "Fisher, batch", "frozen": "attention+mlp", "task": "hopper+walker2d"}


def test_a_failure_is_told_in_one_sentence_and_stops_nothing_else(finished, by_hand):
    headless = evaluation(expert("hopper"), "walker2d")
    diverging = evaluation(expert("hopper", learning_rate=1e30))
    fine = evaluation(merged("layernorm", 0.5))
    with pytest.raises(UserError) as told:
        run([headless, diverging, fine], Settings(results=finished, threads=1), QUIET)
    assert "\n" not in str(told.value)
    assert str(told.value).startswith("the medium hopper policy of seed 0 failed: the loss of hopper became")
    assert "1 more failed; 1 evaluations wait for a policy" in str(told.value)
    check_episodes(finished, [fine], by_hand[0])
    with pytest.raises(
        UserError, match=f"the evaluation {headless.id} on walker2d of .* failed: the policy has no head"
    ):
        run([headless], Settings(results=finished), QUIET)


def test_a_damaged_policy_stops_only_what_is_made_of_it(finished, by_hand, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(finished, results)
    damaged = Store(results).path(expert("walker2d"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    fine = evaluation(Perturb(policy=expert("hopper"), group="mlp", how="random"))
    with pytest.raises(UserError, match=r"the medium walker2d policy of seed 0 failed: .*policy.safetensors"):
        run([evaluation(merged("layernorm", 0.125)), fine], Settings(results=results), QUIET)
    check_episodes(results, [fine], by_hand[0])


def test_a_folder_that_vanishes_with_a_job_is_refused(tmp_path, monkeypatch):
    """Ray runs a job in a copy of its working directory; the command line has made the folder's path absolute."""
    working = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    working.mkdir(parents=True)
    monkeypatch.chdir(working)
    with pytest.raises(UserError, match="give --results an absolute path that all nodes share"):
        run(sweep(), Settings(results=Store("results").address), QUIET)


def test_bundles_are_of_one_size_and_few() -> None:
    everything = [
        evaluation(merged("attention", step / 100), episodes=own + 1) for own in range(50) for step in range(4)
    ]
    for count, size in ((1, 200), (7, 29), (20, 10), (256, IN_FLIGHT)):
        bundles = bundles_of(everything, count)
        assert [one for bundle in bundles for one in bundle] == everything
        assert {len(bundle) for bundle in bundles[:-1]} <= {size}
        assert len(bundles[-1]) <= size
    for workers in (1, 2, 5, 16, 100):
        for asked in (1, 7, 9, 101, 200):
            bundles = bundles_of(everything[:asked])
            begun = bundles[: concurrent_trials(len(bundles), workers)]
            assert sum(min(len(bundle), IN_FLIGHT) for bundle in begun) >= min(2 * workers, asked)


def lane(root: Path, *recipes: Train) -> dict[str, object]:
    """For `train_lane`, without Ray; what the recipes learn from is recorded."""
    for recipe in recipes:
        record(recipe.task, "medium", 3, 0, Store(root).datasets)
    sent = tuple(recipe.model_dump_json() for recipe in recipes)
    return asdict(Lane(sent, str(root), threads=1, gpu=False, checkpoint_seconds=0.0))


def test_a_killed_training_goes_on_from_its_checkpoint_whatever_the_log_says(tmp_path, by_hand):
    recipe, store, tables = expert("hopper"), Store(tmp_path), Tables(tmp_path / "tables")
    config, folder = lane(tmp_path, recipe), store.training_path(recipe)
    torch.set_num_threads(1)
    begun = begin(recipe, store, "cpu")
    begun.advance(100)
    begun.save(folder / "state.safetensors")
    rows = [{name: row[name] for name in row if name != "state"} for row in by_hand[1]["hopper"]]
    ahead = [*rows[:2], {**rows[2], "loss": -1.0}]  # killed after the log, before the state
    log = {"metrics": ahead, "started": datetime.now(UTC).isoformat(), "seconds": 7.0}
    (folder / "log.json").write_text(json.dumps(log))
    assert train_lane(config) == {}
    said: list[str] = []
    assert commit_outcome(recipe, store, tables, said.append)
    assert [row["loss"] for row in tables.read("training").to_pylist()] == [row["loss"] for row in rows]
    stored = store.load_policy(recipe).arrays()
    assert all(np.array_equal(stored[name], array) for name, array in by_hand[0]["hopper"].arrays().items())
    (ran,) = tables.read("runs")["seconds"].to_pylist()
    assert ran > 7.0
    assert train_lane(config) == {}  # nothing left to do
    assert store.unfinished() == frozenset()
    assert said == []


@pytest.mark.parametrize("otherwise", [False, True])
def test_a_training_that_comes_out_otherwise_the_second_time_is_said(tmp_path, by_hand, otherwise):
    store, recipe, tables = Store(tmp_path), expert("hopper"), Tables(tmp_path / "tables")
    rows = [{name: row[name] for name in row if name != "state"} for row in by_hand[1]["hopper"]]
    again = [*rows[:-1], {**rows[-1], "loss": rows[-1]["loss"] * (1 + 1e-7)}] if otherwise else rows
    said: list[str] = []
    for metrics in (rows, again):
        ran = run_row(recipe, datetime.now(UTC), 1.0, threads=1, precision="float32")
        policy = by_hand[0]["hopper"]
        store.save_trained(recipe, policy, {"metrics": metrics, "size": size_of(policy).model_dump(), "run": ran})
        assert commit_outcome(recipe, store, tables, said.append)
        store.path(recipe).unlink()
    assert len(said) == otherwise
    assert all("hopper" in line and "came out otherwise" in line for line in said)
    assert tables.read("training")["loss"].to_pylist() == [row["loss"] for row in rows]


def test_a_recipe_that_kills_its_workers_stops_no_other(tmp_path):
    deadly, other = expert("hopper", steps=5), expert("walker2d", steps=5)
    config, store = lane(tmp_path, deadly, other), Store(tmp_path)
    store.training_path(deadly).mkdir(parents=True)
    for count, ends in ((4, ["a death"] * (MAX_FAILURES + 1)), (MAX_ATTEMPTS, ["a death"])):  # or between checkpoints
        attempts = {"count": count, "ends": ends, "mistake": None}
        (store.training_path(deadly) / "attempts.json").write_text(json.dumps(attempts))
        assert train_lane(config) == {deadly.id: f"it was begun {count} times, the last time ended by a death"}
        assert store.finished(other)
        assert not store.finished(deadly)


def test_a_mistake_of_the_user_is_told_again_and_not_tried_again(tmp_path):
    """As when another recipe of the lane kills the worker: the lane begins anew."""
    wild = expert("hopper", learning_rate=1e30, warmup_steps=0)
    config = lane(tmp_path, wild)
    (told,) = train_lane(config).values()
    assert told.startswith(("the loss of hopper became", "the gradient of hopper became"))
    recorded = next(Store(tmp_path).datasets.glob("**/data"))
    recorded.rename(recorded.with_name("gone"))  # to begin would be another error
    assert train_lane(config) == {wild.id: told}


def test_an_unforeseen_error_is_tried_again_and_then_told(tmp_path):
    recipe, store = expert("hopper", steps=5), Store(tmp_path)
    config = lane(tmp_path, recipe)
    store.training_path(recipe).mkdir(parents=True)
    (store.training_path(recipe) / "log.json").write_text("{}")
    begin(recipe, store, "cpu").save(store.training_path(recipe) / "state.safetensors")
    for _ in range(MAX_FAILURES + 1):
        with pytest.raises(KeyError):
            train_lane(config)
    (told,) = train_lane(config).values()
    assert told == "it was begun 4 times, the last time ended by KeyError: 'metrics'"


def test_an_object_store_that_is_away_for_a_moment_is_no_mistake(tmp_path, monkeypatch):
    recipe, push, pushed = expert("hopper", steps=60), Folder.push, list[Path]()
    config = lane(tmp_path, recipe)

    def away_at_first(place: Folder, path: Path) -> None:
        pushed.append(path)
        if len(pushed) == 1:
            raise UnreachableError("cannot use s3://bucket/x")
        push(place, path)

    monkeypatch.setattr(Folder, "push", away_at_first)
    with pytest.raises(UnreachableError):
        train_lane(config)
    assert train_lane(config) == {}  # as Ray Train begins it again
    assert Store(tmp_path).finished(recipe)


@pytest.mark.usefixtures("ray_session")
def test_an_autoscaler_s_nodes_count_once_whether_they_run_or_not(monkeypatch):
    def group(name, cpus, gpus, least, most):
        resources = {"CPU": cpus, "GPU": gpus}
        return autoscaler_pb2.NodeGroupConfig(name=name, resources=resources, min_count=least, max_count=most)

    config = autoscaler_pb2.ClusterConfig(node_group_configs=[group("head", 8, 0, 1, 1), group("gpu", 16, 1, 0, 4)])
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: config)
    for running in range(5):
        alive = [{"Labels": {"ray.io/node-group": "head"}}, *[{"Labels": {"ray.io/node-group": "gpu"}}] * running]
        assert session._addable_nodes(alive) == [Node(16, 1)] * (4 - running)
    assert session._addable_nodes([{"Labels": {}}]) == [Node(16, 1)] * 4


def test_lanes_share_the_work():
    lengths = [100, 10, 20, 70, 30]
    recipes = [expert("hopper", steps=steps) for steps in lengths]
    lanes = lanes_of(recipes, 2)
    assert [[recipe.optimisation.steps for recipe in lane] for lane in lanes] == [[100, 20], [70, 30, 10]]
    assert lanes_of(recipes[:1], 2) == [recipes[:1]]
    wide = expert("hopper", steps=50, batch_size=80)
    assert lanes_of([*recipes, wide], 2)[0] == [wide]
    every_word = Pretrain(
        characters=1, vocabulary=8_192, block=60, architecture=ARCHITECTURE, optimisation=recipes[1].optimisation
    )
    assert lanes_of([*recipes, every_word], 2)[0] == [every_word]


def test_what_is_frozen_costs_two_products_of_three():
    def cost(frozen: str | None) -> int:
        own = expert("hopper")
        tuned = FineTune(policy=own, dataset=own.dataset, optimisation=own.optimisation, frozen=frozen)
        return multiply_adds(tuned)

    whole = multiply_adds(expert("hopper"))
    assert cost(None) == whole
    assert cost("trunk") == whole * 2 // 3
    assert whole > cost("attention") > cost("attention+mlp") > cost("trunk")


def test_policies_are_realised_recursively():
    torch.manual_seed(0)
    from test_store import fresh_policy

    experts = {expert(task).id: fresh_policy(expert(task), seed) for seed, task in enumerate(TASKS)}
    hopper, walker2d = experts.values()
    recipe = Perturb(policy=merged("mlp", 0.25), group="attention", how="identity")
    expected = perturb(merge([hopper, walker2d], "mlp", 0.25), "attention", "identity", 0)
    made = realise(recipe, experts)
    assert all(torch.equal(made.trunk[name], tensor) for name, tensor in expected.trunk.items())
    assert describe(recipe) == (
        "the medium hopper policy of seed 0 with the medium walker2d policy of seed 0 merged in mlp at alpha 0.25 "
        "with identity attention"
    )


@pytest.mark.parametrize(
    ("nodes", "pending", "settings", "slots"),
    [
        ([(2, 0)], 3, {}, (2, 1, 0.0)),
        ([(2, 0)], 1, {}, (1, 1, 0.0)),
        ([(16, 0)], 9, {}, (4, 4, 0.0)),
        ([(16, 1)], 9, {}, (4, 4, 0.25)),
        ([(16, 1)], 3, {}, (3, 4, 0.333)),
        ([(64, 8)], 3, {}, (3, 2, 1.0)),
        ([(64, 8)], 32, {}, (32, 2, 0.25)),
        ([(16, 2)], 3, {}, (3, 2, 0.5)),
        ([(32, 0), (4, 1), (4, 1)], 40, {}, (8, 1, 0.25)),
        ([(8, 0), (16, 1), (16, 1), (16, 1), (16, 1)], 5, {}, (5, 4, 0.5)),
        ([(8, 1), (64, 0), (16, 1)], 12, {}, (8, 2, 0.25)),
        ([(2, 1)], 9, {}, (2, 1, 0.5)),
        ([(2, 0)], 9, {"threads": 2}, (1, 2, 0.0)),
        ([(8, 0)], 9, {"training_slots": 3, "threads": 1}, (3, 1, 0.0)),
        ([(16, 1)], 9, {"training_slots": 8, "threads": 1}, (8, 1, 0.125)),
    ],
)
def test_trainings_share_the_machines(nodes, pending, settings, slots):
    """All that run at once find a node that has what each asks for."""
    shared = slots_for(pending, Settings(**settings), Session(True, tuple(Node(*node) for node in nodes)))
    assert (shared.count, shared.threads, shared.gpu) == slots
    of_gpu = int(1 / shared.gpu) if shared.gpu else None
    rooms = [
        min(int(cpus / (shared.cpus + 0.01)), gpus * of_gpu) if of_gpu else int(cpus / (shared.cpus + 0.01))
        for cpus, gpus in nodes
    ]
    assert sum(rooms) >= shared.count


def test_a_training_killed_just_before_its_commit_is_committed_by_the_next_run(tmp_path, by_hand):
    store, recipe = Store(tmp_path), expert("hopper")
    (policy, metrics), began = (by_hand[0]["hopper"], by_hand[1]["hopper"]), datetime.now(UTC)
    rows = [{name: row[name] for name in row if name != "state"} for row in metrics]
    run_of_it = run_row(recipe, began, 1.0, threads=1, precision="float32")
    outcome = {"metrics": rows, "size": size_of(policy).model_dump(), "run": run_of_it}
    store.save_trained(recipe, policy, outcome)
    assert run([recipe], Settings(results=tmp_path), QUIET).empty  # without Ray
    tables = Tables(tmp_path / "tables")
    assert tables.read("training")["loss"].to_pylist() == [row["loss"] for row in rows]
    assert tables.done("policies") == tables.done("runs") == {recipe.id}
    assert store.unfinished() == frozenset()
    assert store.has(recipe)


def test_progress_without_a_terminal_is_a_line_now_and_then():
    out = io.StringIO()
    with phase(Console(file=out), "evaluations", 40, "policies") as shown:
        for _ in range(40):
            shown.advance()
    assert out.getvalue().splitlines() == ["evaluations: 40 policies", "evaluations: 40 of 40 policies in 0 s"]


def test_a_resumed_phase_is_timed_by_what_it_does_now(monkeypatch):
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("orchestrator.progress.time.monotonic", lambda: clock[-1])
    with phase(Console(file=out), "trainings", 3000, "steps") as shown:
        for now, done in ((20.0, 2000), (120.0, 2500)):
            clock.append(now)
            shown.set(done)
    assert out.getvalue().splitlines()[1:] == [
        "trainings: 2,000 of 3,000 steps in 20 s",
        "trainings: 2,500 of 3,000 steps in 2 min, about 2 min left",
    ]


def test_a_gpu_is_shared_by_estimates_as_by_trainings():
    machine = Session(True, (Node(16, 1),))
    assert slots_for(12, Settings(), machine).gpu == 0.25
    assert slots_for(1, Settings(), machine).gpu == 1


def test_what_is_left_goes_by_the_estimates_and_by_how_they_fared(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("orchestrator.progress.time.monotonic", lambda: clock[-1])
    pace = Pace([100.0, 300.0, 200.0])
    assert pace.left(0) == 600
    clock.append(50.0)
    assert pace.left(1) == 250  # twice as fast as thought
    clock.append(800.0)
    assert pace.left(2) == 400
    assert pace.left(3) == 0


def test_the_token_is_made_for_its_owner_alone(tmp_path):
    """Ray's own would be readable for everyone on the machine. In another process: a Ray may be running in this one."""
    code = "import os, orchestrator.session as s; s.prepare(new_cluster=True); print(dict(os.environ))"

    def authenticated(home: object) -> dict[str, str]:
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return dict(ast.literal_eval(done.stdout))

    environment, token = authenticated(tmp_path), tmp_path / ".ray" / "auth_token"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in environment
    assert token.stat().st_mode & 0o077 == 0
    first = token.read_text()
    assert len(first) == 64
    authenticated(tmp_path)
    assert token.read_text() == first
    assert (
        len(authenticated("/proc/no/home")["RAY_AUTH_TOKEN"]) == 64
    )  # in many containers there is no home to write to


@pytest.mark.usefixtures("ray_session")
def test_a_pool_does_without_the_worker_that_cannot_start_and_the_evaluation_that_kills_it(tmp_path):
    """Of three workers one never lives; one evaluation ends whatever process takes it: all others get their rows."""
    deadly, *others = sweep()
    died = tmp_path / "died"

    @ray.remote(num_cpus=0, max_restarts=-1)
    class Worker:
        def __init__(self) -> None:
            try:
                died.touch(exist_ok=False)
            except FileExistsError:
                return
            raise OSError("no torch on this machine")

        def ready(self) -> None:
            pass

        def evaluate(self, evaluation: Evaluate, weights: object) -> str:
            del weights
            if evaluation.id == deadly.id:
                os._exit(1)
            return evaluation.id

    parts = {part.id: (part, None) for evaluation in sweep() for part in ingredients(evaluation)}
    pool = RolloutPool.remote(parts, Worker)
    pool.recruit.remote(3)
    answers = ray.get([pool.evaluate.remote(evaluation) for evaluation in (deadly, *others)], timeout=300)
    assert answers[1:] == [evaluation.id for evaluation in others]
    failure = answers[0]
    assert failure.what == describe(deadly)
    assert failure.why.startswith("its process died")


@pytest.mark.usefixtures("ray_session")
def test_a_pool_without_any_worker_says_why():
    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self) -> None:
            raise OSError("no torch on this machine")

        def ready(self) -> None:
            pass

    evaluations = sweep()
    parts = {part.id: (part, None) for evaluation in evaluations for part in ingredients(evaluation)}
    pool = RolloutPool.remote(parts, Worker)
    pool.recruit.remote(2)
    answers = ray.get([pool.evaluate.remote(evaluation) for evaluation in evaluations], timeout=300)
    assert [failure.what for failure in answers] == [describe(evaluation) for evaluation in evaluations]
    assert {failure.why for failure in answers} == {"OSError: no torch on this machine"}
