r"""The adapter bottleneck with its residual (Houlsby et al. 2019; placements as in GIST, arXiv 2312.07255).

.. math::
    y = r\, \mathrm{res} + s\, [\, U (\mathrm{act}(D x + b_d) \odot \mathrm{gate}) + b_u \,]

A gate (..., E) scales expert e's H / E hidden units by gate[..., e], so K dense experts are one adapter of width K h;
the output bias is then (D',) or (E, D'), in which case :math:`b_u = \sum_e \mathrm{gate}_e\, b_{u,e}`.

With a LayerNorm in front, D reads :math:`\hat x w + b`, with :math:`\hat x = (x - \mu) / \sigma`; the residual is x itself.
Dropout acts on the hidden units behind the gate. The norm's backward needs no sums over the rows but those of
:math:`G = dz^T \hat x` (H, D) and :math:`s = \sum_m dz_m` (H):

.. math::
    dD = G \odot w + s b^T, \quad dw_k = \sum_h D_{hk} G_{hk}, \quad db = D^T s, \quad
    dx = \tfrac{1}{\sigma} (da\, w - c_1 - \hat x c_2),\ da = dz\, D

where :math:`c_1, c_2` are the row's means of :math:`da\, w` and of :math:`da\, w\, \hat x`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgist.reference import philox
from fastgist.reference._numerics import accumulate, accumulate_dtype, half_in_float32, row_blocks
from fastgist.reference.cp_linear import Dropout

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
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """The formula, by autograd, float32 (float64) inside; shapes as :func:`fastgist.functional.adapter`."""
    linear = torch.nn.functional.linear
    a = accumulate(x)
    if norm is not None:
        weight, bias = (None if t is None else accumulate(t) for t in norm[:2])
        a = torch.nn.functional.layer_norm(a, a.shape[-1:], weight, bias, norm[2])
    hidden = linear(a, accumulate(down_weight), None if down_bias is None else accumulate(down_bias))
    hidden = activate(hidden, activation)
    if gate is not None:
        gate = accumulate(gate)
        hidden = hidden * _spread(gate, hidden.shape[-1])
    if training and dropout_p > 0.0:
        rows = hidden.reshape(-1, hidden.shape[-1])
        hidden = _dropout_of(rows, dropout_p, seed, None)(rows).reshape(hidden.shape)
    y = linear(hidden, accumulate(up_weight))
    if up_bias is not None:
        bias = accumulate(up_bias)
        y = y + (gate @ bias if bias.dim() == 2 and gate is not None else bias)
    y = scale * y
    if residual is not False:
        added = residual if isinstance(residual, tuple) else (x if residual is None or residual is True else residual,)
        y = y + residual_scale * sum(accumulate(t) for t in added)
    return y.to(x.dtype)


def _dropout_of(z: Tensor, dropout_p: float, seed: Tensor | None, drop: Dropout | None) -> Callable[[Tensor], Tensor]:
    """What drops out a (M, H) like z by the rule of :mod:`fastgist.reference.philox`, in its own memory or not: ``drop``, else
    a mask that is formed once. Without a seed it changes nothing."""
    if seed is None:
        return lambda hidden: hidden
    if drop is not None:
        return lambda hidden: drop(hidden, dropout_p, seed)
    keep = philox.keep_mask(seed, (z.shape[0], z.shape[1]), dropout_p)
    return lambda hidden: torch.where(keep, hidden / (1.0 - dropout_p), 0.0)


def _hidden(
    z: Tensor, gate: Tensor | None, activation: str, dropped: Callable[[Tensor], Tensor], extra: Tensor | None
) -> Tensor:
    """(drop(act(z) * gate) | extra): the hidden units, and beside them the columns that the output bias is multiplied by,
    so that the bias and its gradient ride in the products with U."""
    hidden = activate(z, activation)
    if gate is not None:
        hidden = hidden * _spread(gate, z.shape[1])
    hidden = dropped(hidden.clone() if hidden is z else hidden)  # z is kept
    return hidden if extra is None else torch.cat((hidden, extra), dim=1)


def _bias_columns(x: Tensor, gate: Tensor | None, up_bias: Tensor | None) -> Tensor | None:
    """What multiplies the output bias: the gate (M, E) for one bias an expert, a column of ones for a single one."""
    if up_bias is None:
        return None
    return gate if up_bias.dim() == 2 else x.new_ones(x.shape[0], 1)


def _norm_weights(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The norm's weight and bias as torch's kernels want them beside ``x``. On a CPU it is float32 weights that make them
    keep the statistics of half-precision rows in float32."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return None if weight is None else weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    weight = x.new_ones(x.shape[1], dtype=torch.float32) if weight is None else weight.float()
    return weight, None if bias is None else bias.float()


def _normalised_down(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """z (M, H) of the normalised rows, and their means and 1 / deviations (2, M). Row block by row block: what the norm
    gives is read again from cache, and never (M, D)."""
    z = x.new_empty(x.shape[0], down_weight.shape[0])
    stats = x.new_empty(2, x.shape[0], dtype=accumulate_dtype(x.dtype))
    weight, bias = _norm_weights(x, norm_weight, norm_bias)
    for rows in row_blocks(x):
        a, mean, rstd = torch.native_layer_norm(x[rows], x.shape[1:], weight, bias, norm_eps)
        z[rows] = torch.nn.functional.linear(a, down_weight, down_bias)
        stats[0, rows], stats[1, rows] = mean.view(-1), rstd.view(-1)
    return z, stats


@half_in_float32(narrowed=slice(0, 1))
def forward(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scale: float,
    residual_scale: float,
    norm_eps: float | None,
    dropout_p: float,
    *,
    branch: Tensor | None = None,
    drop: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y (M, D'), z = D a + b_d (M, H), a being x or the normalised x, and of a norm the rows' means and 1 / deviations
    (2, M) in float32 (float64). In the fewest passes over (M, D) that PyTorch allows: residual, both scales and
    the output bias are folded into the second product. z stays float32 for float16, whose range it may pass.
    ``branch``: a second residual, added to y in place. ``drop``: what drops out hidden units in place of the function here, to
    the same result."""
    stats = None
    if norm_eps is None:
        z = torch.nn.functional.linear(x, down_weight, down_bias)
    else:
        z, stats = _normalised_down(x, down_weight, down_bias, norm_weight, norm_bias, norm_eps)
    dropped = _dropout_of(z, dropout_p, seed, drop)
    hidden = _hidden(z, gate, activation, dropped, _bias_columns(x, gate, up_bias))
    up = up_weight
    if up_bias is not None:
        up = torch.cat((up_weight, up_bias.view(-1, up_weight.shape[0]).transpose(0, 1)), dim=1)
    up = up.transpose(0, 1)
    if residual is None:
        return torch.addmm(hidden.new_zeros(()), hidden, up, beta=0, alpha=scale), z, stats
    y = torch.addmm(residual, hidden, up, beta=residual_scale, alpha=scale)
    if (
        branch is not None
    ):  # for float16 y is float32 still: a part of the sum may pass the range where the whole does not
        y.add_(branch, alpha=residual_scale)
    return y, z, stats


@half_in_float32(narrowed=slice(0, None))
def backward(
    grad: Tensor,
    x: Tensor | None,
    down_weight: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    gate: Tensor | None,
    z: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stats: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scale: float,
    residual_scale: float,
    residual_is_x: bool,
    dropout_p: float,
    need_x: bool,
    need_down: bool,
    need_down_bias: bool,
    need_up: bool,
    need_up_bias: bool,
    need_gate: bool,
    need_norm_weight: bool,
    need_norm_bias: bool,
    *,
    drop: Dropout | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, down_weight, down_bias, up_weight, up_bias, gate, norm_weight and norm_bias from grad = dL/dy (M, D');
    None where not wanted. ``stats``: the forward's, None without a norm.

    dU^T and the output bias's gradient are one product, (hidden | ones or gate)^T grad; dx and the residual's another.
    A product whose result is narrow is asked for as its transpose, which BLAS does in up to half the time.
    """
    grad_x = grad_down = grad_down_bias = grad_up = grad_up_bias = grad_gate = grad_norm_weight = grad_norm_bias = None
    width = None if z is None else z.shape[1]
    dropped = None if z is None else _dropout_of(z, dropout_p, seed, drop)
    if need_up:
        extra = _bias_columns(grad, gate, up_bias) if need_up_bias else None
        outer = torch.mm(_hidden(z, gate, activation, dropped, extra).transpose(0, 1), grad).mul_(scale)
        grad_up = outer[:width].transpose(0, 1).contiguous()
        grad_up_bias = outer[width:].clone() if need_up_bias else None
    elif need_up_bias:
        grad_up_bias = torch.mm(_bias_columns(grad, gate, up_bias).transpose(0, 1), grad).mul_(scale)
    if need_up_bias:
        grad_up_bias = grad_up_bias.reshape(up_bias.shape)
    of_norm = need_norm_weight or need_norm_bias
    if need_x or need_down or need_down_bias or need_gate or of_norm:
        grad_hidden = dropped(torch.mm(grad, up_weight * scale))
        if need_gate:
            product = grad_hidden * activate(z, activation)
            grad_gate = product.view(*gate.shape, z.shape[1] // gate.shape[1]).sum(-1)
            if up_bias is not None and up_bias.dim() == 2:
                grad_gate = grad_gate.addmm_(grad, up_bias.transpose(0, 1), alpha=scale)
        if gate is not None:
            grad_hidden = grad_hidden * _spread(gate, grad_hidden.shape[1])
    if need_x or need_down or need_down_bias or of_norm:
        grad_z = activation_grad(grad_hidden, z, activation)
        added = (grad, residual_scale) if residual_is_x else (None, 0.0)
        if of_norm or (stats is not None and (need_x or need_down)):
            norm = (norm_weight, norm_bias, stats)
            wanted = (need_x, need_down, need_norm_weight, need_norm_bias)
            grad_x, grad_down, grad_norm_weight, grad_norm_bias = _through_norm(
                grad_z, x, down_weight, *norm, *added, *wanted
            )
        else:
            if need_x and residual_is_x:
                grad_x = torch.addmm(grad, grad_z, down_weight, beta=residual_scale)
            elif need_x:
                grad_x = torch.mm(grad_z, down_weight)
            if need_down:
                grad_down = torch.mm(grad_z.transpose(0, 1), x)
        if need_down_bias:
            grad_down_bias = grad_z.sum(0)
    return grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_gate, grad_norm_weight, grad_norm_bias


def _through_norm(
    grad_z: Tensor,
    x: Tensor | None,
    down_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stats: Tensor | None,
    added: Tensor | None,
    added_scale: float,
    need_x: bool,
    need_down: bool,
    need_norm_weight: bool,
    need_norm_bias: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x (``added_scale`` times ``added`` in it), down_weight, norm_weight and norm_bias from dz (M, H): one pass
    over row blocks that stay in cache, the parameters' from G and s (see above)."""
    wide = accumulate_dtype(grad_z.dtype)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    outer = None
    if need_down or need_norm_weight:
        outer = grad_z.new_zeros(grad_z.shape[1], x.shape[1], dtype=wide)
    if x is not None and (need_x or outer is not None):
        mean, rstd = stats.unsqueeze(-1)
        weight, _ = _norm_weights(x, norm_weight, None)
        for rows in row_blocks(x):
            of_row = (mean[rows], rstd[rows])
            if grad_x is not None:
                grad_a = torch.mm(grad_z[rows], down_weight)
                grad_row = torch.ops.aten.native_layer_norm_backward(
                    grad_a, x[rows], x.shape[1:], *of_row, weight, None, [True, False, False]
                )[0]
                if added is None:
                    grad_x[rows] = grad_row
                else:
                    torch.add(grad_row, added[rows], alpha=added_scale, out=grad_x[rows])
            if outer is not None:
                normalised = (x[rows] - of_row[0]).mul_(of_row[1]).to(x.dtype)
                outer += torch.mm(grad_z[rows].transpose(0, 1), normalised)
    grad_down = grad_norm_weight = grad_norm_bias = total = None
    if need_norm_bias or (need_down and norm_bias is not None):
        total = grad_z.sum(0, dtype=wide)
    if need_down:
        grad_down = outer if norm_weight is None else outer * norm_weight
        if norm_bias is not None:
            grad_down = torch.addr(grad_down, total, norm_bias.to(wide))
        grad_down = grad_down.to(grad_z.dtype)
    if need_norm_weight:
        grad_norm_weight = (down_weight * outer).sum(0).to(grad_z.dtype)
    if need_norm_bias:
        grad_norm_bias = torch.mv(down_weight.to(wide).transpose(0, 1), total).to(grad_z.dtype)
    return grad_x, grad_down, grad_norm_weight, grad_norm_bias
