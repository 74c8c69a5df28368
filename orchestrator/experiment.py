"""What an experiment is: a question, the points that answer it, how to show them, and what the paper says to expect.

A declaration only. Planning, running and reporting read it; it computes nothing and knows nothing of Ray.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from dt.errors import UserError, unknown
from dt.files import expanded
from dt.frozen import Frozen
from dt.language.corpus import DOCSTRINGS
from dt.model.architecture import Architecture
from dt.training.harmony import Harmony, Importance
from orchestrator.data_choice import RECORDED, DataChoice
from orchestrator.profiles import LanguageBudget, Profile
from orchestrator.recipes import (
    AnyPolicy,
    Assemble,
    Auxiliaries,
    Evaluate,
    FineTune,
    Fisher,
    FisherWeights,
    ImportLanguage,
    Language,
    Merge,
    Pretrain,
    Quality,
    Text,
    Train,
    Trained,
    TrainTogether,
)

COSINE = 0.1  # λ1 at the start: the original's README
COSINE_SHARE = 20  # it falls over that part of the training: 5,000 of 100,000 steps

Label = str | float
Measure = Literal["score", "retention", "return", "of_data"]
Where = Mapping[str, Label | tuple[Label, ...]]  # label → the value, or the values, it may take


class Point(Frozen):
    """One evaluation of an experiment under the labels that place it in a figure or table."""

    labels: dict[str, Label]
    evaluation: Evaluate


@dataclass(frozen=True)
class Figure:
    """Panels of lines with intervals. Labels not named here are averaged over."""

    x: str
    series: str
    panel: str | None = None
    ticks: str | None = None  # the label written under each x, where it is not x itself
    kind: str | None = None  # the label that colours the ticks
    value: Measure = "retention"


@dataclass(frozen=True)
class Table:
    """Rows by some labels, columns by another, as the paper prints it."""

    rows: tuple[str, ...]
    column: str | None = None
    value: Measure = "score"
    average: str | None = None  # a label of the rows, over which there is a line for the mean


@dataclass(frozen=True)
class Claim:
    """A statement of the paper as a number: a weighted sum of means over points, against a bound.

    `at least` and `at most` agree when all that the number may be (its interval over episodes, and two standard errors
    over runs) is on that side of the bound and disagree when all of it is on the other; else they are inconclusive. So
    is `about`, unless all of it is within 0.05 of the bound, or beyond.
    likely: why our rows may disagree, shown only where they do; the experiment's own reason unless given.
    ours: it is no claim of the paper's.
    """

    statement: str
    terms: tuple[tuple[float, Where], ...]
    expected: Literal["at least", "at most", "about"]
    bound: float
    value: Measure = "retention"
    likely: str = ""
    ours: bool = False


@dataclass(frozen=True)
class Setting:
    """A profile and a choice of data, with the recipes that experiments are made of."""

    profile: Profile
    data: DataChoice

    @property
    def name(self) -> str:
        """The profile's name, and where the data is not recorded here, that too."""
        return self.profile.name if self.data.name == RECORDED else f"{self.profile.name}-{self.data.name}"

    def expert(self, task: str, seed: int, quality: Quality = "expert") -> Train:
        """The single-task Decision Transformer of a task, dataset and training seed."""
        return Train(
            dataset=self.data.dataset(task, quality, self.profile),
            architecture=self.profile.architecture,
            optimisation=self.profile.optimisation,
            seed=seed,
        )

    def language_expert(
        self,
        task: str,
        seed: int,
        quality: Quality,
        *,
        regularised: float = 0.0,
        co_trained: float = 0.0,
        large: bool = False,
    ) -> Train:
        """A single-task policy that begins as a language model and is drawn to its token clusters (§VI).

        regularised: λ3, co_trained: λ2. Its seed is not the language model's: all begin from one and the same.
        """
        budget = self.profile.large_language if large else self.profile.language
        start = language(budget)
        return Train(
            dataset=self.data.dataset(task, quality, self.profile),
            architecture=start.architecture.model_copy(update={"context": self.profile.architecture.context}),
            optimisation=self.profile.optimisation,
            seed=seed,
            language=start,
            auxiliaries=Auxiliaries(
                cosine=COSINE,
                cosine_decay=max(1, self.profile.optimisation.steps // COSINE_SHARE),
                language=co_trained,
                text=_co_training_text(budget) if co_trained else None,
                distance=regularised,
            ),
        )

    def together(
        self,
        tasks: Sequence[str],
        seed: int,
        quality: Quality,
        *,
        masks: Importance | None = None,
        architecture: Architecture | None = None,
    ) -> TrainTogether:
        """One policy trained on all tasks' data at once: plainly, or as HarmoDT, its masks going by that importance."""
        harmony = None if masks is None else Harmony(interval=self.profile.harmony_interval, importance=masks)
        return TrainTogether(
            datasets=tuple(self.data.dataset(task, quality, self.profile) for task in tasks),
            architecture=architecture or self.profile.architecture,
            optimisation=self.profile.optimisation if harmony is None else self.profile.in_turn(len(tasks)),
            seed=seed,
            harmony=harmony,
        )

    def merge_freeze_finetune(
        self, sources: Sequence[Train], group: str, seed: int = 0, *, fisher: bool = False
    ) -> Assemble:
        """Merge a group of all, freeze it, fine-tune the rest for each task apart: one policy for all tasks (§V-C)."""

        def tuned(target: Train) -> FineTune:
            start = mean_of(target, sources, group, self.fisher if fisher else None)
            return self.fine_tuned(start, target, frozen=group, seed=seed)

        return Assemble(policies=tuple(tuned(source) for source in sources), shared=group)

    def fine_tuned(self, start: AnyPolicy, own: Train, *, frozen: str, seed: int = 0) -> FineTune:
        """A policy trained on with a group frozen, on the data of the policy it was, for as long as that was."""
        return FineTune(policy=start, dataset=own.dataset, optimisation=own.optimisation, seed=seed, frozen=frozen)

    def fisher(self, policy: Trained) -> Fisher:
        """How much each of its parameters matters on its own data: as the original estimates it (§VI)."""
        return Fisher(policy=policy, datasets=policy.datasets, batches=self.profile.fisher_batches)

    def point(self, policy: AnyPolicy, task: str, /, **labels: Label) -> Point:
        """The evaluation of a policy on a task, under that task and those labels."""
        return Point(labels={"task": task, **labels}, evaluation=self.evaluate(policy, task))

    def evaluate(self, policy: AnyPolicy, task: str) -> Evaluate:
        """The profile's evaluation of a policy: the same starts for every policy of a task."""
        return Evaluate(
            policy=policy,
            task=task,
            episodes=self.profile.evaluation_episodes,
            seed=self.profile.evaluation_seed,
            target_return=self.data.target_return(task),
            precision=self.profile.evaluation_precision,
        )


def mean_of(
    target: Trained, sources: Sequence[Trained], group: str, fisher: Callable[[Trained], Fisher] | None = None
) -> Merge:
    """The target with the mean of all sources in `group`: uniform, or weighted by Fisher. Sources hold the target."""
    ordered = (target, *(source for source in sources if source != target))
    weights = FisherWeights(estimates=tuple(fisher(source) for source in ordered)) if fisher else None
    return Merge(sources=ordered, group=group, fisher=weights)


def language(budget: LanguageBudget) -> Language:
    """The language model of a budget: pre-trained here, or taken as it is."""
    if budget.model is not None:
        return _imported(budget.model, budget.clusters)
    corpus, content = _pinned(budget)
    return Pretrain(
        corpus=corpus,
        corpus_hash=content,
        characters=budget.characters,
        vocabulary=budget.vocabulary,
        block=budget.block,
        clusters=budget.clusters,
        architecture=budget.architecture,
        optimisation=budget.optimisation,
    )


def _co_training_text(budget: LanguageBudget) -> Text | None:
    """The budget's text for a model that is taken as it is; one that is pre-trained here goes on with its own.

    Raises UserError for a model without the tokenizer that reads it.
    """
    if budget.model is None:
        return None
    from dt.language.tokenizer import Tokenizer

    if not (tokenizer := _looked_at(budget.model).tokenizer):
        raise UserError(
            f"{budget.model} has no tokenizer, without which nothing can be co-trained with it: put its tokenizer.json "
            "(or vocab.json and merges.txt) beside it"
        )
    Tokenizer(tokenizer)  # refuses what is none
    corpus, content = _pinned(budget)
    if content is None:
        return None
    return Text(corpus=corpus, corpus_hash=content, characters=budget.characters, block=budget.block)


def _pinned(budget: LanguageBudget) -> tuple[str, str | None]:
    """Where a budget's text is found, and its content; of the docstrings, which are each machine's own, None."""
    if budget.text == DOCSTRINGS:
        return DOCSTRINGS, None
    return _anywhere(budget.text), _text_hash(budget.text, budget.characters)


def _imported(source: str, clusters: int) -> ImportLanguage:
    from dt.language.clusters import check_count

    model = _looked_at(source)
    check_count(clusters, model.tokens)
    return ImportLanguage(
        source=_anywhere(source), content_hash=model.content_hash, clusters=clusters, architecture=model.architecture
    )


def _anywhere(source: str) -> str:
    """A folder as it is found from any working directory: workers have another. What is no folder stays."""
    folder = expanded(source)
    return str(folder.absolute()) if folder.exists() else source


class _Foreign(NamedTuple):
    """What has to be known of a model of others before anything is trained."""

    content_hash: str
    architecture: Architecture
    tokens: int
    tokenizer: str


@cache
def _looked_at(source: str) -> _Foreign:
    from dt.language.model import from_hugging_face  # heavy: only where it is used

    model = from_hugging_face(source, clusters=0)
    return _Foreign(model.content_hash, model.architecture, len(model.token_embedding), model.tokenizer)


@cache
def _text_hash(source: str, characters: int) -> str:
    from dt.language.corpus import read_corpus

    return read_corpus(source, characters).content_hash


def merged(target: Train, source: Train, group: str, alpha: float) -> Train | Merge:
    """The target with `group` drawn towards the source; at α = 0 the target itself, evaluated once for all."""
    return target if alpha == 0 else Merge(sources=(target, source), group=group, alpha=alpha)


@dataclass(frozen=True)
class Search:
    """Coefficients that can be searched over instead of run through: see `orchestrator.search`."""

    space: Mapping[str, tuple[Label, ...]]  # coefficient → the values it may take
    points: Callable[[Setting, Mapping[str, Label]], Iterable[Point]]  # of one choice of all coefficients
    targets: tuple[str, ...]  # tasks those points evaluate


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question of the paper, or one of our own."""

    name: str
    title: str
    paper: str  # where in the paper, or "" where it is our own
    question: str
    points: Callable[[Setting], Iterable[Point]]
    show: Figure | Table
    claims: tuple[Claim, ...] = ()
    differences: tuple[str, ...] = ()  # known ones between the paper's set-up and ours, where the results may differ by
    likely: str = ""  # why cells, and claims that give no reason of their own, may differ from the paper's
    search: Search | None = None


@cache
def experiments() -> Mapping[str, Experiment]:
    """Every module of the package `experiments` that declares an EXPERIMENT, by name."""
    import experiments as package

    modules = (importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__))
    found = [module.EXPERIMENT for module in modules if hasattr(module, "EXPERIMENT")]
    return {experiment.name: experiment for experiment in found}


def get_experiment(name: str) -> Experiment:
    """The experiment of that name. Raises UserError naming the nearest valid ones."""
    if name not in experiments():
        raise unknown("experiment", name, experiments())
    return experiments()[name]
