"""cp_update: schema, fake, checks, dispatch and autograd. The formula is in fastgist/reference/cp_update.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgist import backends
from fastgist.ops import _common, _native_update
from fastgist.ops._low_rank import (
    check_dropout,
    check_low_rank,
    check_matrices,
    check_number,
    check_writable,
    dropout_for,
    empty_unless,
)
from fastgist.reference import cp_update as reference
from fastgist.reference.cp_linear import _of_factors, low_rank_dtype

__all__ = ["cp_update"]

_OP = "cp_update"
_HALF = (torch.float16, torch.bfloat16)


# -- raw ops ---------------------------------------------------------------------------------------------------------
# 2-D throughout: y (M, N), x (M, K), u (K, R), v (n, R), gain (1 or G, R). A seed means that dropout is active. Results that
# were not asked for are empty. Inputs that no wanted gradient needs are None in the backward.


def _run(
    y: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    gain: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    need_h: bool,
    impl: str,
    out: Tensor,
) -> Tensor:
    """Write ``out``, which may be ``y``; the result is h, empty where it is not needed."""
    drop = dropout_for(impl, seed)
    impl = _resolve(impl, x, u.shape[1], max(u.shape[0], y.shape[1]), out.is_contiguous())
    if impl == "reference" or x.numel() == 0:
        h = reference.forward(y, x, u, v, gain, seed, scale, dropout_p, out, drop)
        return empty_unless(h if need_h else None, x)
    h = _empty_h(x, u) if need_h else None
    if impl == "native":
        _native_update.forward(y, x, u, v, gain, seed, scale, dropout_p, out, h)
        return empty_unless(h, x)
    from fastgist_kernels import cp_update as kernels

    kernels.cp_update_fwd(y, x, u, v, gain, seed, scale, dropout_p, _common.tf32_allowed(), out, h)
    return empty_unless(h, x)


def _resolve(impl: str, x: Tensor, rank: int, widest: int, contiguous: bool = True) -> str:
    """The implementation for ``x`` (M, ..) and factors (<= widest, rank). "auto" leaves to plain PyTorch what it is faster at,
    and rows that are not contiguous, which C++ would not write into without a copy. Forward and backward may differ."""
    chosen = backends.resolve(_OP, impl, x)
    if impl == "auto" and chosen == "native" and not (contiguous and _native_update.pays(x, rank, widest)):
        return "reference"
    return chosen


def _empty_h(x: Tensor, u: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], u.shape[1], dtype=low_rank_dtype(x.dtype))


def _fwd(y, x, u, v, gain, seed, scale, dropout_p, need_h, impl):
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    return out, _run(y, x, u, v, gain, seed, scale, dropout_p, need_h, impl, out)


def _fwd_fake(y, x, u, v, gain, seed, scale, dropout_p, need_h, impl):
    h = _fwd_inplace_fake(y, x, u, v, gain, seed, scale, dropout_p, need_h, impl)
    return torch.empty_like(y, memory_format=torch.contiguous_format), h


def _fwd_inplace(y, x, u, v, gain, seed, scale, dropout_p, need_h, impl):
    return _run(y, x, u, v, gain, seed, scale, dropout_p, need_h, impl, y)


def _fwd_inplace_fake(y, x, u, v, gain, seed, scale, dropout_p, need_h, impl):
    backends.resolve(_OP, impl, x)
    return _empty_h(x, u) if need_h else x.new_empty(0)


def _bwd(
    grad: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
    gain: Tensor | None,
    seed: Tensor | None,
    h: Tensor | None,
    folds: int,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, ...]:
    drop = dropout_for(impl, seed)
    need_x, need_u, need_v, need_gain = needs
    inner = x.shape[1] if x is not None else u.shape[0] if u is not None else 0
    impl = _resolve(impl, grad, (h if v is None else v).shape[1], max(inner, grad.shape[1]))
    grads: tuple[Tensor | None, ...]
    if impl == "reference" or grad.numel() == 0 or (x is not None and x.numel() == 0):
        grad_x, *low_rank = reference.backward(
            grad, x, u, v, gain, seed, h, folds, scale, dropout_p, dtype, *needs, drop=drop
        )
        grads = (grad_x, *(None if g is None else g.to(dtype) for g in low_rank))
    elif impl == "native":
        options = (folds, scale, dropout_p, need_x, need_u, need_v or need_gain)
        grad_x, grad_u, outer = _native_update.backward(grad, x, u, v, gain, seed, h, *options)
        low_rank = [grad_u, *_of_factors(outer, v, gain, folds, need_v, need_gain)]
        grads = (grad_x, *(None if g is None else g.to(dtype) for g in low_rank))
    else:
        from fastgist_kernels import cp_update as kernels

        grads = _empty_grads(grad, x, u, v, gain, h, folds, dtype, needs)
        tf32 = _common.tf32_allowed()
        kernels.cp_update_bwd(grad, x, u, v, gain, seed, h, folds, scale, dropout_p, tf32, *grads)
    return tuple(empty_unless(g, grad) for g in grads)


def _empty_grads(grad, x, u, v, gain, h, folds, dtype, needs):
    """Uninitialised gradients of x, in ``grad``'s dtype, and of u, v and gain in ``dtype``; None where not wanted."""
    need_x, need_u, need_v, need_gain = needs
    return (
        grad.new_empty(grad.shape[0], u.shape[0]) if need_x else None,
        grad.new_empty(x.shape[1], v.shape[1], dtype=dtype) if need_u else None,
        grad.new_empty(grad.shape[1] // folds, h.shape[1], dtype=dtype) if need_v else None,
        grad.new_empty(gain.shape, dtype=dtype) if need_gain else None,
    )


def _bwd_fake(grad, x, u, v, gain, seed, h, folds, scale, dropout_p, dtype, needs, impl):
    grads = _empty_grads(grad, x, u, v, gain, h, folds, dtype, needs)
    return tuple(empty_unless(g, grad) for g in grads)


_ARGUMENTS = (
    "Tensor x, Tensor u, Tensor v, Tensor? gain, Tensor? seed, float scale, float dropout_p, bool need_h, str impl"
)
_fwd_op = _common.define(f"cp_update_fwd(Tensor y, {_ARGUMENTS}) -> (Tensor, Tensor)", _fwd, _fwd_fake, _OP)
_fwd_inplace_op = _common.define(
    f"cp_update_fwd_(Tensor(a!) y, {_ARGUMENTS}) -> Tensor", _fwd_inplace, _fwd_inplace_fake, _OP
)
_bwd_op = _common.define(
    "cp_update_bwd(Tensor grad, Tensor? x, Tensor? u, Tensor? v, Tensor? gain, Tensor? seed, Tensor? h, int folds, "
    "float scale, float dropout_p, ScalarType dtype, bool[] needs, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    _OP,
)


class _CPUpdate(torch.autograd.Function):
    """y (..., N) plus the update, into y itself where ``inplace``. Saves x where U is trained, h = drop(x U) (M, R) where V or
    the gain is, and nothing of y: its gradient is the incoming one."""

    @staticmethod
    def forward(ctx, y, x, u, v, gain, seed, scale, dropout_p, record, impl, inplace):
        _, need_x, need_u, need_v, need_gain = _common.needs(ctx, 5, record)
        need_h = need_v or need_gain
        given = (x, u, v, gain, seed, scale, dropout_p, need_h, impl)
        shape = (x.shape[0], y.shape[-1])
        alone = not (inplace and any(_share_memory(y, t) for t in (x, u, v, gain)))
        if not alone:  # autograd would not notice: what a Function saves it saves after the change of y
            x = x.clone() if need_u and _share_memory(y, x) else x
            u, v, gain = (t.clone() if _share_memory(y, t) else t for t in (u, v, gain))
            given = (x, u, v, gain, *given[4:])
        target = _rows_in_place(y, shape) if inplace and alone else None
        if target is not None:
            out, h = y, _fwd_inplace_op(target, *given)
        else:
            out, h = _fwd_op(y.reshape(shape), *given)
            out = out.view(y.shape)
            out = y.copy_(out) if inplace else out
        if inplace:
            ctx.mark_dirty(y)
        through_h = need_x or need_u  # both need dL/dh
        ctx.save_for_backward(
            x if need_u else None,
            u if need_x else None,
            v if through_h or need_gain else None,
            gain if through_h or need_h else None,
            seed if through_h else None,
            h if need_h else None,
        )
        ctx.needs = [need_x, need_u, need_v, need_gain]
        ctx.folds, ctx.dtype = y.shape[-1] // v.shape[0], u.dtype
        ctx.scale, ctx.dropout_p, ctx.impl = scale, dropout_p, impl
        return out

    @staticmethod
    @_common.single_backward(_OP)
    def backward(ctx, grad):
        grads: list[Tensor | None] = [None] * 4
        if any(ctx.needs):
            flat = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
            options = (ctx.folds, ctx.scale, ctx.dropout_p, ctx.dtype, ctx.needs, ctx.impl)
            grads = [g if needed else None for g, needed in zip(
                _bwd_op(flat, *ctx.saved_tensors, *options), ctx.needs, strict=True
            )]  # fmt: skip
        return grad if ctx.needs_input_grad[0] else None, *grads, None, None, None, None, None, None


def _share_memory(y: Tensor, t: Tensor | None) -> bool:
    return t is not None and y.untyped_storage()._cdata == t.untyped_storage()._cdata


def _rows_in_place(y: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """y as a matrix of rows to write to; None where that would be a copy, also of memory that holds -y."""
    if y.is_neg():
        return None
    try:
        return y.view(shape)
    except RuntimeError:
        return None


# -- the public function ---------------------------------------------------------------------------------------------


def _check_shapes(y: Tensor, x: Tensor, u: Tensor, v: Tensor, gain: Tensor | None) -> None:
    check_matrices(_OP, u=u, v=v)
    columns, rank = u.shape
    if columns == 0:
        raise ValueError(f"{_OP}: expected at least 1 input feature, got u of shape {(columns, rank)}")
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"{_OP}: expected x.shape[-1] == {columns} (u is {columns} x {rank}), got x of {tuple(x.shape)}"
        )
    if y.dim() != x.dim() or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"{_OP}: expected y and x to have the same rows, got {tuple(y.shape)} and {tuple(x.shape)}")
    check_low_rank(_OP, u, v, gain, y.shape[-1], "y.shape[-1]", "columns of y")


def _settle_dtypes(
    y: Tensor, x: Tensor, u: Tensor, v: Tensor, gain: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, u, v, gain as they are computed with. Under autocast y's dtype, which its layer chose, is x's too, and factors follow
    it unless they are float32 beside half precision."""
    if _common.autocast_enabled(x.device.type):
        x = x.to(y.dtype)
        if not (y.dtype in _HALF and u.dtype == torch.float32):
            u = u.to(y.dtype)
        v, gain = v.to(u.dtype), None if gain is None else gain.to(u.dtype)
    factors = {"u": u, "v": v, "gain": gain}
    if y.dtype in _HALF and u.dtype == torch.float32:
        _common.check_same_dtype(_OP, y=y, x=x)
        _common.check_same_dtype(_OP, **factors)
    else:
        _common.check_same_dtype(_OP, y=y, x=x, **factors)
    return x, u, v, gain


def _check_in_place(y: Tensor, recorded: bool) -> None:
    if not torch.is_grad_enabled():
        return
    if y.requires_grad and y.is_leaf:
        raise RuntimeError(f"{_OP}: inplace=True, but y is a leaf that requires grad: its value cannot be overwritten")
    if recorded and y._is_view():
        raise RuntimeError(
            f"{_OP}: inplace=True, but y is a view of another tensor, through which autograd would have to go for every "
            "gradient; give the tensor itself, or inplace=False"
        )


def cp_update(
    y: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    gain: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    inplace: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""The low-rank update of a layer that can only be called: y + scale * (drop(x U) * gain) V^T, fused.

    What :func:`cp_linear` adds to its own product, added to the output y = base(x) of any layer: a 4- or 8-bit one, a sharded
    or wrapped one. LoRA (u = A^T, v = B), AdaLoRA (gain = E besides), CP and the Tucker form (v = V S^T) are this expression.
    One read of x, one read and one write of y; no (M, N) temporary.

    Args:
        y: (..., N), float32, bfloat16, float16 or float64, any strides. Its gradient is the incoming one itself.
        x: (..., K), of y's rows and dtype, any strides.
        u: (K, R), R >= 1, of x's dtype; or float32, with v and gain, beside half-precision y and x. Nothing is rounded on the
            way in then: plain PyTorch computes in float32; the kernels, whose products take x's dtype, round a factor as
            they load a tile of it. The factors' gradients are float32.
        v: (n, R) with N = G n: the output's G folds of width n share v.
        gain: None, (R,) shared by all folds, or (G, R), one row a fold.
        scale: a Python number.
        dropout_p: in [0, 1), the share of x u that is zeroed while ``training``; the rest is divided by 1 - p.
        training: whether dropout is active.
        seed: as in :func:`cp_linear`, under the same rule: the same seed gives the same mask.
        inplace: write into y and return it. Autograd counts it as a change of y: a layer that has kept its output for its own
            backward raises there. x and the factors may share y's memory: they are read as they were, and copied for a
            backward. (torch.compile decides by itself where an update is in place.)
        impl: "auto", "triton", "native" or "reference"; see :mod:`fastgist.backends`.

    Returns:
        (..., N) in y's dtype; y itself where ``inplace``. Under autocast x is taken in y's dtype.

    Raises:
        ValueError: shapes that do not fit, a rank of 0, dropout_p outside [0, 1), a scale that is not finite, a y that
            is to be written to and whose elements share memory by its strides.
        TypeError: dtypes that differ outside autocast, or are not floating point; a seed that is not int64.
        RuntimeError: ``inplace`` of a leaf that requires grad, or of a view where gradients are recorded; an explicit ``impl``
            that cannot run here; a second derivative.
    """
    named = {"y": y, "x": x, "u": u, "v": v, "gain": gain}
    for name, t in named.items():
        if t is not None or name != "gain":
            _common.check_floating(_OP, name, t)
    _common.check_same_device(_OP, **named)
    x, u, v, gain = _settle_dtypes(y, x, u, v, gain)
    _check_shapes(y, x, u, v, gain)
    scale = check_number(_OP, "scale", scale)
    dropout_p, seed = check_dropout(_OP, x, dropout_p, training, seed)
    record = torch.is_grad_enabled()
    compiling = torch.compiler.is_compiling()
    if inplace:
        check_writable(_OP, "y", y)
    if inplace and not compiling:
        _check_in_place(y, record and any(t is not None and t.requires_grad for t in (y, x, u, v, gain)))
    if (
        inplace and compiling and u.requires_grad
    ):  # saved as it is now, should it share y's memory; a compiler drops copies
        x = x.clone()
    leading = x.shape[:-1]
    out = _CPUpdate.apply(
        y,
        x.reshape(math.prod(leading), x.shape[-1]),  # Size.numel() would make a dynamic batch a constant
        u,
        v,
        None if gain is None else gain.reshape(-1, gain.shape[-1]),
        seed,
        scale,
        dropout_p,
        record,
        impl,
        inplace and not compiling,
    )
    return y.copy_(out) if inplace and compiling else out
