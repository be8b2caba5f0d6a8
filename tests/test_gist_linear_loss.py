"""gist_linear_loss against float64 and against gist_loss on whole logits. Hard case 17 and those of gist_loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import INTERPRETING
from losses import assert_same, evaluate

from fastgist.functional import gist_linear_loss, gist_loss
from fastgist.reference.gist_linear_loss import gist_linear_loss as formula
from fastgist.reference.gist_loss import gist_loss as row_formula
from fastgist.testing import assert_within_budget, layouts, poisoned_allocations

OP = "gist_linear_loss"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def case(rows=11, width=24, classes=37, dtype=torch.float32, device="cpu"):
    hidden, gist = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    weight = (torch.randn(classes, width, device=device) * width**-0.5).to(dtype)
    bias = torch.randn(classes, device=device).to(dtype)
    return hidden, gist, weight, bias, torch.randint(classes, (rows,), device=device)


def unfused(hidden, gist, weight, bias, target, **options):
    """The same two products and the same loss, whole: what half precision is compared with, logits in its dtype."""
    linear = torch.nn.functional.linear
    return gist_loss(linear(hidden, weight, bias), linear(gist, weight, bias), target, impl="reference", **options)


def bias_terms(hidden, gist, weight, bias, target, grad, **options) -> float:
    """The largest sum of absolute terms in the bias's gradient: one a row and head, of which most cancel."""
    logits = [torch.nn.functional.linear(x.double(), weight.double(), bias.double()) for x in (hidden, gist)]
    _, grads = evaluate(lambda z, g: row_formula(z, g, target, **options), logits, (True, True), grad)
    return float(sum(g.abs().sum(0) for g in grads).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_float64(impl, device, dtype, reduction):
    hidden, gist, weight, bias, y = case(dtype=dtype, device=device)
    y[4] = -100
    grad = torch.randn(11, device=device) if reduction == "none" else torch.tensor(1.3, device=device)
    inputs = (hidden, gist, weight, bias)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    loss, grads = evaluate(
        lambda *a: gist_linear_loss(*a, y, chunk_rows=4, impl=impl, **options), inputs, [True] * 4, grad
    )
    plain = evaluate(lambda *a: unfused(*a, y, **options), inputs, [True] * 4, grad)
    exact = evaluate(lambda *a: formula(*a, y, **options), [x.double() for x in inputs], [True] * 4, grad)
    terms = 11 * 5.0 if reduction == "sum" else 5.0
    assert_within_budget(loss, plain[0], exact[0], what="loss", scale=terms)
    for name, g, p, e in zip(("hidden", "gist", "weight", "bias"), grads, plain[1], exact[1], strict=True):
        assert_within_budget(g, p, e, what=f"gradient of {name}")


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 11, 100, None])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_hard_17_every_chunk_size(impl, device, chunk_rows, frozen, with_bias):
    hidden, gist, weight, bias, y = case(device=device)
    y[2] = -100
    inputs = (hidden, gist, weight, *([bias] if with_bias else []))
    wanted = (True, True, not frozen, *([not frozen] if with_bias else []))

    def run(loss, *a, **options):
        h, g, w, *b = a
        return loss(h, g, w, b[0] if b else None, y, **options)

    check = evaluate(lambda *a: run(gist_linear_loss, *a, chunk_rows=chunk_rows, impl=impl), inputs, wanted)
    plain = evaluate(lambda *a: run(unfused, *a), inputs, wanted)
    exact = evaluate(lambda *a: run(formula, *a), [x.double() for x in inputs], wanted)
    assert_within_budget(check[0], plain[0], exact[0], what="loss", scale=5.0)
    for w, mine, p, e in zip(wanted, check[1], plain[1], exact[1], strict=True):
        assert (mine is not None) == w
        if w:
            assert_within_budget(mine, p, e)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hard_07_gradient_subsets(impl, device, wanted, reduction):
    inputs = case(device=device)
    y, inputs = inputs[4], inputs[:4]
    grad = torch.randn(11, device=device) if reduction == "none" else torch.tensor(0.7, device=device)
    with poisoned_allocations():
        loss, grads = evaluate(
            lambda *a: gist_linear_loss(*a, y, chunk_rows=4, reduction=reduction, impl=impl), inputs, wanted, grad
        )
    exact = evaluate(lambda *a: formula(*a, y, reduction=reduction), [x.double() for x in inputs], [True] * 4, grad)
    plain = evaluate(lambda *a: unfused(*a, y, reduction=reduction), inputs, [True] * 4, grad)
    assert_within_budget(loss, plain[0], exact[0], scale=5.0)
    scales = (None, None, None, bias_terms(*inputs, y, grad, reduction=reduction))
    for w, mine, p, e, scale in zip(wanted, grads, plain[1], exact[1], scales, strict=True):
        assert (mine is not None) == w
        if w:
            assert_within_budget(mine, p, e, scale=scale)


def test_leading_dimensions_soft_targets_and_layouts(impl, device):
    hidden, gist, weight, bias, _ = case(rows=12, device=device)
    soft = torch.rand(12, 37, device=device).softmax(-1)
    exact = formula(*(x.double() for x in (hidden, gist, weight, bias)), soft, reduction="none")
    plain = unfused(hidden, gist, weight, bias, soft, reduction="none")
    for _, laid in layouts(hidden):
        ours = gist_linear_loss(laid, gist, weight.t().contiguous().t(), bias, soft, reduction="none", impl=impl)
        assert_within_budget(ours, plain, exact, scale=5.0)
    shaped = gist_linear_loss(
        hidden.view(3, 4, -1), gist.view(3, 4, -1), weight, bias, soft.view(3, 4, -1), reduction="none", impl=impl
    )
    assert shaped.shape == (3, 4)
    assert_within_budget(shaped.flatten(), plain, exact, scale=5.0)


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETING else [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["hidden", "gist_hidden", "weight", "bias", "grad_output"])
@pytest.mark.parametrize("chunk_rows", [None] if INTERPRETING else [4, None])
def test_hard_04_layouts_of_each_input_and_of_the_incoming_gradient(impl, device, dtype, name, chunk_rows):
    """Equal values in other strides: the loss and all gradients of contiguous ones, bit by bit on a CPU; a head in another
    layout is another product there, which sums in another order."""
    *inputs, y = case(dtype=dtype, device=device)
    grad = torch.randn(11, device=device)
    names = ["hidden", "gist_hidden", "weight", "bias"]

    def run(xs, g):
        def loss(*a):
            return gist_linear_loss(*a, y, reduction="none", chunk_rows=chunk_rows, impl=impl)

        return evaluate(loss, xs, [True] * 4, g)

    def spread(x):  # one row of each layout of several
        return [(kind, laid[1]) for kind, laid in layouts(torch.stack((x, x, x)))]

    values = [*inputs, grad]
    at = [*names, "grad_output"].index(name)
    same = values[at]
    kinds = list(layouts(same)) if same.dim() == 2 else spread(same)
    assert len({laid.stride() for _, laid in kinds}) > 2
    for kind, laid in [*kinds, ("stride 0", same[:1].expand_as(same))]:
        *xs, g = (laid if i == at else x for i, x in enumerate(values))
        *plain, plain_g = (laid.contiguous() if i == at else x for i, x in enumerate(values))
        loss, grads = run(xs, g)
        want_loss, want_grads = run(plain, plain_g)
        if name != "weight":
            assert_same(loss, want_loss)
            for mine, want in zip(grads, want_grads, strict=True):
                assert_same(mine, want)
            continue
        exact = evaluate(lambda *a: formula(*a, y, reduction="none"), [x.double() for x in plain], [True] * 4, plain_g)
        assert_within_budget(loss, want_loss, exact[0], what=f"{kind}: loss", scale=5.0)
        scales = (1.0, 1.0, None, bias_terms(*plain, y, plain_g, reduction="none"))
        for what, mine, want, e, scale in zip(names, grads, want_grads, exact[1], scales, strict=True):
            assert_within_budget(mine, want, e, what=f"{kind}: {what}", scale=scale)


@pytest.mark.parametrize("classes", [1, 16, 31, 32, 48])
def test_class_counts_with_and_without_padding(impl, device, classes):
    """Rows of logits are padded to 16 classes: where 16 divides their number, the next column is the next row."""
    hidden, gist, weight, bias, y = case(classes=classes, device=device)
    inputs = [hidden, gist, weight, bias]
    exact = evaluate(lambda *a: formula(*a, y), [x.double() for x in inputs], [True] * 4)
    plain = evaluate(lambda *a: unfused(*a, y), inputs, [True] * 4)
    ours = evaluate(lambda *a: gist_linear_loss(*a, y, impl=impl), inputs, [True] * 4)
    assert_within_budget(ours[0], plain[0], exact[0], scale=5.0)
    for mine, p, e in zip(ours[1], plain[1], exact[1], strict=True):
        assert_within_budget(mine, p, e, scale=1.0)


def test_no_logits_outlive_a_chunk(device):
    """Peak memory in the reference path: never as much as one (M, V) tensor above the inputs and gradients."""
    rows, width, classes, chunk = 512, 8, 2048, 32
    hidden, gist, weight, bias, y = case(rows, width, classes, device=device)
    hidden.requires_grad_()
    largest = 0
    original = torch.empty

    def watch(*args, **kwargs):
        nonlocal largest
        out = original(*args, **kwargs)
        largest = max(largest, out.numel())
        return out

    torch.empty = watch
    try:
        gist_linear_loss(hidden, gist, weight, bias, y, chunk_rows=chunk, impl="reference").backward()
    finally:
        torch.empty = original
    assert largest == 2 * chunk * classes < rows * classes


def test_evaluation_computes_no_gradient(impl, device, monkeypatch):
    """Under no_grad a trainable head asks for nothing: no product beyond the logits'."""
    hidden, gist, weight, bias, y = case(device=device)
    weight.requires_grad_()
    products = []
    original = torch.addmm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: pytest.fail("a gradient's product was computed"))
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: products.append(1) or original(*a, **k))
    with torch.no_grad():
        gist_linear_loss(hidden, gist, weight, bias, y, chunk_rows=6, impl=impl)
    assert len(products) == 2


def test_hard_01_zero_rows(impl, device):
    hidden, gist, weight, bias, y = case(device=device)
    loss, grads = evaluate(
        lambda *a: gist_linear_loss(*a, y[:0], impl=impl), (hidden[:0], gist[:0], weight, bias), [True] * 4
    )
    assert float(loss) == 0.0 and grads[0].shape == (0, 24)
    assert bool((grads[2] == 0).all()) and grads[2].shape == weight.shape and bool((grads[3] == 0).all())


def test_hard_02_03_bad_arguments(impl, device):
    hidden, gist, weight, bias, y = case(device=device)
    with pytest.raises(ValueError, match=r"expected hidden\.shape\[-1\] == 24 \(weight is 37 x 24\), got \(11, 23\)"):
        gist_linear_loss(hidden[:, :23], gist, weight, bias, y, impl=impl)
    with pytest.raises(ValueError, match=r"gist_hidden\.shape == \(11, 24\), got \(10, 24\)"):
        gist_linear_loss(hidden, gist[:10], weight, bias, y, impl=impl)
    with pytest.raises(ValueError, match=r"bias\.shape == \(37,\), got \(36,\)"):
        gist_linear_loss(hidden, gist, weight, bias[:36], y, impl=impl)
    with pytest.raises(TypeError, match="hidden is float32 and weight is bfloat16"):
        gist_linear_loss(hidden, gist, weight.bfloat16(), bias, y, impl=impl)
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        gist_linear_loss(hidden, gist, weight, bias, y, chunk_rows=0, impl=impl)
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        gist_linear_loss(hidden, gist, weight, bias, y, temperature=-1.0, impl=impl)
    if device.type == "cpu":
        y[3] = 37
        with pytest.raises(IndexError, match=r"gist_linear_loss: target\[3\] is 37"):
            gist_linear_loss(hidden, gist, weight, bias, y, impl=impl)


def test_hard_15_an_ignored_row_of_nan_stays_out_of_the_heads_gradient(impl, device):
    hidden, gist, weight, bias, y = case(device=device)
    clean = y.clone()
    clean[3] = -100
    inputs = [hidden, gist, weight, bias]
    want = evaluate(lambda *a: gist_linear_loss(*a, clean, chunk_rows=4, impl=impl), inputs, [True] * 4)
    hidden[3], gist[3] = torch.nan, torch.inf
    got = evaluate(lambda *a: gist_linear_loss(*a, clean, chunk_rows=4, impl=impl), inputs, [True] * 4)
    assert torch.equal(got[0], want[0])
    for mine, w in zip(got[1], want[1], strict=True):
        assert torch.equal(mine, w)


def test_hard_06_15_bad_and_ignored_rows(impl, device):
    hidden, gist, weight, bias, y = case(device=device)
    hidden[5] = torch.nan
    loss = gist_linear_loss(hidden, gist, weight, bias, y, reduction="none", chunk_rows=3, impl=impl)
    assert bool(loss[5].isnan()) and int(loss.isnan().sum()) == 1
    y[5] = -100
    loss, grads = evaluate(
        lambda a, b: gist_linear_loss(a, b, weight, bias, y, chunk_rows=3, impl=impl), (hidden, gist), (True, True)
    )
    assert bool(loss.isfinite()) and all(bool((g[5] == 0).all()) and bool(g.isfinite().all()) for g in grads)
    y[:] = -100
    loss, grads = evaluate(
        lambda a, b: gist_linear_loss(a, b, weight, bias, y, impl=impl), (hidden, gist), (True, True)
    )
    assert float(loss) == 0.0 and all(bool((g == 0).all()) for g in grads)


def test_second_backward_double_backward_and_autocast(impl, device):
    hidden, gist, weight, bias, y = case(device=device)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = gist_linear_loss(hidden, gist, weight, bias, y, impl=impl)
    first = torch.autograd.grad(loss, (hidden, weight), torch.tensor(3.0, device=device), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight), torch.tensor(3.0, device=device), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="gist_linear_loss: no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        narrow = gist_linear_loss(hidden, gist, weight, bias, y, impl=impl)
    same = gist_linear_loss(*(x.bfloat16() for x in (hidden, gist, weight, bias)), y, impl=impl)
    assert torch.equal(narrow, same) and narrow.dtype == torch.float32
    assert torch.autograd.grad(narrow, weight)[0].dtype == torch.float32


def test_float64_and_float16_small_gradients(device):
    hidden, gist, weight, bias, y = (x.double() if x.is_floating_point() else x for x in case(device=device))
    inputs = (hidden, gist, weight, bias)
    ours = evaluate(lambda *a: gist_linear_loss(*a, y), inputs, [True] * 4)
    want = evaluate(lambda *a: formula(*a, y), inputs, [True] * 4)
    torch.testing.assert_close(ours, want)


def test_float16_gradients_survive_a_mean_over_many_rows(impl, device):
    """1 / M times a probability underflows float16; a loss scale, which arrives last, must still find the gradient."""
    rows, scale = 4096, 2.0**16
    hidden, gist, weight, bias, y = case(rows, 16, 1, torch.float16, device=device)
    weight, bias = weight.repeat(200, 1), bias.repeat(200)
    weight += 0.01 * torch.randn_like(weight)
    if impl == "triton" and device.type == "cpu":
        hidden, gist, y, scale = (
            hidden[:256],
            gist[:256],
            y[:256],
            scale / 16,
        )  # interpreted: fewer rows, same scale a row
    y[:] = torch.arange(len(y), device=device) % 200
    grad = torch.tensor(scale, device=device)
    inputs = (hidden, gist, weight, bias)
    got = evaluate(lambda *a: gist_linear_loss(*a, y, impl=impl), inputs, [True] * 4, grad)[1]
    plain = evaluate(lambda *a: unfused(*a, y), inputs, [True] * 4, grad)[1]
    exact = evaluate(lambda *a: formula(*a, y), [x.double() for x in inputs], [True] * 4, grad)[1]
    for mine, p, e in zip(got, plain, exact, strict=True):
        assert_within_budget(mine, p, e)
