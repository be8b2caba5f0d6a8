r"""GELU in its exact form (Hendrycks and Gimpel, arXiv 1606.08415).

.. math::
    y = x\,\Phi(x), \qquad \Phi(x) = \tfrac12 \left(1 + \mathrm{erf}(x / \sqrt 2)\right), \qquad
    \frac{dy}{dx} = \Phi(x) + x\,\varphi(x), \quad \varphi(x) = e^{-x^2/2} / \sqrt{2 \pi}
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgist.reference._numerics import accumulate

__all__ = ["backward", "forward", "gelu"]


def gelu(x: Tensor) -> Tensor:
    """The formula, by autograd, float32 (float64) inside; shapes as :func:`fastgist.functional.gelu`."""
    wide = accumulate(x)
    return (0.5 * wide * (1.0 + torch.erf(wide * 0.5**0.5))).to(x.dtype)


def forward(x: Tensor) -> Tensor:
    """y as PyTorch's own kernel makes it, which computes in float32 too."""
    return torch.nn.functional.gelu(x)


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """dL/dx from grad = dL/dy, by PyTorch's own kernel."""
    return torch.ops.aten.gelu_backward(grad, x)
