"""Making what recipes describe, in whatever process: policies from their ingredients, training runs, estimates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dt.errors import UserError
from orchestrator.recipes import (
    AnyPolicy,
    Artefact,
    Assemble,
    Auxiliaries,
    Dataset,
    FineTune,
    Fisher,
    Imported,
    ImportLanguage,
    Job,
    Language,
    Merge,
    Perturb,
    Pretrain,
    Recipe,
    Text,
    Train,
    TrainTogether,
    Vote,
    ingredients,
    tasks_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dt.data.trajectories import Trajectories
    from dt.language.corpus import Corpus
    from dt.language.model import LanguageModel
    from dt.merging.merge import Fisher as FisherEstimate
    from dt.model.policy import Policy
    from dt.training.loop import TrainingState
    from dt.training.objective import Auxiliary
    from orchestrator.store import Store

    Made = Mapping[str, Policy | FisherEstimate]  # by recipe id


def realise(recipe: AnyPolicy, made: Made) -> Policy:
    """The policy a recipe describes, from its `ingredients`."""
    from dt.merging.fisher import trace_normalised
    from dt.merging.merge import assemble, merge, perturb
    from dt.training.masks import vote

    match recipe:
        case Merge():
            sources = [realise(source, made) for source in recipe.sources]
            if recipe.fisher is None:
                return merge(sources, recipe.group, recipe.alpha)
            estimates = [_estimate(made, estimate) for estimate in recipe.fisher.estimates]
            if recipe.fisher.trace_normalised:
                estimates = [trace_normalised(estimate) for estimate in estimates]
            return merge(sources, recipe.group, fisher=estimates)
        case Perturb():
            return perturb(realise(recipe.policy, made), recipe.group, recipe.how, recipe.seed)
        case Assemble():
            parts = {tasks_of(part)[0]: realise(part, made) for part in recipe.policies}
            return assemble(parts, recipe.shared)
        case Vote():
            return vote(realise(recipe.policy, made), recipe.threshold)
        case _:
            policy = made[recipe.id]
            assert not isinstance(policy, Mapping)
            return policy


def _estimate(made: Made, recipe: Fisher) -> FisherEstimate:
    estimate = made[recipe.id]
    assert isinstance(estimate, Mapping)
    return estimate


def from_store(recipe: Recipe, store: Store) -> Made:
    """The ingredients of a policy recipe. Raises UserError naming the file of one that is missing or damaged."""
    made: dict[str, Policy | FisherEstimate] = {}
    for ingredient in ingredients(recipe):
        if ingredient.id not in made and not isinstance(ingredient, Pretrain | ImportLanguage):
            made[ingredient.id] = (
                store.load_fisher(ingredient) if isinstance(ingredient, Fisher) else store.load_policy(ingredient)
            )
    return made


def load_dataset(dataset: Dataset, store: Store) -> Trajectories:
    """The data of a recipe. Raises UserError when it is missing, damaged, or not the one the recipe names."""
    from dt.data.sources import load_imported, load_recorded
    from orchestrator.plan import recording_paths

    if not isinstance(dataset, Imported):
        for path in recording_paths(dataset, store):
            store.place.fetch(path)
        return load_recorded(dataset.task, dataset.quality, dataset.episodes, dataset.seed, store.datasets)
    trajectories = load_imported(dataset.source, dataset.task, store.datasets)
    if trajectories.content_hash != dataset.content_hash:
        raise UserError(
            f"the dataset {dataset.source} has changed: its content is {trajectories.content_hash[:12]}…, the recipe's "
            f"{dataset.content_hash[:12]}…; restore it, or run the command again to use the new one"
        )
    return trajectories


def begin(recipe: Job, store: Store, device: str) -> TrainingState[Policy] | TrainingState[LanguageModel]:
    """The training run of a recipe, at its first step. What it is made from must be in the store."""
    from dt.training.harmodt import train_harmodt
    from dt.training.objective import fine_tune, train

    identity = {"recipe": recipe.id}
    match recipe:
        case Train():
            language = store.load_language(recipe.language) if recipe.language else None
            return train(
                _data(recipe.datasets, store),
                recipe.architecture,
                recipe.optimisation,
                recipe.seed,
                trunk=language.trunk if language else None,
                timesteps=language.timestep_table() if language else None,
                auxiliaries=_auxiliaries(recipe, language, store),
                identity=identity,
                device=device,
            )
        case TrainTogether():
            data, architecture, optimisation = _data(recipe.datasets, store), recipe.architecture, recipe.optimisation
            if recipe.harmony is None:
                return train(data, architecture, optimisation, recipe.seed, identity=identity, device=device)
            return train_harmodt(
                data, architecture, optimisation, recipe.harmony, recipe.seed, identity=identity, device=device
            )
        case FineTune():
            start = realise(recipe.policy, from_store(recipe.policy, store))
            if not start.plain:
                start = start.alone(recipe.task)
            return fine_tune(
                start,
                _data(recipe.datasets, store),
                recipe.optimisation,
                recipe.seed,
                frozen=_frozen(recipe),
                auxiliaries=_distance(recipe.auxiliaries, start.trunk, recipe),
                identity=identity,
                device=device,
            )
        case Pretrain():
            return _begin_pretraining(recipe, store, identity, device)


def finish(recipe: Job, result: Policy | LanguageModel) -> Policy | LanguageModel:
    """What is stored of a finished run: a language model with its clusters."""
    from dt.language.model import LanguageModel

    if isinstance(recipe, Pretrain) and isinstance(result, LanguageModel):
        return result.with_clusters(recipe.clusters, recipe.seed)
    return result


def compute(recipe: Fisher | ImportLanguage, store: Store, device: str) -> FisherEstimate | LanguageModel:
    """What takes no gradient steps."""
    from dt.language.model import from_hugging_face
    from dt.merging.fisher import estimate

    if isinstance(recipe, ImportLanguage):
        language = from_hugging_face(recipe.source, recipe.clusters)
        if language.content_hash != recipe.content_hash:
            raise UserError(f"the language model {recipe.source} has changed: run the command again to use the new one")
        return language
    return estimate(
        realise(recipe.policy, from_store(recipe.policy, store)),
        _data(recipe.datasets, store),
        variant=recipe.variant,
        batches=recipe.batches,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        device=device,
    )


def _data(datasets: Iterable[Dataset], store: Store) -> dict[str, Trajectories]:
    return {dataset.task: load_dataset(dataset, store) for dataset in datasets}


def _frozen(recipe: FineTune) -> list[str]:
    """Flat names of the parameters that stay."""
    from dt.merging.groups import parameters_of
    from dt.model.decision_transformer import Head
    from dt.tasks import get_task

    trunk = parameters_of(recipe.frozen, recipe.architecture) if recipe.frozen else ()
    parts = [name for name, _ in Head(get_task(recipe.task), 1).named_parameters()]
    head = [name for name in parts if name.split(".")[0] in recipe.frozen_head]
    return [*(f"trunk.{name}" for name in trunk), *(f"heads.{recipe.task}.{name}" for name in head)]


def _auxiliaries(recipe: Train, language: LanguageModel | None, store: Store) -> Sequence[Auxiliary]:
    from dt.language.tokenizer import Tokenizer
    from dt.training.auxiliaries import CosineToClusters, CoTraining

    chosen = recipe.auxiliaries
    if chosen is None or language is None or recipe.language is None:
        return ()
    losses: list[Auxiliary] = []
    if chosen.cosine:
        losses.append(CosineToClusters(language.clusters, chosen.cosine, chosen.cosine_decay))
    if chosen.language:
        text = _co_training(recipe.language, chosen.text)
        tokens, block = Tokenizer(language.tokenizer).encode(read_text(text, store).documents), text.block
        losses.append(CoTraining(language, tokens, chosen.language, chosen.sequences, block, chosen.language_decay))
    return [*losses, *_distance(chosen, language.trunk, recipe)]


def _distance(chosen: Auxiliaries | None, start: Mapping[str, Tensor], recipe: Train | FineTune) -> Sequence[Auxiliary]:
    from dt.training.auxiliaries import DistanceToStart

    if chosen is None or not chosen.distance:
        return ()
    return [DistanceToStart(recipe.architecture, start, chosen.distance, chosen.distance_formula)]


def _co_training(language: Language, given: Text | None) -> Pretrain | Text:
    """What co-training reads: unless a text was given, what the language model was trained on."""
    if given is not None:
        return given
    if isinstance(language, Pretrain):
        return language
    from dt.language.blocks import BLOCK
    from dt.language.corpus import DEFAULT_CHARACTERS, DOCSTRINGS

    return Text(corpus=DOCSTRINGS, characters=DEFAULT_CHARACTERS, block=BLOCK)


def texts_of(artefacts: Iterable[Artefact]) -> Iterator[Pretrain | Text]:
    """What has to be read to make them, repeats included."""
    for artefact in artefacts:
        if isinstance(artefact, Pretrain):
            yield artefact
        elif (
            isinstance(artefact, Train) and artefact.language and artefact.auxiliaries and artefact.auxiliaries.language
        ):
            yield _co_training(artefact.language, artefact.auxiliaries.text)


def read_text(source: Pretrain | Text, store: Store) -> Corpus:
    """The text of a language model or of co-training.

    What is installed on a machine is pinned by the tables: whoever reads it first states what it is. Raises UserError
    when it is another text than the recipe or the tables say.
    """
    from dt.language.corpus import DOCSTRINGS, read_corpus

    corpus = read_corpus(source.corpus, source.characters)
    if source.corpus_hash is not None:
        if corpus.content_hash != source.corpus_hash:
            raise UserError(
                f"the text {source.corpus} has changed: restore it, or run the command again to use the new one"
            )
    elif source.corpus == DOCSTRINGS and corpus.content_hash != (stated := _stated(source, corpus, store)):
        raise UserError(
            f"the documentation installed here ({corpus.content_hash[:12]}…) is not what language models of "
            f"{store.address} have read ({stated[:12]}…), and theirs and new ones would not compare: install the "
            "packages of constraints.txt under the same Python, name a text with --text, or begin new --results"
        )
    return corpus


def _stated(source: Pretrain | Text, corpus: Corpus, store: Store) -> str:
    """What the tables say that this text is; said now if it was not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from orchestrator.tables import SCHEMAS

    tables, name = store.open_tables(), f"{source.corpus}-{source.characters}"
    row = {"text": name, "documents": len(corpus.documents), "content": corpus.content_hash}
    tables.append("texts", name, pa.Table.from_pylist([row], SCHEMAS["texts"]))
    (content,) = tables.some("texts", ["content"], pc.field("text") == name)["content"].to_pylist()
    return str(content)


def _begin_pretraining(
    recipe: Pretrain, store: Store, identity: Mapping[str, str], device: str
) -> TrainingState[LanguageModel]:
    from dt.language.pretrain import pretrain
    from dt.language.tokenizer import Tokenizer

    corpus = read_text(recipe, store)
    tokenizer = Tokenizer.trained(corpus.documents, recipe.vocabulary)
    return pretrain(
        tokenizer.encode(corpus.documents),
        tokenizer,
        recipe.architecture,
        recipe.optimisation,
        recipe.seed,
        block=recipe.block,
        identity=identity,
        device=device,
    )
