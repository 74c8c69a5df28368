"""The experiments as declarations: they ask exactly what the paper asked, and share what can be shared."""

import json
import pickle
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from pydantic import ValidationError

from dt.data.trajectories import Trajectories, concatenate
from dt.errors import UserError
from dt.merging.groups import parameters_of
from dt.merging.groups import units as units_of
from experiments._units import kind_of
from experiments.precision import MORE
from orchestrator.answers import baseline, select
from orchestrator.cli_work import evaluations_of
from orchestrator.data_choice import choose_data
from orchestrator.experiment import Figure, Point, Setting, experiments, get_experiment, merged
from orchestrator.making import load_dataset
from orchestrator.profiles import PROFILES, get_profile
from orchestrator.recipes import Evaluate, Imported, Merge, Perturb, Train, trained
from orchestrator.store import Store
from orchestrator.tables import Tables
from tests.toy import noise

LAPTOP = Setting(get_profile("laptop"), choose_data("recorded"))
ONE_SEED = Setting(get_profile("laptop").with_seeds([0]), choose_data("recorded"))


def points(name: str, setting: Setting = ONE_SEED) -> list[Point]:
    return list(get_experiment(name).points(setting))


@pytest.mark.parametrize("name", experiments())
@pytest.mark.parametrize("profile", PROFILES)
def test_every_experiment_at_every_profile(name: str, profile: str) -> None:
    smoke = get_profile("smoke")  # whose language models need no network to be named
    languages = {"language": smoke.language, "large_language": smoke.large_language}
    setting = Setting(get_profile(profile).model_copy(update=languages), choose_data("recorded"))
    experiment, asked = get_experiment(name), points(name, setting)
    assert experiment.name == name
    labels = {tuple(sorted(point.labels.items())) for point in asked}
    assert len(labels) == len(asked)  # labels tell points apart
    assert len({tuple(sorted(point.labels)) for point in asked}) == 1  # all have the same ones
    ids = {point.evaluation.id for point in asked}
    assert {baseline(point.evaluation).id for point in asked} <= ids  # retention has its denominator
    episodes = setting.profile.evaluation_episodes * (MORE if name == "precision" else 1)
    assert all(point.evaluation.episodes == episodes for point in asked)
    for claim in experiment.claims:
        for _, where in claim.terms:
            assert select(asked, where), claim.statement


def test_the_committed_tables_declare_the_laptop_profile() -> None:
    """Whole, and as it is now: what asks the table `experiments` gets what the report shows."""
    results = Path(__file__).parents[1] / "results" / "tables"
    if not results.is_dir():
        pytest.skip("the committed tables are not here")
    declared = Tables(results).some("experiments", where=pc.field("profile") == "laptop").to_pylist()
    for name in experiments().keys() - {"demo"}:
        stated = {(row["evaluation"], row["labels"]) for row in declared if row["experiment"] == name}
        asked = points(name, LAPTOP)
        assert stated == {(point.evaluation.id, json.dumps(point.labels, ensure_ascii=False)) for point in asked}, name


def test_figure_2a_is_six_ordered_pairs_by_units_by_alphas() -> None:
    asked = points("figure_2a")
    units = units_of(ONE_SEED.profile.architecture, ONE_SEED.profile.granularity)
    merges = [point for point in asked if point.labels["alpha"] != 0]
    assert len(units) == 13
    assert len(merges) == 6 * 13 * 2
    assert Counter(point.labels["unit"] for point in merges) == dict.fromkeys(units, 12)
    for point in merges:
        policy = point.evaluation.policy
        assert isinstance(policy, Merge)
        assert [train.task for train in trained(policy)] == [point.labels["target"], point.labels["source"]]
        assert (policy.group, policy.alpha) == (point.labels["unit"], point.labels["alpha"])
        assert point.evaluation.task == point.labels["target"]


def test_figure_2b_merges_prefixes_up_to_the_whole_trunk() -> None:
    architecture = ONE_SEED.profile.architecture
    asked = [point for point in points("figure_2b") if point.labels["target"] == "hopper"]
    assert [point.labels["merged"] for point in asked] == list(range(14))
    assert isinstance(asked[0].evaluation.policy, Train)
    sizes = []
    for point in asked[1:]:
        policy = point.evaluation.policy
        assert isinstance(policy, Merge)
        assert policy.alpha == 0.5
        sizes.append(len(parameters_of(policy.group, architecture)))
    per_block = (2, 4, 2, 4)  # tensors of ln_1, attn, ln_2, mlp
    assert sizes == list(accumulate((*per_block * 3, 2)))
    last = asked[-1].evaluation.policy
    assert isinstance(last, Merge)
    assert parameters_of(last.group, architecture) == parameters_of("trunk", architecture)


def test_figure_3_covers_the_grid_both_ways_and_shares_alpha_0() -> None:
    asked = points("figure_3", LAPTOP)
    seeds = len(LAPTOP.profile.training_seeds)
    assert len(asked) == 3 * 2 * 11 * seeds
    unmerged = [point.evaluation for point in asked if point.labels["alpha"] == 0]
    assert len(unmerged) == 6 * seeds
    assert len({evaluation.id for evaluation in unmerged}) == 3 * seeds
    expert_ids = {point.evaluation.id for point in points("experts", LAPTOP)}
    assert {evaluation.id for evaluation in unmerged} <= expert_ids  # the very same evaluations
    for point in asked:
        assert len({train.seed for train in trained(point.evaluation.policy)}) == 1  # pairs of one training seed


def test_table_1_is_nine_policies_in_four_variants_with_one_draw() -> None:
    asked = points("table_1")
    assert Counter(point.labels["attention"] for point in asked) == dict.fromkeys(
        ("original", "random", "identity", "removed"), 9
    )
    draws = {
        point.evaluation.policy.seed
        for point in asked
        if isinstance(point.evaluation.policy, Perturb) and point.evaluation.policy.how == "random"
    }
    assert len(draws) == 1
    assert {point.labels["quality"] for point in asked} == {"medium-expert", "medium", "expert"}


def test_some_of_the_points_by_their_labels() -> None:
    def ids(name: str, *only: str) -> set[str]:
        return {evaluation.id for evaluation in evaluations_of([get_experiment(name)], ONE_SEED, only)}

    removed = {p.evaluation.id for p in points("table_1") if p.labels["attention"] in ("removed", "original")}
    one = {
        p.evaluation.id for p in points("table_1") if p.labels["task"] == "hopper" and p.labels["quality"] == "medium"
    }
    assert ids("table_1", "attention=removed") == removed  # with those before, for retention
    assert ids("table_1", "attention=removed", "task=hopper", "quality=medium") == removed & one
    halfway = [p.evaluation for p in points("figure_3") if p.labels["alpha"] in (0, 0.5, 1)]
    assert ids("figure_3", "alpha=0.5", "alpha=1") == {evaluation.id for evaluation in halfway}
    assert ids("figure_3") == {p.evaluation.id for p in points("figure_3")}


def test_multitask_at_the_usual_budget_is_that_of_table_3() -> None:
    shared = {p.evaluation.id for p in points("multitask")} & {p.evaluation.id for p in points("table_3")}
    assert len(shared) == 4 * 3  # on three robots: the policies of all of them, and each robot's own
    usual = {"HarmoDT": ONE_SEED.profile.in_turn(3), "HarmoDT, random masks": ONE_SEED.profile.in_turn(3)}
    for point in points("multitask"):
        steps = usual.get(str(point.labels["policy"]), ONE_SEED.profile.optimisation).steps
        assert point.evaluation.policy.optimisation.steps == point.labels["budget"] * steps  # type: ignore[union-attr]


def test_merging_nothing_is_the_expert_itself() -> None:
    target, source = ONE_SEED.expert("hopper", 0), ONE_SEED.expert("walker2d", 0)
    assert merged(target, source, "attention", 0.0) is target
    assert merged(target, source, "attention", 1.0) == Merge(sources=(target, source), group="attention", alpha=1.0)


def test_the_baseline_has_its_own_identity() -> None:
    target, source = ONE_SEED.expert("hopper", 0), ONE_SEED.expert("walker2d", 0)
    evaluation = ONE_SEED.evaluate(merged(target, source, "mlp", 0.5), "hopper")
    assert evaluation.id  # computed and kept before
    assert baseline(evaluation).id == ONE_SEED.evaluate(target, "hopper").id != evaluation.id


def test_units_have_kinds() -> None:
    kinds = Counter(kind_of(unit) for unit in units_of(ONE_SEED.profile.architecture, "fine"))
    assert kinds == {"attention": 6, "mlp": 6, "layernorm": 7}
    coarse = [kind_of(unit) for unit in units_of(ONE_SEED.profile.architecture, "coarse")]
    assert coarse == ["layernorm", "attention", "layernorm", "mlp"] * 3 + ["layernorm"]


def test_shown_labels_exist() -> None:
    for name, experiment in experiments().items():
        show = experiment.show
        names = {show.x, show.series, show.panel} if isinstance(show, Figure) else {*show.rows, show.column}
        assert names - {None} <= points(name)[0].labels.keys()


def test_the_return_target_follows_the_data(tmp_path: object) -> None:
    del tmp_path
    imported = choose_data("/data/{task}-{quality}-v2.hdf5")
    assert [imported.target_return(task) for task in ("hopper", "halfcheetah", "walker2d")] == [3600, 12000, 5000]
    assert choose_data("recorded").target_return("hopper") == "best"


def test_medium_expert_of_others_is_a_file_of_its_own_or_both(tmp_path: Path) -> None:
    template = str(tmp_path / "{task}_{quality}-v2.pkl")
    parts = {"medium": noise("hopper", seed=1), "expert": noise("hopper", seed=2)}
    for quality, data in parts.items():
        write_pickle(tmp_path / f"hopper_{quality}-v2.pkl", data)
    both = choose_data(template).dataset("hopper", "medium-expert", ONE_SEED.profile)
    loaded = load_dataset(both, Store(tmp_path))
    assert loaded.content_hash == concatenate(list(parts.values())).content_hash
    assert loaded.episodes == 8
    write_pickle(tmp_path / "hopper_medium_expert-v2.pkl", noise("hopper", seed=3))
    own = choose_data(template).dataset("hopper", "medium-expert", ONE_SEED.profile)
    assert isinstance(own, Imported)
    assert own.source.endswith("hopper_medium_expert-v2.pkl")
    assert own.quality == both.quality == "medium-expert"


def write_pickle(path: Path, data: Trajectories) -> None:
    """As the original code keeps its data."""
    episodes = [
        {
            "observations": data.observations[start:stop],
            "next_observations": data.observations[start:stop],
            "actions": data.actions[start:stop],
            "rewards": data.rewards[start:stop],
            "terminals": np.arange(start, stop) == stop - 1,
        }
        for start, stop in pairwise(data.offsets)
    ]
    path.write_bytes(pickle.dumps(episodes))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("recored", "unknown data 'recored'"),
        ("/data/{robot}-{quality}.hdf5", "may name only"),
        ("/data/{task-{quality}.hdf5", "not a template"),
        ("/data/{}.hdf5", r"asks for \{\}: a template may name only"),
        ("/data/{task}.zip", "minari:mujoco"),
        ("/data/{task:d}.pkl", "has ':' or '!' within braces"),
        ("/data/{task:{quality}}.pkl", "has ':' or '!' within braces"),
        ("/data/{task!x}.pkl", "has ':' or '!' within braces"),
        ("/data/hopper-{quality}.pkl", r"names one file for all tasks: write \{task\} where"),
        ("minari:mujoco/hopper/expert-v0", r"names one file for all tasks: write \{task\} where"),
    ],
)
def test_wrong_data_options_say_what_exists(option: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        choose_data(option)


def test_a_template_may_leave_out_the_quality_but_not_name_a_home_that_is_not_there() -> None:
    assert choose_data("/data/{task}.pkl").name == "data-task-pkl"
    with pytest.raises(UserError, match=r"no home folder for the path '~nosuch/hopper\.pkl'"):
        choose_data("~nosuch/{task}.pkl").dataset("hopper", "expert", ONE_SEED.profile)


def test_a_missing_file_is_named_at_planning() -> None:
    setting = Setting(get_profile("smoke"), choose_data("/nowhere/{task}-{quality}-v2.hdf5"))
    with pytest.raises(UserError, match=r"/nowhere/halfcheetah-expert-v2\.hdf5"):
        points("figure_3", setting)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: get_experiment("figure3"), "figure_3"),
        (lambda: get_profile("laptob"), "laptop"),
        (lambda: ONE_SEED.expert("hoper", 0), "hopper"),
        (lambda: select(points("figure_3"), {"alfa": 0.5}), "'alfa'"),
        (lambda: get_profile("smoke").with_seeds([]), "at least one"),
        (lambda: get_profile("§"), r"^unknown profile '§': valid are \w+, "),
    ],
)
def test_mistakes_name_what_is_valid(call: object, says: str) -> None:
    with pytest.raises((UserError, ValidationError), match=says):
        call()  # type: ignore[operator]


def test_a_profile_of_other_seeds_has_another_name() -> None:
    """So that its points do not take the place of the profile's own in the tables."""
    assert ONE_SEED.name == "laptop-seeds-0"
    assert get_profile("laptop").with_seeds([0, 1]).name == "laptop-seeds-0-1"


@pytest.mark.parametrize("seeds", [[0, 0], [-1]])
def test_seeds_are_different_and_not_negative(seeds: list[int]) -> None:
    with pytest.raises(ValidationError, match="different and not negative"):
        get_profile("smoke").with_seeds(seeds)


def test_alpha_outside_is_refused() -> None:
    target, source = ONE_SEED.expert("hopper", 0), ONE_SEED.expert("walker2d", 0)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        merged(target, source, "attention", 1.5)
    with pytest.raises(ValidationError):
        Evaluate(policy=target, task="hopper", episodes=0, seed=0)
