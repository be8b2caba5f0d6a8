"""What the backward kernels of cp_linear and adapter share: a^T b over many rows, deterministic, without atomics.

    out[c, r] = factor * sum_m a[m, c] b[m, r]

Stage one gives each program a range of rows and writes its float32 partial result; stage two adds the partials in a
fixed order. Also here: the dot for low-rank operands, and the rounding that belongs to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import INTERPRET, cdiv, device_arch, dot, launch, launch_config, next_power_of_2
from fastgist_kernels.pieces import PIECES, find, padded, pick, sizes, strides

__all__ = [
    "SPECS",
    "argument_types",
    "low_dot",
    "narrow",
    "outer",
    "outer_partials",
    "processors",
    "rank_block",
    "reduce_partials",
]


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """``x`` as DTYPE, to nearest even. The interpreter cuts bfloat16 off: there the bits are rounded first."""
    if INTERPRET:
        if DTYPE == tl.bfloat16 and x.dtype == tl.float32:
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def low_dot(a, b, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b. WIDE (float16 inputs): ``a`` is a float32 intermediate that may exceed float16's range, so both go in as
    float32; tf32 keeps float16's ten bits. Otherwise a float32 ``a`` takes the dtype of ``b``."""
    if WIDE:
        return dot(a.to(tl.float32), b.to(tl.float32), acc, PRECISION)
    return dot(narrow(a, b.dtype), b, acc, PRECISION)


@triton.jit
def _outer_partial_kernel(
    a0_ptr,
    a1_ptr,
    a2_ptr,
    b_ptr,
    part_ptr,
    M,
    c0,
    c1,
    c2,
    R,
    rows_per_split,
    stride_am0,
    stride_am1,
    stride_am2,
    stride_ac0,
    stride_ac1,
    stride_ac2,
    stride_bm,
    stride_br,
    stride_part,
    PIECES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Columns of a stand in up to three pieces; a tile of them lies in one."""
    piece, tile = find(tl.program_id(0), tl.cdiv(c0, BLOCK_C), tl.cdiv(c1, BLOCK_C), PIECES)
    a_ptr = pick(piece, (a0_ptr, a1_ptr, a2_ptr), PIECES)
    stride_am = pick(piece, (stride_am0, stride_am1, stride_am2), PIECES)
    stride_ac = pick(piece, (stride_ac0, stride_ac1, stride_ac2), PIECES)
    offs_c = tile.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    mask_c = offs_c < pick(piece, (c0, c1, c2), PIECES)
    mask_r = offs_r < R
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for start in range(0, rows_per_split, BLOCK_M):
        offs_m = split * rows_per_split + start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        a_ptrs = a_ptr + offs_c[:, None] * stride_ac + offs_m[None, :] * stride_am
        b_ptrs = b_ptr + offs_m[:, None] * stride_bm + offs_r[None, :] * stride_br
        a_t = tl.load(a_ptrs, mask=mask_c[:, None] & mask_m[None, :], other=0.0)  # [BLOCK_C, BLOCK_M]
        b = tl.load(b_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        acc = low_dot(a_t, b, acc, WIDE, PRECISION)
    offs_p = pick(piece, (0, c0, c0 + c1), PIECES) + offs_c
    part_ptrs = part_ptr + split * stride_part + offs_p[:, None] * R + offs_r[None, :]
    tl.store(part_ptrs, acc, mask=mask_c[:, None] & mask_r[None, :])


@triton.jit
def _outer_reduce_kernel(
    part_ptr,
    out_ptr,
    tail_ptr,
    splits,
    C,
    R,
    TAIL,
    stride_oc,
    stride_or,
    stride_tail,
    factor,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the rows of part (splits, C R + TAIL) into out (C, R) and tail (TAIL,)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    products = tl.cast(C, tl.int64) * R
    width = products + TAIL
    mask_part = offs < width
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S).to(tl.int64)
        mask_s = offs_s < splits
        part = tl.load(
            part_ptr + offs_s[:, None] * width + offs[None, :], mask=mask_s[:, None] & mask_part[None, :], other=0.0
        )
        acc += tl.sum(part, 0)
    acc = acc * factor
    mask_out = offs < products
    out_ptrs = out_ptr + (offs // R) * stride_oc + (offs % R) * stride_or
    tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=mask_out)
    mask_tail = mask_part & (offs >= products)
    tail_ptrs = tail_ptr + (offs - products) * stride_tail
    tl.store(tail_ptrs, narrow(acc, tail_ptr.dtype.element_ty), mask=mask_tail)


# -- launching -------------------------------------------------------------------------------------------------------


def rank_block(rank: int, most: int = 64) -> int:
    """The tile a rank (or a bottleneck) is padded to: a power of two from 16, the least that a dot takes, to ``most``."""
    return min(max(16, next_power_of_2(rank)), most)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 4 where kernels are interpreted, so that small tests still split their rows."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _partial_config(device: torch.device, dtype: torch.dtype, columns: int, rank: int) -> dict[str, int]:
    arch = device_arch(device)
    if arch == "interpret":
        return {"BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_R": rank_block(rank, 32)}
    block_r = rank_block(rank, 64 if dtype == torch.float32 else 128)
    default = {
        "BLOCK_M": 32 if dtype == torch.float32 else 64,
        "BLOCK_C": 64 if dtype == torch.float32 else 128,
        "BLOCK_R": block_r,
        "num_warps": 8 if block_r > 64 or dtype == torch.float16 else 4,
        "num_stages": 3,
    }
    return default | launch_config("outer_partial", arch, f"c{next_power_of_2(columns)}_r{rank_block(rank, 256)}")


def _splits(sms: int, tiles: int, rows: int, block_m: int, rank: int, itemsize: int) -> int:
    """How many programs share the rows of a column tile: four a processor, since one alone waits for its loads (36 us for
    78 MB on an H200, 18 would do; four have not been timed), as long as the partial sums stay an eighth of what is read."""
    most = max(sms // tiles, rows * itemsize // (32 * rank))
    return max(1, min(4 * sms // tiles, most, cdiv(rows, block_m)))


def _partial_grid(pieces: Sequence[torch.Tensor], rank: int, splits: int) -> Callable[[Mapping], tuple]:
    return lambda c: (sum(cdiv(t.shape[1], c["BLOCK_C"]) for t in pieces), cdiv(rank, c["BLOCK_R"]), splits)


def outer_partials(pieces: Sequence[torch.Tensor], b, *, tf32: bool) -> torch.Tensor:
    """Stage one: partial sums of a^T b, (splits, C R) float32, from a (M, C) in pieces side by side and b (M, R), of any
    strides. For float16 a, b is float32."""
    a = pieces[0]
    rows, columns = a.shape[0], sum(t.shape[1] for t in pieces)
    rank = b.shape[1]
    config = _partial_config(a.device, a.dtype, columns, rank)
    tiles = sum(cdiv(t.shape[1], config["BLOCK_C"]) for t in pieces) * cdiv(rank, config["BLOCK_R"])
    splits = _splits(processors(a.device), tiles, rows, config["BLOCK_M"], rank, a.element_size())
    rows_per_split = cdiv(cdiv(rows, splits), config["BLOCK_M"]) * config["BLOCK_M"]
    splits = cdiv(rows, rows_per_split)
    part = torch.empty(splits, columns * rank, dtype=torch.float32, device=a.device)
    first = 0
    for i in range(0, len(pieces), PIECES):
        some = pieces[i : i + PIECES]
        launch(
            _outer_partial_kernel,
            _partial_grid(some, rank, splits),
            config,
            *padded(some),
            b,
            part[:, first * rank :],
            rows,
            *sizes(some, 1),
            rank,
            rows_per_split,
            *strides(some),
            *b.stride(),
            part.stride(0),
            PIECES=len(some),
            WIDE=a.dtype == torch.float16,
            PRECISION="tf32" if tf32 or a.dtype == torch.float16 else "ieee",
        )
        first += sum(t.shape[1] for t in some)
    return part


def reduce_partials(part, out, tail=None, *, factor: float = 1.0) -> None:
    """Stage two: write factor times the column sums of part into out (C, R), of any strides, and tail (T,) behind it."""
    block = {"BLOCK_S": 4, "BLOCK": 64} if device_arch(part.device) == "interpret" else {"BLOCK_S": 32, "BLOCK": 64}
    launch(
        _outer_reduce_kernel,
        lambda c: (cdiv(part.shape[1], c["BLOCK"]),),
        block,
        part,
        out,
        out if tail is None else tail,
        part.shape[0],
        *out.shape,
        0 if tail is None else tail.shape[0],
        *out.stride(),
        0 if tail is None else tail.stride(0),
        factor,
    )


def outer(a, b, out, *, tf32: bool, factor: float = 1.0) -> None:
    """Write out (C, R), of any strides, = factor a^T b."""
    reduce_partials(outer_partials([a], b, tf32=tf32), out, factor=factor)


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------

_FLOAT32 = ("part_ptr", "low_ptr", "grad_gain_ptr", "sum_dz_ptr", "sum_dy_ptr", "gate_sum_ptr", "base_ptr")
_LOW_RANK = ("h_ptr", "grad_h_ptr", "z_ptr", "dz_ptr")
_FLOATS = ("scale", "residual_scale", "inv_keep", "factor")


def argument_types(kernel, constexprs: Mapping[str, object], dtype: str) -> dict[str, str]:
    """Types of what is not a constexpr, by name; low-rank intermediates are float32 for float16 inputs."""
    types = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name == "seed_ptr":
            types[name] = "*i64"
        elif name in _FLOAT32 or (name in _LOW_RANK and dtype == "fp16"):
            types[name] = "*fp32"
        elif name.endswith("_ptr"):
            types[name] = f"*{dtype}"
        elif name.startswith("stride_"):
            types[name] = "i64"
        else:
            types[name] = "fp32" if name in _FLOATS else "i32"
    return types


def _specs() -> list[Spec]:
    out = []
    unit = dict.fromkeys(("stride_ac0", "stride_ac1", "stride_ac2", "stride_br"), 1)
    # (label, dtype of a, dtype of b, precision, tile, warps, pieces)
    cases = [
        ("bf16_r16", "bf16", "bf16", "ieee", (64, 128, 16), 4, 1),
        ("bf16_r64", "bf16", "bf16", "ieee", (64, 128, 64), 4, 1),
        ("bf16_r64_3_pieces", "bf16", "bf16", "ieee", (64, 128, 64), 4, 3),
        ("bf16_r128", "bf16", "bf16", "ieee", (64, 128, 128), 8, 1),
        ("fp16_r64", "fp16", "fp32", "tf32", (64, 128, 64), 8, 1),
        ("fp16_r64_3_pieces", "fp16", "fp32", "tf32", (64, 128, 64), 8, 3),
        ("fp32_r64", "fp32", "fp32", "ieee", (32, 64, 64), 4, 1),
        ("fp32_r64_3_pieces", "fp32", "fp32", "ieee", (32, 64, 64), 4, 3),
        ("tf32_r64", "fp32", "fp32", "tf32", (32, 64, 64), 4, 1),
    ]
    for label, a, b, precision, (block_m, block_c, block_r), warps, pieces in cases:
        constexprs: dict[str, object] = {**unit, "PIECES": pieces, "WIDE": a == "fp16", "PRECISION": precision}
        constexprs |= {"BLOCK_M": block_m, "BLOCK_C": block_c, "BLOCK_R": block_r}
        if pieces == 1:
            constexprs |= dict.fromkeys(("a1_ptr", "a2_ptr"))
        out.append(
            Spec(
                _outer_partial_kernel,
                label,
                argument_types(_outer_partial_kernel, constexprs, a) | {"b_ptr": f"*{b}"},
                constexprs,
                num_warps=warps,
                num_stages=3,
                matrix=precision == "ieee" and a == "bf16",
                aligned=("c0", "c1", "c2", "R"),
            )
        )
    out.append(
        Spec(
            _outer_reduce_kernel,
            "fp32_to_bf16",
            {"part_ptr": "*fp32", "out_ptr": "*bf16", "tail_ptr": "*bf16", "splits": "i32", "C": "i32", "R": "i32"}
            | {"TAIL": "i32", "stride_oc": "i64", "stride_or": "i64", "stride_tail": "i64", "factor": "fp32"},
            {"BLOCK_S": 32, "BLOCK": 64},
        )
    )
    return out


SPECS = _specs()
