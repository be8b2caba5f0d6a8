"""What :class:`torch.utils.flop_counter.FlopCounterMode` counts for this package's operators, which are opaque to it: the
multiplications and additions of their matrix products, in the form that the kernels compute. Imported by
:mod:`fastgist.ops._common` when somebody counts."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry, register_flop_formula

import fastgist.ops._attention
import fastgist.ops._projection
import fastgist.ops.adapter
import fastgist.ops.cp_linear
import fastgist.ops.cp_update
import fastgist.ops.gist_linear_loss  # all of these define operators

__all__ = ["tell"]

_ops = torch.ops.fastgist
Shape = Any  # torch.Size, or None where there is no tensor


@register_flop_formula(_ops.cp_linear_fwd)
def _cp_linear_fwd(x: Shape, weights: list[Shape], biases: Any, u: Shape, *others: Any, **_: Any) -> int:
    rows, inner, rank = x[0], x[1], u[1]
    out = sum(w[0] for w in weights)
    return 2 * rows * (inner * out + inner * rank + rank * out)


@register_flop_formula(_ops.cp_linear_bwd)
def _cp_linear_bwd(
    grads: list[Shape], x: Shape, weights: Any, u: Shape, v: Shape, gain: Any, seed: Any, h: Shape, folds: Any, scale: Any,
    dropout_p: Any, needs: list[bool], *others: Any, **_: Any,
) -> int:  # fmt: skip
    need_x, need_u, need_v, need_gain = needs[:4]
    rows, out = grads[0][0], sum(grad[1] for grad in grads)
    inner = (x or u or (0, 0))[-1 if x else 0]
    rank = (v or h or (0, 0))[1]
    trained = sum(grad[1] for grad, need in zip(grads, needs[4:], strict=False) if need)
    per_row = inner * (out * need_x + trained)  # dy W, dy^T x
    per_row += out * rank * ((need_x or need_u) + (need_v or need_gain))  # dh = dy V', dy^T h
    return 2 * rows * (per_row + inner * rank * (need_x + need_u))  # dh U^T, x^T dh


@register_flop_formula([_ops.cp_update_fwd, _ops.cp_update_fwd_])
def _cp_update_fwd(y: Shape, x: Shape, u: Shape, *others: Any, **_: Any) -> int:
    return 2 * x[0] * (x[1] + y[1]) * u[1]


@register_flop_formula(_ops.cp_update_bwd)
def _cp_update_bwd(
    grad: Shape, x: Shape, u: Shape, v: Shape, gain: Any, seed: Any, h: Shape, folds: Any, scale: Any, dropout_p: Any,
    dtype: Any, needs: list[bool], *others: Any, **_: Any,
) -> int:  # fmt: skip
    need_x, need_u, need_v, need_gain = needs
    inner = (x or u or (0, 0))[-1 if x else 0]
    rank = (v or h or (0, 0))[1]
    wide = grad[1] * ((need_x or need_u) + (need_v or need_gain))  # dh = dy V', dy^T h
    return 2 * grad[0] * rank * (wide + inner * (need_x + need_u))  # dh U^T, x^T dh


@register_flop_formula(_ops.adapter_fwd)
def _adapter_fwd(x: Shape, down: Shape, down_bias: Any, up: Shape, *others: Any, **_: Any) -> int:
    return 2 * x[0] * (prod(down) + prod(up))


@register_flop_formula(_ops.adapter_bwd)
def _adapter_bwd(
    grad: Shape, x: Shape, down: Shape, down_bias: Any, up: Shape, up_bias: Any, gate: Any, z: Shape, norm_weight: Any,
    norm_bias: Any, stats: Any, seed: Any, activation: Any, scale: Any, residual_scale: Any, residual_is_x: Any,
    dropout_p: Any, needs: list[bool], *others: Any, **_: Any,
) -> int:  # fmt: skip
    need_x, need_down, need_down_bias, need_up, _up_bias, need_gate, need_norm_weight, need_norm_bias = needs
    hidden = (up or (0, 0))[1]
    wide, narrow = grad[1] * hidden, (x or down or (0, 0))[-1] * hidden
    through = need_x or need_down or need_down_bias or need_gate or need_norm_weight or need_norm_bias
    again = z is None or prod(z) == 0  # the hidden units are formed once more
    per_row = wide * (through + need_up) + narrow * (need_x + (need_down or need_norm_weight))
    return 2 * grad[0] * (per_row + narrow * (again and (through or need_up)))


@register_flop_formula([_ops.gist_linear_loss_run, _ops.gist_linear_loss_run_moving], get_raw=True)
def _gist_linear_loss_run(
    hidden: Tensor, gist: Tensor, weight: Tensor, bias: Any, target: Any, row_scale: Tensor, *rest: Any, **_: Any
) -> int:
    alpha, beta_gist = rest[0], rest[3]
    need_hidden, need_gist, need_weight = rest[9:12]
    gist_learns = alpha != 0 or beta_gist != 0
    back = need_hidden + need_weight + gist_learns * (need_gist + need_weight)
    block = fastgist.ops.gist_linear_loss.planned(hidden, weight, row_scale, *rest)[2]
    logits = 4 if block else 2  # of both heads, and once more where a second pass forms the head's gradient
    return 2 * hidden.shape[0] * weight.numel() * (logits + back)


@register_flop_formula(_ops.sum_of_products)
def _sum_of_products(a: Shape, b: Shape, c: Shape, weight: Shape, **_: Any) -> int:
    return 2 * a[0] * prod(weight)


@register_flop_formula(_ops.attention_lse)
def _attention_lse(q: Shape, k: Shape, v: Shape, **_: Any) -> int:
    return 4 * prod(q) * k[2]


_OURS = {packet: formula for packet, formula in flop_registry.items() if str(packet).startswith("fastgist.")}


def tell() -> None:
    """A counter copies torch's table when it is made: give those at work what they could not know by then."""
    for mode in _get_current_dispatch_mode_stack():
        table = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(table, dict):
            for packet, formula in _OURS.items():
                table.setdefault(packet, formula)
