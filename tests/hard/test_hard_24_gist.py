"""Hard case 24 for images: a sample's outputs are its own, what is trained, modes. Values are in tests/test_gist.py."""

from __future__ import annotations

import copy

import pytest
import torch
from vits import dinov3, images, stir, trainable, vit

from fastgist import AdapterConfig, CPConfig, GistConfig, LoraConfig, add_gist, get_peft_model
from fastgist.nn import GistLoss

CONFIGS = [LoraConfig(rank=2), CPConfig(rank=4), AdapterConfig(4)]


def _model(config, make=vit, **options):
    return stir(add_gist(get_peft_model(make(**options), config), GistConfig(dropout=0.0)))


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"reg_tokens": 2}], ids=repr)
def test_24_a_sample_does_not_see_the_rest_of_its_batch(config, options) -> None:
    model = _model(config, **options).double().eval()
    x = images(5, dtype=torch.float64)
    together = model(x, return_gist_logits=True)
    for i in range(5):
        alone = model(x[i : i + 1], return_gist_logits=True)
        for name in together:
            torch.testing.assert_close(together[name][i], alone[name][0], rtol=1e-11, atol=1e-12)
    shuffled = torch.randperm(5)
    again = model(x[shuffled], return_gist_logits=True)
    for name in together:
        torch.testing.assert_close(again[name], together[name][shuffled], rtol=1e-11, atol=1e-12)
    x.requires_grad_(True)
    model(x, return_gist_logits=True).gist_logits[2].sum().backward()
    touched = x.grad.abs().sum((1, 2, 3)) > 0
    assert touched.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("make", [vit, dinov3])
def test_24_only_adapted_parameters_get_gradients(config, make) -> None:
    model = _model(config, make).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    GistLoss()(model(images()), torch.tensor([0, 3, 1])).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable(model)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("make", [vit, dinov3, lambda: vit(global_pool="avg")])
def test_24_evaluation_is_deterministic_and_needs_no_graph(make) -> None:
    model = add_gist(get_peft_model(make(), CPConfig(rank=4)), GistConfig(dropout=0.5)).eval()
    x = images()
    with torch.no_grad():
        first = model(x, return_gist_logits=True)
    assert not first.logits.requires_grad
    with torch.inference_mode():
        second = model(x, return_gist_logits=True)
    assert all(torch.equal(first[k], second[k]) for k in first)
    model.train()
    assert not torch.equal(model(x).gist_logits, model(x).gist_logits)  # dropout on the token and on x U


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_24_the_logits_are_the_models_own_but_for_the_token(config) -> None:
    """Where no query attends to the token, nothing changes: it touches the rest through attention alone."""
    base = vit().double().eval()
    model = add_gist(get_peft_model(copy.deepcopy(base), config), GistConfig(dropout=0.0)).eval()

    class Shut(torch.nn.Module):
        def forward(
            self, k
        ):  # keys (B, heads, N, d) of the gist model: the token's gets -1e9 on a channel queries have 1 on
            k = k.clone()
            k[..., -1] = 0.0
            if k.shape[2] == 6:
                k[:, :, 1, -1] = -1e9
            return k

    class One(torch.nn.Module):
        def forward(self, q):
            q = q.clone()
            q[..., -1] = 1.0
            return q

    for block in (*base.blocks, *model.model.blocks):
        block.attn.q_norm, block.attn.k_norm = One(), Shut()
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x).logits, base(x), rtol=1e-10, atol=1e-12)
