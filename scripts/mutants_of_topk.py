"""Mutants of topk_kl: (name, text, its replacement, why a test must notice)."""

from __future__ import annotations

from mutant_list import kernel, op, reference

__all__ = ["TOPK_KL"]

TOPK_KL = [
    *kernel(
        "topk_kl",
        (
            "known classes stay in the rest",
            'z = tl.where(offs_v == tl.load(i_ptr + j), float("-inf"), z)',
            "z = tl.where(offs_v == tl.load(i_ptr + j), z, z)",
            "the rest is the sum over the others",
        ),
        (
            "the run of known classes starts late",
            "        at = end\n",
            "        at = end + 1\n",
            "the next block's first class stays in the rest",
        ),
        (
            "padding taken for a class",
            "first = tl.sum((indices < 0).to(tl.int64), 0)",
            "first = tl.sum((indices < 0).to(tl.int64), 0) * 2",
            "as many known classes stay in the rest as there is padding",
        ),
        (
            "sum not rescaled",
            "total = tl.exp2(tl.minimum(old - new, 0.0) * to_exp2) * total + ",
            "total = total + ",
            "a later block with a larger maximum",
        ),
        (
            "rest about the row's peak",
            "weight_rest = tl.exp2((largest - peak) * to_exp2) * total",
            "weight_rest = total",
            "the rest's sum is about its own maximum",
        ),
        (
            "no temperature in the log-probabilities",
            "d = tl.where(no_p | no_q, 0.0, (z - peak) * inv_t - log_whole - log_q)",
            "d = tl.where(no_p | no_q, 0.0, (z - peak) - log_whole - log_q)",
            "log p at temperature T",
        ),
        (
            "rest forgotten in the mean",
            "mean = (tl.sum(p * d, 0) + p_rest * d_rest) /",
            "mean = tl.sum(p * d, 0) /",
            "E_p runs over k + 1 classes",
        ),
        (
            "directions swapped",
            "        pull += sum_q * p - q\n",
            "        pull += q - sum_q * p\n",
            "the gradient of KL(q||p)",
        ),
        (
            "teacher's lone classes not counted",
            "lone += (no_q & (no_p == 0)).to(tl.int32)",
            "lone += (no_q & no_p).to(tl.int32)",
            "p > 0 where q = 0 makes KL(p||q) +inf",
        ),
        (
            "student's absent rest not counted",
            "lone_rest += (no_p_rest & (no_q_rest == 0)).to(tl.int32)",
            "lone_rest += 0",
            "q > 0 where p = 0 makes KL(q||p) +inf",
        ),
        (
            "masked rows looked at",
            "classes = tl.where(tl.load(mask_ptr + row * stride_mask) != 0, V, 0)",
            "classes = tl.where(tl.load(mask_ptr + row * stride_mask) != 0, V, V)",
            "a masked row may hold anything",
        ),
        (
            "known classes not written over",
            "tl.store(grad_ptr + row * V + indices, grad.to(grad_ptr.dtype.element_ty), mask=known)",
            "tl.store(grad_ptr + row * V + indices, grad.to(grad_ptr.dtype.element_ty), mask=known & (offs_k > 0))",
            "each has its own gradient",
        ),
        (
            "incoming gradient not used",
            "grad = pull * (tl.load(row_grad_ptr + row * stride_grad) * inv_t)",
            "grad = pull * inv_t",
            "grad_output that is not 1",
        ),
        (
            "rest's gradient about 0",
            "tl.exp2((z - largest[:, None]) * (inv_t * LOG2E))",
            "tl.exp2(z * (inv_t * LOG2E))",
            "shares of the rest are about its maximum",
        ),
    ),
    *kernel(
        "topk_kl",
        (
            "32-bit rows in the forward",
            "    row = tl.program_id(0).to(tl.int64)\n    classes",
            "    row = tl.program_id(0)\n    classes",
            "rows more than 2^31 elements apart",
        ),
        tests=("tests/hard/test_hard_05.py",),
    ),
    *reference(
        "topk_kl",
        (
            "plain 1 - sum",
            "rest = -torch.expm1(largest.squeeze(-1)) -",
            "rest = 1 - largest.exp().squeeze(-1) -",
            "1e-20",
        ),
        (
            "rounding for a rest",
            "none_left = (rest <= hidden)",
            "none_left = (rest <= 0)",
            "1 - sum within rounding is none",
        ),
        ("repeated classes pass", "| repeated(indices).any(-1)", "", "they give NaN"),
        (
            "padding adds -inf",
            "-torch.inf).masked_fill_(absent, 0.0)",
            "-torch.inf)",
            "padding changes class 0 by nothing",
        ),
        ("sum of q taken for 1", "grad + (sum_q * p - q)", "grad + (p - 2 * q)", "the gradient of KL(q||p)"),
        (
            "masked rows keep their gradient",
            ", pull.masked_fill(masked, 0.0)",
            ", pull",
            "a masked row's gradient is 0",
        ),
    ),
    *op(
        "topk_kl",
        ("entries unchecked", "_check_entries(log_probs, indices, mask, logits.shape[1])", "pass", "an error on a CPU"),
        (
            "divisor ignored",
            "divisor is None else row_loss.sum() / divisor",
            "divisor is None else row_loss.sum()",
            "the mean",
        ),
        (
            "masked entries checked",
            "counts = True if mask is None else mask[:, None]",
            "counts = True",
            "they hold anything",
        ),
    ),
]
