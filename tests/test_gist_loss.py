"""gist_loss on every implementation against float64 and against torch's own cross_entropy. Hard cases by number."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETING
from losses import assert_same, check_against_float64, evaluate, gradient_terms, layout_pairs, loss_terms

from fastgist.functional import bidirectional_kl, gist_loss
from fastgist.reference import _numerics
from fastgist.reference.gist_loss import gist_loss as formula
from fastgist.testing import assert_within_budget, layouts, poisoned_allocations

OP = "gist_loss"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def case(rows, classes, dtype=torch.float32, device="cpu", spread=3.0):
    z, g = ((torch.randn(rows, classes, device=device) * spread).to(dtype) for _ in range(2))
    return z, g, torch.randint(classes, (rows,), device=device)


def scales(z, g, temperature, beta=0.75):
    """Sums of absolute terms: the cross-entropies' logits and the divergence's; softmaxes and one-hots in a gradient."""
    largest = float(max((x.amax(-1) - x.float().amin(-1)).max() for x in (z.float(), g.float())))
    return {
        "scale": 2.0 * largest + beta * loss_terms(z, g, temperature),
        "grad_scale": 2.0 + beta * gradient_terms(z, g, temperature),
    }


# -- the formula itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_formula_is_torch_cross_entropy_twice_and_the_divergence(smoothing, soft):
    z, g, y = case(7, 11)
    z, g = z.double(), g.double()
    if soft:
        y = torch.rand(7, 11, dtype=torch.float64).softmax(-1)
    else:
        y[2] = -100
    kept = slice(None) if soft else y != -100
    want = F.cross_entropy(z, y, label_smoothing=smoothing) + 0.5 * F.cross_entropy(g, y, label_smoothing=smoothing)
    p, q = (x[kept].div(3).softmax(-1) for x in (z, g))
    want = want + 0.75 * ((p - q) * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(formula(z, g, y, label_smoothing=smoothing), want)


def test_formula_gradcheck():
    z, g, y = case(4, 5)
    inputs = (z.double().requires_grad_(), g.double().requires_grad_())
    y[1] = -100
    for run in (formula, lambda *a, **k: gist_loss(*a, impl="reference", **k)):
        assert torch.autograd.gradcheck(
            lambda a, b, run=run: run(a, b, y, label_smoothing=0.1, reduction="none"), inputs
        )


# -- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(3, 1), (24, 2), (33, 100), (9, 1000), (4, 4099)])
@pytest.mark.parametrize("temperature", [3.0, 1.7])
def test_matches_float64(impl, device, dtype, rows, classes, temperature):
    z, g, y = case(rows, classes, dtype, device)
    y[rows // 2] = -100
    kept = scales(z, g, temperature)
    kept["grad_scale"] /= rows - 1
    check_against_float64(
        gist_loss,
        formula,
        (z, g),
        target=y,
        temperature=temperature,
        ours_options={"impl": impl},
        **kept,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 10.0])
@pytest.mark.parametrize("kind", ["classes", "smoothed", "soft", "soft smoothed"])
def test_targets_and_temperatures(impl, device, temperature, kind):
    z, g, y = case(13, 70, device=device)
    weight = 1.0
    if kind.startswith("soft"):
        y = torch.rand(13, 70, device=device) ** 8
        y = torch.where(y < 0.1, 0.0, y)  # mixup-like: most classes 0; rows need not sum to 1
        weight = max(1.0, float(y.sum(-1).max()))
    options = {"label_smoothing": 0.2 if "smoothed" in kind else 0.0, "temperature": temperature}
    grad = torch.randn(13, device=device)
    check_against_float64(
        gist_loss,
        formula,
        (z, g),
        target=y,
        grad=grad,
        reduction="none",
        ours_options={"impl": impl},
        **options,
        **{name: weight * terms for name, terms in scales(z, g, temperature).items()},
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_leading_dimensions_and_t_squared(impl, device, reduction):
    z, g, y = case(12, 37, device=device)
    z, g, y = z.view(3, 4, 37), g.view(3, 4, 37), y.view(3, 4)
    y[1, 2] = y[0, 0] = -1
    grad = torch.randn(3, 4, device=device) if reduction == "none" else torch.tensor(-2.5, device=device)
    loss, grads = check_against_float64(
        gist_loss,
        formula,
        (z, g),
        target=y,
        grad=grad,
        reduction=reduction,
        t_squared=True,
        ignore_index=-1,
        scale=12 * scales(z, g, 3.0, 9.0)["scale"],
        grad_scale=3 * scales(z, g, 3.0, 9.0)["grad_scale"],
        ours_options={"impl": impl},
    )
    assert loss.shape == (y.shape if reduction == "none" else ())
    assert all(bool((x[y == -1] == 0).all()) for x in grads)


def test_terms_of_weight_zero_are_absent(impl, device):
    z, g, y = case(6, 20, device=device)
    z[:, 3] = -torch.inf  # the divergence is +inf, the gist's cross-entropy NaN-free
    y[:] = 5
    ours = gist_loss(z, g, y, beta=0.0, impl=impl)
    torch.testing.assert_close(ours, F.cross_entropy(z, y) + 0.5 * F.cross_entropy(g, y))
    g[:, 5] = -torch.inf
    ours, grads = evaluate(lambda a, b: gist_loss(a, b, y, alpha=0.0, beta=0.0, impl=impl), (z, g), (True, True))
    torch.testing.assert_close(ours, F.cross_entropy(z, y))
    assert bool((grads[1] == 0).all())


def test_is_the_sum_of_its_parts(impl, device):
    z, g, y = case(9, 50, device=device)
    parts = F.cross_entropy(z, y) + 0.5 * F.cross_entropy(g, y) + 0.75 * bidirectional_kl(z, g, temperature=3.0)
    torch.testing.assert_close(gist_loss(z, g, y, impl=impl), parts)


# -- hard cases ------------------------------------------------------------------------------------------------------


def test_hard_01_zero_rows(impl, device):
    z, y = torch.randn(0, 5, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    loss, grads = evaluate(lambda a, b: gist_loss(a, b, y, impl=impl), (z, z.clone()), (True, True))
    assert float(loss) == 0.0 and all(g.shape == z.shape for g in grads)


def test_hard_02_03_bad_arguments(impl, device):
    z, g, y = case(4, 7, device=device)
    with pytest.raises(ValueError, match=r"gist_logits\.shape == logits\.shape.*got \(4, 6\) and \(4, 7\)"):
        gist_loss(z, g[:, :6], y, impl=impl)
    with pytest.raises(ValueError, match=r"expected target\.shape == \(4,\).*got \(5,\)"):
        gist_loss(z, g, torch.zeros(5, dtype=torch.int64, device=device), impl=impl)
    with pytest.raises(ValueError, match=r"expected target\.shape == \(4, 7\).*got \(4, 6\)"):
        gist_loss(z, g, torch.rand(4, 6, device=device), impl=impl)
    with pytest.raises(TypeError, match="int64"):
        gist_loss(z, g, y.int(), impl=impl)
    with pytest.raises(TypeError, match="logits is float32 and gist_logits is float16"):
        gist_loss(z, g.half(), y, impl=impl)
    with pytest.raises(ValueError, match="soft targets get no gradient"):
        gist_loss(z, g, torch.rand(4, 7, device=device, requires_grad=True), impl=impl)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        gist_loss(z, g, y, label_smoothing=1.5, impl=impl)
    with pytest.raises(ValueError, match="alpha must be a finite number, got nan"):
        gist_loss(z, g, y, alpha=float("nan"), impl=impl)
    with pytest.raises(ValueError, match="temperature must be finite and > 0, got 0.0"):
        gist_loss(z, g, y, temperature=0.0, impl=impl)


@pytest.mark.parametrize("soft", [False, True])
def test_hard_04_layouts(impl, device, soft):
    z, g, y = case(7, 66, device=device)
    if soft:
        y = torch.rand(7, 66, device=device)
    grad = torch.randn(7, device=device)
    exact = evaluate(lambda a, b: formula(a, b, y, reduction="none"), (z.double(), g.double()), (True, True), grad)
    plain = evaluate(lambda a, b: formula(a, b, y, reduction="none"), (z, g), (True, True), grad)
    weight = float(y.sum(-1).max()) if soft else 1.0
    limits = {k: v * weight * 3 for k, v in scales(z, g, 3.0).items()}
    targets = [t for _, t in layouts(y)] if soft else [y, y.repeat_interleave(3)[::3]]
    for ((_, z_laid), (_, g_laid)), target in zip(layout_pairs(z, g), itertools.cycle(targets)):
        strided = grad.repeat_interleave(2)[::2]
        loss, got = evaluate(
            lambda a, b, t=target: gist_loss(a, b, t, reduction="none", impl=impl),
            (z_laid, g_laid),
            (True, True),
            strided,
        )
        assert_within_budget(loss, plain[0], exact[0], what="loss", scale=limits["scale"])
        for mine, p, e in zip(got, plain[1], exact[1], strict=True):
            assert_within_budget(mine, p, e, what="gradient", scale=limits["grad_scale"])


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)))
def test_hard_06_07_subsets_poison_and_bad_rows(impl, device, wanted):
    z, g, y = case(8, 40, device=device)
    z[3, 4] = torch.nan
    with poisoned_allocations():
        loss, got = evaluate(lambda a, b: gist_loss(a, b, y, reduction="none", impl=impl), (z, g), wanted)
    rest = torch.arange(8, device=device) != 3
    clean = evaluate(
        lambda a, b: gist_loss(a, b, y[rest], reduction="none", impl=impl), (z[rest], g[rest]), (True, True)
    )
    assert bool(loss[3].isnan())
    assert_same(loss[rest], clean[0])
    for w, mine, want in zip(wanted, got, clean[1], strict=True):
        assert (mine is not None) == w
        if w:
            assert_same(mine[rest], want)
            assert bool(mine[3].isnan().any())


def test_hard_07_second_backward_and_double_backward(impl, device):
    z, g, y = case(5, 12, device=device)
    z.requires_grad_()
    loss = gist_loss(z, g, y, impl=impl)
    (first,) = torch.autograd.grad(loss, z, torch.tensor(3.0, device=device), retain_graph=True)
    (again,) = torch.autograd.grad(loss, z, torch.tensor(3.0, device=device), retain_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="gist_loss: no second derivative"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_hard_12_absent_classes_and_infinite_rows(impl, device):
    z, g, y = case(5, 30, device=device)
    z[:, 20:] = g[:, 20:] = -torch.inf
    y = y % 20
    z[1, 3] = -torch.inf  # alone: the divergence of row 1 is +inf
    y[1] = 7
    loss, grads = evaluate(lambda a, b: gist_loss(a, b, y, reduction="none", impl=impl), (z, g), (True, True))
    assert bool(loss[1].isposinf()) and bool(grads[0][1].isnan().any())
    rest = torch.tensor([0, 2, 3, 4], device=device)
    exact, exact_grads = evaluate(
        lambda a, b: formula(a, b, y[rest], reduction="none"),
        (z[rest, :20].double(), g[rest, :20].double()),
        (True, True),
    )
    assert_within_budget(loss[rest], exact.float(), exact, scale=30.0)
    for mine, e in zip(grads, exact_grads, strict=True):
        assert_within_budget(mine[rest, :20], e.float(), e, scale=10.0)
        assert bool((mine[rest, 20:] == 0).all())


def test_hard_13_offsets_and_gaps(impl, device):
    z, g, y = case(4, 300, device=device)
    for offset in (100.0, 1000.0):
        far = (z + offset, g - offset)
        check_against_float64(
            lambda a, b, **k: gist_loss(a, b, y, **k),
            lambda a, b, **k: formula(a, b, y.to(a.device), **k),
            far,
            ours_options={"impl": impl},
            **scales(z, g, 3.0),
        )
    z, g = (torch.zeros(1, 5, dtype=torch.float16, device=device) for _ in range(2))
    z[0, 0], g[0, 1] = 60000.0, 60000.0
    y = torch.tensor([2], device=device)
    loss, grads = evaluate(lambda a, b: gist_loss(a, b, y, temperature=0.5, impl=impl), (z, g), (True, True))
    assert float(loss) == pytest.approx(60000 + 0.5 * 60000 + 0.75 * 240000)
    assert not any(bool(x.isnan().any()) for x in grads)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_hard_15_all_ignored_and_nan_behind_ignored_rows(impl, device, reduction):
    z, g, y = case(5, 21, device=device)
    z[2:] = torch.nan
    none = torch.full_like(y, -100)
    with poisoned_allocations():
        loss, grads = evaluate(lambda a, b: gist_loss(a, b, none, reduction=reduction, impl=impl), (z, g), (True, True))
    assert bool((loss == 0).all()) and all(bool((x == 0).all()) for x in grads)
    y[2:] = -100
    loss, grads = evaluate(lambda a, b: gist_loss(a, b, y, reduction=reduction, impl=impl), (z, g), (True, True))
    want, want_grads = evaluate(
        lambda a, b: gist_loss(a, b, y[:2], reduction=reduction, impl=impl), (z[:2], g[:2]), (True, True)
    )
    assert torch.equal(loss[:2] if reduction == "none" else loss, want)
    for mine, w in zip(grads, want_grads, strict=True):
        assert torch.equal(mine[:2], w) and bool((mine[2:] == 0).all())


@pytest.mark.parametrize("bad", [-1, 21, 127, 2**40])
def test_hard_15_targets_out_of_range(impl, device, bad):
    z, g, y = case(5, 21, device=device)
    y[3] = bad
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"gist_loss: target\[3\] is {bad}, and there are 21 classes"):
            gist_loss(z, g, y, impl=impl)
    else:
        loss, grads = evaluate(lambda a, b: gist_loss(a, b, y, reduction="none", impl=impl), (z, g), (True, True))
        rest = torch.arange(5, device=device) != 3
        assert bool(loss[3].isnan()) and bool(loss[rest].isfinite().all())
        assert all(bool(x[3].isnan().all()) and bool(x[rest].isfinite().all()) for x in grads)


@pytest.mark.parametrize("bad", [-1, 21, 100])
def test_hard_15_the_kernels_give_nan_for_an_impossible_target(impl, device, bad, monkeypatch):
    """What a GPU does, where nothing may look at the targets: shown on the CPU with the look taken out."""
    from fastgist.ops import gist_loss as module

    monkeypatch.setattr(module, "check_targets_in_range", lambda *_: None)
    z, g, y = case(5, 21, device=device)
    y[3] = bad
    loss, grads = evaluate(lambda a, b: gist_loss(a, b, y, reduction="none", impl=impl), (z, g), (True, True))
    rest = torch.arange(5, device=device) != 3
    assert bool(loss[3].isnan()) and bool(loss[rest].isfinite().all())
    assert all(bool(x[3].isnan().all()) and bool(x[rest].isfinite().all()) for x in grads)


@pytest.mark.parametrize("classes", [1, 127, 20011 if INTERPRETING else 50257])
def test_hard_16_class_counts(impl, device, classes):
    z, g, y = case(2, classes, device=device)
    check_against_float64(
        gist_loss,
        formula,
        (z, g),
        target=y,
        ours_options={"impl": impl},
        **scales(z, g, 3.0),
    )


def test_runs_are_bitwise_equal(impl, device):
    z, g, y = case(17, 517, device=device)
    first = evaluate(lambda a, b: gist_loss(a, b, y, impl=impl), (z, g), (True, True))
    again = evaluate(lambda a, b: gist_loss(a, b, y, impl=impl), (z, g), (True, True))
    assert torch.equal(first[0], again[0]) and all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("here", "there"), [(-1e9, -1e4), (torch.finfo(torch.float32).min, -1e9), (-1e4, -2e4)])
def test_hard_12_classes_masked_by_large_numbers(impl, device, here, there, temperature):
    """The two heads mask one class, or the first 32, by different large numbers: no probability, no effect."""
    y = torch.arange(32, 37, device=device)
    for classes in (1, 32):
        z, g, _ = case(5, 40, device=device)
        z[:, :classes], g[:, :classes] = here, there
        for alike in (False, True):
            if alike:
                g[:, classes:] = z[:, classes:]
            options = {"temperature": temperature, **scales(z[:, classes:], g[:, classes:], temperature)}
            _, grads = check_against_float64(
                gist_loss,
                formula,
                (z, g),
                target=y,
                ours_options={"impl": impl},
                **options,
            )
            assert all(bool((grad[:, :classes] == 0).all()) for grad in grads)


@pytest.mark.parametrize("width", [torch.float64, torch.float16])
def test_soft_targets_of_another_dtype(impl, device, width):
    z, g, _ = case(5, 7, device=device)
    soft = torch.rand(5, 7, device=device).softmax(-1).to(width)
    for kind in (torch.float32, torch.bfloat16):
        loss = gist_loss(z.to(kind), g.to(kind), soft, impl=impl)
        assert loss.dtype == torch.float32
    torch.testing.assert_close(gist_loss(z, g, soft, impl=impl), formula(z, g, soft.float()))


def test_float16_gradients_wait_for_their_loss_scale(impl, device):
    """A mean over a large vocabulary: 1 / V of 1 / M is below float16's range until the scale lifts it."""
    z, g, y = case(4, 5003, torch.float16, device=device)
    scale = torch.tensor(2.0**14, device=device)
    inputs = {"temperature": 10.0}
    _, grads = evaluate(lambda a, b, **k: gist_loss(a, b, y, impl=impl, **k), (z, g), (True, True), scale, **inputs)
    exact = evaluate(lambda a, b, **k: formula(a, b, y, **k), (z.double(), g.double()), (True, True), scale, **inputs)[
        1
    ]
    for grad, want in zip(grads, exact, strict=True):
        error = (grad.double() - want).abs() / want.abs().clamp(min=1e-12)
        assert float(error.median()) < 2.0**-11, "more than half an ulp of float16 in the typical element"


@pytest.mark.parametrize("soft", [False, True])
def test_blocks_of_rows_change_nothing(monkeypatch, soft):
    """The CPU works through blocks of rows: here of three, the last of two, with an ignored row in one of them only."""
    z, g, y = case(11, 7)
    y = torch.rand(11, 7).softmax(-1) if soft else y.index_fill(0, torch.tensor(5), -100)
    options = {"reduction": "none", "label_smoothing": 0.1, "impl": "reference"}
    row = torch.randn(11)
    whole = evaluate(lambda a, b, **k: gist_loss(a, b, y, **k), (z, g), (True, True), row, **options)
    monkeypatch.setattr(_numerics, "BLOCK_ELEMENTS", 3 * 7 + 1)
    blocks = evaluate(lambda a, b, **k: gist_loss(a, b, y, **k), (z, g), (True, True), row, **options)
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=1e-7)
