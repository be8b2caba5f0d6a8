"""cp_update on every implementation against float64. Hard cases 1-4, 6, 7, 18, 19, 21 for this op are here, by number."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import DEVICE
from torch.utils.checkpoint import checkpoint
from updates import NAMES, case, check, evaluate, in_place

from fastgist.functional import cp_linear, cp_update
from fastgist.reference.cp_update import cp_update as formula
from fastgist.testing import assert_within_budget, layouts, poisoned_allocations

OP = "cp_update"
HALVES = [torch.float16, torch.bfloat16]


# -- the formula -----------------------------------------------------------------------------------------------------


def test_formula_is_what_cp_linear_adds_and_gradcheck():
    y, x, u, v, gain = (t.double() for t in case())
    zero, bias = torch.zeros(64, 40).double(), torch.randn(64).double()
    options = {"scale": 0.7, "dropout_p": 0.3, "training": True, "seed": torch.tensor([3])}
    added = cp_linear(x, zero, None, u, v, gain, impl="reference", **options)
    torch.testing.assert_close(formula(y + bias, x, u, v, gain, **options), y + bias + added)
    inputs = [t.double().requires_grad_() for t in case(3, 4, 2, 2)]
    for function in (formula, lambda *a, **k: cp_update(*a, impl="reference", **k)):
        assert torch.autograd.gradcheck(lambda *a, f=function: f(*a, **options), inputs)
    assert torch.autograd.gradcheck(lambda *a: in_place(*a, impl="reference", **options), inputs)


# -- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [cp_update, in_place])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inner", "out", "folds"),
    [(1, 8, 8, 1), (5, 24, 40, 2), (33, 40, 24, 3), (64, 64, 64, 1), (70, 130, 37, 2), (96, 24, 20, 2)],
)
def test_matches_float64(impl, device, dtype, rows, inner, out, folds, function):
    inputs = case(rows, inner, out, 16, folds, dtype, device)
    check(inputs, torch.randn(rows, out * folds, device=device), impl, scale=1.5, function=function)


@pytest.mark.parametrize("rank", [1, 3, 17, 64, 256])
def test_hard_18_ranks(impl, device, rank):
    inputs = case(21, 48, 20, rank, 2, device=device)
    check(inputs, torch.randn(21, 40, device=device), impl)


@pytest.mark.parametrize("rank", [5, 70])
@pytest.mark.parametrize("dtype", HALVES)
def test_float32_factors_beside_half_precision(impl, device, dtype, rank):
    inputs = case(37, 72, 24, rank, 2, dtype, device, factors=torch.float32)
    options = {"scale": 0.7, "dropout_p": 0.3, "training": True, "seed": torch.tensor([5], device=device)}
    _, grads = check(inputs, torch.randn(37, 48, device=device), impl, **options)
    assert [g.dtype for g in grads] == [dtype, dtype, *[torch.float32] * 3]


@pytest.mark.parametrize("dtype", HALVES)
def test_plain_pytorch_does_not_round_float32_factors(dtype):
    """U and V of 1 + 2^-12, which no half-precision number holds, in rows that cancel but for that."""
    y = torch.zeros(6, 4, dtype=dtype)
    x = torch.tensor([[1.0, -1.0]], dtype=dtype).expand(6, 2)
    u, v = torch.tensor([[1.0 + 2.0**-12], [1.0]]), torch.full((4, 1), 1.0 + 2.0**-12)
    out = cp_update(y, x, u, v, impl="reference")
    assert torch.equal(out, torch.full_like(out, 2.0**-12))


@pytest.mark.parametrize("rank", [5, 70])
def test_dropout_over_several_blocks_of_ranks(impl, device, rank):
    inputs = case(21, 48, 20, rank, 2, device=device)
    options = {"dropout_p": 0.4, "training": True, "seed": torch.tensor([11], device=device), "scale": 0.7}
    check(inputs, torch.randn(21, 40, device=device), impl, **options)


def test_a_small_update_is_rounded_once_with_y(impl, device):
    """y of 256, whose bfloat16 neighbour is 2 away, and two updates of 1 that are one of 2 together."""
    y = torch.full((20, 8), 256.0, dtype=torch.bfloat16, device=device)
    x, u, v = y.new_ones(20, 2), y.new_ones(2, 2) / 2, y.new_ones(8, 2)
    assert torch.equal(cp_update(y, x, u, v, impl=impl), torch.full_like(y, 258.0))


@pytest.mark.parametrize("gain", ["none", "shared", "folds"])
def test_gain_forms_and_leading_dimensions(impl, device, gain):
    y, x, u, v, g = case(device=device)
    g = {"none": None, "shared": g[0], "folds": g}[gain]
    out, _ = check((y, x, u, v, g), torch.randn(19, 64, device=device), impl, scale=-0.5)
    shaped = cp_update(y[:18].view(2, 3, 3, 64), x[:18].view(2, 3, 3, 40), u, v, g, scale=-0.5, impl=impl)
    assert shaped.shape == (2, 3, 3, 64)
    torch.testing.assert_close(shaped.reshape(18, 64), out[:18])
    single = cp_update(y[3], x[3], u, v, g, scale=-0.5, impl=impl)
    torch.testing.assert_close(single, out[3])


@pytest.mark.parametrize("function", [cp_update, in_place])
def test_hard_20_fresh_factors_leave_y_bitwise_as_it_is(impl, device, function):
    for dtype in (torch.float32, *HALVES):
        y, x, u, v, gain = case(dtype=dtype, device=device)
        assert torch.equal(function(y, x, u, torch.zeros_like(v), gain, impl=impl), y)


def test_many_rows_of_half_precision_go_in_blocks():
    """Blocks of rows of the plain path: the first and the last are no others."""
    y, x, u, v, gain = case(2000, 300, 200, 4, 2, torch.bfloat16, factors=torch.float32)
    whole = cp_update(y, x, u, v, gain, impl="reference")
    for rows in (slice(0, 7), slice(993, 1000), slice(1993, 2000)):
        torch.testing.assert_close(whole[rows], cp_update(y[rows], x[rows], u, v, gain, impl="reference"))


# -- in place --------------------------------------------------------------------------------------------------------


def test_in_place_changes_y_and_counts_as_a_change(impl, device):
    y, x, u, v, gain = case(device=device)
    u.requires_grad_()
    target = y.clone()
    before = target._version
    out = cp_update(target, x, u, v, gain, inplace=True, impl=impl)
    assert out is target and target._version > before and target.requires_grad
    assert torch.equal(target, cp_update(y, x, u, v, gain, impl=impl))
    kept = (y.clone().requires_grad_() * 1.0).exp()  # exp keeps its result for its backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cp_update(kept, x, u, v, gain, inplace=True, impl=impl).sum().backward()


@pytest.mark.parametrize("name", ["contiguous", "transposed", "strided slice", "slice of a cat"])
def test_in_place_of_every_layout(impl, device, name):
    y, x, u, v, gain = case(18, device=device)
    want = cp_update(y, x, u, v, gain, impl=impl)
    with torch.no_grad():
        laid = dict(layouts(y))[name]
        assert cp_update(laid, x, u, v, gain, inplace=True, impl=impl) is laid
        assert torch.equal(laid, want)
        three = dict(layouts(y.view(3, 6, 64)))[name]
        assert cp_update(three, x.view(3, 6, 40), u, v, gain, inplace=True, impl=impl) is three
        assert torch.equal(three.reshape(18, 64), want)


def test_in_place_beside_x_in_the_same_memory(impl, device):
    """x is read as it was, also where y is x."""
    _, x, u, _, _ = case(inner=64, device=device)
    v = torch.randn(64, 5, device=device)
    want = cp_update(x, x, u, v, impl=impl)
    both = x.clone()
    with torch.no_grad():
        assert cp_update(both, both, u, v, inplace=True, impl=impl) is both
    assert torch.equal(both, want)


@pytest.mark.parametrize("compiled", [False, True])
def test_in_place_where_x_is_y_trains_on_x_as_it_was(impl, device, compiled):
    """What a Function saves it saves after the change, with the version that is then: autograd would not notice."""
    z, _, u, _, _ = case(inner=64, device=device)
    inputs = (z, u, torch.randn(64, 5, device=device))
    grad = torch.randn(19, 64, device=device)

    def run(z, u, v, inplace):
        z = z * 2.0
        return cp_update(z, z, u, v, inplace=inplace, impl=impl)

    torch._dynamo.reset()
    ours = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    got = evaluate(ours, inputs, [True] * 3, grad, inplace=True)
    torch.testing.assert_close(got, evaluate(run, inputs, [True] * 3, grad, inplace=False))


def test_in_place_of_memory_that_holds_the_negative(impl, device):
    y, x, u, v, gain = case(device=device)
    negative = torch.complex(torch.zeros_like(y), -y).conj().imag
    assert negative.is_neg()
    assert cp_update(negative, x, u, v, gain, inplace=True, impl=impl) is negative
    assert torch.equal(negative, cp_update(y, x, u, v, gain, impl=impl))


def test_what_in_place_refuses(impl, device):
    y, x, u, v, gain = case(device=device)
    u.requires_grad_()
    before = y.clone()
    with pytest.raises(RuntimeError, match="y is a leaf that requires grad"):
        cp_update(y.requires_grad_(), x, u, v, gain, inplace=True, impl=impl)
    y = y.detach()
    with pytest.raises(RuntimeError, match="y is a view of another tensor"):
        cp_update((y * 1.0)[:], x, u, v, gain, inplace=True, impl=impl)
    with pytest.raises(ValueError, match=r"elements of y share memory \(shape \(19, 64\), strides \(0, 1\)\)"):
        cp_update(y[:1].expand(19, 64), x, u, v, gain, inplace=True, impl=impl)
    assert torch.equal(y, before)
    with torch.no_grad():
        cp_update(y[:], x, u, v, gain, inplace=True, impl=impl)
    assert not torch.equal(y, before)


@pytest.mark.parametrize("compiled", [False, True])
def test_in_place_refuses_a_y_whose_elements_share_memory(impl, device, compiled):
    """Rows that begin before the last one has ended, an expanded y, columns that meet the next one's; nothing is written."""
    _, x, u, v, gain = case(device=device)
    memory = torch.randn(19 * 64, device=device)
    before = memory.clone()

    def run(y, x):
        return cp_update(y, x, u, v, gain, inplace=True, impl=impl)

    torch._dynamo.reset()
    ours = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    error = (ValueError, torch._dynamo.exc.Unsupported) if compiled else ValueError
    for shape, strides in (
        ((19, 64), (63, 1)),
        ((19, 64), (0, 1)),
        ((19, 64), (1, 19 - 1)),
        ((2, 3, 64), (128, 63, 1)),
    ):
        y = memory.as_strided(shape, strides)
        with pytest.raises(error, match="elements of y share memory"):
            ours(y, x[: shape[0]] if len(shape) == 2 else x[:6].view(2, 3, 40))
    assert torch.equal(memory, before)
    for shape, strides in (((19, 64), (1, 19)), ((1, 64), (0, 1)), ((19, 64), (64, 1))):  # no two in one place
        y = memory.clone().as_strided(shape, strides)
        want = cp_update(y.clone(), x[: shape[0]], u, v, gain, impl=impl)
        with torch.no_grad():
            torch.testing.assert_close(ours(y, x[: shape[0]]), want)


@pytest.mark.parametrize("name", ["u", "v", "gain"])
def test_in_place_beside_factors_in_the_same_memory(impl, device, name):
    """They are read as they were, and the backward has them so too."""
    inputs = dict(zip(NAMES, case(device=device), strict=True))
    grad = torch.randn(19, 64, device=device)
    other, place = inputs[name], slice(3, 3 + inputs[name].numel())
    inputs["y"].view(-1)[place] = other.reshape(-1)
    want = evaluate(cp_update, tuple(inputs.values()), [False, True, True, True, True], grad, impl=impl)
    held = inputs["y"].clone()
    shared = held.view(-1)[place].view(other.shape)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items() if n not in ("y", name)}
    given = {n: shared if n == name else leaves[n] for n in NAMES[1:]}
    out = cp_update(held, *given.values(), inplace=True, impl=impl)
    assert out is held
    torch.testing.assert_close(out.detach(), want[0])
    out.backward(grad)
    for n, g in zip(NAMES[1:], want[1][1:], strict=True):
        if n != name:
            torch.testing.assert_close(leaves[n].grad, g)


def test_in_place_in_inference_mode(impl, device):
    y, x, u, v, gain = case(device=device)
    want = cp_update(y, x, u, v, gain, impl=impl)
    with torch.inference_mode():
        target = y.clone()
        assert torch.equal(cp_update(target, x, u, v, gain, inplace=True, impl=impl), want)


def test_in_place_under_fullgraph(impl, device):
    """The compiler gets the function and the copy, of which it makes one."""
    y, x, u, v, gain = case(device=device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: cp_update(a[0] * 2.0, *a[1:], inplace=True, impl=impl), fullgraph=True, backend="aot_eager"
    )
    grad = torch.randn(19, 64, device=device)
    got = evaluate(compiled, (y, x, u, v, gain), [True] * 5, grad)
    want = evaluate(lambda *a: cp_update(a[0] * 2.0, *a[1:], impl=impl), (y, x, u, v, gain), [True] * 5, grad)
    torch.testing.assert_close(got, want)


# -- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (("y",), []),
        (("x",), ["u", "v", "gain"]),
        (("y", "u"), ["x", "v", "gain"]),
        (("v",), ["gain", "h"]),
        (("gain",), ["v", "gain", "h"]),
        (("y", "x", "u", "v", "gain"), ["x", "u", "v", "gain", "h"]),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_of_y_is_kept(impl, device, wanted, kept, inplace):
    inputs = dict(zip(NAMES, case(device=device), strict=True))
    leaves = {n: t.requires_grad_(n in wanted) for n, t in inputs.items()}
    sizes = {n: t.shape for n, t in inputs.items()} | {"h": (19, 5)}
    leaves["y"] = leaves["y"] * 1.0
    out = cp_update(*leaves.values(), inplace=inplace, impl=impl)
    saved = [tuple(t.shape) for t in out.grad_fn.saved_tensors if t is not None]
    assert saved == [tuple(sizes[n]) for n in kept]


def test_the_gradient_of_y_is_the_incoming_one(device, impl):
    y, x, u, v, gain = case(device=device)
    out = cp_update(y.requires_grad_(), x, u, v, gain, impl=impl)
    grad = torch.randn(19, 64, device=device)
    assert torch.autograd.grad(out, y, grad)[0].data_ptr() == grad.data_ptr()


# -- hard cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [cp_update, in_place])
def test_hard_01_zero_rows(impl, device, function):
    inputs = case(rows=0, device=device)
    y, grads = evaluate(function, inputs, [True] * 5, torch.zeros(0, 64, device=device), impl=impl)
    assert y.shape == (0, 64)
    for t, g in zip(inputs, grads, strict=True):
        assert g.shape == t.shape and bool((g == 0).all())


def test_hard_02_03_bad_arguments(impl, device):
    y, x, u, v, gain = case(device=device)
    for error, message, args, options in (
        (
            ValueError,
            r"expected x\.shape\[-1\] == 40 \(u is 40 x 5\), got x of \(19, 39\)",
            (y, x[:, :39], u, v, gain),
            {},
        ),
        (ValueError, r"y and x to have the same rows, got \(18, 64\) and \(19, 40\)", (y[:18], x, u, v, gain), {}),
        (ValueError, r"y and x to have the same rows", (y[None], x, u, v, gain), {}),
        (ValueError, r"expected v\.shape\[1\] == 5 .*got 4", (y, x, u, v[:, :4], gain), {}),
        (ValueError, r"multiple of v\.shape\[0\].*64 columns of y and 31 rows of v", (y, x, u, v[:31], gain), {}),
        (ValueError, r"gain\.shape == \(5,\) or \(2, 5\).*got \(3, 5\)", (y, x, u, v, gain[[0, 1, 1]]), {}),
        (ValueError, "u must be 2-D", (y, x, u[0], v, gain), {}),
        (ValueError, "rank of at least 1", (y, x, u[:, :0], v[:, :0]), {}),
        (
            ValueError,
            "cp_update: expected 0 <= dropout_p < 1, got 1",
            (y, x, u, v),
            {"dropout_p": 1.0, "training": True},
        ),
        (ValueError, "scale must be finite", (y, x, u, v), {"scale": float("nan")}),
        (TypeError, "seed must be an int64 Tensor", (y, x, u, v), {"dropout_p": 0.1, "training": True, "seed": 3}),
        (TypeError, "y is float32 and x is float16", (y, x.half(), u, v), {}),
        (TypeError, "y is float32 and u is float16", (y, x, u.half(), v), {}),
        (TypeError, "u is float32 and gain is float16", (y.half(), x.half(), u, v, gain.half()), {}),
        (TypeError, "y must be float32, float64, bfloat16 or float16, got int64", (y.long(), x, u, v), {}),
    ):
        with pytest.raises(error, match=message):
            cp_update(*args, impl=impl, **options)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_hard_04_layouts(impl, device, which):
    inputs = case(device=device)
    grad = torch.randn(19, 64, device=device)
    for name, laid in layouts(inputs[which]):
        if name != "contiguous":
            check(inputs, grad, impl, ours=[*inputs[:which], laid, *inputs[which + 1 :]])


def test_hard_04_layouts_of_the_incoming_gradient(impl, device):
    inputs = case(device=device)
    grad = torch.randn(19, 64, device=device)
    for _, laid in layouts(grad):
        check(inputs, laid, impl)
    check(inputs, torch.randn(1, 1, device=device).expand(19, 64), impl)  # what y.sum().backward() sends
    check([t if i != 1 else t[:1].expand(19, 40) for i, t in enumerate(inputs)], grad, impl)


def test_hard_06_bad_rows_stay_alone_and_inputs_untouched(impl, device):
    inputs = case(device=device)
    inputs[1][4, 3] = torch.nan
    before = [t.clone() for t in inputs]
    with poisoned_allocations():
        y, _ = evaluate(cp_update, inputs, [True] * 5, torch.ones(19, 64, device=device), impl=impl)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(inputs, before, strict=True))
    rest = torch.arange(19, device=device) != 4
    assert bool(y[4].isnan().all()) and bool(y[rest].isfinite().all())


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5)))
def test_hard_07_gradient_subsets(impl, device, wanted):
    inputs = case(9, 24, 16, 3, 2, device=device)
    options = {"scale": 0.5, "dropout_p": 0.25, "training": True, "seed": torch.tensor([11], device=device)}
    with poisoned_allocations():
        check(inputs, torch.randn(9, 32, device=device), impl, wanted, **options)


def test_hard_07_second_backward_and_double_backward(impl, device):
    y, x, u, v, gain = case(device=device)
    u.requires_grad_()
    loss = cp_update(y, x, u, v, gain, impl=impl).square().sum()
    (first,) = torch.autograd.grad(loss, u, retain_graph=True)
    (again,) = torch.autograd.grad(loss, u, retain_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="cp_update: no second derivative"):
        torch.autograd.grad(loss, u, create_graph=True)


@pytest.mark.parametrize("factors", [torch.float16, torch.float32])
def test_hard_19_large_hidden_units_in_float16(impl, device, factors):
    """x U above 65504 where the output fits, and dL/dh where dx does: finite and right."""
    x = torch.full((4, 64), 60.0, device=device, dtype=torch.float16)
    u = torch.full((64, 2), 30.0, device=device, dtype=factors)  # x u = 115,200
    v = torch.full((8, 2), 1e-3, device=device, dtype=factors)
    y = torch.zeros(4, 8, device=device, dtype=torch.float16)
    out = cp_update(y, x, u, v, impl=impl)
    exact = formula(y.double(), x.double(), u.double(), v.double())
    assert bool(out.isfinite().all())
    assert_within_budget(out, exact.half(), exact)
    v, u = v.new_full((8, 2), 6e4), u.new_full((64, 2), 1e-3)
    x = x.new_zeros(4, 64).requires_grad_()
    (grad,) = torch.autograd.grad(cp_update(y, x, u, v, impl=impl).sum(), x)
    assert_within_budget(grad, torch.full_like(grad, 16 * 6e4 * 1e-3), (v.double().sum(0) @ u.double().T).expand(4, 64))


@pytest.mark.parametrize("function", [cp_update, in_place])
def test_hard_21_dropout(impl, device, function):
    inputs = case(64, 40, 32, 16, 2, device=device)
    seed = torch.tensor([99], device=device)
    options = {"dropout_p": 0.3, "training": True, "seed": seed}
    y, _ = check(inputs, torch.randn(64, 64, device=device), impl, function=function, **options)
    assert torch.equal(y, cp_update(*inputs, impl=impl, **options))
    assert not torch.equal(y, cp_update(*inputs, impl=impl, **(options | {"seed": seed + 1})))
    evaluated = cp_update(*inputs, dropout_p=0.3, training=False, impl=impl)
    assert torch.equal(evaluated, cp_update(*inputs, impl=impl))
    torch.manual_seed(5)
    drawn = cp_update(*inputs, dropout_p=0.3, training=True, impl=impl)
    assert not torch.equal(drawn, cp_update(*inputs, dropout_p=0.3, training=True, impl=impl))
    torch.manual_seed(5)
    assert torch.equal(drawn, cp_update(*inputs, dropout_p=0.3, training=True, impl=impl))


@pytest.mark.parametrize("reentrant", [False, True])
def test_hard_21_checkpointing_sees_the_same_mask_in_place_too(impl, device, reentrant):
    y, x, u, v, gain = case(device=device)
    x.requires_grad_(), u.requires_grad_()

    def block(t):
        return cp_update(
            y + t.sum(-1, keepdim=True), t, u, v, gain, dropout_p=0.5, training=True, inplace=True, impl=impl
        )

    torch.manual_seed(3)
    want = torch.autograd.grad(block(x).square().sum(), (x, u))
    torch.manual_seed(3)
    x.grad = u.grad = None
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, want[0]) and torch.equal(u.grad, want[1])


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_autocast_takes_the_dtype_that_the_base_layer_chose(impl, device, factors):
    """y in bfloat16 from a layer under autocast, x and factors in what the model has them in."""
    y, x, u, v, gain = case(device=device)
    leaves = [t.detach().to(factors).requires_grad_() for t in (u, v, gain)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = cp_update(y.bfloat16(), x, *leaves, impl=impl)
        wide = cp_update(y, x, *leaves, impl=impl)
    assert out.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert torch.equal(out, cp_update(y.bfloat16(), x.bfloat16(), *leaves, impl=impl))
    assert torch.equal(wide, cp_update(y, x, *(t.float() for t in leaves), impl=impl))
    out.float().sum().backward()
    assert all(t.grad.dtype == factors for t in leaves)


def test_runs_are_bitwise_equal(impl, device):
    inputs = case(70, 130, 37, 9, 2, device=device)
    grad = torch.randn(70, 74, device=device)
    first = evaluate(cp_update, inputs, [True] * 5, grad, impl=impl)
    again = evaluate(cp_update, inputs, [True] * 5, grad, impl=impl)
    assert torch.equal(first[0], again[0]) and all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_unaligned_operands_take_the_tile_that_spills_nothing(monkeypatch):
    kernels = pytest.importorskip("fastgist_kernels.cp_update")
    monkeypatch.setattr(kernels, "device_arch", lambda device: "sm_90")
    monkeypatch.setattr(kernels, "launch_config", lambda *args: {})
    y, x, u, v = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((64, 96), (64, 32), (32, 16), (96, 16)))

    def warps(*others, out=y):
        return kernels._config(out, others, 16, False)["num_warps"]

    assert warps(y, x, u, v) == 4 and warps(None, None, None, v) == 4
    others = [y, x, u, v]
    for i, t in enumerate(others):
        odd = torch.empty(t.shape[0], t.shape[1] + 1, dtype=t.dtype)[:, 1:]
        assert warps(*others[:i], odd, *others[i + 1 :]) == 8
        assert i > 0 or warps(*others, out=odd) == 8
    assert kernels._config(y[:32], (y, x, u, v), 16, False)["BLOCK_M"] == 16
    assert kernels._config(y.float(), (y, x, u, v), 16, False) != kernels._config(y.float(), (y, x, u, v), 16, True)


def test_in_place_into_nothing(impl):
    """torch gives a result without elements strides that would overlap if it had some."""
    y = torch.randn(3, 0, 1, device=DEVICE) / 1.0
    out = cp_update(
        y,
        torch.randn(3, 0, 4, device=DEVICE),
        torch.randn(4, 2, device=DEVICE),
        torch.randn(1, 2, device=DEVICE),
        inplace=True,
        impl=impl,
    )
    assert out is y and y.shape == (3, 0, 1)
