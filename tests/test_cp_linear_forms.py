"""Every form of cp_linear's kernels against float64, whatever the plan would choose: run interpreted, or on a card."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import DEVICE
from test_cp_pieces import NAMES, case, run

from fastgist.functional import cp_linear
from fastgist.reference.cp_linear import cp_linear as formula
from fastgist.testing import assert_within_budget, poisoned_allocations

pytest.importorskip("triton")
from fastgist_kernels import cp_linear as forward_kernels
from fastgist_kernels import cp_linear_bwd as backward_kernels
from fastgist_kernels import cp_linear_forms, cp_linear_parts
from fastgist_kernels.cp_linear_forms import can

OP = "cp_linear"
FORWARD = ["fused", "started", "blas", "few"]
BACKWARD = ["fused", "started", "blas"]
#: rows of the weights, and of v: folds as grouped queries have them, a row of v for each row, ends inside a tile, five weights
#: (two launches), a weight without rows.
PIECES = [
    ((48, 24, 24), 24),
    ((20, 36), None),
    ((37,), 37),
    ((66,), 33),
    ((24, 24, 48, 24, 24), 24),
    ((20, 36, 8, 40), None),
    ((24, 0, 24), 24),
]


@pytest.fixture
def forms(monkeypatch):
    """Sets the forms that the launchers take."""

    def use(forward, backward="started"):
        monkeypatch.setattr(forward_kernels, "cp_linear_form", lambda *a, **k: forward)
        monkeypatch.setattr(backward_kernels, "cp_linear_form", lambda *a, **k: backward)

    return use


def whole(x, weights, biases, *others, **options):
    biases = None if biases is None else torch.cat(list(biases))
    return formula(x, torch.cat(list(weights)), biases, *others, **options)


def hold(given, grads, impl, **options):
    """Results and gradients of the kernels within the budget of the plain formula in the same dtype."""
    x, weights, biases, u, v, gain = given
    with poisoned_allocations():
        ours, our_grads = run(cp_linear, *given, grads, impl=impl, **options)
    plain, plain_grads = run(whole, *given, grads, **options)
    double = [None if t is None else t.double() for t in (x, u, v, gain)]
    wide = [w.double() for w in weights], None if biases is None else [b.double() for b in biases]
    exact, exact_grads = run(whole, double[0], *wide, *double[1:], [g.double() for g in grads], **options)
    for i, (o, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert_within_budget(o, p, e, what=f"y[{i}]")
    x, u, v, gain = (None if t is None else t.abs() for t in double)
    weights, biases, upward = ([t.abs().double() for t in ts or ()] for ts in (*wide, grads))
    positive = options | {"scale": abs(options.get("scale", 1.0))}
    _, terms = run(whole, x, weights, biases or None, u, v, gain, upward, **positive)
    for name, g, p, e, t in zip(NAMES, our_grads, plain_grads, exact_grads, terms, strict=True):
        if e is not None:  # the gain's gradient is a handful of long sums whose terms cancel: their size counts
            size = float(t.max()) if name == "gain" else None
            assert_within_budget(g, p, e, what=f"gradient of {name}", scale=size)
    return ours, our_grads


def upstream(weights, rows, dtype=torch.float32):
    """A gradient for each result; columns of one matrix, as autograd hands them to an operation of many results."""
    return [g.clone() for g in torch.randn(rows, sum(w.shape[0] for w in weights), device=DEVICE).to(dtype)
            .split([w.shape[0] for w in weights], 1)]  # fmt: skip


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("outs", "fold"), PIECES)
@pytest.mark.parametrize("form", FORWARD)
def test_forward(impl, forms, form, outs, fold, biased):
    forms(form)
    given = list(case(rows=21, outs=outs, fold=fold))
    given[2] = given[2] if biased else None
    hold(given, upstream(given[1], 21), impl, scale=0.7)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(("outs", "fold"), PIECES)
@pytest.mark.parametrize("form", BACKWARD)
def test_backward(impl, forms, form, outs, fold, dropout_p):
    forms("started", form)
    given = case(rows=37, outs=outs, fold=fold)
    options = {"scale": 0.7, "dropout_p": dropout_p, "training": True, "seed": torch.tensor([11], device=DEVICE)}
    hold(given, upstream(given[1], 37), impl, **options)


@pytest.mark.parametrize("rank", [1, 5, 16, 30])
@pytest.mark.parametrize("form", FORWARD)
def test_ranks_dropout_and_sizes_that_no_tile_divides(impl, forms, form, rank):
    forms(form, "fused")
    given = case(rows=19, inner=67, outs=(35, 70), rank=rank, fold=35)
    options = {"scale": -1.5, "dropout_p": 0.3, "training": True, "seed": torch.tensor([5], device=DEVICE)}
    hold(given, upstream(given[1], 19), impl, **options)


@pytest.mark.parametrize("form", [f for f in FORWARD if f != "blas"])
def test_float16_keeps_x_u_in_float32(impl, forms, form):
    forms(form)
    given = case(rows=21, dtype=torch.float16)
    hold(given, upstream(given[1], 21, torch.float16), impl)
    x = torch.full((4, 64), 60.0, device=DEVICE, dtype=torch.float16)
    u = torch.full((64, 2), 30.0, device=DEVICE, dtype=torch.float16)  # x u = 115,200
    v = torch.full((8, 2), 1e-3, device=DEVICE, dtype=torch.float16)
    weight = torch.zeros(8, 64, device=DEVICE, dtype=torch.float16)
    y = cp_linear(x, weight, None, u, v, impl=impl)
    exact = formula(x.double(), weight.double(), None, u.double(), v.double())
    assert_within_budget(y, exact.half(), exact)


@pytest.mark.parametrize("form", FORWARD)
def test_weights_of_different_layouts_go_in_different_launches(impl, forms, form):
    forms(form, "fused")
    x, weights, biases, u, v, gain = case(rows=21)
    weights = [weights[0], weights[1].t().contiguous().t(), weights[2].repeat(1, 2)[:, :40]]
    biases = [biases[0], biases[1].repeat_interleave(2)[::2], biases[2]]
    assert len(list(cp_linear_parts.groups(weights, biases, v, gain))) == 3
    ours, _ = hold((x, weights, biases, u, v, gain), upstream(weights, 21), impl)
    again, _ = run(cp_linear, x, weights, biases, u, v, gain, upstream(weights, 21), impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("form", BACKWARD)
def test_shared_gain_and_none_in_the_backward(impl, forms, form):
    forms("started", form)
    x, weights, biases, u, v, gain = case()
    for g in (gain[0], None):
        hold((x, weights, biases, u, v, g), upstream(weights, 37), impl, scale=0.5)


@pytest.mark.parametrize("form", FORWARD)
def test_no_weight_is_copied(impl, forms, form, monkeypatch):
    """Nothing of a weight's size is made by us, forward or backward (the interpreter makes copies of its own)."""
    made = []

    def noted(original):
        def wrapped(*args, **kwargs):
            out = original(*args, **kwargs)
            if sys._getframe(1).f_globals["__name__"].startswith("fastgist"):
                made.append(out)
            return out

        return wrapped

    forms(form, "fused")
    given = case(rows=3, inner=64, outs=(96, 96, 96), rank=2, fold=96)
    for owner, name in ((torch, "empty"), (torch, "cat"), (torch.Tensor, "new_empty"), (torch.Tensor, "contiguous")):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name)))
    grads = [torch.randn(3, 96, device=DEVICE) for _ in range(3)]
    run(cp_linear, *given, grads, impl=impl)
    assert len(made) > 4 and all(t.numel() < 96 * 64 for t in made)


@pytest.mark.parametrize(
    ("rows", "inner", "out", "folds", "rank", "gain"),
    [(35, 32, 70, 1, 8, "shared"), (21, 40, 37, 2, 24, "folds"), (33, 24, 36, 3, 16, "none")],
)
@pytest.mark.parametrize("form", ["tma_fused", "tma_started"])
def test_tensor_descriptors(impl, forms, form, rows, inner, out, folds, rank, gain):
    """More tiles than programs, and sizes that no tile divides, so that what is fetched lies past every end."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16
    x, weights, biases, u, v, g = case(rows, inner, (out * folds,), rank, out, dtype)
    if not can(form, x, weights, rank, False):
        pytest.skip("no tensor descriptors here")
    forms(form)
    g = {"folds": g, "shared": g[0], "none": None}[gain]
    biases = biases if folds > 1 else None
    options = {"scale": 0.7, "dropout_p": 0.3, "training": folds == 2, "seed": torch.tensor([3], device=DEVICE)}
    hold((x, weights, biases, u, v, g), upstream(weights, rows, dtype), impl, **options)


@pytest.mark.parametrize("form", ["tma_fused", "tma_started"])
def test_tensor_descriptors_of_slices_and_a_transposed_u(impl, forms, form):
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16
    x, (weight,), biases, u, v, gain = case(21, 64, (48,), 8, 24, dtype)
    wide = torch.full((21, 192), torch.nan, device=DEVICE, dtype=dtype)
    wide[:, 64:128] = x
    x, weight = wide[:, 64:128], torch.cat([weight, weight], 1)[:, :64]
    if not can(form, x, [weight], 8, False):
        pytest.skip("no tensor descriptors here")
    forms(form)
    y = cp_linear(x, weight, biases[0], u.t().contiguous().t(), v, gain, impl=impl)
    given = (x, weight, biases[0], u, v, gain)
    assert_within_budget(y, formula(*given), formula(*(t.double() for t in given)))


def test_what_a_form_asks():
    x, weights = torch.empty(65, 64), [torch.empty(64, 64)]
    assert not can("few", x, weights, 4, True) and can("few", x[:64], weights, 4, True)
    assert not can("few", x[:17], weights, 4, False) and can("few", x[:16], weights, 4, False)
    assert can("few", x[:64].half(), weights, 4, False)
    assert not can("few", x[:64], weights, 4, True, forward=False)
    assert not can("few", x[:32].repeat(1, 2)[:, 1:65], weights, 4, True), "not on a boundary of 16 bytes"
    assert not can("few", x[:32], [weights[0], torch.empty(8, 72)[:, :64]], 4, True)
    assert not can("few", torch.empty(32, 1024)[:, ::16], weights, 4, True), "no two numbers side by side"
    assert not can("few", torch.empty(1).expand(32, 64), weights, 4, True)
    assert can("fused", x, weights, 32, False) and not can("fused", x, weights, 33, False)
    assert can("fused", x, weights, 64, True) and not can("fused", x.half(), weights, 65, False)
    assert can("fused", x.half(), weights, 64, False) and not can("fused", x.half(), weights, 64, False, forward=False)
    assert not can("blas", x.half(), weights, 4, False) and can("blas", x, weights, 400, False)
    assert all(can("started", t, weights, 400, False) for t in (x, x.half(), x.bfloat16()))
    with pytest.raises(ValueError, match="no form 'other'"):
        can("other", x, weights, 4, False)
    assert cp_linear_forms.FORMS[:3] == ("fused", "started", "blas"), "launch tables hold positions"


@pytest.mark.skipif(DEVICE != "cpu", reason="what a CPU's tensors may do interpreted")
def test_what_tensor_descriptors_ask():
    x, weights = torch.empty(65, 64), [torch.empty(64, 64)]
    assert can("tma_fused", x, weights, 4, False) and can("tma_started", x, weights, 400, False)
    assert not can("tma_fused", x, weights, 5, False), "rows of u of 20 bytes"
    assert not can("tma_fused", x, weights, 64, False), "a rank that fused products do not take"
    assert not can("tma_started", x, weights, 4, False, forward=False)
    assert not can("tma_started", x, weights * 2, 4, False)
    assert not can("tma_started", x[:, 1:], weights, 4, False) and not can("tma_started", x.t(), weights, 4, False)
    assert not can("tma_started", torch.empty(65, 66)[:, :64], weights, 4, False), "rows of 264 bytes"
    assert not can("tma_started", x[:1].expand(65, 64), weights, 4, False), "one row for all"
    assert not can("tma_started", x.as_strided((65, 64), (32, 1)), weights, 4, False), "rows that overlap"
