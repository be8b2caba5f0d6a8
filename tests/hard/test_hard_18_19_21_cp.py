"""Hard cases 18 (sizes), 19 (float16's range), 20 (V = 0) and 21 (dropout) for cp_linear, cp_update and adapter, beside those
in their own files: every rank at widths that no vector divides, dL/dh beyond 65504, several weights."""

from __future__ import annotations

import itertools

import adapters
import pytest
import test_cp_linear as linear
import test_cp_pieces as pieces
import torch
import torch.nn.functional as F
import updates as update
from every_op import VARIANTS, variants
from torch.utils.checkpoint import checkpoint

from fastgist.functional import adapter, cp_linear
from fastgist.testing import assert_within_budget, poisoned_allocations

OP = "cp_linear"
pytestmark = pytest.mark.kernel
RANKS = [1, 3, 17, 64, 256]


# -- 18 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rank", RANKS)
def test_18_ranks_of_cp_linear_at_widths_that_no_vector_divides(impl, device, rank, dtype):
    inputs = linear.case(21, 37, 13, rank, 3, dtype, device)
    options = {"scale": 0.7, "dropout_p": 0.3, "training": True, "seed": torch.tensor([5], device=device)}
    with poisoned_allocations():
        linear.check(inputs, torch.randn(21, 39, device=device), impl, None, None, True, **options)


@pytest.mark.op("cp_update")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rank", RANKS)
def test_18_ranks_of_cp_update_at_widths_that_no_vector_divides(impl, device, rank, dtype):
    inputs = update.case(21, 37, 13, rank, 3, dtype, device)
    options = {"scale": 0.7, "dropout_p": 0.3, "training": True, "seed": torch.tensor([5], device=device)}
    with poisoned_allocations():
        update.check(inputs, torch.randn(21, 39, device=device), impl, **options)


@pytest.mark.op("adapter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("hidden", [1, 4, 8, 65])
def test_18_bottlenecks_of_adapter_at_widths_that_no_vector_divides(impl, device, hidden, dtype):
    inputs = adapters.case(21, 37, hidden, out=29, residual=True, dtype=dtype, device=device)
    with poisoned_allocations():
        adapters.check(inputs, torch.randn(21, 29, device=device), impl, scale=0.7)


@pytest.mark.op("adapter")
def test_18_a_bottleneck_of_none(impl, device):
    x, down, down_bias, up, up_bias, *_ = adapters.case(device=device).values()
    with pytest.raises(ValueError, match=r"adapter: down_weight must be 2-D with no empty side, got shape \(0, 40\)"):
        adapter(x, down[:0], down_bias[:0], up[:, :0], up_bias, impl=impl)
    with pytest.raises(ValueError, match=r"adapter: up_weight must be 2-D with no empty side, got shape \(40, 0\)"):
        adapter(x, down, down_bias, up[:, :0], up_bias, impl=impl)


# -- 19 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("weights", [1, 2])
def test_19_the_gradient_of_h_beyond_float16(impl, device, weights, gain):
    """dL/dh is 960,000 (V times the gain 120,000, with one), where dL/dx and dL/dU fit."""

    def full(*shape, value):
        return torch.full(shape, value, device=device, dtype=torch.float16)

    v, g = full(8, 2, value=6e4), full(1, 2, value=2.0) if gain else None
    leaves = [full(4, 64, value=1e-3).requires_grad_(), full(64, 2, value=1e-3).requires_grad_()]
    base = full(8, 64, value=0.0)
    given = base if weights == 1 else [base[:4], base[4:]]
    y = cp_linear(leaves[0], given, None, leaves[1], v, g, scale=0.5, impl=impl)
    y = y if weights == 1 else torch.cat(y, -1)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    double = [t.detach().double().requires_grad_() for t in leaves]
    exact = linear.formula(
        double[0], base.double(), None, double[1], v.double(), None if g is None else g.double(), scale=0.5
    )
    wanted = torch.autograd.grad(exact, double, torch.ones_like(exact))
    for name, mine, want in zip(("x", "u"), grads, wanted, strict=True):
        assert bool(mine.isfinite().all())
        assert_within_budget(mine, want.half(), want, what=f"gradient of {name}")


# -- 20 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_h", [False, True])
def test_20_without_an_update_the_base_layer_bit_for_bit(impl, device, need_h):
    """Few rows, to which an update is added, and many, whose update is added to the weight first."""
    if impl == "triton":
        pytest.skip("a fused kernel's sums are not the library's: the budget holds, as other tests say")
    for dtype, rows in itertools.product((torch.float32, torch.float64, torch.bfloat16), (1, 19, 90, 300)):
        x, weight, bias, u, v, gain = linear.case(rows, 40, 32, 5, 2, dtype, device)
        v = torch.zeros_like(v).requires_grad_(need_h)
        options = {"scale": 0.7, "dropout_p": 0.3, "impl": impl}
        for training in (False, True):
            y = cp_linear(x, weight, bias, u, v, gain, training=training, **options)
            assert torch.equal(y, F.linear(x, weight, bias))
        ys = cp_linear(x, weight.split(32), bias.split(32), u, v, gain, **options)
        for y, w, b in zip(ys, weight.split(32), bias.split(32), strict=True):
            assert torch.equal(y, F.linear(x, w, b))


# -- 21 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("op", "by", "variant"), VARIANTS)
def test_21_checkpointing_sees_the_same_mask(op, by, variant, reentrant):
    """With a seed that the operation draws, of dropout beside all else that it takes."""
    call = variants(op)[variant]
    call.tensors["seed"] = None
    values = call.values()

    def block(x):
        return call(*[x if name == "x" else t for name, t in zip(call.tensors, values, strict=True)], impl=by)

    leaves = call.wanted(values)
    x = dict(zip(call.tensors, values, strict=True))["x"]
    torch.manual_seed(3)
    want = torch.autograd.grad(block(x).square().sum(), leaves)
    torch.manual_seed(3)
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, w) for leaf, w in zip(leaves, want, strict=True))
    torch.manual_seed(4)
    others = torch.autograd.grad(block(x).square().sum(), leaves)
    assert not all(torch.equal(a, b) for a, b in zip(others, want, strict=True)), "a mask of another seed"


def test_21_several_weights_share_one_mask(impl, device):
    """Each weight's result is what it is alone under that seed, and there is no other mask in the backward."""
    x, weights, biases, u, v, gain = pieces.case(33)
    options = {"dropout_p": 0.4, "training": True, "seed": torch.tensor([6], device=device), "impl": impl}
    together = cp_linear(x, weights, biases, u, v, gain, **options)
    fold = 0
    for y, weight, bias in zip(together, weights, biases, strict=True):
        own = gain[fold : fold + weight.shape[0] // 24]
        fold += len(own)
        alone = cp_linear(x, weight, bias, u, v, own, **options)
        wide = [t.double() for t in (x, weight, bias, u, v, own)]
        exact = linear.formula(*wide, **{k: t for k, t in options.items() if k != "impl"})
        assert_within_budget(y, alone, exact)
