"""Frozen descriptions of everything that can be computed. A recipe's hash is its identity: file name, key, memo.

Recipes nest by value, so two experiments that need the same expert share it without knowing of each other.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache, cached_property, lru_cache
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dt.frozen import Frozen
from dt.merging.groups import parameters_of
from dt.model.architecture import Architecture
from dt.tasks import get_task
from dt.training.optimisation import Optimisation, Precision


class Recipe(Frozen):
    """Base of all recipes. `revision` is part of the identity: raise it when the same fields mean another result."""

    revision: ClassVar[int] = 1

    @cached_property
    def id(self) -> str:
        """The first 20 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:20]

    def canonical_json(self) -> str:
        """Sorted keys, no spaces, the revision of every nested recipe included."""
        return _canonical_fields(self)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Pydantic's, without the cached id of the original, which it would copy along."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("id", "canonical"):
            copy.__dict__.pop(name, None)
        return copy


def _canonical(value: object) -> str:
    """The value's canonical JSON. Written by hand for speed: a plan may hold a hundred thousand recipes."""
    match value:
        case str() | bool() | None:
            return json.dumps(value)
        case int():
            return str(value)
        case float():
            return repr(value + 0.0)  # −0.0 equals 0.0, so it is the same recipe
        case tuple():
            return f"[{','.join(map(_canonical, value))}]"
        case Recipe():
            return value.canonical_json()
        case Frozen():
            return _canonical_frozen(value)
        case _:
            raise TypeError(f"{value!r} has no canonical JSON")


def _canonical_fields(value: Frozen) -> str:
    written = (f'"{name}":{_canonical(getattr(value, name))}' for name in _sorted_names(type(value)))
    return "{" + ",".join(written) + "}"


@cache
def _sorted_names(kind: type[Frozen]) -> tuple[str, ...]:
    return tuple(sorted([*kind.model_fields, *(["revision"] if issubclass(kind, Recipe) else [])]))


_canonical_frozen = lru_cache(maxsize=1024)(_canonical_fields)  # a sweep repeats the same few architectures
_members = lru_cache(maxsize=1024)(parameters_of)


class _OfTask(Recipe):
    task: str

    @field_validator("task")
    @classmethod
    def _known(cls, name: str) -> str:
        return get_task(name).name


Quality = Literal["medium", "expert", "medium-expert"]


class Recording(_OfTask):
    """A dataset recorded here from shipped behaviour policies; `medium-expert` is both, so many of each."""

    kind: Literal["recording"] = "recording"
    quality: Quality
    episodes: int = Field(gt=0)
    seed: int = Field(0, ge=0)


class Imported(_OfTask):
    """A dataset of others, pinned by its content: a Minari id, a D4RL `.hdf5`, or a pickle of the original code."""

    kind: Literal["imported"] = "imported"
    source: str
    quality: str = ""  # for the tables
    content_hash: str


Dataset = Annotated[Recording | Imported, Field(discriminator="kind")]


class Train(Recipe):
    """One single-task Decision Transformer trained from a random initialisation."""

    kind: Literal["train"] = "train"
    dataset: Dataset
    architecture: Architecture = Architecture()
    optimisation: Optimisation = Optimisation()
    seed: int = Field(0, ge=0)

    @property
    def task(self) -> str:
        return self.dataset.task

    def canonical_json(self) -> str:
        return self.canonical

    @cached_property
    def canonical(self) -> str:
        """Its canonical JSON, kept: thousands of merges embed the same expert."""
        return _canonical_fields(self)


class Merge(Recipe):
    """`group` of the first source (the target) becomes (1−α)·target + α·source; the uniform mean where α is None."""

    kind: Literal["merge"] = "merge"
    sources: tuple["Policy", ...] = Field(min_length=2)
    group: str
    alpha: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Merge":
        shapes = {source.architecture for source in self.sources}
        if len(shapes) > 1:
            raise ValueError(
                f"only policies of one architecture can be merged, these differ: {sorted(map(str, shapes))}"
            )
        if self.alpha is not None and len(self.sources) != 2:
            raise ValueError(
                f"alpha weighs a pair; {len(self.sources)} sources take their uniform mean (leave alpha out)"
            )
        _members(self.group, self.architecture)  # raises on an unknown group
        return self

    @property
    def architecture(self) -> Architecture:
        return self.sources[0].architecture


class Perturb(Recipe):
    """`group` replaced as in Table I: by one fixed random draw, by all-ones weights and zero biases, or by nothing."""

    kind: Literal["perturb"] = "perturb"
    policy: "Policy"
    group: str = "attention"
    how: Literal["random", "identity", "removed"]
    seed: int = Field(0, ge=0)  # of the random draw

    @model_validator(mode="after")
    def _known_group(self) -> "Perturb":
        _members(self.group, self.architecture)
        return self

    @property
    def architecture(self) -> Architecture:
        return self.policy.architecture


Policy = Annotated[Train | Merge | Perturb, Field(discriminator="kind")]


class Evaluate(_OfTask):
    """Closed-loop rollouts of a policy: episode i starts from environment seed `seed + i`, whatever the policy."""

    kind: Literal["evaluate"] = "evaluate"
    policy: Policy
    episodes: int = Field(gt=0)
    seed: int = Field(ge=0)
    target_return: float | Literal["best"] = "best"  # "best": the best episode's return of the data the task's head saw
    precision: Precision = "float32"


Merge.model_rebuild()
Perturb.model_rebuild()
Evaluate.model_rebuild()


def inputs(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipes whose artefacts this one needs directly."""
    match recipe:
        case Train():
            return (recipe.dataset,)
        case Merge():
            return recipe.sources
        case Perturb() | Evaluate():
            return (recipe.policy,)
        case _:
            return ()


def closure(recipes: Iterator[Recipe]) -> dict[str, Recipe]:
    """All recipes reachable from these, by id, every input before what needs it."""
    found: dict[str, Recipe] = {}

    def visit(recipe: Recipe) -> None:
        if recipe.id not in found:
            for needed in inputs(recipe):
                visit(needed)
            found[recipe.id] = recipe

    for recipe in recipes:
        visit(recipe)
    return found


def experts(policy: Recipe) -> tuple[Train, ...]:
    """The trained policies a policy is made of, target first, each once."""
    found = closure(iter((policy,)))
    return tuple(recipe for recipe in found.values() if isinstance(recipe, Train))
