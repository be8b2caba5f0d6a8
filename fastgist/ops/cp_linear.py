"""cp_linear: schema, fake, checks, dispatch and autograd. The formula is in fastgist/reference/cp_linear.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastgist import backends
from fastgist.ops import _common, _few_rows, _native_update
from fastgist.ops._low_rank import (
    cast_for_autocast,
    check_dropout,
    check_low_rank,
    check_matrices,
    check_number,
    dropout_for,
    empty_unless,
)
from fastgist.reference import cp_linear as reference
from fastgist.reference._numerics import half_in_float32
from fastgist.reference.cp_linear import low_rank_dtype

__all__ = ["cp_linear"]

_OP = "cp_linear"


# -- raw ops ---------------------------------------------------------------------------------------------------------
# 2-D throughout: x (M, K), weights (N_i, K) one above the other, biases one each or none at all, u (K, R), v (n, R), gain
# (1 or G, R). y is a piece (M, N_i) for each weight, or (M, N) as the only one where Triton wrote it. A seed means that
# dropout is active. Results that were not asked for are empty. Inputs that no wanted gradient needs are None (no weights)
# in the backward.


def _fwd(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    u: Tensor,
    v: Tensor,
    gain: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    need_h: bool,
    impl: str,
) -> tuple[list[Tensor], Tensor]:
    drop = dropout_for(impl, seed)
    impl = _resolve(impl, x, u.shape[1], max(weights[0].shape), len(weights))
    if impl != "triton" or x.numel() == 0:
        update = _native_update.forward if impl == "native" and x.numel() else None
        ys, h = reference.forward(x, weights, biases, u, v, gain, seed, scale, dropout_p, need_h, drop, update)
        return [torch.cat(ys, 1)] if impl == "triton" else ys, empty_unless(h if need_h else None, x)
    from fastgist_kernels import cp_linear as kernels

    y = x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))
    h = _empty_h(x, u) if need_h else None
    tf32 = _common.tf32_allowed()
    kernels.cp_linear_fwd(x, weights, biases, u, v, gain, seed, scale, dropout_p, tf32, y, h)
    return [y], empty_unless(h, x)


def _resolve(impl: str, a: Tensor, rank: int, widest: int, weights: int) -> str:
    """The implementation for products with ``a`` (M, ..) and factors (<= widest, rank). "auto" leaves to plain PyTorch what it
    is faster at, and several weights, for each of which C++ forms x U, or dL/dh, again. Forward and backward may differ."""
    chosen = backends.resolve(_OP, impl, a)
    if impl == "auto" and chosen == "native" and not (weights == 1 and _native_update.pays(a, rank, widest)):
        return "reference"
    return chosen


def _empty_h(x: Tensor, u: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], u.shape[1], dtype=low_rank_dtype(x.dtype))


def _fwd_fake(x, weights, biases, u, v, gain, seed, scale, dropout_p, need_h, impl):
    sizes = [w.shape[0] for w in weights]
    widths = [sum(sizes)] if backends.resolve(_OP, impl, x) == "triton" else sizes
    return [x.new_empty(x.shape[0], n) for n in widths], empty_unless(_empty_h(x, u) if need_h else None, x)


def _bwd(
    grads: list[Tensor],
    x: Tensor | None,
    weights: list[Tensor],
    u: Tensor | None,
    v: Tensor | None,
    gain: Tensor | None,
    seed: Tensor | None,
    h: Tensor | None,
    folds: int,
    scale: float,
    dropout_p: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, ...]:
    first = grads[0]
    drop = dropout_for(impl, seed)
    low = next((t.shape[1] for t in (v, h) if t is not None), 0)
    inner = max((t.shape[1] for t in (x, *weights) if t is not None), default=0)
    impl = _resolve(impl, first, low, max(inner, first.shape[1]), len(grads))
    need_x, need_u, need_v, need_gain = needs[:4]
    of_weights, of_biases = _of_base(grads, needs)
    grad_weight = _of_weights(of_weights, x) if of_weights else None
    sums = [g.sum(0) for g in of_biases]
    grad_bias = torch.cat(sums) if len(sums) > 1 else next(iter(sums), None)
    wanted = (need_x, need_u, need_v, need_gain)
    empty = all(g.numel() == 0 for g in grads) or (x is not None and x.numel() == 0)
    if impl == "native" and not empty:
        found = _bwd_in_cpp(grads, x, weights, u, v, gain, seed, h, folds, scale, dropout_p, *wanted)
    elif impl != "triton" or empty:
        found = reference.backward(grads, x, weights, u, v, gain, seed, h, folds, scale, dropout_p, *wanted, drop)
    elif any(wanted):
        from fastgist_kernels import cp_linear_bwd as kernels

        found = _empty_grads(grads, x, weights, v, gain, h, folds, wanted)
        tf32 = _common.tf32_allowed()
        kernels.cp_linear_bwd(grads, x, weights, u, v, gain, seed, h, folds, scale, dropout_p, tf32, *found)
    else:
        found = (None, None, None, None)
    grad_x, grad_u, grad_v, grad_gain = found
    return tuple(empty_unless(g, first) for g in (grad_x, grad_weight, grad_bias, grad_u, grad_v, grad_gain))


def _of_base(grads: list[Tensor], needs: list[bool]) -> tuple[list[Tensor], list[Tensor]]:
    """The incoming gradients of the weights, and those of the biases, that are trained: behind the four of x, u, v and gain,
    ``needs`` has a flag for each."""
    flags = needs[4:]
    of_weights, of_biases = flags[: len(grads)], flags[len(grads) :]
    return [g for g, n in zip(grads, of_weights, strict=True) if n], [
        g for g, n in zip(grads, of_biases, strict=True) if n
    ]


def _of_weights(grads: list[Tensor], x: Tensor) -> Tensor:
    """(dy_1 | dy_2 | ...)^T x, (N, K)."""
    out = x.new_empty(sum(g.shape[1] for g in grads), x.shape[1])
    for rows, grad in zip(out.split([g.shape[1] for g in grads]), grads, strict=True):
        torch.mm(grad.transpose(0, 1), x, out=rows)
    return out


@half_in_float32(narrowed=slice(0, None))
def _bwd_in_cpp(
    grads, x, weights, u, v, gain, seed, h, folds, scale, dropout_p, need_x, need_u, need_v, need_gain
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """:func:`fastgist.reference.cp_linear.backward`, what the factors ask of it in C++."""
    sizes, dtype = [g.shape[1] for g in grads], grads[0].dtype
    whole = need_x and reference.dx_merges(grads, weights[0], u, seed, need_u)
    low_x, need_outer = need_x and not whole, need_v or need_gain
    grad_x = grad_u = None
    outers = []
    pieces = [(v, gain)] * len(grads) if v is None else reference._pieces(sizes, v, gain)
    for i, (grad, (own, its)) in enumerate(zip(grads, pieces, strict=True)):
        if sizes[i] == 0:
            continue
        later = grad_x is not None
        if (low_x and not later) or need_u or need_outer:
            own_folds = folds if own is None else reference._folds(sizes[i], own)
            options = (own_folds, scale, dropout_p, low_x and not later, need_u, need_outer)
            low, of_u, outer = _native_update.backward(grad, x, u, own, its, seed, h, *options)
            grad_x = low if low is not None else grad_x
            grad_u = of_u if grad_u is None or of_u is None else grad_u.add_(of_u)
            outers.append(outer)
        if need_x:
            used = reference._merge(weights[i], u, own, its, scale) if whole else weights[i]
            grad_x = reference._plus_product(grad_x, grad, used)
        if low_x and later:
            _native_update.add_to_dx(grad_x, grad, u, own, its, seed, scale, dropout_p)
    outer = None if not need_outer else outers[0] if len(outers) == 1 else torch.cat(outers)
    grad_v, grad_gain = reference._of_factors(outer, v, gain, folds, need_v, need_gain)
    grad_u, grad_v, grad_gain = (None if g is None else g.to(dtype) for g in (grad_u, grad_v, grad_gain))
    return grad_x, grad_u, grad_v, grad_gain


def _empty_grads(grads, x, weights, v, gain, h, folds, wanted):
    """Uninitialised gradients of x, u, v and gain in the incoming ones' dtype; None where not wanted."""
    grad, columns = grads[0], sum(g.shape[1] for g in grads)
    need_x, need_u, need_v, need_gain = wanted
    return (
        grad.new_empty(grad.shape[0], weights[0].shape[1]) if need_x else None,
        grad.new_empty(x.shape[1], v.shape[1]) if need_u else None,
        grad.new_empty(columns // folds, h.shape[1]) if need_v else None,
        grad.new_empty(gain.shape) if need_gain else None,
    )


def _bwd_fake(grads, x, weights, u, v, gain, seed, h, folds, scale, dropout_p, needs, impl):
    found = _empty_grads(grads, x, weights, v, gain, h, folds, needs[:4])
    like, (of_weights, of_biases) = grads[0], _of_base(grads, needs)
    grad_weight = like.new_empty(sum(g.shape[1] for g in of_weights), x.shape[1]) if of_weights else None
    grad_bias = like.new_empty(sum(g.shape[1] for g in of_biases)) if of_biases else None
    return tuple(empty_unless(g, like) for g in (found[0], grad_weight, grad_bias, *found[1:]))


_fwd_op = _common.define(
    "cp_linear_fwd(Tensor x, Tensor[] weights, Tensor[] biases, Tensor u, Tensor v, Tensor? gain, Tensor? seed, "
    "float scale, float dropout_p, bool need_h, str impl) -> (Tensor[], Tensor)",
    _fwd,
    _fwd_fake,
    _OP,
)
_bwd_op = _common.define(
    "cp_linear_bwd(Tensor[] grads, Tensor? x, Tensor[] weights, Tensor? u, Tensor? v, Tensor? gain, Tensor? seed, Tensor? h, "
    "int folds, float scale, float dropout_p, bool[] needs, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    _OP,
)


class _CPLinear(torch.autograd.Function):
    """y (M, N), of several weights as a piece for each, columns of one matrix. Saves x where U or a base weight is trained,
    h = drop(x U) (M, R) where V or the gain is.

    ``base`` is ``count`` weights and as many biases or none, behind which a None may stand.
    """

    @staticmethod
    def forward(ctx, x, u, v, gain, seed, scale, dropout_p, record, impl, count, *base):
        if not torch.compiler.is_compiling():  # which knows no gradient that is missing
            ctx.set_materialize_grads(False)
        need_x, need_u, need_v, need_gain = _common.needs(ctx, 4, record)
        first = len(ctx.needs_input_grad) - len(base)
        of_base = [record and need for need in ctx.needs_input_grad[first:]]
        ctx.of_base = of_base[:count], [*of_base[count:], *[False] * count][:count]  # weights, biases
        base = [t for t in base if t is not None]  # see _base_arguments
        need_weight = any(of_base[:count])
        need_h = need_v or need_gain
        weights, biases = list(base[:count]), list(base[count:])
        ys, h = _fwd_op(x, weights, biases, u, v, gain, seed, scale, dropout_p, need_h, impl)
        through_h = need_x or need_u  # both need dL/dh
        ctx.save_for_backward(
            x if need_u or need_weight else None,
            u if need_x else None,
            v if through_h or need_gain else None,
            gain if through_h or need_h else None,
            seed if through_h else None,
            h if need_h else None,
            *(weights if need_x else ()),
        )
        ctx.needs = [need_x, need_u, need_v, need_gain]
        ctx.rows = [w.shape[0] for w in weights]
        ctx.folds = sum(ctx.rows) // v.shape[0]
        ctx.scale, ctx.dropout_p, ctx.impl = scale, dropout_p, impl
        if count == 1:
            return ys[0]
        return tuple(ys) if len(ys) == count else ys[0].split(ctx.rows, 1)  # autograd's split would join the dL/dy

    @staticmethod
    @_common.single_backward(_OP)
    def backward(ctx, *grads):
        x, u, v, gain, seed, h, *weights = ctx.saved_tensors
        used = [i for i, g in enumerate(grads) if g is not None]
        if not any(grads[i].shape[1] for i in used):
            return (None,) * len(ctx.needs_input_grad)
        folds, of_v, of_gain = ctx.folds, None, None
        if len(used) < len(grads):  # as if the weights whose results nobody used were not there
            each = [rows * folds // sum(ctx.rows) for rows in ctx.rows]
            of_v = ctx.rows if folds == 1 else None
            of_gain = each if gain is not None and gain.shape[0] > 1 else None
            folds = max(1, sum(each[i] for i in used))
            v, gain = _taken(v, of_v, used), _taken(gain, of_gain, used)
            weights = [weights[i] for i in used if weights]
        # Weights, and biases, that are trained and whose results were used.
        trained = [[i for i in used if flags[i]] for flags in ctx.of_base]
        needs = [*ctx.needs, *(i in some for some in trained for i in used)]
        options = (folds, ctx.scale, ctx.dropout_p, needs, ctx.impl)
        found = _bwd_op([grads[i] for i in used], x, weights, u, v, gain, seed, h, *options)
        of_inputs = [g if needed else None for g, needed in zip((found[0], *found[3:]), ctx.needs, strict=True)]
        grad_x, grad_u, grad_v, grad_gain = of_inputs
        of_base = []
        for grad, some in zip(found[1:3], trained, strict=True):
            each = dict(zip(some, grad.split([ctx.rows[i] for i in some]), strict=True)) if some else {}
            of_base += [each.get(i) for i in range(len(grads))]
        low_rank = grad_u, _put_back(grad_v, of_v, used), _put_back(grad_gain, of_gain, used)
        return grad_x, *low_rank, *(None,) * 6, *[*of_base, None][: len(ctx.needs_input_grad) - 10]


def _taken(t: Tensor | None, counts: list[int] | None, used: list[int]) -> Tensor | None:
    """Of ``t``, parts of ``counts`` rows, those that are ``used``; all of it where nothing is counted."""
    if t is None or counts is None:
        return t
    parts = t.split(counts)
    return torch.cat([parts[i] for i in used])


def _put_back(t: Tensor | None, counts: list[int] | None, used: list[int]) -> Tensor | None:
    """What :func:`_taken` took, zeros where the others were."""
    if t is None or counts is None:
        return t
    out = t.new_zeros(sum(counts), t.shape[1])
    parts = out.split(counts)
    for i, rows in zip(used, t.split([counts[i] for i in used]), strict=True):
        parts[i].copy_(rows)
    return out


def _base_arguments(*base: Tensor) -> tuple[Tensor | None, ...]:
    """``base``, with a None behind two: torch 2.11, compiling where gradients are off, leaves ctx out of a forward that gets
    as many arguments as it names, ctx and ``*base`` counted as one each."""
    return (*base, None) if len(base) == 2 else base


# -- the public function ---------------------------------------------------------------------------------------------


def _base(weight: Any, bias: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base layer's weights and biases (of which there may be none) by what an error calls them: ``weight``, or
    ``weight[0]`` and so on for a sequence."""
    if isinstance(weight, Tensor) or not isinstance(weight, Sequence):
        return {"weight": weight}, {} if bias is None else {"bias": bias}
    if isinstance(bias, Tensor):
        raise TypeError(
            f"{_OP}: several weights take a sequence of biases, or None, got one Tensor {tuple(bias.shape)}"
        )
    biases = [] if bias is None else list(bias)
    if not weight or len(biases) not in (0, len(weight)):
        raise ValueError(
            f"{_OP}: expected several weights and a bias for each, or None for all, got {len(weight)} weights and "
            f"{len(biases)} biases"
        )
    return {f"weight[{i}]": w for i, w in enumerate(weight)}, {f"bias[{i}]": b for i, b in enumerate(biases)}


def _check_shapes(
    x: Tensor, weights: dict[str, Tensor], biases: dict[str, Tensor], u: Tensor, v: Tensor, gain: Tensor | None
) -> None:
    check_matrices(_OP, **weights, u=u, v=v)
    first, *others = weights.items()
    rows, columns = first[1].shape
    for name, t in others:
        if t.shape[1] != columns:
            raise ValueError(f"{_OP}: expected {name}.shape[1] == {columns} (as {first[0]}'s), got {t.shape[1]}")
        rows += t.shape[0]
    if columns == 0:
        raise ValueError(f"{_OP}: expected at least 1 input feature, got weight of shape {(rows, columns)}")
    if x.dim() == 0:
        raise ValueError(f"{_OP}: x must be (..., {columns}), got a 0-dimensional tensor")
    if x.shape[-1] != columns:
        raise ValueError(f"{_OP}: expected x.shape[-1] == {columns} (weight is {rows} x {columns}), got {x.shape[-1]}")
    for (name, t), weight in zip(biases.items(), weights.values(), strict=False):
        if tuple(t.shape) != weight.shape[:1]:
            raise ValueError(
                f"{_OP}: expected {name}.shape == ({weight.shape[0]},) (weight is {weight.shape[0]} x {columns}), got "
                f"{tuple(t.shape)}"
            )
    if u.shape[0] != columns:
        raise ValueError(f"{_OP}: expected u.shape[0] == {columns} (weight is {rows} x {columns}), got {u.shape[0]}")
    check_low_rank(_OP, u, v, gain, rows, "weight.shape[0]", "rows of weight")
    for name, t in weights.items() if others and v.shape[0] != rows else ():
        if t.shape[0] % v.shape[0]:
            raise ValueError(
                f"{_OP}: expected {name}.shape[0] to be a multiple of v.shape[0] == {v.shape[0]}, or a row of v for each of "
                f"all {rows} rows, got {t.shape[0]}"
            )


@overload
def cp_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    gain: Tensor | None = ...,
    *,
    scale: float = ...,
    dropout_p: float = ...,
    training: bool = ...,
    seed: Tensor | None = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def cp_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    u: Tensor,
    v: Tensor,
    gain: Tensor | None = ...,
    *,
    scale: float = ...,
    dropout_p: float = ...,
    training: bool = ...,
    seed: Tensor | None = ...,
    impl: str = ...,
) -> tuple[Tensor, ...]: ...


def cp_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None,
    u: Tensor,
    v: Tensor,
    gain: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    r"""A linear layer plus a low-rank update: y = x W^T + b + scale * (drop(x U) * gain) V^T, fused.

    PETAL's CP form of the update (arXiv 2312.12458, after Aurora, 2305.08381), in which all adapted layers share U and V
    and differ in their gain. LoRA (u = A^T, v = B), AdaLoRA and the Tucker form (v = V S^T) are the same expression.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64, any strides.
        weight: (N, K), as nn.Linear stores it. It gets a gradient only if it requires one; nothing is kept for it else.
            A sequence of weights (N_i, K) is several layers with one input, such as q, k and v: x u is formed once, under one
            mask, and the result is a tuple. It is as if they stood one above the other, N = sum N_i.
        bias: (N,) or None; of several weights one for each, or None.
        u: (K, R), R >= 1.
        v: (n, R) with N = G n: the output's G folds of width n share v.
        gain: None, (R,) shared by all folds, or (G, R), one row a fold:
            y[..., g n + j] = (x W^T + b)[g n + j] + scale * sum_r drop(x u)_r gain[g, r] v[j, r].
        scale: a Python number.
        dropout_p: in [0, 1), the share of x u that is zeroed while ``training``; the rest is divided by 1 - p.
        training: whether dropout is active.
        seed: int64 tensor of one element on x's device: the same seed gives the same mask in every implementation, forward
            and backward. None draws one from the device's default generator.
        impl: "auto", "triton", "native" (on CPUs: products by PyTorch, the update in C++) or "reference"; see
            :mod:`fastgist.backends`.

    Returns:
        (..., N), of several weights (..., N_i) each, in x's dtype (autocast's, where it is on, as nn.Linear's). Products
        accumulate in float32. x u is kept in float32 for float16 inputs, so that a rank unit above 65504 does no harm where
        the output fits.

    Raises:
        ValueError: shapes that do not fit, a rank of 0, dropout_p outside [0, 1), a scale that is not finite.
        TypeError: dtypes that differ outside autocast, or are not floating point; a seed that is not int64.
        RuntimeError: an explicit ``impl`` that cannot run here; a second derivative, but of a few float32 rows on a CPU,
            where "auto" leaves the formula to PyTorch's autograd.
    """
    if impl == "auto" and seed is None:
        few = _few_rows.cp_linear(x, weight, bias, u, v, gain, scale, dropout_p, training)
        if few is not None:
            return few
    weights, biases = _base(weight, bias)
    named = {"x": x, **weights, **biases, "u": u, "v": v, "gain": gain}
    for name, t in named.items():
        if t is not None or name != "gain":
            _common.check_floating(_OP, name, t)
    named = dict(zip(named, cast_for_autocast(*named.values()), strict=True))
    _common.check_same_dtype(_OP, **named)
    _common.check_same_device(_OP, **named)
    weights, biases = ({name: named[name] for name in pieces} for pieces in (weights, biases))
    x, u, v, gain = (named[name] for name in ("x", "u", "v", "gain"))
    _check_shapes(x, weights, biases, u, v, gain)
    scale = check_number(_OP, "scale", scale)
    dropout_p, seed = check_dropout(_OP, x, dropout_p, training, seed)
    leading = x.shape[:-1]
    y = _CPLinear.apply(
        x.reshape(math.prod(leading), x.shape[-1]),  # Size.numel() would make a dynamic batch a constant
        u,
        v,
        None if gain is None else gain.reshape(-1, gain.shape[-1]),
        seed,
        scale,
        dropout_p,
        torch.is_grad_enabled(),
        impl,
        len(weights),
        *_base_arguments(*weights.values(), *biases.values()),
    )
    pieces = tuple(piece.reshape(*leading, piece.shape[1]) for piece in (y if isinstance(y, tuple) else (y,)))
    return pieces[0] if isinstance(weight, Tensor) else pieces
