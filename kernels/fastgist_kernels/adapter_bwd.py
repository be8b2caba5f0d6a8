"""The backward of adapter in Triton: dx, and from the same rows h, dz and the gate's gradient; weights by outer.py.

    dh = drop(scale * dy U)  dv = dh * gate     dz = dv * act'(z)    dx = dz D  (+ residual_scale * dy where x is the residual)
    dD = dz^T x              db_d = colsum(dz)  dU = scale * dy^T h  db_u = scale * colsum(dy), or scale * gate^T dy
    dgate_e = sum over e's units of dh * act(z)  (+ scale * dy b_u,e)

With a norm dx = rstd ((dz D) w - c1 - xhat c2) takes the place of dz D, and the parameters' gradients that of dz^T x:
adapter_norm.py. z is read where the forward saved it, else formed again, and the dropout mask always is. Column sums leave a
row of partials a program, in float32. Small bottlenecks without gate, norm or dropout go in one pass instead:
adapter_bwd_once.py.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from fastgist_kernels.adapter import WEIGHTS
from fastgist_kernels.adapter_bwd_once import adapter_bwd_once, applies
from fastgist_kernels.adapter_norm import constant_sums, finish, normalised_partials
from fastgist_kernels.adapter_parts import activate, activation_slope, kept, normalised, project_down, spread_gate
from fastgist_kernels.adapter_plan import chunks, most_hidden, row_tiles, tile_config, tile_defaults
from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, dot, launch
from fastgist_kernels.cp_linear import dropout_args, project
from fastgist_kernels.outer import argument_types, low_dot, narrow, outer, reduce_partials

__all__ = ["SPECS", "adapter_bwd"]


@triton.jit
def _adapter_bwd_dx_kernel(
    dy_ptr,
    x_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    gate_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    stats_ptr,
    norm_sums_ptr,
    seed_ptr,
    z_ptr,
    base_ptr,
    h_ptr,
    dz_ptr,
    dx_ptr,
    gate_sum_ptr,
    sum_dz_ptr,
    sum_dy_ptr,
    M,
    D,
    H,
    N,
    E,
    first_h,
    unit_width,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xd,
    stride_dh,
    stride_dd,
    stride_db,
    stride_un,
    stride_uh,
    stride_gm,
    stride_ge,
    stride_nw,
    stride_nb,
    stride_zm,
    stride_hm,
    stride_sum,
    scale,
    residual_scale,
    threshold,
    inv_keep,
    ACTIVATION: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    LOAD_Z: tl.constexpr,
    ADD_DY: tl.constexpr,
    ADD_BASE: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DZ: tl.constexpr,
    NEED_H: tl.constexpr,
    NEED_GATE: tl.constexpr,
    SUM_DZ: tl.constexpr,
    SUM_DY: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Hidden units first_h .. first_h + H. NEED_DZ: dz is stored; h and dz (M, H) have unit inner stride; dx is contiguous.
    ADD_DY: x is the residual (N = D), ADD_BASE: dx of earlier hidden units is added; SUM_DY goes with ADD_DY. With a norm,
    stats (2, M) are the rows' means and 1 / deviations, norm_sums (2, all units) what :func:`constant_sums` wrote."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.arange(0, BLOCK_H).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_m = offs_m < M
    mask_h = offs_h < H
    mask_mh = mask_m[:, None] & mask_h[None, :]

    mean = tl.zeros([BLOCK_M], tl.float32)
    rstd = mean
    if HAS_NORM:
        mean = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(stats_ptr + (M + offs_m), mask=mask_m, other=0.0)
    if not LOAD_Z:
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
    dh = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    if NEED_DX or NEED_DZ or SUM_DZ or NEED_GATE:
        for first_n in range(0, N, BLOCK_N):
            offs_c = first_n + offs_n
            mask_c = offs_c < N
            dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_c[None, :] * stride_dyn
            up_ptrs = up_ptr + offs_c[:, None] * stride_un + offs_h[None, :] * stride_uh
            dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
            up = tl.load(up_ptrs, mask=mask_c[:, None] & mask_h[None, :], other=0.0)
            dh = dot(dy, narrow(up, dy.dtype), dh, PRECISION)
    dh = dh * scale
    if HAS_DROPOUT:
        keep = kept(seed_ptr, offs_m, first_h, unit_width * E, threshold, BLOCK_M, BLOCK_H)
        dh = tl.where(keep, dh * inv_keep, 0.0)

    if LOAD_Z:  # after the loop: one tile less to hold in it
        z = tl.load(z_ptr + offs_m[:, None] * stride_zm + offs_h[None, :], mask=mask_mh, other=0.0).to(tl.float32)
    expert = (first_h + tl.arange(0, BLOCK_H)) // unit_width
    if NEED_GATE:
        by_unit = dh * activate(z, ACTIVATION)
        for e in range(0, E):
            gate_sum = tl.sum(tl.where((expert == e)[None, :], by_unit, 0.0), 1)
            offs_gate = offs_m * E + e
            tl.store(gate_sum_ptr + offs_gate, gate_sum, mask=mask_m)
    if HAS_GATE:
        gate = spread_gate(gate_ptr, offs_m, mask_m, expert, E, stride_gm, stride_ge, BLOCK_M, BLOCK_H)
    if NEED_H:
        hidden = activate(z, ACTIVATION)
        if HAS_GATE:
            hidden = hidden * gate
        if HAS_DROPOUT:
            hidden = tl.where(keep, hidden * inv_keep, 0.0)
        h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_h[None, :]
        tl.store(h_ptrs, narrow(hidden, h_ptr.dtype.element_ty), mask=mask_mh)
    dz = dh * activation_slope(z, ACTIVATION)
    if HAS_GATE:
        dz = dz * gate
    if NEED_DZ:
        dz_ptrs = dz_ptr + offs_m[:, None] * stride_hm + offs_h[None, :]
        tl.store(dz_ptrs, narrow(dz, dz_ptr.dtype.element_ty), mask=mask_mh)
    if SUM_DZ:
        tl.store(sum_dz_ptr + pid_m * stride_sum + offs_h, tl.sum(dz, 0), mask=mask_h)

    if NEED_DX:
        if HAS_NORM:  # the row's means of (dz D) w and of that times xhat, where D w xhat = z - (b_d + D b)
            all_h = tl.cast(unit_width, tl.int64) * E
            of_weight = tl.load(norm_sums_ptr + (first_h + offs_h), mask=mask_h, other=0.0)
            of_bias = tl.load(norm_sums_ptr + (all_h + first_h + offs_h), mask=mask_h, other=0.0)
            if not WIDE:  # as it enters the product: what is left of dx of a row without variance is rounding
                dz = narrow(dz, dy_ptr.dtype.element_ty).to(tl.float32)
            c1 = tl.sum(dz * of_weight[None, :], 1) / D
            c2 = tl.sum(dz * (z - of_bias[None, :]), 1) / D
        for first_d in range(0, D, BLOCK_D):
            offs_c = first_d + offs_d
            mask_c = offs_c < D
            mask_out = mask_m[:, None] & mask_c[None, :]
            down_ptrs = down_ptr + offs_h[:, None] * stride_dh + offs_c[None, :] * stride_dd
            down = narrow(
                tl.load(down_ptrs, mask=mask_h[:, None] & mask_c[None, :], other=0.0), dy_ptr.dtype.element_ty
            )
            dx = low_dot(dz, down, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), WIDE, PRECISION)
            if HAS_NORM:
                x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_c[None, :] * stride_xd
                x_hat = normalised(tl.load(x_ptrs, mask=mask_out, other=0.0), mean, rstd)
                if HAS_NORM_WEIGHT:
                    weight = tl.load(norm_weight_ptr + offs_c * stride_nw, mask=mask_c, other=0.0)
                    dx *= weight.to(tl.float32)[None, :]
                dx = (dx - c1[:, None] - x_hat * c2[:, None]) * rstd[:, None]
            if ADD_DY:
                dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_c[None, :] * stride_dyn
                dy = tl.load(dy_ptrs, mask=mask_out, other=0.0).to(tl.float32)
                dx += dy * residual_scale
                if SUM_DY:
                    tl.store(sum_dy_ptr + pid_m * stride_sum + offs_c, tl.sum(dy, 0) * scale, mask=mask_c)
            offs_out = offs_m[:, None] * D + offs_c[None, :]
            if ADD_BASE:
                dx += tl.load(base_ptr + offs_out, mask=mask_out, other=0.0)
            tl.store(dx_ptr + offs_out, narrow(dx, dx_ptr.dtype.element_ty), mask=mask_out)


# -- launching -------------------------------------------------------------------------------------------------------


def adapter_bwd(
    grad, x, down_weight, down_bias, up_weight, up_bias, gate, z, norm_weight, norm_bias, stats, seed,
    activation, scale, residual_scale, residual_is_x, dropout_p, tf32,
    grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_gate, grad_norm_weight, grad_norm_bias,
) -> None:  # fmt: skip
    """Write the gradients that are not None, contiguous, in the shapes of their inputs: grad_x (M, D), grad_down (H, D),
    grad_down_bias (H,), grad_up (D', H), grad_up_bias (D',) or (E, D'), grad_gate (M, E), grad_norm_weight and
    grad_norm_bias (D,), from grad (M, D') of any strides. z (M, H) or None, stats (2, M) where there is a norm, else None:
    what the forward saved. seed: None without dropout. Inputs that none of them needs may be None."""
    plain = stats is None and seed is None
    if plain and applies(grad, x, down_weight, up_weight, gate, z, grad_down, grad_up):
        adapter_bwd_once(
            grad, x, down_weight, down_bias, up_weight, activation, scale, residual_scale, residual_is_x,
            grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias,
        )  # fmt: skip
        return
    rows = grad.shape[0]
    single_bias = up_bias is not None and up_bias.dim() == 1
    in_kernel = grad_up_bias is not None and single_bias and grad_x is not None and residual_is_x
    low = torch.float32 if grad.dtype == torch.float16 else grad.dtype
    hidden = up_weight.shape[1] if up_weight is not None else 0
    h = torch.empty(rows, hidden, dtype=low, device=grad.device) if grad_up is not None else None
    need_dz = grad_down is not None or grad_norm_weight is not None
    dz = torch.empty(rows, hidden, dtype=low, device=grad.device) if need_dz else None
    normed = stats is not None and any(t is not None for t in (grad_down, grad_norm_weight, grad_norm_bias))
    need_total = grad_norm_bias is not None or (normed and grad_down is not None and norm_bias is not None)
    total = grad_down_bias
    if need_total:  # unrounded: more is made of it
        total = torch.empty(hidden, dtype=torch.float32, device=grad.device)
    if any(t is not None for t in (grad_x, h, dz, total, grad_gate)):
        _dx(
            grad, x, down_weight, down_bias, up_weight, up_bias, gate, z, norm_weight, norm_bias, stats, seed,
            activation, scale, residual_scale, residual_is_x, dropout_p, tf32,
            h, dz, grad_x, total, grad_up_bias if in_kernel else None, grad_gate,
        )  # fmt: skip
    if normed:
        partials = normalised_partials(x, dz, stats, tf32=tf32) if need_dz else None
        finish(
            partials, total if need_total else None, down_weight, norm_weight, norm_bias, grad.dtype,
            grad_down, grad_down_bias if need_total else None, grad_norm_weight, grad_norm_bias,
        )  # fmt: skip
    elif grad_down is not None:
        outer(x, dz, grad_down.t(), tf32=tf32)
    if grad_up is not None:
        outer(grad, h, grad_up, tf32=tf32, factor=scale)
    if grad_up_bias is None or in_kernel:
        return
    if single_bias:
        reduce_partials(grad.sum(0, keepdim=True, dtype=torch.float32), grad_up_bias[None], factor=scale)
    else:
        outer(grad, gate, grad_up_bias.t(), tf32=tf32, factor=scale)


def _dx(
    grad, x, down_weight, down_bias, up_weight, up_bias, gate, z, norm_weight, norm_bias, stats, seed,
    activation, scale, residual_scale, residual_is_x, dropout_p, tf32,
    h, dz, grad_x, grad_down_bias, grad_up_bias, grad_gate,
) -> None:  # fmt: skip
    """Launch the kernel over every chunk of hidden units; grad_up_bias: the one for all experts, where dy is read for dx."""
    rows, out = grad.shape
    hidden = up_weight.shape[1] if up_weight is not None else z.shape[1] if z is not None else down_weight.shape[0]
    inner = grad_x.shape[1] if grad_x is not None else 1 if x is None else x.shape[1]
    experts = 1 if gate is None else gate.shape[1]
    device = grad.device
    parts = chunks(grad, hidden, tf32, gated=gate is not None, backward=True)
    collected = None
    if grad_x is not None and len(parts) > 1:
        collected = torch.empty(rows, inner, dtype=torch.float32, device=device)
    norm_sums = None
    if stats is not None and grad_x is not None:
        norm_sums = constant_sums(down_weight, down_bias, norm_weight, norm_bias, grad.dtype)
    gates = None
    if grad_gate is not None:
        gates = torch.empty(len(parts), rows, experts, dtype=torch.float32, device=device)
    for index, (first, width) in enumerate(parts):
        last = index == len(parts) - 1
        units = slice(first, first + width)
        block_m, block_h, config = tile_config(
            "adapter_bwd", grad, inner, width, gate is not None, normed=stats is not None
        )
        programs = cdiv(rows, block_m)
        sum_dz = grad_down_bias is not None
        sum_dy = grad_up_bias is not None and index == 0
        sums = None
        if sum_dz or sum_dy:
            columns = (width if sum_dz else 0) + (out if sum_dy else 0)
            sums = torch.empty(programs, columns, dtype=torch.float32, device=device)
        sums_dy = sums[:, width if sum_dz else 0 :] if sum_dy else None
        down = None if down_weight is None else down_weight[units]
        up = None if up_weight is None else up_weight[:, units]
        bias = None if down_bias is None else down_bias[units]
        launch(
            _adapter_bwd_dx_kernel,
            (programs,),
            config,
            grad,
            x,
            down,
            bias,
            up,
            gate,
            norm_weight,
            norm_bias,
            stats,
            norm_sums,
            seed,
            None if z is None else z[:, units],
            collected if index else None,
            None if h is None else h[:, units],
            None if dz is None else dz[:, units],
            collected if collected is not None and not last else grad_x,
            None if gates is None else gates[index],
            sums if sum_dz else None,
            sums_dy,
            rows,
            inner,
            width,
            out,
            experts,
            first,
            hidden // experts,
            *grad.stride(),
            *((0, 0) if x is None else x.stride()),
            *((0, 0) if down is None else down.stride()),
            0 if bias is None else bias.stride(0),
            *((0, 0) if up is None else up.stride()),
            *((0, 0) if gate is None else gate.stride()),
            0 if norm_weight is None else norm_weight.stride(0),
            0 if norm_bias is None else norm_bias.stride(0),
            0 if z is None else z.stride(0),
            hidden,
            0 if sums is None else sums.stride(0),
            scale,
            residual_scale,
            *dropout_args(seed, dropout_p),
            ACTIVATION=activation,
            HAS_DOWN_BIAS=bias is not None,
            HAS_GATE=gate is not None,
            HAS_NORM=stats is not None,
            HAS_NORM_WEIGHT=norm_weight is not None,
            HAS_NORM_BIAS=norm_bias is not None,
            HAS_DROPOUT=seed is not None,
            LOAD_Z=z is not None,
            ADD_DY=residual_is_x and index == 0,
            ADD_BASE=index > 0,
            NEED_DX=grad_x is not None,
            NEED_DZ=dz is not None,
            NEED_H=h is not None,
            NEED_GATE=grad_gate is not None,
            SUM_DZ=sum_dz,
            SUM_DY=sum_dy,
            EVEN_D=inner % config["BLOCK_D"] == 0,
            WIDE=grad.dtype == torch.float16,
            PRECISION="tf32" if tf32 or grad.dtype == torch.float16 else "ieee",
            BLOCK_M=block_m,
            BLOCK_H=block_h,
        )
        if sum_dz:
            tail = grad_up_bias if sum_dy else None
            reduce_partials(sums, grad_down_bias[units][:, None], tail)
        elif sum_dy:
            reduce_partials(sums, grad_up_bias[:, None])
    if grad_gate is not None:
        total = gates.sum(0)
        if up_bias is not None and up_bias.dim() == 2:
            by_bias = torch.empty_like(total)
            project([grad], up_bias.to(grad.dtype).t(), None, None, scale, 0.0, tf32, by_bias)
            total += by_bias
        grad_gate.copy_(total)


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


_UNIT = dict.fromkeys(
    ("stride_dyn", "stride_xd", "stride_dd", "stride_db", "stride_uh", "stride_ge", "stride_nw", "stride_nb"), 1
)


def _spec(
    dtype: str, precision: str, hidden: int, gated: bool, rows: int, sizes: str = "even", normed: bool = False,
    dropped: bool = False, block: bool = False, saved: bool = False,
) -> Spec:  # fmt: skip
    """The kernel at the tile that a launch takes. ``sizes``: "even", "odd" (a number of hidden units that 16 does not
    divide) or "ragged" (that, and widths that no tile divides). ``block``: with float32 weights beside a half-precision x.
    ``saved``: of a frozen down weight, where z was kept instead of x."""
    ragged = sizes == "ragged"
    tile = tile_defaults("adapter_bwd", dtype == "fp32", hidden, gated, ragged, normed)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    flags = {"ACTIVATION": "gelu", "HAS_DOWN_BIAS": True, "HAS_GATE": gated, "LOAD_Z": saved or hidden > 64}
    flags |= {"ADD_DY": True, "ADD_BASE": False, "NEED_DX": True, "NEED_DZ": not saved, "NEED_H": True}
    flags |= {"NEED_GATE": gated, "SUM_DZ": True, "SUM_DY": True, "EVEN_D": not ragged, "WIDE": dtype == "fp16"}
    flags |= {"PRECISION": precision, "BLOCK_M": rows, "BLOCK_H": hidden, "HAS_DROPOUT": dropped}
    flags |= dict.fromkeys(("HAS_NORM", "HAS_NORM_WEIGHT", "HAS_NORM_BIAS"), normed)
    constexprs = _UNIT | flags | tile
    types = argument_types(_adapter_bwd_dx_kernel, constexprs, dtype) | {"stats_ptr": "*fp32", "norm_sums_ptr": "*fp32"}
    if block:
        types |= {name: "*fp32" for name in WEIGHTS if name in types}
    ending = f"_m{rows}{'' if sizes == 'even' else f'_{sizes}'}{'_block' * block}{'_norm' * normed}{'_drop' * dropped}"
    ending += "_z" * saved
    return Spec(
        _adapter_bwd_dx_kernel,
        f"{dtype}_{precision}_h{hidden}{'_gate' * gated}{ending}",
        types,
        constexprs,
        num_warps=warps,
        num_stages=stages,
        matrix=rows >= 64 and (dtype, precision) != ("fp32", "ieee"),
        aligned={"even": ("M", "D", "N", "H"), "odd": ("M", "D", "N"), "ragged": ("M",)}[sizes],
        unaligned=("stride_un", "stride_zm", "stride_hm") if sizes != "even" else (),
    )


def every_tile() -> list[Spec]:
    """Every combination that :func:`chunks` and :func:`tile_config` can launch."""
    specs = []
    for dtype, precision in (("bf16", "ieee"), ("fp16", "tf32"), ("fp32", "tf32"), ("fp32", "ieee")):
        for gated, normed in itertools.product((False, True), repeat=2):
            most = most_hidden(dtype in ("fp16", "fp32"), dtype == "fp32" and precision == "ieee", gated, True)
            for hidden in (h for h in (16, 32, 64, 128, 256) if h <= most):
                for sizes in ("even", "odd", "ragged"):
                    tiles = row_tiles("adapter_bwd", hidden, gated, sizes == "ragged", normed=normed)
                    kinds = [(normed, normed, False, False)]
                    if not normed:
                        kinds += [(False, True, False, False), (False, False, False, True), (False, True, False, True)]
                    if dtype != "fp32":
                        kinds.append((normed, normed, True, False))
                    for kind in kinds:
                        specs += [_spec(dtype, precision, hidden, gated, rows, sizes, *kind) for rows in tiles]
    return specs


SPECS = [
    _spec(*case)
    for case in (
        ("bf16", "ieee", 16, False, 64),
        ("bf16", "ieee", 64, False, 64),
        ("bf16", "ieee", 64, True, 64),
        ("bf16", "ieee", 128, True, 32),
        ("bf16", "ieee", 256, False, 32),
        ("bf16", "ieee", 64, False, 16),
        ("bf16", "ieee", 16, False, 64, "odd"),
        ("bf16", "ieee", 64, False, 32, "ragged"),
        ("fp32", "ieee", 32, True, 32, "ragged"),
        ("fp16", "tf32", 64, True, 64),
        ("fp32", "tf32", 64, True, 64),
        ("fp32", "ieee", 64, True, 64),
        ("bf16", "ieee", 16, False, 64, "even", True, True),
        ("bf16", "ieee", 64, False, 64, "even", True, True),
        ("bf16", "ieee", 128, False, 32, "ragged", True, True),
        ("bf16", "ieee", 256, False, 32, "even", True, True),
        ("bf16", "ieee", 64, False, 64, "even", False, True),
        ("fp16", "tf32", 64, False, 64, "even", True, True),
        ("bf16", "ieee", 16, False, 64, "odd", False, False, False, True),
        ("bf16", "ieee", 64, True, 64, "even", False, True, False, True),
        ("fp16", "tf32", 64, True, 64, "even", False, False, False, True),
    )
]
