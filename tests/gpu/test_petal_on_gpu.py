"""A Q-Former with PETAL on a GPU: numbers, no waiting for the host, CUDA graphs. Needs a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from petal_by_hand import by_hand
from qformers import QUERIES, make, quiet, stir

from fastgist import petal
from fastgist.nn import update_thresholds
from fastgist.testing import assert_within_budget

pytestmark = pytest.mark.gpu

BATCH, WORDS, TOKENS = 4, 6, 40
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "image": 96}
CONFIG = {"rank": 16, "expert_dim": 8, "num_experts": 3}


@pytest.fixture(autouse=True)
def _quiet_device():
    yield
    torch.cuda.set_sync_debug_mode("default")


def pair(dtype, **config):
    """(model with PETAL away from its start, the same without), on the GPU."""
    plain = quiet(make(**SIZES)).to("cuda", dtype)
    model = petal.wrap(copy.deepcopy(plain), petal.PetalConfig(**CONFIG | config), verbose=False)
    return quiet(stir(model, 0.1)), plain


def call(model, dtype):
    """Arguments of the Q-Former that need no mask, so that transformers asks nothing of the host."""
    g = torch.Generator("cuda").manual_seed(3)
    image = torch.randn(BATCH, TOKENS, SIZES["image"], generator=g, device="cuda").to(dtype)
    queries = torch.randn(BATCH, QUERIES, SIZES["hidden_size"], generator=g, device="cuda").to(dtype)
    ids = torch.randint(3, 50, (BATCH, WORDS), generator=g, device="cuda")
    return {"input_ids": ids, "query_embeds": queries, "encoder_hidden_states": image}


def run(model, dtype, weights):
    out = model.qformer(**call(model, dtype)).last_hidden_state
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((out.double() * weights).sum(), list(parameters.values()))
    return out.detach(), dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("core", ["cp", "tucker"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_every_matrix_by_itself(dtype, core):
    """Within the error budget of the same written out in plain torch, in the same dtype."""
    model, plain = pair(dtype, core=core, dropout=0.0)
    mask = torch.ones(BATCH, WORDS, device="cuda")
    weights = torch.randn(BATCH, QUERIES + WORDS, SIZES["hidden_size"], device="cuda", dtype=torch.float64)
    exact = by_hand(copy.deepcopy(model).double(), copy.deepcopy(plain).double(), mask)
    same = by_hand(copy.deepcopy(model).to(dtype), plain, mask)
    found = model.qformer(**call(model, dtype)).last_hidden_state
    peer, truth = (m.qformer(**call(m, d)).last_hidden_state for m, d in ((same, dtype), (exact, torch.float64)))
    assert_within_budget(found.detach(), peer.detach(), truth.detach())
    grads = torch.autograd.grad((found.double() * weights).sum(), [p for p in model.parameters() if p.requires_grad])
    assert all(g.isfinite().all() and g.any() for g in grads)


@pytest.mark.parametrize("threshold", [None, {"policy": "trust", "dynamic": True}])
def test_a_step_waits_for_nothing(threshold):
    model, _ = pair(torch.bfloat16, dropout=0.1, threshold=threshold)
    model.train()
    given = call(model, torch.bfloat16)
    for synchronised in ("default", "error"):  # the first compiles
        torch.cuda.set_sync_debug_mode(synchronised)
        loss = model.qformer(**given).last_hidden_state.float().square().sum()
        (loss + petal.experts_of(model).load_balance_loss()).backward()
        update_thresholds(model)


def test_a_captured_step_is_the_eager_one():
    model, _ = pair(torch.bfloat16, dropout=0.0)
    weights = torch.randn(BATCH, QUERIES + WORDS, SIZES["hidden_size"], device="cuda", dtype=torch.float64)
    want, want_grads = run(model, torch.bfloat16, weights)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    given = call(model, torch.bfloat16)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        out = model.qformer(**given).last_hidden_state
        return out, torch.autograd.grad((out.double() * weights).sum(), parameters)

    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = step()
    graph.replay()
    assert torch.equal(out, want)
    assert all(torch.equal(g, w) for g, w in zip(grads, want_grads.values(), strict=True))
