"""gist_loss in Triton: both cross-entropies and the bidirectional KL from one read of the two logits tensors.

The forms are those of bidirectional_kl.py, and two of gist_linear_loss (gist_linear_loss.py), whose gradients take the
logits' place. What a row keeps: gist_rows.py. All launches are of one kernel, whose FORM says which: it names the arguments
and hands them on as tuples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, launch, next_power_of_2
from fastgist_kernels.gist_rows import (
    PARTIAL,
    Kind,
    Target,
    Terms,
    gist_backward,
    gist_merge,
    gist_rows,
    gist_split,
    gist_twice,
    gist_whole,
)
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

__all__ = [
    "SPECS",
    "access_width",
    "gist_loss_bwd",
    "gist_loss_fwd",
    "gist_loss_fwd_bwd",
    "gist_spec",
    "launch_gist_loss",
]


@triton.jit(do_not_specialize=SIZES, repr=form_name)
def _gist_loss_kernel(
    z_ptr,
    g_ptr,
    target_ptr,
    divisor_ptr,
    row_grad_ptr,
    part_ptr,
    row_loss_ptr,
    loss_ptr,
    stats_ptr,
    grad_z_ptr,
    grad_g_ptr,
    M,
    V,
    classes,
    first,
    parts,
    stretch,
    stride_zm,
    stride_zv,
    stride_gm,
    stride_gv,
    stride_tm,
    stride_tv,
    stride_row_grad,
    ignore_index,
    alpha,
    beta,
    beta_z,
    beta_g,
    inv_t,
    keep,
    smooth,
    scale,
    FORM: tl.constexpr,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program (m, s): rows from m BLOCK_M on and, in the forms that split rows, stretch s of their columns, or tile s."""
    TILES: tl.constexpr = FORM == "bwd" or FORM == "classes"
    pair = Pair(z_ptr, stride_zm, stride_zv, g_ptr, stride_gm, stride_gv)
    target = Target(target_ptr, stride_tm, stride_tv, ignore_index, classes, first, keep, smooth)
    terms = Terms(alpha, beta, beta_z, beta_g, inv_t)
    stride_grad = stride_zm if KIND.in_place else V
    out = Out(
        row_loss_ptr,
        stats_ptr,
        part_ptr,
        grad_z_ptr,
        grad_g_ptr,
        stride_grad,
        M,
        V,
        scale,
        divisor_ptr,
        row_grad_ptr,
        stride_row_grad,
    )
    at = tl.program_id(0).to(tl.int64) * BLOCK_M
    start = tl.program_id(1) * (BLOCK_V if TILES else stretch)
    stop = tl.minimum(start + stretch, V)
    rows, aim = gist_rows(at, target, M, BLOCK_M, KIND)
    if FORM == "alone":
        total = tl.zeros([BLOCK_M], tl.float32)
        for more in range(0, M, BLOCK_M):
            rows, aim = gist_rows(at + more, target, M, BLOCK_M, KIND)
            total += gist_whole(pair, out, rows, target, aim, terms, KIND, BLOCK_V, VEC)
        tl.store(loss_ptr, tl.sum(total, 0))
    elif FORM == "whole":
        gist_whole(pair, out, rows, target, aim, terms, KIND, BLOCK_V, VEC)
    elif FORM == "split":
        gist_split(pair, out, rows, target, terms, start, stop, KIND, BLOCK_V, VEC)
    elif FORM == "merge":
        gist_merge(pair, out, rows, target, aim, terms, parts, start, stop, PARTS, KIND, BLOCK_V, VEC)
    elif TILES:
        gist_backward(pair, out, rows, target, aim, terms, start, KIND, BLOCK_V, VEC)
    else:  # "fwd", "rows", "chunk"
        gist_twice(pair, out, rows, target, aim, terms, KIND, BLOCK_V, VEC)


# -- launching -------------------------------------------------------------------------------------------------------


def access_width(pair, target) -> int:
    """:func:`vector_width` of all that a tile is read from."""
    return vector_width(*pair, target) if target.dim() == 2 else vector_width(*pair)


def launch_gist_loss(
    form: str,
    config: Mapping[str, int],
    pair: tuple,
    target,
    options: Sequence,
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
    classes: int | None = None,
    first: int = 0,
) -> None:
    """One launch of ``form``: ``programs`` a row, each of its own ``stretch`` of columns where a form splits rows; 0: one a
    tile.

    pair: two tensors (M, V) of any strides. target (M,) int64 or (M, V) float. ``options``: alpha, beta, beta_logits,
    beta_gist, temperature, label_smoothing, ignore_index. ``classes``: how many there are where the columns are only those
    from ``first`` on.
    """
    alpha, beta, beta_z, beta_g, temperature, smoothing, ignore_index = options
    rows, columns = pair[0].shape
    classes = classes or columns
    kind = Kind(
        soft=target.dim() == 2,
        smooth=smoothing != 0.0,
        power=int(temperature) if temperature in (1.0, 2.0, 3.0, 4.0) else 0,
        alpha=alpha != 0.0,
        kl_z=beta_z != 0.0,
        kl_g=beta_g != 0.0,
        in_place=grads[0] is pair[0],
    )

    def grid(c: Mapping[str, int]) -> tuple[int, int]:
        return 1 if form == "alone" else cdiv(rows, c["BLOCK_M"]), programs or cdiv(columns, c["BLOCK_V"])

    launch(
        _gist_loss_kernel,
        grid,
        config,
        *pair,
        target,
        divisor,
        row_grad,
        part,
        row_loss,
        loss,
        stats,
        *grads,
        rows,
        columns,
        classes,
        first,
        0 if part is None else len(part),
        stretch,
        *pair[0].stride(),
        *pair[1].stride(),
        target.stride(0),
        target.stride(1) if kind.soft else 0,
        0 if row_grad is None else row_grad.stride(0),
        ignore_index,
        alpha,
        beta,
        beta_z,
        beta_g,
        1.0 / temperature,
        1.0 - smoothing,
        smoothing / classes,
        scale,
        FORM=form,
        KIND=kind,
        PARTS=1 if part is None else next_power_of_2(len(part)),
        VEC=access_width(pair, target),
    )


def _by_parts(pair, target, options: Sequence, **outputs) -> None:
    """Each row by several programs: row losses, and statistics or else gradients."""
    logits = pair[0]
    vec = access_width(pair, target)
    config = rows_config("gist_loss_split", logits.device, logits.shape[1], vec)
    parts, stretch = split_classes(logits, config["BLOCK_V"])
    part = torch.empty(parts, PARTIAL.value, len(logits), dtype=torch.float32, device=logits.device)
    launch_gist_loss("split", config, pair, target, options, part=part, stretch=stretch, programs=parts)
    programs = parts if outputs.get("stats") is None else 1
    launch_gist_loss("merge", config, pair, target, options, part=part, stretch=stretch, programs=programs, **outputs)


def gist_loss_fwd_bwd(logits, gist_logits, target, divisor, *rest, form=None) -> None:
    """Write row_loss (M,), times scale / divisor, its sum loss (), both float32, and the gradients (M, V) of it, contiguous,
    that are not None.

    logits (M, V) of any strides; target (M,) int64 or (M, V) float; divisor () float32 or None. ``rest``: alpha, beta,
    beta_logits, beta_gist, temperature, label_smoothing, ignore_index, scale, row_loss, loss, grad_logits, grad_gist.
    ``form``: of :func:`choose_form`.
    """
    *options, scale, row_loss, loss, grad_logits, grad_gist = rest
    pair, (rows, classes) = (logits, gist_logits), logits.shape
    form = form or choose_form(logits)
    outputs: dict[str, Any] = {"row_loss": row_loss, "grads": (grad_logits, grad_gist), "scale": scale}
    outputs["divisor"] = divisor
    vec = access_width((logits, gist_logits), target)
    if form == "split":
        _by_parts(pair, target, options, **outputs)
    elif form == "rows":
        columns = (*pair, target) if target.dim() == 2 else pair
        each = 8 if all(t.stride(1) == 1 for t in columns) else 4  # eight of columns apart spill under Triton 3.6
        config = twice_config("gist_loss_rows", logits, vec, each)
        launch_gist_loss(form, config, pair, target, options, **outputs)
    elif form == "whole":
        config = whole_config("gist_loss_whole", logits.device, rows, classes, vec)
        launch_gist_loss(form, config, pair, target, options, **outputs)
    else:
        smooth = target.dim() == 1 and options[5] != 0.0  # 2048 elements of it spill under Triton 3.6
        config = alone_config(rows, classes, vec, 1024 if smooth else 2048)
        launch_gist_loss(form, config, pair, target, options, loss=loss, **outputs)
        return
    torch.sum(row_loss, 0, out=loss)


def gist_loss_fwd(logits, gist_logits, target, *rest) -> None:
    """Write row_loss (M,) and stats (9, M), float32. logits (M, V) of any strides; target (M,) int64 or (M, V) float.
    ``rest``: alpha, beta, with any T^2 in it, beta_logits, beta_gist, temperature, label_smoothing, ignore_index, row_loss,
    stats."""
    *options, row_loss, stats = rest
    pair = logits, gist_logits
    if few_rows(logits):
        _by_parts(pair, target, options, row_loss=row_loss, stats=stats)
    else:
        vec = access_width((logits, gist_logits), target)
        config = rows_config("gist_loss_fwd", logits.device, logits.shape[1], vec)
        launch_gist_loss("fwd", config, pair, target, options, row_loss=row_loss, stats=stats)


def gist_loss_bwd(logits, gist_logits, target, stats, row_grad, *rest) -> None:
    """Write the gradients (M, V), contiguous, that are not None; row_grad (M,) float32 of any stride. ``rest``: the options of
    :func:`gist_loss_fwd`, grad_logits, grad_gist."""
    *options, grad_logits, grad_gist = rest
    vec = access_width((logits, gist_logits), target)
    config = rows_config("gist_loss_bwd", logits.device, logits.shape[1], vec)
    outputs = {"stats": stats, "row_grad": row_grad, "grads": (grad_logits, grad_gist), "programs": 0}
    launch_gist_loss("bwd", config, (logits, gist_logits), target, options, **outputs)


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------

_OUTPUTS = (
    "divisor_ptr",
    "row_grad_ptr",
    "part_ptr",
    "row_loss_ptr",
    "loss_ptr",
    "stats_ptr",
    "grad_z_ptr",
    "grad_g_ptr",
)
#: Which of those the launches of a form are given.
_GIVEN = {
    "alone": ("divisor_ptr", "row_loss_ptr", "loss_ptr", "grad_z_ptr", "grad_g_ptr"),
    "whole": ("divisor_ptr", "row_loss_ptr", "grad_z_ptr", "grad_g_ptr"),
    "rows": ("divisor_ptr", "row_loss_ptr", "grad_z_ptr", "grad_g_ptr"),
    "fwd": ("row_loss_ptr", "stats_ptr"),
    "split": ("part_ptr",),
    "merge": ("divisor_ptr", "part_ptr", "row_loss_ptr", "grad_z_ptr", "grad_g_ptr"),
    "bwd": ("row_grad_ptr", "stats_ptr", "grad_z_ptr", "grad_g_ptr"),
    "chunk": ("row_grad_ptr", "row_loss_ptr", "grad_z_ptr", "grad_g_ptr"),
    "classes": ("row_grad_ptr", "stats_ptr", "grad_z_ptr", "grad_g_ptr"),
}


def gist_spec(
    form: str,
    label: str,
    dtype: str,
    tile: tuple,
    *,
    soft: bool = False,
    smooth: bool = False,
    power: int = 3,
    strided: bool = False,
    stats: bool = False,
    **more,
) -> Spec:
    """``tile``: elements of an access, rows, columns, and warps if not 4; ``smooth``: of class labels, smoothed (soft ones are
    in any case); ``power``: see :class:`Kind`; ``strided``: of tensors whose columns are not adjacent; ``stats``: statistics
    beside the rest; ``more``: of the Spec."""
    vec, block_m, block_v, warps = (*tile, 4)[:4]
    in_place = form in ("chunk", "classes")
    given = {*_GIVEN[form], *(("stats_ptr",) if stats else ())}
    pointers = dict.fromkeys(("z_ptr", "g_ptr", "grad_z_ptr", "grad_g_ptr"), f"*{dtype}")
    pointers |= {name: "*fp32" for name in _OUTPUTS if name not in pointers}
    pointers["target_ptr"] = "*fp32" if soft else "*i64"
    numbers = dict.fromkeys(("M", "V", "classes", "first", "parts", "stretch", "ignore_index"), "i32")
    numbers |= dict.fromkeys(("stride_zm", "stride_gm", "stride_tm", "stride_row_grad"), "i64")
    numbers |= dict.fromkeys(("alpha", "beta", "beta_z", "beta_g", "inv_t", "keep", "smooth", "scale"), "fp32")
    columns = ("stride_zv", "stride_gv", *(("stride_tv",) if soft else ()))
    adjacent = {"stride_tv": 0} | ({} if strided else dict.fromkeys(columns, 1))
    if strided:
        numbers |= dict.fromkeys(columns, "i64")
        adjacent = {name: one for name, one in adjacent.items() if name not in columns}
    kind = Kind(soft, soft or smooth, power, True, True, True, in_place)
    flags = {"FORM": form, "KIND": kind, "PARTS": 8, "VEC": vec, "BLOCK_M": block_m, "BLOCK_V": block_v}
    return Spec(
        _gist_loss_kernel,
        f"{form}_{label}",
        pointers | numbers,
        adjacent | dict.fromkeys(set(_OUTPUTS) - given) | flags,
        num_warps=warps,
        num_stages=1,
        unaligned=(*SIZES, *columns) if strided else SIZES,
        aligned=("stretch",),
        table=f"gist_linear_loss_{form}" if in_place else f"gist_loss_{form}",
        accesses=streams(form, dtype, (vec, block_m, block_v, warps)),
        **more,
    )


def _specs() -> list[Spec]:
    out = []
    for dtype, width, soft in (("bf16", 8, False), ("fp32", 4, False), ("bf16", 8, True)):
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
            out.append(gist_spec(form, f"{dtype}{'_soft' if soft else ''}{label}", dtype, tuple(tile), soft=soft))
    return out + _other_kinds()


def _other_kinds() -> list[Spec]:
    """float16, smoothed classes, other temperatures and columns apart, in the forms and with the tiles that take most
    registers."""
    whole: list[tuple] = [("whole", "v1024", (8, 2, 1024)), ("whole", "v4096", (8, 1, 4096, 8))]
    ragged: list[tuple] = [("alone", "ragged", (1, 16, 128, 16)), ("whole", "v128_ragged", (1, 8, 128))]
    ragged += [("whole", "v4096_ragged", (1, 1, 4096, 8)), ("rows", "ragged", (1, 1, 4096, 16))]
    ragged += [(form, "ragged", (1, 1, 1024)) for form in ("split", "merge", "fwd", "bwd")]
    long: list[tuple] = [(form, "long_v", (8, 1, 1024)) for form in ("rows", "split", "merge", "fwd", "bwd")]
    out = [gist_spec(form, f"fp16_{label}", "fp16", tile) for form, label, tile in (*whole, *long)]
    smooth_alone: tuple = ("alone", "ragged", (1, 8, 128, 8))
    for form, label, tile in (*whole, *long, smooth_alone, *ragged[1:]):
        out.append(gist_spec(form, f"bf16_smooth_{label}", "bf16", tile, smooth=True))
    for power in (0, 1, 2, 4):  # 0: exponentials at T = 1 are formed anew
        for form, label, tile in (*whole, ragged[2], *long[:1], long[3]):
            out.append(gist_spec(form, f"bf16_power{power}_{label}", "bf16", tile, power=power))
    for form, label, tile in (*whole, smooth_alone, *ragged[1:]):
        out.append(gist_spec(form, f"bf16_smooth_power0_{label}", "bf16", tile, smooth=True, power=0))
    apart: tuple = ("rows", "ragged", (1, 1, 2048, 16))
    for form, label, tile in (apart if t[0] == "rows" else t for t in ragged):
        label = label.replace("ragged", "strided")
        out.append(gist_spec(form, f"bf16_{label}", "bf16", tile, strided=True))
        # Of sixteen warps' soft rows Triton 3.9, not 3.6, spills two values on sm_80, of any tile.
        held: dict[str, Any] = {"archs": (90, 100)} if form == "rows" else {}
        out.append(gist_spec(form, f"bf16_soft_{label}", "bf16", tile, soft=True, strided=True, **held))
    return out


SPECS = _specs()
