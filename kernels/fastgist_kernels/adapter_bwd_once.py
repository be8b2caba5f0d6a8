# Tuples grow in the kernel, a change of type to mypy.
# mypy: disable-error-code="assignment"
"""The backward of adapter in one pass over dy and x, for small bottlenecks: dx and all four weight gradients.

One program a processor walks its blocks of BLOCK_M rows. Each of its PARTS warps owns BLOCK_C columns of every chunk of
PARTS * BLOCK_C: z and dh are summed over the warps, everything behind them stays within a warp. That is a batched dot, a
warp a batch. x and dy of a block lie in shared memory, fetched while the block before is computed, and are read there by
all five products; D and U lie there too, and dD and dU stay in registers until the last block. Both products of a
gradient keep the columns as their rows, so that N is the bottleneck and 8 is enough for it.

    z^T = D x^T    dh^T = U^T dy^T    dx^T = D^T dz^T (+ residual_scale I dy^T)    dD^T = x^T dz    dU = dy^T h

I dy^T is how dy comes into registers: as an operand that the pipeline knows, and exactly. db_u is one more column of h, of
ones. Each program leaves a row of float32 partial sums, which one more launch adds in a fixed order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastgist_kernels.adapter import WEIGHTS
from fastgist_kernels.adapter_parts import activate, activation_slope
from fastgist_kernels.aot import SHARED_LIMIT, Spec
from fastgist_kernels.common import cdiv, device_arch, dot, launch, launch_config, next_power_of_2
from fastgist_kernels.outer import argument_types, narrow, processors

__all__ = ["SPECS", "adapter_bwd_once", "applies", "every_tile"]


@triton.jit
def _adapter_bwd_once_kernel(
    dy_ptr,
    x_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    dx_ptr,
    part_ptr,
    M,
    D,
    H,
    blocks_per_program,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xd,
    stride_dh,
    stride_dd,
    stride_db,
    stride_un,
    stride_uh,
    scale,
    residual_scale,
    ACTIVATION: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    ADD_DY: tl.constexpr,
    NEED_DX: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """COLUMNS: D, or more. H < BLOCK_H, which is 8 or 16. A row of part: dD (H, D), dU^T (H, D), db_u (D), db_d (H). dx
    (M, D) contiguous; rows of dy, x, D and U have unit stride within."""
    WIDTH: tl.constexpr = PARTS * BLOCK_C
    CHUNKS: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    pid = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H).to(tl.int64)
    offs_k = tl.arange(0, 16).to(tl.int64)[None, :, None]  # the bottleneck where a dot takes no fewer than 16
    offs_c = (tl.arange(0, PARTS).to(tl.int64) * BLOCK_C)[:, None] + tl.arange(0, BLOCK_C)[None, :]
    mask_h = offs_h < H
    eye = tl.where(tl.arange(0, BLOCK_C)[:, None] == tl.arange(0, BLOCK_C)[None, :], 1.0, 0.0)
    eye = tl.broadcast_to(narrow(eye, dy_ptr.dtype.element_ty)[None, :, :], [PARTS, BLOCK_C, BLOCK_C])
    bias = tl.zeros([BLOCK_H], tl.float32)
    if HAS_DOWN_BIAS:
        bias = tl.load(down_bias_ptr + offs_h * stride_db, mask=mask_h, other=0.0)
        bias = narrow(bias, x_ptr.dtype.element_ty).to(tl.float32)

    # Offsets whose last axis in memory is the warp's come with a hint that they are contiguous along another axis, too. That
    # is true of the fastest axis alone, and only that one makes wide loads; of the rest the hint decides the order in shared
    # memory, where the rows that a warp reads must not be a multiple of 128 bytes apart: all would meet in one bank.
    downs = ()
    ups = ()
    grad_down = ()
    grad_up = ()
    for chunk in tl.static_range(CHUNKS):
        offs_d = (chunk * WIDTH + offs_c)[:, None, :]
        mask_w = offs_k < H
        if not EVEN_D:
            mask_w = mask_w & (offs_d < D)
        near_down = tl.max_contiguous(offs_k * stride_dh + offs_d * stride_dd, [2, 1, BLOCK_C])
        near_up = tl.max_contiguous(offs_d * stride_un + offs_k * stride_uh, [1, 16, 2])
        downs += (narrow(tl.load(down_ptr + near_down, mask=mask_w, other=0.0), x_ptr.dtype.element_ty),)
        ups += (narrow(tl.load(up_ptr + near_up, mask=mask_w, other=0.0), x_ptr.dtype.element_ty),)
        grad_down += (tl.zeros([PARTS, BLOCK_C, BLOCK_H], tl.float32),)
        grad_up += (tl.zeros([PARTS, BLOCK_C, BLOCK_H], tl.float32),)
    sum_dz = tl.zeros([BLOCK_H], tl.float32)

    for block in tl.range(0, blocks_per_program):
        offs_m = (pid * blocks_per_program + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < M)[None, None, :]
        near_x = tl.max_contiguous(offs_m[None, None, :] * stride_xm + offs_c[:, :, None] * stride_xd, [2, BLOCK_C, 1])
        near_y = tl.max_contiguous(
            offs_m[None, None, :] * stride_dym + offs_c[:, :, None] * stride_dyn, [2, BLOCK_C, 1]
        )
        near_dx = tl.max_contiguous(offs_m[None, None, :] * D + offs_c[:, :, None], [2, BLOCK_C, 1])
        xs = ()
        dys = ()
        z = tl.zeros([PARTS, 16, BLOCK_M], tl.float32)
        dh = tl.zeros([PARTS, 16, BLOCK_M], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            first = tl.full([], chunk * WIDTH, tl.int64)
            mask_x = mask_m
            if not EVEN_D:
                mask_x = mask_m & (first + offs_c < D)[:, :, None]
            xs += (tl.load(x_ptr + near_x + first * stride_xd, mask=mask_x, other=0.0),)
            dys += (tl.load(dy_ptr + near_y + first * stride_dyn, mask=mask_x, other=0.0),)
            z = dot(downs[chunk], xs[chunk], z, PRECISION)
            dh = dot(ups[chunk], dys[chunk], dh, PRECISION)
        z = tl.sum(z, 0)
        dh = tl.sum(dh, 0)
        if BLOCK_H == 8:  # the other eight units are zeros
            z = tl.sum(tl.reshape(z, [2, 8, BLOCK_M]), 0)
            dh = tl.sum(tl.reshape(dh, [2, 8, BLOCK_M]), 0)
        z += bias[:, None]
        hidden = tl.where(mask_h[:, None], activate(z, ACTIVATION), 1.0)
        dz = dh * scale * activation_slope(z, ACTIVATION)
        sum_dz += tl.sum(dz, 1)
        hidden = tl.trans(narrow(hidden, dy_ptr.dtype.element_ty))
        dz = narrow(dz, x_ptr.dtype.element_ty)
        hidden = tl.broadcast_to(hidden[None, :, :], [PARTS, BLOCK_M, BLOCK_H])
        dz_t = tl.broadcast_to(tl.trans(dz)[None, :, :], [PARTS, BLOCK_M, BLOCK_H])
        if BLOCK_H == 8:  # twice, the second time against rows of D that are zeros
            dz = tl.reshape(tl.broadcast_to(dz[None, :, :], [2, 8, BLOCK_M]), [16, BLOCK_M])
        dz = tl.broadcast_to(dz[None, :, :], [PARTS, 16, BLOCK_M])

        next_down = ()
        next_up = ()
        for chunk in tl.static_range(CHUNKS):
            next_down += (dot(xs[chunk], dz_t, grad_down[chunk], PRECISION),)
            next_up += (dot(dys[chunk], hidden, grad_up[chunk], PRECISION),)
            if NEED_DX:
                dx = tl.zeros([PARTS, BLOCK_C, BLOCK_M], tl.float32)
                if ADD_DY:
                    dx = dot(eye, dys[chunk], dx, PRECISION) * residual_scale
                dx = dot(tl.trans(downs[chunk], 0, 2, 1), dz, dx, PRECISION)
                first = tl.full([], chunk * WIDTH, tl.int64)
                mask_x = mask_m
                if not EVEN_D:
                    mask_x = mask_m & (first + offs_c < D)[:, :, None]
                tl.store(dx_ptr + near_dx + first, narrow(dx, dx_ptr.dtype.element_ty), mask=mask_x)
        grad_down = next_down
        grad_up = next_up

    products = tl.cast(H, tl.int64) * D
    part_ptr += pid * (2 * products + tl.cast(D, tl.int64) + H)
    for chunk in tl.static_range(CHUNKS):
        offs_d = (chunk * WIDTH + offs_c)[:, :, None]
        part_ptrs = part_ptr + offs_h[None, None, :] * D + offs_d
        tl.store(part_ptrs, grad_down[chunk], mask=mask_h[None, None, :] & (offs_d < D))
        tl.store(part_ptrs + products, grad_up[chunk] * scale, mask=(offs_h <= H)[None, None, :] & (offs_d < D))
    tl.store(part_ptr + (2 * products + tl.cast(D, tl.int64)) + offs_h, sum_dz, mask=mask_h)


@triton.jit
def _adapter_once_reduce_kernel(
    part_ptr,
    grad_down_ptr,
    grad_down_bias_ptr,
    grad_up_ptr,
    grad_up_bias_ptr,
    programs,
    D,
    H,
    NEED_DOWN_BIAS: tl.constexpr,
    NEED_UP_BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the rows of part (programs, 2 H D + D + H) into the four gradients, all contiguous."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    products = tl.cast(H, tl.int64) * D
    up_end = 2 * products + D
    width = up_end + H
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, programs, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S).to(tl.int64)
        mask = (offs_s < programs)[:, None] & (offs < width)[None, :]
        acc += tl.sum(tl.load(part_ptr + offs_s[:, None] * width + offs[None, :], mask=mask, other=0.0), 0)
    acc = narrow(acc, grad_down_ptr.dtype.element_ty)
    tl.store(grad_down_ptr + offs, acc, mask=offs < products)
    offs_u = offs - products
    in_up = (offs_u >= 0) & (offs < up_end)
    unit = offs_u // D
    column = offs_u - unit * D
    tl.store(grad_up_ptr + column * H + unit, acc, mask=in_up & (unit < H))
    if NEED_UP_BIAS:
        tl.store(grad_up_bias_ptr + column, acc, mask=in_up & (unit == H))
    if NEED_DOWN_BIAS:
        tl.store(grad_down_bias_ptr + (offs - up_end), acc, mask=(offs >= up_end) & (offs < width))


# -- launching -------------------------------------------------------------------------------------------------------


def _most_columns(columns: int, block_h: int) -> int:
    """The widest D whose dD, dU and operands of a block fit the registers. Masks of a last chunk cost some as well."""
    return 512 if block_h == 16 and columns % 256 else 768


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 1 << 20


def _block_h(hidden: int) -> int:
    """The tile of hidden units and the column of ones."""
    return 8 if hidden < 8 else 16


def _tile_defaults(columns: int, block_h: int) -> dict[str, int]:
    """What the compiler's registers allow (no spill under Triton 3.6 and 3.9), not a clock. PROGRAMS: a processor's."""
    return {
        "BLOCK_M": 16,
        "BLOCK_C": 16 if columns in (128, 384) else 32,
        "PROGRAMS": 2 if columns <= 384 and block_h == 8 else 1,
        "num_warps": 8,
        "num_stages": 3,
    }


def _config(x: torch.Tensor, block_h: int) -> dict[str, int]:
    arch = device_arch(x.device)
    rows, columns = x.shape
    if arch == "interpret":
        return {"BLOCK_M": 16, "BLOCK_C": 16, "PROGRAMS": 1, "num_warps": 2, "num_stages": 1}
    key = f"m{next_power_of_2(rows)}_d{columns}_h{block_h}"
    return _tile_defaults(columns, block_h) | launch_config("adapter_bwd_once", arch, key)


def _bytes(columns: int, config: dict[str, int]) -> int:
    """Shared memory of a program, at most: blocks of x and dy, three forms of the weights, sums over the warps."""
    width = config["num_warps"] * config["BLOCK_C"]
    blocks = 2 * config["BLOCK_M"] * (config["num_stages"] - 1)
    return 2 * cdiv(columns, width) * width * (blocks + 3 * 16) + 3 * 4 * 16 * config["num_warps"] * config["BLOCK_M"]


def _fetched(t: torch.Tensor) -> bool:
    """Whether rows of ``t`` go to shared memory 16 bytes at a time, past the registers, as Triton sees it."""
    return t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0 and t.data_ptr() % 16 == 0


def applies(grad, x, down_weight, up_weight, gate, z, grad_down, grad_up) -> bool:
    """Whether the one pass can and should: both weights' gradients are wanted, nothing is gated, D' = D, the bottleneck
    fits a tile, rows can be fetched asynchronously, and the processor has the shared memory."""
    if grad_down is None or grad_up is None or gate is not None or z is not None:
        return False
    hidden, columns = down_weight.shape
    block_h = _block_h(hidden)
    if hidden >= 16 or grad.shape != x.shape or columns > _most_columns(columns, block_h):
        return False
    if not (_fetched(grad) and _fetched(x) and down_weight.stride(1) == 1 and up_weight.stride(1) == 1):
        return False
    if grad.dtype != torch.bfloat16 and not (grad.dtype == torch.float32 and grad.device.type == "cpu"):
        return False
    return _bytes(columns, _config(x, block_h)) <= _shared_memory(grad.device)


def adapter_bwd_once(
    grad, x, down_weight, down_bias, up_weight, activation, scale, residual_scale, residual_is_x,
    grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias,
) -> None:  # fmt: skip
    """Write grad_down (H, D), grad_up (D, H), and grad_x (M, D), grad_down_bias (H,) and grad_up_bias (D,) where they are
    not None, all contiguous, for operands that :func:`applies` allows."""
    rows, columns = x.shape
    hidden = up_weight.shape[1]
    block_h = _block_h(hidden)
    config = dict(_config(x, block_h))
    block_m, block_c = config.pop("BLOCK_M"), config.pop("BLOCK_C")
    blocks = cdiv(rows, block_m)
    blocks_per_program = cdiv(blocks, processors(x.device) * config.pop("PROGRAMS"))
    programs = cdiv(blocks, blocks_per_program)
    width = columns * (2 * hidden + 1) + hidden
    part = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    launch(
        _adapter_bwd_once_kernel,
        (programs,),
        config,
        grad,
        x,
        down_weight,
        down_bias,
        up_weight,
        grad_x,
        part,
        rows,
        columns,
        hidden,
        blocks_per_program,
        *grad.stride(),
        *x.stride(),
        *down_weight.stride(),
        0 if down_bias is None else down_bias.stride(0),
        *up_weight.stride(),
        scale,
        residual_scale,
        ACTIVATION=activation,
        HAS_DOWN_BIAS=down_bias is not None,
        ADD_DY=residual_is_x,
        NEED_DX=grad_x is not None,
        EVEN_D=columns % (config["num_warps"] * block_c) == 0,
        PRECISION="ieee",
        COLUMNS=columns,
        PARTS=config["num_warps"],
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        BLOCK_H=block_h,
    )
    interpreted = device_arch(x.device) == "interpret"
    launch(
        _adapter_once_reduce_kernel,
        lambda c: (cdiv(width, c["BLOCK"]),),
        {"BLOCK_S": 4, "BLOCK": 256} if interpreted else {"BLOCK_S": 256, "BLOCK": 32, "num_warps": 8},
        part,
        grad_down,
        grad_down_bias,
        grad_up,
        grad_up_bias,
        programs,
        columns,
        hidden,
        NEED_DOWN_BIAS=grad_down_bias is not None,
        NEED_UP_BIAS=grad_up_bias is not None,
    )


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


_UNIT = dict.fromkeys(("stride_dyn", "stride_xd", "stride_dd", "stride_db", "stride_uh"), 1)


def _spec(columns: int, block_h: int, block: bool = False) -> Spec:
    """The kernel at the tile that a launch takes for D = ``columns``, on the architectures whose shared memory it fits.
    ``block``: with float32 weights, as a block of a half-precision model has them."""
    tile = _tile_defaults(columns, block_h)
    archs = tuple(arch for arch, limit in SHARED_LIMIT.items() if _bytes(columns, tile) <= limit)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    flags = {"ACTIVATION": "gelu", "HAS_DOWN_BIAS": True, "ADD_DY": True, "NEED_DX": True, "PRECISION": "ieee"}
    flags |= {"EVEN_D": columns % (warps * tile["BLOCK_C"]) == 0, "COLUMNS": columns, "PARTS": warps}
    flags |= {name: tile[name] for name in ("BLOCK_M", "BLOCK_C")} | {"BLOCK_H": block_h}
    constexprs = _UNIT | flags
    types = argument_types(_adapter_bwd_once_kernel, constexprs, "bf16")
    if block:
        types |= {name: "*fp32" for name in WEIGHTS if name in types}
    return Spec(
        _adapter_bwd_once_kernel,
        f"bf16_d{columns}_h{block_h}{'_block' * block}",
        types,
        constexprs,
        num_warps=warps,
        num_stages=stages,
        aligned=("M", "D"),
        unaligned=("stride_un",),
        archs=archs,
    )


def every_tile() -> list[Spec]:
    """Widths of every number of chunks, even and masked, with both tiles of the bottleneck."""
    widths = [(d, h) for d in range(64, 769, 64) for h in (8, 16) if d <= _most_columns(d, h)]
    return [_spec(d, h, block) for d, h in widths for block in (False, True)]


SPECS = [
    *(_spec(d, h) for d, h in ((768, 8), (768, 16), (640, 8), (384, 8), (384, 16), (192, 8))),
    _spec(768, 8, block=True),
    _spec(768, 16, block=True),
    Spec(
        _adapter_once_reduce_kernel,
        "fp32_to_bf16",
        {"part_ptr": "*fp32", "programs": "i32", "D": "i32", "H": "i32"}
        | dict.fromkeys(("grad_down_ptr", "grad_down_bias_ptr", "grad_up_ptr", "grad_up_bias_ptr"), "*bf16"),
        {"NEED_DOWN_BIAS": True, "NEED_UP_BIAS": True, "BLOCK_S": 256, "BLOCK": 32},
        num_warps=8,
    ),
]
