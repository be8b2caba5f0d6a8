"""Mutants of bidirectional_kl and gist_loss, as (name, text, its replacement, why a test must notice), and of all losses."""

from __future__ import annotations

from mutant_list import kernel, op, reference
from mutants_of_linear import GIST_LINEAR_LOSS

__all__ = ["LOSSES"]

_OFFSETS = ("tests/hard/test_hard_05.py",)

BIDIRECTIONAL_KL = [
    *kernel(
        "bidirectional_kl",
        (
            "columns past the row enter",
            "return over_row(rows, VEC) & (columns < left)",
            "return over_row(rows, VEC) & (columns < left + 1)",
            "columns past V enter the sums",
        ),
        (
            "padding is 0, not -inf",
            'tl.load(ptr + offsets, mask=mask, other=float("-inf"), eviction_policy=POLICY)',
            "tl.load(ptr + offsets, mask=mask, other=0.0, eviction_policy=POLICY)",
            "padding takes probability",
        ),
        ("mean of d not divided by the sum", "e_p = w_p / s_p", "e_p = w_p", "E_p is a mean"),
        ("max not subtracted", "    zc = z - m_z\n", "    zc = z\n", "exponentials overflow, offsets cost accuracy"),
        (
            "sums not rescaled",
            "return alpha_p * s_p, alpha_q * s_q, w_p",
            "return s_p, alpha_q * s_q, w_p",
            "a later tile with a larger maximum",
        ),
        (
            "weighted sum not shifted",
            "w_q = alpha_q * w_q + (alpha_q * shift) * s_q",
            "w_q = alpha_q * w_q",
            "d is about the new maxima",
        ),
        (
            "shift before its factor",
            "w_p = alpha_p * w_p + (alpha_p * shift) * s_p",
            "w_p = alpha_p * w_p + alpha_p * (shift * s_p)",
            "a lane of classes masked by -3e38 overflows",
        ),
        (
            "lone classes not counted",
            'return tl.where((z == float("-inf")) != (o == float("-inf")), 1.0, 0.0)',
            'return tl.where((z == float("-inf")) != (z == float("-inf")), 1.0, 0.0)',
            "p > 0 where q = 0 must be +inf",
        ),
        (
            "absent on one side is present",
            'absent = (z == float("-inf")) | (o == float("-inf"))',
            'absent = (z == float("-inf")) & (o == float("-inf"))',
            "-inf reaches the sums",
        ),
        (
            "lanes merged about their own maxima",
            "rise_o = finite_max(m_o) - row_o[:, None]",
            "rise_o = m_o * 0.0",
            "lanes come down to the row's maximum",
        ),
        (
            "divisor not used",
            "scale = tl.div_rn(scale, tl.load(divisor_ptr))",
            "scale = scale * 1.0",
            "a mean divides on the device",
        ),
        file="pair_rows",
        tests=("tests/test_finished_losses.py",),
    ),
    *kernel(
        "bidirectional_kl",
        (
            "no temperature in the whole form",
            "    to_exp2 = inv_t * LOG2E\n",
            "    to_exp2 = 1.0 * LOG2E\n",
            "p and q at T = 1",
        ),
        (
            "alone adds the last rows only",
            "            total += kl_whole_rows(",
            "            total = kl_whole_rows(",
            "all add up",
        ),
        (
            "no scale in the rows form",
            "tl.store(row_loss_ptr + offs_m, tl.where(counts, loss * factor, 0.0), mask=mask_m)\n    kl_finish",
            "tl.store(row_loss_ptr + offs_m, tl.where(counts, loss, 0.0), mask=mask_m)\n    kl_finish",
            "row losses are times scale / divisor",
        ),
        file="bidirectional_kl_once",
        tests=("tests/test_finished_losses.py",),
    ),
    *kernel(
        "bidirectional_kl",
        (
            "parts not written where they are read",
            "place = part_ptr + tl.program_id(1).to(tl.int64) * 7 * M + offs_m",
            "place = part_ptr + offs_m",
            "each stretch has its own part",
        ),
        (
            "empty parts are maxima",
            'part_of(part_ptr, 1, float("-inf"), offs_m, M, parts, 7, PARTS)',
            "part_of(part_ptr, 1, 1e30, offs_m, M, parts, 7, PARTS)",
            "parts that are not there take no part",
        ),
        (
            "stretches not cut at the row's end",
            "        tl.minimum(start + stretch, V),\n        stride_zm,",
            "        start + stretch,\n        stride_zm,",
            "the last stretch ends with the row",
        ),
        file="bidirectional_kl_parts",
        tests=("tests/test_finished_losses.py",),
    ),
    *kernel(
        "bidirectional_kl",
        (
            "p and q swapped in the other gradient",
            "+ (q - p)",
            "+ (p - q) * 1.0",
            "the difference of the two softmaxes has a sign",
        ),
        (
            "masked rows get a gradient",
            "        grad_o = tl.where(over_row(counts, VEC), grad_o, 0.0)\n",
            "",
            "a masked row's gradient is 0",
        ),
        (
            "mask not looked at",
            "tl.load(mask_ptr + offs_m * stride_mask, mask=mask_m, other=0) != 0",
            "tl.load(mask_ptr + offs_m * stride_mask, mask=mask_m, other=0) >= 0",
            "masked rows enter the loss",
        ),
        (
            "first tile for all",
            "z_next = load_tile(z_ptr, offs_m, at + BLOCK_V,",
            "z_next = load_tile(z_ptr, offs_m, start,",
            "the next tile is fetched ahead",
        ),
        file="kl_rows",
    ),
    *kernel(
        "bidirectional_kl",
        (
            "incoming gradient not used",
            "factor = tl.load(row_grad_ptr + offs_m * stride_grad, mask=mask_m, other=0.0) * inv_t",
            "factor = tl.full(offs_m.shape, 1.0, tl.float32) * inv_t",
            "grad_output that is not 1",
        ),
        (
            "strides swapped in the backward",
            "o = load_tile(o_ptr, offs_m, start, stride_om, stride_ov,",
            "o = load_tile(o_ptr, offs_m, start, stride_zm, stride_zv,",
            "the two sides may be laid out differently",
        ),
    ),
    *kernel(
        "bidirectional_kl",
        (
            "32-bit row offsets",
            "    rows = offs_m * stride_m\n",
            "    rows = offs_m.to(tl.int32) * stride_m\n",
            "rows more than 2^31 elements apart",
        ),
        file="pair_rows",
        tests=_OFFSETS,
    ),
    *kernel(
        "bidirectional_kl",
        ("1 counts as a factor", "if factor != 1.0:", "if factor != 2.0:", "by 1 nothing is touched"),
        ("one of two", "        if PAIR:\n", "        if not PAIR:\n", "both gradients are scaled"),
        file="scale",
        tests=("tests/test_finished_losses.py",),
    ),
    *reference(
        "bidirectional_kl",
        ("no T^2", "row_loss = row_loss * temperature**2", "row_loss = row_loss * temperature", "t_squared squares"),
        (
            "offset kept",
            "return z - _finite_max(z), other - _finite_max(other)",
            "return z * 1.0, other * 1.0",
            "100 between the two sides",
        ),
        ("q at T = 1", "torch.softmax(other * inv_t, -1)", "torch.softmax(other, -1)", "both sides at T"),
        ("mean of q under p", "_mean(q, d)", "_mean(p, d)", "E_q is over q"),
        (
            "gradient without 1 / T",
            "grad_z = torch.addcmul(gap, p, about_p, value=inv_t,",
            "grad_z = torch.addcmul(gap, p, about_p, value=1.0,",
            "T in the gradient",
        ),
        ("loss without 1 / T", "row_loss = spread * inv_t", "row_loss = spread * 1.0", "T in the loss"),
        ("mask not applied", "if mask is not None:  # two", "if False:  # two", "NaN behind the mask leaks"),
        (
            "mask of the first block",
            "masked = ~mask[rows, None]",
            "masked = ~mask[: len(z), None]",
            "each block has its own",
        ),
        ("mean over all rows", "mask.sum().clamp(min=1)", "mask.numel()", "the divisor counts unmasked rows"),
        (
            "one side's -inf ignored",
            "infinite = (z_absent ^ other_absent).any(-1)",
            "infinite = (z_absent & other_absent).any(-1)",
            "+inf where q = 0 < p",
        ),
    ),
    *op(
        "bidirectional_kl",
        (
            "t_squared ignored",
            "temperature**2 if t_squared else 1.0",
            "1.0",
            "t_squared multiplies",
        ),
        (
            "sign of the finished gradient",
            "_common.scale_rows(grads, (factor, -factor), ctx.dtype)",
            "_common.scale_rows(grads, (factor, factor), ctx.dtype)",
            "the other side's comes negated",
        ),
    ),
]

GIST_LOSS = [
    *kernel(
        "gist_loss",
        ("T = 3 taken for T = 2", "return exp_t * exp_t * exp_t", "return exp_t * exp_t", "exp(x) = exp(x / 3)^3"),
        (
            "ignored rows counted",
            "counts = mask_m & (label != ignore_index)",
            "counts = mask_m & (label == label)",
            "ignored rows leave all terms",
        ),
        (
            "impossible classes pass",
            "possible = (label >= 0) & (label < V)",
            "possible = (label >= 0) & (label <= V)",
            "target == V is no class",
        ),
        (
            "smoothing forgotten",
            "        if SMOOTH:\n            weights += smooth\n        return weights\n",
            "        return weights\n",
            "label smoothing spreads mass",
        ),
        (
            "padding takes smoothing mass",
            "return tl.where(mask & (tile_columns(BLOCK_V, VEC) >= 0), smooth, 0.0)",
            "return tl.where(tile_columns(BLOCK_V, VEC) + over_row(offs_m, VEC) >= 0, smooth, 0.0)",
            "the padding holds no class",
        ),
        (
            "CE sum not rescaled",
            "sum_z = exp_unit(tl.minimum(rise_z, 0.0), alpha_p, POWER) * sum_z + lane_sum",
            "sum_z = sum_z + lane_sum",
            "a later tile with a larger maximum",
        ),
        (
            "CE dot not shifted",
            "dot_g += weight * rise_g + lane_sum(",
            "dot_g += lane_sum(",
            "centred on the new maximum",
        ),
        (
            "lanes' dots not shifted",
            "dot_z = tl.sum(weight * rise_z + dot_z, 1)",
            "dot_z = tl.sum(dot_z, 1)",
            "lanes come down to the row's maximum",
        ),
        (
            "label's logit about the other maximum",
            "keep * (g_label - m_g)",
            "keep * (g_label - m_z)",
            "each side has its own",
        ),
        (
            "alpha forgotten in the loss",
            "tl.where(alpha == 0.0, 0.0, alpha * ce_g) + tl.where(beta == 0.0, 0.0, beta * divergence)",
            "ce_g + tl.where(beta == 0.0, 0.0, beta * divergence)",
            "the gist's CE has weight alpha",
        ),
        (
            "beta forgotten in the gradient",
            "grad_z += over_row(scale * (beta_z * inv_t), VEC)",
            "grad_z += over_row(scale * inv_t, VEC)",
            "the divergence has weight beta",
        ),
        (
            "no 1 / T in the gradient",
            "(p * ((d - over_row(e_p, VEC)) * inv_t) + (p - q))",
            "(p * (d - over_row(e_p, VEC)) + (p - q))",
            "T inside the gradient",
        ),
        (
            "target not subtracted",
            "over_row(weight / sum_g, VEC) - weights)",
            "over_row(weight / sum_g, VEC))",
            "softmax minus one-hot",
        ),
        (
            "soft targets' strides swapped",
            "tile_offsets(offs_m, start, stride_tm, stride_tv, BLOCK_V, VEC)",
            "tile_offsets(offs_m, start, stride_tv, stride_tm, BLOCK_V, VEC)",
            "soft targets of any layout",
        ),
        file="gist_rows",
    ),
    *kernel(
        "gist_loss",
        (
            "a detached gist takes NaN by its cross-entropy",
            "    if not ALPHA:\n        grad_g = tl.zeros_like(grad_g)\n",
            "",
            "alpha = 0 is no cross-entropy",
        ),
        ("a detached side learns", "    if KL_G:\n", "    if KL_Z or KL_G:\n", "not even NaN comes over"),
        (
            "label looked for in the first tile only",
            "place = tl.maximum(tl.minimum(label - start, BLOCK_V), -1).to(tl.int32)",
            "place = tl.maximum(tl.minimum(label, BLOCK_V), -1).to(tl.int32)",
            "every tile has its own columns",
        ),
        file="gist_rows",
        tests=("tests/test_finished_losses.py",),
    ),
    *kernel(
        "gist_loss",
        (
            "an impossible target keeps its gradient",
            'factor = tl.where(invalid, float("nan"), finished_factor(scale, divisor_ptr, HAS_DIVISOR))\n    loss =',
            "factor = finished_factor(scale, divisor_ptr, HAS_DIVISOR) + tl.zeros_like(loss)\n    loss =",
            "NaN through the row",
        ),
        (
            "alone adds the last rows only",
            "            total += gist_whole_rows(",
            "            total = gist_whole_rows(",
            "all add up",
        ),
        file="gist_loss_once",
        tests=("tests/test_finished_losses.py",),
    ),
    *kernel(
        "gist_loss",
        (
            "label's part left out of the merge",
            "    dot_z, dot_g, weight = with_label(dot_z, dot_g, weight, z_label, g_label, m_z, m_g, label, keep, SOFT)\n",
            "",
            "parts hold no label",
        ),
        (
            "one sum of a part for another",
            "part_of(part_ptr, 8, 0.0, offs_m, M, parts, 12, PARTS)",
            "part_of(part_ptr, 7, 0.0, offs_m, M, parts, 12, PARTS)",
            "each side has its own",
        ),
        file="gist_loss_parts",
        tests=("tests/test_finished_losses.py",),
    ),
    *kernel(
        "gist_loss",
        (
            "invalid target keeps its loss",
            '    loss = tl.where(invalid, float("nan"), loss)\n',
            "",
            "an impossible target gives NaN",
        ),
        (
            "incoming gradient not used",
            "scale = tl.load(row_grad_ptr + offs_m * stride_grad, mask=mask_m, other=0.0)",
            "scale = tl.full(offs_m.shape, 1.0, tl.float32)",
            "grad_output that is not 1",
        ),
    ),
    *kernel(
        "gist_loss",
        (
            "weight sum off by its rows",
            "tl.store(stats_ptr + 8 * rows + offs_m, tl.where(counts, weight, 0.0), mask=mask_m)",
            "tl.store(stats_ptr + 8 * rows + offs_m, tl.where(counts, 1.0, 0.0), mask=mask_m)",
            "soft targets need not sum to 1",
        ),
        file="gist_rows",
    ),
    *reference(
        "_numerics",
        ("last block left out", "range(0, rows, step)", "range(0, rows - step, step)", "every row is computed"),
        tests=("tests/test_bidirectional_kl.py", "tests/test_gist_loss.py"),
    ),
    *reference(
        "gist_loss",
        ("targets of the first block", "target[rows], *settings", "target, *settings", "each block has its own"),
        ("alpha forgotten in the gradient", "grad_gist.mul_(alpha)", "grad_gist", "the gist's CE has weight alpha"),
        (
            "sign of the gist's divergence",
            "grad_gist.sub_(kl_gist, alpha=beta_gist / temperature)",
            "grad_gist.add_(kl_gist, alpha=beta_gist / temperature)",
            "it comes negated",
        ),
        (
            "divergence without 1 / T",
            "grad_z.add_(kl_z, alpha=beta_z / temperature)",
            "grad_z.add_(kl_z, alpha=beta_z)",
            "T in the gradient",
        ),
        (
            "smoothing not shared out",
            "weights = torch.full_like(z, label_smoothing / classes)",
            "weights = torch.full_like(z, label_smoothing)",
            "mass sums to 1",
        ),
        (
            "one-hot not subtracted",
            "log_p.new_full((len(log_p), 1), -1.0)",
            "log_p.new_full((len(log_p), 1), 0.0)",
            "p - 1",
        ),
        ("soft targets' sum ignored", ".mul_(weights.sum(-1, keepdim=True))", ".mul_(1.0)", "they need not sum to 1"),
        (
            "ignored rows keep their loss",
            "(None if kept is None else ~kept, 0.0)",
            "(None, 0.0)",
            "ignored rows give 0",
        ),
        (
            "impossible targets pass",
            "for rows_out, value in ((invalid, torch.nan),",
            "for rows_out, value in ((None, torch.nan),",
            "they give NaN",
        ),
    ),
    *op(
        "gist_loss",
        ("t_squared ignored", "(temperature**2 if t_squared else 1.0)", "1.0", "t_squared multiplies the divergence"),
        (
            "targets unchecked",
            "    if bool(wrong.any()):\n",
            "    if False:\n",
            "a target out of range raises on a CPU",
        ),
    ),
]

LOSSES = [*BIDIRECTIONAL_KL, *GIST_LOSS, *GIST_LINEAR_LOSS]
