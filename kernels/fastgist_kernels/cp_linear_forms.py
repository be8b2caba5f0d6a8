"""The forms in which cp_linear's products can be computed, and what each of them asks of its operands.

"fused"        h = x U accumulates beside x W^T as R more columns of the loop; the update is added in the epilogue.
"started"      h comes from a kernel of its own, and the accumulator starts from the update.
"blas"         the library's product, then the update added to what it wrote.
"few"          up to 64 rows: W is read once, by so many programs that the memory has enough to do. Forward only.
"tma_fused", "tma_started"   the first two as persistent programs that fetch by tensor descriptors. Forward of one weight.

In the backward a form says how dx = dy W + dL/dh U^T is computed. Which form pays is for cp_linear_plan.py to say;
:func:`can` only says which would run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastgist_kernels.common import device_arch

__all__ = ["FEW_ROWS", "FORMS", "aligned", "can", "described", "most_fused_rank"]

#: A launch table holds positions in this tuple: new forms go to its end.
FORMS = ("fused", "started", "blas", "few", "tma_fused", "tma_started")
#: Architectures whose copy engine the kernels were compiled for.
TMA_ARCHITECTURES = ("sm_90", "sm_100", "sm_103")
#: Rows of the form for few rows at most.
FEW_ROWS = 64


def most_fused_rank(dtype: torch.dtype, tf32: bool) -> int:
    """The largest rank whose h fits beside the accumulator: full float32 products take registers for every element of it."""
    return 32 if dtype == torch.float32 and not tf32 else 64


def aligned(t: torch.Tensor) -> bool:
    """Whether a tile of ``t`` can be fetched 16 bytes at a time, as Triton sees it: numbers that lie next to each other along
    one side (not so where one number is expanded), and a multiple of 16 of them from there to the next.

    Else every load of the loop goes through registers: tiles with BLOCK_K = 64 then spill and, where u is not aligned
    either, meet a fault of ptxas 12.8 (see :func:`fastgist_kernels.aot_gates.undefined_uniform`).
    """
    return t.data_ptr() % 16 == 0 and 1 in t.stride() and all(s == 1 or s % 16 == 0 for s in t.stride())


def described(t: torch.Tensor) -> bool:
    """Whether a tensor descriptor can stand for the matrix ``t``: rows without gaps that begin on 16 bytes and do not overlap
    (CUDA takes no stride below a row's length)."""
    rows = t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) * t.dtype.itemsize % 16 == 0
    return rows and t.data_ptr() % 16 == 0


def can(
    form: str, x: torch.Tensor, weights: Sequence[torch.Tensor], rank: int, tf32: bool, *, forward: bool = True
) -> bool:
    """Whether ``form`` runs on these operands: x (M, K) and weights (N_i, K), or with ``forward=False`` dy (M, N), N the sum
    of all N_i, and the same weights as the forward had them."""
    if form == "started":
        return True
    if form == "fused":  # its backward makes a copy of V times the gain, which may pass float16's range
        return rank <= most_fused_rank(x.dtype, tf32) and (forward or x.dtype != torch.float16)
    if form == "blas":  # its update would be rounded to float16 between the products
        return x.dtype != torch.float16
    if form == "few":
        most = FEW_ROWS if tf32 or x.dtype != torch.float32 else 16  # full float32 products of more rows spill
        return forward and x.shape[0] <= most and aligned(x) and all(map(aligned, weights))
    if form in ("tma_fused", "tma_started"):
        arch = device_arch(x.device)
        ours = arch == "interpret" or (arch in TMA_ARCHITECTURES and x.dtype.itemsize == 2)
        if not (forward and ours and len(weights) == 1 and described(x) and described(weights[0])):
            return False
        return form == "tma_started" or (can("fused", x, weights, rank, tf32) and rank * x.dtype.itemsize % 16 == 0)
    raise ValueError(f"cp_linear has no form {form!r}")
