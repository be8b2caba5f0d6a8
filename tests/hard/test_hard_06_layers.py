"""Hard case 6 for the operations of layers: what is no number in a row of x, or of the incoming gradient, stays in that row of
the result and of dL/dx, and nothing that was given is changed."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETING
from every_op import LAYERS, PAIRS, VARIANTS, make, variants

OP = "cp_linear"
pytestmark = pytest.mark.kernel
ROWS = 19 if INTERPRETING else 37
BAD = (0, 9, ROWS - 1)  # the first and the last row, and one in the midst of a tile
VALUES = [torch.nan, torch.inf] if INTERPRETING else [torch.nan, torch.inf, -torch.inf]


def call_of(op, variant):
    return make(op, rows=ROWS) if variant is None else variants(op, rows=ROWS)[variant]


#: (operation, implementation, variant, what is spoilt: an operand that has a row for each of x's, or the incoming gradient)
WAYS = [
    (op, by, variant, name)
    for op, by, variant in [(op, by, None) for op, by in PAIRS if op in LAYERS] + VARIANTS
    for name in (*(n for n in ("x", "y", "residual", "gate") if n in call_of(op, variant).tensors), "incoming")
]


def run(call, values, incoming, impl):
    """(y, dL/dx); beside them the other leaves' gradients are formed too."""
    out = call(*values.values(), impl=impl)
    grads = torch.autograd.grad(out, call.wanted(list(values.values())), incoming)
    return out.detach(), dict(zip(call.leaves, grads, strict=True))["x"]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("op", "by", "variant", "where"), WAYS)
def test_a_bad_row_stays_alone(op, by, variant, where, value):
    call = call_of(op, variant)
    values = dict(zip(call.tensors, call.values(), strict=True))
    incoming = torch.randn_like(call(*values.values(), impl=by)).detach()
    clean_y, clean_x = run(call, values, incoming, by)
    spoilt = incoming if where == "incoming" else values[where].detach()
    for row in BAD:
        spoilt[row, row % spoilt.shape[1]] = value
    before = [t.detach().clone() for t in (*(t for t in values.values() if t is not None), incoming)]
    y, grad_x = run(call, values, incoming, by)
    after = [*(t.detach() for t in values.values() if t is not None), incoming]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, before, strict=True))
    rest = torch.ones(ROWS, dtype=torch.bool, device=y.device)
    rest[list(BAD)] = False
    assert torch.equal(y[rest], clean_y[rest]) and torch.equal(grad_x[rest], clean_x[rest])
    if where == "incoming":
        assert torch.equal(y, clean_y)
        assert not bool(grad_x[~rest].isfinite().all(1).any())
    else:
        assert not bool(y[~rest].isfinite().all(1).any())
    if op != "adapter" and where != "incoming":  # an update is linear: dL/dx is not x's business
        assert torch.equal(grad_x, clean_x)


def test_of_many_rows_whose_update_is_added_to_the_weight(impl):
    """With rows enough for W + dW, in y where V's gradient is not asked for, and in dL/dx."""
    if impl == "triton":
        pytest.skip("kernels add no update to a weight")
    call = make("cp_linear", rows=300)
    call.leaves = ("x",)
    values = dict(zip(call.tensors, call.values(), strict=True))
    incoming = torch.randn(300, 48, device=values["x"].device)
    clean_y, clean_x = run(call, values, incoming, impl)
    values["x"].detach()[150, 3] = torch.nan
    incoming[200, 5] = torch.inf
    y, grad_x = run(call, values, incoming, impl)
    of_y, of_x = (torch.arange(300, device=y.device) != row for row in (150, 200))
    assert torch.equal(y[of_y], clean_y[of_y]) and torch.equal(grad_x[of_x], clean_x[of_x])
    assert bool(y[150].isnan().all()) and not bool(grad_x[200].isfinite().any())
