"""PETAL in transformers' InstructBLIP and BLIP-2, against the same written out matrix by matrix; and what is shared."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

import qformers
from petal_by_hand import by_hand
from qformers import KINDS, QUERIES, inputs, make, quiet, stir

import fastgist
from fastgist import petal
from fastgist.nn import CPLinear
from fastgist.testing import assert_within_budget

SMALL = {"rank": 4, "expert_dim": 3, "num_experts": 2}


def wrapped(kind="instructblip-opt", dtype=torch.float32, **config):
    """(model with PETAL away from its start, the plain model)."""
    plain = make(kind).to(dtype)
    model = petal.wrap(copy.deepcopy(plain), petal.PetalConfig(**SMALL | config), verbose=False)
    return stir(model), plain


def doubles(given):
    return {k: v.double() if v.is_floating_point() else v for k, v in given.items()}


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def cp_layers(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, CPLinear)}


# -- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_hard_20_fresh_it_is_the_model(kind, core):
    """To the rounding of products that are put together."""
    plain, given = make(kind).double(), doubles(inputs(kind))
    want = plain(**given)
    model = petal.wrap(plain, petal.PetalConfig(core=core, **SMALL), verbose=False)
    got = model(**given)
    states = [out.qformer_outputs.last_hidden_state for out in (got, want)]
    torch.testing.assert_close(
        (got.logits, got.loss, states[0]), (want.logits, want.loss, states[1]), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("gating", ["softmax", "uniform"])
@pytest.mark.parametrize("core", ["cp", "tucker"])
@pytest.mark.parametrize("kind", ["instructblip-opt", "instructblip-t5"])
def test_equals_every_matrix_by_itself(kind, core, gating):
    model, plain = wrapped(kind, torch.float64, core=core, gating=gating)
    given = doubles(inputs(kind))
    other = by_hand(model, plain, given["qformer_attention_mask"])
    got, want = model(**given), other(**given)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(got.logits, plain(**given).logits, rtol=1e-3)
    ours = torch.autograd.grad(got.loss, list(trained(model).values()))
    theirs = torch.autograd.grad(want.loss, list(trained(model).values()))
    for name, a, b in zip(trained(model), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=name)
        assert b.any(), name


@pytest.mark.parametrize("kind", ["blip2-opt", "blip2-t5"])
def test_blip_2_without_experts_equals_every_matrix_by_itself(kind):
    model, plain = wrapped(kind, torch.float64, num_experts=0)
    given = doubles(inputs(kind))
    got, want = model(**given), by_hand(model, plain, None)(**given)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-9, atol=1e-10)


def test_blip_2_gates_by_its_queries():
    model, _ = wrapped("blip2-opt")
    model(**inputs("blip2-opt"))
    gate = petal.experts_of(model).last_gate.weights
    assert torch.equal(gate, gate[:1].expand_as(gate))


def test_recomputed_layers_give_the_same_gradients():
    """Both kinds of gradient checkpointing, where what layers share is given along, or made by each of them."""
    given, found = doubles(inputs()), {}
    for reentrant in (None, False, True):
        model, _ = wrapped(dtype=torch.float64, dropout=0.0)
        quiet(model).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**given).loss.backward()
        found[reentrant] = {name: p.grad for name, p in trained(model).items()}
    for reentrant in (False, True):
        for name, grad in found[None].items():
            torch.testing.assert_close(found[reentrant][name], grad, rtol=1e-8, atol=1e-12, msg=f"{reentrant} {name}")


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_hard_21_dropout_masks_are_those_of_the_backward(reentrant):
    """The derivative along a direction, by differences of a loss whose seed is fixed."""
    model, _ = wrapped(dtype=torch.float64, dropout=0.4)
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    given = doubles(inputs())
    parameters = list(trained(model).values())
    directions = [torch.randn_like(p) for p in parameters]

    def shifted(step):
        with torch.no_grad():
            [p.add_(d, alpha=step) for p, d in zip(parameters, directions, strict=True)]

    def loss():
        torch.manual_seed(3)
        logits = model(**given).logits  # transformers takes its own loss in float32
        return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()

    model.zero_grad()
    loss().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))
    step = 1e-6
    shifted(step)
    differences = loss().detach()
    shifted(-2 * step)
    differences = (differences - loss().detach()) / (2 * step)
    torch.testing.assert_close(slope, differences, rtol=1e-5, atol=1e-8)
    assert slope != 0


def test_evaluation_draws_nothing_and_training_does():
    model, _ = wrapped(dropout=0.4)
    quiet(model)
    given = inputs()
    state = torch.get_rng_state()
    first = model(**given).loss
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(**given).loss, first)
    model.train()
    assert not torch.equal(model(**given).loss, model(**given).loss)


def test_hard_24_a_sample_does_not_depend_on_its_batch_or_its_padding():
    model, _ = wrapped()
    given = inputs(labels=False)
    whole = model(**given).logits
    for i in range(len(whole)):
        alone = {k: v[i : i + 1] for k, v in given.items()}
        torch.testing.assert_close(model(**alone).logits, whole[i : i + 1], rtol=1e-4, atol=1e-5)
    other = dict(given)
    other["qformer_input_ids"] = given["qformer_input_ids"].where(given["qformer_attention_mask"] > 0, 7)
    torch.testing.assert_close(model(**other).logits, whole)


# -- what is shared --------------------------------------------------------------------------------------------------


def count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("training", [False, True])
def test_x_u_is_formed_once_for_q_k_v_and_once_for_the_image(training):
    """Counted: the update of 8 text matrices behind 6 inputs, and of 4 image matrices behind one."""
    given = inputs(labels=False)
    plain = make()
    base = count(lambda: plain(**given))
    model = petal.wrap(plain, petal.PetalConfig(rank=4, num_experts=0, dropout=0.1), verbose=False)
    quiet(model).train(training)
    added = count(lambda: model(**given)) - base
    text_rows, query_rows, image_rows, rank, dim, image_dim = 3 * (QUERIES + 5), 3 * QUERIES, 3 * 17, 4, 16, 20
    self_attention = 4 * 2 * text_rows * rank * (dim + 3 * dim)  # 4 layers: x U once, three times V
    queries = 2 * 2 * query_rows * rank * (dim + dim)
    image = 2 * image_rows * rank * (image_dim + 4 * dim)
    assert added == self_attention + queries + image


def test_one_mask_for_the_image_tokens_of_all_layers(monkeypatch):
    """One call makes all keys and values; recomputed, each layer makes its own under the same seed."""
    from fastgist.nn import cp

    calls = []
    original = cp.functional.cp_linear

    def spy(x, weight, *args, **options):
        calls.append((x.shape[-1], len(weight), options["seed"]))
        return original(x, weight, *args, **options)

    monkeypatch.setattr(cp.functional, "cp_linear", spy)
    model, _ = wrapped(dropout=0.5)
    model.train()
    model(**inputs())
    assert [c[1] for c in calls if c[0] == 20] == [4]
    assert [c[1] for c in calls if c[0] == 16] == [3, 1, 3, 3, 1, 3]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls.clear()
    model(**inputs())
    seeds = [c[2] for c in calls if c[0] == 20]
    assert len(seeds) == 2 and torch.equal(*seeds)


def test_all_gains_come_from_one_product(monkeypatch):
    from fastgist.nn import CPFactors

    calls = []
    original = CPFactors.forward
    monkeypatch.setattr(
        CPFactors, "forward", lambda self, mode, inward=False: (calls.append(mode), original(self, mode, inward))[1]
    )
    model, _ = wrapped(core="tucker")
    model(**inputs())
    assert len(calls) == 2  # text and image


@pytest.mark.parametrize("what", ["hook", "foreign"])
def test_a_layer_that_is_watched_is_called(what):
    """With a forward hook on a key layer, or another wrapper around it, the numbers stay."""
    model, _ = wrapped(dtype=torch.float64)
    given = doubles(inputs())
    want = model(**given).logits
    seen = []
    attentions = model.qformer.encoder.layer[2]
    for attention in (attentions.attention.attention, attentions.crossattention.attention):
        if what == "hook":
            attention.key.register_forward_hook(lambda m, a, out: seen.append(out.shape))
        else:
            attention.key = nn.Sequential(attention.key)
    torch.testing.assert_close(model(**given).logits, want, rtol=1e-10, atol=1e-12)
    if what == "hook":
        assert sorted(seen) == [(3, 9, 16), (3, 17, 16)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_weights_and_hidden_states_are_recorded(implementation):
    given = inputs()
    plain = make()
    plain.set_attn_implementation(implementation)
    model = petal.wrap(copy.deepcopy(plain), petal.PetalConfig(**SMALL), verbose=False)
    q = {"input_ids": given["qformer_input_ids"], "query_embeds": model.query_tokens.expand(3, -1, -1)}
    q |= {"encoder_hidden_states": torch.randn(3, 17, 20), "output_attentions": implementation == "eager"}
    got, want = (m.qformer(**q, output_hidden_states=True) for m in (model, plain))
    assert len(got.hidden_states) == 5
    torch.testing.assert_close(got.hidden_states, want.hidden_states)
    if implementation == "eager":
        assert len(got.cross_attentions) == 2
        torch.testing.assert_close(got.attentions, want.attentions)
        torch.testing.assert_close(got.cross_attentions, want.cross_attentions)


def test_only_ours_is_trained_and_54_matrices_at_the_published_size(capsys):
    with torch.device("meta"):
        model = make(**qformers.PUBLISHED)
    for config, expected in (
        (petal.PetalConfig(core="tucker"), {"mode approximation": 761_856 + 3_456, "experts": 594_816 + 6 * 768 + 6}),
        (petal.PetalConfig(core="tucker", gating="uniform"), {"mode approximation": 765_312, "experts": 594_816}),
        (petal.PetalConfig(num_experts=0), {"mode approximation": 237_568 + 3_456 + 128}),
    ):
        petal.wrap(model, config)
        assert len(cp_layers(model)) == 54
        shares = petal.trainable_shares(model)
        assert shares.parts == expected
        line = capsys.readouterr().out
        assert (
            f"{shares.trainable:,}" in line and f"Q-Former: {shares.qformer:,}" in line and f"{shares.model:,}" in line
        )
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all("factors" in name or "experts" in name for name in names)
        assert not model.query_tokens.requires_grad and not model.language_projection.weight.requires_grad
        fastgist.unload(model)
    assert 185e6 < sum(p.numel() for p in model.qformer.parameters()) < 186.5e6


def test_groups_by_shape():
    model, _ = wrapped()
    by_factors = {}
    for path, layer in cp_layers(model).items():
        by_factors.setdefault(layer.factors, []).append(path)
    text, image = sorted(by_factors.values(), key=len, reverse=True)
    assert len(text) == 4 * 3 + 2 and all("crossattention" not in p or p.endswith("query") for p in text)
    assert len(image) == 4 and all(p.endswith(("key", "value")) and "crossattention" in p for p in image)
    assert sorted(layer.mode for layer in cp_layers(model).values() if layer.factors.in_features == 20) == [0, 1, 2, 3]


# -- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gating", ["softmax", "uniform"])
@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_under_autocast_the_values_are_those_of_every_matrix_by_itself(core, gating):
    """Within the error budget of the same written out, under the same autocast, against float64: states, loss, gradients."""
    model, plain = wrapped(core=core, gating=gating, dropout=0.0, load_balance=0.0)
    quiet(model).train()
    given = inputs()
    names = list(trained(model))

    def evaluated(m, of, cast, **options):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = m(**options)
        states = out.qformer_outputs.last_hidden_state
        along = torch.linspace(-1, 1, states.numel(), dtype=torch.float64).cos().view_as(states)
        return states.detach(), out.loss.detach(), torch.autograd.grad((states.double() * along).sum(), of)

    ours = evaluated(model, list(trained(model).values()), True, **given)
    other = quiet(by_hand(model, plain, given["qformer_attention_mask"])).train()
    theirs = evaluated(other, list(trained(model).values()), True, **given)
    wide, wide_plain = copy.deepcopy(model).double(), copy.deepcopy(plain).double()
    exact_model = quiet(by_hand(wide, wide_plain, given["qformer_attention_mask"])).train()
    exact = evaluated(exact_model, list(trained(wide).values()), False, **doubles(given))
    assert_within_budget(ours[0], theirs[0], exact[0], what="states")
    assert abs(ours[1] - exact[1]) <= 2 * abs(theirs[1] - exact[1]) + 0.01 * abs(exact[1])
    assert all(g.dtype == torch.float32 and e.any() for g, e in zip(ours[2], exact[2], strict=True)), names
    # Joined, each by its own size: of a handful of numbers the plain form's largest error is a matter of luck.
    sizes = [e.abs().max() for e in exact[2]]
    joined = (torch.cat([(g / s).flatten() for g, s in zip(of[2], sizes, strict=True)]) for of in (ours, theirs, exact))
    assert_within_budget(*joined, what="gradients")
