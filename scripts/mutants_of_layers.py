"""Mutants of cp_linear and gelu, adapter's beside them: (name, text, its replacement, why a test must notice)."""

from __future__ import annotations

from mutant_list import kernel, reference
from mutants_of_adapter import ADAPTER

__all__ = ["LAYERS"]

CP_LINEAR = [
    *kernel(
        "cp_linear",
        ("dropout not rescaled", "tl.where(keep, h * inv_keep, 0.0)", "tl.where(keep, h, 0.0)", "inverted dropout"),
        (
            "dropout mask inverted",
            "return tl.where(keep, h * inv_keep, 0.0)",
            "return tl.where(keep, 0.0, h * inv_keep)",
            "which are kept",
        ),
        (
            "no rank mask",
            "mask_r = offs_r < R\n    x_ptrs",
            "mask_r = offs_r < BLOCK_R\n    x_ptrs",
            "ranks that are no power of two",
        ),
        (
            "no inner mask",
            "mask_k = offs_k < K - first_k",
            "mask_k = offs_k < BLOCK_K",
            "K that is no multiple of the tile",
        ),
        (
            "fold's columns from the first fold",
            "offs_n = fold * fold_n + offs_j",
            "offs_n = offs_j",
            "folds stand side by side",
        ),
        (
            "one gain for all folds, started",
            "gain = tl.load(gain_ptr + fold * stride_gg + offs_q * stride_gr, mask=mask_q, other=0.0)",
            "gain = tl.load(gain_ptr + offs_q * stride_gr, mask=mask_q, other=0.0)",
            "a row of gain for each fold",
        ),
        (
            "scale left out of the fused update",
            "        h = h * scale\n        if HAS_GAIN:\n",
            "        if HAS_GAIN:\n",
            "scale",
        ),
        (
            "bias left out",
            "        acc += bias.to(tl.float32)[None, :]\n",
            "        acc += 0.0 * bias.to(tl.float32)[None, :]\n",
            "the base layer's bias",
        ),
        (
            "strides of u swapped",
            "u_ptrs = u_ptr + offs_r[None, :] * stride_ur + offs_k[:, None] * stride_uk",
            "u_ptrs = u_ptr + offs_r[None, :] * stride_uk + offs_k[:, None] * stride_ur",
            "u of any layout",
        ),
        (
            "strides of v swapped, fused",
            "v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_j[None, :] * stride_vn",
            "v_ptrs = v_ptr + offs_r[:, None] * stride_vn + offs_j[None, :] * stride_vr",
            "v of any layout",
        ),
        (
            "h is not stored for the backward",
            "STORE_H=fused and h is not None",
            "STORE_H=False",
            "the backward reads h",
        ),
        (
            "projection forgets the fold",
            "(first_n + offs_c)[None, :] * stride_an",
            "offs_c[None, :] * stride_an",
            "dL/dh sums over the folds",
        ),
        (
            "projection forgets the scale",
            "    h = h * scale\n    if HAS_DROPOUT:",
            "    if HAS_DROPOUT:",
            "scale in dL/dh",
        ),
        (
            "dropout counts from 0 in each rank block",
            "h = dropped(h, seed_ptr, offs_m, first_r, R,",
            "h = dropped(h, seed_ptr, offs_m, 0, R,",
            "the mask belongs to the rank",
        ),
    ),
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
            "            acc = acc * tl.load(gain_ptrs, mask=mask_r, other=0.0).to(tl.float32)[None, :]\n",
            "            acc = acc * 1.0\n",
            "the gain of each fold",
        ),
        (
            "no dropout in the backward",
            "        grad_h = dropped(grad_h, seed_ptr, offs_m, 0, R, threshold, inv_keep, BLOCK_M, BLOCK_R)\n",
            "        grad_h = grad_h * 1.0\n",
            "the mask of the forward",
        ),
        (
            "row blocks write one partial",
            "part_ptr += pid_m * N * R",
            "part_ptr += pid_m * 0",
            "each row block has its own",
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
            "gains.sum(0, keepdim=True) if gain.shape[0] == 1 else gains",
            "gains[-1:] if gain.shape[0] == 1 else gains",
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
            "part_ptrs = part_ptr + split * products +",
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
            "out.addmm_(h, folded.transpose(0, 1), alpha=scale)",
            "out.addmm_(h, folded.transpose(0, 1))",
            "scale",
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
            "        grad_h = _dropped(grad_h, dropout_p, seed)\n",
            "",
            "the mask of the forward",
        ),
        (
            "gain left out of dV",
            "weighted = outer if gain is None else outer * accumulate(gain)[:, None]",
            "weighted = outer",
            "each fold by its gain",
        ),
        ("dgain without V", "by_fold = (outer * accumulate(v)).sum(1)", "by_fold = outer.sum(1)", "colsum(P * V)"),
        (
            "half merges its weight",
            "seed is not None or a.dtype not in (torch.float32, torch.float64) or",
            "seed is not None or",
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

LAYERS = [*CP_LINEAR, *ADAPTER, *GELU]
