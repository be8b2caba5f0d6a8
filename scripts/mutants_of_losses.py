"""Mutants of bidirectional_kl, gist_loss, gist_linear_loss: (name, text, its replacement, why a test must notice)."""

from __future__ import annotations

from mutant_list import kernel, op, reference

__all__ = ["LOSSES"]

_OFFSETS = ("tests/hard/test_hard_05.py",)
_LINEAR = ("tests/test_gist_linear_loss.py", "tests/test_gist_linear_loss_chunks.py")

BIDIRECTIONAL_KL = [
    *kernel(
        "bidirectional_kl",
        (
            "no column mask in the forward",
            "mask_mv = counts[:, None] & (offs_v < V)[None, :]",
            "mask_mv = counts[:, None] & (offs_v >= 0)[None, :]",
            "columns past V enter the sums",
        ),
        (
            "padding is 0, not -inf",
            'z = tl.load(z_ptrs, mask=mask_mv, other=float("-inf")).to(tl.float32)',
            "z = tl.load(z_ptrs, mask=mask_mv, other=0.0).to(tl.float32)",
            "padding takes probability",
        ),
        (
            "no temperature in the forward",
            "    to_exp2 = inv_t * LOG2E\n    m_z = tl.full",
            "    to_exp2 = 1.0 * LOG2E\n    m_z = tl.full",
            "p and q at T = 1",
        ),
        ("mean of d not divided by the sum", "e_p = w_p / s_p", "e_p = w_p", "E_p is a mean"),
        (
            "max not subtracted",
            "    zc = z - m_z[:, None]\n",
            "    zc = z\n",
            "exponentials overflow, offsets cost accuracy",
        ),
        (
            "sums not rescaled",
            "s_p = alpha_p * s_p + tl.sum(p, 1)",
            "s_p = s_p + tl.sum(p, 1)",
            "a later block with a larger maximum",
        ),
        (
            "weighted sum not shifted",
            "w_q = alpha_q * (w_q + shift * s_q) + tl.sum(q * d, 1)",
            "w_q = alpha_q * w_q + tl.sum(q * d, 1)",
            "d is about the new maxima",
        ),
        (
            "lone classes not counted",
            'lone += tl.sum(((z == float("-inf")) != (o == float("-inf"))).to(tl.int32), 1)',
            "lone += 0",
            "p > 0 where q = 0 must be +inf",
        ),
        (
            "absent on one side is present",
            'absent = (z == float("-inf")) | (o == float("-inf"))',
            'absent = (z == float("-inf")) & (o == float("-inf"))',
            "-inf reaches the sums",
        ),
        (
            "sign of the mean of d under p",
            "grad_z = scale[:, None] * (p * ",
            "grad_z = -scale[:, None] * (p * ",
            "a gradient upside down",
        ),
        (
            "p and q swapped in the other gradient",
            "(q - p)",
            "(p - q) * 1.0",
            "the difference of the two softmaxes has a sign",
        ),
        (
            "incoming gradient not used",
            "scale = tl.load(row_grad_ptr + offs_m * stride_grad, mask=mask_m, other=0.0) * inv_t",
            "scale = tl.full(offs_m.shape, 1.0, tl.float32) * inv_t",
            "grad_output that is not 1",
        ),
        (
            "strides swapped in the backward",
            "    o_ptrs = o_ptr + offs_m[:, None] * stride_om + offs_v[None, :] * stride_ov\n"
            "    z = tl.load(z_ptrs, mask=mask_load",
            "    o_ptrs = o_ptr + offs_m[:, None] * stride_zm + offs_v[None, :] * stride_zv\n"
            "    z = tl.load(z_ptrs, mask=mask_load",
            "the two sides may be laid out differently",
        ),
        (
            "masked rows get a gradient",
            "        grad_o = tl.where(counts[:, None], grad_o, 0.0)\n",
            "",
            "a masked row's gradient is 0",
        ),
        (
            "row mask not applied in the forward",
            '    m_z = tl.full([BLOCK_M], float("-inf"), tl.float32)\n    m_o',
            '    counts = mask_m\n    m_z = tl.full([BLOCK_M], float("-inf"), tl.float32)\n    m_o',
            "masked rows enter the loss",
        ),
    ),
    *kernel(
        "bidirectional_kl",
        (
            "32-bit row offsets in the forward",
            "    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)\n    mask_m = offs_m < M\n",
            "    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)\n    mask_m = offs_m < M\n",
            "rows more than 2^31 elements apart",
        ),
        tests=_OFFSETS,
    ),
    *reference(
        "bidirectional_kl",
        ("no T^2", "row_loss = row_loss * temperature**2", "row_loss = row_loss * temperature", "t_squared squares"),
        (
            "offset kept",
            "return z - _offset(z, other)",
            "return z * 1.0",
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
            "        row_loss = row_loss * temperature**2\n",
            "        pass\n",
            "t_squared multiplies",
        ),
        (
            "sign of the finished gradient",
            "_common.scale_rows(ctx.saved_tensors, (scale, -scale), ctx.dtype)",
            "_common.scale_rows(ctx.saved_tensors, (scale, scale), ctx.dtype)",
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
            "weights = weights * keep + smooth",
            "weights = weights * keep",
            "label smoothing spreads mass",
        ),
        (
            "padding takes smoothing mass",
            "return tl.where(mask_mv, weights, 0.0)",
            "return weights",
            "the padding holds no class",
        ),
        (
            "CE sum not rescaled",
            "sum_z = tl.exp2(tl.minimum(rise_z, 0.0) * LOG2E) * sum_z + ",
            "sum_z = sum_z + ",
            "a later block with a larger maximum",
        ),
        ("CE dot not shifted", "dot_g += weight * rise_g + tl.sum(", "dot_g += tl.sum(", "centred on the new maximum"),
        (
            "alpha forgotten in the loss",
            "tl.where(alpha == 0.0, 0.0, alpha * ce_g) + tl.where(beta == 0.0, 0.0, beta * divergence)",
            "ce_g + tl.where(beta == 0.0, 0.0, beta * divergence)",
            "the gist's CE has weight alpha",
        ),
        (
            "beta forgotten in the gradient",
            "    beta_t = beta * inv_t\n",
            "    beta_t = inv_t\n",
            "the divergence has weight beta",
        ),
        (
            "no 1 / T in the gradient",
            "kl_z = p * ((d - e_p[:, None]) * inv_t)",
            "kl_z = p * (d - e_p[:, None])",
            "T inside the gradient",
        ),
        (
            "target not subtracted",
            "ce_g = exp_unit(gc, q, POWER) * over_g[:, None] - weights",
            "ce_g = exp_unit(gc, q, POWER) * over_g[:, None]",
            "softmax minus one-hot",
        ),
        (
            "soft targets' strides swapped",
            "t_ptrs = target_ptr + offs_m[:, None] * stride_tm + offs_v[None, :] * stride_tv",
            "t_ptrs = target_ptr + offs_m[:, None] * stride_tv + offs_v[None, :] * stride_tm",
            "soft targets of any layout",
        ),
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
        (
            "weight sum off by its rows",
            "tl.store(stats_ptr + 8 * rows + offs_m, tl.where(counts, weight, 0.0), mask=mask_m)",
            "tl.store(stats_ptr + 8 * rows + offs_m, tl.where(counts, 1.0, 0.0), mask=mask_m)",
            "soft targets need not sum to 1",
        ),
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
            "grad_gist.sub_(kl_gist, alpha=beta / temperature)",
            "grad_gist.add_(kl_gist, alpha=beta / temperature)",
            "it comes negated",
        ),
        (
            "divergence without 1 / T",
            "grad_z.add_(kl_z, alpha=beta / temperature)",
            "grad_z.add_(kl_z, alpha=beta)",
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

GIST_LINEAR_LOSS = [
    *kernel(
        "gist_linear_loss",
        (
            "gist rows start at 0",
            "gist_ptr = logits_ptr + M.to(tl.int64) * stride_lm",
            "gist_ptr = logits_ptr",
            "rows i and m + i are a pair",
        ),
        (
            "row scale not used",
            "scale = tl.load(scale_ptr + offs_m * stride_scale, mask=mask_m, other=0.0)",
            "scale = tl.full(offs_m.shape, 1.0, tl.float32)",
            "each row's gradient has its factor",
        ),
        ("gradients swapped", "tl.store(z_ptrs, grad_z.to", "tl.store(z_ptrs, grad_g.to", "each side has its own"),
        (
            "ignored rows keep their logits",
            "            grad_g = tl.where(counts[:, None], scale[:, None] * grad_g, 0.0)\n",
            "            grad_g = tl.where(counts[:, None], scale[:, None] * grad_g, g)\n",
            "an ignored row's gradient is 0",
        ),
        (
            "no column mask in the second pass",
            "            mask_v = offs_v < V\n            mask_mv",
            "            mask_v = offs_v <= V\n            mask_mv",
            "the column after V belongs to no class",
        ),
        (
            "weights over the softmax sum forgotten",
            "over_g = weight / sum_g",
            "over_g = 1.0 / sum_z",
            "each side has its own sum",
        ),
        (
            "ignored rows' loss kept",
            "tl.store(loss_ptr + offs_m, tl.where(counts, loss, 0.0), mask=mask_m)",
            "tl.store(loss_ptr + offs_m, loss, mask=mask_m)",
            "an ignored row's loss is 0",
        ),
    ),
    *op(
        "gist_linear_loss",
        ("chunks overwrite dW", "beta = self.sum, 1.0 if self.begun else 0.0", "beta = self.sum, 0.0", "chunks add up"),
        (
            "dW from the scattered gradients",
            "torch.mm(logits[pairs:], weight, out=grad_gist[part])",
            "torch.mm(logits[:pairs], weight, out=grad_gist[part])",
            "the gist's rows are the second half",
        ),
        ("bias left out", "        if bias is None:\n", "        if True:\n", "the head's bias is part of the logits"),
        (
            "last chunk dropped",
            "for first in range(0, rows, chunk_rows):",
            "for first in range(0, rows // chunk_rows * chunk_rows, chunk_rows):",
            "rows % chunk_rows rows remain",
        ),
        (
            "target of the first chunk for all",
            "work(logits, target[part], row_scale",
            "work(logits, target[:pairs], row_scale",
            "a chunk has its own targets",
        ),
        tests=_LINEAR,
    ),
    *op(
        "gist_linear_loss",
        (
            "a bfloat16 sum",
            "kept = self.narrow_to if chunks == 1 else dtype",
            "kept = self.narrow_to",
            "dW of many chunks is summed in float32",
        ),
        (
            "the gist token always learns",
            "silent = alpha == 0.0 and beta_gist == 0.0",
            "silent = False",
            "products of zeros are left out",
        ),
        (
            "a silent gist token by alpha alone",
            "silent = alpha == 0.0 and beta_gist == 0.0",
            "silent = alpha == 0.0",
            "the divergence teaches it too",
        ),
        (
            "scale not folded in",
            "(torch.ones_like(whole) if lifted else whole)",
            "torch.ones_like(whole)",
            "the forward finishes the gradients",
        ),
        (
            "float16 gradients finished",
            "lifted = hidden.dtype == torch.float16",
            "lifted = False",
            "a mean's 1 / rows underflows",
        ),
        (
            "a head's gradient narrowed under autocast",
            "narrow = weight.dtype == hidden.dtype and not lifted",
            "narrow = not lifted",
            "a float32 head gets its sum",
        ),
        tests=_LINEAR,
    ),
    *op(
        "gist_linear_loss",
        ("budget exceeded", "fit = budget // max(", "fit = 2 * budget // max(", "a budget is kept"),
        (
            "blocks of the first rows",
            "ops.gist_loss_bwd(z[rows], gist[rows], target[rows], stats, scale[rows]",
            "ops.gist_loss_bwd(z[rows], gist[rows], target[rows], stats, scale[: rows.stop - rows.start]",
            "row gradients differ",
        ),
        file="_linear_chunks",
        tests=_LINEAR,
    ),
    *op(
        "gist_linear_loss",
        (
            "maxima not merged",
            "shift = rise_z - rise_g",
            "shift = rise_z - rise_z",
            "d is about the whole head's maxima",
        ),
        (
            "one rank's lone class",
            "*(_in_order(x) for x in parts), s.lone.amax(0)",
            "*(_in_order(x) for x in parts), s.lone[0]",
            "a class absent on one side of any rank makes the row infinite",
        ),
        (
            "a rank without a class",
            "return maximum.masked_fill(maximum == -_INF, 0.0)",
            "return maximum",
            "-inf less -inf is NaN",
        ),
        (
            "the label on every rank",
            "torch.where(self.has_label, self.keep, 0.0)",
            "torch.where(self.has_label, self.keep, self.keep)",
            "one rank has it",
        ),
        (
            "smoothing over a share",
            "label_smoothing / max(classes, 1)",
            "label_smoothing / max(mine, 1)",
            "smoothing is over all classes",
        ),
        (
            "hidden gradients not summed",
            "for s in shares if s is not None]",
            "for s in shares if s is None]",
            "each rank has a part of the sum over classes",
        ),
        file="_vocab_parallel",
        tests=("tests/test_vocab_parallel.py",),
    ),
]

LOSSES = [*BIDIRECTIONAL_KL, *GIST_LOSS, *GIST_LINEAR_LOSS]
