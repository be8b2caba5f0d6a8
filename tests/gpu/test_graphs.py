"""CUDA graphs: a replay equals eager bit for bit, a captured dropout draws a fresh mask at each; whole training steps, the
optimiser's included. Needs a GPU, but for the one that takes the same steps on a CPU."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from every_op import make
from torch import Tensor, nn

import fastgist as fg
from fastgist.backends import OPS

on_gpu = pytest.mark.gpu


def _capture(step):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    return graph, held


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", OPS)
def test_replay_equals_eager(op, dtype):
    call = make(op, dtype, device="cuda", rows=64)
    values = call.values()
    leaves = call.wanted(values)

    def step():
        out = call(*values, impl="triton")
        return out, torch.autograd.grad(out, leaves, torch.ones_like(out))

    graph, (out, grads) = _capture(step)
    for scale in (1.0, 0.5, -2.0):
        with torch.no_grad():
            leaves[0].mul_(scale)
        graph.replay()
        torch.cuda.synchronize()
        got = [t.clone() for t in (out, *grads)]
        want_out, want_grads = step()
        for mine, w in zip(got, (want_out, *want_grads), strict=True):
            assert torch.equal(mine, w)


def _four(run: Callable[[], Tensor]) -> list[Tensor]:
    return [run().clone() for _ in range(4)]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu), "cpu"])
@pytest.mark.parametrize("op", ["cp_linear", "cp_update", "adapter"])
def test_dropout_in_a_graph_draws_anew_at_each_replay(op, device):
    """On a CPU: at each call."""
    call = make(op, device=device, rows=64)
    values = call.values(grad=False)

    def step() -> Tensor:
        return call(*values, dropout_p=0.5, training=True, impl="triton" if device == "cuda" else "auto")

    found = _four(_replayed(step) if device == "cuda" else step)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(found))


def _replayed(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    graph, out = _capture(step)

    def run() -> Tensor:
        graph.replay()
        return out

    return run


@on_gpu
@pytest.mark.parametrize("op", OPS)
def test_compiled_with_graphs(op):
    call = make(op, torch.bfloat16, device="cuda", rows=64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *v: call(*v), fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        got = call.run(compiled)
    want = call.run()
    torch.testing.assert_close(got[0], want[0])


# -- whole training steps ----------------------------------------------------------------------------------------------


@dataclass
class _Step:
    """Forward, loss, backward and AdamW; ``values``: what is trained."""

    values: list[nn.Parameter]
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _step(model: nn.Module, loss: Callable[[], Tensor], device: str) -> _Step:
    values = [p for p in model.parameters() if p.requires_grad]
    on_device = device == "cuda"
    return _Step(values, loss, torch.optim.AdamW(values, lr=1e-2, fused=on_device, capturable=on_device))


def _vit(device: str, dtype: torch.dtype, dropout: float = 0.0) -> _Step:
    """A ViT with CP on every qkv, adapters beside both branches and a gist token, by the gist loss. With ``dropout`` in all of
    them, the adapters behind a norm."""
    pytest.importorskip("timm")
    from vits import images, vit

    model = vit(depth=3, embed_dim=64)
    factors = fg.nn.CPFactors(64, 64, 8, 9, dropout=dropout)
    model.to(device, dtype)
    fg.get_peft_model(model, fg.AdapterConfig(4, placement="shared", norm=dropout > 0, dropout=dropout))
    for i, block in enumerate(model.blocks):
        attention = block.base_layer.attn
        attention.qkv = fg.nn.CPLinear(attention.qkv, factors.to(device), (3 * i, 3 * i + 1, 3 * i + 2))
    model = fg.add_gist(model, fg.GistConfig(dropout=dropout)).to(device).train()
    loss, x, target = fg.nn.GistLoss(), images(4).to(device, dtype), torch.tensor([0, 1, 2, 0], device=device)
    step = _step(model, lambda: loss(model(x), target), device)
    assert len(step.values) >= 4 + 3 * 4 + 1, "factors, adapters, the token and the head"
    return step


def _qformer(device: str, dtype: torch.dtype, dropout: float = 0.0) -> _Step:
    """A Q-Former of two layers with PETAL: updates of q, k and v of both attentions, and experts."""
    pytest.importorskip("transformers")
    from qformers import QUERIES, make, quiet

    from fastgist import petal

    model = quiet(make(layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=128, image=96))
    model = model.to(device, dtype)
    quiet(
        petal.wrap(model, petal.PetalConfig(rank=16, expert_dim=8, num_experts=3, dropout=dropout), verbose=False)
    ).train()
    given = {
        "input_ids": torch.randint(3, 50, (4, 6), device=device),
        "query_embeds": torch.randn(4, QUERIES, 64, device=device).to(dtype),
        "encoder_hidden_states": torch.randn(4, 40, 96, device=device).to(dtype),
    }
    target = torch.randn(4, QUERIES + 6, 64, device=device)
    return _step(model, lambda: (model.qformer(**given).last_hidden_state - target).float().square().mean(), device)


STEPS = {"ViT": _vit, "Q-Former": _qformer}


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of", STEPS)
def test_a_captured_training_step_trains_as_an_eager_one(of, dtype):
    """Losses of five steps and what they trained, bit for bit: the second of the two is captured after it was warmed up, its
    parameters and its optimiser's moments put back, and replayed."""
    losses, values = [], []
    for captured in (False, True):
        torch.manual_seed(0)
        step = STEPS[of]("cuda", dtype)
        torch.manual_seed(1)
        if captured:
            start = [p.detach().clone() for p in step.values]
            replay, held = _capture(step)
            with torch.no_grad():
                for p, was in zip(step.values, start, strict=True):
                    p.copy_(was)
                for state in step.optimizer.state.values():
                    for t in state.values():
                        t.zero_()
        found = []
        for _ in range(5):
            if captured:
                replay.replay()
            else:
                held = step()
            found.append(held.clone())
        losses.append(torch.stack(found))
        values.append([p.detach().clone() for p in step.values])
    assert torch.equal(*losses)
    assert losses[0][-1] < losses[0][0]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


@pytest.mark.parametrize(
    ("device", "dtype"),
    [pytest.param("cuda", torch.bfloat16, marks=on_gpu), ("cpu", torch.float32)],
)
@pytest.mark.parametrize("of", STEPS)
def test_a_captured_step_with_dropout_draws_anew_and_by_the_seed(of, device, dtype):
    """Nothing moves at a rate of 0: what differs between two steps is what was dropped. On a CPU the step itself."""
    torch.manual_seed(0)
    step = STEPS[of](device, dtype, dropout=0.3)
    with torch.no_grad():
        for p in step.values:  # an update that is zero at the start drops nothing
            p.add_(torch.randn_like(p), alpha=0.1)
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    start = copy.deepcopy(step.values)
    run = _replayed(step) if device == "cuda" else step
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(_four(run))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(losses[0]))
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    assert all(torch.equal(p, was) for p, was in zip(step.values, start, strict=True))


@pytest.mark.parametrize("of", STEPS)
def test_the_steps_train(of):
    """On a CPU, in float32: every value that is trained moves, and the loss falls."""
    torch.manual_seed(0)
    step = STEPS[of]("cpu", torch.float32)
    start = copy.deepcopy(step.values)
    losses = [float(step()) for _ in range(5)]
    assert losses[-1] < losses[0]
    unmoved = [i for i, (p, was) in enumerate(zip(step.values, start, strict=True)) if torch.equal(p, was)]
    assert not unmoved
