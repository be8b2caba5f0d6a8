"""Hard cases 12 to 16 of topk_kl, on every implementation that runs here."""

from __future__ import annotations

import pytest
import torch
from losses import evaluate
from topk_cases import case, check, rows_of, scales

from fastgist.functional import topk_kl
from fastgist.ops import topk_kl as module
from fastgist.reference.topk_kl import DIRECTIONS
from fastgist.reference.topk_kl import topk_kl as formula
from fastgist.testing import assert_within_budget, poisoned_allocations

OP = "topk_kl"
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)


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
    options = {"temperature": temperature, "direction": direction, "reduction": "none"}
    plain, exact = formula(z + 128.0, t, i, **options), formula((z + 128.0).double(), t, i, **options)
    assert_within_budget(far, plain, exact, scale=scale)
    assert float(far_grad.abs().max()) <= 128 * few / temperature, "what z + 128 rounds off, and no more"


@every_direction
@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
def test_hard_13_equal_sides_of_which_all_is_known(impl, device, temperature, direction):
    """Also where what k classes leave would be lost in the teacher's rounding."""
    z = torch.randn(4, 60, device=device) * 3
    t, i = (z / temperature).log_softmax(-1).topk(60)
    found = scales(z, t, i, temperature)
    loss, grad = rows_of(impl, z, t, i, temperature=temperature, direction=direction)
    few = 8 * torch.finfo(torch.float32).eps
    assert float(loss.abs().max()) <= few * found["scale"] and float(grad.abs().max()) <= few * found["grad_scale"]


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


@pytest.mark.parametrize("classes", [1, 2, 127, 50257, 131073])
@pytest.mark.parametrize("rows", [1, 3])
def test_hard_16_class_counts_and_few_rows(impl, device, classes, rows):
    z, t, i = case(rows, classes, min(classes, 20), torch.float16, device, 3.0)
    check(impl, z, t, i, temperature=3.0)


def test_hard_16_a_row_constant_changes_nothing_and_the_gradient_sums_to_zero(impl, device):
    z, t, i = case(8, 70, 6, device=device)
    loss, grad = rows_of(impl, z, t, i)
    moved, _ = rows_of(impl, (z * 64).round() / 64 + 16.0, t, i)  # exact in float32
    same, _ = rows_of(impl, (z * 64).round() / 64, t, i)
    torch.testing.assert_close(moved, same, rtol=1e-6, atol=1e-6)
    assert bool((loss >= 0).all()) and float(grad.sum(-1).abs().max()) < 1e-6 * 70
