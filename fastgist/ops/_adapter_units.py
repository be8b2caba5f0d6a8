"""adapter with a few hidden units in CUDA C++ (csrc/cuda/adapter.cuh): when it serves, and the calls."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastgist.reference.adapter import ACTIVATIONS

__all__ = ["MOST_UNITS", "bwd", "fwd", "why_not"]

MOST_UNITS = 8
#: Blocks that share the rows, a multiprocessor.
_BLOCKS = 4


def _aligned(t: Tensor) -> bool:
    """Whether every row of ``t`` (M, D) can be read 16 bytes at a time."""
    return t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0


def why_not(x: Tensor, hidden: int, out: int, gate: Tensor | None, *rows: Tensor | None) -> str | None:
    """Why the kernels do not serve an adapter of x (M, D), or None where they do. ``rows``: what is read beside x."""
    width = x.shape[1]
    if hidden > MOST_UNITS:
        return f"it serves up to {MOST_UNITS} hidden units, got {hidden}"
    if gate is not None:
        return "it serves no gate"
    if out != width:
        return f"it serves adapters from a width to itself, got {width} to {out}"
    if width % 8 or width > (2048 if hidden <= 2 else 1024):
        return f"it serves widths up to 1024 (2048 for two units) that 8 divides, got {width}"
    if not all(_aligned(t) for t in (x, *rows) if t is not None):
        return "it serves rows that are contiguous and aligned to 16 bytes"
    return None


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def fwd(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    branch: Tensor | None,
    activation: str,
    scale: float,
    residual_scale: float,
) -> Tensor:
    """y (M, D)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weights = (down_weight, down_bias, up_weight, up_bias)
    numbers = (ACTIVATIONS.index(activation), scale, residual_scale)
    torch.ops.fastgist_native.adapter_fwd(x, *weights, residual, branch, *numbers, y)
    return y


def bwd(
    grad: Tensor,
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    activation: str,
    scale: float,
    residual_scale: float,
    residual_is_x: bool,
    grads: tuple[Tensor | None, ...],
) -> None:
    """Write the gradients of x, down_weight, down_bias, up_weight and up_bias that are not None. grad: any strides."""
    grad = grad if _aligned(grad) else grad.contiguous()
    (rows, width), hidden = x.shape, up_weight.shape[1]
    programs = min(-(-rows // 4), _BLOCKS * _processors(x.device))
    part = torch.empty(programs, width * (2 * hidden + 1) + hidden, dtype=torch.float32, device=x.device)
    numbers = (ACTIVATIONS.index(activation), scale, residual_scale, residual_is_x)
    torch.ops.fastgist_native.adapter_bwd(grad, x, down_weight, down_bias, up_weight, *numbers, part, *grads)
