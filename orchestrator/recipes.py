"""Frozen descriptions of everything that can be computed. A recipe's hash is its identity: file name, key, memo.

Recipes nest by value, so two experiments that need the same expert share it without knowing of each other.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property, lru_cache
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from dt.errors import UserError
from dt.frozen import Frozen
from dt.language.corpus import DOCSTRINGS
from dt.merging.groups import parameters_of
from dt.model.architecture import Architecture
from dt.tasks import get_task
from dt.training.harmony import Harmony
from dt.training.optimisation import Optimisation, Precision


class Recipe(Frozen):
    """Base of all recipes. `revision` is part of the identity: raise it when the same fields mean another result."""

    revision: ClassVar[int] = 1

    @cached_property
    def id(self) -> str:
        """The first 20 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:20]

    def canonical_json(self) -> str:
        """Sorted keys, no spaces, the revision of every nested recipe included.

        What is None or empty is left out: a recipe may gain an option and keep its identity where that is not used.
        """
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
    fields = ((name, getattr(value, name)) for name in _sorted_names(type(value)))
    written = (f'"{name}":{_canonical(field)}' for name, field in fields if field is not None and field != ())
    return "{" + ",".join(written) + "}"


@cache
def _sorted_names(kind: type[Frozen]) -> tuple[str, ...]:
    return tuple(sorted([*kind.model_fields, *(["revision"] if issubclass(kind, Recipe) else [])]))


_canonical_frozen = lru_cache(maxsize=1024)(_canonical_fields)  # a sweep repeats the same few architectures
_members = lru_cache(maxsize=1024)(parameters_of)


class _Embedded(Recipe):
    """A recipe whose canonical JSON is kept: thousands of merges embed the same expert."""

    def canonical_json(self) -> str:
        return self.canonical

    @cached_property
    def canonical(self) -> str:
        """What `canonical_json` returns."""
        return _canonical_fields(self)


class _OfTask(Recipe):
    task: str

    @field_validator("task")
    @classmethod
    def _known(cls, name: str) -> str:
        return get_task(name).name


Quality = Literal["medium", "expert", "medium-expert"]


class Recording(_OfTask):
    """A dataset recorded here from shipped behaviour policies; `medium-expert` is both, so many of each.

    Whoever ships another policy in the place of one raises `revision`: what was made of the old one's data is another.
    """

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


class Pretrain(Recipe):
    """A GPT-2-style language model trained here, from whose blocks and position table policies can begin (§VI)."""

    kind: Literal["pretrain"] = "pretrain"
    corpus: str = DOCSTRINGS  # or a folder of text, or hf:<dataset id>/<configuration>
    corpus_hash: str | None = None  # pins a corpus of others; what is installed here, the table `texts` pins
    characters: int = Field(gt=0)  # of the corpus, at most
    vocabulary: int = Field(gt=0)
    block: int = Field(gt=0)  # tokens a sequence
    clusters: int = Field(1000, gt=0)  # k-means centres of the token embeddings
    architecture: Architecture
    optimisation: Optimisation
    seed: int = Field(0, ge=0)


class ImportLanguage(Recipe):
    """A GPT-2 of others, its weights unchanged: a Hugging Face folder or hub id, pinned by its content."""

    kind: Literal["import-language"] = "import-language"
    source: str
    content_hash: str
    clusters: int = Field(1000, gt=0)
    architecture: Architecture
    seed: int = Field(0, ge=0)  # of the clustering


Language = Annotated[Pretrain | ImportLanguage, Field(discriminator="kind")]


class Text(Frozen):
    """What co-training reads, as `Pretrain` has it."""

    corpus: str
    corpus_hash: str | None = None
    characters: int = Field(gt=0)
    block: int = Field(gt=0)


class Auxiliaries(Frozen):
    """Losses added to the action error (eq. 5): λ1 cosine to token clusters, λ2 language, λ3 distance to the start."""

    cosine: float = Field(0.0, ge=0)
    cosine_decay: int | None = Field(5_000, gt=0)  # T of the sigmoid schedule; None: constant
    language: float = Field(0.0, ge=0)
    language_decay: int | None = Field(None, gt=0)  # steps over which λ2 falls linearly to 0; None: constant
    sequences: int = Field(2, gt=0)  # of text a step
    text: Text | None = None  # None: what the language model learnt from; where that is not known, docstrings
    distance: float = Field(0.0, ge=0)
    distance_formula: Literal["sum of norms", "norm"] = "sum of norms"  # the original code's, the paper's


class Train(_Embedded):
    """One single-task Decision Transformer trained from a random initialisation, or from a language model's."""

    kind: Literal["train"] = "train"
    dataset: Dataset
    architecture: Architecture = Architecture()
    optimisation: Optimisation = Optimisation()
    seed: int = Field(0, ge=0)
    language: Language | None = None
    auxiliaries: Auxiliaries | None = None

    @model_validator(mode="after")
    def _same_shape(self) -> "Train":
        if self.language is not None and not _same_trunk(self.language.architecture, self.architecture):
            raise ValueError(f"a policy of {self.architecture} cannot begin as a {self.language.architecture}")
        if (
            self.language is None
            and self.auxiliaries is not None
            and self.auxiliaries.cosine + self.auxiliaries.language
        ):
            raise ValueError("the cosine and the language loss need a language model to begin from")
        return self

    @property
    def task(self) -> str:
        return self.dataset.task

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        return (self.dataset,)


class TrainTogether(_Embedded):
    """One multi-task Decision Transformer: a trunk for all tasks, a head each; with `harmony`, a mask each (HarmoDT).

    A step takes a batch of every task; with `harmony`, of one task in turn.
    """

    kind: Literal["train-together"] = "train-together"
    datasets: tuple[Dataset, ...] = Field(min_length=2)
    architecture: Architecture = Architecture()
    optimisation: Optimisation = Optimisation()
    seed: int = Field(0, ge=0)
    harmony: Harmony | None = None

    @model_validator(mode="after")
    def _different_tasks(self) -> "TrainTogether":
        tasks = [dataset.task for dataset in self.datasets]
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"each task once: {', '.join(tasks)} given")
        return self

    @property
    def task(self) -> str:
        return "+".join(dataset.task for dataset in self.datasets)


class FineTune(_Embedded):
    """A policy trained on, for one task: all of its task's head and of its trunk but what is frozen (§V-C, §VI)."""

    kind: Literal["fine-tune"] = "fine-tune"
    policy: "Policy"
    dataset: Dataset
    optimisation: Optimisation = Optimisation()
    seed: int = Field(0, ge=0)
    frozen: str | None = None  # a group of the trunk
    frozen_head: tuple[str, ...] = ()  # parts of the head: embed_timestep, …
    auxiliaries: Auxiliaries | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "FineTune":
        if self.frozen is not None:
            _members(self.frozen, self.architecture)
        if self.task not in tasks_of(self.policy):
            raise ValueError(f"a policy for {', '.join(tasks_of(self.policy))} cannot be fine-tuned on {self.task}")
        if self.auxiliaries is not None and self.auxiliaries.cosine + self.auxiliaries.language:
            raise ValueError("the cosine and the language loss belong to the first training")
        return self

    @property
    def task(self) -> str:
        return self.dataset.task

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        return (self.dataset,)

    @property
    def architecture(self) -> Architecture:
        return self.policy.architecture


class Fisher(Recipe):
    """How much each trunk parameter of a policy matters for its actions on some data (eq. 3)."""

    kind: Literal["fisher"] = "fisher"
    policy: "Policy"
    datasets: tuple[Dataset, ...] = Field(min_length=1)
    variant: Literal["batch", "empirical", "exact"] = "batch"
    batches: int = Field(750, gt=0)
    batch_size: int = Field(64, gt=0)
    seed: int = Field(0, ge=0)


class FisherWeights(Frozen):
    """The weights of a Fisher merge: one estimate for each source."""

    estimates: tuple[Fisher, ...] = Field(min_length=2)
    trace_normalised: bool = True  # each divided by its sum over the blocks, as the original code does


class Merge(Recipe):
    """`group` of the first source (the target) becomes (1−α)·target + α·source; where α is None, the mean of all.

    The mean is uniform, or weighted entry by entry by `fisher` (eq. 4).
    """

    kind: Literal["merge"] = "merge"
    sources: tuple["Policy", ...] = Field(min_length=2)
    group: str
    alpha: float | None = Field(None, ge=0, le=1)
    fisher: FisherWeights | None = None

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
        if self.fisher is not None and self.alpha is not None:
            raise ValueError("alpha and Fisher are two ways to weigh the sources: give one")
        if self.fisher is not None and tuple(each.policy for each in self.fisher.estimates) != self.sources:
            raise ValueError("a Fisher merge takes the Fisher of each source, in their order")
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


class Assemble(Recipe):
    """One multi-task policy: the group `shared` once, all else of each task from that task's own policy (§V-C)."""

    kind: Literal["assemble"] = "assemble"
    policies: tuple["Policy", ...] = Field(min_length=2)  # each gives its first task
    shared: str | None = None  # None: nothing need be shared, as in a shelf of single-task policies

    @model_validator(mode="after")
    def _consistent(self) -> "Assemble":
        tasks = [tasks_of(policy)[0] for policy in self.policies]
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"each task once: {', '.join(tasks)} given")
        if self.shared is not None:
            _members(self.shared, self.architecture)
        return self

    @property
    def architecture(self) -> Architecture:
        return self.policies[0].architecture


class Vote(Recipe):
    """One trunk from a HarmoDT's masks: a weight stays where at least `threshold` tasks keep it."""

    kind: Literal["vote"] = "vote"
    policy: TrainTogether
    threshold: int = Field(2, gt=0)

    @property
    def architecture(self) -> Architecture:
        return self.policy.architecture


Policy = Annotated[Train | TrainTogether | FineTune | Merge | Perturb | Assemble | Vote, Field(discriminator="kind")]
AnyPolicy = Train | TrainTogether | FineTune | Merge | Perturb | Assemble | Vote
Trained = Train | TrainTogether | FineTune  # policies that are stored, each with its curve in `training`
Job = Trained | Pretrain  # what Ray Train runs
Artefact = Job | ImportLanguage | Fisher  # what the store keeps


class Evaluate(_OfTask):
    """Closed-loop rollouts of a policy: episode i starts from environment seed `seed + i`, whatever the policy."""

    kind: Literal["evaluate"] = "evaluate"
    policy: Policy
    episodes: int = Field(gt=0)
    seed: int = Field(ge=0)
    target_return: float | Literal["best"] = "best"  # "best": the best episode's return of the data the task's head saw
    precision: Precision = "float32"


for _model in (FineTune, Fisher, FisherWeights, Merge, Perturb, Assemble, Evaluate):
    _model.model_rebuild()


_POLICY: TypeAdapter[AnyPolicy] = TypeAdapter(Policy)


def read_policy(canonical_json: str) -> AnyPolicy:
    """The policy recipe that was written as this canonical JSON. Raises UserError for one of another version."""

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if name != "revision"}

    try:
        recipe = _POLICY.validate_python(json.loads(canonical_json, object_pairs_hook=plain))
    except ValidationError:
        recipe = None
    if recipe is None or recipe.canonical_json() != canonical_json:
        raise UserError("the recipe was written by another version of mergedt: run its experiment again")
    return recipe


def tasks_of(policy: AnyPolicy) -> tuple[str, ...]:
    """The tasks a policy has heads for; first the one that is its own."""
    match policy:
        case Train():
            return (policy.task,)
        case TrainTogether():
            return tuple(dataset.task for dataset in policy.datasets)
        case FineTune():
            return tuple(dict.fromkeys((policy.task, *tasks_of(policy.policy))))
        case Merge():
            return tasks_of(policy.sources[0])
        case Perturb() | Vote():
            return tasks_of(policy.policy)
        case Assemble():
            return tuple(tasks_of(part)[0] for part in policy.policies)


def inputs(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipes whose artefacts this one needs directly."""
    match recipe:
        case Train():
            return (recipe.dataset, *([recipe.language] if recipe.language else []))
        case TrainTogether():
            return recipe.datasets
        case FineTune():
            return (recipe.policy, recipe.dataset)
        case Fisher():
            return (recipe.policy, *recipe.datasets)
        case Merge():
            return (*recipe.sources, *(recipe.fisher.estimates if recipe.fisher else ()))
        case Perturb() | Vote() | Evaluate():
            return (recipe.policy,)
        case Assemble():
            return recipe.policies
        case _:
            return ()


def closure(recipes: Iterable[Recipe]) -> dict[str, Recipe]:
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


def ingredients(recipe: Recipe) -> Iterator[Artefact]:
    """The stored artefacts a recipe is made from, target first, repeats included; hashes nothing, so it is fast.

    Of a stored artefact, that is itself: what it took to make it is behind it.
    """
    match recipe:
        case Train() | TrainTogether() | FineTune() | Fisher() | Pretrain() | ImportLanguage():
            yield recipe
        case _:
            for needed in inputs(recipe):
                yield from ingredients(needed)


def trained(policy: Recipe) -> Iterator[Trained]:
    """The trained policies a policy is made of, target first, repeats included."""
    return (recipe for recipe in ingredients(policy) if isinstance(recipe, Trained))


def origin(policy: AnyPolicy, task: str) -> Trained:
    """The trained policy that a task's part of a policy was before anything was merged into it or perturbed."""
    match policy:
        case Train() | TrainTogether():
            return policy
        case FineTune():
            return policy if isinstance(policy.policy, Trained) else origin(policy.policy, task)
        case Merge():
            return origin(policy.sources[0], task)
        case Perturb() | Vote():
            return origin(policy.policy, task)
        case Assemble():
            return origin(next(part for part in policy.policies if tasks_of(part)[0] == task), task)


def dataset_of(policy: Trained, task: str) -> Dataset:
    """What a trained policy was trained on, of a task."""
    behind = (policy, *(recipe for recipe in closure([policy]).values() if isinstance(recipe, Trained)))
    return next(dataset for recipe in behind for dataset in recipe.datasets if dataset.task == task)


def _same_trunk(one: Architecture, other: Architecture) -> bool:
    return one.model_copy(update={"context": other.context}) == other
