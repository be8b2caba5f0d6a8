"""adapter in Triton: y = residual_scale * residual + scale * (U (act(D x + b_d) * gate) + b_u), one launch.

A program takes BLOCK_M rows: a loop over the D columns of x for z = D x + b_d, the activation and the gate on the tile
[BLOCK_M, BLOCK_H] in registers, then a loop over output columns, residual and both scales in the store. The second read
of x, as the residual, hits shared memory or L2. A bottleneck wider than one tile goes in chunks of hidden units, launch by
launch, the output collected in float32. Gated experts' units and biases are scaled by the gate within the same tile.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, device_arch, dot, launch, launch_config, next_power_of_2
from fastgist_kernels.outer import argument_types, low_dot, narrow, processors, rank_block

__all__ = [
    "SPECS",
    "WEIGHTS",
    "activate",
    "activation_slope",
    "adapter_fwd",
    "chunks",
    "every_tile",
    "most_hidden",
    "project_down",
    "row_tiles",
    "spread_gate",
    "tile_config",
    "tile_defaults",
]


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "silu":
        return z * sigmoid(z)
    else:
        return z


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """act'(z)."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    else:
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def project_down(
    x_ptr,
    down_ptr,
    down_bias_ptr,
    offs_m,
    offs_h,
    mask_m,
    mask_h,
    D,
    stride_xm,
    stride_xd,
    stride_dh,
    stride_dd,
    stride_db,
    HAS_DOWN_BIAS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """z [BLOCK_M, BLOCK_H] = x D^T + b_d in float32; 0 in padded hidden units."""
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    z = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for first_d in range(0, D, BLOCK_D):
        offs_c = first_d + offs_d
        mask_x = mask_m[:, None]
        mask_w = mask_h[None, :]
        if not EVEN_D:
            mask_d = offs_c < D
            mask_x = mask_x & mask_d[None, :]
            mask_w = mask_w & mask_d[:, None]
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_c[None, :] * stride_xd
        w_ptrs = down_ptr + offs_c[:, None] * stride_dd + offs_h[None, :] * stride_dh
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        z = dot(x, narrow(w, x.dtype), z, PRECISION)
    if HAS_DOWN_BIAS:
        bias = tl.load(down_bias_ptr + offs_h * stride_db, mask=mask_h, other=0.0)
        z += narrow(bias, x_ptr.dtype.element_ty).to(tl.float32)[None, :]
    return z


@triton.jit
def spread_gate(
    gate_ptr, offs_m, mask_m, expert, E, stride_gm, stride_ge, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr
):
    """The gate of each row's hidden units, [BLOCK_M, BLOCK_H] float32; unit h belongs to expert[h]. A loop over experts,
    since a gather would hold a 64-bit pointer an element."""
    gate = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for e in range(0, E):
        column = tl.load(gate_ptr + offs_m * stride_gm + tl.cast(e, tl.int64) * stride_ge, mask=mask_m, other=0.0)
        gate = tl.where((expert == e)[None, :], column.to(tl.float32)[:, None], gate)
    return gate


@triton.jit
def _adapter_fwd_kernel(
    x_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    up_bias_ptr,
    residual_ptr,
    branch_ptr,
    gate_ptr,
    z_ptr,
    y_ptr,
    M,
    D,
    H,
    N,
    E,
    first_h,
    unit_width,
    stride_xm,
    stride_xd,
    stride_dh,
    stride_dd,
    stride_db,
    stride_un,
    stride_uh,
    stride_be,
    stride_bn,
    stride_rm,
    stride_rn,
    stride_jm,
    stride_jn,
    stride_gm,
    stride_ge,
    stride_zm,
    scale,
    residual_scale,
    ACTIVATION: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    GATED_BIAS: tl.constexpr,
    STORE_Z: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Hidden units first_h .. first_h + H, which all fit in BLOCK_H. y (M, N) contiguous, z (M, H) with unit inner stride."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.arange(0, BLOCK_H).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E).to(tl.int64)
    mask_m = offs_m < M
    mask_h = offs_h < H
    mask_e = offs_e < E
    z = project_down(
        x_ptr,
        down_ptr,
        down_bias_ptr,
        offs_m,
        offs_h,
        mask_m,
        mask_h,
        D,
        stride_xm,
        stride_xd,
        stride_dh,
        stride_dd,
        stride_db,
        HAS_DOWN_BIAS,
        EVEN_D,
        PRECISION,
        BLOCK_M,
        BLOCK_D,
        BLOCK_H,
    )
    if STORE_Z:
        z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_h[None, :]
        tl.store(z_ptrs, narrow(z, z_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_h[None, :])
    hidden = activate(z, ACTIVATION)
    if HAS_GATE:
        expert = (first_h + tl.arange(0, BLOCK_H)) // unit_width
        hidden = hidden * spread_gate(gate_ptr, offs_m, mask_m, expert, E, stride_gm, stride_ge, BLOCK_M, BLOCK_H)
    if GATED_BIAS:
        gate_ptrs = gate_ptr + offs_m[:, None] * stride_gm + offs_e[None, :] * stride_ge
        experts = tl.load(gate_ptrs, mask=mask_m[:, None] & mask_e[None, :], other=0.0)
    for first_n in range(0, N, BLOCK_N):
        offs_c = first_n + offs_n
        mask_c = offs_c < N
        mask_out = mask_m[:, None] & mask_c[None, :]
        up_ptrs = up_ptr + offs_h[:, None] * stride_uh + offs_c[None, :] * stride_un
        up = narrow(tl.load(up_ptrs, mask=mask_h[:, None] & mask_c[None, :], other=0.0), x_ptr.dtype.element_ty)
        acc = low_dot(hidden, up, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), WIDE, PRECISION)
        if GATED_BIAS:
            bias_ptrs = up_bias_ptr + offs_e[:, None] * stride_be + offs_c[None, :] * stride_bn
            bias = tl.load(bias_ptrs, mask=mask_e[:, None] & mask_c[None, :], other=0.0)
            acc = dot(experts, narrow(bias, experts.dtype), acc, PRECISION)
        elif HAS_UP_BIAS:
            bias = tl.load(up_bias_ptr + offs_c * stride_bn, mask=mask_c, other=0.0)
            acc += narrow(bias, x_ptr.dtype.element_ty).to(tl.float32)[None, :]
        acc = acc * scale
        if HAS_RESIDUAL:
            residual_ptrs = residual_ptr + offs_m[:, None] * stride_rm + offs_c[None, :] * stride_rn
            residual = tl.load(residual_ptrs, mask=mask_out, other=0.0).to(tl.float32)
            if HAS_BRANCH:
                branch_ptrs = branch_ptr + offs_m[:, None] * stride_jm + offs_c[None, :] * stride_jn
                residual += tl.load(branch_ptrs, mask=mask_out, other=0.0).to(tl.float32)
            acc += residual * residual_scale
        y_ptrs = y_ptr + offs_m[:, None] * N + offs_c[None, :]
        tl.store(y_ptrs, narrow(acc, y_ptr.dtype.element_ty), mask=mask_out)


# -- launching -------------------------------------------------------------------------------------------------------


def most_hidden(wide: bool, ieee: bool, gated: bool, backward: bool) -> int:
    """Hidden units that a tile can hold: 256, or 128 where it also sums a gate's gradient; with float32 operands (``wide``:
    float16's low-rank ones are) 128, or 64 in full float32 (``ieee``), with a gate, and in the backward."""
    if wide:
        return 64 if gated or backward or ieee else 128
    return 128 if gated and backward else 256


def row_tiles(kernel: str, block_h: int, gated: bool, ragged: bool, cast: bool = False) -> tuple[int, ...]:
    """Rows a program, smallest first: the fewest that leave each processor at most one program, else the last. ``cast``:
    weights of another dtype than x's, which the forward loads past the pipeline and so wants more programs beside: at
    50,688 rows of 768 on an H200 64 rows took 132 us, 32 took 85."""
    if kernel == "adapter_bwd":
        few = block_h > 128 or (gated and block_h == 128) or ragged
    else:
        few = (gated and block_h == 256) or cast
    return (16, 32) if few else (16, 32, 64)


def chunks(x: torch.Tensor, hidden: int, tf32: bool, *, gated: bool, backward: bool = False) -> list[tuple[int, int]]:
    """(first unit, units) of every launch."""
    wide = x.dtype in (torch.float16, torch.float32)
    most = most_hidden(wide, x.dtype == torch.float32 and not tf32, gated, backward)
    if device_arch(x.device) == "interpret":
        most = 32
    return [(first, min(most, hidden - first)) for first in range(0, hidden, most)]


def tile_defaults(kernel: str, float32: bool, block_h: int, gated: bool, ragged: bool) -> dict[str, int]:
    """Read off the compiler (registers, shared memory, no spill), not off a clock. ``ragged``: widths of x or y that 128
    does not divide cost masks and unaligned addresses, hence registers."""
    backward = kernel == "adapter_bwd"
    if float32:
        return {
            "BLOCK_D": 32,
            "BLOCK_N": 32,
            "num_warps": 8,
            "num_stages": 2 if backward and ragged and block_h == 64 and not gated else 3,
        }
    width = 128 if not ragged and block_h <= (64 if not backward and not gated else 16) else 64
    if backward and block_h == 128:
        width = 32
    warps = 8 if block_h > 64 or (gated and kernel == "adapter_bwd") else 4
    return {"BLOCK_D": width, "BLOCK_N": width, "num_warps": warps, "num_stages": 3}


def tile_config(
    kernel: str, x: torch.Tensor, out: int, hidden: int, gated: bool = False, cast: bool = False
) -> tuple[int, int, Mapping[str, int]]:
    """BLOCK_M, BLOCK_H, and what may shrink on a smaller device, for a launch over ``hidden`` units from x (M, D) to width
    ``out``."""
    return _tile_config(kernel, x.device, x.dtype == torch.float32, *x.shape, out, hidden, gated, cast)


@functools.lru_cache(maxsize=4096)
def _tile_config(
    kernel: str,
    device: torch.device,
    float32: bool,
    rows: int,
    inner: int,
    out: int,
    hidden: int,
    gated: bool,
    cast: bool,
) -> tuple[int, int, Mapping[str, int]]:
    arch = device_arch(device)
    block_h = rank_block(hidden, 256)
    if arch == "interpret":
        return 16, block_h, {"BLOCK_D": 16, "BLOCK_N": 32}
    sms = processors(device)
    kind = float32, block_h, gated, bool(inner % 128 or out % 128)
    tiles = row_tiles(kernel, *kind[1:], cast)
    block_m = next((tile for tile in tiles if rows <= tile * sms), tiles[-1])
    config = tile_defaults(kernel, *kind)
    config |= launch_config(kernel, arch, f"m{next_power_of_2(rows)}_d{next_power_of_2(inner)}_h{block_h}")
    return config.pop("BLOCK_M", block_m), block_h, MappingProxyType(config)


def adapter_fwd(
    x, down_weight, down_bias, up_weight, up_bias, residual, branch, gate, activation, scale, residual_scale, tf32, y, z
) -> None:  # fmt: skip
    """Write y (M, D') and, where z is not None, z = D x + b_d (M, H), both contiguous. Inputs of any strides: x (M, D),
    down_weight (H, D), up_weight (D', H), up_bias (D',) or (E, D'), residual (M, D') or None, branch (M, D') or None
    (added to the residual, which there must be), gate (M, E) or None. Weights are x's dtype or float32."""
    rows, inner = x.shape
    out, hidden = up_weight.shape
    experts = 1 if gate is None else gate.shape[1]
    parts = chunks(x, hidden, tf32, gated=gate is not None)
    collected = torch.empty(rows, out, dtype=torch.float32, device=x.device) if len(parts) > 1 else None
    for index, (first, width) in enumerate(parts):
        units = slice(first, first + width)
        cast = down_weight.dtype != x.dtype
        block_m, block_h, config = tile_config("adapter_fwd", x, out, width, gate is not None, cast)
        down, up = down_weight[units], up_weight[:, units]
        bias = None if down_bias is None else down_bias[units]
        add = collected if index else residual
        also = None if index else branch
        add_bias = up_bias is not None and index == 0
        gated_bias = add_bias and up_bias.dim() == 2
        bias_strides = (0, 0) if not add_bias else up_bias.stride() if gated_bias else (0, up_bias.stride(0))
        launch(
            _adapter_fwd_kernel,
            (cdiv(rows, block_m),),
            config,
            x,
            down,
            bias,
            up,
            up_bias if add_bias else None,
            add,
            also,
            gate,
            None if z is None else z[:, units],
            y if index == len(parts) - 1 else collected,
            rows,
            inner,
            width,
            out,
            experts,
            first,
            hidden // experts,
            *x.stride(),
            *down.stride(),
            0 if bias is None else bias.stride(0),
            *up.stride(),
            *bias_strides,
            *((0, 0) if add is None else add.stride()),
            *((0, 0) if also is None else also.stride()),
            *((0, 0) if gate is None else gate.stride()),
            hidden,
            scale,
            1.0 if index else residual_scale,
            ACTIVATION=activation,
            HAS_DOWN_BIAS=bias is not None,
            HAS_UP_BIAS=add_bias,
            HAS_RESIDUAL=add is not None,
            HAS_BRANCH=also is not None,
            HAS_GATE=gate is not None,
            GATED_BIAS=gated_bias,
            STORE_Z=z is not None,
            EVEN_D=inner % config["BLOCK_D"] == 0,
            WIDE=x.dtype == torch.float16,
            PRECISION="tf32" if tf32 or x.dtype == torch.float16 else "ieee",
            BLOCK_M=block_m,
            BLOCK_H=block_h,
            BLOCK_E=rank_block(experts, 256),
        )


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


_UNIT = dict.fromkeys(
    ("stride_xd", "stride_dd", "stride_db", "stride_uh", "stride_bn", "stride_rn", "stride_jn", "stride_ge"), 1
)


#: Of float32 where x is in half precision.
WEIGHTS = ("down_ptr", "down_bias_ptr", "up_ptr", "up_bias_ptr")


def _spec(
    dtype: str, precision: str, hidden: int, gated: bool, rows: int, sizes: str = "even", block: bool = False
) -> Spec:
    """The kernel at the tile that a launch takes. ``sizes``: "even", "odd" (a number of hidden units that 16 does not
    divide) or "ragged" (that, and widths that no tile divides). ``block``: as a block of a half-precision model calls it,
    with float32 weights and a branch to add."""
    ragged = sizes == "ragged"
    tile = tile_defaults("adapter_fwd", dtype == "fp32", hidden, gated, ragged)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    flags = {"ACTIVATION": "gelu", "HAS_DOWN_BIAS": True, "HAS_UP_BIAS": True, "HAS_RESIDUAL": True, "HAS_GATE": gated}
    flags |= {"GATED_BIAS": gated, "STORE_Z": hidden > 64, "EVEN_D": not ragged, "WIDE": dtype == "fp16"}
    flags |= {"PRECISION": precision, "BLOCK_M": rows, "BLOCK_H": hidden, "BLOCK_E": 16, "HAS_BRANCH": block}
    constexprs = _UNIT | flags | tile
    types = argument_types(_adapter_fwd_kernel, constexprs, dtype)
    if block:
        types |= dict.fromkeys(WEIGHTS, "*fp32")
    ending = ("_gate" * gated, f"_m{rows}", "" if sizes == "even" else f"_{sizes}", "_block" * block)
    return Spec(
        _adapter_fwd_kernel,
        f"{dtype}_{precision}_h{hidden}{''.join(ending)}",
        types,
        constexprs,
        num_warps=warps,
        num_stages=stages,
        matrix=rows >= 64 and (dtype, precision) != ("fp32", "ieee"),
        aligned={"even": ("M", "D", "N", "H"), "odd": ("M", "D", "N"), "ragged": ("M",)}[sizes],
        unaligned=("stride_un", "stride_zm") if sizes != "even" else (),
    )


def every_tile() -> list[Spec]:
    """Every combination that :func:`chunks` and :func:`tile_config` can launch."""
    specs = []
    for dtype, precision in (("bf16", "ieee"), ("fp16", "tf32"), ("fp32", "tf32"), ("fp32", "ieee")):
        for gated in (False, True):
            most = most_hidden(dtype in ("fp16", "fp32"), dtype == "fp32" and precision == "ieee", gated, False)
            for hidden in (h for h in (16, 32, 64, 128, 256) if h <= most):
                for sizes in ("even", "odd", "ragged"):
                    tiles = row_tiles("adapter_fwd", hidden, gated, sizes == "ragged")
                    specs += [_spec(dtype, precision, hidden, gated, rows, sizes) for rows in tiles]
                    if dtype in ("bf16", "fp16"):  # float32 weights
                        tiles = row_tiles("adapter_fwd", hidden, gated, sizes == "ragged", cast=True)
                        specs += [_spec(dtype, precision, hidden, gated, rows, sizes, block=True) for rows in tiles]
    return specs


SPECS = [
    _spec(*case)
    for case in (
        ("bf16", "ieee", 16, False, 64),
        ("bf16", "ieee", 16, False, 32, "even", True),
        ("bf16", "ieee", 64, False, 64),
        ("bf16", "ieee", 64, False, 32, "even", True),
        ("bf16", "ieee", 64, True, 64),
        ("bf16", "ieee", 256, False, 64),
        ("bf16", "ieee", 256, True, 32),
        ("bf16", "ieee", 64, False, 16),
        ("bf16", "ieee", 16, False, 64, "odd"),
        ("bf16", "ieee", 64, False, 64, "ragged"),
        ("fp16", "tf32", 64, False, 64),
        ("fp16", "tf32", 64, True, 64),
        ("fp16", "tf32", 128, False, 64),
        ("fp32", "tf32", 64, True, 64),
        ("fp32", "tf32", 128, False, 64),
        ("fp32", "ieee", 64, True, 64),
    )
]
