"""Language models against Hugging Face's GPT-2, text that comes back exactly, and pre-training that resumes exactly."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from dt.errors import UserError
from dt.language.blocks import TextBlocks
from dt.language.clusters import cluster_centres
from dt.language.corpus import MINIMUM, Corpus, _docstrings, read_corpus
from dt.language.model import (
    LanguageModel,
    LanguageNetwork,
    from_hugging_face,
    load_language_model,
    next_token_loss,
    save_language_model,
)
from dt.language.pretrain import pretrain
from dt.language.tokenizer import END_OF_TEXT, Tokenizer
from dt.model.architecture import Architecture
from dt.training.loop import TrainingState, run
from dt.training.optimisation import Optimisation

TEXTS = ["the robot hops over the other robot, and the other robot hops over it", "über den Roboter 🤖\r\n\tja", ""]
TINY = Architecture(width=16, layers=2, heads=2, activation="gelu_new")


def unreachable(*_: object, **__: object) -> str:
    raise ConnectionError("no route to the hub\nsecond line")


# --- text -------------------------------------------------------------------------------------------------------------


def test_docstrings_are_read_without_running_anything(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""First."""\nraise SystemExit\ndef f():\n    """Of f.\n\n    More.\n    """\n')
    (tmp_path / "b.py").write_text("this is no Python")
    (tmp_path / "c.py").write_text('"""First."""\nclass C:\n    """Of C, with a \\d."""\n')
    (tmp_path / "d.py").write_text('"""First."""\n')
    assert list(_docstrings(sorted(tmp_path.glob("*.py")))) == ["First.\n\nOf f.\n\nMore.", "Of C, with a \\d."]


def test_the_installed_documentation_is_the_same_every_time_and_as_long_as_asked() -> None:
    corpus = read_corpus("docstrings", 30_000)
    assert corpus.characters == 30_000
    assert corpus.documents[0].startswith("Record of phased-in incompatible language changes.")  # __future__, the first
    assert corpus.content_hash == read_corpus("docstrings", 30_000).content_hash
    assert corpus.content_hash != Corpus((*corpus.documents[:-1], corpus.documents[-1][:-1])).content_hash
    assert Corpus(("a", "bc")).content_hash != Corpus(("ab", "c")).content_hash


def test_a_folder_gives_its_text_files_in_order_or_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("second " * MINIMUM)
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "d.csv").write_text("no text")
    assert read_corpus(str(tmp_path)).documents == ("first", "second " * MINIMUM, "third")
    with pytest.raises(UserError, match=r"no folder of text .*nowhere: give 'docstrings', a folder"):
        read_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no home folder for the path '~nosuch/text'"):
        read_corpus("~nosuch/text")
    with pytest.raises(UserError, match=f"gives 5 characters, but at least {MINIMUM}"):
        read_corpus(str(tmp_path), 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.txt or \.md files"):
        read_corpus(str(tmp_path / "empty"))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot read .*a\.txt as UTF-8"):
        read_corpus(str(tmp_path))


def test_a_data_set_of_the_hub_is_its_text_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raw").mkdir()
    table = pa.table({"text": [f"line {index} of many\n" for index in range(200)]})
    pq.write_table(table, tmp_path / "raw" / "train-00000-of-00001.parquet", row_group_size=100)
    asked: list[dict[str, object]] = []

    def download(identifier: str, **options: object) -> str:
        asked.append({"identifier": identifier, **options})
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    corpus = read_corpus("hf:Someone/texts/raw")
    assert asked == [{"identifier": "Someone/texts", "repo_type": "dataset", "allow_patterns": ["raw/train*.parquet"]}]
    assert [document.count("\n") for document in corpus.documents] == [100, 100]
    with pytest.raises(UserError, match=r"'other' has no train\*\.parquet"):
        read_corpus("hf:Someone/texts/other")
    pq.write_table(pa.table({"text": ["first\n", None, "last " * MINIMUM]}), tmp_path / "raw" / "train-0.parquet")
    (tmp_path / "raw" / "train-00000-of-00001.parquet").unlink()
    assert read_corpus("hf:Someone/texts/raw").documents == ("first\n" + "last " * MINIMUM,)
    for content in (b"", b"PAR1 and no more", (tmp_path / "raw" / "train-0.parquet").read_bytes()[:-9]):
        (tmp_path / "raw" / "train-0.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read the text in .*train-0\.parquet \(.+\): delete it"):
            read_corpus("hf:Someone/texts/raw")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "raw" / "train-0.parquet")
    with pytest.raises(UserError, match="cannot read the text in"):
        read_corpus("hf:Someone/texts/raw")
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "raw" / "train-0.parquet")
    with pytest.raises(UserError, match="has no column 'text', only words"):
        read_corpus("hf:Someone/texts/raw")
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"cannot get the dataset 'Someone/texts' .*\(no route to the hub\): check"):
        read_corpus("hf:Someone/texts/raw")


# --- tokens -----------------------------------------------------------------------------------------------------------

TOKENIZER = Tokenizer.trained(TEXTS * 3, 300)


@settings(max_examples=25, deadline=None)
@given(st.text())
def test_any_text_comes_back_exactly(text: str) -> None:
    tokens = TOKENIZER.encode([text + END_OF_TEXT])
    assert TOKENIZER.decode(tokens) == text + END_OF_TEXT
    assert TOKENIZER.end_of_text not in tokens  # spelt out in a text, it is text


def test_a_vocabulary_is_the_same_from_the_same_text_and_ends_every_document_but_the_last() -> None:
    assert Tokenizer.trained(TEXTS * 3, 300).json == TOKENIZER.json
    assert 257 < TOKENIZER.size <= 300
    tokens = TOKENIZER.encode(["the robot", "", "hops"])
    assert (tokens == TOKENIZER.end_of_text).sum() == 2
    assert TOKENIZER.decode(tokens) == f"the robot{END_OF_TEXT}{END_OF_TEXT}hops"
    assert len(TOKENIZER.encode(["the robot"])) < len("the robot")
    np.testing.assert_array_equal(Tokenizer(TOKENIZER.json).encode(TEXTS), TOKENIZER.encode(TEXTS))
    with pytest.raises(UserError, match="256"):
        Tokenizer.trained(TEXTS, 256)
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer("")


def test_blocks_are_pieces_of_the_text_anywhere_in_the_table() -> None:
    tokens = np.arange(100, 130, dtype=np.int32)
    batch = TextBlocks(tokens, 4).sample(2000, 9, np.random.default_rng(0))
    assert batch.tokens.shape == batch.following.shape == batch.positions.shape == (2000, 4)
    assert (batch.following == batch.tokens + 1).all()
    assert (batch.tokens.diff() == 1).all()
    assert (batch.positions.diff() == 1).all()
    assert set(batch.tokens[:, 0].tolist()) == set(range(100, 126))
    assert set(batch.positions[:, 0].tolist()) == set(range(6))
    assert (TextBlocks(tokens, 4).sample(9, 4, np.random.default_rng(0)).positions == torch.arange(4)).all()
    with pytest.raises(UserError, match="has 4 tokens, a block needs 5"):
        TextBlocks(tokens[:4], 4)
    with pytest.raises(UserError, match="shorten the block"):
        TextBlocks(tokens, 4).sample(1, 3, np.random.default_rng(0))


# --- models -----------------------------------------------------------------------------------------------------------


def oracle(**changes: object) -> GPT2LMHeadModel:
    config = GPT2Config(
        **{"vocab_size": 300, "n_positions": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, **changes},
        attn_implementation="eager",
    )
    model, draw = GPT2LMHeadModel(config).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # none stays at a value (0, 1) that would hide a mistake
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def tiny(seed: int = 0, positions: int = 50) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageNetwork(TINY, TOKENIZER.size, positions).model(TOKENIZER.json).with_clusters(5)


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_a_hugging_face_folder_is_taken_over_unchanged_and_computes_the_same(tmp_path: Path, activation: str) -> None:
    gpt2 = oracle(activation_function=activation)
    gpt2.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.json)
    model = from_hugging_face(str(tmp_path), clusters=7)
    assert model.architecture == TINY.model_copy(update={"activation": activation})
    state = gpt2.transformer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.trunk.items())
    assert torch.equal(model.token_embedding, state["wte.weight"])
    assert torch.equal(model.position_embedding, state["wpe.weight"])
    assert (model.clusters.shape, model.tokenizer) == ((7, 16), TOKENIZER.json)
    tokens = torch.randint(300, (3, 20))
    network = LanguageNetwork.from_model(model).eval()
    torch.testing.assert_close(network(tokens), gpt2(tokens).logits, atol=1e-5, rtol=0)
    places = torch.arange(20)[None] + torch.tensor([[0], [7], [30]])
    torch.testing.assert_close(network(tokens, places), gpt2(tokens, position_ids=places).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        next_token_loss(network(tokens)[:, :-1], tokens[:, 1:]), gpt2(tokens, labels=tokens).loss
    )

    torch.save(gpt2.transformer.state_dict(), tmp_path / "pytorch_model.bin")  # the hub's own has no prefix
    (tmp_path / "model.safetensors").unlink()
    again = from_hugging_face(str(tmp_path), clusters=7)
    assert torch.equal(LanguageNetwork.from_model(again).eval()(tokens), network(tokens))
    for content in ({"wte.weight": Path()}, {"model": gpt2.transformer.state_dict()}, [torch.zeros(2)], {1: 2}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match="truncated or hold more than tensors"):
            from_hugging_face(str(tmp_path))


def test_a_tokenizer_that_cannot_be_read_is_said_in_a_sentence(tmp_path: Path) -> None:
    oracle().save_pretrained(tmp_path)
    assert from_hugging_face(str(tmp_path), clusters=0).tokenizer == ""
    for vocabulary, merges in [("[]", ""), ("{}", "x"), ('{"a": 0}', "#version: 0.2\na b\n"), ("{", "")]:
        (tmp_path / "vocab.json").write_text(vocabulary)
        (tmp_path / "merges.txt").write_text(merges)
        assert_said(tmp_path)
    for content in (b"\xff\xfe", b"garbage", b"[]", b"{}", b""):
        (tmp_path / "tokenizer.json").write_bytes(content)
        assert_said(tmp_path)


def assert_said(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        from_hugging_face(str(folder), clusters=0)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"the tokenizer in {folder} cannot be read (")


def test_what_is_no_gpt2_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}
    for change, sentence in [
        ({"model_type": "llama"}, "of type 'llama': only GPT-2"),
        ({"activation_function": "silu"}, "activation_function 'silu'"),
        ({"n_inner": 32}, "n_inner 32"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"n_head": 3}, "not a multiple of heads"),
        ({}, r"neither model\.safetensors nor pytorch_model\.bin"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=sentence) as error:
            from_hugging_face(str(tmp_path))
        assert "\n" not in str(error.value)
    for content in ("[]", "null", '"gpt2"', "{", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"cannot read .*config\.json as a GPT-2's configuration \("):
            from_hugging_face(str(tmp_path))
    with pytest.raises(UserError, match="no home folder for the path '~nosuch/gpt2'"):
        from_hugging_face("~nosuch/gpt2")
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"cannot get the model 'gpt2' .*\(no route to the hub\): check its name"):
        from_hugging_face("gpt2")


def test_a_language_model_survives_saving_and_damage_is_named(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", tiny()
    save_language_model(model, path, {"recipe": "{}"})
    loaded = load_language_model(path)
    assert (loaded.architecture, loaded.tokenizer) == (model.architecture, model.tokenizer)
    assert all(torch.equal(loaded.trunk[name], tensor) for name, tensor in model.trunk.items())
    for name in ("token_embedding", "position_embedding", "clusters"):
        assert torch.equal(getattr(loaded, name), getattr(model, name))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or corrupt"):
        load_language_model(path)
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="truncated or corrupt"):
        load_language_model(path)
    save_language_model(model, path, {"architecture": '{"width": 16, "heads": 3}'})
    with pytest.raises(UserError, match=r"corrupt \(width 16 is not a multiple of heads 3\): restore"):
        load_language_model(path)
    with pytest.raises(UserError, match="no language model at"):
        load_language_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="wrong dimensions: 'positions'"):
        LanguageModel(TINY, model.trunk, model.token_embedding, torch.zeros(50, 8), model.clusters, "")


def test_a_short_position_table_repeats_all_but_its_first_two_rows() -> None:
    model = tiny(positions=7)
    table, source = model.timestep_table(1000), model.position_embedding
    expected = [0, 1]
    while len(expected) < 1000:
        expected += [2, 3, 4, 5, 6]
    torch.testing.assert_close(table, source[torch.tensor(expected[:1000])], atol=0, rtol=0)
    assert torch.equal(model.timestep_table(5), source[:5])
    with pytest.raises(UserError, match="cannot be extended"):
        tiny(positions=2).timestep_table(1000)


def test_clusters_are_the_directions_tokens_crowd_around() -> None:
    draw = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(torch.randn(6, 16, generator=draw), dim=1)
    lengths = 0.1 + 10 * torch.rand(240, 1, generator=draw)
    tokens = (directions.repeat(40, 1) + 0.01 * torch.randn(240, 16, generator=draw)) * lengths
    centres = cluster_centres(tokens, 6, seed=1)
    assert centres.shape == (6, 16)
    nearest = (nn.functional.normalize(centres, dim=1) @ directions.T).max(dim=0)
    assert nearest.values.min() > 0.999
    assert sorted(nearest.indices.tolist()) == list(range(6))
    assert torch.equal(centres, cluster_centres(tokens, 6, seed=1))
    with pytest.raises(UserError, match="241 clusters of 240 token embeddings"):
        cluster_centres(tokens, 241)


# --- pre-training -----------------------------------------------------------------------------------------------------

QUICK = Optimisation(steps=20, batch_size=4, learning_rate=1e-2, warmup_steps=2, clip_norm=1.0, dropout=0.1)


def pretraining(text: list[str] = TEXTS, **changes: int) -> TrainingState[LanguageModel]:
    tokens = TOKENIZER.encode(text * 20)
    return pretrain(tokens, TOKENIZER, TINY, QUICK, 0, **{"block": 12, "positions": 30, **changes})


def same(a: LanguageModel, b: LanguageModel) -> bool:
    tables = torch.equal(a.token_embedding, b.token_embedding) and torch.equal(
        a.position_embedding, b.position_embedding
    )
    return tables and all(torch.equal(tensor, b.trunk[name]) for name, tensor in a.trunk.items())


def test_pretraining_learns_the_text_and_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    path, losses = tmp_path / "state.safetensors", []
    for state in run(pretraining(), log_every=5):
        losses.append(state.metrics["loss"])
        if state.step == 10:
            state.save(path)
    assert losses[0] == pytest.approx(math.log(TOKENIZER.size), rel=0.1)  # at first every token is as likely
    assert losses[-1] < 0.8 * losses[0]
    model = state.result()
    assert model.position_embedding.shape == (30, 16)
    assert model.with_clusters(4).clusters.shape == (4, 16)
    torch.rand(7)  # what others do with the process's random numbers does not matter
    *_, resumed = run(pretraining(), resume=path, log_every=5)
    assert same(resumed.result(), model)
    with pytest.raises(UserError, match="checkpoint of another block"):
        next(run(pretraining(block=11), resume=path))
    with pytest.raises(UserError, match="checkpoint of another text"):
        next(run(pretraining(TEXTS[:1]), resume=path))
    with pytest.raises(UserError, match="does not fit a table of 30"):
        pretraining(block=31)


def test_the_loss_is_the_cross_entropy_written_out() -> None:
    draw = np.random.default_rng(0)
    logits, following = draw.normal(size=(2, 3, 7)), draw.integers(7, size=(2, 3))
    terms = [
        math.log(sum(math.exp(value) for value in logits[b, t])) - logits[b, t, following[b, t]]
        for b in range(2)
        for t in range(3)
    ]
    loss = next_token_loss(torch.from_numpy(logits), torch.from_numpy(following))
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-12)
