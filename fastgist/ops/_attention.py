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
        lse = lse.reshape(*lse.shape[:2], -1)[:, :, : q.shape[2]]  # of padded rows, or with a dimension of 1
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
        ctx.rows = range(first, first + q_rows.shape[2])
        return out

    @staticmethod
    @_common.single_backward(
        _OP, "Attention is differentiated twice under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        scale, wide = q.shape[-1] ** -0.5, lse.dtype
        # Products are summed, not multiplied as matrices: with one row a compiler makes two passes over memory of it all,
        # and half precision multiplied by float32 is float32 in eager mode too, without copies.
        grad_wide = grad.to(wide)
        delta = (grad_wide * out).sum(-1)
        found: tuple[list[Tensor], ...] = ([], [], [])
        for row in ctx.rows:
            q_row, k_row, v_row, grad_row = (t[:, :, row : row + 1].to(wide) for t in (q, k, v, grad))
            column = torch.exp(scale * (q * k_row).sum(-1) - lse)  # what every row sees of this one
            column_grad = column * ((grad_wide * v_row).sum(-1) - delta)
            weights = torch.exp(scale * (k * q_row).sum(-1) - lse[:, :, row : row + 1])  # what this one sees
            weights_grad = weights * ((v * grad_row).sum(-1) - delta[:, :, row : row + 1])
            found[0].append(scale * (weights_grad[..., None] * k).sum(2))
            found[1].append(scale * (column_grad[..., None] * q).sum(2))
            found[2].append((column[..., None] * grad_wide).sum(2))
        grads = (torch.stack(each, dim=2).to(q.dtype) for each in found)
        return (*grads, None, None, None, None)


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
