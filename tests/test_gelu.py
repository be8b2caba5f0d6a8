"""gelu on every implementation against float64. Hard cases 1-4, 6, 7 for this op are here, by number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from losses import on_every_device

from fastgist.functional import gelu
from fastgist.reference.gelu import gelu as formula
from fastgist.testing import assert_within_budget, layouts, poisoned_allocations

OP = "gelu"
HALVES = [torch.bfloat16, torch.float16]


def evaluate(function, x, grad, **options):
    x = x.detach().requires_grad_()
    y = function(x, **options)
    (grad_x,) = torch.autograd.grad(y, x, grad.to(y.dtype))
    return y.detach(), grad_x


def check(x, grad, impl, ours=None):
    y, grad_x = evaluate(gelu, x if ours is None else ours, grad, impl=impl)
    peers = on_every_device(lambda i, g, o: evaluate(F.gelu, i["x"], g), {"x": x}, grad, {})
    exact_y, exact_grad = evaluate(formula, x.double(), grad)
    torch.testing.assert_close(evaluate(F.gelu, x.double(), grad), (exact_y, exact_grad), rtol=1e-12, atol=1e-12)
    assert y.dtype == grad_x.dtype == x.dtype
    assert_within_budget(y, [p for p, _ in peers], exact_y, what="y")
    assert_within_budget(grad_x, [p for _, p in peers], exact_grad, what="gradient")


def every(dtype, device):
    """All 65,536 numbers of a 16-bit dtype, infinities and NaNs among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)


def exact_parts(x):
    """Phi(x) and x phi(x) in float64, without the cancellation of 1 + erf."""
    wide = x.double()
    return 0.5 * torch.special.erfc(-wide * 0.5**0.5), wide * torch.exp(-0.5 * wide * wide) * (0.5 / torch.pi) ** 0.5


# -- the formula -----------------------------------------------------------------------------------------------------


def test_formula_gradcheck():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    for function in (formula, lambda x: gelu(x, impl="reference")):
        assert torch.autograd.gradcheck(function, x)


# -- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(1,), (7, 9), (33, 128), (3, 5, 1100)])
def test_matches_float64(impl, device, dtype, shape):
    x = (2 * torch.randn(shape, device=device)).to(dtype)
    check(x, torch.randn(shape, device=device).to(dtype), impl)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_half_precision(impl, device, dtype):
    x = every(dtype, device)
    x = x[~x.isinf() if impl == "triton" else ~(x.abs() > 1e38)]  # where torch's own overflows on a CPU
    y, grad_x = evaluate(gelu, x, torch.ones_like(x), impl=impl)
    cdf, density = exact_parts(x)
    want = x.double() * cdf
    plain = evaluate(F.gelu, x, torch.ones_like(x))
    assert_within_budget(y, plain[0], want, scale=1.0, what="y")
    assert_within_budget(grad_x, plain[1], cdf + density, what="gradient")
    if impl == "triton":  # torch's own error is an absolute one in the tail
        kind = torch.finfo(dtype)
        half_step = (kind.eps * 2.0 ** want.abs().log2().floor()).clamp(min=kind.smallest_normal * kind.eps) / 2
        beyond = (y.double() - want).abs() - half_step - 2.0**-17 * want.abs() - 2.0**-126
        assert float(beyond[want.isfinite()].max()) <= 0


@pytest.mark.parametrize("dtype", HALVES)
def test_the_kernels_error_before_it_rounds(impl, device, dtype):
    """2^-17 of the value, and for the slope of its terms, down to the smallest normal number: written as float32."""
    if impl != "triton":
        pytest.skip("the kernel's own")
    from fastgist_kernels import gelu as kernels

    x = every(dtype, device)
    x = x[x.isfinite()]
    cdf, density = exact_parts(x)
    y, slope = torch.empty(2, x.numel(), device=device)
    kernels.gelu_fwd(x, y)
    kernels.gelu_bwd(torch.ones_like(x), x, slope)
    value = x.double() * cdf
    for got, exact, terms in ((y, value, value.abs()), (slope, cdf + density, cdf + density.abs())):
        error = (got.double() - exact).abs()
        assert float((error - 2.0**-126).clamp(min=0).div(terms).nan_to_num(0).max()) < 2.0**-17
        assert float(error.div(terms).nan_to_num(0)[terms > 2.0**-100].max()) > 2.0**-22, (
            "too good to be the polynomial"
        )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_what_is_not_finite_is_as_in_torch(impl, device, dtype):
    """In float64: on a CPU, torch's float32 and bfloat16 give NaN at +inf."""
    large = torch.finfo(dtype).max
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -large, large], device=device).to(dtype)
    want = evaluate(F.gelu, x if impl == "reference" else x.double(), torch.ones_like(x))
    for got, exact in zip(evaluate(gelu, x, torch.ones_like(x), impl=impl), want, strict=True):
        torch.testing.assert_close(got.double(), exact.double(), rtol=0, atol=0, equal_nan=True)


# -- hard cases ------------------------------------------------------------------------------------------------------


def test_hard_01_empty_and_scalar(impl, device):
    for shape in ((0,), (3, 0, 4), ()):
        x = torch.ones(shape, device=device, requires_grad=True)
        y = gelu(x, impl=impl)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape


def test_hard_02_03_bad_arguments(impl, device):
    with pytest.raises(TypeError, match="gelu: x must be float32, float64, bfloat16 or float16, got int64"):
        gelu(torch.ones(3, dtype=torch.int64, device=device), impl=impl)
    with pytest.raises(TypeError, match="gelu: x must be a Tensor, got float"):
        gelu(1.0, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_04_layouts(impl, device, dtype):
    x, grad = (torch.randn(19, 44, device=device).to(dtype) for _ in range(2))
    for _, laid in layouts(x):
        check(x, grad, impl, ours=laid)
        assert gelu(laid, impl=impl).is_contiguous()
    for _, laid in layouts(grad):
        check(x, laid, impl)
    check(x, torch.randn(1, 1, device=device).to(dtype).expand(19, 44), impl)
    check(x[:1].expand(19, 44), grad, impl)
    check(x.flatten()[1:], grad.flatten()[1:], impl)  # 2 (4) bytes past a 16-byte line


def test_hard_06_poisoned_outputs_and_inputs_untouched(impl, device):
    for numel in (1, 4095, 4097, 9000):
        x, grad = torch.randn(2, numel, device=device).bfloat16()
        before = x.clone(), grad.clone()
        with poisoned_allocations():
            y, grad_x = evaluate(gelu, x, grad, impl=impl)
        assert bool(y.isfinite().all()) and bool(grad_x.isfinite().all())
        assert torch.equal(x, before[0]) and torch.equal(grad, before[1])


def test_hard_07_what_is_kept_and_second_backward(impl, device):
    kept = []
    x = torch.randn(5, 8, device=device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gelu(x, impl=impl)
        with torch.no_grad():
            gelu(x.requires_grad_(), impl=impl)
        assert kept == []
        loss = gelu(x, impl=impl)
        assert len(kept) == 1 and kept[0].data_ptr() == x.data_ptr()
        loss = loss.sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="gelu: no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_autocast_leaves_the_dtype(impl, device):
    """As it leaves F.gelu's: only the products before it are narrowed."""
    x = torch.randn(5, 8, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert gelu(x, impl=impl).dtype == F.gelu(x).dtype == torch.float32
        assert gelu(x.bfloat16(), impl=impl).dtype == torch.bfloat16


def test_runs_are_bitwise_equal(impl, device):
    x, grad = torch.randn(2, 70, 130, device=device).bfloat16()
    first, again = evaluate(gelu, x, grad, impl=impl), evaluate(gelu, x, grad, impl=impl)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
