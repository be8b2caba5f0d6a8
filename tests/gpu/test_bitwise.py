"""A thousand runs of each operation, forward and backward, bit for bit the same. Needs a GPU."""

from __future__ import annotations

import pytest
import torch
from every_op import Call, make

from fastgist.backends import OPS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [9, 3001])
def test_a_thousand_runs_are_bitwise_equal(op, dtype, rows):
    call = make(op, dtype, device="cuda", rows=rows)
    want, want_grads = call.run(impl="triton")
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        got, grads = call.run(impl="triton")
        for mine, w in zip((got, *grads), (want, *want_grads), strict=True):
            differing += (mine.view(torch.uint8) != w.view(torch.uint8)).sum() if mine.dim() else mine.ne(w)
    assert int(differing) == 0


def test_large_split_reductions_are_bitwise_equal():
    """Weight gradients summed over many row blocks: no atomics, one order."""
    for op in ("cp_linear", "adapter"):
        call = make(op, torch.bfloat16, device="cuda", rows=100_003)
        _, want = call.run(impl="triton")
        for _ in range(20):
            _, grads = call.run(impl="triton")
            assert all(torch.equal(mine, w) for mine, w in zip(grads, want, strict=True))


@pytest.mark.parametrize("hidden", [4, 15])
@pytest.mark.parametrize("rows", [100, 50_003])
def test_adapter_in_one_pass_is_bitwise_equal(rows, hidden):
    def randn(*shape, spread=1.0):
        return (torch.randn(*shape) * spread).to("cuda", torch.bfloat16)

    tensors = {"x": randn(rows, 768), "down": randn(hidden, 768, spread=0.04), "down_bias": randn(hidden)}
    tensors |= {"up": randn(768, hidden), "up_bias": randn(768)}
    call = Call("adapter", tensors, tuple(tensors), {"scale": 0.5})
    _, want = call.run(impl="triton")
    for _ in range(100):
        _, grads = call.run(impl="triton")
        assert all(torch.equal(mine, w) for mine, w in zip(grads, want, strict=True))
