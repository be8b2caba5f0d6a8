"""topk_kl on every implementation against float64 by dense expansion. Hard cases 1-7 and 12-16 are here, by number."""

from __future__ import annotations

import itertools

import pytest
import torch
from losses import assert_same, check_against_float64, evaluate

from fastgist.functional import bidirectional_kl, topk_kl
from fastgist.ops import topk_kl as module
from fastgist.recipes.mutual import topk_of
from fastgist.reference import _numerics
from fastgist.reference.topk_kl import DIRECTIONS, sparse_teacher
from fastgist.reference.topk_kl import topk_kl as formula
from fastgist.testing import assert_within_budget, layouts, poisoned_allocations

OP = "topk_kl"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)


def case(rows, classes, known, dtype=torch.float32, device="cpu", temperature=1.0, likeliest=True):
    """A student's logits, and a teacher's log-probabilities of the classes it finds likeliest, or least likely."""
    z = (torch.randn(rows, classes, device=device) * 3).to(dtype)
    log_probs, indices = topk_of(torch.randn(rows, classes, device=device).double() * 3, classes, temperature)
    part = slice(known) if likeliest else slice(classes - known, None)
    return z, log_probs[:, part].float(), indices[:, part]


def expanded(z, t, i, *, temperature=1.0, direction="both", reduction="batchmean", mask=None, t_squared=False):
    """Row by row: probabilities of all classes, those of the others added up, and KL as the sum that defines it."""
    rows = []
    for row, log_q, classes in zip(z.flatten(0, -2), t.flatten(0, -2), i.flatten(0, -2).tolist(), strict=True):
        probs, q = (row / temperature).softmax(-1), log_q.to(row.dtype).exp()
        others = [c for c in range(len(row)) if c not in set(classes)]
        if others:
            q = torch.cat((q, 1 - q.sum(0, keepdim=True)))
        p = torch.stack([probs[c] for c in classes] + [probs[others].sum()][: len(others)])
        kl = {"reverse": (p * (p / q).log()).sum(), "forward": (q * (q / p).log()).sum()}
        rows.append(kl["reverse"] + kl["forward"] if direction == "both" else kl[direction])
    loss = torch.stack(rows).view(z.shape[:-1]) * (temperature**2 if t_squared else 1)
    loss = loss if mask is None else loss * mask
    counted = loss.numel() if mask is None else int(mask.sum())
    return {"none": loss, "sum": loss.sum()}.get(reduction, loss.sum() / counted)


def expected(z, *args, **options):
    """The exact value by expansion; in the student's own dtype, the formula in plain torch."""
    return (expanded if z.dtype == torch.float64 else formula)(z, *args, **options)


def scales(z, t, i, temperature):
    """Sums of absolute terms: (p + q)(|log p| + |log q|) of a row, p (|d| + E|d|) + p + q of a gradient."""
    log_p = (z.double() / temperature).log_softmax(-1)
    log_q, i, log_rest = sparse_teacher(t.double(), i, z.shape[-1])
    others = log_p.scatter(-1, i, -torch.inf).logsumexp(-1, keepdim=True)
    both = [torch.cat((log_p.gather(-1, i), others), -1), torch.cat((log_q, log_rest[..., None]), -1)]
    size = sum(x.abs().nan_to_num(0.0, 0.0, 0.0) for x in both)
    p, q = (x.exp() for x in both)
    gradient = p * (size + (p * size).sum(-1, keepdim=True)) + p + q
    return {"scale": float(((p + q) * size).sum(-1).max()), "grad_scale": float(gradient.max()) / temperature}


def check(impl, z, t, i, *, grad=None, factor=1.0, temperature=1.0, **options):
    found = {name: factor * value for name, value in scales(z, t, i, temperature).items()}
    return check_against_float64(
        lambda a, **k: topk_kl(a, t, i, impl=impl, **k),
        lambda a, **k: expected(a, t.to(a.device), i.to(a.device), **k),
        (z,),
        grad=grad,
        temperature=temperature,
        **found,
        **options,
    )


def rows_of(impl, z, t, i, **options):
    loss, (grad,) = evaluate(lambda a: topk_kl(a, t, i, reduction="none", impl=impl, **options), (z,), (True,))
    return loss, grad


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


@every_direction
def test_hard_12_absent_classes(impl, device, direction):
    """Classes at -inf in both, known ones and others, are as if they were not there."""
    z, t, i = case(6, 30, 5, device=device)
    wide = torch.full((6, 50), -torch.inf, device=device)
    wide[:, :30] = z
    absent = torch.tensor([[40, 33]], device=device).expand(6, -1)
    more = torch.cat((t, absent * -torch.inf), -1), torch.cat((i, absent), -1)
    loss, grad = rows_of(impl, wide, *more, direction=direction)
    want, want_grad = rows_of(impl, z, t, i, direction=direction)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[:, :30], want_grad, rtol=1e-6, atol=1e-6)
    assert bool((grad[:, 30:] == 0).all())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_hard_12_infinite_and_empty_rows(impl, device, temperature):
    z, t, i = case(7, 50, 4, device=device, temperature=temperature)
    rest = torch.ones_like(z, dtype=torch.bool).scatter(-1, i, False)
    z[0, i[0, 2]] = -torch.inf  # q > 0 where p = 0, a known class
    z[1, rest[1]] = -torch.inf  # and the rest
    t[2, 1] = -torch.inf  # p > 0 where q = 0, a known class
    t[3] = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])  # all other classes, and the rest
    t[4, 1] = -torch.inf  # the same where p underflows float32: still +inf
    z[4, i[4, 1]] = -3000.0
    z[5] = -torch.inf
    infinite = {"forward": [0, 1], "reverse": [2, 3, 4], "both": [0, 1, 2, 3, 4]}
    for direction, rows in infinite.items():
        loss, grad = rows_of(impl, z, t, i, temperature=temperature, direction=direction)
        bad = torch.zeros(7, dtype=torch.bool, device=device)
        bad[rows] = True
        assert torch.equal(loss.isposinf(), bad), (direction, loss)
        bad[5] = True
        assert (
            bool(loss[5].isnan()) and torch.equal(grad.isnan().all(-1), bad) and torch.equal(grad.isnan().any(-1), bad)
        )
        exact = formula(z.double(), t.double(), i, temperature=temperature, direction=direction, reduction="none")
        assert_within_budget(loss[~bad], exact[~bad].float(), exact[~bad], scale=100.0)


@every_direction
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_hard_13_equal_sides_and_offsets(impl, device, temperature, direction):
    z = torch.randn(4, 300, device=device) * 3
    t, i = (z / temperature).log_softmax(-1).topk(20)
    scale = scales(z, t, i, temperature)["scale"]
    loss, grad = rows_of(impl, z, t, i, temperature=temperature, direction=direction)
    few = 8 * torch.finfo(torch.float32).eps
    assert float(loss.abs().max()) <= few * scale and float(grad.abs().max()) <= few * scale / temperature
    far, far_grad = rows_of(impl, z + 128.0, t, i, temperature=temperature, direction=direction)
    exact = formula((z + 128.0).double(), t, i, temperature=temperature, direction=direction, reduction="none")
    assert_within_budget(far, exact.float(), exact, scale=scale)
    assert float(far_grad.abs().max()) <= 128 * few / temperature, "what z + 128 rounds off, and no more"


@every_direction
def test_hard_13_huge_gaps_and_a_tiny_rest(impl, device, direction):
    for gap in (100.0, 320.0, 1e4):
        z = torch.full((2, 40), -gap, device=device)  # the rest has exp(-gap) of the student's mass
        i = torch.tensor([[7, 3], [0, 39]], device=device)
        z.scatter_(-1, i, torch.tensor([[0.0, 1.0], [2.0, -3.0]], device=device))
        t = torch.tensor([[-0.5, -1.5], [-30.0, -1e-6]], device=device)
        loss, grad = rows_of(impl, z, t, i, direction=direction)
        # By hand: log p of the two, of the rest, and the teacher's rest.
        known = z.double().gather(-1, i)
        log_p = torch.cat((known, torch.full_like(known[:, :1], -gap + torch.tensor(38.0).double().log())), -1)
        log_p = log_p - known.logsumexp(-1, keepdim=True)
        q = torch.cat((t.double().exp(), -torch.expm1(t.double().exp().sum(-1, keepdim=True).log())), -1)
        p, d = log_p.exp(), log_p - q.log()
        exact = {"reverse": (p * d).sum(-1), "forward": -(q * d).sum(-1), "both": ((p - q) * d).sum(-1)}[direction]
        assert_within_budget(loss, exact.float(), exact)
        sides = {"reverse": p * (d - (p * d).sum(-1, keepdim=True)), "forward": p - q}
        pull = sum(sides.values()) if direction == "both" else sides[direction]
        want = (pull[:, 2:] / 38).expand(2, 40).scatter(-1, i, pull[:, :2])
        assert_within_budget(grad, want.float(), want, scale=float((p * d).abs().max()) + 1.0)
    z = torch.zeros(1, 5, dtype=torch.float16, device=device)
    z[0, 0] = 60000.0
    t, i = torch.full((1, 1), -1.0, device=device), torch.tensor([[1]], device=device)
    loss, grad = rows_of(impl, z, t, i, temperature=0.5, direction=direction)
    assert bool(loss.isfinite().all()) and bool(grad.isfinite().all())
    assert direction == "reverse" or float(loss) == pytest.approx(120000 * float(t.exp()), rel=0.1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_hard_14_bad_temperature(impl, temperature):
    z, t, i = case(2, 3, 1)
    with pytest.raises(ValueError, match="topk_kl: temperature must be finite and > 0, got"):
        topk_kl(z, t, i, temperature=temperature, impl=impl)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_hard_15_all_masked_and_anything_behind_the_mask(impl, device, reduction):
    z, t, i = case(5, 21, 3, device=device)
    want, (want_grad,) = evaluate(lambda a: topk_kl(a, t[:2], i[:2], reduction=reduction, impl=impl), (z[:2],), (True,))
    z[2:], t[3:], i[3], i[4] = torch.nan, torch.nan, 2**40, i[4, 0]
    for kept in (0, 2):
        mask = torch.arange(5, device=device) < kept
        with poisoned_allocations():
            loss, (grad,) = evaluate(
                lambda a, m=mask: topk_kl(a, t, i, mask=m, reduction=reduction, impl=impl), (z,), (True,)
            )
        assert bool((grad[kept:] == 0).all())
        if kept:
            assert torch.equal(loss[:2] if reduction == "none" else loss, want) and torch.equal(grad[:2], want_grad)
        else:
            assert bool((loss == 0).all())


BAD = [
    ({"i": 21}, IndexError, r"teacher_indices\[3\] holds 21, and there are 21 classes"),
    ({"i": -2}, IndexError, r"teacher_indices\[3\] holds -2"),
    ({"i": 2**40}, IndexError, rf"teacher_indices\[3\] holds {2**40}"),
    ({"i": -1}, IndexError, r"teacher_indices\[3\] holds -1.*padding where its log-prob is -inf"),
    ({"i": -2, "t": -torch.inf}, IndexError, r"teacher_indices\[3\] holds -2"),
    ({"i": "twice"}, ValueError, r"teacher_indices\[3\] holds \d+, more than once"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_hard_15_impossible_and_repeated_classes(impl, device, monkeypatch, change, error, message):
    """An error on a CPU; NaN in that row where nothing may look, which the CPU shows with the look taken out."""
    z, t, i = case(5, 21, 4, device=device)
    t[3, 2] = change.get("t", t[3, 2])
    i[3, 2] = i[3, 0] if change["i"] == "twice" else change["i"]
    if device.type == "cpu":
        with pytest.raises(error, match=f"topk_kl: {message}"):
            topk_kl(z, t, i, impl=impl)
    monkeypatch.setattr(module, "_check_entries", lambda *_: None)
    loss, grad = rows_of(impl, z, t, i)
    rest = torch.arange(5, device=device) != 3
    assert bool(loss[3].isnan()) and bool(grad[3].isnan().all())
    assert bool(loss[rest].isfinite().all()) and bool(grad[rest].isfinite().all())


def test_logits_in_place_of_log_probabilities():
    z, _, i = case(3, 9, 2)
    with pytest.raises(ValueError, match=r"teacher_log_probs\[0\] holds \d.*take log_softmax first"):
        topk_kl(z, z.abs().gather(-1, i) + 1, i)


@pytest.mark.parametrize("classes", [1, 2, 127, 50257, 131073])
def test_hard_16_class_counts(impl, device, classes):
    z, t, i = case(1, classes, min(classes, 20), torch.float16, device, 3.0)
    check(impl, z, t, i, temperature=3.0)


def test_hard_16_a_row_constant_changes_nothing_and_the_gradient_sums_to_zero(impl, device):
    z, t, i = case(8, 70, 6, device=device)
    loss, grad = rows_of(impl, z, t, i)
    moved, _ = rows_of(impl, (z * 64).round() / 64 + 16.0, t, i)  # exact in float32
    same, _ = rows_of(impl, (z * 64).round() / 64, t, i)
    torch.testing.assert_close(moved, same, rtol=1e-6, atol=1e-6)
    assert bool((loss >= 0).all()) and float(grad.sum(-1).abs().max()) < 1e-6 * 70


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
