"""gelu in Triton: y = x Phi(x) and its gradient, element by element: each tensor is read or written once, 16 bytes at a time.

In half precision Phi comes from R(a) = e^(a^2/2) Q(a), Q(a) = 1 - Phi(a) for a = |x|, as a polynomial in t = 1 / (1 + p a):
smooth, and decaying like R itself, so its error is relative in the tail as well. One exponential and one reciprocal, no
branch, for forward and backward alike:

    y     = max(x, 0) - a Q(a)
    dy/dx = D(a) for x < 0, else 1 - D(a), with D(a) = e^(-a^2/2) (R(a) - a / sqrt(2 pi))

The coefficients are a minimax fit of degree 5 to R(a) / t over a in [0, 13.5], relative error 3.8e-6 (2^-18).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgist_kernels.adapter_parts import activate, activation_slope
from fastgist_kernels.aot import Spec
from fastgist_kernels.common import INTERPRET, cdiv, device_arch, launch, launch_config
from fastgist_kernels.outer import narrow

__all__ = ["SPECS", "gelu_bwd", "gelu_fwd"]


@triton.jit
def reciprocal(v):
    """1 / v for v >= 1 by the hardware's approximation (1 ulp); a division would guard against overflow as well."""
    if INTERPRET:
        return 1.0 / v
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exponential(u):
    """2^u, which may vanish."""
    if INTERPRET:
        return tl.exp2(u)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tail(x, a):
    """e^(-a^2/2) and R(a), a = |x|."""
    e = exponential(x * x * -0.7213475204444817)  # x * x is exact for a half-precision x
    t = reciprocal(1.0 + 0.3077 * a)
    r = -0.07577854 * t + 0.1913711
    r = r * t + 0.005570326
    r = r * t + 0.1372276
    r = r * t + 0.1185904
    r = r * t + 0.1230173
    return e, r * t


@triton.jit
def gelu_value(x, ERF: tl.constexpr):
    if ERF:
        return activate(x, "gelu")
    # +inf must not meet 0: a large finite number stands in. -inf does, and NaN is what torch gives there.
    a = tl.abs(tl.minimum(x, 1e38, propagate_nan=tl.PropagateNan.ALL))
    e, r = tail(a, a)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * (e * r)


@triton.jit
def gelu_slope(x, ERF: tl.constexpr):
    if ERF:
        return activation_slope(x, "gelu")
    a = tl.abs(x)
    e, r = tail(x, a)
    d = e * (r - 0.3989422804014327 * a)
    return tl.where(x < 0.0, d, 1.0 - d)


@triton.jit
def _gelu_fwd_kernel(x_ptr, y_ptr, n, ERF: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, narrow(gelu_value(x, ERF), y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, n, ERF: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + offs, narrow(grad * gelu_slope(x, ERF), grad_x_ptr.dtype.element_ty), mask=mask)


# -- launching -------------------------------------------------------------------------------------------------------


def _config(kernel: str, x) -> dict[str, int]:
    """Two 16-byte accesses a thread and tensor in half precision."""
    arch = device_arch(x.device)
    if arch == "interpret":
        return {"BLOCK": 4096}
    default = {"BLOCK": 2048 if x.element_size() == 2 else 1024, "num_warps": 4, "num_stages": 1}
    return default | launch_config(kernel, arch, f"b{x.element_size()}")


def gelu_fwd(x, y) -> None:
    """Write y = gelu(x), both contiguous and of one shape."""
    n = x.numel()
    launch(
        _gelu_fwd_kernel,
        lambda c: (cdiv(n, c["BLOCK"]),),
        _config("gelu_fwd", x),
        x,
        y,
        n,
        ERF=x.element_size() == 4,
    )


def gelu_bwd(grad, x, grad_x) -> None:
    """Write grad_x = grad * gelu'(x), all contiguous and of one shape."""
    n = x.numel()
    launch(
        _gelu_bwd_kernel,
        lambda c: (cdiv(n, c["BLOCK"]),),
        _config("gelu_bwd", x),
        grad,
        x,
        grad_x,
        n,
        ERF=x.element_size() == 4,
    )


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


def _specs() -> list[Spec]:
    out = []
    for dtype in ("bf16", "fp16", "fp32"):
        tile = {"ERF": dtype == "fp32", "BLOCK": 1024 if dtype == "fp32" else 2048}
        pair = {"x_ptr": f"*{dtype}", "n": "i32"}
        kernels = (
            (_gelu_fwd_kernel, {"y_ptr": f"*{dtype}"}),
            (_gelu_bwd_kernel, {"grad_ptr": f"*{dtype}", "grad_x_ptr": f"*{dtype}"}),
        )
        for kernel, others in kernels:
            out.append(Spec(kernel, dtype, pair | others, tile, num_warps=4, num_stages=1, aligned=("n",), wide=True))
    return out


SPECS = _specs()
