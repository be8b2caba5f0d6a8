"""Every form of cp_linear in half precision at sizes that models have, one weight and three. Needs a GPU."""

from __future__ import annotations

import pytest
import torch

from fastgist.functional import cp_linear
from fastgist.reference.cp_linear import cp_linear as formula
from fastgist.testing import assert_within_budget

pytestmark = pytest.mark.gpu

FORWARD = ("fused", "started", "blas", "few", "tma_fused", "tma_started")
BACKWARD = ("fused", "started", "blas")
#: rows, K, rows of the weights, width of a fold, rank
SIZES = [
    (1, 768, (768,), 768, 16), (17, 2048, (2048, 512, 512), 512, 16), (64, 4096, (4096,), 4096, 64),
    (4099, 768, (768, 768, 768), 768, 16), (4099, 768, (3072,), 768, 64), (257, 832, (832, 208), 208, 5),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inner", "outs", "fold", "rank"), SIZES)
@pytest.mark.parametrize(("form", "forward"), [(f, True) for f in FORWARD] + [(f, False) for f in BACKWARD])
def test_a_form(monkeypatch, form, forward, rows, inner, outs, fold, rank, dtype):
    from fastgist_kernels import cp_linear as forward_kernels
    from fastgist_kernels import cp_linear_bwd as backward_kernels
    from fastgist_kernels.cp_linear_forms import can

    def randn(*shape, spread=1.0):
        return (torch.randn(*shape) * spread).to("cuda", dtype)

    total = sum(outs)
    x, u, v = randn(rows, inner), randn(inner, rank, spread=inner**-0.5), randn(fold, rank, spread=rank**-0.5)
    weights = [randn(n, inner, spread=inner**-0.5) for n in outs]
    biases, gain = [randn(n) for n in outs], randn(total // fold, rank)
    grads = [randn(rows, n) for n in outs]
    if not can(form, x if forward else torch.cat(grads, 1), weights, rank, False, forward=forward):
        pytest.skip("not for these operands")
    patched = forward_kernels if forward else backward_kernels
    monkeypatch.setattr(patched, "cp_linear_form", lambda *a, **k: form)

    def run(function, to):
        leaves = [t.to(to).requires_grad_() for t in (x, u, v, gain)]
        base = [[t.to(to) for t in pieces] for pieces in (weights, biases)]
        out = function(leaves[0], *base, *leaves[1:])
        return [*out, *torch.autograd.grad(out, leaves, [g.to(to) for g in grads])]

    def plain(x, weights, biases, u, v, gain):
        return formula(x, torch.cat(weights), torch.cat(biases), u, v, gain).split(list(outs), -1)

    ours = run(lambda *a: cp_linear(*a, impl="triton"), dtype)
    peers = run(lambda *a: cp_linear(*a, impl="reference"), dtype)
    exact = run(plain, torch.float64)
    names = (*(f"y[{i}]" for i in range(len(outs))), "x", "u", "v", "gain")
    for name, mine, p, e in zip(names, ours, peers, exact, strict=True):
        assert_within_budget(mine, p, e, what=name)
