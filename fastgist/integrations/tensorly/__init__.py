r"""tensorly: mode approximation that starts from what the pre-trained weights hold.

The matrices of a group, stacked to a tensor (in x out x matrices), are decomposed as their update will be formed:

.. math:: W_m \approx U\, \mathrm{diag}(\lambda \odot P_m)\, V^T \quad (\text{CP}) \qquad
    W_m \approx U\, (C \times_3 p_m)\, V^T \quad (\text{Tucker})
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac, tucker
from torch import Tensor, nn

from fastgist.nn import CPFactors, CPLinear
from fastgist.nn._quantised import can_train
from fastgist.peft.quantised import dequantised

__all__ = ["init_from_weights"]

#: Keeps ALS solvable where the weights are of a lower rank than was asked for.
RIDGE = 1e-10
#: A mode of less than this share of the largest is drawn as usual: it would hardly get a gradient.
LEAST = 1e-3


@torch.no_grad()
def init_from_weights(layers: Mapping[str, nn.Module], iterations: int = 100) -> None:
    """Give the factors of ``layers`` the U, P and lambda (or C) of a decomposition of their weights, and V = 0.

    So the start is exactly the identity, and what the update reads of its input are the directions that the weights read.
    V as decomposed would be no identity: the weights would have to give up as much, and they are frozen.

    The scale is the usual draw's, so that learning rates carry over: columns of U and of P have the norm that a drawn one
    has on average, lambda has mean square 1 as ones have (C: the norm of a drawn one). What is taken over is directions,
    each matrix's shares, and the modes' relative sizes. Signs are arbitrary.

    Both sides are first projected to the rank's leading singular directions over all matrices (from sums of W W^T and of
    W^T W, in float64), then tensorly decomposes the small tensor that is left, by ALS ("cp") or HOOI ("tucker"). ALS starts
    at random: equal under equal ``torch.manual_seed``. In Tucker form with fewer matrices than rank, or with a rank above a
    width, the rest of P, C and U stays as drawn.

    No published weights were at hand, and no task has been trained from it yet.

    Weights that bitsandbytes or torchao quantised are read as what their layer multiplies by, one at a time.

    Args:
        layers: :class:`fastgist.nn.CPLinear` by path; others are left alone. Folds without a mode are not read.
        iterations: of ALS.

    Raises:
        TypeError: a weight that is neither dense floating point nor one whose dense form is known (other packages').
        ValueError: a core other than "cp" and "tucker", weights that are not finite, all zero or on the meta device.
    """
    groups: dict[CPFactors, dict[str, CPLinear]] = {}
    for path, layer in layers.items():
        if isinstance(layer, CPLinear):
            groups.setdefault(layer.factors, {})[path] = layer
    for factors, members in groups.items():
        if factors.core not in ("cp", "tucker"):
            raise ValueError(f"init_from_weights: core must be one of cp, tucker, got {factors.core!r}")
        left, small = _compressed(factors, members)
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            if factors.core == "cp":
                _start_cp(factors, left, small, iterations)
            else:
                _start_tucker(factors, left, small)
        nn.init.zeros_(factors.v)


def _matrices(path: str, layer: CPLinear) -> Iterator[tuple[int, Tensor]]:
    """(mode, matrix (K, n) in float64) of each fold of a layer that has a mode."""
    base = layer.base_layer
    weight = dequantised(base)
    weight = getattr(base, "weight", None) if weight is None else weight
    transposed = hasattr(base, "nx")  # transformers' Conv1D stores (in, out)
    sizes = (layer.in_features, layer.out_features)
    stored = sizes if transposed else sizes[::-1]
    if not (isinstance(weight, Tensor) and can_train(weight) and tuple(weight.shape) == stored):
        raise TypeError(
            f"init_from_weights: {path}: expected a dense floating-point weight of shape {stored}, or one that bitsandbytes "
            f"or torchao quantised, got {type(base).__name__}; init='identity' needs no weights"
        )
    if weight.is_meta:
        raise ValueError(f"init_from_weights: {path}: its weight is on the meta device, and holds nothing yet")
    modes = (layer.mode,) if isinstance(layer.mode, int) else layer.mode
    whole = weight.detach().to("cpu" if weight.device.type == "mps" else weight.device, torch.float64)
    if not bool(whole.isfinite().all()):
        raise ValueError(f"init_from_weights: {path}: its weight is not finite")
    whole = whole if transposed else whole.T
    for mode, matrix in zip(modes, whole.chunk(len(modes), dim=0 if layer.inward else 1), strict=True):
        if mode is not None:
            yield mode, matrix


def _compressed(factors: CPFactors, members: Mapping[str, CPLinear]) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (K, r) of the inputs, and the tensor (r, r', M) of what the weights do between it and one of the
    outputs, of norm 1; on the CPU."""

    def matrices() -> Iterator[tuple[int, Tensor]]:
        for path, layer in members.items():
            yield from _matrices(path, layer)

    inner = outer = torch.zeros(())
    for _, matrix in matrices():
        inner, outer = matrix @ matrix.T + inner.to(matrix.device), matrix.T @ matrix + outer.to(matrix.device)
    left, right = (torch.linalg.eigh(square)[1].flip(1)[:, : factors.rank].contiguous() for square in (inner, outer))
    small = torch.zeros(left.shape[1], right.shape[1], factors.modes, dtype=torch.float64)
    for mode, matrix in matrices():
        small[:, :, mode] = (left.T.to(matrix.device) @ matrix @ right.to(matrix.device)).cpu()
    norm = torch.linalg.vector_norm(small)
    if norm == 0:
        raise ValueError(f"init_from_weights: the weights of {', '.join(members)} are all zero")
    return left.cpu(), small / norm


def _start_cp(factors: CPFactors, left: Tensor, small: Tensor, iterations: int) -> None:
    rank = factors.rank
    drawn = [torch.randn(size, rank, dtype=torch.float64) for size in small.shape]
    start = CPTensor((torch.ones(rank, dtype=torch.float64), drawn))
    # tol=None: always so many iterations, and no error to compute
    _, (a, b, p) = parafac(small, rank, n_iter_max=iterations, init=start, tol=None, l2_reg=RIDGE)
    sizes = [torch.linalg.vector_norm(side, dim=0) for side in (a, b, p)]
    weights = sizes[0] * sizes[1] * sizes[2]
    held = weights > LEAST * weights.max()
    u, profile = left @ a / sizes[0] * _norm_of_u(), p / sizes[2] * _norm_of_p(factors)
    factors.u.copy_(torch.where(held, u.to(factors.u), factors.u))
    factors.p.copy_(torch.where(held, profile.to(factors.p), factors.p))
    lam = weights / weights[held].square().mean().sqrt()
    factors.lam.copy_(torch.where(held, lam.to(factors.lam), factors.lam))


def _start_tucker(factors: CPFactors, left: Tensor, small: Tensor) -> None:
    ranks = [min(size, factors.rank) for size in small.shape]
    core, (a, _, p) = tucker(small, ranks, init="svd")
    rows, columns, depth = core.shape
    scale = torch.linalg.vector_norm(factors.c[:rows, :columns, :depth]).to(core) / torch.linalg.vector_norm(core)
    factors.u[:, :rows] = (left @ a * _norm_of_u()).to(factors.u)
    factors.p[:, :depth] = (p * _norm_of_p(factors)).to(factors.p)
    factors.c[:rows, :columns, :depth] = (core * scale).to(factors.c)


def _norm_of_u() -> float:
    """Of a drawn column on average: K numbers of variance 1 / (3 K)."""
    return (1 / 3) ** 0.5


def _norm_of_p(factors: CPFactors) -> float:
    """Of a drawn column on average: M numbers of xavier_uniform's variance, 2 / (M + R)."""
    return (2 * factors.modes / (factors.modes + factors.rank)) ** 0.5
