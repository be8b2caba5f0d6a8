"""adapter in Triton: y = residual_scale * residual + scale * (U drop(act(D a + b_d) * gate) + b_u), one launch.

A program takes BLOCK_M rows: a loop over the D columns of x for z = D a + b_d, the activation and the gate on the tile
[BLOCK_M, BLOCK_H] in registers, then a loop over output columns, residual and both scales in the store. a is x; with a norm
one more loop finds the rows' statistics, and the tile is normalised on its way into the product. Every read of x but the
first hits shared memory or L2. A bottleneck wider than one tile goes in chunks of hidden units, launch by launch, the output
collected in float32. Gated experts' units and biases are scaled by the gate within the same tile.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from fastgist_kernels.adapter_parts import activate, kept, project_down, row_statistics, spread_gate
from fastgist_kernels.adapter_plan import chunks, most_hidden, row_tiles, tile_config, tile_defaults
from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, dot, launch
from fastgist_kernels.cp_linear import dropout_args
from fastgist_kernels.outer import argument_types, low_dot, narrow, rank_block

__all__ = ["SPECS", "WEIGHTS", "adapter_fwd", "every_tile"]


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
    norm_weight_ptr,
    norm_bias_ptr,
    seed_ptr,
    stats_ptr,
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
    stride_nw,
    stride_nb,
    stride_zm,
    scale,
    residual_scale,
    norm_eps,
    threshold,
    inv_keep,
    ACTIVATION: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    GATED_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    LOAD_STATS: tl.constexpr,
    STORE_STATS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
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
    """Hidden units first_h .. first_h + H, which all fit in BLOCK_H. y (M, N) contiguous, z (M, H) with unit inner stride,
    stats (2, M): the rows' means and 1 / deviations."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.arange(0, BLOCK_H).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E).to(tl.int64)
    mask_m = offs_m < M
    mask_h = offs_h < H
    mask_e = offs_e < E
    mean = tl.zeros([BLOCK_M], tl.float32)
    rstd = mean
    if HAS_NORM:
        if LOAD_STATS:
            mean = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
            rstd = tl.load(stats_ptr + (M + offs_m), mask=mask_m, other=0.0)
        else:
            mean, rstd = row_statistics(x_ptr, offs_m, mask_m, D, stride_xm, stride_xd, norm_eps, BLOCK_M, BLOCK_D)
        if STORE_STATS:
            tl.store(stats_ptr + offs_m, mean, mask=mask_m)
            tl.store(stats_ptr + (M + offs_m), rstd, mask=mask_m)
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
        norm_weight_ptr,
        norm_bias_ptr,
        mean,
        rstd,
        stride_nw,
        stride_nb,
        HAS_NORM,
        HAS_NORM_WEIGHT,
        HAS_NORM_BIAS,
        HAS_DOWN_BIAS,
        EVEN_D,
        WIDE,
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
    if HAS_DROPOUT:
        keep = kept(seed_ptr, offs_m, first_h, unit_width * E, threshold, BLOCK_M, BLOCK_H)
        hidden = tl.where(keep, hidden * inv_keep, 0.0)
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


def adapter_fwd(
    x, down_weight, down_bias, up_weight, up_bias, residual, branch, gate, norm_weight, norm_bias, seed,
    activation, scale, residual_scale, norm_eps, dropout_p, tf32, y, z, stats,
) -> None:  # fmt: skip
    """Write y (M, D') and, where they are not None, z = D a + b_d (M, H) and, with a norm, stats (2, M) float32, all
    contiguous. Inputs of any strides: x (M, D), down_weight (H, D), up_weight (D', H), up_bias (D',) or (E, D'), residual
    (M, D') or None, branch (M, D') or None (added to the residual, which there must be), gate (M, E) or None, norm_weight
    and norm_bias (D,) or None (no norm at all where norm_eps is None), seed int64 or None: no dropout. Weights are x's
    dtype or float32."""
    rows, inner = x.shape
    out, hidden = up_weight.shape
    experts = 1 if gate is None else gate.shape[1]
    normed = norm_eps is not None
    parts = chunks(x, hidden, tf32, gated=gate is not None)
    collected = torch.empty(rows, out, dtype=torch.float32, device=x.device) if len(parts) > 1 else None
    if normed and stats is None and len(parts) > 1:  # later chunks of hidden units take those of the first
        stats = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    for index, (first, width) in enumerate(parts):
        units = slice(first, first + width)
        cast = down_weight.dtype != x.dtype
        block_m, block_h, config = tile_config("adapter_fwd", x, out, width, gate is not None, cast, normed)
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
            norm_weight,
            norm_bias,
            seed,
            stats,
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
            0 if norm_weight is None else norm_weight.stride(0),
            0 if norm_bias is None else norm_bias.stride(0),
            hidden,
            scale,
            1.0 if index else residual_scale,
            norm_eps if normed else 0.0,
            *dropout_args(seed, dropout_p),
            ACTIVATION=activation,
            HAS_DOWN_BIAS=bias is not None,
            HAS_UP_BIAS=add_bias,
            HAS_RESIDUAL=add is not None,
            HAS_BRANCH=also is not None,
            HAS_GATE=gate is not None,
            GATED_BIAS=gated_bias,
            HAS_NORM=normed,
            HAS_NORM_WEIGHT=norm_weight is not None,
            HAS_NORM_BIAS=norm_bias is not None,
            LOAD_STATS=normed and index > 0,
            STORE_STATS=normed and index == 0 and stats is not None,
            HAS_DROPOUT=seed is not None,
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
    (
        "stride_xd",
        "stride_dd",
        "stride_db",
        "stride_uh",
        "stride_bn",
        "stride_rn",
        "stride_jn",
        "stride_ge",
        "stride_nw",
    ),
    1,
) | {"stride_nb": 1}


#: Of float32 where x is in half precision.
WEIGHTS = ("down_ptr", "down_bias_ptr", "up_ptr", "up_bias_ptr", "norm_weight_ptr", "norm_bias_ptr")
#: Arguments of the norm that are float32 whatever x is.
NORM_TYPES = {"stats_ptr": "*fp32", "norm_eps": "fp32"}


def _spec(
    dtype: str,
    precision: str,
    hidden: int,
    gated: bool,
    rows: int,
    sizes: str = "even",
    block: bool = False,
    normed: bool = False,
    dropped: bool = False,
) -> Spec:
    """The kernel at the tile that a launch takes. ``sizes``: "even", "odd" (a number of hidden units that 16 does not
    divide) or "ragged" (that, and widths that no tile divides). ``block``: as a block of a half-precision model calls it,
    with float32 weights and a branch to add."""
    ragged = sizes == "ragged"
    tile = tile_defaults("adapter_fwd", dtype == "fp32", hidden, gated, ragged, normed)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    flags = {"ACTIVATION": "gelu", "HAS_DOWN_BIAS": True, "HAS_UP_BIAS": True, "HAS_RESIDUAL": True, "HAS_GATE": gated}
    flags |= {"GATED_BIAS": gated, "STORE_Z": hidden > 64, "EVEN_D": not ragged, "WIDE": dtype == "fp16"}
    flags |= {"PRECISION": precision, "BLOCK_M": rows, "BLOCK_H": hidden, "BLOCK_E": 16, "HAS_BRANCH": block}
    flags |= dict.fromkeys(("HAS_NORM", "HAS_NORM_WEIGHT", "HAS_NORM_BIAS", "STORE_STATS"), normed)
    flags |= {"LOAD_STATS": False, "HAS_DROPOUT": dropped}
    constexprs = _UNIT | flags | tile
    types = argument_types(_adapter_fwd_kernel, constexprs, dtype) | NORM_TYPES
    if block:
        types |= dict.fromkeys(WEIGHTS, "*fp32")
    ending = f"_m{rows}{'' if sizes == 'even' else f'_{sizes}'}{'_block' * block}{'_norm' * normed}{'_drop' * dropped}"
    return Spec(
        _adapter_fwd_kernel,
        f"{dtype}_{precision}_h{hidden}{'_gate' * gated}{ending}",
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
        for gated, normed in itertools.product((False, True), repeat=2):
            most = most_hidden(dtype in ("fp16", "fp32"), dtype == "fp32" and precision == "ieee", gated, False)
            for hidden in (h for h in (16, 32, 64, 128, 256) if h <= most):
                for sizes, cast in itertools.product(("even", "odd", "ragged"), (False, True)):
                    if cast and dtype == "fp32":
                        continue
                    tiles = row_tiles("adapter_fwd", hidden, gated, sizes == "ragged", cast, normed)
                    extra = (cast, normed, normed)  # dropout with the norm
                    specs += [_spec(dtype, precision, hidden, gated, rows, sizes, *extra) for rows in tiles]
                    if not (normed or cast):
                        dropped = (False, False, True)
                        specs += [_spec(dtype, precision, hidden, gated, rows, sizes, *dropped) for rows in tiles]
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
        ("bf16", "ieee", 64, False, 64, "even", False, True, True),
        ("bf16", "ieee", 64, False, 32, "even", True, True, True),
        ("bf16", "ieee", 64, False, 32, "ragged", False, True, True),
        ("bf16", "ieee", 128, True, 32, "even", False, True, True),
        ("bf16", "ieee", 256, False, 64, "even", False, True, True),
        ("bf16", "ieee", 64, False, 64, "even", False, False, True),
        ("fp16", "tf32", 64, False, 64, "even", False, True, True),
    )
]
