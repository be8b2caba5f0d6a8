r"""The adapter bottleneck with its residual (Houlsby et al. 2019; placements as in GIST, arXiv 2312.07255).

.. math::
    y = r\, \mathrm{res} + s\, [\, U (\mathrm{act}(D x + b_d) \odot \mathrm{gate}) + b_u \,]

A gate (..., E) scales expert e's H / E hidden units by gate[..., e], so K dense experts are one adapter of width K h;
the output bias is then (D',) or (E, D'), in which case :math:`b_u = \sum_e \mathrm{gate}_e\, b_{u,e}`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgist.reference._numerics import accumulate, half_in_float32

__all__ = ["ACTIVATIONS", "activate", "activation_grad", "adapter", "backward", "forward"]

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "identity")


def activate(z: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch.nn.functional.gelu(z)
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(z, approximate="tanh")
    if activation == "relu":
        return torch.relu(z)
    if activation == "silu":
        return torch.nn.functional.silu(z)
    return z


def activation_grad(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """grad * act'(z)."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, z)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, z, approximate="tanh")
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, z, 0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, z)
    return grad


def _spread(gate: Tensor, width: int) -> Tensor:
    """(..., E) -> (..., H): each expert's gate over its H / E hidden units."""
    return gate.repeat_interleave(width // gate.shape[-1], dim=-1)


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str = "gelu",
    scale: float = 1.0,
    residual: Tensor | tuple[Tensor, Tensor] | bool | None = None,
    residual_scale: float = 1.0,
    gate: Tensor | None = None,
) -> Tensor:
    """The formula, by autograd, float32 (float64) inside; shapes as :func:`fastgist.functional.adapter`."""
    linear = torch.nn.functional.linear
    hidden = linear(accumulate(x), accumulate(down_weight), None if down_bias is None else accumulate(down_bias))
    hidden = activate(hidden, activation)
    if gate is not None:
        gate = accumulate(gate)
        hidden = hidden * _spread(gate, hidden.shape[-1])
    y = linear(hidden, accumulate(up_weight))
    if up_bias is not None:
        bias = accumulate(up_bias)
        y = y + (gate @ bias if bias.dim() == 2 and gate is not None else bias)
    y = scale * y
    if residual is not False:
        added = residual if isinstance(residual, tuple) else (x if residual is None or residual is True else residual,)
        y = y + residual_scale * sum(accumulate(t) for t in added)
    return y.to(x.dtype)


def _hidden(z: Tensor, gate: Tensor | None, activation: str, extra: Tensor | None) -> Tensor:
    """(act(z) * gate | extra): the hidden units, and beside them the columns that the output bias is multiplied by, so that
    the bias and its gradient ride in the products with U."""
    hidden = activate(z, activation)
    if gate is not None:
        hidden = hidden * _spread(gate, z.shape[1])
    return hidden if extra is None else torch.cat((hidden, extra), dim=1)


def _bias_columns(x: Tensor, gate: Tensor | None, up_bias: Tensor | None) -> Tensor | None:
    """What multiplies the output bias: the gate (M, E) for one bias an expert, a column of ones for a single one."""
    if up_bias is None:
        return None
    return gate if up_bias.dim() == 2 else x.new_ones(x.shape[0], 1)


@half_in_float32(narrowed=slice(0, 1))
def forward(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    activation: str,
    scale: float,
    residual_scale: float,
) -> tuple[Tensor, Tensor]:
    """y (M, D') and z = D x + b_d (M, H), in the fewest passes over (M, D) that PyTorch allows: residual, both scales and
    the output bias are folded into the second product. z stays float32 for float16, whose range it may pass."""
    z = torch.nn.functional.linear(x, down_weight, down_bias)
    hidden = _hidden(z, gate, activation, _bias_columns(x, gate, up_bias))
    up = up_weight
    if up_bias is not None:
        up = torch.cat((up_weight, up_bias.view(-1, up_weight.shape[0]).transpose(0, 1)), dim=1)
    up = up.transpose(0, 1)
    if residual is None:
        return torch.addmm(hidden.new_zeros(()), hidden, up, beta=0, alpha=scale), z
    return torch.addmm(residual, hidden, up, beta=residual_scale, alpha=scale), z


@half_in_float32(narrowed=slice(0, None))
def backward(
    grad: Tensor,
    x: Tensor | None,
    down_weight: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    gate: Tensor | None,
    z: Tensor | None,
    activation: str,
    scale: float,
    residual_scale: float,
    residual_is_x: bool,
    need_x: bool,
    need_down: bool,
    need_down_bias: bool,
    need_up: bool,
    need_up_bias: bool,
    need_gate: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, down_weight, down_bias, up_weight, up_bias and gate from grad = dL/dy (M, D'); None where not wanted.

    dU^T and the output bias's gradient are one product, (hidden | ones or gate)^T grad; dx and the residual's another.
    A product whose result is narrow is asked for as its transpose, which BLAS does in up to half the time.
    """
    grad_x = grad_down = grad_down_bias = grad_up = grad_up_bias = grad_gate = None
    width = None if z is None else z.shape[1]
    if need_up:
        extra = _bias_columns(grad, gate, up_bias) if need_up_bias else None
        outer = torch.mm(_hidden(z, gate, activation, extra).transpose(0, 1), grad).mul_(scale)
        grad_up = outer[:width].transpose(0, 1).contiguous()
        grad_up_bias = outer[width:].clone() if need_up_bias else None
    elif need_up_bias:
        grad_up_bias = torch.mm(_bias_columns(grad, gate, up_bias).transpose(0, 1), grad).mul_(scale)
    if need_up_bias:
        grad_up_bias = grad_up_bias.reshape(up_bias.shape)
    if need_x or need_down or need_down_bias or need_gate:
        grad_hidden = torch.mm(grad, up_weight * scale)
        if need_gate:
            product = grad_hidden * activate(z, activation)
            grad_gate = product.view(*gate.shape, z.shape[1] // gate.shape[1]).sum(-1)
            if up_bias is not None and up_bias.dim() == 2:
                grad_gate = grad_gate.addmm_(grad, up_bias.transpose(0, 1), alpha=scale)
        if gate is not None:
            grad_hidden = grad_hidden * _spread(gate, grad_hidden.shape[1])
    if need_x or need_down or need_down_bias:
        grad_z = activation_grad(grad_hidden, z, activation)
        if need_x:
            if residual_is_x:
                grad_x = torch.addmm(grad, grad_z, down_weight, beta=residual_scale)
            else:
                grad_x = torch.mm(grad_z, down_weight)
        if need_down:
            grad_down = torch.mm(grad_z.transpose(0, 1), x)
        if need_down_bias:
            grad_down_bias = grad_z.sum(0)
    return grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_gate
