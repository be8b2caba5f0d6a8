"""bidirectional_kl on every implementation against float64. Hard cases 1-7, 11-16 for this op are here, by number."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import INTERPRETING
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import assert_same, check_against_float64, evaluate, gradient_terms, layout_pairs, loss_terms

from fastgist.functional import bidirectional_kl
from fastgist.reference import _numerics
from fastgist.reference.bidirectional_kl import bidirectional_kl as formula
from fastgist.testing import assert_within_budget, poisoned_allocations

OP = "bidirectional_kl"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def logits(rows, classes, dtype=torch.float32, spread=3.0, device="cpu"):
    return [(torch.randn(rows, classes, device=device) * spread).to(dtype) for _ in range(2)]


# -- the formula itself ----------------------------------------------------------------------------------------------


def test_formula_is_the_sum_of_the_two_divergences():
    z, o = logits(6, 11)
    z, o = z.double(), o.double()
    for t in (0.5, 1.0, 3.0):
        p, q = (x.div(t).softmax(-1) for x in (z, o))
        kl = torch.nn.functional.kl_div
        both = kl(q.log(), p, reduction="batchmean") + kl(p.log(), q, reduction="batchmean")
        torch.testing.assert_close(formula(z, o, temperature=t), both)


def test_formula_gradcheck():
    z, o = (x.double().requires_grad_() for x in logits(3, 5))
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda a, b: formula(a, b, temperature=2.0, mask=mask), (z, o))
    assert torch.autograd.gradcheck(
        lambda a, b: bidirectional_kl(a, b, temperature=2.0, mask=mask, reduction="none", impl="reference"), (z, o)
    )


# -- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (40, 2), (33, 100), (16, 127), (9, 1000), (5, 4099)])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_matches_float64(impl, device, dtype, rows, classes, temperature):
    z, o = logits(rows, classes, dtype, device=device)
    check_against_float64(
        bidirectional_kl,
        formula,
        (z, o),
        scale=loss_terms(z, o, temperature),
        grad_scale=gradient_terms(z, o, temperature) / rows,
        temperature=temperature,
        reduction="batchmean",
        ours_options={"impl": impl},
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("t_squared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_reductions_masks_and_leading_dimensions(impl, device, reduction, t_squared, masked):
    z, o = (x.view(3, 4, 37) for x in logits(12, 37, device=device))
    mask = (torch.arange(12, device=device) % 3 != 0).view(3, 4) if masked else None
    grad = torch.randn(3, 4, device=device) if reduction == "none" else torch.tensor(1.7, device=device)
    loss, _ = check_against_float64(
        bidirectional_kl,
        formula,
        (z, o),
        grad=grad,
        scale=12.0 * 9.0 * loss_terms(z, o, 3.0),
        grad_scale=gradient_terms(z, o, 3.0) * (9.0 if t_squared else 1.0) * float(grad.abs().max()),
        temperature=3.0,
        reduction=reduction,
        t_squared=t_squared,
        mask=mask,
        ours_options={"impl": impl},
    )
    assert loss.shape == (z.shape[:-1] if reduction == "none" else ())
    if masked and reduction == "none":
        assert bool((loss[~mask] == 0).all())


@pytest.mark.parametrize("classes", [20011] if INTERPRETING else [50257, 131073])
def test_hard_16_long_rows(impl, device, classes):
    z, o = logits(1, classes, torch.float16, device=device)
    check_against_float64(
        bidirectional_kl,
        formula,
        (z, o),
        scale=loss_terms(z, o, 3.0),
        grad_scale=gradient_terms(z, o, 3.0),
        temperature=3.0,
        ours_options={"impl": impl},
    )


def test_float64_is_served_by_the_reference(device):
    z, o = (x.double() for x in logits(4, 9, device=device))
    torch.testing.assert_close(bidirectional_kl(z, o), formula(z, o))
    assert bidirectional_kl(z, o).dtype == torch.float64


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 6),
    classes=st.integers(1, 70),
    temperature=st.floats(0.25, 10.0),
    spread=st.floats(0.0, 20.0),
    offset=st.floats(-50.0, 50.0),
    seed=st.integers(0, 2**31),
)
def test_properties(rows, classes, temperature, spread, offset, seed):
    """Symmetric, never negative beyond the floor, blind to row constants; gradients swap and sum to zero over a row."""
    generator = torch.Generator().manual_seed(seed)
    z, o = (torch.randn(rows, classes, generator=generator) * spread for _ in range(2))
    loss, (gz, go) = evaluate(bidirectional_kl, (z, o), (True, True), temperature=temperature, reduction="sum")
    swapped, (hz, ho) = evaluate(bidirectional_kl, (o, z), (True, True), temperature=temperature, reduction="sum")
    exact = formula(z.double(), o.double(), temperature=temperature, reduction="none")
    scale = float((z.abs().amax(-1) + o.abs().amax(-1)).sum()) / temperature + 1e-3
    for value in (loss, swapped):
        assert_within_budget(value, exact.sum().float(), exact.sum(), scale=scale)
    assert float(loss) >= -1e-6 * scale
    exact_grads = evaluate(formula, (z.double(), o.double()), (True, True), temperature=temperature, reduction="sum")[1]
    plain_grads = evaluate(formula, (z, o), (True, True), temperature=temperature, reduction="sum")[1]
    gradient_scale = gradient_terms(z, o, temperature)
    for mine, mirrored, plain, want in zip((gz, go), (ho, hz), plain_grads, exact_grads, strict=True):
        assert_within_budget(mine, plain, want, scale=gradient_scale)
        assert_within_budget(mirrored, plain, want, scale=gradient_scale)
    moved, _ = evaluate(
        bidirectional_kl, ((z + offset), (o - offset)), (False, False), temperature=temperature, reduction="sum"
    )
    exact_moved = formula((z + offset).double(), (o - offset).double(), temperature=temperature, reduction="none").sum()
    assert_within_budget(moved, exact_moved.float(), exact_moved, scale=scale)


# -- hard cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_hard_01_zero_rows(impl, device, shape):
    z, o = torch.randn(shape, device=device), torch.randn(shape, device=device)
    loss, grads = evaluate(bidirectional_kl, (z, o), (True, True), reduction="none", impl=impl)
    assert loss.shape == shape[:-1] and all(g.shape == shape for g in grads)
    mean, grads = evaluate(bidirectional_kl, (z, o), (True, True), impl=impl)
    assert float(mean) == 0.0 and all(g.shape == shape for g in grads)


def test_hard_02_mismatched_shapes(impl, device):
    z = torch.randn(4, 7, device=device)
    with pytest.raises(ValueError, match=r"bidirectional_kl: expected other_logits\.shape == \(4, 7\).*got \(4, 8\)"):
        bidirectional_kl(z, torch.randn(4, 8, device=device), impl=impl)
    with pytest.raises(ValueError, match=r"other_logits\.shape == \(4, 7\)"):
        bidirectional_kl(z, torch.randn(3, 7, device=device), impl=impl)
    with pytest.raises(ValueError, match=r"mask\.shape == \(4,\).*got \(5,\)"):
        bidirectional_kl(z, z, mask=torch.ones(5, dtype=torch.bool, device=device), impl=impl)
    with pytest.raises(TypeError, match="mask must be a bool Tensor"):
        bidirectional_kl(z, z, mask=torch.ones(4, device=device), impl=impl)
    with pytest.raises(ValueError, match="class dimension"):
        bidirectional_kl(z[0, 0], z[0, 0], impl=impl)


def test_hard_03_mixed_dtypes(impl, device):
    z = torch.randn(4, 7, device=device)
    with pytest.raises(TypeError, match="logits is float32 and other_logits is bfloat16"):
        bidirectional_kl(z, z.bfloat16(), impl=impl)
    with pytest.raises(TypeError, match="int64"):
        bidirectional_kl(z.long(), z.long(), impl=impl)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        mixed = bidirectional_kl(z, z.flip(0).bfloat16(), impl=impl)
    torch.testing.assert_close(mixed, bidirectional_kl(z, z.flip(0).bfloat16().float(), impl=impl))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hard_04_layouts(impl, device, dtype):
    z, o = logits(9, 130, dtype, device=device)
    grad = torch.randn(9, device=device)
    exact_loss, exact = evaluate(formula, (z.double(), o.double()), (True, True), grad, reduction="none")
    plain_loss, plain = evaluate(formula, (z, o), (True, True), grad, reduction="none")
    grad_scale = gradient_terms(z, o, 1.0) * float(grad.abs().max())
    for (name_z, z_laid), (name_o, o_laid) in layout_pairs(z, o):
        for strided in (grad, grad.repeat_interleave(2)[::2]):
            loss, got = evaluate(bidirectional_kl, (z_laid, o_laid), (True, True), strided, reduction="none", impl=impl)
            assert_within_budget(loss, plain_loss, exact_loss, what=f"loss, {name_z} x {name_o}")
            for g, p, e in zip(got, plain, exact, strict=True):
                assert_within_budget(g, p, e, what=f"gradient, {name_z} x {name_o}", scale=grad_scale)
    repeated = z[:1].expand(9, 130)
    loss, got = evaluate(bidirectional_kl, (repeated, o), (True, True), grad[:1].expand(9), reduction="none", impl=impl)
    same_loss, same = evaluate(
        bidirectional_kl, (repeated.clone(), o), (True, True), grad[:1].repeat(9), reduction="none", impl=impl
    )
    for a, b in zip((loss, *got), (same_loss, *same), strict=True):
        assert_same(a, b)


def test_hard_06_one_bad_row_stays_alone(impl, device):
    for bad in (torch.nan, torch.inf):
        z, o = logits(7, 33, device=device)
        z[3, 5] = bad
        keep = [x.clone() for x in (z, o)]
        with poisoned_allocations():
            loss, grads = evaluate(bidirectional_kl, (z, o), (True, True), reduction="none", impl=impl)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip((z, o), keep, strict=True))
        others = torch.arange(7, device=device) != 3
        assert bool(loss[3].isnan()) and bool(loss[others].isfinite().all())
        for g in grads:
            assert bool(g[3].isnan().any()) and bool(g[others].isfinite().all())


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)))
def test_hard_07_gradient_subsets(impl, device, wanted):
    z, o = logits(6, 40, device=device)
    grad = torch.randn(6, device=device)
    exact = evaluate(formula, (z.double(), o.double()), (True, True), grad, reduction="none", temperature=2.0)[1]
    plain = evaluate(formula, (z, o), (True, True), grad, reduction="none", temperature=2.0)[1]
    with poisoned_allocations():
        got = evaluate(bidirectional_kl, (z, o), wanted, grad, reduction="none", temperature=2.0, impl=impl)[1]
    for w, g, p, e in zip(wanted, got, plain, exact, strict=True):
        assert (g is not None) == w
        if w:
            assert_within_budget(g, p, e)


def test_hard_07_second_backward_and_double_backward(impl, device):
    z, o = (x.requires_grad_() for x in logits(4, 9, device=device))
    loss = bidirectional_kl(z, o, impl=impl)
    first = torch.autograd.grad(loss, (z, o), torch.tensor(2.0, device=device), retain_graph=True)
    second = torch.autograd.grad(loss, (z, o), torch.tensor(2.0, device=device), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="bidirectional_kl: no second derivative"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_hard_12_absent_classes(impl, device):
    z, o = logits(6, 50, device=device)
    z[:, 7] = o[:, 7] = -torch.inf
    z[:, 40:] = o[:, 40:] = -torch.inf
    loss, grads = evaluate(bidirectional_kl, (z, o), (True, True), reduction="none", temperature=3.0, impl=impl)
    kept = [x[:, torch.tensor([i for i in range(40) if i != 7], device=device)] for x in (z, o)]
    options = {"reduction": "none", "temperature": 3.0}
    exact_loss, exact_grads = evaluate(formula, [x.double() for x in kept], (True, True), **options)
    plain_loss, plain_grads = evaluate(formula, kept, (True, True), **options)
    assert_within_budget(loss, plain_loss, exact_loss, scale=10.0)
    for g, p, e in zip(grads, plain_grads, exact_grads, strict=True):
        assert bool((g[:, 7] == 0).all()) and bool((g[:, 40:] == 0).all())
        assert_within_budget(torch.cat([g[:, :7], g[:, 8:40]], 1), p, e, scale=gradient_terms(*kept, 3.0))


def test_hard_12_infinite_and_empty_rows(impl, device):
    z, o = logits(5, 50, device=device)
    z[0, 3] = -torch.inf  # q > 0 where p = 0
    o[1, 3] = -torch.inf  # p > 0 where q = 0
    z[2, 3] = -300.0 * 3
    o[2, 3] = -torch.inf  # the same where p underflows float32: still +inf
    z[3] = -torch.inf
    for temperature in (1.0, 3.0):
        loss, grads = evaluate(
            bidirectional_kl, (z, o), (True, True), reduction="none", temperature=temperature, impl=impl
        )
        assert bool(loss[:3].isposinf().all()), loss
        assert bool(loss[3].isnan()) and bool(loss[4].isfinite())
        for g in grads:
            assert bool(g[:4].isnan().any(-1).all()) and bool(g[4].isfinite().all())
    z[4] = o[4] = -torch.inf
    assert bool(bidirectional_kl(z, o, reduction="none", impl=impl)[4].isnan())


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0, 100.0])
def test_hard_13_equal_sides_and_offsets(impl, device, temperature):
    z = torch.randn(4, 300, device=device) * 3
    loss, grads = evaluate(bidirectional_kl, (z, z.clone()), (True, True), temperature=temperature, impl=impl)
    assert float(loss.abs()) <= 1e-6 and all(float(g.abs().max()) <= 1e-6 / temperature for g in grads)
    o = z + 0.005 * torch.randn_like(z)  # J ~ 1e-5 at T = 1
    for shift in (0.0, 100.0):
        near = [(z + shift).contiguous(), o]
        exact = formula(near[0].double(), near[1].double(), temperature=temperature, reduction="none")
        ours = bidirectional_kl(*near, temperature=temperature, reduction="none", impl=impl)
        assert bool(((ours - exact).abs() <= 1e-3 * exact + 1e-10).all()), (shift, ours, exact)


@pytest.mark.parametrize(("top", "temperature"), [(1e4, 3.0), (60.0, 0.07), (60.0, 0.0013)])
def test_hard_13_a_few_large_logits_lose_no_accuracy(impl, device, top, temperature):
    """Plain PyTorch on a CPU looks at some classes alone, and used to divide by T what it had not seen: wrong by 2e-3."""
    z, o = logits(3, 127, device=device)
    for x in (z, o):
        x[:, 55:57] = top + temperature * torch.rand(3, 2, device=device)  # of classes that are not looked at
    options = {"scale": loss_terms(z, o, temperature), "grad_scale": gradient_terms(z, o, temperature)}
    options |= {"temperature": temperature, "ours_options": {"impl": impl}}
    check_against_float64(bidirectional_kl, formula, (z, o), **options)


def test_hard_13_huge_gaps(impl, device):
    for gap in (320.0, 1e4):
        z, o = torch.zeros(1, 5, device=device), torch.zeros(1, 5, device=device)
        z[0, 0], o[0, 1] = gap, gap
        options = {"scale": loss_terms(z, o, 3.0), "temperature": 3.0, "ours_options": {"impl": impl}}
        check_against_float64(bidirectional_kl, formula, (z, o), **options)
    z, o = (torch.zeros(1, 5, dtype=torch.float16, device=device) for _ in range(2))
    z[0, 0], o[0, 1] = 60000.0, 60000.0
    loss, grads = evaluate(bidirectional_kl, (z, o), (True, True), temperature=0.5, impl=impl)
    assert float(loss) == pytest.approx(240000.0) and not any(bool(g.isnan().any()) for g in grads)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_hard_14_bad_temperature(impl, temperature):
    z = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"bidirectional_kl: temperature must be finite and > 0, got"):
        bidirectional_kl(z, z, temperature=temperature, impl=impl)
    with pytest.raises(TypeError, match="synchronise"):
        bidirectional_kl(z, z, temperature=torch.tensor(1.0), impl=impl)
    with pytest.raises(ValueError, match="reduction must be one of"):
        bidirectional_kl(z, z, reduction="average", impl=impl)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_hard_15_all_masked_and_nan_behind_the_mask(impl, device, reduction):
    z, o = logits(5, 21, device=device)
    z[2:] = torch.nan
    none = torch.zeros(5, dtype=torch.bool, device=device)
    with poisoned_allocations():
        loss, grads = evaluate(bidirectional_kl, (z, o), (True, True), mask=none, reduction=reduction, impl=impl)
    assert bool((loss == 0).all()) and all(bool((g == 0).all()) for g in grads)
    some = torch.arange(5, device=device) < 2
    with poisoned_allocations():
        loss, grads = evaluate(bidirectional_kl, (z, o), (True, True), mask=some, reduction=reduction, impl=impl)
    want, want_grads = evaluate(bidirectional_kl, (z[:2], o[:2]), (True, True), reduction=reduction, impl=impl)
    assert torch.equal(loss[:2] if reduction == "none" else loss, want)
    for g, w in zip(grads, want_grads, strict=True):
        assert torch.equal(g[:2], w) and bool((g[2:] == 0).all())


def test_runs_are_bitwise_equal(impl, device):
    z, o = logits(33, 517, device=device)
    first = evaluate(bidirectional_kl, (z, o), (True, True), temperature=3.0, impl=impl)
    again = evaluate(bidirectional_kl, (z, o), (True, True), temperature=3.0, impl=impl)
    assert torch.equal(first[0], again[0]) and all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_hard_11_explicit_implementations_are_taken_or_refused():
    z = torch.randn(2, 3)
    with pytest.raises(ValueError, match="impl must be one of auto, triton, cuda, native, reference, got 'tritno'"):
        bidirectional_kl(z, z, impl="tritno")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_change_nothing(monkeypatch, dtype):
    """The CPU works through blocks of rows: here of three, the last of two, with a masked row of NaN in one of them."""
    z, other = (torch.randn(11, 7).to(dtype) for _ in range(2))
    z[7] = torch.nan
    mask = torch.arange(11) != 7
    row = torch.randn(11)
    options = {"reduction": "none", "mask": mask, "temperature": 2.0, "impl": "reference"}
    whole = evaluate(bidirectional_kl, (z, other), (True, True), row, **options)
    monkeypatch.setattr(_numerics, "BLOCK_ELEMENTS", 3 * 7 + 1)
    blocks = evaluate(bidirectional_kl, (z, other), (True, True), row, **options)
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=1e-7)
