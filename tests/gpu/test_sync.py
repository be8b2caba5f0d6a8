"""No operation looks at the device from the host: under sync debug mode "error" any look raises. Needs a GPU."""

from __future__ import annotations

import pytest
import torch
from every_op import make

from fastgist.backends import IMPLEMENTATIONS, OPS, resolve
from fastgist.functional import bidirectional_kl

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_sync():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("factor", [1.0, 3.0], ids=["factor1", "factor3"])
@pytest.mark.parametrize("by", [impl for impl in IMPLEMENTATIONS if impl != "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", OPS)
def test_no_host_sync(op, dtype, by, factor, no_sync):
    """``factor``: the incoming gradient. By 1 nothing is multiplied, by any other number finished gradients are, and which of
    the two it is only the device may ask."""
    try:
        resolve(op, by, torch.empty(1, device="cuda", dtype=dtype))
    except RuntimeError as obstacle:
        pytest.skip(str(obstacle))
    call = make(op, dtype, device="cuda")
    call.run(impl=by)
    values = call.values()
    incoming = torch.full_like(call(*call.values(), impl=by), factor)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    out = call(*values, impl=by)
    torch.autograd.grad(out, call.wanted(values), incoming)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_host_sync_with_masks(reduction, no_sync):
    z, o = (torch.randn(7, 40, device="cuda", requires_grad=True) for _ in range(2))
    mask = torch.arange(7, device="cuda") % 2 == 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    bidirectional_kl(z, o, mask=mask, reduction=reduction).sum().backward()


@pytest.mark.parametrize("op", ["cp_linear", "adapter"])
def test_no_host_sync_with_dropout(op, no_sync):
    call = make(op, device="cuda")
    values = call.values()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    out = call(*values, dropout_p=0.3, training=True)
    torch.autograd.grad(out, call.wanted(values), torch.ones_like(out))


def test_the_mode_does_raise(no_sync):
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        bool(x.sum() > 0)
