"""Finished gradients times the gradient of their loss, in place: nothing is touched where it is 1, as it mostly is."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, device_arch, launch, launch_config
from fastgist_kernels.outer import narrow

__all__ = ["SPECS", "scale_unless_one"]


@triton.jit
def _scale_unless_one_kernel(a_ptr, b_ptr, factor_ptr, n, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:  # so NaN multiplies
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < n
        a = tl.load(a_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(a_ptr + offs, narrow(a * factor, a_ptr.dtype.element_ty), mask=mask)
        if PAIR:
            b = tl.load(b_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            tl.store(b_ptr + offs, narrow(b * factor, b_ptr.dtype.element_ty), mask=mask)


def scale_unless_one(grads: list, factor) -> None:
    """Multiply one or two contiguous tensors (M, V) of a dtype in place by factor (), which only the device looks at.

    The product is formed in float32 and rounded once.
    """
    first, second = grads[0], grads[-1]
    n = first.numel()
    if n == 0:
        return
    default = {"BLOCK": 4096 if first.element_size() == 2 else 2048, "num_warps": 4, "num_stages": 1}
    config = default | launch_config("scale_unless_one", device_arch(first.device), f"b{first.element_size()}")
    launch(
        _scale_unless_one_kernel,
        lambda c: (cdiv(n, c["BLOCK"]),),
        config,
        first,
        second,
        factor,
        n,
        PAIR=len(grads) == 2,
    )


SPECS = [
    Spec(
        _scale_unless_one_kernel,
        dtype,
        {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "factor_ptr": "*fp32", "n": "i32"},
        {"PAIR": True, "BLOCK": 2048 if dtype == "fp32" else 4096},
        num_warps=4,
        num_stages=1,
        wide=True,
        numbers=1,
        aligned=("n",),
    )
    for dtype in ("bf16", "fp16", "fp32")
]
