"""Attention whose gradient is wanted for a few neighbouring rows of the sequence only. Internal: no implementations to choose.

With P the attention weights, out = P v, and dO the gradient of out, row g of the gradients is

    dv_g = sum_i P_ig dO_i,   dk_g = s sum_i dS_ig q_i,   dq_g = s sum_j dS_gj k_j,
    dS_ij = P_ij (dO_i . v_j - delta_i),   delta_i = dO_i . out_i,   P_ij = exp(s q_i . k_j - lse_i):

a column and a row of the weights, formed again from the log-sum-exp that the forward's kernel gives anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgist.ops import _common

__all__ = ["attention_for_rows", "serves_attention"]

_OP = "attention_for_rows"
_SDPA = "torch.nn.functional.scaled_dot_product_attention"
#: What torch._fused_sdp_choice answers.
_FLASH, _EFFICIENT, _CUDNN = 1, 2, 3

Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@functools.cache
def _runs() -> dict[tuple[str, int], Run]:
    """(device, torch's choice) -> the operator that scaled_dot_product_attention would call, giving (out, lse)."""
    found: dict[tuple[str, int], Run] = {}

    def add(device: str, choice: int, name: str, **options: Any) -> None:
        op = getattr(getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None), "default", None)
        if op is None:
            return
        known = [argument.name for argument in op._schema.arguments]
        results = [result.name.replace("_", "") for result in op._schema.returns[:2]]
        if known[:3] == ["query", "key", "value"] and options.keys() <= set(known) and results[1] == "logsumexp":
            found[device, choice] = lambda q, k, v: op(q, k, v, **options)[:2]

    add("cpu", _FLASH, "flash_attention_for_cpu")
    add("cuda", _FLASH, "flash_attention")
    add("cuda", _EFFICIENT, "efficient_attention", attn_bias=None, compute_log_sumexp=True)
    add("cuda", _CUDNN, "cudnn_attention", attn_bias=None, compute_log_sumexp=True)
    return found


def _run_for(q: Tensor, k: Tensor, v: Tensor) -> Run | None:
    """The operator for these tensors, or None where torch takes none that is known."""
    if q.device.type not in ("cpu", "cuda") or not hasattr(torch, "_fused_sdp_choice"):
        return None
    if q.is_cuda and q.shape[-1] % 8:  # scaled_dot_product_attention fills the heads up first
        return None
    return _runs().get((q.device.type, int(torch._fused_sdp_choice(q, k, v))))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# -- the raw op ------------------------------------------------------------------------------------------------------
# q, k, v (B, H, N, d); out is stored as (B, N, H, d), as the operators store it for a q that is a view of rows, and as the
# next layer reads it; lse (B, H, N) in float32 or wider.


def _attention_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    run, wide = _run_for(q, k, v), _wide(q.dtype)
    if run is not None:
        out, lse = run(q, k, v)
        lse = lse.flatten(2)[:, :, : q.shape[2]]  # of padded rows, or with a dimension of 1
    else:  # in a compiled graph, where nobody could ask before
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        lse = ((q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).transpose(-2, -1)).logsumexp(-1)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.to(wide).contiguous()


def _attention_lse_fake(q, k, v):
    batch, heads, rows, width = q.shape
    out = q.new_empty(batch, rows, heads, width).transpose(1, 2)
    return out, q.new_empty(batch, heads, rows, dtype=_wide(q.dtype))


_fwd_op = _common.define(
    "attention_lse(Tensor q, Tensor k, Tensor v) -> (Tensor out, Tensor lse)",
    _attention_lse,
    _attention_lse_fake,
    _SDPA,
)


class _AttentionForRows(torch.autograd.Function):
    """out (B, H, N, d) of q, k, v, which get no gradient; those of their rows do, given beside them. Saves q, k, v, out and
    lse."""

    @staticmethod
    def forward(ctx, q_rows, k_rows, v_rows, q, k, v, first):
        out, lse = _fwd_op(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rows = slice(first, first + q_rows.shape[2])
        return out

    @staticmethod
    @_common.single_backward(
        _OP, "Attention is differentiated twice under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        scale, rows = q.shape[-1] ** -0.5, ctx.rows
        with torch.autocast(q.device.type, enabled=False):  # nothing here may be summed in half precision
            grad_wide = grad.to(lse.dtype)
            delta = (grad_wide * out).sum(-1)
            q_rows, k_rows, v_rows, grad_rows = (t[:, :, rows].to(lse.dtype) for t in (q, k, v, grad))
            column = torch.exp(scale * _along(q, k_rows) - lse[..., None])  # what every row sees of these
            column_grad = column * (_along(grad_wide, v_rows) - delta[..., None])
            weights = torch.exp(scale * _along(k, q_rows) - lse[:, :, None, rows])  # what these see
            weights_grad = weights * (_along(v, grad_rows) - delta[:, :, None, rows])
            grads = scale * _across(weights_grad, k), scale * _across(column_grad, q), _across(column, grad_wide)
            return (*(g.to(q.dtype) for g in grads), None, None, None, None)


# One row is a vector, and many products with vectors are sums: a compiler makes two passes over memory of all of them, and
# half precision times float32 is float32 without a copy. For more rows they are matrices.


def _along(t: Tensor, rows: Tensor) -> Tensor:
    """Products of t (B, H, N, d), row by row, with each of ``rows`` (B, H, L, d) in float32 or wider: (B, H, N, L)."""
    if rows.shape[2] == 1:
        return (t * rows).sum(-1, keepdim=True)
    return t.to(rows.dtype) @ rows.transpose(-2, -1)


def _across(weights: Tensor, t: Tensor) -> Tensor:
    """Sums over the rows of t (B, H, N, d), by each column of ``weights`` (B, H, N, L): (B, H, L, d)."""
    if weights.shape[-1] == 1:
        return (weights * t).sum(2, keepdim=True)
    return weights.transpose(-2, -1) @ t.to(weights.dtype)


# -- the functions ---------------------------------------------------------------------------------------------------


def _for_autocast(t: Tensor) -> Tensor:
    """``t`` as scaled_dot_product_attention would take it."""
    dtype = _common.autocast_dtype(t.device.type)
    return t if dtype is None or t.dtype == torch.float64 else t.to(dtype)


def serves_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`attention_for_rows` calls what torch's own attention would. While a graph is traced nobody can ask torch:
    the answer then goes by device and dtype, and the call is right in any case."""
    q, k, v = map(_for_autocast, (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        return False
    if torch.compiler.is_compiling():
        return q.device.type == "cpu" or (q.is_cuda and q.dtype != torch.float64 and q.shape[-1] % 8 == 0)
    return _run_for(q, k, v) is not None


def attention_for_rows(rows: tuple[Tensor, Tensor, Tensor], whole: tuple[Tensor, Tensor, Tensor], first: int) -> Tensor:
    """``scaled_dot_product_attention(q, k, v)`` with gradients for the rows ``first .. first + L`` of the sequence.

    Args:
        rows: (q, k, v) of those rows, each (B, H, L, d). They take the gradients; their numbers are not read.
        whole: (q, k, v) of all rows, each (B, H, N, d), which take none.
        first: where the rows stand.

    Returns:
        (B, H, N, d), as autocast says or in q's dtype.

    Raises:
        RuntimeError: a second derivative.
    """
    return _AttentionForRows.apply(*map(_for_autocast, rows), *map(_for_autocast, whole), first)
