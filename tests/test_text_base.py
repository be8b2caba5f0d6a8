"""The base models that are pre-trained on the docstrings: tokenizer, examples, objective, cache."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from fastgist.recipes.stdlib_text import Pretraining
from fastgist.train.config import UserError
from fastgist.train.stdlib_text import StdlibText
from fastgist.train.text_base import base_model
from fastgist.train.text_pretrain import (
    NeighbourCollator,
    Neighbours,
    causal_blocks,
    neighbours,
    plain_bert,
    segments,
    train_tokenizer,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def corpus() -> StdlibText:
    return StdlibText.load()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer([t for d in corpus.documents[:30] for t in d], 500, 32)


def test_the_tokenizer_is_berts(corpus, tokenizer):
    encoded = tokenizer("Return the Value", "of a key")
    words = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert words[0] == "[CLS]" and words.count("[SEP]") == 2 and words[-1] == "[SEP]"
    assert encoded["token_type_ids"] == [0] * (words.index("[SEP]") + 1) + [1] * (len(words) - words.index("[SEP]") - 1)
    assert len(tokenizer) <= 500 and tokenizer.model_max_length == 32
    assert (
        tokenizer.decode(tokenizer("return THE value")["input_ids"], skip_special_tokens=True).strip()
        == "return the value"
    )
    again = train_tokenizer([t for d in corpus.documents[:30] for t in d], 500, 32)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_segments_hold_every_token_in_order(corpus, tokenizer):
    documents = corpus.documents[:5]
    for document, parts in zip(documents, segments(tokenizer, documents, 14)):
        whole = [i for text in document for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert [i for part in parts for i in part] == whole
        assert all(1 <= len(part) <= 14 for part in parts)


def test_neighbours_stand_next_to_each_other(corpus, tokenizer):
    documents = corpus.documents[:12]
    parts = segments(tokenizer, documents, 14)
    beside = [{(tuple(a), tuple(b)) for a, b in itertools.pairwise(document)} for document in parts]
    examples = neighbours(tokenizer, documents, 2, 16, seed=0)
    assert len(examples) == 2 * sum(len(p) for p in parts if len(p) > 1)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    after = 0
    for example in examples:
        one, other = example["input_ids"], example["other_ids"]
        assert max(len(one), len(other)) <= 16 and (one[0], one[-1], other[0], other[-1]) == (cls, sep, cls, sep)
        one, other = tuple(one[1:-1]), tuple(other[1:-1])
        known = beside[example["document"]]
        assert (one, other) in known or (other, one) in known
        after += (one, other) in known
    assert 0.3 < after / len(examples) < 0.7
    assert neighbours(tokenizer, documents, 2, 16, seed=1) != examples


def test_the_pretraining_loss_is_masked_words_and_neighbours(corpus, tokenizer):
    """Written out in float64: words at masked places, each segment against the others' neighbours of other documents."""
    examples = neighbours(tokenizer, corpus.documents[:12], 1, 16, seed=0)[:3]
    examples += [examples[0] | {"document": examples[1]["document"]}]
    batch = NeighbourCollator(tokenizer, 0.5)(examples)
    changed = batch["labels"] != -100
    assert batch["input_ids"].shape[0] == 8 and changed.any() and batch["document"].tolist()[1] == batch["document"][3]
    originals = [e[k] for k in ("input_ids", "other_ids") for e in examples]
    for row, ids in enumerate(originals):
        mask = changed[row, : len(ids)]
        assert batch["attention_mask"][row].sum() == len(ids)
        assert torch.equal(batch["labels"][row, : len(ids)][mask], torch.tensor(ids)[mask])
        assert torch.equal(batch["input_ids"][row, : len(ids)][~mask], torch.tensor(ids)[~mask])
    model = plain_bert(tokenizer, SMALL).double().eval()
    loss = Neighbours(model)(**batch)["loss"]
    states = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    words = [-model.cls.predictions(states[r, c]).log_softmax(-1)[batch["labels"][r, c]] for r, c in changed.nonzero()]
    pooled = torch.tanh(model.bert.pooler.dense(states[:, 0]))
    scores = torch.nn.functional.cosine_similarity(pooled[:4, None], pooled[None, 4:], dim=-1) / 0.1
    terms = []
    for i in range(4):
        others = [j for j in range(4) if j == i or batch["document"][j] != batch["document"][i]]
        terms += [
            torch.logsumexp(scores[i, others], 0) - scores[i, i],
            torch.logsumexp(scores[others, i], 0) - scores[i, i],
        ]
    torch.testing.assert_close(loss, sum(words) / len(words) + sum(terms) / 8)


def test_causal_blocks_hold_whole_texts_end_to_end(corpus, tokenizer):
    blocks = causal_blocks(tokenizer, corpus.documents[:6], 1, 32, seed=0)
    assert all(len(block["input_ids"]) == 32 for block in blocks)
    stream = [i for block in blocks for i in block["input_ids"]]
    texts = {tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for d in corpus.documents[:6] for t in d}
    pieces, start = [], 0
    for end in [i for i, token in enumerate(stream) if token == tokenizer.sep_token_id]:
        pieces.append(tuple(stream[start:end]))
        start = end + 1
    assert set(pieces) <= texts and len(pieces) >= len(texts) - 3


def tokenizer_words(folder, ids) -> list[str]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids)


@pytest.mark.parametrize("name", ["stdlib-bert", "stdlib-llama"])
def test_a_base_model_learns_and_is_kept(name, tmp_path, corpus):
    """Tiny and short: the loss falls below that of the untrained model; the second call reads the cache."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    documents = [document[:5] for document in corpus.documents[:20] if len(document) > 1]
    small = StdlibText(corpus.classes, corpus.train, corpus.val, corpus.test, documents, [])
    said: list[str] = []
    options = {"corpus": small, "architecture": SMALL, "cache": tmp_path, "progress": False, "say": said.append}
    short, long = (
        Pretraining(passes=p, lr=lr, length=24, vocabulary=400, batch_size=16) for p, lr in ((1, 1e-9), (3, 5e-3))
    )
    about = {}
    for recipe in (short, long):
        folder = base_model(name, recipe=recipe, **options)
        about[recipe.passes] = json.loads((folder / "fastgist_base.json").read_text())["about"]
    assert about[3]["held_out_loss"] < about[1]["held_out_loss"] - 0.3
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    encoded = AutoTokenizer.from_pretrained(folder)(["return a value"], return_tensors="pt")
    assert model(**encoded).logits.shape == (1, 3)
    words = tokenizer_words(folder, encoded["input_ids"][0])
    assert words[-1] == "[SEP]" and (words[0] == "[CLS]") == ("token_type_ids" in encoded) == (name == "stdlib-bert")

    weights = folder / "model.safetensors"
    before, lines = weights.stat().st_mtime_ns, len(said)
    assert base_model(name, recipe=long, **options) == folder
    assert weights.stat().st_mtime_ns == before and len(said) == lines

    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    assert base_model(name, recipe=long, **options) == folder
    assert any("is damaged: pre-training again" in line for line in said)
    data[-5] ^= 1
    assert weights.read_bytes() == bytes(data), "the same seed gives the same weights"
    assert not list(tmp_path.glob(".tmp-*"))


def test_unknown_base_models_and_unwritable_caches(tmp_path, corpus, monkeypatch):
    with pytest.raises(UserError, match="stdlib-bert, stdlib-llama"):
        base_model("stdlib-gpt", corpus=corpus)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep the pre-trained model"):
        base_model("stdlib-bert", corpus=corpus, cache=tmp_path / "file", say=lambda line: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run once in one process first"):
        base_model("stdlib-bert", corpus=corpus, cache=tmp_path / "new", say=lambda line: None)
