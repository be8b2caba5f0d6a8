"""Gradients of rows where one class has all the mass of each side, another on either: of size 1 whatever the gap, so an error
that grows with the gap shows. And of rows that are nearly so, where classes too small to show in the mass still matter.

The budget is that of the gradient itself and of the log_softmax form, which is exact here; not one widened by the gap.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, INTERPRETING, implementations
from losses import evaluate
from torch import Tensor

from fastgist import functional as F
from fastgist.reference.gist_loss import gist_loss as gist_formula
from fastgist.testing import assert_within_budget

CASES = [(op, by) for op in ("bidirectional_kl", "gist_loss") for by in implementations(op)]
each = pytest.mark.parametrize(("op", "by"), CASES)
pytestmark = pytest.mark.kernel
CLASSES = (100, 1000, 2000, 5000, 32000)
BOTH = (True, True)
REDUCTIONS = ("none", "sum", "mean")


def plain(op: str, z: Tensor, o: Tensor, target: Tensor, temperature: float, reduction: str) -> Tensor:
    """Without a maximum taken off beforehand: (p - q) (log p - log q)."""
    u, v = (z / temperature).log_softmax(-1), (o / temperature).log_softmax(-1)
    loss = ((u.exp() - v.exp()) * (u - v)).sum(-1)
    if op == "gist_loss":
        ce = torch.nn.functional.cross_entropy
        loss = ce(z, target, reduction="none") + 0.5 * ce(o, target, reduction="none") + 0.75 * loss
    return loss if reduction == "none" else getattr(loss, reduction)()


def check(op: str, by: str, z: Tensor, o: Tensor, temperature: float, reductions=REDUCTIONS, scale=None) -> None:
    """Both gradients, row by row: a row's budget is that of its own gradients, or of terms of size ``scale``."""
    target = torch.arange(len(z), device=DEVICE)
    rest = (target,) if op == "gist_loss" else ()
    for reduction in reductions:

        def ours(a, b, reduction=reduction):
            return getattr(F, op)(a, b, *rest, temperature=temperature, reduction=reduction, impl=by)

        def formula(a, b, reduction=reduction):
            return plain(op, a, b, target, temperature, reduction)

        got = evaluate(ours, (z, o), BOTH)[1]
        peer = evaluate(formula, (z, o), BOTH)[1]
        true = evaluate(formula, (z.double(), o.double()), BOTH)[1]
        for side in range(2):
            for row in range(len(z)):
                what = f"{reduction}, row {row}, gradient {side}"
                assert_within_budget(got[side][row], peer[side][row], true[side][row], what=what, scale=scale)


def one_hot(classes: int, gap: float, z_at: int, o_at: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    z, o = (torch.randn(3, classes, device=DEVICE) for _ in range(2))
    z[:, z_at] += gap
    o[:, o_at] += gap
    return z.to(dtype), o.to(dtype)


@each
@pytest.mark.parametrize("classes", [100, 1000, 2000] if INTERPRETING else CLASSES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("gap", [100.0, 1e3, 1e4])
@pytest.mark.parametrize("places", [(0, -1), (-1, 0), (70, 5)])
def test_the_gap_adds_no_error(op, by, classes, temperature, gap, places):
    check(op, by, *one_hot(classes, gap, *places), temperature, ("sum",) if INTERPRETING else REDUCTIONS)


@each
@pytest.mark.parametrize("classes", [1000, 2000])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gap_adds_no_error_to_gradients_from_statistics(op, by, classes, temperature):
    check(op, by, *one_hot(classes, 1e4, 0, -1), temperature, ("none",))


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("gap", [1e3, 1e4])
def test_in_other_dtypes(op, by, dtype, gap):
    if by == "triton" and dtype == torch.float64:
        pytest.skip("no float64 there")
    z, o = one_hot(2000, gap, 0, -1, dtype)
    if dtype != torch.float64:
        return check(op, by, z, o, 3.0)
    target = torch.full((3,), 7, device=DEVICE)
    rest = (target,) if op == "gist_loss" else ()
    grads = evaluate(lambda a, b: getattr(F, op)(a, b, *rest, reduction="sum", temperature=1.0, impl=by), (z, o), BOTH)[
        1
    ]
    # There is nothing more exact to hold these against, but at such a gap every class's gradient is known.
    known = torch.zeros(2, *z.shape, dtype=z.dtype, device=DEVICE)
    weight = 0.75 if op == "gist_loss" else 1.0
    known[0, :, 0] = known[1, :, -1] = weight
    known[0, :, -1] = known[1, :, 0] = -weight
    if op == "gist_loss":
        known[0, :, 0] += 1.0
        known[0, :, 7] -= 1.0
        known[1, :, -1] += 0.5
        known[1, :, 7] -= 0.5
    for ours, wanted in zip(grads, known, strict=True):
        assert float((ours - wanted).abs().max()) <= 4 * torch.finfo(torch.float64).eps


@each
@pytest.mark.parametrize("classes", [40, 2500])
@pytest.mark.parametrize("far", [0.0, 10.0, 1e3])
def test_classes_too_small_to_show_in_the_mass_still_matter(op, by, classes, far):
    """p of the second class is 4e-8, so S = 1 in float32, and p d is 1e-3 or more: the term of the first class, whose own d is
    ``far``, is less by that much. To take it for 0 because its p is 1 would be wrong."""
    z = torch.full((3, classes), -200.0, device=DEVICE)
    o = torch.full((3, classes), -200.0, device=DEVICE)
    z[:, 3], z[:, -2] = 0.0, -17.0
    o[:, 3], o[:, -2], o[:, 5] = -far, -2e4, 0.0
    check(op, by, z, o, 1.0, scale=1.0 + far)  # what d itself is rounded by: 2e-4 at most


@each
@pytest.mark.parametrize("near", [0.0, 1.0, 16.0])
def test_two_classes_that_share_the_mass(op, by, near):
    z, o = (torch.randn(3, 2500, device=DEVICE) for _ in range(2))
    z[:, 0] += 1000.0
    z[:, -1] = z[:, 0] - near
    o[:, -1] += 1000.0
    check(op, by, z, o, 3.0, scale=1000.0 / 3.0)


@pytest.mark.parametrize("classes", [1500, 6000])
@pytest.mark.parametrize("by", implementations("gist_linear_loss"))
def test_a_head_whose_rows_are_read_in_parts(by, classes):
    """gist_linear_loss, whole and in two passes over blocks of classes."""
    if INTERPRETING and classes > 1500:
        pytest.skip("the shorter head has shown it")
    width = 16
    hidden, gist = (torch.randn(3, width, device=DEVICE) for _ in range(2))
    hidden[:, 0], hidden[:, 1], gist[:, 0], gist[:, 1] = 1e4, 0.0, 0.0, 1e4
    weight = torch.randn(classes, width, device=DEVICE) / 8
    weight[:, :2] = 0.0
    weight[0, 0] = weight[-1, 1] = 1.0
    target = torch.arange(3, device=DEVICE)

    def formula(h, g, w):
        return gist_formula(h @ w.T, g @ w.T, target)

    leaves, wanted = (hidden, gist, weight), (True, True, True)
    peer = evaluate(formula, leaves, wanted)[1]
    true = evaluate(formula, [x.double() for x in leaves], wanted)[1]
    for options in ({}, {"chunk_rows": 1}):
        call = lambda h, g, w, o=options: F.gist_linear_loss(h, g, w, None, target, impl=by, **o)  # noqa: E731
        got = evaluate(call, leaves, wanted)[1]
        for name, mine, p, t in zip(("hidden", "gist_hidden", "weight"), got, peer, true, strict=True):
            assert_within_budget(mine, p, t, what=f"{name}, {options}")
