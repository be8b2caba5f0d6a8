"""Hard case 5: offsets past 2^31 elements are exact. The tensors are sparse: only the pages that are touched exist."""

from __future__ import annotations

import pytest
import torch
from every_op import LAYERS, PAIRS, make

from fastgist.testing import assert_within_budget

pytestmark = pytest.mark.kernel
FAR = 2**31 + 16


def _spread(t: torch.Tensor, dim: int) -> torch.Tensor:
    """The values of ``t`` (2-D) with its last row (dim 0) or column (dim 1) more than 2^31 elements from the first."""
    step = -(-FAR // (t.shape[dim] - 1))
    strides = (step, 1) if dim == 0 else (1, step)
    far = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)
    far.copy_(t)
    return far


def _inputs(op: str) -> tuple[str, ...]:
    layers = {"cp_linear": ("x", "weight"), "cp_update": ("y", "x"), "adapter": ("x",), "gelu": ("x",)}
    losses = {
        "bidirectional_kl": ("z", "o"),
        "gist_loss": ("z", "g"),
        "gist_linear_loss": ("hidden", "gist", "weight"),
        "topk_kl": ("z", "t"),
    }
    return (layers | losses)[op]


#: bfloat16 of cp_linear in C++, for which float16 is widened, and so moved together, before it is read.
CASES = [(op, by, torch.float16) for op, by in PAIRS] + [
    (op, by, torch.bfloat16) for op, by in PAIRS if (op, by) == ("cp_linear", "native")
]


@pytest.mark.parametrize(("op", "by", "dtype"), CASES)
@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_past_two_to_the_31(op, by, dtype, dim):
    call = make(op, dtype)
    near, near_grads = call.run(impl=by)
    exact, exact_grads = call.run(call.formula, dtype=torch.float64)
    for name in (*_inputs(op), *(("the incoming gradient",) if op in LAYERS else ())):
        values = dict(zip(call.tensors, call.values(), strict=True))
        incoming = torch.linspace(0.5, 1.5, near.numel(), device=near.device).reshape(near.shape).to(near.dtype)
        try:
            if name in values:
                values[name] = _spread(values[name].detach(), dim).requires_grad_(name in call.leaves)
            else:
                incoming = _spread(incoming, dim)
        except (RuntimeError, torch.OutOfMemoryError):
            pytest.skip("this machine does not lend 4 GiB of address space")
        out = call(*values.values(), impl=by)
        grads = torch.autograd.grad(out, call.wanted(list(values.values())), incoming)
        assert_within_budget(out.detach(), near, exact, what=f"{name} far apart", scale=_scale(exact))
        for leaf, mine, ours, want in zip(call.leaves, grads, near_grads, exact_grads, strict=True):
            assert_within_budget(mine, ours, want, what=f"gradient of {leaf}, {name} far apart")
        del values, out, grads, incoming


def _scale(exact: torch.Tensor) -> float | None:
    return float(exact.abs()) + 1.0 if exact.dim() == 0 else None
