"""gist_linear_loss in Triton: what happens to one chunk of logits between its two matrix products.

The chunk holds both heads' logits, [2 m, V]: rows i and m + i are a pair. One launch reads them, writes the row losses,
reads them again (from L2 where the pair fits) and leaves the gradients in their place. With the statistics that it may leave
of its rows, another one turns a block of some classes' logits into their gradients. Both are forms of gist_loss's kernel.
"""

from __future__ import annotations

from fastgist_kernels.gist_loss import access_width, gist_spec, launch_gist_loss
from fastgist_kernels.pair_plan import rows_config

__all__ = ["SPECS", "gist_linear_loss_chunk", "gist_linear_loss_classes"]


def gist_linear_loss_chunk(logits, target, scale, *rest) -> None:
    """Write row_loss (m,) float32 and, if ``need_grad``, put the gradients, times scale (m,), in place of the logits
    (2 m, V), whose rows may be padded but whose columns are adjacent. ``rest``: the options of gist_loss_fwd, row_loss,
    need_grad, and the place of the rows' statistics (9, m) float32, contiguous, or None."""
    *options, row_loss, need_grad, stats = rest
    pair = logits[: len(row_loss)], logits[len(row_loss) :]
    # Two passes over packed rows, or ragged ones, keep much alive: with eight elements a thread some tiles spill.
    vec = access_width(pair, target)
    config = rows_config("gist_linear_loss_chunk", logits.device, logits.shape[1], vec, packed=4, ragged=4)
    grads = pair if need_grad else (None, None)
    outputs = {"row_loss": row_loss, "stats": stats, "row_grad": scale, "grads": grads}
    launch_gist_loss("chunk", config, pair, target, options, **outputs)


def gist_linear_loss_classes(logits, target, scale, stats, first, classes, *rest) -> None:
    """Put the gradients, times scale (m,), in place of the logits (2 m, n) of the classes from ``first`` on, of ``classes`` in
    all, from the statistics (9, m) of whole rows; ``rest``: the options of gist_loss_fwd, need_gist: else the gist token's
    half is left as it is. Soft targets (m, n) are those of the block."""
    *options, need_gist = rest
    pair = logits[: len(scale)], logits[len(scale) :]
    vec = access_width(pair, target)
    config = rows_config("gist_linear_loss_classes", logits.device, logits.shape[1], vec)
    grads = pair if need_gist else (pair[0], None)
    outputs = {"stats": stats, "row_grad": scale, "grads": grads, "programs": 0, "first": first, "classes": classes}
    launch_gist_loss("classes", config, pair, target, options, **outputs)


SPECS = [
    gist_spec("chunk", f"{dtype}_{label}{'_stats' if stats else ''}", dtype, tile, stats=stats)
    for dtype, width, stats in (("bf16", 8, False), ("fp32", 4, False), ("bf16", 8, True))
    for label, tile in (
        ("small_v", (width, 4, 128)),
        ("small_v_ragged", (1, 4, 128)),
        ("long_v", (width, 1, 128 * width)),
        ("long_v_ragged", (1, 1, 512)),
    )
]
#: Only a half-precision head takes a second pass. Both halves are read and written 16 bytes at a time, but for a row's class
#: and logits of it, its factor, its statistics and its loss.
SPECS += [
    gist_spec("classes", "bf16_long_v", "bf16", (8, 1, 1024), wide=True, numbers=11),
    gist_spec("classes", "bf16_long_v_ragged", "bf16", (1, 1, 1024)),
    gist_spec("chunk", "bf16_wide", "bf16", (8, 1, 2048, 8), wide=True, numbers=4, results=1),
]
SPECS += [
    gist_spec(form, f"{dtype}{kind}_{label}", dtype, tile, **options)
    for form, label, tile in (
        ("chunk", "long_v", (8, 1, 1024)),
        ("chunk", "long_v_ragged", (1, 1, 512)),
        ("classes", "long_v", (8, 1, 1024)),
    )
    for dtype, kind, options in (
        ("fp16", "", {}),
        ("bf16", "_smooth", {"smooth": True}),
        ("bf16", "_soft", {"soft": True}),
        ("bf16", "_power0", {"power": 0}),
        ("bf16", "_smooth_power0", {"smooth": True, "power": 0}),
    )
]
