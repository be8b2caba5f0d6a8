r"""Mode approximation (PETAL, arXiv 2312.12458; Aurora, arXiv 2305.08381): one set of factors for many weights.

The updates of all adapted matrices form a 3-mode tensor (in x out x matrices), given a low rank:

.. math::
    \Delta W_m = U\, \mathrm{diag}(\lambda \odot P_m)\, V^T \quad (\text{CP}) \qquad
    \Delta W_m = U S_m V^T,\; S_m = C \times_3 p_m \quad (\text{Tucker}) \qquad S_m\ \text{free} \quad (\text{tensor train})

U (in, R) and V (out, R) are shared by all layers; only row m of P belongs to one matrix. The tensor train and the Tucker
form over all of a transformer's matrices are FacT (arXiv 2212.03145). V starts at zero, so a fresh layer is the layer
it wraps: the papers' own initialisation already is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastgist import functional
from fastgist.nn._checks import check_dropout, check_number, check_one_of, check_place, check_positive
from fastgist.nn._tuner import (
    Factors,
    TunerLinear,
    is_hooked,
    uniform_fan_in_,
)
from fastgist.nn.threshold import CPThreshold, delta_norms, full_precision, mode_energies

__all__ = ["CPFactors", "CPLinear", "cp_together", "joint_mode", "update_thresholds"]

CORES = ("cp", "tucker", "tt")
Mode = int | tuple[int | None, ...]


class CPFactors(nn.Module):
    """The factors that all layers of a group share. Layers reach them through :meth:`forward`, so that a sharding or
    hooking wrapper around this module sees every use. The call returns parameters themselves: under FSDP2 shard this
    module before the blocks and with ``reshard_after_forward=False``.

    Args:
        in_features: K of the adapted matrices.
        out_features: n, the width of one fold of their outputs (768 for a fused 2304-wide qkv of three folds).
        rank: R.
        modes: how many matrices (folds) there are, M.
        core: "cp" (the paper's; a trained lambda shared by all matrices), "tucker" (the released code's R^3 core) or "tt"
            (an R x R matrix for each mode, in p's place).
        dropout: rate on ``x U`` in training, one mask a layer call.
        threshold: a :class:`fastgist.nn.CPThreshold` of its own, or None: updates pass as they are.
        device, dtype: of the parameters.

    Parameters: ``u`` (K, R) ~ U(-1/sqrt(K), 1/sqrt(K)), ``v`` (n, R) zero, ``p`` (M, R) xavier_uniform, and ``lam``
    (R,) ones or ``c`` (R, R, R) xavier_uniform. For "tt" ``s`` (M, R, R) ~ U(-1/sqrt(R), 1/sqrt(R)) instead of p.

    Raises:
        ValueError: a size that is not positive, an unknown core, a dropout outside [0, 1), a threshold that other factors
            have.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        modes: int,
        core: str = "cp",
        dropout: float = 0.0,
        *,
        threshold: CPThreshold | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_one_of("CPFactors", "core", core, CORES)
        self.in_features = check_positive("CPFactors", "in_features", in_features)
        self.out_features = check_positive("CPFactors", "out_features", out_features)
        self.rank = check_positive("CPFactors", "rank", rank)
        self.modes = check_positive("CPFactors", "modes", modes)
        self.core = core
        self.dropout = check_dropout("CPFactors", dropout)
        kwargs = check_place("CPFactors", device, dtype)
        self.u = nn.Parameter(torch.empty(in_features, rank, **kwargs))
        self.v = nn.Parameter(torch.empty(out_features, rank, **kwargs))
        if core == "tt":
            self.s = nn.Parameter(torch.empty(modes, rank, rank, **kwargs))
        else:
            self.p = nn.Parameter(torch.empty(modes, rank, **kwargs))
        if core == "cp":
            self.lam = nn.Parameter(torch.empty(rank, **kwargs))
        elif core == "tucker":
            self.c = nn.Parameter(torch.empty(rank, rank, rank, **kwargs))
        if threshold is not None:
            if not isinstance(threshold, CPThreshold):
                raise TypeError(f"CPFactors: threshold must be a CPThreshold or None, got {type(threshold).__name__}")
            threshold.bind(modes, self.u.device, self.u.dtype)
        self.threshold = threshold
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all factors anew; V = 0, so every update is zero."""
        if self.threshold is not None:
            self.threshold.reset()
        uniform_fan_in_(self.u, self.in_features)
        nn.init.zeros_(self.v)
        if self.core == "tt":
            uniform_fan_in_(self.s, self.rank)
        else:
            nn.init.xavier_uniform_(self.p)
        if self.core == "cp":
            nn.init.ones_(self.lam)
        elif self.core == "tucker":
            nn.init.xavier_uniform_(self.c)

    @overload
    def forward(self, mode: Mode, inward: bool = False) -> Factors: ...
    @overload
    def forward(self, mode: list[Mode], inward: bool = False) -> list[Factors]: ...

    def forward(self, mode: Mode | list[Mode], inward: bool = False) -> Factors | list[Factors]:
        """The factors of matrix ``mode``; a tuple gives one mode a fold (None: no update of that fold).

        Args:
            mode: row or rows of p (of s for "tt"). A list of them gives a list, all from one product.
            inward: the folds are of the input, G K wide (a 3072 -> 768 layer is four matrices side by side), not of the
                output.

        Returns:
            u (K, R), v and gain. CP: v (n, R), gain (G, R). Else the core is folded into v, (G n, R), gain None. Inward,
            gain and core are folded into u, (G K, R), and v is (n, R).

        Raises:
            IndexError: a mode out of range, or none.
        """
        given = mode if isinstance(mode, list) else [mode]
        modes = [m if isinstance(m, tuple) else (m,) for m in given]
        rows = tuple(row for m in modes for row in m)
        if not rows or not all(row is None or 0 <= row < self.modes for row in rows):
            raise IndexError(f"CPFactors: modes must be in 0..{self.modes - 1}, got {mode}")
        if self.threshold is None:
            core = self._core(_rows(self._table, rows, 0.0))
        else:
            with full_precision(self.u):  # as that which Gamma came from
                core = self._core(_rows(self._table, rows, 0.0))
                core = self.threshold(self.u, self.v, core, _rows(self.threshold.weight_norms, rows, math.inf))
        if self.core == "cp":
            product = self.u * core[:, None] if inward else core
        elif inward:
            product = torch.matmul(self.u, core)  # U S_g (G, K, R_v)
        else:
            product = torch.matmul(self.v, core.transpose(1, 2))  # V S_g^T (G, n, R_u)
        # One node in the graph, whatever their number.
        parts = product.split([len(m) for m in modes]) if len(modes) > 1 else (product,)
        factors = [self._factors(part, inward) for part in parts]
        return factors if isinstance(mode, list) else factors[0]

    def _factors(self, product: Tensor, inward: bool) -> Factors:
        if inward:
            return Factors(product.reshape(-1, self.rank), self.v, None)
        if self.core == "cp":
            return Factors(self.u, self.v, product)
        return Factors(self.u, product.reshape(-1, self.rank), None)

    @property
    def _table(self) -> Tensor:
        return self.s if self.core == "tt" else self.p

    def _core(self, rows: Tensor) -> Tensor:
        """Of rows of the table: gains (G, R) for "cp", else S (G, R_u, R_v)."""
        if self.core == "cp":
            return rows * self.lam
        return torch.tensordot(rows, self.c, dims=([1], [2])) if self.core == "tucker" else rows

    def _all(self) -> Tensor:
        """The core of all M modes, also under autocast in the factors' dtype."""
        with full_precision(self.u):
            return self._core(self._table)

    # -- the threshold --------------------------------------------------------------------------------------------------
    def update_threshold(self, progress: float = 0.0) -> None:
        """Let the threshold follow the factors; once an optimiser step, see :func:`update_thresholds`.

        Raises:
            RuntimeError: there is none.
        """
        if self.threshold is None:
            raise RuntimeError("CPFactors.update_threshold: these factors have no threshold")
        self.threshold.update(self.u, self.v, self._all(), progress)

    @torch.no_grad()
    def mode_energies(self) -> Tensor:
        """(M, R), :func:`fastgist.nn.threshold.mode_energies` of every matrix, before any threshold."""
        return mode_energies(self.u, self.v, self._all())

    @torch.no_grad()
    def delta_norms(self) -> Tensor:
        """(M,), the Frobenius norm of every matrix's update, before any threshold."""
        return delta_norms(self.u, self.v, self._all())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, modes={self.modes}, "
            f"core={self.core!r}, dropout={self.dropout}"
        )


def _rows(table: Tensor, rows: tuple[int | None, ...], absent: float) -> Tensor:
    """``rows`` of the table, (G, ...): a slice where they are neighbours, which costs no index tensor. ``absent`` fills those
    of folds without a mode."""
    first = rows[0]
    if first is not None and rows == tuple(range(first, first + len(rows))):
        return table if len(rows) == len(table) else table[first : first + len(rows)]
    return torch.stack([torch.full_like(table[0], absent) if m is None else table[m] for m in rows])


def update_thresholds(model: nn.Module, progress: float = 0.0) -> int:
    """Bring every threshold in ``model`` up to date with its factors; call it once after each optimiser step, or have the
    optimiser do so: ``optimizer.register_step_post_hook(lambda *_: update_thresholds(model))``.

    Args:
        progress: of the training, in [0, 1], for a gamma that is a schedule.

    Returns:
        How many there are.
    """
    found = [m for m in model.modules() if isinstance(m, CPFactors) and m.threshold is not None]
    for factors in found:
        factors.update_threshold(progress)
    return len(found)


class CPLinear(TunerLinear):
    """A linear layer with the update ``factors`` gives its mode, in one fused operation.

    Args:
        base_layer: the frozen linear layer (K -> N).
        factors: the shared :class:`CPFactors`; in_features == K and out_features divides N, or out_features == N and
            in_features divides K.
        mode: this matrix's row of P; or a tuple with one row for each fold of the output (or of the input), where None
            leaves a fold without update (a fused qkv of which only q and v are adapted: ``(0, None, 1)``).
        scale: factor on the update.

    The layer has no parameters of its own: ``reset_parameters`` is the factors', and clears the update of all layers
    that share them.

    Raises:
        ValueError: sizes that do not fit, a mode out of range, as many modes as there are not folds.
    """

    def __init__(
        self, base_layer: nn.Module, factors: CPFactors, mode: int | Sequence[int | None], scale: float = 1.0
    ) -> None:
        super().__init__(base_layer)
        if not isinstance(factors, CPFactors):
            raise TypeError(f"CPLinear: factors must be a CPFactors, got {type(factors).__name__}")
        self.inward = factors.in_features != self.in_features and factors.out_features == self.out_features
        side, mine, theirs = "out", self.out_features, factors.out_features
        if self.inward:
            side, mine, theirs = "in", self.in_features, factors.in_features
        elif factors.in_features != self.in_features:
            raise ValueError(
                f"CPLinear: expected factors.in_features == {self.in_features} (base_layer is {self.in_features} -> "
                f"{self.out_features}), got {factors.in_features}"
            )
        folds, rest = divmod(mine, theirs)
        if rest:
            raise ValueError(
                f"CPLinear: factors.{side}_features must divide {mine} (base_layer's {side}_features), got {theirs}"
            )
        self.scale = check_number("CPLinear", "scale", scale)
        single = isinstance(mode, int) and not isinstance(mode, bool)
        modes: tuple[int | None, ...] = (mode,) if single else _modes(mode)  # type: ignore[arg-type, assignment]
        if len(modes) != folds:
            raise ValueError(
                f"CPLinear: expected {folds} modes, one for each fold of {theirs} in base_layer's "
                f"{mine} {side}puts, got {mode!r}"
            )
        for m in modes:
            if m is not None and not 0 <= m < factors.modes:
                raise ValueError(
                    f"CPLinear: mode must be in 0..{factors.modes - 1} (factors has {factors.modes}), got {m}"
                )
        if all(m is None for m in modes):
            raise ValueError("CPLinear: at least one fold must have a mode, got only None")
        if factors.threshold is not None:
            sizes = self.in_features, self.out_features
            factors.threshold.observe(base_layer, modes, sizes, self.inward, self.scale)
        self.factors = factors
        self.mode: Mode = modes[0] if single else modes  # type: ignore[assignment]

    @property
    def dropout_p(self) -> float:  # type: ignore[override]
        return self.factors.dropout

    def get_factors(self) -> Factors:
        return self.factors(self.mode, self.inward)

    def reset_parameters(self) -> None:
        self.factors.reset_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"


def _modes(mode: Sequence[int | None]) -> tuple[int | None, ...]:
    """``mode`` as a tuple of whole numbers or None."""
    found = tuple(mode) if isinstance(mode, Sequence) and not isinstance(mode, str) else (mode,)
    if any(isinstance(m, bool) or not (m is None or isinstance(m, int)) for m in found):
        raise TypeError(f"CPLinear: mode must be an int, or a tuple of ints and None, got {mode!r}")
    return found


def cp_together(
    layers: Sequence[nn.Module], x: Tensor, factors: Factors | None = None, seed: Tensor | None = None
) -> tuple[Tensor, ...]:
    """``[layer(x) for layer in layers]`` with x U formed once, under one dropout mask: q, k and v of an attention.

    Where layers do not go together (one of them is no :class:`CPLinear`, has a hook, is merged, wraps a layer that can only
    be called, or has other factors than the rest), each is called, with a mask of its own.

    Args:
        layers: of one input width.
        x: (..., K).
        factors: what the layers' shared :class:`CPFactors` gives for :func:`joint_mode` of them, where the caller has it.
        seed: int64 on x's device, for the mask; None draws one.
    """
    if not _go_together(layers):
        return tuple(layer(x) for layer in layers)
    first: Any = layers[0]
    bases: list[Any] = [layer.base_layer for layer in layers]
    weights = [base.weight for base in bases]
    factors = first.factors(joint_mode(layers)) if factors is None else factors
    u, v, gain = TunerLinear._cast(factors, weights[0])
    return functional.cp_linear(
        x,
        weights,
        None if bases[0].bias is None else [base.bias for base in bases],
        u,
        v,
        gain,
        scale=first.scale,
        dropout_p=first.dropout_p if first.training else 0.0,
        training=first.training,
        seed=seed,
    )


def joint_mode(layers: Sequence[Any]) -> tuple[int | None, ...]:
    """The modes of several :class:`CPLinear` one above the other, fold by fold."""
    return tuple(row for layer in layers for row in (layer.mode if isinstance(layer.mode, tuple) else (layer.mode,)))


def _go_together(layers: Sequence[Any]) -> bool:
    """Whether :func:`cp_together` may run ``layers`` as one."""
    first = layers[0]
    return all(
        type(layer) is CPLinear
        and layer.factors is first.factors
        and (layer.scale, layer.training) == (first.scale, first.training)
        and not (layer.inward or layer.merged or is_hooked(layer) or is_hooked(layer.base_layer))
        and layer._plain
        and layer.base_layer.weight.dtype == first.base_layer.weight.dtype
        and (layer.base_layer.bias is None) == (first.base_layer.bias is None)
        for layer in layers
    )
