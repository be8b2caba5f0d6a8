"""Mutants of cp_linear and gelu, adapter's beside them: (name, text, its replacement, why a test must notice)."""

from __future__ import annotations

from mutant_list import kernel, reference
from mutants_of_adapter import ADAPTER
from mutants_of_cp_linear import CP_LINEAR_FORMS

__all__ = ["LAYERS"]

CP_LINEAR = [
    *kernel(
        "cp_linear",
        (
            "scale left out of dL/dh",
            "    grad_h = grad_h * scale\n",
            "    grad_h = grad_h * 1.0\n",
            "scale in the one-pass dL/dh",
        ),
        (
            "gain left out of dL/dh",
            "                    acc = acc * tl.load(gain_ptrs, mask=mask_r, other=0.0).to(tl.float32)[None, :]\n",
            "                    acc = acc * 1.0\n",
            "the gain of each fold",
        ),
        (
            "no dropout in the backward",
            "            grad_h = dropped(grad_h, seed_ptr, offs_m, 0, R, threshold, inv_keep, BLOCK_M, BLOCK_R)\n",
            "            grad_h = grad_h * 1.0\n",
            "the mask of the forward",
        ),
        (
            "programs write one partial",
            "part_ptr += pid * sum_of(n0, n1, n2, PIECES) * R",
            "part_ptr += pid * 0",
            "each program has its own",
        ),
        (
            "a row block over the one before",
            "mask=mask_p & (block > 0), other=0.0",
            "mask=mask_p & (block > 1), other=0.0",
            "a program's parts are sums",
        ),
        (
            "gain left out of dV",
            "outer = outer * gain.to(tl.float32)[None, :]",
            "outer = outer * 1.0",
            "dV weighs each fold by its gain",
        ),
        ("folds overwrite dV", "        grad_v += outer\n", "        grad_v = outer\n", "dV sums over the folds"),
        ("dgain without V", "grad_gain = tl.sum(outer * v, 0)", "grad_gain = tl.sum(outer, 0)", "colsum(P * V)"),
        ("last partial dropped", "mask_s = offs_s < splits", "mask_s = offs_s < splits - 1", "every row block counts"),
        (
            "shared gain takes the last fold",
            "gains.view(-1, grad_gain.numel())",
            "gains[:, -1] if gain.shape[0] == 1 else gains.view(-1, grad_gain.numel())",
            "one gain serves every fold",
        ),
        file="cp_linear_bwd",
    ),
    *kernel(
        "cp_linear",
        (
            "rows past M enter",
            "        mask_m = offs_m < M\n        a_ptrs",
            "        mask_m = offs_m < M + 1\n        a_ptrs",
            "the row after the last",
        ),
        (
            "splits start at row 0",
            "offs_m = split * rows_per_split + start",
            "offs_m = start",
            "each split has its rows",
        ),
        (
            "splits write one partial",
            "part_ptrs = part_ptr + split * stride_part +",
            "part_ptrs = part_ptr +",
            "each split has its place",
        ),
        ("factor left out", "    acc = acc * factor\n", "    acc = acc * 1.0\n", "the scale of dU"),
        (
            "output strides swapped",
            "(offs // R) * stride_oc + (offs % R) * stride_or",
            "(offs // R) * stride_or + (offs % R) * stride_oc",
            "written transposed",
        ),
        ("partials overwrite", "        acc += tl.sum(part, 0)\n", "        acc = tl.sum(part, 0)\n", "splits add up"),
        file="outer",
        tests=("tests/test_cp_linear.py", "tests/test_adapter.py"),
    ),
    *kernel(
        "cp_linear",
        (
            "counter ignores the row",
            "counter = offs_m[:, None] * quads + offs_q[None, :]",
            "counter = 0 * offs_m[:, None] + offs_q[None, :]",
            "rows draw apart",
        ),
        (
            "words in another order",
            "tl.join(tl.join(keep0, keep2), tl.join(keep1, keep3))",
            "tl.join(tl.join(keep0, keep1), tl.join(keep2, keep3))",
            "one rule for all implementations",
        ),
        (
            "threshold off",
            "keep1 = ((w1 >> 1).to(tl.int32) >= threshold)",
            "keep1 = ((w1 >> 2).to(tl.int32) >= threshold)",
            "the mask's rate",
        ),
        file="philox",
    ),
    *reference(
        "cp_linear",
        (
            "update not scaled",
            "y.addmm_(h, _folded_v(own_v, own_gain, folds).transpose(0, 1), alpha=scale)",
            "y.addmm_(h, _folded_v(own_v, own_gain, folds).transpose(0, 1))",
            "scale",
        ),
        (
            "few rows without their gain",
            "y.addmm_(h * own_gain, own_v",
            "y.addmm_(h, own_v",
            "the gain goes to the side with fewer rows, not away",
        ),
        (
            "few rows: gain left out of dV",
            "_scaled(h * gain, scale)",
            "_scaled(h.clone(), scale)",
            "dV = dy^T (h * gain)",
        ),
        (
            "few rows: the gain's gradient behind the gain",
            "(low * h).sum(0, keepdim=True)",
            "(grad_h * h).sum(0, keepdim=True)",
            "dgain = sum of (dy V) * h",
        ),
        (
            "merged update not scaled",
            "torch.addmm(weight, folded, u.transpose(0, 1), alpha=scale)",
            "torch.addmm(weight, folded, u.transpose(0, 1))",
            "scale",
        ),
        (
            "dropout not rescaled",
            "torch.where(keep, h / (1.0 - dropout_p), 0.0)",
            "torch.where(keep, h, 0.0)",
            "the mean is kept",
        ),
        (
            "no dropout in the backward",
            "grad_h = (drop or _dropped)(_scaled(low * gain if on_rows else low, scale), dropout_p, seed)",
            "grad_h = _scaled(low * gain if on_rows else low, scale)",
            "the mask of the forward",
        ),
        (
            "gain left out of dV",
            "weighted = by_fold if gain is None else by_fold * accumulate(gain)[:, None]",
            "weighted = by_fold",
            "each fold by its gain",
        ),
        (
            "dgain without V",
            "grad_gain = (outer.view(folds, -1, outer.shape[1]) * accumulate(v)).sum(1)",
            "grad_gain = outer.view(folds, -1, outer.shape[1]).sum(1)",
            "colsum(P * V)",
        ),
        (
            "half merges its weight",
            "    return seed is None and a.dtype in (torch.float32, torch.float64)\n",
            "    return seed is None\n",
            "small updates vanish in bfloat16",
        ),
    ),
]

GELU = [
    *kernel(
        "gelu",
        ("a coefficient off by 1e-4", "r = r * t + 0.1372276", "r = r * t + 0.1373276", "2^-17 of the value"),
        ("the last coefficient off by 1e-5", "r = r * t + 0.1230173", "r = r * t + 0.1230273", "the tail is relative"),
        ("exponent of e, not of 2", "x * x * -0.7213475204444817", "x * x * -0.5", "Phi"),
        ("slope without its density", "e * (r - 0.3989422804014327 * a)", "e * r", "Phi + x phi"),
        ("slope not mirrored", "tl.where(x < 0.0, d, 1.0 - d)", "tl.where(x < 0.0, d, d)", "the right side"),
        (
            "infinity meets 0",
            "a = tl.abs(tl.minimum(x, 1e38, propagate_nan=tl.PropagateNan.ALL))",
            "a = tl.abs(x)",
            "gelu(inf) = inf",
        ),
        (
            "NaN lost",
            "    a = tl.abs(tl.minimum(x, 1e38, propagate_nan=tl.PropagateNan.ALL))\n    e, r = tail(a, a)\n"
            "    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)",
            "    a = tl.where(x < 1e38, tl.abs(x), 1e38)\n    e, r = tail(a, a)\n    return tl.where(x > 0.0, x, 0.0)",
            "NaN stays NaN",
        ),
        ("gradient left out", "narrow(grad * gelu_slope(x, ERF)", "narrow(gelu_slope(x, ERF)", "the chain rule"),
        (
            "programs write one block",
            "    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)\n    tl.store(y_ptr + offs,",
            "    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)\n    tl.store(y_ptr + offs % BLOCK,",
            "each program has its block",
        ),
        (
            "float32 takes the polynomial",
            "        y,\n        n,\n        ERF=x.element_size() == 4,",
            "        y,\n        n,\n        ERF=x.element_size() == 3,",
            "float32's own accuracy",
        ),
    ),
    *reference(
        "gelu",
        ("without its half", "(0.5 * wide *", "(wide *", "the oracle is held against torch"),
        ("backward by tanh", "aten.gelu_backward(grad, x)", 'aten.gelu_backward(grad, x, approximate="tanh")', "erf"),
    ),
]

LAYERS = [*CP_LINEAR_FORMS, *CP_LINEAR, *ADAPTER, *GELU]
