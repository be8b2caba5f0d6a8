"""adapter: schema, fake, checks, dispatch and autograd. The formula is in fastgist/reference/adapter.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgist import backends
from fastgist.ops import _common
from fastgist.ops._low_rank import cast_for_autocast, check_dropout, check_number, dropout_for, empty_unless
from fastgist.reference import adapter as reference
from fastgist.reference._numerics import accumulate_dtype
from fastgist.reference.adapter import ACTIVATIONS
from fastgist.reference.cp_linear import low_rank_dtype

__all__ = ["adapter"]

_OP = "adapter"

#: Bottlenecks to which the kernels form z again in the backward; wider ones save it.
_RECOMPUTED_WIDTH = 64


def _saves_z(impl: str, x: Tensor, hidden: int, x_kept: bool) -> bool:
    """Eager PyTorch and C++ have z in hand. A kernel's second pass over x is cheaper than writing and reading a small z, but
    where the backward wants x for nothing else, z is the smaller of the two to keep."""
    narrower = hidden * low_rank_dtype(x.dtype).itemsize < x.shape[1] * x.dtype.itemsize
    return impl != "triton" or hidden > _RECOMPUTED_WIDTH or (narrower and not x_kept)


def _resolve(impl: str, x: Tensor, weight: int) -> str:
    """The implementation for ``x`` (M, ..) and weights of so many elements. "auto" passes over C++ where BLAS was faster
    (DESIGN.md, "adapter in C++"): weights too large for the rows that they are packed for, or for the cache that they are
    read from again and again; and bfloat16, which the products of plain PyTorch have instructions for."""
    chosen = backends.resolve(_OP, impl, x)
    if impl != "auto" or chosen != "native":
        return chosen
    rows = x.shape[0]
    if x.dtype == torch.bfloat16:
        return chosen if rows <= 64 and weight <= 2**16 else "reference"
    most = 2**20 if backends.vector_bytes() == 64 else 2**16
    return chosen if weight <= min(most, 2**15 * rows) else "reference"


# -- raw ops ---------------------------------------------------------------------------------------------------------
# 2-D throughout: x (M, D), down (H, D), up (D', H), up_bias (D',) or (E, D'), residual and branch (M, D'), gate (M, E).
# Weights and biases are x's dtype, or float32 beside a half-precision x: those of the products are rounded to x's where
# they meet it, the norm's (D,) enter in float32, and all gradients are their own dtype's. norm_eps is None where there is no
# norm; stats (2, M), the rows' means and 1 / deviations, are float32 (float64) and come where z is needed. x_kept: whether
# the backward has x in any case, of which z may be formed again. Results that were not asked for are empty. Inputs that no
# wanted gradient needs are None in the backward.


def _fwd(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scale: float,
    residual_scale: float,
    norm_eps: float | None,
    dropout_p: float,
    need_z: bool,
    x_kept: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    drop = dropout_for(impl, seed)
    impl = _resolve(impl, x, down_weight.numel())
    save_z = need_z and _saves_z(impl, x, down_weight.shape[0], x_kept)
    if impl == "reference" or x.numel() == 0:
        down_weight, up_weight = down_weight.to(x.dtype), up_weight.to(x.dtype)
        down_bias, up_bias = _as(down_bias, x.dtype), _as(up_bias, x.dtype)
        y, z, stats = reference.forward(
            x, down_weight, down_bias, up_weight, up_bias, residual, gate, norm_weight, norm_bias, seed,
            activation, scale, residual_scale, norm_eps, dropout_p, branch=branch, drop=drop,
        )  # fmt: skip
        return y, empty_unless(z if save_z else None, x), empty_unless(stats if need_z else None, x)
    y, z, stats = _empty_results(x, up_weight, save_z, need_z and norm_eps is not None)
    tensors = (x, down_weight, down_bias, up_weight, up_bias, residual, branch, gate, norm_weight, norm_bias, seed)
    options = (activation, scale, residual_scale, norm_eps, dropout_p)
    if impl == "native":
        torch.ops.fastgist_native.adapter_fwd(*tensors, *options, y, z, stats)
    else:
        from fastgist_kernels import adapter as kernels

        kernels.adapter_fwd(*tensors, *options, _common.tf32_allowed(), y, z, stats)
    return y, empty_unless(z, x), empty_unless(stats, x)


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _empty_results(
    x: Tensor, up_weight: Tensor, save_z: bool, save_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows, (out, hidden) = x.shape[0], up_weight.shape
    return (
        x.new_empty(rows, out),
        x.new_empty(rows, hidden, dtype=low_rank_dtype(x.dtype)) if save_z else None,
        x.new_empty(2, rows, dtype=accumulate_dtype(x.dtype)) if save_stats else None,
    )


def _fwd_fake(
    x, down_weight, down_bias, up_weight, up_bias, residual, branch, gate, norm_weight, norm_bias, seed, activation, scale,
    residual_scale, norm_eps, dropout_p, need_z, x_kept, impl,
):  # fmt: skip
    impl = backends.resolve(_OP, impl, x)
    save_z = need_z and _saves_z(impl, x, down_weight.shape[0], x_kept)
    y, z, stats = _empty_results(x, up_weight, save_z, need_z and norm_eps is not None)
    return y, empty_unless(z, x), empty_unless(stats, x)


def _bwd(
    grad: Tensor,
    x: Tensor | None,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    gate: Tensor | None,
    z: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stats: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scale: float,
    residual_scale: float,
    residual_is_x: bool,
    dropout_p: float,
    needs: list[bool],
    weight_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, ...]:
    drop = dropout_for(impl, seed)
    impl = _resolve(impl, grad, max(0 if w is None else w.numel() for w in (down_weight, up_weight)))
    options = (activation, scale, residual_scale, residual_is_x, dropout_p)
    if impl == "reference" or grad.numel() == 0 or (x is not None and x.numel() == 0):
        dtype = grad.dtype
        down_weight, up_weight, up_bias = (_as(w, dtype) for w in (down_weight, up_weight, up_bias))
        if weight_dtype != dtype:  # their gradients are not rounded to half precision on the way
            grad, x, down_weight, up_weight, up_bias, gate, z = (
                _as(t, weight_dtype) for t in (grad, x, down_weight, up_weight, up_bias, gate, z)
            )
        if z is None and any(needs[i] for i in (0, 1, 2, 3, 5, 6, 7)):  # a kernel's forward kept none
            z = _z_again(grad, x, down_weight, down_bias, up_weight, norm_weight, norm_bias, stats)
        needed = (grad, x, down_weight, up_weight, up_bias, gate, z, norm_weight, norm_bias, stats, seed)
        grads = list(reference.backward(*needed, *options, *needs, drop=drop))
        for i, g in enumerate(grads):
            grads[i] = _as(g, dtype if i in (0, 5) else weight_dtype)
    else:
        grads = _empty_grads(grad, x, down_weight, up_weight, up_bias, gate, needs, weight_dtype)
        tensors = (grad, x, down_weight, down_bias, up_weight, up_bias, gate, z, norm_weight, norm_bias, stats, seed)
        if impl == "native":
            torch.ops.fastgist_native.adapter_bwd(*tensors, *options, *grads)
        else:
            from fastgist_kernels import adapter_bwd as kernels

            kernels.adapter_bwd(*tensors, *options, _common.tf32_allowed(), *grads)
    return tuple(empty_unless(g, grad) for g in grads)


def _z_again(grad, x, down_weight, down_bias, up_weight, norm_weight, norm_bias, stats) -> Tensor:
    """z (M, H), of which a kernel's backward forms its own tile by tile; of no rows nothing was kept at all."""
    if grad.numel() == 0 or x is None or x.numel() == 0:
        return grad.new_empty(0, up_weight.shape[1])
    if stats is not None:
        mean, rstd = stats.unsqueeze(-1)
        normal = (x.to(stats.dtype) - mean) * rstd
        normal = normal if norm_weight is None else normal * norm_weight
        x = normal if norm_bias is None else normal + norm_bias
    dtype = low_rank_dtype(grad.dtype)
    return torch.nn.functional.linear(x.to(dtype), down_weight.to(dtype), _as(down_bias, dtype))


def _empty_grads(grad, x, down_weight, up_weight, up_bias, gate, needs, weight_dtype):
    """Uninitialised gradients, None where not wanted: of weights and biases as ``weight_dtype``, else in ``grad``'s."""
    need_x, need_down, need_down_bias, need_up, need_up_bias, need_gate, need_norm_weight, need_norm_bias = needs

    def weight(*shape):
        return grad.new_empty(*shape, dtype=weight_dtype)

    return (
        grad.new_empty(grad.shape[0], down_weight.shape[1]) if need_x else None,
        weight(up_weight.shape[1], x.shape[1]) if need_down else None,
        weight(up_weight.shape[1]) if need_down_bias else None,
        weight(*up_weight.shape) if need_up else None,
        weight(*up_bias.shape) if need_up_bias else None,
        grad.new_empty(gate.shape) if need_gate else None,
        weight(down_weight.shape[1]) if need_norm_weight else None,
        weight(down_weight.shape[1]) if need_norm_bias else None,
    )


def _bwd_fake(
    grad, x, down_weight, down_bias, up_weight, up_bias, gate, z, norm_weight, norm_bias, stats, seed, activation, scale,
    residual_scale, residual_is_x, dropout_p, needs, weight_dtype, impl,
):  # fmt: skip
    grads = _empty_grads(grad, x, down_weight, up_weight, up_bias, gate, needs, weight_dtype)
    return tuple(empty_unless(g, grad) for g in grads)


_fwd_op = _common.define(
    "adapter_fwd(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor? residual, "
    "Tensor? branch, Tensor? gate, Tensor? norm_weight, Tensor? norm_bias, Tensor? seed, str activation, float scale, "
    "float residual_scale, float? norm_eps, float dropout_p, bool need_z, bool x_kept, "
    "str impl) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    _OP,
)
_bwd_op = _common.define(
    "adapter_bwd(Tensor grad, Tensor? x, Tensor? down_weight, Tensor? down_bias, Tensor? up_weight, Tensor? up_bias, "
    "Tensor? gate, Tensor? z, Tensor? norm_weight, Tensor? norm_bias, Tensor? stats, Tensor? seed, str activation, "
    "float scale, float residual_scale, bool residual_is_x, float dropout_p, bool[] needs, ScalarType weight_dtype, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    _OP,
)


class _Adapter(torch.autograd.Function):
    """y (M, D'). Saves x, z (M, H) where the backward does not form it again, and of a norm the rows' statistics (2, M)."""

    @staticmethod
    def forward(
        ctx, x, down_weight, down_bias, up_weight, up_bias, gate, norm_weight, norm_bias, residual, branch, seed,
        residual_is_x, activation, scale, residual_scale, norm_eps, dropout_p, record, impl,
    ):  # fmt: skip
        needs = list(_common.needs(ctx, 8, record))
        need_x, need_down, need_down_bias, need_up, need_up_bias, need_gate, need_norm_weight, need_norm_bias = needs
        need_z = any((need_x, need_down, need_down_bias, need_up, need_gate, need_norm_weight, need_norm_bias))
        x_kept = need_down or (norm_eps is not None and (need_x or need_norm_weight))  # if z is
        added = x if residual_is_x else residual
        y, z, stats = _fwd_op(
            x, down_weight, down_bias, up_weight, up_bias, added, branch, gate, norm_weight, norm_bias, seed,
            activation, scale, residual_scale, norm_eps, dropout_p, need_z, x_kept, impl,
        )  # fmt: skip
        saved = z.dim() == 2
        again = need_z and not saved  # the backward forms z from x
        gated_bias = up_bias is not None and up_bias.dim() == 2
        normed = norm_eps is not None and (again or need_x or need_down or need_norm_weight or need_norm_bias)
        ctx.save_for_backward(
            x if x_kept or again else None,
            down_weight if need_x or again or (normed and (need_norm_weight or need_norm_bias)) else None,
            down_bias if again or (normed and need_x) else None,
            up_weight if need_z else None,
            up_bias if need_up_bias or (need_gate and gated_bias) else None,
            gate if need_z or (need_up_bias and gated_bias) else None,
            z if saved else None,
            norm_weight if normed else None,
            norm_bias if normed else None,
            stats if normed else None,
            seed if need_z else None,
        )
        ctx.needs, ctx.weight_dtype, ctx.impl = needs, down_weight.dtype, impl
        ctx.residual_scale = residual_scale
        ctx.options = (activation, scale, residual_scale, residual_is_x, dropout_p)
        return y

    @staticmethod
    @_common.single_backward(_OP)
    def backward(ctx, grad):
        grads = [None] * 8
        if any(ctx.needs):
            computed = _bwd_op(grad, *ctx.saved_tensors, *ctx.options, ctx.needs, ctx.weight_dtype, ctx.impl)
            grads = [g if needed else None for g, needed in zip(computed, ctx.needs, strict=True)]
        added = None
        if any(ctx.needs_input_grad[8:10]):
            added = grad if ctx.residual_scale == 1.0 else grad * ctx.residual_scale
        first, second = (added if needed else None for needed in ctx.needs_input_grad[8:10])
        if first is not None and second is not None:  # two leaves must not share a gradient's memory
            second = second.clone()
        return *grads, first, second, *[None] * 9


# -- the public function ---------------------------------------------------------------------------------------------


def _check_shapes(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual_is_x: bool,
) -> None:
    for name, t in (("down_weight", down_weight), ("up_weight", up_weight)):
        if t.dim() != 2 or t.numel() == 0:
            raise ValueError(f"{_OP}: {name} must be 2-D with no empty side, got shape {tuple(t.shape)}")
    (hidden, inner), out = down_weight.shape, up_weight.shape[0]
    if x.dim() == 0:
        raise ValueError(f"{_OP}: x must be (..., {inner}), got a 0-dimensional tensor")
    if x.shape[-1] != inner:
        raise ValueError(
            f"{_OP}: expected x.shape[-1] == {inner} (down_weight is {hidden} x {inner}), got {x.shape[-1]}"
        )
    if up_weight.shape[1] != hidden:
        raise ValueError(
            f"{_OP}: expected up_weight.shape[1] == {hidden} (down_weight is {hidden} x {inner}), got {up_weight.shape[1]}"
        )
    if down_bias is not None and tuple(down_bias.shape) != (hidden,):
        raise ValueError(f"{_OP}: expected down_bias.shape == ({hidden},), got {tuple(down_bias.shape)}")
    experts = None
    if gate is not None:
        if gate.dim() != x.dim() or gate.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"{_OP}: expected gate.shape == {(*x.shape[:-1], 'E')}, got {tuple(gate.shape)}")
        experts = gate.shape[-1]
        if experts == 0 or hidden % experts:
            raise ValueError(f"{_OP}: expected gate.shape[-1] to divide the {hidden} hidden units, got {experts}")
    if up_bias is not None and tuple(up_bias.shape) not in ((out,), (experts, out)):
        wanted = f"({out},)" if experts is None else f"({out},) or ({experts}, {out})"
        raise ValueError(
            f"{_OP}: expected up_bias.shape == {wanted} (up_weight is {out} x {hidden}"
            f"{', no gate' if experts is None else ''}), got {tuple(up_bias.shape)}"
        )
    if residual_is_x and out != inner:
        raise ValueError(
            f"{_OP}: residual=None adds x, but expected up_weight.shape[0] == {inner} (x's width) then, got {out}; give a "
            "residual of the output's shape, or False for none"
        )
    for name, t in (("norm weight", norm_weight), ("norm bias", norm_bias)):
        if t is not None and tuple(t.shape) != (inner,):
            raise ValueError(f"{_OP}: expected the {name}'s shape == ({inner},) (x's width), got {tuple(t.shape)}")
    for added in (residual, branch):
        if added is not None and tuple(added.shape) != (*x.shape[:-1], out):
            raise ValueError(f"{_OP}: expected residual.shape == {(*x.shape[:-1], out)}, got {tuple(added.shape)}")


def _check_norm(norm: object) -> tuple[Tensor | None, Tensor | None, float | None]:
    """Weight, bias and eps of a norm; all None where there is none."""
    if norm is None:
        return None, None, None
    if not isinstance(norm, tuple) or len(norm) != 3:
        got = f"a tuple of {len(norm)}" if isinstance(norm, tuple) else type(norm).__name__
        raise TypeError(f"{_OP}: norm must be None or a tuple (weight or None, bias or None, eps), got {got}")
    eps = check_number(_OP, "norm's eps", norm[2])
    if eps < 0.0:
        raise ValueError(f"{_OP}: norm's eps must be >= 0, got {eps}")
    return norm[0], norm[1], eps


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str = "gelu",
    scale: float = 1.0,
    residual: Tensor | tuple[Tensor, Tensor] | bool | None = None,
    residual_scale: float = 1.0,
    gate: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""The adapter bottleneck, fused: y = residual_scale * residual + scale * (U drop(act(D a + b_d) * gate) + b_u).

    Houlsby et al. (2019); the form that GIST (arXiv 2312.07255) adds tokens to. a is x, or LayerNorm(x) with a norm, as in
    AdaptFormer (arXiv 2205.13535), whose dropout is this one too. With a gate, experts side by side: E dense experts of
    width h are one adapter of width E h whose units, and output biases, are scaled by the gate.

    Args:
        x: (..., D), float32, bfloat16, float16 or float64, any strides. Weights and biases are of x's dtype, or float32
            beside a half-precision x: then they are rounded to x's dtype inside (the norm's are not: it computes in
            float32), and their gradients are float32.
        down_weight: (H, D), as nn.Linear stores it.
        down_bias: (H,) or None.
        up_weight: (D', H).
        up_bias: (D',) or None; with a gate also (E, D'), then b_u = sum_e gate_e up_bias[e].
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu" or "identity".
        scale: a Python number.
        residual: None adds x itself (D' = D), a tensor (..., D') adds that, a tuple of two adds both (a block's input and
            the branch beside the adapter), False adds nothing.
        residual_scale: a Python number.
        gate: (..., E), E dividing H: the H / E hidden units of expert e are scaled by gate[..., e].
        norm: None, or (weight, bias, eps) of a LayerNorm over the last axis of x, in front of the down projection; weight
            and bias (D,) or None. Statistics are float32 (float64), the variance divides by D. residual=None still adds x
            itself.
        dropout_p: in [0, 1), the share of hidden units that is zeroed while ``training``; the rest is divided by 1 - p.
        training: whether dropout is active.
        seed: int64 tensor of one element on x's device: the same seed gives the same mask in every implementation, forward
            and backward. None draws one from the device's default generator.
        impl: "auto", "triton", "native" or "reference"; see :mod:`fastgist.backends`.

    Returns:
        (..., D') in x's dtype (autocast's, where it is on, as nn.Linear's). Products accumulate in float32; hidden units of
        float16 inputs are kept in float32, so that one above 65504 does no harm where the output fits.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, a scale that is not finite, dropout_p outside [0, 1).
        TypeError: dtypes that differ outside autocast (but for float32 weights), or are not floating point; a norm that is
            no such tuple, a seed that is not int64.
        RuntimeError: an explicit ``impl`` that cannot run here; a second derivative.
    """
    branch = None
    if isinstance(residual, tuple):
        if len(residual) != 2:
            raise TypeError(f"{_OP}: a tuple of residuals must be of two Tensors, got {len(residual)}")
        residual, branch = residual
        _common.check_floating(_OP, "residual[0]", residual)
        _common.check_floating(_OP, "residual[1]", branch)
    if residual is True or (isinstance(residual, (int, float)) and residual is not False):
        raise TypeError(
            f"{_OP}: residual must be None (adds x), a Tensor, a tuple of two or False (adds nothing), got {residual!r}"
        )
    residual_is_x = residual is None or residual is x
    data = {
        "x": x,
        "residual": None if residual_is_x or residual is False else residual,
        "branch": branch,
        "gate": gate,
    }
    norm_weight, norm_bias, norm_eps = _check_norm(norm)
    weights = {"down_weight": down_weight, "down_bias": down_bias, "up_weight": up_weight, "up_bias": up_bias}
    weights |= {"norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, t in (data | weights).items():
        if t is not None or name in ("x", "down_weight", "up_weight"):
            _common.check_floating(_OP, name, t)
    data = dict(zip(data, cast_for_autocast(*data.values()), strict=True))
    x = data["x"]
    if not (x.dtype.itemsize == 2 and all(w is None or w.dtype == torch.float32 for w in weights.values())):
        weights = dict(zip(weights, cast_for_autocast(*weights.values()), strict=True))
        _common.check_same_dtype(_OP, x=x, **weights)
    _common.check_same_dtype(_OP, **data)
    named = data | weights
    _common.check_same_device(_OP, **named)
    _check_shapes(**named, residual_is_x=residual_is_x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{_OP}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    scale = check_number(_OP, "scale", scale)
    residual_scale = check_number(_OP, "residual_scale", residual_scale)
    x, residual, branch, gate = data.values()
    dropout_p, seed = check_dropout(_OP, x, dropout_p, training, seed)
    down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias = weights.values()
    leading, out = x.shape[:-1], up_weight.shape[0]
    rows = math.prod(leading)  # Size.numel() would make a dynamic batch a constant under torch.export
    y = _Adapter.apply(
        x.reshape(rows, x.shape[-1]),
        down_weight,
        down_bias,
        up_weight,
        up_bias,
        None if gate is None else gate.reshape(rows, gate.shape[-1]),
        norm_weight,
        norm_bias,
        None if residual is None else residual.reshape(rows, out),
        None if branch is None else branch.reshape(rows, out),
        seed,
        residual_is_x,
        activation,
        scale,
        residual_scale,
        norm_eps,
        dropout_p,
        torch.is_grad_enabled(),
        impl,
    )
    return y.reshape(*leading, out)
