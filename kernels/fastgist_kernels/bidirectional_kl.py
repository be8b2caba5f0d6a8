"""bidirectional_kl in Triton: one online pass for the loss, one pass for both gradients.

A forward alone reads each logit once (2 M V b bytes) and keeps the row state of pair_rows.py; a backward reads and writes each
element once (4 M V b). Gradients that are finished with the loss, of scale / divisor times the sum of the row losses, take
one of four forms (pair_plan.choose_form): a row that fits in registers is read once (4 M V b with both gradients), and up to
some thousands of elements one program takes all rows; a longer row is read twice, the second time from L2, by one
program, or, where rows are few, by several, whose partial states a second launch merges in the order of the columns.

All launches are of one kernel, whose FORM says which: it names the arguments and hands them on as tuples.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, launch, next_power_of_2
from fastgist_kernels.kl_rows import PARTIAL, kl_backward, kl_merge, kl_rows, kl_split, kl_twice, kl_whole
from fastgist_kernels.pair_plan import (
    SIZES,
    alone_config,
    choose_form,
    few_rows,
    form_name,
    rows_config,
    split_classes,
    streams,
    twice_config,
    vector_width,
    whole_config,
)
from fastgist_kernels.pair_rows import Out, Pair

__all__ = ["SPECS", "bidirectional_kl_bwd", "bidirectional_kl_fwd", "bidirectional_kl_fwd_bwd"]


@triton.jit(do_not_specialize=SIZES, repr=form_name)
def _bidirectional_kl_kernel(
    z_ptr,
    o_ptr,
    mask_ptr,
    divisor_ptr,
    row_grad_ptr,
    part_ptr,
    row_loss_ptr,
    loss_ptr,
    stats_ptr,
    grad_z_ptr,
    grad_o_ptr,
    M,
    V,
    parts,
    stretch,
    stride_zm,
    stride_zv,
    stride_om,
    stride_ov,
    stride_mask,
    stride_row_grad,
    inv_t,
    scale,
    FORM: tl.constexpr,
    PARTS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program (m, s): rows from m BLOCK_M on and, in the forms that split rows, stretch s of their columns, or tile s."""
    pair = Pair(z_ptr, stride_zm, stride_zv, o_ptr, stride_om, stride_ov)
    out = Out(
        row_loss_ptr,
        stats_ptr,
        part_ptr,
        grad_z_ptr,
        grad_o_ptr,
        V,
        M,
        V,
        scale,
        divisor_ptr,
        row_grad_ptr,
        stride_row_grad,
    )
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    start = tl.program_id(1) * (BLOCK_V if FORM == "bwd" else stretch)
    stop = tl.minimum(start + stretch, V)
    rows = kl_rows(first, mask_ptr, stride_mask, M, BLOCK_M)
    if FORM == "alone":
        total = tl.zeros([BLOCK_M], tl.float32)
        for at in range(0, M, BLOCK_M):
            total += kl_whole(pair, out, kl_rows(first + at, mask_ptr, stride_mask, M, BLOCK_M), inv_t, BLOCK_V, VEC)
        tl.store(loss_ptr, tl.sum(total, 0))
    elif FORM == "whole":
        kl_whole(pair, out, rows, inv_t, BLOCK_V, VEC)
    elif FORM == "fwd" or FORM == "rows":
        kl_twice(pair, out, rows, inv_t, BLOCK_V, VEC)
    elif FORM == "split":
        kl_split(pair, out, rows, start, stop, inv_t, BLOCK_V, VEC)
    elif FORM == "merge":
        kl_merge(pair, out, rows, parts, start, stop, inv_t, BLOCK_V, VEC, PARTS)
    elif FORM == "bwd":
        kl_backward(pair, out, rows, start, inv_t, BLOCK_V, VEC)


# -- launching -------------------------------------------------------------------------------------------------------


def _launch(
    form: str,
    config: Mapping[str, int],
    pair,
    mask,
    temperature: float,
    *,
    row_loss=None,
    loss=None,
    stats=None,
    grads=(None, None),
    scale: float = 1.0,
    divisor=None,
    row_grad=None,
    part=None,
    stretch: int = 0,
    programs: int = 1,
) -> None:
    """One launch of ``form``: ``programs`` a row, each of its own ``stretch`` of columns where a form splits rows; 0:
    one a tile."""
    rows, classes = pair[0].shape

    def grid(c: Mapping[str, int]) -> tuple[int, int]:
        return 1 if form == "alone" else cdiv(rows, c["BLOCK_M"]), programs or cdiv(classes, c["BLOCK_V"])

    launch(
        _bidirectional_kl_kernel,
        grid,
        config,
        *pair,
        mask,
        divisor,
        row_grad,
        part,
        row_loss,
        loss,
        stats,
        *grads,
        rows,
        classes,
        0 if part is None else len(part),
        stretch,
        *pair[0].stride(),
        *pair[1].stride(),
        0 if mask is None else mask.stride(0),
        0 if row_grad is None else row_grad.stride(0),
        1.0 / temperature,
        scale,
        FORM=form,
        PARTS=1 if part is None else next_power_of_2(len(part)),
        VEC=vector_width(*pair),
    )


def _by_parts(pair, mask, temperature: float, **outputs) -> None:
    """Each row by several programs: row losses, and statistics or else gradients."""
    logits = pair[0]
    config = rows_config("bidirectional_kl_split", logits.device, logits.shape[1], vector_width(*pair))
    parts, stretch = split_classes(logits, config["BLOCK_V"])
    part = torch.empty(parts, PARTIAL.value, len(logits), dtype=torch.float32, device=logits.device)
    _launch("split", config, pair, mask, temperature, part=part, stretch=stretch, programs=parts)
    programs = parts if outputs.get("stats") is None else 1
    _launch("merge", config, pair, mask, temperature, part=part, stretch=stretch, programs=programs, **outputs)


def bidirectional_kl_fwd_bwd(
    logits, other_logits, mask, divisor, temperature, scale, row_loss, loss, grad_logits, grad_other, form=None
) -> None:
    """Write row_loss (M,), times scale / divisor, its sum loss (), both float32, and the gradients (M, V) of it, contiguous,
    that are not None. logits (M, V) of any strides, mask (M,) or None, divisor () float32 or None. ``form``: of
    :func:`choose_form`."""
    pair, (rows, classes) = (logits, other_logits), logits.shape
    form = form or choose_form(logits)
    outputs = {"row_loss": row_loss, "grads": (grad_logits, grad_other), "scale": scale, "divisor": divisor}
    vec = vector_width(*pair)
    if form == "split":
        _by_parts(pair, mask, temperature, **outputs)
    elif form == "rows":
        _launch(form, twice_config("bidirectional_kl_rows", logits, vec), pair, mask, temperature, **outputs)
    elif form == "whole":
        config = whole_config("bidirectional_kl_whole", logits.device, rows, classes, vec)
        _launch(form, config, pair, mask, temperature, **outputs)
    else:
        _launch(form, alone_config(rows, classes, vec), pair, mask, temperature, loss=loss, **outputs)
        return
    torch.sum(row_loss, 0, out=loss)


def bidirectional_kl_fwd(logits, other_logits, mask, temperature, row_loss, stats) -> None:
    """Write row_loss (M,) and stats (6, M), float32, from logits (M, V) of any strides and mask (M,) or None."""
    pair = logits, other_logits
    if few_rows(logits):
        _by_parts(pair, mask, temperature, row_loss=row_loss, stats=stats)
    else:
        config = rows_config("bidirectional_kl_fwd", logits.device, logits.shape[1], vector_width(*pair))
        _launch("fwd", config, pair, mask, temperature, row_loss=row_loss, stats=stats)


def bidirectional_kl_bwd(logits, other_logits, mask, stats, row_grad, temperature, grad_logits, grad_other) -> None:
    """Write the gradients (M, V), contiguous, that are not None; row_grad (M,) float32 of any stride."""
    pair, grads, classes = (logits, other_logits), (grad_logits, grad_other), logits.shape[1]
    config = rows_config("bidirectional_kl_bwd", logits.device, classes, vector_width(*pair))
    _launch("bwd", config, pair, mask, temperature, stats=stats, row_grad=row_grad, grads=grads, programs=0)


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------

_POINTERS = {"divisor_ptr": "*fp32", "row_grad_ptr": "*fp32", "part_ptr": "*fp32", "row_loss_ptr": "*fp32"}
_POINTERS |= {"loss_ptr": "*fp32", "stats_ptr": "*fp32"}
#: What the launches of a form are not given.
_UNUSED = {
    "alone": ("row_grad_ptr", "part_ptr", "stats_ptr"),
    "whole": ("row_grad_ptr", "part_ptr", "stats_ptr", "loss_ptr"),
    "rows": ("row_grad_ptr", "part_ptr", "stats_ptr", "loss_ptr"),
    "fwd": ("row_grad_ptr", "part_ptr", "loss_ptr", "divisor_ptr", "grad_z_ptr", "grad_o_ptr"),
    "split": (*_POINTERS.keys() - {"part_ptr"}, "grad_z_ptr", "grad_o_ptr"),
    "merge": ("row_grad_ptr", "stats_ptr", "loss_ptr"),
    "bwd": ("divisor_ptr", "part_ptr", "row_loss_ptr", "loss_ptr"),
}


def _spec(
    form: str, label: str, dtype: str, vec: int, block_m: int, block_v: int, warps: int = 4, *, strided: bool = False
) -> Spec:
    """``strided``: of tensors whose columns are not adjacent."""
    element = dict.fromkeys(("z_ptr", "o_ptr", "grad_z_ptr", "grad_o_ptr"), f"*{dtype}") | {"mask_ptr": "*i1"}
    columns = ("stride_zv", "stride_ov")
    strides = dict.fromkeys(("stride_zm", "stride_om", "stride_mask", "stride_row_grad", *columns), "i64")
    numbers = dict.fromkeys(("M", "V", "parts", "stretch"), "i32") | {"inv_t": "fp32", "scale": "fp32"}
    tile = {"FORM": form, "PARTS": 8, "VEC": vec, "BLOCK_M": block_m, "BLOCK_V": block_v}
    return Spec(
        _bidirectional_kl_kernel,
        f"{form}_{label}",
        element | _POINTERS | strides | numbers,
        ({} if strided else dict.fromkeys(columns, 1)) | dict.fromkeys(_UNUSED[form]) | tile,
        num_warps=warps,
        num_stages=1,
        unaligned=(*SIZES, *columns) if strided else SIZES,
        aligned=("stretch",),
        table=f"bidirectional_kl_{form}",
        accesses=streams(form, dtype, (vec, block_m, block_v, warps)),
    )


def _specs() -> list[Spec]:
    out = []
    for dtype, width in (("bf16", 8), ("fp32", 4)):
        tiles: list[tuple] = [
            ("alone", "", 4, 32, 128, 16),
            ("alone", "_ragged", 1, 16, 128, 16),
            ("alone", "_v8", width, 512, 8, 16),
            ("whole", "_v8", width, 256, 8),
            ("whole", "_v128", width, 16, 128),
            ("whole", "_v128_ragged", 1, 8, 128),
            ("whole", "_v1024", width, 2, 1024),
            ("whole", "_v4096", width, 1, 4096, 8),
            ("whole", "_v4096_ragged", 1, 1, 4096, 8),
            ("rows", "_few_warps", width, 1, 128 * width),
            ("rows", "_many_warps", width, 1, 512 * width, 16),
            ("rows", "_ragged", 1, 1, 4096, 16),
            ("split", "", width, 1, 128 * width),
            ("merge", "", width, 1, 128 * width),
            *((form, "_small_v", width, width, 128) for form in ("fwd", "bwd")),
            *((form, "_long_v", width, 1, 128 * width) for form in ("fwd", "bwd")),
            *((form, "_ragged", 1, 1, 1024) for form in ("fwd", "bwd")),
        ]
        for form, label, *tile in tiles:
            out.append(_spec(form, f"{dtype}{label}", dtype, *tile))
    halves: list[tuple] = [("whole", "_v1024", 8, 2, 1024), ("whole", "_v4096_ragged", 1, 1, 4096, 8)]
    halves += [(form, "_long_v", 8, 1, 1024) for form in ("rows", "split", "merge", "fwd", "bwd")]
    out += [_spec(form, f"fp16{label}", "fp16", *tile) for form, label, *tile in halves]
    apart: list[tuple] = [("alone", 16, 128, 16), ("whole", 8, 128), ("whole", 1, 4096, 8)]
    apart += [(form, 1, 1024) for form in ("split", "merge", "fwd", "bwd")]
    for form, *tile in apart:
        out.append(_spec(form, f"bf16_strided_v{tile[1]}", "bf16", 1, *tile, strided=True))
    return out


SPECS = _specs()
