"""cp_linear on every implementation against float64. Hard cases 1-4, 6, 7, 18, 19, 21 for this op are here, by number."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from losses import on_every_device
from torch.utils.checkpoint import checkpoint

from fastgist.functional import cp_linear
from fastgist.reference.cp_linear import cp_linear as formula
from fastgist.reference.cp_linear import delta_weight
from fastgist.reference.philox import keep_mask
from fastgist.testing import assert_within_budget, layouts, poisoned_allocations

OP = "cp_linear"
NAMES = ("x", "weight", "bias", "u", "v", "gain")


def case(rows=19, inner=40, out=32, rank=5, folds=2, dtype=torch.float32, device="cpu"):
    """x, weight, bias, u, v, gain: an update of the size of the base layer, so that its errors count."""

    def randn(*shape, spread=1.0):
        return (torch.randn(*shape, device=device) * spread).to(dtype)

    return (
        randn(rows, inner),
        randn(out * folds, inner, spread=inner**-0.5),
        randn(out * folds),
        randn(inner, rank, spread=inner**-0.5),
        randn(out, rank, spread=rank**-0.5),
        randn(folds, rank),
    )


def plain(x, weight, bias, u, v, gain=None, *, scale=1.0, dropout_p=0.0, training=False, seed=None):
    """The expression in the inputs' own dtype, as anyone would write it."""
    h = x @ u
    if training and dropout_p:
        h = h * keep_mask(seed, tuple(h.shape), dropout_p) / (1 - dropout_p)
    folds = weight.shape[0] // v.shape[0]
    gain = torch.ones(1, v.shape[1], dtype=x.dtype, device=x.device) if gain is None else gain.reshape(-1, v.shape[1])
    update = torch.cat([(h * g) @ v.T for g in gain.expand(folds, -1)], dim=-1)
    return F.linear(x, weight, bias) + scale * update


def evaluate(function, inputs, wanted, grad, **options):
    leaves = [None if t is None else t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    y = function(*leaves, **options)
    if any(wanted):
        y.backward(grad.to(y.dtype))
    return y.detach(), [None if t is None else t.grad for t in leaves]


def check(inputs, grad, impl, wanted=None, ours=None, by_terms=False, **options):
    """``by_terms``: the floor's scale is the absolute sum of what is summed, for sums whose order is another than BLAS's."""
    wanted = [t is not None for t in inputs] if wanted is None else wanted
    y, grads = evaluate(cp_linear, inputs if ours is None else ours, wanted, grad, impl=impl, **options)
    peers = on_every_device(lambda i, g, o: evaluate(plain, i, wanted, g, **o), list(inputs), grad, options)
    plain_y, plain_grads = [y for y, _ in peers], list(zip(*(grads for _, grads in peers), strict=True))
    double = [None if t is None else t.double() for t in inputs]
    exact_y, exact_grads = evaluate(formula, double, wanted, grad, **options)
    # The oracle itself, held against the expression as anyone would write it: a wrong one would widen the budget.
    torch.testing.assert_close(
        evaluate(plain, double, wanted, grad, **options), (exact_y, exact_grads), rtol=1e-9, atol=1e-9
    )
    assert_within_budget(y, plain_y, exact_y, what="y")
    sizes = [None if t is None else t.abs() for t in double]
    _, terms = evaluate(formula, sizes, wanted, grad.abs(), **options) if by_terms else (None, exact_grads)
    for name, w, g, p, e, t in zip(NAMES, wanted, grads, plain_grads, exact_grads, terms, strict=True):
        assert (g is not None) == w, name
        if w:
            assert_within_budget(g, p, e, what=f"gradient of {name}", scale=float(t.max()) if by_terms else None)
    return y, grads


# -- the formula -----------------------------------------------------------------------------------------------------


def test_formula_is_the_dense_update_and_gradcheck():
    x, weight, bias, u, v, gain = (t.double() for t in case())
    dense = delta_weight(u, v, gain, 0.7, 2)
    torch.testing.assert_close(formula(x, weight, bias, u, v, gain, scale=0.7), F.linear(x, weight + dense, bias))
    inputs = [t.double().requires_grad_() for t in case(3, 4, 2, 2)]
    seed = torch.tensor([3])
    for function in (formula, lambda *a, **k: cp_linear(*a, impl="reference", **k)):
        options = {"scale": 0.7, "dropout_p": 0.3, "training": True, "seed": seed}
        assert torch.autograd.gradcheck(lambda *a, f=function, o=options: f(*a, **o), inputs)


# -- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inner", "out", "folds"),
    [(1, 8, 8, 1), (33, 40, 24, 3), (64, 64, 64, 1), (70, 130, 37, 2), (96, 24, 20, 2)],
)
def test_matches_float64(impl, device, dtype, rows, inner, out, folds):
    inputs = case(rows, inner, out, 16, folds, dtype, device)
    check(inputs, torch.randn(rows, out * folds, device=device), impl, scale=1.5)


@pytest.mark.parametrize("rank", [1, 3, 17, 64, 256])
def test_hard_18_ranks(impl, device, rank):
    inputs = case(21, 48, 20, rank, 2, device=device)
    # A gain of two numbers is a sum of 420 terms each: BLAS's own error there is a matter of luck.
    check(inputs, torch.randn(21, 40, device=device), impl, by_terms=rank == 1)


@pytest.mark.parametrize("rank", [5, 70])
def test_dropout_over_several_blocks_of_ranks(impl, device, rank):
    inputs = case(21, 48, 20, rank, 2, device=device)
    seed = torch.tensor([11], device=device)
    options = {"dropout_p": 0.4, "training": True, "seed": seed, "scale": 0.7}
    check(inputs, torch.randn(21, 40, device=device), impl, **options)


def test_a_small_update_is_not_rounded_away_in_half_precision(impl, device):
    """Weights of +-1 that cancel, and an update of 2^-10 that does not: added to a bfloat16 weight it would be lost."""
    inner = 64
    x = torch.ones(4 * inner, inner, dtype=torch.bfloat16, device=device)
    weight = x.new_ones(8, inner)
    weight[:, ::2] = -1
    u, v = x.new_ones(inner, 1), x.new_full((8, 1), 2.0**-10)
    y = cp_linear(x, weight, None, u, v, impl=impl)
    torch.testing.assert_close(y, torch.full_like(y, inner * 2.0**-10))
    weight = weight.t().contiguous().requires_grad_(False)  # and in the gradient of x
    x = x.new_zeros(4 * inner, 8, requires_grad=True)
    u, v = x.new_full((8, 1), 2.0**-10), x.new_ones(inner, 1)
    (grad,) = torch.autograd.grad(cp_linear(x, weight, None, u, v, impl=impl).sum(), x)
    torch.testing.assert_close(grad, torch.full_like(grad, inner * 2.0**-10))


@pytest.mark.parametrize("gain", ["none", "shared", "folds"])
@pytest.mark.parametrize("bias", [False, True])
def test_gain_forms_bias_and_leading_dimensions(impl, device, gain, bias):
    x, weight, b, u, v, g = case(device=device)
    g = {"none": None, "shared": g[0], "folds": g}[gain]
    grad = torch.randn(19, 64, device=device)
    y, _ = check((x, weight, b if bias else None, u, v, g), grad, impl, scale=-0.5)
    shaped = cp_linear(x[:18].view(2, 3, 3, 40), weight, b if bias else None, u, v, g, scale=-0.5, impl=impl)
    assert shaped.shape == (2, 3, 3, 64)
    torch.testing.assert_close(shaped.reshape(18, 64), y[:18])


def test_fresh_factors_leave_the_base_layer_alone(impl, device):
    x, weight, bias, u, v, gain = case(device=device)
    y = cp_linear(x, weight, bias, u, torch.zeros_like(v), gain, impl=impl)
    base = F.linear(x, weight, bias)
    assert_within_budget(y, base, F.linear(x.double(), weight.double(), bias.double()))
    if impl != "triton":
        assert torch.equal(y, base)


def test_merged_weights_give_the_same_output(impl, device):
    x, weight, bias, u, v, gain = case(device=device)
    y = cp_linear(x, weight, bias, u, v, gain, scale=0.3, impl=impl)
    merged = F.linear(x, weight + delta_weight(u, v, gain, 0.3, 2), bias)
    exact = formula(*(t.double() for t in (x, weight, bias, u, v, gain)), scale=0.3)
    assert_within_budget(y, merged, exact)


# -- hard cases ------------------------------------------------------------------------------------------------------


def test_hard_01_zero_rows(impl, device):
    inputs = case(rows=0, device=device)
    y, grads = evaluate(cp_linear, inputs, [True] * 6, torch.zeros(0, 64, device=device), impl=impl)
    assert y.shape == (0, 64)
    for t, g in zip(inputs, grads, strict=True):
        assert g.shape == t.shape and bool((g == 0).all())


def test_hard_02_03_bad_arguments(impl, device):
    x, weight, bias, u, v, gain = case(device=device)
    with pytest.raises(ValueError, match=r"cp_linear: expected x\.shape\[-1\] == 40 \(weight is 64 x 40\), got 39"):
        cp_linear(x[:, :39], weight, bias, u, v, gain, impl=impl)
    with pytest.raises(ValueError, match=r"expected v\.shape\[1\] == 5 .*got 4"):
        cp_linear(x, weight, bias, u, v[:, :4], gain, impl=impl)
    with pytest.raises(ValueError, match=r"multiple of v\.shape\[0\].*64 rows of weight and 31 rows of v"):
        cp_linear(x, weight, bias, u, v[:31], gain, impl=impl)
    with pytest.raises(ValueError, match=r"gain\.shape == \(5,\) or \(2, 5\).*got \(3, 5\)"):
        cp_linear(x, weight, bias, u, v, gain[[0, 1, 1]], impl=impl)
    with pytest.raises(ValueError, match="expected 0 <= dropout_p < 1, got 1"):
        cp_linear(x, weight, bias, u, v, gain, dropout_p=1.0, training=True, impl=impl)
    with pytest.raises(ValueError, match="rank of at least 1"):
        cp_linear(x, weight, bias, u[:, :0], v[:, :0], None, impl=impl)
    with pytest.raises(ValueError, match=r"at least 1 input feature, got weight of shape \(64, 0\)"):
        cp_linear(x[:, :0], weight[:, :0], bias, u[:0], v, gain, impl=impl)
    with pytest.raises(TypeError, match="x is float32 and u is float16"):
        cp_linear(x, weight, bias, u.half(), v, gain, impl=impl)
    with pytest.raises(TypeError, match="seed must be an int64 Tensor"):
        cp_linear(x, weight, bias, u, v, gain, dropout_p=0.1, training=True, seed=3, impl=impl)


@pytest.mark.parametrize("which", [0, 1, 3, 4])
def test_hard_04_layouts(impl, device, which):
    inputs = case(device=device)
    grad = torch.randn(19, 64, device=device)
    for name, laid in layouts(inputs[which]):
        moved = [*inputs[:which], laid, *inputs[which + 1 :]]
        if name == "contiguous":
            continue
        check(inputs, grad, impl, ours=moved)


def test_hard_04_layouts_of_the_incoming_gradient(impl, device):
    inputs = case(device=device)
    grad = torch.randn(19, 64, device=device)
    for _, laid in layouts(grad):
        check(inputs, laid, impl)
    check(inputs, torch.randn(1, 1, device=device).expand(19, 64), impl)  # what y.sum().backward() sends
    check([t if i else t[:1].expand(19, 40) for i, t in enumerate(inputs)], grad, impl)


def test_hard_06_bad_rows_stay_alone_and_inputs_untouched(impl, device):
    inputs = case(device=device)
    inputs[0][4, 3] = torch.nan
    before = [t.clone() for t in inputs]
    with poisoned_allocations():
        y, _ = evaluate(cp_linear, inputs, [True] * 6, torch.ones(19, 64, device=device), impl=impl)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(inputs, before, strict=True))
    rest = torch.arange(19, device=device) != 4
    assert bool(y[4].isnan().all()) and bool(y[rest].isfinite().all())


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=6)))
def test_hard_07_gradient_subsets(impl, device, wanted):
    inputs = case(9, 24, 16, 3, 2, device=device)
    options = {"scale": 0.5, "dropout_p": 0.25, "training": True, "seed": torch.tensor([11], device=device)}
    with poisoned_allocations():
        check(inputs, torch.randn(9, 32, device=device), impl, wanted, **options)


def test_hard_07_second_backward_and_double_backward(impl, device):
    x, weight, bias, u, v, gain = case(device=device)
    u.requires_grad_()
    loss = cp_linear(x, weight, bias, u, v, gain, impl=impl).square().sum()
    (first,) = torch.autograd.grad(loss, u, retain_graph=True)
    (again,) = torch.autograd.grad(loss, u, retain_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="cp_linear: no second derivative"):
        torch.autograd.grad(loss, u, create_graph=True)


def test_hard_19_large_hidden_units_in_float16(impl, device):
    """x U above 65504 where the output fits: finite and right."""
    x = torch.full((4, 64), 60.0, device=device, dtype=torch.float16)
    u = torch.full((64, 2), 30.0, device=device, dtype=torch.float16)  # x u = 115,200
    v = torch.full((8, 2), 1e-3, device=device, dtype=torch.float16)
    y = cp_linear(x, torch.zeros(8, 64, device=device, dtype=torch.float16), None, u, v, impl=impl)
    exact = formula(x.double(), torch.zeros(8, 64, device=device).double(), None, u.double(), v.double())
    assert bool(y.isfinite().all())
    assert_within_budget(y, exact.half(), exact)


def test_hard_21_dropout(impl, device):
    inputs = case(64, 40, 32, 16, 2, device=device)
    grad = torch.randn(64, 64, device=device)
    seed = torch.tensor([99], device=device)
    options = {"dropout_p": 0.3, "training": True, "seed": seed}
    y, _ = check(inputs, grad, impl, **options)
    assert torch.equal(y, cp_linear(*inputs, impl=impl, **options))
    assert not torch.equal(y, cp_linear(*inputs, impl=impl, **(options | {"seed": seed + 1})))
    evaluated = cp_linear(*inputs, dropout_p=0.3, training=False, impl=impl)
    assert torch.equal(evaluated, cp_linear(*inputs, impl=impl))
    torch.manual_seed(5)
    drawn = cp_linear(*inputs, dropout_p=0.3, training=True, impl=impl)
    assert not torch.equal(drawn, cp_linear(*inputs, dropout_p=0.3, training=True, impl=impl))
    torch.manual_seed(5)
    assert torch.equal(drawn, cp_linear(*inputs, dropout_p=0.3, training=True, impl=impl))


@pytest.mark.parametrize("reentrant", [False, True])
def test_hard_21_checkpointing_sees_the_same_mask(impl, device, reentrant):
    x, weight, bias, u, v, gain = case(device=device)
    x.requires_grad_(), u.requires_grad_()

    def block(t):
        return cp_linear(t, weight, bias, u, v, gain, dropout_p=0.5, training=True, impl=impl)

    torch.manual_seed(3)
    want = torch.autograd.grad(block(x).square().sum(), (x, u))
    torch.manual_seed(3)
    x.grad = u.grad = None
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, want[0]) and torch.equal(u.grad, want[1])


def test_autocast_casts_as_nn_linear(impl, device):
    inputs = case(device=device)
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = cp_linear(*leaves, impl=impl)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, cp_linear(*(t.bfloat16() for t in inputs), impl=impl))
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


def test_frozen_weight_keeps_nothing_for_its_gradient(impl, device):
    x, weight, bias, u, v, gain = case(device=device)
    x.requires_grad_()
    y = cp_linear(x, weight, bias, u, v, gain, impl=impl)
    saved = (
        [t for t in y.grad_fn.next_functions[0][0].saved_tensors if t is not None] if y.grad_fn.next_functions else []
    )
    assert all(t.shape != x.shape for t in saved), "x is needed only for the gradients of u and weight"


def test_runs_are_bitwise_equal(impl, device):
    inputs = case(70, 130, 37, 9, 2, device=device)
    grad = torch.randn(70, 74, device=device)
    first = evaluate(cp_linear, inputs, [True] * 6, grad, impl=impl)
    again = evaluate(cp_linear, inputs, [True] * 6, grad, impl=impl)
    assert torch.equal(first[0], again[0]) and all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
