"""A frozen layer to queries, keys and values whose three gradients never become one tensor. Internal: no implementations to
choose.

Attention kernels return the gradients of q, k and v apart. Of a layer to all three the input's gradient is the sum of three
products; putting the gradients together for a single one is a pass over six times the input, a tenth of which the two
additions cost inside the products. In half precision each partial sum is rounded, as in a model with three layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgist.ops import _common

__all__ = ["project_to_heads"]

_OP = "project_to_heads"


def _sum_of_products(a: Tensor, b: Tensor, c: Tensor, weight: Tensor) -> Tensor:
    width = a.shape[1]
    out = torch.mm(a, weight[:width])
    out.addmm_(b, weight[width : 2 * width])
    return out.addmm_(c, weight[2 * width :])


def _sum_of_products_fake(a, b, c, weight):
    return a.new_empty(a.shape[0], weight.shape[1])


#: a W_1 + b W_2 + c W_3: a, b, c (M, D'), weight (3 D', D) -> (M, D).
_sum_op = _common.define(
    "sum_of_products(Tensor a, Tensor b, Tensor c, Tensor weight) -> Tensor",
    _sum_of_products,
    _sum_of_products_fake,
    _OP,
)


class _ProjectToHeads(torch.autograd.Function):
    """q, k, v (B, H, N, d) of x (B, N, D). Saves the frozen weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, heads):
        ctx.save_for_backward(weight)
        packed = torch.nn.functional.linear(x, weight, bias)
        return tuple(part.transpose(1, 2) for part in packed.unflatten(-1, (3, heads, -1)).unbind(2))

    @staticmethod
    @_common.single_backward(_OP)
    def backward(ctx, *grads):
        (weight,) = ctx.saved_tensors
        batch, _, rows, _ = grads[0].shape
        apart = (g.transpose(1, 2).reshape(batch * rows, -1) for g in grads)  # as attention kernels store them: views
        return _sum_op(*apart, weight).unflatten(0, (batch, rows)), None, None, None


def project_to_heads(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x through a frozen layer.

    Args:
        x: (B, N, D).
        weight: (3 heads d, D), as nn.Linear stores it, of x's dtype. It takes no gradient.
        bias: (3 heads d,) or None. It takes no gradient.
        heads: how many there are.

    Returns:
        q, k, v, each (B, heads, N, d), views of rows.

    Raises:
        RuntimeError: a second derivative.
    """
    return _ProjectToHeads.apply(x, weight, bias, heads)
