"""Every method on every backbone of timm that carries a gist token: autocast, checkpointing, files, and compiled steps."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from pairs import PAIRS, TIMM_BACKBONES, attempt, both, example
from vits import gradients, stir, trainable

import fastgist
from fastgist.nn import GistLoss

TARGET = torch.tensor([0, 3])


@pytest.mark.parametrize(("backbone", "method"), PAIRS)
def test_24_autocast_checkpointing_and_files(backbone, method, tmp_path) -> None:
    base = TIMM_BACKBONES[backbone]().eval()
    model = stir(attempt(lambda: copy.deepcopy(base), method)).train()
    x = example(model)
    output = model(x)
    GistLoss()(output, TARGET).backward()
    want = gradients(model)
    assert want.keys() == trainable(model)

    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
        GistLoss()(half, TARGET).backward()
    assert (both(half).float() - both(output)).abs().max() <= 0.1 * both(output).abs().max()
    got = gradients(model)
    assert got.keys() == want.keys()
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in got.values())
    assert {n for n, g in got.items() if not g.any()} <= {n for n, g in want.items() if not g.any()}

    fastgist.save_adapter(model, tmp_path)
    loaded = fastgist.load_adapter(copy.deepcopy(base), tmp_path)
    assert trainable(loaded) == trainable(model)
    model.eval(), loaded.eval()
    with torch.no_grad():  # attention takes another path on a CPU where a position bias is trained
        assert torch.equal(both(loaded(x, return_gist_logits=True)), both(model(x, return_gist_logits=True)))

    model.train().zero_grad()
    model.set_grad_checkpointing()
    calls: list[int] = []
    (*_, last) = (m for m in model.modules() if hasattr(m, "mlp"))
    last.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    GistLoss()(model(x), TARGET).backward()
    assert len(calls) == 2, "the last block was not run again in the backward"
    again = gradients(model)
    assert again.keys() == want.keys()
    for name, g in want.items():
        torch.testing.assert_close(again[name], g)


#: Other kinds of methods than LoRA, which test_backbones_timm.py compiles on every backbone; one block, as each is alike.
COMPILED = [("ViT", "adapter, shared"), ("ViT", "FacT-TK"), ("ViT", "VPT, deep"), ("EVA-02", "prefix")]


@pytest.mark.parametrize(("backbone", "method"), COMPILED)
def test_24_a_compiled_step_has_the_same_gradients(backbone, method) -> None:
    model = stir(attempt(functools.partial(TIMM_BACKBONES[backbone], depth=1), method)).train()
    x, ours = example(model), [p for p in model.parameters() if p.requires_grad]

    def step(run) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        output = run(x)
        return both(output).detach(), torch.autograd.grad(GistLoss()(output, TARGET), ours)

    want = step(model)
    torch._dynamo.reset()
    torch.testing.assert_close(step(torch.compile(model, fullgraph=True, backend="eager")), want)
