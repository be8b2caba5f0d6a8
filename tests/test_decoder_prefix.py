"""Keys and values before those of a decoder's attention: against PEFT's, beyond windows, and what they take no part of.

Values for every decoder are in test_decoder_methods.py."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import gpt2, llama, mistral, qwen2, qwen3, texts
from decoders_by_hand import by_hand, close
from test_decoder_methods import language_model, made
from torch import Tensor

from fastgist import GistConfig, PrefixConfig, add_gist, get_peft_model, print_trainable_parameters
from fastgist.nn import PrefixedAttention


def layers(model) -> list[PrefixedAttention]:
    return [m for m in model.modules() if isinstance(m, PrefixedAttention)]


@pytest.mark.parametrize(("make", "heads"), [(llama, 2), (qwen3, 2), (gpt2, 4)])
def test_one_row_for_each_head_of_the_keys(make, heads) -> None:
    """Two of four query heads share one in the models with grouped queries."""
    model = get_peft_model(make(), PrefixConfig(length=3))
    assert [tuple(m.key.shape) for m in layers(model)] == [(heads, 3, 8)] * 2
    assert all(not m.value.any() and m.key.any() for m in layers(model))
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad and "score" not in n}
    assert sum(trained.values()) == 2 * 2 * heads * 3 * 8
    print_trainable_parameters(model)


def turned_back(t: Tensor, places: int, theta: float = 10000.0) -> Tensor:
    """t (heads, n, d) rotated as a key is that stands ``places`` earlier."""
    half = t.shape[-1] // 2
    angle = -places * theta ** -(torch.arange(half).to(t) / half)
    a, b = t[..., :half], t[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def test_pefts_prefix_is_ours_with_its_keys_turned_by_its_length() -> None:
    """PEFT's keys are not rotated either, but the words' positions start behind them; what counts is the difference."""
    peft = pytest.importorskip("peft")
    base = llama().double()
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    with torch.no_grad():
        for p in theirs.prompt_encoder.parameters():
            p.normal_()
    ours = get_peft_model(copy.deepcopy(base), PrefixConfig(length=3)).eval()
    with torch.no_grad():
        ours.score.weight.copy_(theirs.get_base_model().score.modules_to_save["default"].weight)
        for layer, kept in zip(layers(ours), theirs.get_prompt(1).layers, strict=True):
            layer.key.copy_(turned_back(kept.keys[0], 3))
            layer.value.copy_(kept.values[0])
    given = texts("left")
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, rtol=1e-5, atol=1e-5)  # float32 angles
    assert not torch.allclose(ours(**given).logits, base(**given).logits, rtol=1e-2)
    ours, theirs = add_gist(ours).eval(), add_gist(theirs).eval()
    with torch.no_grad():
        theirs.gist.token.copy_(ours.gist.token)
    want = theirs(**given, return_gist_logits=True)
    torch.testing.assert_close(
        ours(**given, return_gist_logits=True).gist_logits, want.gist_logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mistral, {"sliding_window": 2}),
        (qwen2, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    ],
)
def test_no_window_leaves_it_out(make, options) -> None:
    """The last words are far behind the first ones, and see the prefix all the same; generation with a cache that keeps
    the window alone too."""
    model = made(make, "prefix", GistConfig(dropout=0.0), **options)
    given = texts("left", (11, 3))
    output = model(**given, return_gist_logits=True)
    z, z_gist = by_hand(model.model, given, model.gist.token)
    close(model.model, output.logits, z)
    close(model.model, output.gist_logits, z_gist)
    language = language_model(make, "prefix", **options)
    ids = torch.randint(3, 50, (2, 12))
    whole, cache = language(ids).logits, None
    for i in range(12):
        step = language(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        torch.testing.assert_close(step.logits[:, 0], whole[:, i])
    last = torch.autograd.grad(whole[:, -1].sum(), [layer.value for layer in layers(language)])
    assert all(g.any() for g in last)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_it_takes_no_position(make) -> None:
    """A row as long as the model's positions is run, and leaves the gist token no more or less room than without."""
    model = made(make, "prefix")
    given = texts("right", (24, 5))
    assert model(**given).logits.isfinite().all()
    with pytest.raises(ValueError, match="as long as .*'s 24 positions, .* shorten it by 1"):
        model(**given, return_gist_logits=True)
    shorter = {k: v[:, :23] for k, v in given.items()}
    z, z_gist = by_hand(model.model, shorter, model.gist.token)
    output = model(**shorter, return_gist_logits=True)
    close(model.model, output.logits, z)
    close(model.model, output.gist_logits, z_gist)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_no_word_sees_a_later_one(make) -> None:
    """Without padding transformers leaves the mask to the attention function, which would take the first keys, ours, for
    the row's first words."""
    language = language_model(make, "prefix")
    ids = torch.randint(3, 50, (1, 7))
    embeds = language.get_input_embeddings()(ids).detach().requires_grad_()
    logits = language(inputs_embeds=embeds).logits
    for i in range(7):
        (gradient,) = torch.autograd.grad(logits[0, i].square().sum(), embeds, retain_graph=True)
        seen = gradient[0].abs().sum(-1) > 0
        assert seen.tolist() == [j <= i for j in range(7)]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_several_beams_and_an_older_cache(make) -> None:
    """What is generated from a cache that an earlier call filled is what is generated at once."""
    language = language_model(make, "prefix")
    ids = torch.randint(3, 50, (2, 6))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    want = language.generate(ids, num_beams=3, **options)
    assert torch.equal(language.generate(ids, num_beams=3, use_cache=False, **options), want)
    cache = language(ids[:, :4], use_cache=True).past_key_values
    assert cache.get_seq_length() == 4
    assert torch.equal(language.generate(ids, past_key_values=cache, **options), language.generate(ids, **options))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_attention_that_would_take_it_otherwise_is_refused(make) -> None:
    model = made(make, "prefix")
    for name in ("flex_attention", "flash_attention_2"):
        for layer in layers(model):
            layer.base_layer.config = copy.copy(layer.base_layer.config)
            layer.base_layer.config._attn_implementation_internal = name
        with pytest.raises(ValueError, match=f"a prefix in a decoder needs .* sdpa or eager, got '{name}'"):
            model(**texts())
