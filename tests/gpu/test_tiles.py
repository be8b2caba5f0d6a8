"""Every tile and alignment that cp_linear and adapter choose between, in half precision. Needs a GPU.

What the interpreter cannot show: the compiler's own faults. One of them gave wrong results on an H200 where neither x nor
u could be fetched 16 bytes at a time.
"""

from __future__ import annotations

import pytest
import torch

from fastgist.functional import adapter, cp_linear
from fastgist.testing import assert_within_budget

pytestmark = pytest.mark.gpu

#: (rows, K, N, rank): aligned and not, on both sides of every boundary between tiles. Few: each compiles a dozen kernels.
CP = [
    (33, 72, 48, 5), (257, 72, 48, 5), (257, 72, 48, 16), (257, 80, 48, 5), (4099, 72, 48, 8), (257, 770, 66, 64),
    (33, 128, 128, 16), (257, 128, 128, 5), (4099, 768, 768, 16), (4099, 768, 768, 5), (4099, 768, 768, 64),
    (20_000, 768, 768, 16),
]  # fmt: skip
#: (rows, width, bottleneck)
ADAPTER = [
    (33, 72, 9), (33, 128, 4), (257, 770, 9), (4099, 72, 130), (4099, 128, 64), (4099, 768, 4), (4099, 770, 64),
    (30_000, 768, 4), (30_000, 768, 64), (30_000, 768, 130), (257, 208, 8),
    (4099, 640, 7), (30_000, 384, 7), (30_000, 768, 15),
]  # fmt: skip


def _randn(*shape, spread=1.0, dtype):
    return (torch.randn(*shape) * spread).to("cuda", dtype)


def _hold(function, tensors, leaves, dtype):
    """The result and gradients of ``function(impl=...)`` against float64, with the eager path as the plain peer."""

    def run(impl, to):
        values = [t.detach().to(to).requires_grad_(name in leaves) for name, t in tensors.items()]
        out = function(*values, impl=impl)
        wanted = [v for name, v in zip(tensors, values, strict=True) if name in leaves]
        grad = torch.linspace(-1.5, 1.5, out.numel(), device="cuda").reshape(out.shape).to(dtype).to(to)
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)]

    ours, plain, exact = run("triton", dtype), run("reference", dtype), run("reference", torch.float64)
    for name, mine, p, e in zip(("result", *leaves), ours, plain, exact, strict=True):
        assert_within_budget(mine, p, e, what=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inner", "out", "rank"), CP)
def test_cp_linear(rows, inner, out, rank, dtype):
    tensors = {"x": _randn(rows, inner, dtype=dtype), "weight": _randn(out, inner, spread=inner**-0.5, dtype=dtype)}
    tensors |= {"bias": _randn(out, dtype=dtype), "u": _randn(inner, rank, spread=inner**-0.5, dtype=dtype)}
    tensors |= {"v": _randn(out // 2, rank, dtype=dtype), "gain": _randn(2, rank, dtype=dtype)}
    _hold(cp_linear, tensors, ("x", "u", "v", "gain"), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "hidden"), ADAPTER)
def test_adapter(rows, width, hidden, dtype):
    tensors = {"x": _randn(rows, width, dtype=dtype), "down": _randn(hidden, width, spread=width**-0.5, dtype=dtype)}
    tensors |= {"down_bias": _randn(hidden, dtype=dtype), "up": _randn(width, hidden, spread=0.3, dtype=dtype)}
    tensors |= {"up_bias": _randn(width, dtype=dtype)}
    _hold(adapter, tensors, tuple(tensors), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "hidden"), ADAPTER)
def test_adapter_behind_a_norm_with_dropout(rows, width, hidden, dtype):
    tensors = {
        "x": 3 + _randn(rows, width, dtype=dtype),
        "down": _randn(hidden, width, spread=width**-0.5, dtype=dtype),
    }
    tensors |= {"down_bias": _randn(hidden, dtype=dtype), "up": _randn(width, hidden, spread=0.3, dtype=dtype)}
    tensors |= {"up_bias": _randn(width, dtype=dtype), "weight": 1 + _randn(width, spread=0.2, dtype=dtype)}
    tensors |= {"bias": _randn(width, spread=0.2, dtype=dtype)}
    seed = torch.tensor([12345], device="cuda")

    def call(*values, impl):
        norm = (*values[5:], 1e-5)
        return adapter(*values[:5], norm=norm, dropout_p=0.3, training=True, seed=seed, impl=impl)

    _hold(call, tensors, tuple(tensors), dtype)
