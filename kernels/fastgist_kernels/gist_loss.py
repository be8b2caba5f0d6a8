"""gist_loss in Triton: both cross-entropies and the bidirectional KL from one read of the two logits tensors.

The row state is that of bidirectional_kl plus, per side, the sum of exp(x - max) at temperature 1 and the weighted sum
of the centred logits, where the class weights are one-hot, smoothed or soft targets: CE = W log S - sum w (x - max).
At T = 1, 2, 3 or 4 the exponentials at temperature 1 are powers of those at temperature T: no second exp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.bidirectional_kl import centred_pair, finite_max, online_pair, rows_config
from fastgist_kernels.common import LOG2E, cdiv, launch

__all__ = [
    "SPECS",
    "gist_gradients",
    "gist_loss_bwd",
    "gist_loss_fwd",
    "gist_row_loss",
    "gist_row_state",
    "target_rows",
]

NUM_STATS = 9


@triton.jit
def exp_unit(xc, exp_t, POWER: tl.constexpr):
    """exp(xc) from exp_t = exp(xc / T) where T = POWER; POWER = 0: T is no small integer."""
    if POWER == 1:
        return exp_t
    elif POWER == 2:
        return exp_t * exp_t
    elif POWER == 3:
        return exp_t * exp_t * exp_t
    elif POWER == 4:
        return (exp_t * exp_t) * (exp_t * exp_t)
    else:
        return tl.exp2(xc * LOG2E)


@triton.jit
def target_rows(target_ptr, offs_m, mask_m, stride_tm, V, ignore_index, SOFT: tl.constexpr):
    """Which rows count, which of them hold an impossible class, and the class (-1 where there is none)."""
    if SOFT:
        counts = mask_m
        invalid = mask_m & False
        label = tl.full(offs_m.shape, -1, tl.int64)
    else:
        label = tl.load(target_ptr + offs_m * stride_tm, mask=mask_m, other=0)
        counts = mask_m & (label != ignore_index)
        possible = (label >= 0) & (label < V)
        invalid = counts & (possible == 0)
        label = tl.where(counts & possible, label, -1)
    return counts, invalid, label


@triton.jit
def class_weights(
    target_ptr,
    offs_m,
    offs_v,
    mask_mv,
    label,
    stride_tm,
    stride_tv,
    keep,
    smooth,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """[BLOCK_M, BLOCK_V] weights of the classes in the cross-entropy; 0 in the padding, which no label can equal."""
    if SOFT:
        t_ptrs = target_ptr + offs_m[:, None] * stride_tm + offs_v[None, :] * stride_tv
        weights = tl.load(t_ptrs, mask=mask_mv, other=0.0).to(tl.float32)
    else:
        weights = tl.where(offs_v[None, :] == label[:, None], 1.0, 0.0)
    if SMOOTH:
        weights = weights * keep + smooth
    return tl.where(mask_mv, weights, 0.0)


@triton.jit
def gist_row_state(
    z_ptr,
    g_ptr,
    target_ptr,
    offs_m,
    counts,
    label,
    V,
    stride_zm,
    stride_zv,
    stride_gm,
    stride_gv,
    stride_tm,
    stride_tv,
    to_exp2,
    keep,
    smooth,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Everything the loss and its gradients need of a row, from one read of both sides."""
    m_z = tl.full([BLOCK_M], float("-inf"), tl.float32)
    m_g = tl.full([BLOCK_M], float("-inf"), tl.float32)
    s_p = tl.zeros([BLOCK_M], tl.float32)
    s_q = tl.zeros([BLOCK_M], tl.float32)
    w_p = tl.zeros([BLOCK_M], tl.float32)
    w_q = tl.zeros([BLOCK_M], tl.float32)
    sum_z = tl.zeros([BLOCK_M], tl.float32)
    sum_g = tl.zeros([BLOCK_M], tl.float32)
    dot_z = tl.zeros([BLOCK_M], tl.float32)
    dot_g = tl.zeros([BLOCK_M], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    lone = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V).to(tl.int64)
        mask_mv = counts[:, None] & (offs_v < V)[None, :]
        z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_v[None, :] * stride_zv
        g_ptrs = g_ptr + offs_m[:, None] * stride_gm + offs_v[None, :] * stride_gv
        z = tl.load(z_ptrs, mask=mask_mv, other=float("-inf")).to(tl.float32)
        g = tl.load(g_ptrs, mask=mask_mv, other=float("-inf")).to(tl.float32)
        m_z, m_g, s_p, s_q, w_p, w_q, lone, zc, gc, p, q, rise_z, rise_g = online_pair(
            z, g, m_z, m_g, s_p, s_q, w_p, w_q, lone, to_exp2
        )
        sum_z = tl.exp2(tl.minimum(rise_z, 0.0) * LOG2E) * sum_z + tl.sum(exp_unit(zc, p, POWER), 1)
        sum_g = tl.exp2(tl.minimum(rise_g, 0.0) * LOG2E) * sum_g + tl.sum(exp_unit(gc, q, POWER), 1)
        weights = class_weights(
            target_ptr, offs_m, offs_v, mask_mv, label, stride_tm, stride_tv, keep, smooth, SOFT, SMOOTH
        )
        dot_z += weight * rise_z + tl.sum(tl.where(weights == 0.0, 0.0, weights * zc), 1)
        dot_g += weight * rise_g + tl.sum(tl.where(weights == 0.0, 0.0, weights * gc), 1)
        weight += tl.sum(weights, 1)
    return m_z, m_g, s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight


@triton.jit
def gist_row_loss(s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight, alpha, beta, inv_t):
    """The loss of each row and the means of d under p and q. A term whose factor is 0 is absent, even if not finite."""
    e_p = w_p / s_p
    e_q = w_q / s_q
    divergence = (e_p - e_q) * inv_t
    infinite = (lone > 0) & (divergence == divergence)
    divergence = tl.where(infinite, float("inf"), divergence)
    e_p = tl.where(infinite, float("nan"), e_p)
    e_q = tl.where(infinite, float("nan"), e_q)
    ce_z = tl.where(weight == 0.0, 0.0, weight * tl.log(sum_z)) - dot_z
    ce_g = tl.where(weight == 0.0, 0.0, weight * tl.log(sum_g)) - dot_g
    loss = ce_z + tl.where(alpha == 0.0, 0.0, alpha * ce_g) + tl.where(beta == 0.0, 0.0, beta * divergence)
    return loss, e_p, e_q


@triton.jit
def gist_gradients(
    z, g, m_z, m_g, inv_p, inv_q, e_p, e_q, over_z, over_g, weights, alpha, beta_z, beta_g, inv_t, POWER: tl.constexpr
):
    """Gradients of the row losses at a tile. inv_p, inv_q: 1 / S at temperature T; over_z, over_g: W / S at 1; beta_z,
    beta_g: the divergence's weight in each side's, 0 where the side takes nothing of it, not even NaN."""
    zc, gc, d = centred_pair(z, g, m_z, m_g)
    to_exp2 = inv_t * LOG2E
    p = tl.exp2(zc * to_exp2)
    q = tl.exp2(gc * to_exp2)
    ce_z = exp_unit(zc, p, POWER) * over_z[:, None] - weights
    ce_g = exp_unit(gc, q, POWER) * over_g[:, None] - weights
    p = p * inv_p[:, None]
    q = q * inv_q[:, None]
    kl_z = p * ((d - e_p[:, None]) * inv_t) + (p - q)
    kl_g = q * ((e_q[:, None] - d) * inv_t) + (q - p)
    grad_z = ce_z + tl.where(beta_z == 0.0, 0.0, beta_z * inv_t * kl_z)
    grad_g = tl.where(alpha == 0.0, 0.0, alpha * ce_g) + tl.where(beta_g == 0.0, 0.0, beta_g * inv_t * kl_g)
    return grad_z, grad_g


@triton.jit(do_not_specialize=["M"])
def _gist_loss_fwd_kernel(
    z_ptr,
    g_ptr,
    target_ptr,
    loss_ptr,
    stats_ptr,
    M,
    V,
    stride_zm,
    stride_zv,
    stride_gm,
    stride_gv,
    stride_tm,
    stride_tv,
    ignore_index,
    alpha,
    beta,
    beta_z,
    beta_g,
    inv_t,
    keep,
    smooth,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    counts, invalid, label = target_rows(target_ptr, offs_m, mask_m, stride_tm, V, ignore_index, SOFT)
    m_z, m_g, s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight = gist_row_state(
        z_ptr,
        g_ptr,
        target_ptr,
        offs_m,
        counts,
        label,
        V,
        stride_zm,
        stride_zv,
        stride_gm,
        stride_gv,
        stride_tm,
        stride_tv,
        inv_t * LOG2E,
        keep,
        smooth,
        SOFT,
        SMOOTH,
        POWER,
        BLOCK_M,
        BLOCK_V,
    )
    loss, e_p, e_q = gist_row_loss(s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight, alpha, beta, inv_t)
    loss = tl.where(invalid, float("nan"), loss)
    rows = M.to(tl.int64)
    tl.store(loss_ptr + offs_m, tl.where(counts, loss, 0.0), mask=mask_m)
    tl.store(stats_ptr + offs_m, tl.where(counts, finite_max(m_z), 0.0), mask=mask_m)
    tl.store(stats_ptr + rows + offs_m, tl.where(counts, finite_max(m_g), 0.0), mask=mask_m)
    tl.store(stats_ptr + 2 * rows + offs_m, tl.where(counts, s_p, 0.0), mask=mask_m)
    tl.store(stats_ptr + 3 * rows + offs_m, tl.where(counts, s_q, 0.0), mask=mask_m)
    tl.store(stats_ptr + 4 * rows + offs_m, tl.where(counts, e_p, 0.0), mask=mask_m)
    tl.store(stats_ptr + 5 * rows + offs_m, tl.where(counts, e_q, 0.0), mask=mask_m)
    tl.store(stats_ptr + 6 * rows + offs_m, tl.where(counts, sum_z, 0.0), mask=mask_m)
    tl.store(stats_ptr + 7 * rows + offs_m, tl.where(counts, sum_g, 0.0), mask=mask_m)
    tl.store(stats_ptr + 8 * rows + offs_m, tl.where(counts, weight, 0.0), mask=mask_m)


@triton.jit(do_not_specialize=["M"])
def _gist_loss_bwd_kernel(
    z_ptr,
    g_ptr,
    target_ptr,
    stats_ptr,
    row_grad_ptr,
    grad_z_ptr,
    grad_g_ptr,
    M,
    V,
    stride_zm,
    stride_zv,
    stride_gm,
    stride_gv,
    stride_tm,
    stride_tv,
    stride_grad,
    ignore_index,
    alpha,
    beta,
    beta_z,
    beta_g,
    inv_t,
    keep,
    smooth,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_m = offs_m < M
    mask_v = offs_v < V
    counts, invalid, label = target_rows(target_ptr, offs_m, mask_m, stride_tm, V, ignore_index, SOFT)
    rows = M.to(tl.int64)
    m_z = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
    m_g = tl.load(stats_ptr + rows + offs_m, mask=mask_m, other=0.0)
    s_p = tl.load(stats_ptr + 2 * rows + offs_m, mask=mask_m, other=1.0)
    s_q = tl.load(stats_ptr + 3 * rows + offs_m, mask=mask_m, other=1.0)
    e_p = tl.load(stats_ptr + 4 * rows + offs_m, mask=mask_m, other=0.0)
    e_q = tl.load(stats_ptr + 5 * rows + offs_m, mask=mask_m, other=0.0)
    sum_z = tl.load(stats_ptr + 6 * rows + offs_m, mask=mask_m, other=1.0)
    sum_g = tl.load(stats_ptr + 7 * rows + offs_m, mask=mask_m, other=1.0)
    weight = tl.load(stats_ptr + 8 * rows + offs_m, mask=mask_m, other=0.0)
    scale = tl.load(row_grad_ptr + offs_m * stride_grad, mask=mask_m, other=0.0)
    scale = tl.where(invalid, float("nan"), scale)

    mask_mv = counts[:, None] & mask_v[None, :]
    z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_v[None, :] * stride_zv
    g_ptrs = g_ptr + offs_m[:, None] * stride_gm + offs_v[None, :] * stride_gv
    z = tl.load(z_ptrs, mask=mask_mv, other=float("-inf")).to(tl.float32)
    g = tl.load(g_ptrs, mask=mask_mv, other=float("-inf")).to(tl.float32)
    weights = class_weights(
        target_ptr, offs_m, offs_v, mask_mv, label, stride_tm, stride_tv, keep, smooth, SOFT, SMOOTH
    )
    grad_z, grad_g = gist_gradients(
        z,
        g,
        m_z,
        m_g,
        1.0 / s_p,
        1.0 / s_q,
        e_p,
        e_q,
        weight / sum_z,
        weight / sum_g,
        weights,
        alpha,
        beta_z,
        beta_g,
        inv_t,
        POWER,
    )
    mask_store = mask_m[:, None] & mask_v[None, :]
    offs_out = offs_m[:, None] * V + offs_v[None, :]
    if NEED_Z:
        grad_z = tl.where(counts[:, None], scale[:, None] * grad_z, 0.0)
        tl.store(grad_z_ptr + offs_out, grad_z.to(grad_z_ptr.dtype.element_ty), mask=mask_store)
    if NEED_G:
        grad_g = tl.where(counts[:, None], scale[:, None] * grad_g, 0.0)
        tl.store(grad_g_ptr + offs_out, grad_g.to(grad_g_ptr.dtype.element_ty), mask=mask_store)


def loss_arguments(
    target, classes, alpha, beta, beta_logits, beta_gist, temperature, label_smoothing, ignore_index
) -> tuple[tuple, dict]:
    """The scalars (in kernel order) and the constexprs that every kernel of this loss takes."""
    smoothing = 1.0 - label_smoothing, label_smoothing / classes
    scalars = (ignore_index, alpha, beta, beta_logits, beta_gist, 1.0 / temperature, *smoothing)
    power = int(temperature) if temperature in (1.0, 2.0, 3.0, 4.0) else 0
    return scalars, {"SOFT": target.dim() == 2, "SMOOTH": label_smoothing != 0.0, "POWER": power}


def gist_loss_fwd(
    logits,
    gist_logits,
    target,
    alpha,
    beta,
    beta_logits,
    beta_gist,
    temperature,
    label_smoothing,
    ignore_index,
    row_loss,
    stats,
) -> None:
    """Write row_loss (M,) and stats (9, M), float32. logits (M, V) of any strides; target (M,) int64 or (M, V) float.
    ``beta`` includes any T^2."""
    rows, classes = logits.shape
    config = rows_config("gist_loss_fwd", logits.device, classes, elements=2048)
    scalars, flags = loss_arguments(
        target, classes, alpha, beta, beta_logits, beta_gist, temperature, label_smoothing, ignore_index
    )
    launch(
        _gist_loss_fwd_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]),),
        config,
        logits,
        gist_logits,
        target,
        row_loss,
        stats,
        rows,
        classes,
        *logits.stride(),
        *gist_logits.stride(),
        target.stride(0),
        target.stride(1) if target.dim() == 2 else 0,
        *scalars,
        **flags,
    )


def gist_loss_bwd(
    logits,
    gist_logits,
    target,
    stats,
    row_grad,
    alpha,
    beta,
    beta_logits,
    beta_gist,
    temperature,
    label_smoothing,
    ignore_index,
    grad_logits,
    grad_gist,
) -> None:
    """Write the gradients (M, V), contiguous, that are not None; row_grad (M,) float32 of any stride."""
    rows, classes = logits.shape
    config = rows_config("gist_loss_bwd", logits.device, classes, elements=2048)
    scalars, flags = loss_arguments(
        target, classes, alpha, beta, beta_logits, beta_gist, temperature, label_smoothing, ignore_index
    )
    launch(
        _gist_loss_bwd_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]), cdiv(classes, c["BLOCK_V"])),
        config,
        logits,
        gist_logits,
        target,
        stats,
        row_grad,
        grad_logits,
        grad_gist,
        rows,
        classes,
        *logits.stride(),
        *gist_logits.stride(),
        target.stride(0),
        target.stride(1) if target.dim() == 2 else 0,
        row_grad.stride(0),
        *scalars,
        **flags,
        NEED_Z=grad_logits is not None,
        NEED_G=grad_gist is not None,
    )


SCALAR_TYPES = {"ignore_index": "i32"} | dict.fromkeys(
    ("alpha", "beta", "beta_z", "beta_g", "inv_t", "keep", "smooth"), "fp32"
)


def _specs() -> list[Spec]:
    common = {"M": "i32", "V": "i32", "stride_zm": "i64", "stride_gm": "i64", "stride_tm": "i64"} | SCALAR_TYPES
    unit = {"stride_zv": 1, "stride_gv": 1, "POWER": 3}
    out = []
    for label, dtype, soft, block_m, block_v in (
        ("bf16_small_v", "bf16", False, 4, 128),
        ("bf16_long_v", "bf16", False, 1, 4096),
        ("fp32_long_v", "fp32", False, 1, 4096),
        ("bf16_soft_smooth", "bf16", True, 1, 4096),
    ):
        pair = {"z_ptr": f"*{dtype}", "g_ptr": f"*{dtype}", "target_ptr": "*fp32" if soft else "*i64"}
        flags = unit | {"SOFT": soft, "SMOOTH": soft, "stride_tv": 1 if soft else 0}
        warps = 8 if block_v >= 2048 else 4
        out.append(
            Spec(
                _gist_loss_fwd_kernel,
                label,
                pair | {"loss_ptr": "*fp32", "stats_ptr": "*fp32"} | common,
                flags | {"BLOCK_M": block_m, "BLOCK_V": min(block_v, 2048)},
                num_warps=warps,
                num_stages=1,
            )
        )
        grads = {"grad_z_ptr": f"*{dtype}", "grad_g_ptr": f"*{dtype}", "stride_grad": "i64"}
        out.append(
            Spec(
                _gist_loss_bwd_kernel,
                label,
                pair | {"stats_ptr": "*fp32", "row_grad_ptr": "*fp32"} | grads | common,
                flags | {"NEED_Z": True, "NEED_G": True, "BLOCK_M": block_m, "BLOCK_V": min(block_v, 2048)},
                num_warps=warps,
                num_stages=1,
            )
        )
    return out


SPECS = _specs()
