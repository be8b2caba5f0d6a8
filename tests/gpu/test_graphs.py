"""CUDA graphs: a replay equals eager bit for bit, a captured dropout draws a fresh mask at each. Needs a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from every_op import make

from fastgist.backends import OPS

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("op", ["cp_linear", "adapter"])
def test_dropout_in_a_graph_draws_anew_at_each_replay(op):
    call = make(op, device="cuda", rows=64)
    values = call.values(grad=False)
    graph, out = _capture(lambda: call(*values, dropout_p=0.5, training=True, impl="triton"))
    replays = []
    for _ in range(4):
        graph.replay()
        replays.append(out.clone())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(replays))


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
