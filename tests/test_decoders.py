"""GIST and the PEFT methods on transformers' causal classifiers, against a Llama and a GPT-2 written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import gpt2, llama, mistral, qwen2, qwen3, texts, written_out
from pairs import DECODER_BACKBONES, METHODS
from torch import nn
from vits import stir

import fastgist
from fastgist import (
    AdapterConfig,
    BitFitConfig,
    CPConfig,
    FullConfig,
    GistConfig,
    LoraConfig,
    SSFConfig,
    add_gist,
    assert_training,
    get_peft_model,
    merge,
    set_adapter,
    unmerge,
)
from fastgist.nn import GistLoss

CLASSIFIERS = list(DECODER_BACKBONES.values())
LANGUAGE = {"LlamaForCausalLM": llama, "Qwen2ForCausalLM": qwen2, "Qwen3ForCausalLM": qwen3, "GPT2LMHeadModel": gpt2}


def gisted(make, config=None, gist=None, **options) -> nn.Module:
    """A gist model whose trainable parameters are away from their initial values, in evaluation."""
    base = make(**options)
    base = base if config is None else get_peft_model(base, config)
    return stir(add_gist(base, gist)).eval()


def both(seed: int = 3) -> tuple[dict, dict]:
    """The same texts padded on the right and on the left."""
    given = []
    for side in ("right", "left"):
        torch.manual_seed(seed)
        given.append(texts(side))
    return given[0], given[1]


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("method", ["LoRA", "CP", "adapter, houlsby"])
@pytest.mark.parametrize("gist", [GistConfig(), GistConfig(2, readout="mean")], ids=repr)
@pytest.mark.parametrize("side", ["right", "left"])
def test_against_one_written_out(make, method, gist, side) -> None:
    model = gisted(make, METHODS[method], gist)
    given = texts(side)
    output = model(**given, return_gist_logits=True)
    exact = copy.deepcopy(model).double()
    z, gist_logits = written_out(exact.model, exact.gist.token, **given)
    assert (z - gist_logits).abs().max() > 1e-2
    torch.testing.assert_close(
        output.logits.double(), z, rtol=1e-5, atol=1e-5
    )  # RMS norms and rotary angles are float32
    torch.testing.assert_close(output.gist_logits.double(), gist_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_the_prediction_is_the_plain_models(make) -> None:
    base = make()
    given = texts()
    want = base(**given).logits
    model = add_gist(copy.deepcopy(base)).eval()
    torch.testing.assert_close(model(**given).logits, want)
    before = model(**given, return_gist_logits=True)
    torch.testing.assert_close(before.logits, want)
    with torch.no_grad():
        model.gist.token.add_(1.0)
    after = model(**given, return_gist_logits=True)
    assert torch.equal(before.logits, after.logits), "the prediction sees the gist token"
    assert not torch.allclose(before.gist_logits, after.gist_logits)
    (gradient,) = torch.autograd.grad(after.logits.square().sum(), model.gist.token, allow_unused=True)
    assert gradient is None or not gradient.any()
    torch.testing.assert_close(model(given["input_ids"]).logits, base(given["input_ids"]).logits)  # no mask


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_padding_and_batch(make) -> None:
    """Padding on either side, more of it, embeddings for ids, no mask, a row alone: the same logits and gist logits."""
    model = gisted(make)
    right, left = both()
    want = model(**right, return_gist_logits=True)

    def same(given: dict) -> None:
        got = model(**given, return_gist_logits=True)
        torch.testing.assert_close(got.logits, want.logits)
        torch.testing.assert_close(got.gist_logits, want.gist_logits)

    same(left)
    torch.manual_seed(3)
    same(texts("left", extra=4))
    torch.manual_seed(3)
    same(texts("right", extra=4))
    same({"input_ids": right["input_ids"]})  # no mask: pad_token_id says where rows end
    embed = model.model.get_input_embeddings()
    same({"inputs_embeds": embed(left["input_ids"]), "attention_mask": left["attention_mask"]})
    for i, row in enumerate(right["input_ids"]):
        alone = model(input_ids=row[row != 0][None], return_gist_logits=True)
        torch.testing.assert_close(alone.logits, want.logits[i : i + 1])
        torch.testing.assert_close(alone.gist_logits, want.gist_logits[i : i + 1])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_last_token_is_the_one_transformers_reads(make) -> None:
    model = add_gist(make()).eval()
    plain = model.model
    ids = torch.tensor([[5, 0, 7, 8, 0, 0], [0, 0, 0, 0, 0, 0], [4, 5, 6, 7, 8, 9], [0, 5, 6, 0, 3, 0]])
    for mask in (None, torch.ones_like(ids), (torch.arange(6) < 5).long().expand(4, 6)):
        given = {"input_ids": ids, "attention_mask": mask}
        torch.testing.assert_close(model(**given).logits, plain(**given).logits)
        torch.testing.assert_close(model(**given, return_gist_logits=True).logits, plain(**given).logits)
    given = {"inputs_embeds": plain.get_input_embeddings()(ids)}
    torch.testing.assert_close(model(**given).logits, plain(**given).logits)
    positions = torch.tensor([[3, 4, 5, 6, 7, 8]])
    given = {"input_ids": ids, "position_ids": positions.expand(4, 6), "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(model(**given, return_gist_logits=True).logits, plain(**given).logits)
    plain.config.pad_token_id = None
    torch.testing.assert_close(model(input_ids=ids[:1]).logits, plain(input_ids=ids[:1]).logits)
    with pytest.raises(ValueError, match=r"has no config\.pad_token_id, .* a batch of 4"):
        model(input_ids=ids)


def test_gpt2s_positions_and_types() -> None:
    """On the left padding does not count as positions, as in generate; a token's type is the last token's."""
    model = gisted(gpt2)
    right, left = both()
    positions = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    want = model.model(**left, position_ids=positions).logits
    torch.testing.assert_close(model(**left).logits, want)
    types = torch.randint(50, right["input_ids"].shape)
    got = model(**right, token_type_ids=types, return_gist_logits=True)
    torch.testing.assert_close(got.logits, model.model(**right, token_type_ids=types).logits)
    last = types.gather(1, right["attention_mask"].sum(1, keepdim=True) - 1)
    with torch.no_grad():  # the type's embedding is added to the token's
        model.gist.token.copy_(model.gist.token + model.model.transformer.wte.weight[last[:1]])
        embeds = model.model.transformer.wte(right["input_ids"]) + model.model.transformer.wte(types)
    mask = right["attention_mask"][:1]
    moved = model(inputs_embeds=embeds[:1], attention_mask=mask, return_gist_logits=True)
    torch.testing.assert_close(moved.gist_logits, got.gist_logits[:1])


def test_two_adapters() -> None:
    model = gisted(llama, LoraConfig(rank=2))
    given = texts()
    first = model(**given, return_gist_logits=True)
    get_peft_model(model, AdapterConfig(3), name="other")
    stir(model)
    assert not torch.allclose(model.eval()(**given, return_gist_logits=True).gist_logits, first.gist_logits)
    set_adapter(model, "default")
    torch.testing.assert_close(model.eval()(**given, return_gist_logits=True).gist_logits, first.gist_logits)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_merging(make) -> None:
    model = stir(get_peft_model(make(), LoraConfig(rank=2))).eval()
    given = texts()
    before, state = model(**given).logits, copy.deepcopy(model.state_dict())
    torch.testing.assert_close(merge(model)(**given).logits, before)
    unmerge(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_shift_has_no_place_in_an_rms_norm() -> None:
    with pytest.raises(TypeError, match=r"ScaleShift\.merge: base_layer is LlamaRMSNorm; .*nothing was changed"):
        merge(get_peft_model(llama(), SSFConfig()))


def test_the_dense_update_of_a_conv1d_is_of_the_shape_of_a_linear_layer() -> None:
    """(out, in), though its weight is (in, out): c_fc is 32 -> 128."""
    model = stir(get_peft_model(gpt2(), LoraConfig(rank=2, targets=("c_fc",))))
    layer = model.transformer.h[0].mlp.c_fc
    original, delta = layer.base_layer.weight.clone(), layer.get_delta_weight()
    assert delta.shape == (128, 32)
    merge(model)
    torch.testing.assert_close(layer.base_layer.weight, original + delta.T)
    unmerge(model)
    assert torch.equal(layer.base_layer.weight, original)


@pytest.mark.parametrize("make", CLASSIFIERS)
@pytest.mark.parametrize("full_length", ["refuse", "truncate"])
def test_a_row_of_full_length(make, full_length) -> None:
    model = gisted(make, None, GistConfig(full_length=full_length))
    given = texts("right", (24, 23, 6))
    if full_length == "refuse":
        assert torch.isfinite(model(**given).logits).all()  # there is room without the token
        for some in (given, {"input_ids": given["input_ids"]}):
            with pytest.raises(ValueError, match="as long as .*'s 24 positions, .* shorten it by 1"):
                model(**some, return_gist_logits=True)
        shorter = {k: v[1:] for k, v in given.items()}
        want = model(**{k: v[:, :23] for k, v in shorter.items()}, return_gist_logits=True)
        for some in (shorter, {"input_ids": shorter["input_ids"]}):  # padded to full length, but every row has room
            got = model(**some, return_gist_logits=True)
            torch.testing.assert_close(got.logits, want.logits)
            torch.testing.assert_close(got.gist_logits, want.gist_logits)
        return
    want = model(**{k: v[:, :23] for k, v in given.items()}, return_gist_logits=True)
    for some in (given, {"input_ids": given["input_ids"]}):
        got = model(**some, return_gist_logits=True)
        torch.testing.assert_close(got.logits, want.logits)
        torch.testing.assert_close(got.gist_logits, want.gist_logits)
        torch.testing.assert_close(model(**some).logits, want.logits)


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_a_compiled_step_has_the_same_gradients(make) -> None:
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if make is gpt2 else {}
    model = gisted(make, AdapterConfig(4, "houlsby"), GistConfig(dropout=0.0), **options).train()
    given, ours = texts("left"), [p for p in model.parameters() if p.requires_grad]

    def gradients(run) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(GistLoss()(run(**given), torch.tensor([0, 2, 1])), ours)

    want = gradients(model)
    torch._dynamo.reset()
    torch.testing.assert_close(gradients(torch.compile(model, backend="aot_eager", fullgraph=True)), want)


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_recomputed_layers_drop_the_same(make) -> None:
    """GPT-2's own dropout, the layers' and the token's, drawn again in the backward from the same state."""
    model = gisted(make, LoraConfig(rank=2, dropout=0.4), GistConfig(dropout=0.3)).train()
    given, ours = texts("left"), [p for p in model.parameters() if p.requires_grad]

    def gradients(seed: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(seed)
        return torch.autograd.grad(GistLoss()(model(**given), torch.tensor([0, 2, 1])), ours)

    want, other = gradients(3), gradients(4)
    assert not all(torch.equal(a, b) for a, b in zip(want, other, strict=True))
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(3), want)


@pytest.mark.parametrize("make", [llama, mistral, gpt2])
def test_compiled_in_one_graph(make) -> None:
    model = gisted(make, LoraConfig(rank=2))
    given = texts("left")
    expected = model(**given, return_gist_logits=True)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    got = compiled(**given, return_gist_logits=True)
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.gist_logits, expected.gist_logits)
    if make is llama:
        with pytest.raises(RuntimeError, match="24 positions"):
            compiled(**texts("left", (24, 9)), return_gist_logits=True)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(make, reentrant) -> None:
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if make is gpt2 else {}
    model = gisted(make, LoraConfig(rank=2), GistConfig(dropout=0.0), **options).train()
    given = texts("left")
    ours = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(model(**given).gist_logits.square().sum(), ours)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert model.model.is_activation_checkpointing
    model(**given).gist_logits.square().sum().backward()
    for p, want in zip(ours, plain, strict=True):
        torch.testing.assert_close(p.grad, want)
    model.activation_checkpointing_disable()
    assert not model.model.is_activation_checkpointing


@pytest.mark.parametrize("make", [llama, gpt2])
def test_under_autocast(make) -> None:
    model = gisted(make, LoraConfig(rank=2), GistConfig(dropout=0.0))
    given = texts("left")
    exact = model(**given, return_gist_logits=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**given, return_gist_logits=True)
        loss = GistLoss()(output, torch.tensor([0, 2, 1]))
    loss.backward()
    torch.testing.assert_close(output.gist_logits.float(), exact.gist_logits, rtol=0.05, atol=0.05)
    assert model.gist.token.grad.isfinite().all() and model.gist.token.grad.any()
    half = gisted(make, LoraConfig(rank=2)).to(torch.bfloat16)
    assert half(**given, return_gist_logits=True).gist_logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_generates_with_the_body_it_shares(name) -> None:
    import transformers

    classifier = LANGUAGE[name]()
    body = classifier.base_model_prefix
    language = getattr(transformers, name)(copy.deepcopy(classifier.config)).eval()
    setattr(language, body, getattr(classifier, body))
    language.tie_weights()
    language.generation_config.eos_token_id = None  # a text that ends is padded
    ids = torch.randint(3, 50, (2, 6))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = language.generate(ids, **options)
    model = add_gist(get_peft_model(classifier, LoraConfig(rank=2)))
    assert torch.equal(language.generate(ids, **options), plain)
    stir(model, 0.5)
    adapted = language.generate(ids, **options)
    assert not torch.equal(adapted, plain)
    steps = ids  # with what it keeps and without: the cache sees the update too
    for _ in range(6):
        steps = torch.cat((steps, language(steps, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(adapted[:, : steps.shape[1]], steps)
    with pytest.raises(TypeError, match=rf"{name} predicts a token at every place.*Wrap a {type(classifier).__name__}"):
        add_gist(language)


@pytest.mark.parametrize(
    "config", [CPConfig(rank=4, dropout=0.2), CPConfig(rank=4, core="tucker"), LoraConfig(rank=2)], ids=str
)
@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_is_adapted_and_decodes_as_it_trained(name, config, tmp_path) -> None:
    """The cache holds keys and values with their update: words and logits are those of the whole sequence."""
    import transformers

    classifier = LANGUAGE[name]()
    language = getattr(transformers, name)(copy.deepcopy(classifier.config)).eval()
    plain = copy.deepcopy(language)
    get_peft_model(language, config)
    trained = [n for n, p in language.named_parameters() if p.requires_grad]
    assert trained and not any("lm_head" in n or "base_layer" in n for n in trained)
    stir(language, 0.5)
    ids = torch.randint(3, 50, (2, 6))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    words = language.generate(ids, **options)
    assert torch.equal(language.generate(ids, use_cache=False, **options), words)
    whole = language(words).logits
    cache = None
    for i in range(words.shape[1]):
        step = language(words[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        torch.testing.assert_close(step.logits[:, 0], whole[:, i], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, plain(words).logits, rtol=1e-2)
    language(words, labels=words).loss.backward()
    assert all(p.grad is not None for p in language.parameters() if p.requires_grad)
    fastgist.save_adapter(language, tmp_path)
    torch.testing.assert_close(fastgist.load_adapter(plain, tmp_path)(words).logits, whole)
    if name != "GPT2LMHeadModel":
        fastgist.merge(language)
        assert torch.equal(language.generate(ids, **options), words)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_language_models_head_stays_as_it_is(name, tmp_path) -> None:
    """Its weight may be the embeddings', and a scale of it would be theirs."""
    import transformers

    language = getattr(transformers, name)(copy.deepcopy((llama if name.startswith("Llama") else gpt2)().config))
    language.config.tie_word_embeddings = True
    language.tie_weights()
    get_peft_model(language, SSFConfig())
    assert type(language.lm_head) is nn.Linear and language.lm_head.weight is language.get_input_embeddings().weight
    language.save_pretrained(tmp_path)


def test_full_fine_tuning_of_a_model_without_a_head(tmp_path) -> None:
    import transformers

    plain = transformers.LlamaForCausalLM(llama().config).eval()
    language = get_peft_model(copy.deepcopy(plain), FullConfig())
    assert all(p.requires_grad for p in language.parameters())
    stir(language, 0.1)
    ids = torch.randint(3, 50, (2, 6))
    fastgist.save_adapter(language, tmp_path)
    assert torch.equal(fastgist.load_adapter(plain, tmp_path)(ids).logits, language(ids).logits)


def test_what_cannot_be_says_so() -> None:
    model = add_gist(llama())
    given = texts()
    for cache in ({"use_cache": True}, {"past_key_values": object()}):
        with pytest.raises(ValueError, match="keeps no keys and values: leave use_cache out"):
            model(**given, **cache)
    with pytest.raises(ValueError, match=r"expected attention_mask of shape \(3, 8\), got \(3, 1, 8, 8\)"):
        model(given["input_ids"], torch.ones(3, 1, 8, 8))
    with pytest.raises(ValueError, match="expected either input_ids or inputs_embeds"):
        model(attention_mask=given["attention_mask"])
    with pytest.raises(ValueError, match="has a gist token already"):
        add_gist(model)
    plain = llama()
    names = [n for n, _ in plain.named_modules()]
    with pytest.raises(ValueError, match='the first of 2 gist tokens does not see the others.*readout="mean"'):
        add_gist(plain, GistConfig(2))
    assert [n for n, _ in plain.named_modules()] == names and all(p.requires_grad for p in plain.parameters())
    with pytest.raises(ValueError, match="nothing in this model is called 'query'; it has q_proj, q, k_proj, k, "):
        get_peft_model(llama(), LoraConfig(targets=("query",)))
    with pytest.raises(
        ValueError, match="nothing in this model is called 'query'; it has c_attn, q, k, v, c_proj, proj"
    ):
        get_peft_model(gpt2(), LoraConfig(targets=("query",)))
    with pytest.raises(ValueError, match="q_proj is matched twice, by 'q' and 'q_proj'"):
        get_peft_model(llama(), LoraConfig(targets=("q", "q_proj")))
    with pytest.raises(ValueError, match="an adapter named 'default' already"):
        get_peft_model(get_peft_model(llama(), LoraConfig()), LoraConfig())
    with pytest.raises(ValueError, match="BitFitConfig: no layer of this model has a bias"):
        get_peft_model(llama(), BitFitConfig())
    with pytest.raises(ValueError, match="full_length must be one of refuse, truncate, got 'drop'"):
        GistConfig(full_length="drop")


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_training_reaches_everything(make) -> None:
    assert_training(add_gist(get_peft_model(make(), LoraConfig(rank=2))))
