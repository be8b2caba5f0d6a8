"""torch.func's transforms (vmap, grad, jvp, jacrev, ...), which have no rule for a loss that is a kernel."""

from __future__ import annotations

import torch

from fastgist.ops import _common

__all__ = ["refuse"]


def refuse(op: str) -> None:
    """RuntimeError if a transform is at work; torch's own says how to write an autograd.Function, not whose it is.

    Compiled code traces transforms itself.
    """
    if not torch.compiler.is_compiling() and _common.transforms_active():
        raise RuntimeError(
            f"{op}: no rule for torch.func's transforms (vmap, grad, jvp, jacrev, ...): it is a kernel with its gradient. "
            f"fastgist.reference.{op}.{op} is the formula in plain torch, which they take; batches need none: (..., V)"
        )
