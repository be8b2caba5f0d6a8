"""topk_kl against float64 by dense expansion. Hard cases 1-7 are here, by number; 12-16 in tests/hard."""

from __future__ import annotations

import itertools

import pytest
import torch
from losses import assert_same, check_against_float64, evaluate
from topk_cases import case, check, expanded, expected, rows_of, scales

from fastgist.functional import bidirectional_kl, topk_kl
from fastgist.reference import _numerics
from fastgist.reference.topk_kl import DIRECTIONS, sparse_teacher
from fastgist.reference.topk_kl import topk_kl as formula
from fastgist.testing import layouts, poisoned_allocations

OP = "topk_kl"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)


# -- the formula itself ----------------------------------------------------------------------------------------------


@every_direction
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_formula_and_derived_gradients_are_the_expansion(direction, temperature):
    z, t, i = (x.double() if x.is_floating_point() else x for x in case(6, 11, 4, temperature=temperature))
    options = {"temperature": temperature, "direction": direction}
    want = evaluate(lambda a: expanded(a, t, i, **options), (z,), (True,))
    for function in (formula, topk_kl):
        got = evaluate(lambda a, f=function: f(a, t, i, **options), (z,), (True,))
        torch.testing.assert_close(got, want)


@every_direction
def test_gradcheck(direction):
    z, t, i = case(3, 6, 2)
    mask = torch.tensor([True, False, True])
    for function in (formula, topk_kl):
        assert torch.autograd.gradcheck(
            lambda a, f=function: f(
                a, t.double(), i, temperature=2.0, direction=direction, mask=mask, reduction="none"
            ),
            z.double().requires_grad_(),
        )


def test_the_teachers_rest_is_exact_where_it_is_tiny_and_absent_where_rounding_hides_it():
    i = torch.tensor([[3, 0]])
    for log_q, want in (
        ([-1e-20, -torch.inf], 1e-20),
        ([-1e-9, -40.0], 1e-9 - 4.2483542552915889e-18),
        ([-torch.inf, -torch.inf], 1.0),
    ):
        log_rest = sparse_teacher(torch.tensor([log_q]), i, 5)[2]
        torch.testing.assert_close(log_rest.exp(), torch.tensor([want], dtype=torch.float64), rtol=1e-6, atol=0)
    for dtype in (torch.float32, torch.bfloat16):
        all_but_one = torch.full((1, 9), 1 / 9).log().to(dtype)
        assert float(sparse_teacher(all_but_one, torch.arange(9)[None], 10)[2]) == -torch.inf
        assert float(sparse_teacher(all_but_one[:, :8], torch.arange(8)[None], 10)[2].exp()) == pytest.approx(
            1 / 9, rel=0.1
        )


# -- accuracy --------------------------------------------------------------------------------------------------------


@every_direction
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes", "known"), [(5, 2, 1), (9, 100, 7), (6, 127, 126), (3, 4099, 64)])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_matches_float64(impl, device, dtype, rows, classes, known, temperature, direction):
    z, t, i = case(rows, classes, known, dtype, device, temperature, likeliest=2 * known < classes)
    check(impl, z, t, i, temperature=temperature, direction=direction)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_all_classes_known_is_bidirectional_kl(impl, device, temperature):
    z, other = (torch.randn(7, 40, device=device) * 3 for _ in range(2))
    t, i = (other / temperature).log_softmax(-1), torch.rand(7, 40, device=device).argsort(-1)
    options = {"temperature": temperature, "reduction": "none"}
    ours = evaluate(lambda a: topk_kl(a, t.gather(-1, i), i, impl=impl, **options), (z,), (True,))
    want = evaluate(lambda a: bidirectional_kl(a, other, **options), (z,), (True,))
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("masked", [False, True])
def test_reductions_masks_and_leading_dimensions(impl, device, reduction, masked):
    z, t, i = (x.view(3, 4, -1) for x in case(12, 37, 5, device=device, temperature=3.0))
    mask = (torch.arange(12, device=device) % 3 != 0).view(3, 4) if masked else None
    grad = torch.randn(3, 4, device=device) if reduction == "none" else torch.tensor(1.7, device=device)
    options = {"reduction": reduction, "t_squared": True, "temperature": 3.0}
    loss, _ = check_against_float64(
        lambda a, **k: topk_kl(a, t, i, impl=impl, **k),
        lambda a, **k: expected(a, t.to(a.device), i.to(a.device), **k),
        (z,),
        grad=grad,
        scale=12 * 9 * scales(z, t, i, 3.0)["scale"],
        grad_scale=9 * scales(z, t, i, 3.0)["grad_scale"] * float(grad.abs().max()),
        mask=mask,
        **options,
    )
    assert loss.shape == (z.shape[:-1] if reduction == "none" else ())
    if masked and reduction == "none":
        assert bool((loss[~mask] == 0).all())


def test_divisor(impl, device):
    z, t, i = case(6, 21, 4, device=device)
    mask = torch.arange(6, device=device) != 2
    total, (grad,) = evaluate(lambda a: topk_kl(a, t, i, mask=mask, reduction="sum", impl=impl), (z,), (True,))
    for divisor in (7, 2.5, torch.tensor(2.5, device=device)):
        loss, (got,) = evaluate(lambda a, n=divisor: topk_kl(a, t, i, mask=mask, divisor=n, impl=impl), (z,), (True,))
        torch.testing.assert_close(loss, total / float(divisor))
        torch.testing.assert_close(got, grad / float(divisor))
    for divisor, reduction, message in (
        (0.0, "mean", "divisor must be finite and > 0, got 0.0"),
        (torch.ones(2), "mean", r"divisor must be one number, got a tensor of shape \(2,\)"),
        (2.0, "sum", "divisor is what a mean divides by, and reduction is 'sum'"),
    ):
        with pytest.raises(ValueError, match=message):
            topk_kl(z, t, i, divisor=divisor, reduction=reduction, impl=impl)


def test_order_and_padding_change_nothing(impl, device):
    z, t, i = case(7, 300, 9, device=device)
    want = rows_of(impl, z, t, i)
    shuffled = torch.randperm(9, device=device)
    for a, b in zip(rows_of(impl, z, t[:, shuffled], i[:, shuffled]), want, strict=True):
        assert_same(a, b)
    pad = torch.full((7, 3), -1, device=device)
    padded = rows_of(impl, z, torch.cat((pad * torch.inf, t), -1), torch.cat((pad, i), -1))
    torch.testing.assert_close(padded, want, rtol=1e-6, atol=1e-7)
    nothing = rows_of(impl, z, pad * torch.inf, pad)  # a teacher of whom nothing is known teaches nothing
    assert all(bool((x == 0).all()) for x in nothing)


def test_more_classes_than_the_kernel_holds(impl, device):
    z, t, i = case(2, 1500, 1025, device=device)
    if impl == "triton":
        with pytest.raises(RuntimeError, match="impl='triton' takes up to 1024 classes a row, got 1025"):
            topk_kl(z, t, i, impl=impl)
    check("auto", z, t, i)
    check(impl, z, *(x[:, :1024] for x in (t, i)))


def test_saves_no_more_than_the_logits(impl, device):
    """Of size (M, V) the logits or the finished gradient, and nothing else."""
    z, t, i = case(64, 500, 3, device=device)
    z.requires_grad_()
    kept: list = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        topk_kl(z, t, i, impl=impl)
    assert sum(x.numel() * x.element_size() for x in kept) <= z.numel() * 4 + 64 * (3 * 12 + 8) + 8


# -- hard cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_hard_01_zero_rows(impl, device, shape):
    z, t = torch.randn(*shape, 5, device=device), torch.randn(*shape, 2, device=device)
    i = torch.zeros(*shape, 2, dtype=torch.int64, device=device)
    loss, (grad,) = evaluate(lambda a: topk_kl(a, t, i, impl=impl), (z,), (True,))
    assert float(loss) == 0.0 and grad.shape == z.shape
    assert topk_kl(z, t, i, reduction="none", impl=impl).shape == shape


def test_hard_02_03_bad_arguments(impl, device):
    z, t, i = case(4, 7, 2, device=device)
    for arguments, error, message in (
        ((z, t[:3], i), ValueError, r"expected teacher_log_probs\.shape == \(4, 'k'\) with k >= 1, got \(3, 2\)"),
        ((z, t[:, :0], i[:, :0]), ValueError, r"with k >= 1, got \(4, 0\)"),
        ((z, t, i[:, :1]), ValueError, r"expected teacher_indices\.shape == \(4, 2\).*got \(4, 1\)"),
        ((z, t, i.int()), TypeError, "teacher_indices must be an int64 Tensor, got torch.int32"),
        ((z, i, i), TypeError, "teacher_log_probs must be float32.*got int64"),
        ((z, t.clone().requires_grad_(), i), ValueError, "the teacher gets no gradient; detach teacher_log_probs"),
    ):
        with pytest.raises(error, match=f"topk_kl: .*{message}"):
            topk_kl(*arguments, impl=impl)
    with pytest.raises(ValueError, match="direction must be one of both, forward, reverse, got 'backward'"):
        topk_kl(z, t, i, direction="backward", impl=impl)
    with pytest.raises(ValueError, match=r"expected mask\.shape == \(4,\).*got \(5,\)"):
        topk_kl(z, t, i, mask=torch.ones(5, dtype=torch.bool, device=device), impl=impl)
    with pytest.raises(TypeError, match="mask must be a bool Tensor"):
        topk_kl(z, t, i, mask=torch.ones(4, device=device), impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hard_04_layouts(impl, device, dtype):
    z, t, i = case(9, 130, 6, dtype, device)
    grad = torch.randn(9, device=device)
    want = evaluate(lambda a: topk_kl(a, t, i, reduction="none", impl=impl), (z,), (True,), grad)
    for (_, laid), (_, t_laid), (_, i_laid) in itertools.zip_longest(
        layouts(z), layouts(t), [("as is", i), ("transposed", i.T.contiguous().T)], fillvalue=("as is", None)
    ):
        i_laid = i if i_laid is None else i_laid
        for strided in (grad, grad.repeat_interleave(2)[::2]):
            got = evaluate(
                lambda a, b=t_laid, j=i_laid: topk_kl(a, b, j, reduction="none", impl=impl), (laid,), (True,), strided
            )
            assert_same(got[0], want[0])
            assert_same(got[1][0], want[1][0])
    repeated = [x[:1].expand(9, -1) for x in (z, t, i)]
    got = evaluate(lambda a: topk_kl(a, *repeated[1:], reduction="none", impl=impl), repeated[:1], (True,), grad)
    same = [x.clone() for x in repeated]
    want = evaluate(lambda a: topk_kl(a, *same[1:], reduction="none", impl=impl), same[:1], (True,), grad)
    assert_same(got[0], want[0])
    assert_same(got[1][0], want[1][0])


@every_direction
@pytest.mark.parametrize("where", ["known", "rest", "teacher"])
def test_hard_06_one_bad_row_stays_alone(impl, device, where, direction):
    z, t, i = case(7, 33, 4, device=device)
    clean = rows_of(impl, z, t, i, direction=direction)
    for bad in (torch.nan, torch.inf)[: 1 if where == "teacher" else 2]:
        dirty, teacher = z.clone(), t.clone()
        at = int(i[3, 1]) if where == "known" else next(c for c in range(33) if c not in i[3].tolist())
        (teacher if where == "teacher" else dirty)[3, 1 if where == "teacher" else at] = bad
        keep = dirty.clone()
        with poisoned_allocations():
            loss, grad = rows_of(impl, dirty, teacher, i, direction=direction)
        assert torch.equal(dirty.nan_to_num(), keep.nan_to_num())
        others = torch.arange(7, device=device) != 3
        assert bool(loss[3].isnan()) and bool(grad[3].isnan().all())
        assert_same(loss[others], clean[0][others])
        assert_same(grad[others], clean[1][others])


def test_hard_07_without_gradient_second_backward_and_double_backward(impl, device):
    z, t, i = case(5, 12, 3, device=device)
    with_gradient, _ = rows_of(impl, z, t, i)
    assert not topk_kl(z, t, i, impl=impl).requires_grad
    assert_same(topk_kl(z, t, i, reduction="none", impl=impl), with_gradient)
    z.requires_grad_()
    with torch.no_grad():
        assert not topk_kl(z, t.requires_grad_(), i, impl=impl).requires_grad
    loss = topk_kl(z, t.detach(), i, impl=impl)
    (first,) = torch.autograd.grad(loss, z, torch.tensor(3.0, device=device), retain_graph=True)
    (again,) = torch.autograd.grad(loss, z, torch.tensor(3.0, device=device), retain_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="topk_kl: no second derivative"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_logits_in_place_of_log_probabilities():
    z, _, i = case(3, 9, 2)
    with pytest.raises(ValueError, match=r"teacher_log_probs\[0\] holds \d.*take log_softmax first"):
        topk_kl(z, z.abs().gather(-1, i) + 1, i)


def test_runs_are_bitwise_equal(impl, device):
    z, t, i = case(17, 2500, 33, device=device)
    for first, again in zip(rows_of(impl, z, t, i), rows_of(impl, z, t, i), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_change_nothing(monkeypatch, dtype):
    """The CPU works through blocks of rows: here of three, the last of two, with a masked row of NaN in one of them."""
    z, t, i = case(11, 7, 3, dtype)
    z[7] = torch.nan
    mask = torch.arange(11) != 7
    whole = rows_of("reference", z, t, i, mask=mask)
    monkeypatch.setattr(_numerics, "BLOCK_ELEMENTS", 3 * 7 + 1)
    torch.testing.assert_close(rows_of("reference", z, t, i, mask=mask), whole, rtol=1e-6, atol=1e-7)


def test_float16_gradients_wait_for_their_loss_scale(impl, device):
    z, t, i = case(4, 5003, 8, torch.float16, device, 10.0)
    scale = torch.tensor(2.0**14, device=device)
    options = {"temperature": 10.0}
    _, (grad,) = evaluate(lambda a: topk_kl(a, t, i, impl=impl, **options), (z,), (True,), scale)
    _, (want,) = evaluate(lambda a: formula(a, t, i, **options), (z.double(),), (True,), scale)
    error = (grad.double() - want).abs() / want.abs().clamp(min=1e-12)
    assert float(error.median()) < 2.0**-11, "more than half an ulp of float16 in the typical element"
