"""adapter with a few hidden units in CUDA C++, on a card: against float64, by itself and beside Triton."""

from __future__ import annotations

import pytest
import torch
from test_adapter import NAMES, case, check

from fastgist import backends
from fastgist.functional import adapter

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _built():
    try:
        backends.resolve("adapter", "cuda", torch.empty(1, dtype=torch.bfloat16, device="cuda"))
    except RuntimeError as e:
        pytest.skip(str(e))


def _inputs(rows, width, hidden, dtype, **options):
    return case(rows, width, hidden, dtype=dtype, device="cuda", **options)


@pytest.mark.parametrize("hidden", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (37, 192), (1500, 768), (130, 1024)])
def test_matches_float64(rows, width, hidden, dtype):
    check(_inputs(rows, width, hidden, dtype), torch.randn(rows, width, device="cuda"), "cuda", scale=0.7)


@pytest.mark.parametrize("hidden", [1, 2])
def test_the_widest_rows(hidden):
    check(_inputs(50, 2048, hidden, torch.bfloat16), torch.randn(50, 2048, device="cuda"), "cuda")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "identity"])
@pytest.mark.parametrize("residual", ["x", "another", "none"])
def test_activations_and_residuals(activation, residual):
    inputs = _inputs(70, 136, 4, torch.bfloat16, residual=residual == "another")
    options = {"residual": False} if residual == "none" else {"residual_scale": 0.6}
    check(inputs, torch.randn(70, 136, device="cuda"), "cuda", activation=activation, scale=0.3, **options)


@pytest.mark.parametrize("left_out", ["down_bias", "up_bias"])
def test_without_a_bias(left_out):
    inputs = _inputs(70, 136, 4, torch.bfloat16) | {left_out: None}
    check(inputs, torch.randn(70, 136, device="cuda"), "cuda")


@pytest.mark.parametrize("wanted", [("x",), ("down_weight",), ("up_bias",), ("down_bias", "up_weight"), NAMES[:5]])
def test_subsets_of_gradients(wanted):
    inputs = _inputs(70, 136, 4, torch.bfloat16)
    check(inputs, torch.randn(70, 136, device="cuda"), "cuda", wanted={k: k in wanted for k in NAMES})


def test_strided_gradients_and_row_strides():
    inputs = _inputs(70, 136, 4, torch.bfloat16)
    wide = torch.full((70, 160), torch.nan, dtype=torch.bfloat16, device="cuda")
    wide[:, 8:144] = inputs["x"]
    check(inputs, torch.randn(136, 70, device="cuda").t(), "cuda", ours=inputs | {"x": wide[:, 8:144]})


def test_float32_weights_and_a_branch_beside_triton():
    inputs = _inputs(333, 768, 4, torch.bfloat16)
    branch = torch.randn(333, 768, device="cuda").bfloat16()
    grad = torch.randn(333, 768, device="cuda").bfloat16()
    found = []
    for impl in ("cuda", "triton"):
        leaves = [inputs[k].float() if k != "x" else inputs[k] for k in NAMES[:5]]
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = adapter(*leaves, residual=(leaves[0], branch), scale=0.1, impl=impl)
        y.backward(grad)
        found.append([y, *(t.grad for t in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))


def test_reruns_are_bitwise_equal_and_a_graph_replays():
    inputs = _inputs(5000, 768, 4, torch.bfloat16)
    leaves = [inputs[k].detach().requires_grad_() for k in NAMES[:5]]
    grad = torch.randn(5000, 768, device="cuda").bfloat16()

    def run():
        y = adapter(*leaves, impl="cuda")
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    first = run()
    for _ in range(200):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for t in captured:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


def test_auto_takes_it_and_what_it_does_not_serve_goes_on():
    x = torch.randn(9, 64, device="cuda").bfloat16()
    for hidden, served in ((4, True), (9, False)):
        inputs = _inputs(9, 64, hidden, torch.bfloat16)
        weights = [inputs[k] for k in NAMES[1:5]]
        auto = adapter(x, *weights)
        if served:
            assert torch.equal(auto, adapter(x, *weights, impl="cuda"))
        else:
            assert torch.equal(auto, adapter(x, *weights, impl="triton"))
            with pytest.raises(RuntimeError, match="up to 8 hidden units, got 9"):
                adapter(x, *weights, impl="cuda")
