"""The forms in which cp_linear's products can be computed, and what each of them asks of its operands.

"fused"        h = x U accumulates beside x W^T as R more columns of the loop; the update is added in the epilogue.
"started"      h comes from a kernel of its own, and the accumulator starts from the update.
"blas"         the library's product, then the update added to what it wrote.
"few"          up to 64 rows: W is read once, by so many programs that the memory has enough to do. Forward only.
"tma_fused", "tma_started"   the first two as persistent programs that fetch by tensor descriptors. Forward only.

In the backward a form says how dx = dy W + dL/dh U^T is computed. Which form pays is for cp_linear_plan.py to say;
:func:`can` only says which would run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastgist_kernels.common import device_arch

__all__ = ["FEW_ROWS", "FORMS", "PIECES", "can", "most_fused_rank"]

#: A launch table holds positions in this tuple: new forms go to its end.
FORMS = ("fused", "started", "blas", "few", "tma_fused", "tma_started")
#: Rows of the form for few rows at most.
FEW_ROWS = 64
#: Weights that one launch takes: q, k and v. More of them go in groups that share h.
PIECES = 3


def most_fused_rank(dtype: torch.dtype, tf32: bool) -> int:
    """The largest rank whose h fits beside the accumulator: full float32 products take registers for every element of it."""
    return 32 if dtype == torch.float32 and not tf32 else 64


def can(
    form: str, x: torch.Tensor, weights: Sequence[torch.Tensor], rank: int, tf32: bool, *, forward: bool = True
) -> bool:
    """Whether ``form`` runs on these operands: x (M, K) and weights (N_i, K), or with ``forward=False`` dy (M, N), N the sum
    of all N_i, and the same weights as the forward had them."""
    if form == "started":
        return True
    if form == "fused":  # dL/dh of float16 may pass its range, and so may V times the gain, of which this form makes a copy
        return rank <= most_fused_rank(x.dtype, tf32) and (forward or x.dtype != torch.float16)
    if form == "blas":  # its update would be rounded to float16 between the products
        return x.dtype != torch.float16
    if form == "few":
        return forward and x.shape[0] <= FEW_ROWS
    return False
