"""Rows of two logits tensors in Triton, for the losses on them: how a tile lies on the threads, and the row state.

A tile is BLOCK_M rows of BLOCK_V columns, laid out so that what one thread holds of a row lies along one axis. Where rows
begin and end on whole accesses of VEC elements it is [BLOCK_M, lanes, VEC]; else [DEEP, BLOCK_M, lanes], and neighbouring
threads take neighbouring columns. Sums and maxima along that axis are a thread's own, so a row state is kept for each thread
("lane", [BLOCK_M, lanes]) without a word to its neighbours until the row has ended.

The state of bidirectional_kl: the maxima m, the sums S of the exponentials about them, and the weighted sums
W = sum exp((z - m) / T) d with d = (z - m_z) - (o - m_o). Where the maxima rise by (a, b), d shrinks by a - b, so
(S, W) -> (alpha S, alpha (W - (a - b) S)): so a lane takes its next columns, and so lanes, and parts of a row, are merged.
The state is exact about its maxima, and an offset between the heads never enters the arithmetic.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastgist_kernels.common import cdiv, device_arch, launch_config, next_power_of_2
from fastgist_kernels.gelu import exponential
from fastgist_kernels.outer import narrow, processors

__all__ = [
    "SIZES",
    "alone_config",
    "centred_pair",
    "choose_form",
    "few_rows",
    "finished_factor",
    "finite_max",
    "lane_sum",
    "load_tile",
    "lone_classes",
    "merge_pair",
    "no_lanes",
    "online_pair",
    "over_lanes",
    "over_row",
    "pair_means",
    "row_max",
    "row_sum",
    "rows_config",
    "split_classes",
    "store_tile",
    "tile_columns",
    "tile_mask",
    "tile_offsets",
    "twice_config",
    "vector_width",
    "whole_config",
]

#: Arguments that Triton is not to look at: what a row is aligned to VEC says alone, as a compiler that knows more than VEC
#: lays tiles out so that threads must exchange them.
SIZES = ("M", "V", "stride_zm", "stride_om", "stride_gm", "stride_tm", "stride_lm")
#: A row of at most this many classes is held in registers whole.
WHOLE_CLASSES = 4096
#: A problem of at most this many (padded) elements a tensor is one program's.
ALONE_ELEMENTS = 8192


# -- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def tile_columns(BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """int32 [1, lanes, VEC] or [DEEP, 1, lanes]: the columns of a tile, from 0."""
    if VEC > 1:
        return tl.arange(0, BLOCK_V // VEC)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    else:
        DEEP: tl.constexpr = 8 if BLOCK_V >= 256 else (BLOCK_V + 31) // 32
        return tl.arange(0, DEEP)[:, None, None] * (BLOCK_V // DEEP) + tl.arange(0, BLOCK_V // DEEP)[None, None, :]


@triton.jit
def over_row(x, VEC: tl.constexpr):
    """[BLOCK_M] beside a tile."""
    if VEC > 1:
        return x[:, None, None]
    else:
        return x[None, :, None]


@triton.jit
def tile_mask(rows, start, stop, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """Which elements of the tile at ``start`` are before column ``stop`` in rows [BLOCK_M] that count; whole vectors are or
    are not, which [BLOCK_M, lanes, 1] says."""
    left = tl.minimum(stop - start, BLOCK_V).to(tl.int32)
    if VEC > 1:
        columns = tl.arange(0, BLOCK_V // VEC)[None, :, None] * VEC
    else:
        columns = tile_columns(BLOCK_V, VEC)
    return over_row(rows, VEC) & (columns < left)


@triton.jit
def tile_offsets(offs_m, start, stride_m, stride_v, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """int64 offsets of the tile at column ``start`` of rows ``offs_m`` (int64)."""
    rows = offs_m * stride_m
    if VEC > 1:
        rows = tl.multiple_of(rows, VEC)
    return over_row(rows, VEC) + (start + tile_columns(BLOCK_V, VEC).to(tl.int64)) * stride_v


@triton.jit
def load_tile(
    ptr, offs_m, start, stride_m, stride_v, mask, BLOCK_V: tl.constexpr, VEC: tl.constexpr, POLICY: tl.constexpr
):
    """A tile as it is stored; -inf outside ``mask``, where nothing is read."""
    offsets = tile_offsets(offs_m, start, stride_m, stride_v, BLOCK_V, VEC)
    return tl.load(ptr + offsets, mask=mask, other=float("-inf"), eviction_policy=POLICY)


@triton.jit
def store_tile(ptr, offs_m, start, stride_m, values, mask, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """``values`` into rows of adjacent columns; nobody reads them soon."""
    offsets = tile_offsets(offs_m, start, stride_m, 1, BLOCK_V, VEC)
    tl.store(ptr + offsets, narrow(values, ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def lane_sum(x, VEC: tl.constexpr):
    """Tile -> [BLOCK_M, lanes]: each thread's own."""
    if VEC > 1:
        return tl.sum(x, 2)
    else:
        return tl.sum(x, 0)


@triton.jit
def lane_max(x, VEC: tl.constexpr):
    if VEC > 1:
        return tl.max(x, 2)
    else:
        return tl.max(x, 0)


@triton.jit
def over_lanes(x, VEC: tl.constexpr):
    """[BLOCK_M, lanes] beside a tile."""
    if VEC > 1:
        return x[:, :, None]
    else:
        return x[None, :, :]


@triton.jit
def row_sum(x, VEC: tl.constexpr):
    """Tile -> [BLOCK_M]."""
    return tl.sum(lane_sum(x, VEC), 1)


@triton.jit
def row_max(x, VEC: tl.constexpr):
    return tl.max(lane_max(x, VEC), 1)


@triton.jit
def no_lanes(fill, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """float32 [BLOCK_M, lanes] of ``fill``."""
    if VEC > 1:
        return tl.full([BLOCK_M, BLOCK_V // VEC], fill, tl.float32)
    else:
        DEEP: tl.constexpr = 8 if BLOCK_V >= 256 else (BLOCK_V + 31) // 32
        return tl.full([BLOCK_M, BLOCK_V // DEEP], fill, tl.float32)


# -- the state of the divergence -------------------------------------------------------------------------------------


@triton.jit
def finite_max(m):
    """The maximum to centre on: 0 while a row has shown nothing but -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def centred_pair(z, o, m_z, m_o):
    """z - m_z, o - m_o and their difference d; d is 0 where a class is absent (-inf) on either side."""
    zc = z - m_z
    oc = o - m_o
    absent = (z == float("-inf")) | (o == float("-inf"))
    d = tl.where(absent, 0.0, zc - oc)
    return zc, oc, d


@triton.jit
def lone_classes(z, o):
    """1.0 where a class is -inf on one side only."""
    return tl.where((z == float("-inf")) != (o == float("-inf")), 1.0, 0.0)


@triton.jit
def risen(rise_z, rise_o, s_p, s_q, w_p, w_q, to_exp2):
    """The sums about maxima that lie higher by -rise (rise = old - new <= 0), and the factors that took them there."""
    # Before the first finite logit the sums are 0 and old = 0 stands for -inf: cap the factor so that 0 stays 0.
    alpha_p = exponential(tl.minimum(rise_z, 0.0) * to_exp2)
    alpha_q = exponential(tl.minimum(rise_o, 0.0) * to_exp2)
    # The factor first: shift may be as large as a float32, where a lane has shown nothing but masked classes.
    shift = rise_z - rise_o
    w_p = alpha_p * w_p + (alpha_p * shift) * s_p
    w_q = alpha_q * w_q + (alpha_q * shift) * s_q
    return alpha_p * s_p, alpha_q * s_q, w_p, w_q, alpha_p, alpha_q


@triton.jit
def online_pair(z, o, m_z, m_o, s_p, s_q, w_p, w_q, lone, to_exp2, VEC: tl.constexpr):
    """Take a tile of both sides (float32) into the lanes' state. Padding comes in as -inf on both sides.

    ``lone`` counts the classes that are -inf on one side only. The centred tiles, their exponentials, how far the
    maxima rose (old - new, <= 0) and the factors for it are returned too, for a caller that keeps more sums.
    """
    old_z = finite_max(m_z)
    old_o = finite_max(m_o)
    m_z = tl.maximum(m_z, lane_max(z, VEC))
    m_o = tl.maximum(m_o, lane_max(o, VEC))
    new_z = finite_max(m_z)
    new_o = finite_max(m_o)
    zc, oc, d = centred_pair(z, o, over_lanes(new_z, VEC), over_lanes(new_o, VEC))
    p = exponential(zc * to_exp2)
    q = exponential(oc * to_exp2)
    rise_z = old_z - new_z
    rise_o = old_o - new_o
    s_p, s_q, w_p, w_q, alpha_p, alpha_q = risen(rise_z, rise_o, s_p, s_q, w_p, w_q, to_exp2)
    w_p += lane_sum(p * d, VEC)
    w_q += lane_sum(q * d, VEC)
    s_p += lane_sum(p, VEC)
    s_q += lane_sum(q, VEC)
    lone += lane_sum(lone_classes(z, o), VEC)
    return m_z, m_o, s_p, s_q, w_p, w_q, lone, zc, oc, p, q, rise_z, rise_o, alpha_p, alpha_q


@triton.jit
def merge_pair(m_z, m_o, s_p, s_q, w_p, w_q, lone, to_exp2):
    """Lanes, or parts of a row, [BLOCK_M, lanes] -> the state of rows [BLOCK_M] about finite maxima; and how far each
    lane's maxima rose, with the factors for it."""
    row_z = finite_max(tl.max(m_z, 1))
    row_o = finite_max(tl.max(m_o, 1))
    rise_z = finite_max(m_z) - row_z[:, None]
    rise_o = finite_max(m_o) - row_o[:, None]
    s_p, s_q, w_p, w_q, alpha_p, alpha_q = risen(rise_z, rise_o, s_p, s_q, w_p, w_q, to_exp2)
    s_p, s_q, w_p, w_q = tl.sum(s_p, 1), tl.sum(s_q, 1), tl.sum(w_p, 1), tl.sum(w_q, 1)
    return row_z, row_o, s_p, s_q, w_p, w_q, tl.sum(lone, 1), rise_z, rise_o, alpha_p, alpha_q


@triton.jit
def pair_means(s_p, s_q, w_p, w_q, lone, inv_t):
    """The divergence of each row and the means of d under p and q, NaN where the divergence is +inf."""
    e_p = w_p / s_p
    e_q = w_q / s_q
    divergence = (e_p - e_q) * inv_t
    infinite = (lone > 0) & (divergence == divergence)
    divergence = tl.where(infinite, float("inf"), divergence)
    e_p = tl.where(infinite, float("nan"), e_p)
    e_q = tl.where(infinite, float("nan"), e_q)
    return divergence, e_p, e_q


@triton.jit
def finished_factor(scale, divisor_ptr, HAS_DIVISOR: tl.constexpr):
    """What finished gradients and row losses are times: scale, over the number at divisor_ptr if there is one."""
    if HAS_DIVISOR:
        scale = tl.div_rn(scale, tl.load(divisor_ptr))
    return scale


# -- host ------------------------------------------------------------------------------------------------------------


def vector_width(*tensors: torch.Tensor) -> int:
    """Elements a thread takes at once from (M, V) tensors: 16 bytes of the first, or half of it for half precision, where
    every row begins and ends on that many; else 1."""
    widest = 16 // tensors[0].element_size()
    for width in (widest, 4):
        if tensors[0].shape[1] % width == 0 and all(t.stride(1) == 1 and t.stride(0) % width == 0 for t in tensors):
            return width
    return 1


def rows_config(
    kernel: str, device: torch.device, classes: int, vec: int, num_warps: int = 4, packed: int = 8
) -> dict[str, int]:
    """Tile for a kernel that walks rows: one access of ``vec`` elements a thread and tensor, or eight of one; rows packed
    while V is small, up to ``packed`` elements a thread."""
    each = vec if vec > 1 else 8
    block_v = min(next_power_of_2(classes), 32 * num_warps * each)
    block_m = max(1, 32 * num_warps * min(each, packed) // block_v)
    default = {"BLOCK_V": block_v, "BLOCK_M": block_m, "num_warps": num_warps, "num_stages": 1}
    return default | launch_config(kernel, device_arch(device), f"v{next_power_of_2(classes)}")


def whole_config(kernel: str, device: torch.device, rows: int, classes: int, vec: int) -> dict[str, int]:
    """Tile of whole rows in registers: 16 elements a thread and tensor (8 of several ragged rows, each with an address of its
    own), fewer where there are not rows enough to go round."""
    block_v = next_power_of_2(classes)
    share = next_power_of_2(cdiv(rows, 2 * processors(device)))
    block_m = max(1, min((2048 if vec > 1 else 1024) // block_v, share))
    each = 512 if vec > 1 or block_m == 1 else 256
    default = {"BLOCK_V": block_v, "BLOCK_M": block_m, "num_warps": _warps(block_m * block_v, each), "num_stages": 1}
    return default | launch_config(kernel, device_arch(device), f"v{block_v}")


def alone_config(rows: int, classes: int, vec: int) -> dict[str, int]:
    """Tile of a problem whose rows one program takes, some at a time."""
    block_v = next_power_of_2(classes)
    elements = 4096 if vec > 1 else 2048  # an address for every element: sixteen warps would have too few registers
    block_m = max(1, min(next_power_of_2(rows), elements // block_v))
    return {"BLOCK_V": block_v, "BLOCK_M": block_m, "num_warps": _warps(block_m * block_v, 256), "num_stages": 1}


def _warps(elements: int, each: int) -> int:
    return max(1, min(16, elements // each))


def twice_config(kernel: str, logits: torch.Tensor, vec: int) -> dict[str, int]:
    """Tile of a kernel that reads its row twice, the second time from L2: so many warps that the rows of all programs at
    work fit there."""
    classes = logits.shape[1]
    fit = _cache(logits.device) // (processors(logits.device) * 2 * classes * logits.element_size())
    return rows_config(kernel, logits.device, classes, vec, 4 if fit >= 8 else 8 if fit >= 4 else 16)


@functools.cache
def _cache(device: torch.device) -> int:
    """Bytes of L2 that rows may take: four fifths of it (of an H100's, where kernels are interpreted)."""
    size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 50 * 2**20
    return size * 4 // 5


def choose_form(logits: torch.Tensor) -> str:
    """How gradients are finished with the loss. "alone": all rows in one program, which adds them up too; "whole": rows in
    registers; "split": few long rows, each by several programs in two launches; "rows": a row a program, read twice."""
    rows, classes = logits.shape
    if classes <= WHOLE_CLASSES:
        return "alone" if next_power_of_2(rows) * next_power_of_2(classes) <= ALONE_ELEMENTS else "whole"
    return "split" if few_rows(logits) else "rows"


def few_rows(logits: torch.Tensor) -> bool:
    """Whether rows are long and too few to keep the processors at work, a program a row."""
    rows, classes = logits.shape
    return classes > WHOLE_CLASSES and rows < 2 * processors(logits.device)


def split_classes(logits: torch.Tensor, block_v: int) -> tuple[int, int]:
    """(parts of a row, classes in each): about four programs a processor, at least two tiles a part."""
    rows, classes = logits.shape
    parts = cdiv(4 * processors(logits.device), rows)
    stretch = max(cdiv(cdiv(classes, parts), block_v), 2) * block_v
    return cdiv(classes, stretch), stretch
