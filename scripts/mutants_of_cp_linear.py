"""Mutants of the kernels that compute cp_linear's products: (name, text, its replacement, why a test must notice)."""

from __future__ import annotations

from mutant_list import kernel

__all__ = ["CP_LINEAR_FORMS"]

_FORMS = ("tests/test_cp_linear_forms.py",)
_ALL = (*_FORMS, "tests/test_cp_linear.py")

CP_LINEAR_FORMS = [
    *kernel(
        "cp_linear",
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
            "v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_v[None, :] * stride_vn",
            "v_ptrs = v_ptr + offs_r[:, None] * stride_vn + offs_v[None, :] * stride_vr",
            "v of any layout",
        ),
        (
            "h is not stored for the backward",
            "STORE_H=fused and h is not None",
            "STORE_H=False",
            "the backward reads h",
        ),
        (
            "every launch forms h",
            'fused = form.endswith("fused") and i == 0',
            'fused = form.endswith("fused") and i == 1',
            "the first launch forms h, the others read it",
        ),
        (
            "biases without their update",
            "low[:, rank] = 1.0",
            "low[:, rank] = scale",
            "biases are a rank of their own, not scaled",
        ),
        tests=_ALL,
    ),
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
            "columns from the first fold",
            "first_row = fold * width + first",
            "first_row = first",
            "folds stand side by side",
        ),
        (
            "v of the first weight",
            "            first_v += start\n",
            "            first_v += 0\n",
            "v has a row for each row",
        ),
        ("gain of the first weight", "fold += start // fold_n", "fold += 0", "each weight has its folds' gain"),
        (
            "bias of the weight before",
            "bias_ptr = tl.where(behind, biases[2], bias_ptr)",
            "bias_ptr = tl.where(behind, biases[1], bias_ptr)",
            "each weight has its bias",
        ),
        (
            "strides of the first weight for all",
            "and _alike(weights, biases, first, last)",
            "and True",
            "a launch has one pair of strides",
        ),
        (
            "gain of a later launch",
            "            fold += folds\n",
            "            fold += 0\n",
            "a launch starts at its first fold",
        ),
        file="cp_linear_parts",
        tests=_ALL,
    ),
    *kernel(
        "cp_linear",
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
        (
            "rows of h next to each other",
            "h_ptr + offs_m[:, None] * stride_hm +",
            "h_ptr + offs_m[:, None] * R +",
            "h may be columns of a wider matrix",
        ),
        file="cp_linear_project",
        tests=_ALL,
    ),
    *kernel(
        "cp_linear",
        (
            "dy of the first weight for all",
            "offs_y = start + offs_w",
            "offs_y = offs_w",
            "each weight has its columns of dy",
        ),
        (
            "steps counted through",
            "first_n = (step - first_step) * BLOCK_K",
            "first_n = step * BLOCK_K",
            "each weight starts at its first row",
        ),
        (
            "rows of the next weight enter",
            "mask_n = offs_w < rows",
            "mask_n = offs_w < rows + 1",
            "the row after the last",
        ),
        ("no dropout of a fused dL/dh", "        if HAS_DROPOUT:\n", "        if False:\n", "the mask of the forward"),
        ("scale left out of a fused dL/dh", "grad_h = acc_h * scale", "grad_h = acc_h", "scale in dL/dh"),
        ("a later launch overwrites", "add=i > 0", "add=False", "later weights add to dx"),
        (
            "the library overwrites",
            "grad_x.addmm_(columns, weight)",
            "torch.mm(columns, weight, out=grad_x)",
            "dx sums over the weights",
        ),
        file="cp_linear_dx",
        tests=_ALL,
    ),
    *kernel(
        "cp_linear",
        (
            "every split begins at 0",
            "begin = split * k_per_split",
            "begin = split * 0",
            "each split has its range of K",
        ),
        (
            "a split runs to the end",
            "end = tl.minimum(begin + k_per_split, K)",
            "end = K",
            "what other splits sum is not summed again",
        ),
        ("the last split dropped", "tl.range(0, splits, num", "tl.range(0, splits - 1, num", "every split counts"),
        (
            "x U of one split",
            "tl.range(0, low_splits, num",
            "tl.range(0, 1, num",
            "h is the sum of its parts",
        ),
        ("h for the backward is not stored", "h if first else None", "None", "the backward reads h"),
        (
            "rank tiles of U",
            "(tile - tiles_w).to(tl.int64)",
            "(tile - tile).to(tl.int64)",
            "more ranks than a tile has",
        ),
        file="cp_linear_few",
        tests=_ALL,
    ),
    *kernel(
        "cp_linear",
        (
            "only the first tile of each program",
            "tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0))",
            "tl.range(tl.program_id(0), tl.num_programs(0), tl.num_programs(0))",
            "programs go on to further tiles",
        ),
        (
            "rows of W from the first fold",
            "first_n = fold * fold_n + first_j",
            "first_n = first_j",
            "folds stand side by side",
        ),
        (
            "gain of the first fold",
            "fold.to(tl.int64) * stride_gg",
            "fold.to(tl.int64) * 0",
            "a row of gain for each fold",
        ),
        (
            "columns past the fold stored",
            "mask_n = offs_j < fold_n",
            "mask_n = offs_j < fold_n + 1",
            "the next fold's column",
        ),
        (
            "a transposed u described as it is",
            "u if described(u) else u.clone(",
            "u if True else u.clone(",
            "rows of u",
        ),
        file="cp_linear_tma",
        tests=_FORMS,
    ),
]
