"""A gist token among the Q-Former's queries, and experts on the language model's instruction, against the same written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from qformers import IMAGE, KINDS, QUERIES, inputs, make, quiet, stir

import fastgist as fg
from fastgist import petal

SMALL = {"rank": 4, "expert_dim": 3, "num_experts": 2, "load_balance": 0.0}


def wrapped(kind, **config):
    plain = make(kind)
    model = petal.wrap(copy.deepcopy(plain), petal.PetalConfig(**SMALL | config), verbose=False)
    return quiet(stir(model)), plain


def part(model, kind):
    return next(m for m in model.modules() if isinstance(m, kind))


# -- the token -------------------------------------------------------------------------------------------------------


def token_of(model):
    return part(model, fg.nn.GistToken).token


def qformer_by_hand(plain, given, token):
    """(all states but the token's, the token's) of the plain Q-Former, the token being one more query."""
    image = plain.vision_model(given["pixel_values"]).last_hidden_state
    queries = torch.cat((plain.query_tokens, token), 1).expand(len(image), -1, -1)
    call = {"query_embeds": queries, "encoder_hidden_states": image}
    if "qformer_input_ids" in given:
        mask = torch.cat((torch.ones(len(image), queries.shape[1]), given["qformer_attention_mask"]), 1).long()
        call |= {"input_ids": given["qformer_input_ids"], "attention_mask": mask}
    states = plain.qformer(**call).last_hidden_state
    stop = QUERIES + token.shape[1]
    return torch.cat((states[:, :QUERIES], states[:, stop:]), 1), states[:, QUERIES:stop]


def read_by_hand(plain, given, rows):
    """Logits of the language model that sees ``rows`` (B, QUERIES, D) in the image tokens' places."""
    embeds = plain.get_input_embeddings()(given["input_ids"]).clone()
    embeds[:, :QUERIES] = plain.language_projection(rows)
    options = {} if plain.config.use_decoder_only_language_model else {"labels": given["labels"]}
    return plain.language_model(inputs_embeds=embeds, attention_mask=given["attention_mask"], **options).logits


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_token_goes_with_the_queries_and_its_loss_is_word_by_word(kind, length):
    model, plain = wrapped(kind, num_experts=0, gist={"dropout": 0.0, "length": length})
    with torch.no_grad():
        [p.zero_() for n, p in model.named_parameters() if n.endswith("factors.v")]  # the plain model but for the token
    quiet(plain)
    given = inputs(kind)
    others, gist = qformer_by_hand(plain, given, token_of(model))
    queries = others[:, :QUERIES]
    output = model(**given)
    torch.testing.assert_close(output.qformer_outputs.last_hidden_state, others, rtol=1e-4, atol=1e-5)
    logits = read_by_hand(plain, given, queries)
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)

    loss = model.train()(**given).loss
    other = read_by_hand(plain, given, gist.mean(1, keepdim=True).expand(-1, QUERIES, -1))
    labels = given["labels"]
    if plain.config.use_decoder_only_language_model:
        logits, other, labels = logits[:, :-1], other[:, :-1], labels[:, 1:]
    kept = labels != -100
    logits, other, labels = logits[kept].double(), other[kept].double(), labels[kept]
    p, q = (F.log_softmax(t / 3.0, -1) for t in (logits, other))
    interaction = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
    want = F.cross_entropy(logits, labels) + 0.5 * F.cross_entropy(other, labels) + 0.75 * interaction
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-5)
    assert set(petal.last_losses(model)) == {"task", "gist"}
    loss.backward()
    assert token_of(model).grad.any()


def test_accumulated_batches_weigh_by_their_words():
    model, _ = wrapped("instructblip-opt", gist={"dropout": 0.0})
    model.train()
    given = inputs()
    torch.manual_seed(0)
    whole = model(**given).loss
    counted = (given["labels"][:, 1:] != -100).sum()
    torch.manual_seed(0)
    torch.testing.assert_close(model(**given, num_items_in_batch=2 * counted).loss, whole / 2)


def test_t5_heeds_no_number_of_words_and_nor_do_the_terms():
    model, _ = wrapped("instructblip-t5", gist={"dropout": 0.0})
    model.train()
    losses = []
    for more in ({}, {"num_items_in_batch": torch.tensor(100)}):
        torch.manual_seed(0)
        losses.append(model(**inputs("instructblip-t5"), **more).loss)
    assert torch.equal(*losses)


def test_add_gist_names_the_token_among_the_queries():
    with pytest.raises(TypeError, match=r"PetalConfig\(gist=True\)"):
        fg.add_gist(make())


def test_the_token_in_files_and_generation(tmp_path):
    model, plain = wrapped("instructblip-opt", gist=True, instruct_llm=True)
    model.eval()
    given = inputs(labels=False)
    before = plain(**given).logits
    want, words = model(**given).logits, model.generate(**given, num_beams=3, max_new_tokens=4)
    fg.save_adapter(model, tmp_path)
    other = fg.load_adapter(make(), tmp_path)
    assert torch.equal(other(**given).logits, want)
    assert torch.equal(other.generate(**given, num_beams=3, max_new_tokens=4), words)
    fg.unload(model)
    assert torch.equal(model(**given).logits, before)
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == []


# -- the language model's instruction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_instruction_and_nothing_else_is_enriched(kind, monkeypatch):
    """Not the image tokens, not the answer, which the gate does not see either."""
    model, plain = wrapped(kind, instruct_llm=True)
    experts = part(model, petal.instructed_llm.InstructedLanguageModel).experts
    given = inputs(kind)
    seen = []
    model.language_model.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    model(**given)
    embeds = plain.get_input_embeddings()(given["input_ids"])
    causal = plain.config.use_decoder_only_language_model
    words = (given["input_ids"] != IMAGE) & ((given["labels"] == -100) if causal else True)
    want = torch.where(words[..., None], experts(embeds, embeds, words), embeds)
    torch.testing.assert_close(seen[0][:, QUERIES:], want[:, QUERIES:])
    assert not torch.allclose(want[:, QUERIES:], embeds[:, QUERIES:], rtol=1e-2)
    if causal:  # another answer behind the same instruction leaves the instruction as it is
        other = dict(given, input_ids=given["input_ids"].where(words | (given["input_ids"] == IMAGE), 7))
        model(**other)
        torch.testing.assert_close(seen[1][:, : QUERIES + 2], seen[0][:, : QUERIES + 2])


@pytest.mark.parametrize("kind", KINDS)
def test_generation_enriches_the_instruction_alone(kind):
    """Greedy words are those of calling the whole sequence anew for every word."""
    model, _ = wrapped(kind, instruct_llm=True)
    model.eval()
    given = inputs(kind, labels=False)
    words = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    uncached = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(words, uncached)
    if kind.endswith("opt"):
        first = words[:, given["input_ids"].shape[1]] if words.shape[1] > 4 else words[:, 0]
        assert torch.equal(first, model(**given).logits[:, -1].index_fill(-1, torch.tensor([1]), -torch.inf).argmax(-1))


def test_fresh_experts_leave_the_language_model_alone():
    plain, given = make(), inputs()
    want = plain(**given).logits
    petal.wrap(plain, petal.PetalConfig(instruct_llm=True, **SMALL), verbose=False)
    torch.testing.assert_close(plain(**given).logits, want)
    fg.assert_training(stir(plain))


def test_an_instruction_that_comes_embedded_is_left_as_it_is():
    model, _ = wrapped("instructblip-opt", instruct_llm=True)
    model.eval()
    given = inputs(labels=False)
    embeds = model.language_model.get_input_embeddings()(given["input_ids"]).detach()
    words = model.generate(**given, inputs_embeds=embeds, max_new_tokens=3, do_sample=False)
    assert torch.equal(
        words, model.generate(**given, inputs_embeds=embeds, max_new_tokens=3, do_sample=False, use_cache=False)
    )


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="instruct_llm is about experts"):
        petal.PetalConfig(num_experts=0, instruct_llm=True)
    with pytest.raises(ValueError, match="QueryGistConfig has no field gamma"):
        petal.PetalConfig(gist={"gamma": 1})
    with pytest.raises(TypeError, match="gist must be None, True or a QueryGistConfig, got GistConfig"):
        petal.PetalConfig(gist=fg.GistConfig())
    model, _ = wrapped("instructblip-opt", gist=True)
    with pytest.raises(ValueError, match="return_dict=False is not for training"):
        model.train()(**inputs(), return_dict=False)
