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
        ("mean of d not divided by the sum", "e_p = state.w_p / state.s_p", "e_p = state.w_p", "E_p is a mean"),
        (
            "max not subtracted",
            "    zc = z - m_z\n",
            "    zc = z * 1.0\n",
            "exponentials overflow, offsets cost accuracy",
        ),
        (
            "sums not rescaled",
            "state = State(m_z, m_o, alpha_p * state.s_p, alpha_q * state.s_q, w_p",
            "state = State(m_z, m_o, state.s_p, alpha_q * state.s_q, w_p",
            "a later tile with a larger maximum",
        ),
        (
            "weighted sum not shifted",
            "w_q = alpha_q * state.w_q + (alpha_q * shift) * state.s_q",
            "w_q = alpha_q * state.w_q",
            "d is about the new maxima",
        ),
        (
            "shift before its factor",
            "w_p = alpha_p * state.w_p + (alpha_p * shift) * state.s_p",
            "w_p = alpha_p * state.w_p + alpha_p * (shift * state.s_p)",
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
            "lanes, rise = risen(lanes, m_z[:, None], m_o[:, None], old_z, old_o, to_exp2)",
            "lanes, rise = risen(lanes, m_z[:, None], m_o[:, None], old_z, m_o[:, None] + 0 * old_o, to_exp2)",
            "lanes come down to the row's maximum",
        ),
        (
            "divisor not used",
            "return tl.div_rn(out.scale, tl.load(out.divisor_ptr))",
            "return out.scale * 1.0",
            "a mean divides on the device",
        ),
        (
            "no temperature in whole rows",
            "    p = exponential(zc * to_exp2)\n    q = exponential(oc * to_exp2)\n    s_p = row_sum",
            "    p = exponential(zc * to_exp2)\n    q = exponential(oc * 1.4427)\n    s_p = row_sum",
            "p and q at T",
        ),
        (
            "an absent class has a difference",
            '    d = tl.where(z == float("-inf"), 0.0, zc - oc)',
            "    d = zc - oc",
            "-inf less -inf is NaN",
        ),
        (
            "a lone class leaves finite means",
            'return divergence, tl.where(lone, float("nan"), e_p), tl.where(lone, float("nan"), e_q)',
            "return divergence, e_p, e_q",
            "the gradient of +inf is NaN, and it is what lets d be screened on one side",
        ),
        (
            "parts not written where they are read",
            "(tl.program_id(1).to(tl.int64) * NUMBERS + i) * out.M",
            "(tl.program_id(1).to(tl.int64) * 0 + i) * out.M",
            "each stretch has its own part",
        ),
        (
            "empty parts are maxima",
            'part_of(out, 1, float("-inf"), rows, parts, NUMBERS, PARTS)',
            "part_of(out, 1, 1e30, rows, parts, NUMBERS, PARTS)",
            "parts that are not there take no part",
        ),
        file="pair_rows",
        tests=("tests/test_finished_losses.py",),
    ),
    *kernel(
        "bidirectional_kl",
        (
            "alone adds the last rows only",
            "            total += kl_whole(",
            "            total = kl_whole(",
            "all add up",
        ),
        (
            "stretches not cut at the row's end",
            "stop = tl.minimum(start + stretch, V)",
            "stop = start + stretch",
            "the last stretch ends with the row",
        ),
        (
            "all programs take the first stretch",
            'start = tl.program_id(1) * (BLOCK_V if FORM == "bwd" else stretch)',
            'start = tl.program_id(1) * (BLOCK_V if FORM == "bwd" else 0)',
            "each has its own columns",
        ),
        tests=("tests/test_finished_losses.py",),
    ),
    *kernel(
        "bidirectional_kl",
        (
            "no scale in the loss of long rows",
            "store_row_loss(out, rows, loss * factor)\n    if out.stats_ptr",
            "store_row_loss(out, rows, loss)\n    if out.stats_ptr",
            "row losses are times scale / divisor",
        ),
        (
            "rows that do not count keep their means",
            "tl.where(rows.count, e_p, 0.0), tl.where(rows.count, e_q, 0.0)",
            "e_p, e_q",
            "0 / 0 reaches their gradients",
        ),
        (
            "rows that do not count keep their factor",
            "over_q = tl.where(rows.count, factor / s_q, 0.0)",
            "over_q = factor / s_q",
            "0 times infinity reaches their gradients",
        ),
        file="kl_rows",
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
            "mask not looked at",
            "tl.load(mask_ptr + at * stride_mask, mask=there, other=0) != 0",
            "tl.load(mask_ptr + at * stride_mask, mask=there, other=0) >= 0",
            "masked rows enter the loss",
        ),
        (
            "first tile for all",
            "z_next, o_next = load_pair(pair, rows, at + BLOCK_V,",
            "z_next, o_next = load_pair(pair, rows, start,",
            "the next tile is fetched ahead",
        ),
        (
            "a backward of the first tile for all",
            "kl_finish_tile(pair, out, rows, about, inv_t, start, out.V,",
            "kl_finish_tile(pair, out, rows, about, inv_t, 0, out.V,",
            "each program has its own tile",
        ),
        file="kl_rows",
    ),
    *kernel(
        "bidirectional_kl",
        (
            "all of the mass and yet a difference",
            "return tl.where(s == 1.0, tl.abs(e) * 2.0**-21, 0.0)",
            "return tl.where(s == 1.0, tl.abs(e) * 0.0, 0.0)",
            "a mean that was merged is rounded otherwise than d, by as much as d is large",
        ),
        (
            "no difference where p is 1",
            "return tl.where(s == 1.0, tl.abs(e) * 2.0**-21, 0.0)",
            "return tl.where(s == 1.0, tl.abs(e) + 0.01, 0.0)",
            "classes too small to show in the mass show in the mean",
        ),
        file="pair_rows",
        tests=("tests/test_one_class_with_all_the_mass.py",),
    ),
    *op(
        "bidirectional_kl",
        (
            "what is kept is handed out over a retained graph",
            "if is_plain(factor) and not _keeps_graph():",
            "if is_plain(factor):",
            "the last backward would scale what an earlier one handed out",
        ),
        file="_finished",
        tests=("tests/test_loss_gradients.py",),
    ),
    *kernel(
        "bidirectional_kl",
        (
            "incoming gradient not used",
            "tl.load(out.row_grad_ptr + rows.at * out.stride_row_grad, mask=rows.there, other=0.0)",
            "tl.full(rows.at.shape, 1.0, tl.float32)",
            "grad_output that is not 1",
        ),
        (
            "strides of one side for both",
            "load_tile(pair.o_ptr, rows.at, start, pair.stride_om, pair.stride_ov,",
            "load_tile(pair.o_ptr, rows.at, start, pair.stride_zm, pair.stride_zv,",
            "the two sides may be laid out differently",
        ),
        file="pair_rows",
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
            "count = there & (label != target.ignore_index)",
            "count = there & (label == label)",
            "ignored rows leave all terms",
        ),
        (
            "impossible classes pass",
            "possible = (label >= 0) & (label < target.classes)",
            "possible = (label >= 0) & (label <= target.classes)",
            "target == V is no class",
        ),
        (
            "smoothing forgotten",
            "        if KIND.smooth:\n            weights += target.smooth\n        return weights\n",
            "        return weights\n",
            "label smoothing spreads mass",
        ),
        (
            "padding takes smoothing mass",
            "return tl.where(mask & (tile_columns(BLOCK_V, VEC) >= 0), target.smooth, 0.0)",
            "return tl.where(tile_columns(BLOCK_V, VEC) + over_row(rows.at, VEC) >= 0, target.smooth, 0.0)",
            "the padding holds no class",
        ),
        (
            "CE sum not rescaled",
            "unit_z = exp_unit(tl.minimum(rise.z, 0.0), rise.alpha_p, KIND.power) * sums.unit_z",
            "unit_z = sums.unit_z",
            "a later tile with a larger maximum",
        ),
        (
            "CE dot not shifted",
            "dot_g = sums.weight * rise.o + sums.dot_g",
            "dot_g = sums.dot_g",
            "centred on the new maximum",
        ),
        (
            "lanes' sums not shifted",
            "    sums = risen_sums(sums, rise, KIND)\n    unit_z, unit_g",
            "    unit_z, unit_g",
            "lanes come down to the row's maximum",
        ),
        (
            "label's logit about the other maximum",
            "keep * (g_label - state.m_o)",
            "keep * (g_label - state.m_z)",
            "each side has its own",
        ),
        (
            "alpha forgotten in the loss",
            "loss = ce_z + tl.where(terms.alpha == 0.0, 0.0, terms.alpha * ce_g)",
            "loss = ce_z + ce_g",
            "the gist's CE has weight alpha",
        ),
        (
            "beta forgotten in the gradient",
            "grad_z += over_row(factor * (terms.beta_z * terms.inv_t), VEC)",
            "grad_z += over_row(factor * terms.inv_t, VEC)",
            "the divergence has weight beta",
        ),
        (
            "no 1 / T in the gradient",
            "kl_z = (p * terms.inv_t) * apart(",
            "kl_z = p * apart(",
            "T inside the gradient",
        ),
        (
            "target not subtracted",
            "over_row(about.unit_g, VEC) - weights",
            "over_row(about.unit_g, VEC)",
            "softmax minus one-hot",
        ),
        (
            "soft targets' strides swapped",
            "tile_offsets(rows.at, start, target.stride_m, target.stride_v, BLOCK_V, VEC)",
            "tile_offsets(rows.at, start, target.stride_v, target.stride_m, BLOCK_V, VEC)",
            "soft targets of any layout",
        ),
        file="gist_rows",
    ),
    *kernel(
        "gist_loss",
        (
            "a detached gist takes NaN by its cross-entropy",
            "    if not KIND.alpha:\n        grad_g = tl.zeros_like(grad_g)\n",
            "",
            "alpha = 0 is no cross-entropy",
        ),
        (
            "a detached side learns",
            "    if KIND.kl_g:\n",
            "    if KIND.kl_z or KIND.kl_g:\n",
            "not even NaN comes over",
        ),
        (
            "label looked for in the first tile only",
            "place = tl.maximum(tl.minimum(aim.label - start, BLOCK_V), -1).to(tl.int32)",
            "place = tl.maximum(tl.minimum(aim.label, BLOCK_V), -1).to(tl.int32)",
            "every tile has its own columns",
        ),
        (
            "an impossible target keeps its gradient in whole rows",
            'factor = tl.where(aim.invalid, float("nan"), finished_factor(out))\n    store_row_loss',
            "factor = finished_factor(out) + 0 * unit_z\n    store_row_loss",
            "NaN through the row",
        ),
        (
            "rows that do not count keep their means",
            "tl.where(rows.count, e_q, 0.0),",
            "e_q,",
            "0 / 0 reaches their gradients",
        ),
        (
            "rows that do not count keep their share",
            "tl.where(rows.count, weight / unit_z, 0.0),",
            "weight / unit_z,",
            "0 / 0 reaches their gradients",
        ),
        (
            "rows that do not count keep their factor",
            "tl.where(rows.count, factor, 0.0),",
            "factor,",
            "smoothing's mass reaches their gradients",
        ),
        (
            "label's part left out of the merge",
            "sums = with_label(sums, state, z_label, g_label, aim, target.keep, KIND)\n    gist_finish(pair, out, rows, "
            "target, aim, state, sums, terms, start, stop, start == 0,",
            "gist_finish(pair, out, rows, target, aim, state, sums, terms, start, stop, start == 0,",
            "parts hold no label",
        ),
        (
            "one sum of a part for another",
            "part_of(out, 8, 0.0, rows, parts, PARTIAL, PARTS)",
            "part_of(out, 7, 0.0, rows, parts, PARTIAL, PARTS)",
            "each side has its own",
        ),
        file="gist_rows",
        tests=("tests/test_finished_losses.py",),
    ),
    *kernel(
        "gist_loss",
        (
            "alone adds the last rows only",
            "            total += gist_whole(",
            "            total = gist_whole(",
            "all add up",
        ),
        (
            "stretches not cut at the row's end",
            "stop = tl.minimum(start + stretch, V)",
            "stop = start + stretch",
            "the last stretch ends with the row",
        ),
        tests=("tests/test_finished_losses.py",),
    ),
    *kernel(
        "gist_loss",
        (
            "invalid target keeps its loss",
            'tl.where(aim.invalid, float("nan"), loss * finished_factor(out))',
            "loss * finished_factor(out)",
            "an impossible target gives NaN",
        ),
        (
            "an impossible target keeps its gradient in a backward",
            'tl.where(aim.invalid, float("nan"), gradient_factor(out, rows)),\n    )',
            "gradient_factor(out, rows),\n    )",
            "NaN through the row",
        ),
        (
            "weight sum off by its rows",
            "store_stat(out, 8, rows, sums.weight)",
            "store_stat(out, 8, rows, 0 * sums.weight + 1.0)",
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
