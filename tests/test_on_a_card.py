"""What host code does on a GPU before a kernel starts: forms, tiles, temporaries and the library's products, in every dtype,
for cards of every architecture, without one. Kernels are noted instead of run, so no number is looked at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from every_op import Call, make

from fastgist.backends import OPS

sys.path.insert(0, str(Path(__file__).parents[1]))
pytest.importorskip("triton")

from benchmarks.launches import HOPPER, Card, Ledger, on_a_card

AMPERE = Card("sm_80 with 108 processors", "sm_80", 108, 166912)
BLACKWELL = Card("sm_100 with 148 processors", "sm_100", 148, 232448)


def gated(dtype: torch.dtype, rows: int) -> Call:
    """A mixture of three experts, each with a bias of its own."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    tensors = {"x": randn(rows, 72), "down": randn(9, 72), "down_bias": randn(9), "up": randn(72, 9)}
    tensors |= {"up_bias": randn(3, 72), "gate": randn(rows, 3)}

    class Gated(Call):
        def __call__(self, *values, impl: str = "auto", **options):
            from fastgist.functional import adapter

            return adapter(*values[:5], gate=values[5], impl=impl, **options)

    return Gated("adapter", tensors, tuple(tensors))


@pytest.mark.parametrize("card", [HOPPER, AMPERE, BLACKWELL], ids=lambda card: card.arch)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 9, 3001])
@pytest.mark.parametrize("op", [*OPS, "adapter with a gate"])
def test_host_code_runs_as_on_a_card(op, rows, dtype, card):
    call = gated(dtype, rows) if op not in OPS else make(op, dtype, device="cpu", rows=rows)
    values = call.values()
    with on_a_card(card), Ledger() as seen:
        out = call(*values, impl="triton")
        grads = torch.autograd.grad(out, call.wanted(values), torch.ones_like(out))
    assert all(g.shape == v.shape and g.dtype == v.dtype for g, v in zip(grads, call.wanted(values), strict=True))
    assert any(name.endswith("_kernel") for name in seen.found)
