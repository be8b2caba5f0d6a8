"""Numerics that more than one formula uses unchanged."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulate_dtype", "accumulate"]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums run in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulate(x: Tensor) -> Tensor:
    """``x`` in its accumulation dtype (no copy if it already is)."""
    return x.to(accumulate_dtype(x.dtype))
