"""Recipes: what their identity is, and what it is not."""

import hashlib
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dt.errors import UserError
from dt.model.architecture import Architecture
from dt.training.optimisation import Optimisation
from orchestrator.recipes import Evaluate, Imported, Merge, Perturb, Recording, Train, closure, inputs, trained

HOPPER = Recording(task="hopper", quality="expert", episodes=25, seed=0)
TRAIN = Train(dataset=HOPPER)
OTHER = Train(dataset=Imported(task="walker2d", source="/data/é.hdf5", content_hash="ab"), seed=3)
MERGE = Merge(sources=(TRAIN, OTHER), group="attention", alpha=0.3)

# The canonical JSON written out: what an id stands for must never change unnoticed, or every stored result is lost.
HOPPER_FIELDS = {"kind": "recording", "task": "hopper", "quality": "expert", "episodes": 25, "seed": 0, "revision": 1}
ARCHITECTURE_FIELDS = {"width": 128, "layers": 3, "heads": 1, "activation": "relu", "context": 20}
OPTIMISATION_FIELDS = {
    "steps": 100_000,
    "batch_size": 64,
    "learning_rate": 1e-4,
    "warmup_steps": 10_000,
    "schedule": "constant",
    "weight_decay": 1e-4,
    "clip_norm": 0.25,
    "dropout": 0.1,
    "precision": "float32",
}
TRAIN_FIELDS = {
    "kind": "train",
    "dataset": HOPPER_FIELDS,
    "architecture": ARCHITECTURE_FIELDS,
    "optimisation": OPTIMISATION_FIELDS,
    "seed": 0,
    "revision": 1,
}
OTHER_FIELDS = TRAIN_FIELDS | {
    "dataset": {
        "kind": "imported",
        "task": "walker2d",
        "source": "/data/é.hdf5",
        "quality": "",
        "content_hash": "ab",
        "revision": 1,
    },
    "seed": 3,
}
MERGE_FIELDS = {
    "kind": "merge",
    "sources": [TRAIN_FIELDS, OTHER_FIELDS],
    "group": "attention",
    "alpha": 0.3,
    "revision": 1,
}
EVALUATE_FIELDS = {
    "kind": "evaluate",
    "task": "hopper",
    "policy": MERGE_FIELDS,
    "episodes": 25,
    "seed": 7,
    "target_return": 3600.0,
    "precision": "float32",
    "revision": 1,
}

GOLDEN = ("7aa6840f244aa75daa0a", "e22aff70084eefa3ade7", "689c5e7bb128f4fa4ca7")


def _canonical(fields: object) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        (HOPPER, HOPPER_FIELDS),
        (TRAIN, TRAIN_FIELDS),
        (OTHER, OTHER_FIELDS),
        (MERGE, MERGE_FIELDS),
        (Evaluate(policy=MERGE, task="hopper", episodes=25, seed=7, target_return=3600), EVALUATE_FIELDS),
        (
            Perturb(policy=TRAIN, how="random"),
            {
                "kind": "perturb",
                "policy": TRAIN_FIELDS,
                "group": "attention",
                "how": "random",
                "seed": 0,
                "revision": 1,
            },
        ),
    ],
)
def test_the_id_is_the_hash_of_the_canonical_json(recipe, fields):
    assert recipe.canonical_json() == _canonical(fields)
    assert recipe.id == hashlib.sha256(_canonical(fields).encode()).hexdigest()[:20]


def test_ids_of_the_repository_stay():
    assert (HOPPER.id, TRAIN.id, MERGE.id) == GOLDEN


@given(
    width=st.integers(1, 512),
    rate=st.floats(1e-9, 1.0),
    alpha=st.none() | st.floats(0, 1),
    target=st.just("best") | st.floats(-1e6, 1e6),
    seed=st.integers(0, 2**63),
)
def test_the_canonical_json_reads_back_as_the_recipe(width, rate, alpha, target, seed):
    train = Train(
        dataset=HOPPER,
        architecture=Architecture(width=width, heads=1),
        optimisation=Optimisation(learning_rate=rate),
        seed=seed,
    )
    recipe = Evaluate(
        policy=Merge(sources=(train, train), group="mlp", alpha=alpha),
        task="hopper",
        episodes=1,
        seed=seed,
        target_return=target,
    )
    text = recipe.canonical_json()
    assert text == _canonical(json.loads(text))  # sorted, without spaces, numbers as JSON writes them
    assert Evaluate.model_validate(_without_revisions(json.loads(text))) == recipe
    again = pickle.loads(pickle.dumps(recipe))
    assert again == recipe
    assert again.id == recipe.id


def _without_revisions(value):
    if isinstance(value, dict):
        return {name: _without_revisions(item) for name, item in value.items() if name != "revision"}
    return [_without_revisions(item) for item in value] if isinstance(value, list) else value


def test_equal_recipes_have_one_id():
    minus_zero = Merge(sources=(TRAIN, OTHER), group="attention", alpha=-0.0)
    zero = Merge(sources=(TRAIN, OTHER), group="attention", alpha=0)
    assert minus_zero == zero
    assert minus_zero.id == zero.id
    whole = Evaluate(policy=TRAIN, task="hopper", episodes=1, seed=0, target_return=3600)
    real = Evaluate(policy=TRAIN, task="hopper", episodes=1, seed=0, target_return=3600.0)
    assert whole.id == real.id


def test_a_changed_copy_has_its_own_id():
    assert HOPPER.id
    assert TRAIN.canonical_json()
    copy = HOPPER.model_copy(update={"quality": "medium"})
    assert copy.id == Recording(task="hopper", quality="medium", episodes=25).id
    assert TRAIN.model_copy(update={"seed": 5}).id == Train(dataset=HOPPER, seed=5).id


def test_a_raised_revision_changes_the_id_of_all_that_rests_on_it(monkeypatch):
    def ids():
        train = Train(dataset=Recording(task="hopper", quality="expert", episodes=25))
        return [r.id for r in (train.dataset, train, Perturb(policy=train, how="random"))]

    before = ids()
    monkeypatch.setattr(Recording, "revision", 2)
    assert not set(before) & set(ids())


def test_wrong_recipes_are_refused():
    narrow = Train(dataset=HOPPER, architecture=Architecture(width=64))
    with pytest.raises(ValidationError, match="one architecture"):
        Merge(sources=(TRAIN, narrow), group="attention", alpha=0.5)
    with pytest.raises(ValidationError, match="uniform mean"):
        Merge(sources=(TRAIN, OTHER, TRAIN), group="attention", alpha=0.5)
    with pytest.raises(UserError, match="did you mean 'attention'"):
        Merge(sources=(TRAIN, OTHER), group="atention", alpha=0.5)
    with pytest.raises(UserError, match="did you mean 'hopper'"):
        Recording(task="hoper", quality="expert", episodes=1)
    with pytest.raises(ValidationError, match="extra_forbidden"):
        Train(dataset=HOPPER, sed=1)
    with pytest.raises(ValidationError):
        Evaluate(policy=TRAIN, task="hopper", episodes=1, seed=0, target_return=float("nan"))


def test_the_closure_holds_every_input_once_before_what_needs_it():
    evaluations = [
        Evaluate(policy=Merge(sources=(TRAIN, OTHER), group="mlp", alpha=alpha), task="hopper", episodes=1, seed=0)
        for alpha in (0.1, 0.2)
    ]
    found = closure(iter(evaluations))
    assert [recipe.kind for recipe in found.values()] == [
        "recording", "train", "imported", "train", "merge", "evaluate", "merge", "evaluate",
    ]  # fmt: skip
    order = list(found)
    assert all(order.index(i.id) < order.index(r.id) for r in found.values() for i in inputs(r))
    assert tuple(trained(evaluations[0].policy)) == (TRAIN, OTHER)
