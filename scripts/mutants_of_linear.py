"""Mutants of gist_linear_loss, its chunks and its sharded head: (name, text, its replacement, why a test must notice)."""

from __future__ import annotations

from mutant_list import kernel, op

__all__ = ["GIST_LINEAR_LOSS"]

_LINEAR = ("tests/test_gist_linear_loss.py", "tests/test_gist_linear_loss_chunks.py")
_CLASSES = ("tests/test_gist_linear_loss_classes.py",)

GIST_LINEAR_LOSS = [
    *kernel(
        "gist_linear_loss",
        (
            "gist rows start at 0",
            "pair = logits[: len(row_loss)], logits[len(row_loss) :]",
            "pair = logits[: len(row_loss)], logits[: len(row_loss)]",
            "rows i and m + i are a pair",
        ),
        (
            "row scale not used",
            '"row_grad": scale, "grads": grads}',
            '"row_grad": scale / scale, "grads": grads}',
            "each row's gradient has its factor",
        ),
        (
            "gradients swapped",
            "grads = pair if need_grad else (None, None)",
            "grads = pair[::-1] if need_grad else (None, None)",
            "each side has its own",
        ),
    ),
    *kernel(
        "gist_linear_loss",
        (
            "ignored rows' loss kept",
            "tl.store(out.row_loss_ptr + rows.at, tl.where(rows.count, loss, 0.0), mask=rows.there)",
            "tl.store(out.row_loss_ptr + rows.at, loss, mask=rows.there)",
            "an ignored row's loss is 0",
        ),
        file="pair_rows",
    ),
    *kernel(
        "gist_linear_loss",
        (
            "the block's own number of classes",
            '"first": first, "classes": classes}',
            '"first": first, "classes": logits.shape[1]}',
            "a label outside the block is a class",
        ),
        (
            "a row of the block's scale for all",
            '"row_grad": scale, "grads": grads, "programs"',
            '"row_grad": scale[:1].expand(len(scale)), "grads": grads, "programs"',
            "row gradients differ",
        ),
        tests=_CLASSES,
    ),
    *kernel(
        "gist_linear_loss",
        (
            "a block's classes counted from 0",
            "tl.where(count & possible, label - target.first, -1)",
            "tl.where(count & possible, label, -1)",
            "labels are of the whole head",
        ),
        (
            "one sum for the other",
            "stat(out, 3, rows, 1.0)",
            "stat(out, 2, rows, 1.0)",
            "each side has its own",
        ),
        file="gist_rows",
        tests=_CLASSES,
    ),
    *op(
        "gist_linear_loss",
        (
            "dW from the scattered gradients",
            "torch.mm(logits[pairs:], weight, out=grad_gist[part])",
            "torch.mm(logits[:pairs], weight, out=grad_gist[part])",
            "the gist's rows are the second half",
        ),
        (
            "last chunk dropped",
            "for first in range(0, rows, chunk_rows):",
            "for first in range(0, rows // chunk_rows * chunk_rows, chunk_rows):",
            "rows % chunk_rows rows remain",
        ),
        (
            "target of the first chunk for all",
            "work.rows(logits, target[part], row_scale",
            "work.rows(logits, target[:pairs], row_scale",
            "a chunk has its own targets",
        ),
        tests=_LINEAR,
    ),
    *op(
        "gist_linear_loss",
        ("chunks overwrite dW", "beta = self.sum, 1.0 if self.begun else 0.0", "beta = self.sum, 0.0", "chunks add up"),
        ("bias left out", "    if bias is None:\n", "    if True:\n", "the head's bias is part of the logits"),
        (
            "a bfloat16 sum",
            "kept if chunks == 1 else dtype",
            "kept",
            "dW of many chunks is summed in float32",
        ),
        file="_linear_head",
        tests=_LINEAR,
    ),
    *op(
        "gist_linear_loss",
        (
            "a block with all of the bias",
            "None if bias is None else bias[part]",
            "None if bias is None else bias[: part.stop - start]",
            "a block has its own classes",
        ),
        (
            "last block dropped",
            "for start in range(0, classes, block):",
            "for start in range(0, classes // block * block, block):",
            "classes % block classes remain",
        ),
        (
            "the gist token's half left out",
            "used = rows if silent else 2 * rows\n    grad",
            "used = rows\n    grad",
            "both heads' rows make dW",
        ),
        file="_linear_head",
        tests=_CLASSES,
    ),
    *op(
        "gist_linear_loss",
        ("the sum wherever", "    if sum_bytes <= room:\n", "    if True:\n", "a float32 sum of dW has no room"),
        ("no pass too many", "if fewer >= LEAST_ROWS:", "if fewer >= 1:", "few rows pass over dW too often"),
        (
            "labels of the first block",
            "part = start, self.all_classes\n            self.ops",
            "part = 0, self.all_classes\n            self.ops",
            "classes are counted from the block's first",
        ),
        (
            "statistics of the first rows",
            "own = stats[:, rows].contiguous()",
            "own = stats[:, : rows.stop - first].contiguous()",
            "rows have their own statistics",
        ),
        file="_linear_chunks",
        tests=_CLASSES,
    ),
    *op(
        "gist_linear_loss",
        (
            "a block's classes counted from 0",
            "rest = self._about(aim, self.first + start, width)",
            "rest = self._about(aim, self.first, width)",
            "labels are of the whole head",
        ),
        (
            "soft targets of the first block",
            "aim = target[rows, start : start + width] if",
            "aim = target[rows, :width] if",
            "a block has its own classes",
        ),
        file="_row_state",
        tests=_CLASSES,
    ),
    *op(
        "gist_linear_loss",
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
            "ops.gist_loss_bwd(z[rows], gist[rows], target[rows], own, scale[rows]",
            "ops.gist_loss_bwd(z[rows], gist[rows], target[rows], own, scale[: rows.stop - rows.start]",
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
            "self.has_label.to(like.dtype).mul_(self.keep)",
            "torch.ones_like(self.has_label, dtype=like.dtype).mul_(self.keep)",
            "one rank has it",
        ),
        (
            "smoothing over a share",
            "label_smoothing / max(classes, 1)",
            "label_smoothing / max(mine, 1)",
            "smoothing is over all classes",
        ),
        file="_row_state",
        tests=("tests/test_vocab_parallel.py",),
    ),
    *op(
        "gist_linear_loss",
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
