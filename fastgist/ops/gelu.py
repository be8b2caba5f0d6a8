"""gelu: schema, fake, checks, dispatch and autograd. The formula is in fastgist/reference/gelu.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgist import backends
from fastgist.ops import _common
from fastgist.reference import gelu as reference

__all__ = ["gelu"]

_OP = "gelu"


# -- raw ops ---------------------------------------------------------------------------------------------------------
# x and grad of any shape and strides; results are contiguous.


def _fwd(x: Tensor, impl: str) -> Tensor:
    if backends.resolve(_OP, impl, x) == "reference" or x.numel() == 0:
        return reference.forward(x).contiguous()
    from fastgist_kernels import gelu as kernels

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels.gelu_fwd(x.contiguous(), y)
    return y


def _fwd_fake(x, impl):
    backends.resolve(_OP, impl, x)
    return x.new_empty(x.shape)


def _bwd(grad: Tensor, x: Tensor, impl: str) -> Tensor:
    if backends.resolve(_OP, impl, grad) == "reference" or x.numel() == 0:
        return reference.backward(grad, x).contiguous()
    from fastgist_kernels import gelu as kernels

    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels.gelu_bwd(grad.contiguous(), x.contiguous(), grad_x)
    return grad_x


def _bwd_fake(grad, x, impl):
    backends.resolve(_OP, impl, grad)
    return x.new_empty(x.shape)


_fwd_op = _common.define("gelu_fwd(Tensor x, str impl) -> Tensor", _fwd, _fwd_fake, _OP)
_bwd_op = _common.define("gelu_bwd(Tensor grad, Tensor x, str impl) -> Tensor", _bwd, _bwd_fake, _OP)


class _Gelu(torch.autograd.Function):
    """y, of x's shape. Saves x."""

    @staticmethod
    def forward(ctx, x, impl):
        ctx.save_for_backward(x)
        ctx.impl = impl
        return _fwd_op(x, impl)

    @staticmethod
    @_common.single_backward(_OP)
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return _bwd_op(grad, x, ctx.impl), None


# -- the public function ---------------------------------------------------------------------------------------------


def gelu(x: Tensor, *, impl: str = "auto") -> Tensor:
    r"""GELU in its exact form, y = x Phi(x) with Phi the normal distribution's (Hendrycks and Gimpel, arXiv 1606.08415).

    For bfloat16 and float16 on a GPU the kernel takes Phi from a polynomial and one exponential in the place of erf: before
    it is rounded the result is within 2^-17 of the exact value, relative, down to 2^-126 (float16's half unit in the last
    place is 2^-12), also in the left tail, where 1 + erf cancels. The derivative is within 2^-17 of the sum of its absolute
    terms, Phi(x) + \|x\| phi(x). float32 takes erf.

    Args:
        x: (...), float32, bfloat16, float16 or float64, any strides.
        impl: "auto", "triton" or "reference"; see :mod:`fastgist.backends`.

    Returns:
        x's shape and dtype, contiguous. NaN at -inf, as in PyTorch.

    Raises:
        TypeError: x is no floating-point tensor.
        RuntimeError: an explicit ``impl`` that cannot run here; a second derivative.
    """
    _common.check_floating(_OP, "x", x)
    return _Gelu.apply(x, impl)
