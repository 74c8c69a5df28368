"""Plans: what is asked for and all it needs, minus what is there."""

import time

import numpy as np
import torch
from test_store import fresh_policy
from toy import OPTIMISATION, TASKS, evaluation, expert, merged, recording, shared, sweep

from dt.behaviour.record import record
from dt.rollout.evaluate import Episodes
from orchestrator.plan import Plan, make_plan, parts, parts_of
from orchestrator.recipes import (
    Evaluate,
    Fisher,
    FisherWeights,
    Imported,
    Merge,
    Perturb,
    Recording,
    Train,
    ingredients,
    inputs,
    trained,
)
from orchestrator.rows import episode_rows
from orchestrator.store import Store
from orchestrator.tables import Tables


def _commit_rows(tables: Tables, asked: Evaluate) -> None:
    count = asked.episodes
    results = Episodes(np.arange(count), np.ones(count), np.full(count, 3), np.ones(count, bool))
    tables.append("episodes", asked.id, episode_rows(asked, results))


def test_an_empty_store_lacks_everything_once(tmp_path):
    plan = make_plan([*sweep(), *sweep()], Store(tmp_path), Tables(tmp_path / "tables"))
    assert plan.evaluations == tuple(sweep())
    assert plan.trainings == (expert("hopper"), expert("walker2d"))
    assert plan.recordings == (recording("hopper"), recording("walker2d"))
    assert plan.gradient_steps == 2 * OPTIMISATION.steps
    assert plan.episodes == 12 * 2
    assert (plan.stored_recordings, plan.stored_artefacts, plan.stored_evaluations) == (0, (), 0)
    assert (
        "2 recordings (6 episodes), 2 trainings (440 gradient steps), 12 evaluations (24 episodes)" in plan.describe()
    )
    assert list(tmp_path.iterdir()) == []


def test_only_what_a_missing_evaluation_needs_is_trained(tmp_path):
    store, tables = Store(tmp_path), Tables(tmp_path / "tables")
    alone, merge = evaluation(expert("walker2d"), "walker2d"), evaluation(merged("mlp", 0.5))
    _commit_rows(tables, merge)
    plan = make_plan([alone, merge], store, tables)
    assert plan.evaluations == (alone,)
    assert plan.trainings == (expert("walker2d"),)
    assert plan.stored_evaluations == 1

    _commit_rows(tables, alone)  # all answered: policies that are gone, as in a fresh clone, need not come back …
    plan = make_plan([alone, merge], store, tables)
    assert plan.empty
    assert plan.describe() == "nothing to compute: all 2 evaluations are stored"
    assert make_plan([alone, merge, expert("hopper")], store, tables).trainings == (expert("hopper"),)  # … unless asked

    store.save(expert("hopper"), fresh_policy(expert("hopper")))
    plan = make_plan([alone, merge, expert("hopper"), merged("mlp", 0.1)], store, tables)
    assert plan.trainings == (expert("walker2d"),)
    assert plan.stored_trainings == (expert("hopper"),)
    assert (plan.fishers, plan.stored_fishers) == ((), ())


def test_estimates_are_told_from_trainings(tmp_path):
    store, tables = Store(tmp_path), Tables(tmp_path / "tables")
    experts = (expert("hopper"), expert("walker2d"))
    known, unknown = (Fisher(policy=each, datasets=each.datasets, batches=1) for each in experts)
    policy = fresh_policy(experts[0])
    store.save(experts[0], policy)
    store.save(known, {name: torch.ones_like(tensor) for name, tensor in policy.trunk.items()})
    merge = Merge(sources=experts, group="mlp", fisher=FisherWeights(estimates=(known, unknown)))
    plan = make_plan([evaluation(merge)], store, tables)
    assert (plan.trainings, plan.stored_trainings) == (experts[1:], experts[:1])
    assert (plan.fishers, plan.stored_fishers) == ((unknown,), (known,))


def test_a_recording_is_needed_by_a_missing_training_only(tmp_path):
    store, tables = Store(tmp_path), Tables(tmp_path / "tables")
    one = Recording(task="hopper", quality="medium-expert", episodes=1)
    train = Train(dataset=one)
    medium, both = parts(one)
    assert (medium.quality, both.quality) == ("medium", "expert")
    assert make_plan([train], store, tables).recordings == (medium, both)
    record("hopper", "medium", 1, 0, store.datasets)
    plan = make_plan([train, train.dataset], store, tables)
    assert plan.recordings == (both,)
    assert plan.stored_recordings == 1
    store.save(train, fresh_policy(train))
    assert make_plan([evaluation(train)], store, tables).recordings == ()
    assert make_plan([one], store, tables).recordings == (both,)
    imported = Train(dataset=Imported(task="hopper", source="mujoco/hopper/expert-v0", content_hash="x"))
    assert make_plan([evaluation(imported)], store, tables).recordings == ()


def test_a_plan_is_cut_into_parts_that_lead_to_rows(tmp_path):
    experts = [[expert(task, steps=steps) for task in TASKS] for steps in range(1, 8)]
    asked = [evaluation(Merge(sources=tuple(pair), group="mlp", alpha=a)) for pair in experts for a in (0.0, 0.5)]
    asked = [*asked, evaluation(shared()), evaluation(merged("mlp", 0.5))]  # whose experts were seen before
    alone = expert("hopper", steps=99)
    plan = make_plan([alone, *asked], Store(tmp_path), Tables(tmp_path / "tables"))
    cut = parts_of(plan, 4)
    assert [len(part.trainings) for part in cut] == [4, 4, 4, 6, 1]
    assert [one for part in cut for one in part.evaluations] == asked
    made = [artefact.id for part in cut for artefact in part.artefacts]
    assert sorted(made) == sorted(artefact.id for artefact in plan.artefacts)
    assert cut[-1].artefacts == (alone,)
    seen: set[str] = set()
    for part in cut:
        for artefact in part.artefacts:
            assert {one.id for needed in inputs(artefact) for one in ingredients(needed)} <= seen
            seen.add(artefact.id)
        for one in part.evaluations:
            assert {made.id for made in ingredients(one)} <= seen
    (whole,) = parts_of(plan, 100)
    assert (len(whole.artefacts), len(whole.evaluations)) == (len(plan.artefacts), len(asked))


def test_trained_policies_behind_a_policy():
    policy = Merge(sources=(Perturb(policy=merged("mlp", 0.5), how="removed"), expert("hopper")), group="trunk")
    assert list(trained(policy)) == [expert("hopper"), expert("walker2d"), expert("hopper")]


def test_a_hundred_thousand_recipes_are_planned_in_seconds(tmp_path):
    sources = (expert("hopper"), expert("walker2d"))
    asked = [
        Evaluate(policy=Merge(sources=sources, group="mlp", alpha=i / 20_000), task="hopper", episodes=1, seed=seed)
        for i in range(10_000)
        for seed in range(2)
    ]
    clock = time.process_time()
    plan: Plan = make_plan(asked, Store(tmp_path), Tables(tmp_path / "tables"))
    assert len(plan.evaluations) == 20_000
    assert len(plan.trainings) == 2
    assert time.process_time() - clock < 10  # 1 s on an idle core, for a fifth of them
