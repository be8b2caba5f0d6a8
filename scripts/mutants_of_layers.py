"""Mutants of cp_linear, adapter and gelu: (name, text, its replacement, why a test must notice)."""

from __future__ import annotations

from mutant_list import kernel, reference
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
            "out.addmm_(h, _folded_v(own_v, own_gain, folds).transpose(0, 1), alpha=scale)",
            "out.addmm_(h, _folded_v(own_v, own_gain, folds).transpose(0, 1))",
            "scale",
        ),
        (
            "few rows without their gain",
            "out.addmm_(h * own_gain, own_v",
            "out.addmm_(h, own_v",
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
            "    if seed is not None or a.dtype not in (torch.float32, torch.float64):\n",
            "    if seed is not None:\n",
            "small updates vanish in bfloat16",
        ),
    ),
]

ADAPTER = [
    *kernel(
        "adapter",
        (
            "gelu without its half",
            "return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))",
            "return z * (1.0 + tl.erf(z * 0.7071067811865476))",
            "gelu",
        ),
        (
            "tanh gelu without its cube",
            "return z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))",
            "return z * sigmoid(1.5957691216057308 * z)",
            "gelu_tanh",
        ),
        (
            "relu slope at the negative side",
            "return tl.where(z <= 0.0, 0.0, 1.0)",
            "return tl.where(z <= 0.0, 1.0, 1.0)",
            "relu",
        ),
        ("silu slope", "return s * (1.0 + z * (1.0 - s))", "return s * (1.0 + z * s)", "silu"),
        (
            "gelu slope without its density",
            "return cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)",
            "return cdf",
            "gelu",
        ),
        (
            "no inner mask",
            "mask_d = offs_c < D\n            mask_x",
            "mask_d = offs_c < D + 1\n            mask_x",
            "D that is no multiple of the tile",
        ),
        (
            "down bias left out",
            "        z += narrow(bias, x_ptr.dtype.element_ty).to(tl.float32)[None, :]\n",
            "        z += 0.0 * bias.to(tl.float32)[None, :]\n",
            "b_d",
        ),
        (
            "residual not scaled",
            "acc += residual * residual_scale",
            "acc += residual",
            "residual_scale",
        ),
        (
            "branch of another row",
            "branch_ptrs = branch_ptr + offs_m[:, None] * stride_jm",
            "branch_ptrs = branch_ptr + offs_m[:, None] * 0 * stride_jm",
            "branch",
        ),
        (
            "float32 weights not rounded",
            "z = dot(x, narrow(w, x.dtype), z, PRECISION)",
            "z = dot(x.to(tl.float32), w.to(tl.float32), z, PRECISION)",
            "float32 weights",
        ),
        ("scale takes the residual too", "        acc = acc * scale\n", "        acc = acc * 1.0\n", "scale"),
        (
            "gate of another expert",
            "gate = tl.where((expert == e)[None, :]",
            "gate = tl.where((expert != e)[None, :]",
            "a gate scales its expert",
        ),
        (
            "experts counted from each chunk",
            "expert = (first_h + tl.arange(0, BLOCK_H)) // unit_width",
            "expert = tl.arange(0, BLOCK_H) // unit_width",
            "wide bottlenecks go in chunks",
        ),
        (
            "strides of up swapped",
            "up_ptrs = up_ptr + offs_h[:, None] * stride_uh + offs_c[None, :] * stride_un",
            "up_ptrs = up_ptr + offs_h[:, None] * stride_un + offs_c[None, :] * stride_uh",
            "up of any layout",
        ),
        (
            "residual read with x's strides",
            "residual_ptr + offs_m[:, None] * stride_rm + offs_c[None, :] * stride_rn",
            "residual_ptr + offs_m[:, None] * stride_xm + offs_c[None, :] * stride_xd",
            "a residual of its own layout",
        ),
        (
            "later chunks scale the residual again",
            "1.0 if index else residual_scale",
            "residual_scale",
            "wide bottlenecks go in chunks",
        ),
    ),
    *kernel(
        "adapter",
        ("scale left out of dh", "    dh = dh * scale\n", "    dh = dh * 1.0\n", "scale in the backward"),
        ("slope left out", "dz = dh * activation_slope(z, ACTIVATION)", "dz = dh * 1.0", "act'(z)"),
        ("gate left out of dz", "        dz = dz * gate\n", "        dz = dz * 1.0\n", "the gate in the backward"),
        (
            "gate left out of h",
            "            hidden = hidden * gate\n",
            "            hidden = hidden * 1.0\n",
            "dU from the gated units",
        ),
        ("residual's gradient not scaled", "dx += dy * residual_scale", "dx += dy", "residual_scale"),
        (
            "bias gradient not scaled",
            "tl.sum(dy, 0) * scale, mask=mask_c)",
            "tl.sum(dy, 0), mask=mask_c)",
            "db_u = scale colsum(dy)",
        ),
        (
            "rows past M in the column sums",
            "tl.sum(dz, 0), mask=mask_h)",
            "tl.sum(dz, 0) * 2.0, mask=mask_h)",
            "db_d = colsum(dz)",
        ),
        (
            "earlier chunks dropped",
            "                dx += tl.load(base_ptr + offs_out, mask=mask_out, other=0.0)\n",
            "                dx += 0.0\n",
            "wide bottlenecks go in chunks",
        ),
        (
            "activation left out of the gate's gradient",
            "by_unit = dh * activate(z, ACTIVATION)",
            "by_unit = dh * z",
            "dgate",
        ),
        file="adapter_bwd",
    ),
    *kernel(
        "adapter",
        (
            "rows past M enter",
            "mask_m = (offs_m < M)[None, None, :]",
            "mask_m = (offs_m < M + 1)[None, None, :]",
            "the row after the last",
        ),
        (
            "programs walk the same rows",
            "offs_m = (pid * blocks_per_program + block) * BLOCK_M",
            "offs_m = block * BLOCK_M",
            "each program has its rows",
        ),
        (
            "columns past D enter",
            "mask_x = mask_m & (first + offs_c < D)[:, :, None]\n            xs",
            "mask_x = mask_m & (first + offs_c < D + 1)[:, :, None]\n            xs",
            "D that is no multiple of the chunk",
        ),
        (
            "columns past D are written",
            "mask_x = mask_m & (first + offs_c < D)[:, :, None]\n                tl.store",
            "mask_x = mask_m & (first + offs_c < D + 1)[:, :, None]\n                tl.store",
            "the next row's first column",
        ),
        (
            "dy read with x's stride",
            "offs_m[None, None, :] * stride_dym",
            "offs_m[None, None, :] * stride_xm",
            "rows of dy anywhere",
        ),
        (
            "strides of up swapped",
            "offs_d * stride_un + offs_k * stride_uh",
            "offs_d * stride_uh + offs_k * stride_un",
            "up of any rows",
        ),
        ("down bias left out", "        z += bias[:, None]\n", "        z += 0.0 * bias[:, None]\n", "b_d"),
        (
            "scale left out of dh",
            "dz = dh * scale * activation_slope(z, ACTIVATION)",
            "dz = dh * activation_slope(z, ACTIVATION)",
            "scale in the backward",
        ),
        ("slope left out", "dz = dh * scale * activation_slope(z, ACTIVATION)", "dz = dh * scale", "act'(z)"),
        (
            "residual's gradient not scaled",
            "dot(eye, dys[chunk], dx, PRECISION) * residual_scale",
            "dot(eye, dys[chunk], dx, PRECISION)",
            "residual_scale",
        ),
        (
            "no column of ones",
            "tl.where(mask_h[:, None], activate(z, ACTIVATION), 1.0)",
            "activate(z, ACTIVATION)",
            "db_u = scale colsum(dy)",
        ),
        ("blocks overwrite db_d", "sum_dz += tl.sum(dz, 1)", "sum_dz = tl.sum(dz, 1)", "row blocks add up"),
        (
            "blocks overwrite dD",
            "dot(xs[chunk], dz_t, grad_down[chunk], PRECISION)",
            "dot(xs[chunk], dz_t, 0.0 * grad_down[chunk], PRECISION)",
            "row blocks add up",
        ),
        (
            "dU not scaled",
            "tl.store(part_ptrs + products, grad_up[chunk] * scale,",
            "tl.store(part_ptrs + products, grad_up[chunk],",
            "scale in dU and db_u",
        ),
        (
            "programs write one partial",
            "part_ptr += pid * (2 * products",
            "part_ptr += 0 * pid * (2 * products",
            "each program has its place",
        ),
        (
            "a program's partials dropped",
            "mask = (offs_s < programs)[:, None]",
            "mask = (offs_s < programs - 1)[:, None]",
            "every program counts",
        ),
        (
            "dU written untransposed",
            "grad_up_ptr + column * H + unit",
            "grad_up_ptr + unit * D + column",
            "dU is (D, H)",
        ),
        file="adapter_bwd_once",
    ),
    *reference(
        "adapter",
        (
            "residual not scaled",
            "torch.addmm(residual, hidden, up, beta=residual_scale, alpha=scale), z",
            "torch.addmm(residual, hidden, up, alpha=scale), z",
            "residual_scale",
        ),
        (
            "dU not scaled",
            "outer = torch.mm(_hidden(z, gate, activation, extra).transpose(0, 1), grad).mul_(scale)",
            "outer = torch.mm(_hidden(z, gate, activation, extra).transpose(0, 1), grad)",
            "scale",
        ),
        (
            "gate left out of dz",
            "            grad_hidden = grad_hidden * _spread(gate, grad_hidden.shape[1])\n",
            "            pass\n",
            "the gate in the backward",
        ),
        (
            "bias out of the gate's gradient",
            "grad_gate = grad_gate.addmm_(grad, up_bias.transpose(0, 1), alpha=scale)",
            "grad_gate = grad_gate.mul_(1.0)",
            "experts' biases are gated",
        ),
        (
            "residual's gradient not scaled",
            "grad_x = torch.addmm(grad, grad_z, down_weight, beta=residual_scale)",
            "grad_x = torch.addmm(grad, grad_z, down_weight)",
            "residual_scale",
        ),
        ("slope left out", "grad_z = activation_grad(grad_hidden, z, activation)", "grad_z = grad_hidden", "act'(z)"),
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
