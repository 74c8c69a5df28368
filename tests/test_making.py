"""Every kind of recipe made from nothing in this process, from recordings and text to assembled policies and rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from toy import ARCHITECTURE, evaluation, expert, recording
from transformers import GPT2Config, GPT2LMHeadModel

from dt.behaviour.record import record
from dt.errors import UserError
from dt.language import corpus
from dt.language.corpus import read_corpus
from dt.merging.fisher import estimate, trace_normalised
from dt.merging.groups import parameters_of
from dt.merging.merge import merge
from dt.model.architecture import Architecture
from dt.model.policy import Policy
from dt.model.size import size_of
from dt.training.harmony import Harmony
from dt.training.loop import run
from dt.training.optimisation import Optimisation
from orchestrator.data_choice import choose_data
from orchestrator.engine import Settings
from orchestrator.engine import run as run_engine
from orchestrator.experiment import Setting
from orchestrator.making import begin, compute, finish, from_store, load_dataset, read_text, realise, texts_of
from orchestrator.messages import describe
from orchestrator.profiles import get_profile
from orchestrator.recipes import (
    AnyPolicy,
    Artefact,
    Assemble,
    Auxiliaries,
    FineTune,
    Fisher,
    FisherWeights,
    ImportLanguage,
    Job,
    Merge,
    Pretrain,
    Recipe,
    Recording,
    Train,
    TrainTogether,
    Vote,
    closure,
    dataset_of,
    ingredients,
    origin,
    read_policy,
    tasks_of,
    trained,
)
from orchestrator.rollouts import roll_out
from orchestrator.rows import policy_row
from orchestrator.store import Store

QUICK = Optimisation(steps=4, batch_size=4, learning_rate=1e-3, warmup_steps=1)
LANGUAGE = Pretrain(
    characters=60_000,
    vocabulary=300,
    block=16,
    clusters=10,
    architecture=ARCHITECTURE.model_copy(update={"activation": "gelu_new"}),
    optimisation=QUICK,
)
TASKS = ("hopper", "walker2d")
GROUP = "attention+mlp"


def quick(task: str) -> Train:
    return Train(dataset=recording(task), architecture=ARCHITECTURE, optimisation=QUICK)


def spoken(task: str) -> Train:
    """A policy that begins as the language model, with all three auxiliary losses."""
    return Train(
        dataset=recording(task),
        architecture=LANGUAGE.architecture,
        optimisation=QUICK,
        language=LANGUAGE,
        auxiliaries=Auxiliaries(cosine=0.1, language=1.0, distance=1e-4),
    )


EXPERTS = (quick("hopper"), quick("walker2d"))
FISHERS = tuple(Fisher(policy=each, datasets=each.datasets, batches=1, batch_size=4) for each in EXPERTS)


def assembled(fisher: bool) -> Assemble:
    def tuned(own: Train, other: Train) -> FineTune:
        sources, estimates = (own, other), tuple(FISHERS[EXPERTS.index(each)] for each in (own, other))
        weights = FisherWeights(estimates=estimates) if fisher else None
        return FineTune(
            policy=Merge(sources=sources, group=GROUP, fisher=weights), dataset=own.dataset, optimisation=QUICK,
            frozen=GROUP,
        )  # fmt: skip

    return Assemble(policies=(tuned(*EXPERTS), tuned(*EXPERTS[::-1])), shared=GROUP)


TOGETHER = TrainTogether(
    datasets=tuple(recording(task) for task in TASKS), architecture=ARCHITECTURE, optimisation=QUICK
)
HARMO = TOGETHER.model_copy(update={"harmony": Harmony(interval=2, score_batches=1)})
SPECIALIST = FineTune(
    policy=TOGETHER, dataset=recording("walker2d"), optimisation=QUICK, frozen="ln_f", frozen_head=("embed_timestep",),
    auxiliaries=Auxiliaries(distance=1e-4),
)  # fmt: skip
POLICIES: tuple[AnyPolicy, ...] = (
    assembled(fisher=False),
    assembled(fisher=True),
    spoken("hopper"),
    TOGETHER,
    HARMO,
    Vote(policy=HARMO, threshold=2),
    SPECIALIST,
)


def make(recipe: Recipe, store: Store) -> None:
    """All artefacts behind a recipe, as the engine orders them."""
    for artefact in closure([recipe]).values():
        if not isinstance(artefact, Artefact) or store.has(artefact):
            continue
        if isinstance(artefact, Job):
            *_, last = run(begin(artefact, store, "cpu"))
            store.save(artefact, finish(artefact, last.result()))
        else:
            store.save(artefact, compute(artefact, store, "cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = Store(tmp_path_factory.mktemp("making"))
    for task in TASKS:
        record(task, "medium", 3, 0, made.datasets)
    for policy in POLICIES:
        make(policy, made)
    return made


def made_of(recipe: AnyPolicy, store: Store) -> Policy:
    return realise(recipe, from_store(recipe, store))


@pytest.mark.parametrize("recipe", POLICIES, ids=lambda recipe: recipe.kind)
def test_every_policy_acts_and_has_a_row(recipe: AnyPolicy, store: Store) -> None:
    policy = made_of(recipe, store)
    assert set(policy.heads) == set(tasks_of(recipe))
    for task in policy.heads:
        asked = evaluation(recipe, task, episodes=1)
        rows = roll_out(asked, from_store(recipe, store))
        assert np.isfinite(rows.episodes["return"].to_pylist()).all()
    (row,) = policy_row(recipe, size_of(policy)).to_pylist()
    assert row["kind"] == recipe.kind
    assert row["width"] == 16
    assert describe(recipe)
    assert read_policy(row["recipe"]) == recipe


@pytest.mark.parametrize("fisher", [False, True])
def test_merge_freeze_finetune_shares_the_group_and_nothing_else(fisher: bool, store: Store) -> None:
    recipe = assembled(fisher)
    whole = made_of(recipe, store)
    merge = recipe.policies[0].policy
    merged = made_of(merge, store)
    shared = parameters_of(GROUP, ARCHITECTURE)
    assert set(whole.trunk) == set(shared)
    for name in shared:
        assert torch.equal(whole.trunk[name], merged.trunk[name])  # frozen, and the same from both sides
    for task, tuned in zip(TASKS, recipe.policies, strict=True):
        alone = made_of(tuned, store)
        for name, tensor in whole.alone(task).trunk.items():
            assert torch.equal(tensor, alone.trunk[name])
        assert not torch.equal(alone.trunk["ln_f.weight"], made_of(quick(task), store).trunk["ln_f.weight"])
        assert origin(recipe, task) == quick(task)
    row = policy_row(recipe, size_of(whole)).to_pylist()[0]
    assert row["method"] == ("Fisher, batch" if fisher else "mean")
    assert row["frozen"] == row["group"] == GROUP
    assert row["task"] == row["source_tasks"] == "hopper+walker2d"
    assert row["transformer_size"] == pytest.approx(1 + 4 * 16 / (4 * 16 + 12 * 16 * 16 + 9 * 16))


def test_a_policy_begins_as_the_language_model(store: Store) -> None:
    language, recipe = store.load_language(LANGUAGE), spoken("hopper")
    state = begin(recipe, store, "cpu")
    start = state.result()
    assert isinstance(start, Policy)
    assert all(torch.equal(tensor, start.trunk[name]) for name, tensor in language.trunk.items())
    assert torch.equal(start.heads["hopper"]["embed_timestep.weight"], language.timestep_table()[:1000])
    *_, last = run(state, log_every=4)
    assert {"cosine", "language", "distance", "loss"} <= last.metrics.keys()
    row = policy_row(recipe, size_of(start)).to_pylist()[0]
    assert (row["initialisation"], row["cosine"], row["co_training"], row["distance"]) == (
        "pretrained on docstrings", 0.1, 1.0, 1e-4,
    )  # fmt: skip


@pytest.fixture
def downloaded(tmp_path: Path, store: Store) -> tuple[Path, Path]:
    """A GPT-2 of others in a Hugging Face folder, and a folder of text."""
    folder, text = tmp_path / "gpt2", tmp_path / "text"
    sizes = {"n_positions": 30, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=300, **sizes)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(store.load_language(LANGUAGE).tokenizer)
    text.mkdir()
    (text / "robots.txt").write_text("A robot hops, another one walks. " * 100)
    return folder, text


def test_a_policy_begins_as_a_model_of_others_and_goes_on_with_the_text_that_was_named(
    downloaded: tuple[Path, Path], store: Store
) -> None:
    folder, text = downloaded
    begun_as = get_profile("smoke").begun_as(init=str(folder), text=str(text))
    small = begun_as.language.model_copy(update={"characters": 60_000, "clusters": 10, "block": 16})
    profile = begun_as.model_copy(update={"language": small, "recorded_episodes": 3})
    setting = Setting(profile, choose_data("recorded"))
    assert profile.name == "smoke-text-text-init-gpt2"

    recipe = setting.language_expert("hopper", 0, "medium", regularised=1e-4, co_trained=1.0)
    assert isinstance(recipe.language, ImportLanguage)
    assert recipe.auxiliaries.text.corpus == str(text)
    assert setting.language_expert("hopper", 0, "medium").auxiliaries.text is None  # read by co-training alone
    make(recipe, store)
    policy, original = made_of(recipe, store), GPT2LMHeadModel.from_pretrained(folder).transformer
    language = store.load_language(recipe.language)
    start = begin(recipe, store, "cpu").result()
    assert all(torch.equal(start.trunk[name], original.state_dict()[name]) for name in start.trunk)
    assert torch.equal(start.heads["hopper"]["embed_timestep.weight"][:30], original.wpe.weight)
    assert torch.equal(language.token_embedding, original.wte.weight)
    assert not torch.equal(policy.trunk["h.0.mlp.c_fc.weight"], start.trunk["h.0.mlp.c_fc.weight"])
    assert policy_row(recipe, size_of(policy)).to_pylist()[0]["initialisation"] == str(folder)

    def language_loss(auxiliaries: Auxiliaries) -> float:
        state = begin(recipe.model_copy(update={"auxiliaries": auxiliaries}), store, "cpu")
        state.advance(1)
        return state.metrics["language"]

    named = recipe.auxiliaries
    before = language_loss(named)
    (text / "robots.txt").write_text("Something else. " * 100)
    with pytest.raises(UserError, match="has changed: restore it"):
        language_loss(named)
    changed = named.text.model_copy(update={"corpus_hash": read_corpus(str(text)).content_hash})
    assert language_loss(named.model_copy(update={"text": changed})) != before


def test_a_model_of_others_that_will_not_do_is_refused_before_anything_is_trained(
    downloaded: tuple[Path, Path],
) -> None:
    folder, _ = downloaded
    setting = Setting(get_profile("laptop").begun_as(init=str(folder)), choose_data("recorded"))
    with pytest.raises(UserError, match="1000 clusters of 300 token embeddings"):
        setting.language_expert("hopper", 0, "medium")
    (folder / "tokenizer.json").unlink()
    mute = Setting(get_profile("smoke").begun_as(init=f"{folder}/"), choose_data("recorded"))  # not the one seen above
    assert mute.language_expert("hopper", 0, "medium").auxiliaries.language == 0
    with pytest.raises(UserError, match="has no tokenizer"):
        mute.language_expert("hopper", 0, "medium", co_trained=1.0)


def test_all_language_models_of_a_results_folder_read_the_same_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, store = tmp_path / "installed.py", Store(tmp_path / "results")
    monkeypatch.setattr(corpus, "_python_sources", lambda: [installed])
    installed.write_text(f'"""{"A robot hops. " * 200}"""')
    read = read_text(LANGUAGE, store)
    (row,) = store.open_tables().read("texts").to_pylist()
    assert row == {"text": "docstrings-60000", "documents": 1, "content": read.content_hash}
    co_trained, other = spoken("hopper"), spoken("hopper").model_copy(update={"auxiliaries": Auxiliaries(distance=1)})
    assert list(texts_of([LANGUAGE, co_trained, other, quick("hopper")])) == [LANGUAGE, LANGUAGE]

    installed.write_text(f'"""{"A robot walks. " * 200}"""')  # as an update of some package would
    for recipe in (LANGUAGE, co_trained):
        with pytest.raises(UserError, match=r"not what language models of .* have read .* --text"):
            run_engine([recipe], Settings(results=store.address))
    assert not (tmp_path / "results" / "datasets").exists()  # refused before anything was begun
    assert read_text(LANGUAGE.model_copy(update={"characters": 2000}), store).documents != read.documents
    (tmp_path / "own.txt").write_text("A robot swims. " * 200)
    own = LANGUAGE.model_copy(update={"corpus": str(tmp_path)})  # a folder that nobody pinned is no part of this
    assert read_text(own, store).documents == ("A robot swims. " * 200,)
    assert len(store.open_tables().read("texts")) == 2


def test_a_folder_of_text_is_found_from_anywhere(
    downloaded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers have another working directory."""
    folder, text = downloaded
    monkeypatch.chdir(text.parent)
    near = get_profile("smoke").begun_as(init=str(folder), text=text.name)
    read = Setting(near, choose_data("recorded")).language_expert("hopper", 0, "medium", co_trained=1.0)
    pretrained = Setting(get_profile("smoke").begun_as(text=text.name), choose_data("recorded"))
    assert read.auxiliaries.text.corpus == str(text)
    assert pretrained.language_expert("hopper", 0, "medium").language.corpus == str(text)
    (text.parent / "docstrings").mkdir()  # a folder of that name is not what the word means
    usual = Setting(get_profile("smoke"), choose_data("recorded")).language_expert("hopper", 0, "medium")
    assert usual.language.corpus == "docstrings"


def test_the_larger_model_of_others_is_named_apart(downloaded: tuple[Path, Path]) -> None:
    folder, text = downloaded
    profile = get_profile("paper").begun_as(init_large=str(folder), text=str(text))
    assert profile.name == "paper-text-text-large-gpt2"
    large = profile.large_language.model_copy(update={"clusters": 10})
    setting = Setting(profile.model_copy(update={"large_language": large}), choose_data("recorded"))
    small, large = (setting.language_expert("hopper", 0, "medium", large=large).language for large in (False, True))
    assert (small.kind, small.corpus) == ("pretrain", str(text))
    assert (large.kind, large.source) == ("import-language", str(folder))
    kept = get_profile("paper").begun_as(text=str(text)).large_language
    assert kept.model == "gpt2"  # a text to pre-train on takes no model's place


def test_every_option_of_a_recipe_reaches_the_mathematics(store: Store) -> None:
    sources = [store.load_policy(each) for each in EXPERTS]
    estimates = [store.load_fisher(each) for each in FISHERS]
    plain = Merge(sources=EXPERTS, group=GROUP, fisher=FisherWeights(estimates=FISHERS, trace_normalised=False))
    assert_same(made_of(plain, store), merge(sources, GROUP, fisher=estimates))
    usual = Merge(sources=EXPERTS, group=GROUP, fisher=FisherWeights(estimates=FISHERS))
    assert_same(made_of(usual, store), merge(sources, GROUP, fisher=[trace_normalised(each) for each in estimates]))
    data = {"hopper": load_dataset(recording("hopper"), store)}
    for variant in ("batch", "empirical", "exact"):
        found = compute(FISHERS[0].model_copy(update={"variant": variant}), store, "cpu")
        wanted = estimate(sources[0], data, variant=variant, batches=1, batch_size=4, seed=0)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())

    def metrics(**options: object) -> dict[str, float]:
        chosen = Auxiliaries(distance=1e-9, language=1e-9).model_copy(update=options)
        *_, last = run(begin(spoken("hopper").model_copy(update={"auxiliaries": chosen}), store, "cpu"), log_every=4)
        return last.metrics

    summed, at_once = metrics()["distance"], metrics(distance_formula="norm")["distance"]
    assert 0 < at_once < summed  # of the same steps: so small a weight moves nothing
    assert metrics()["language"] != metrics(sequences=1)["language"]
    fading = metrics(language_decay=2)  # none is left for the last two of four steps
    assert fading["language"] != metrics()["language"]


def assert_same(one: Policy, other: Policy) -> None:
    assert all(torch.equal(one.trunk[name], tensor) for name, tensor in other.trunk.items())


def test_a_specialist_moves_its_own_part_alone(store: Store) -> None:
    base, tuned = made_of(TOGETHER, store), made_of(SPECIALIST, store)
    assert tasks_of(SPECIALIST) == ("walker2d", "hopper")
    for name in ("ln_f.weight", "ln_f.bias"):
        assert torch.equal(base.trunk[name], tuned.trunk[name])
    assert not torch.equal(base.trunk["h.0.attn.c_attn.weight"], tuned.trunk["h.0.attn.c_attn.weight"])
    for name, tensor in base.heads["hopper"].items():
        assert torch.equal(tensor, tuned.heads["hopper"][name])
    walker = base.heads["walker2d"]
    assert torch.equal(walker["embed_timestep.weight"], tuned.heads["walker2d"]["embed_timestep.weight"])
    assert not torch.equal(walker["predict_action.weight"], tuned.heads["walker2d"]["predict_action.weight"])


def test_what_is_behind_a_policy() -> None:
    whole = assembled(fisher=True)
    assert [part.kind for part in ingredients(whole)] == ["fine-tune", "fine-tune"]  # stored whole: nothing behind
    assert tuple(trained(whole)) == whole.policies
    kinds = [recipe.kind for recipe in closure([whole]).values()]
    assert kinds.index("fisher") < kinds.index("merge") < kinds.index("fine-tune") < kinds.index("assemble")
    assert origin(SPECIALIST, "walker2d") == SPECIALIST  # fine-tuned, not merged
    assert dataset_of(SPECIALIST, "hopper") == recording("hopper")
    merge = Merge(sources=EXPERTS, group="mlp", fisher=FisherWeights(estimates=FISHERS))
    assert list(ingredients(merge)) == [*EXPERTS, *FISHERS]


def test_an_option_that_is_not_used_changes_no_identity() -> None:
    """Recipes of earlier versions keep their ids: none of the newer fields is in their JSON."""
    written = expert("hopper").canonical_json()
    assert "language" not in written
    assert "auxiliaries" not in written
    assert "fisher" not in Merge(sources=EXPERTS, group="mlp").canonical_json()


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: FineTune(policy=quick("hopper"), dataset=recording("walker2d")), "cannot be fine-tuned on walker2d"),
        (lambda: TrainTogether(datasets=(recording("hopper"),) * 2), "each task once"),
        (lambda: Assemble(policies=(quick("hopper"),) * 2), "each task once"),
        (lambda: Assemble(policies=EXPERTS, shared="atention"), "did you mean 'attention'"),
        (
            lambda: Merge(sources=EXPERTS, group="mlp", fisher=FisherWeights(estimates=FISHERS[::-1])),
            "the Fisher of each source, in their order",
        ),
        (
            lambda: Merge(sources=EXPERTS, group="mlp", alpha=0.5, fisher=FisherWeights(estimates=FISHERS)),
            "alpha and Fisher are two ways",
        ),
        (lambda: Train(dataset=recording("hopper"), auxiliaries=Auxiliaries(cosine=0.1)), "need a language model"),
        (
            lambda: Train(dataset=recording("hopper"), language=LANGUAGE, architecture=Architecture(width=32)),
            "cannot begin as",
        ),
    ],
)
def test_mistakes_are_named(build, sentence: str) -> None:
    with pytest.raises((ValidationError, UserError), match=sentence):
        build()


def test_assembling_what_does_not_agree_is_refused(store: Store) -> None:
    with pytest.raises(UserError, match=r"not the same in all policies: merge and freeze attention"):
        made_of(Assemble(policies=EXPERTS, shared="attention"), store)
    apart = made_of(Assemble(policies=EXPERTS), store)
    assert size_of(apart).transformer == pytest.approx(2.0, abs=0.05)  # but for zeros that both have


def test_a_recording_of_other_content_is_not_trained_on(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        begin(Train(dataset=Recording(task="hopper", quality="medium", episodes=3)), Store(tmp_path), "cpu")
