r"""Mode approximation (PETAL, arXiv 2312.12458; Aurora, arXiv 2305.08381): one set of factors for many weights.

The updates of all adapted matrices form a 3-mode tensor (in x out x matrices), given a low rank:

.. math::
    \Delta W_m = U\, \mathrm{diag}(\lambda \odot P_m)\, V^T \quad (\text{CP}) \qquad
    \Delta W_m = U S_m V^T,\; S_m = C \times_3 p_m \quad (\text{Tucker})

U (in, R) and V (out, R) are shared by all layers; only row m of P belongs to one matrix. V starts at zero, so a fresh
layer is the layer it wraps: the paper's own initialisation already is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn._tuner import Factors, TunerLinear, check_dropout, check_positive, uniform_fan_in_

__all__ = ["CPFactors", "CPLinear"]

CORES = ("cp", "tucker")
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
        core: "cp" (the paper's; a trained lambda shared by all matrices) or "tucker" (the released code's R^3 core).
        dropout: rate on ``x U`` in training, one mask a layer call.
        device, dtype: of the parameters.

    Parameters: ``u`` (K, R) ~ U(-1/sqrt(K), 1/sqrt(K)), ``v`` (n, R) zero, ``p`` (M, R) xavier_uniform, and ``lam``
    (R,) ones or ``c`` (R, R, R) xavier_uniform.

    Raises:
        ValueError: a size that is not positive, an unknown core, a dropout outside [0, 1).
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if core not in CORES:
            raise ValueError(f"CPFactors: core must be one of {', '.join(CORES)}, got {core!r}")
        self.in_features = check_positive("CPFactors", "in_features", in_features)
        self.out_features = check_positive("CPFactors", "out_features", out_features)
        self.rank = check_positive("CPFactors", "rank", rank)
        self.modes = check_positive("CPFactors", "modes", modes)
        self.core = core
        self.dropout = check_dropout("CPFactors", dropout)
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.u = nn.Parameter(torch.empty(in_features, rank, **kwargs))
        self.v = nn.Parameter(torch.empty(out_features, rank, **kwargs))
        self.p = nn.Parameter(torch.empty(modes, rank, **kwargs))
        if core == "cp":
            self.lam = nn.Parameter(torch.empty(rank, **kwargs))
        else:
            self.c = nn.Parameter(torch.empty(rank, rank, rank, **kwargs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all factors anew; V = 0, so every update is zero."""
        uniform_fan_in_(self.u, self.in_features)
        nn.init.zeros_(self.v)
        nn.init.xavier_uniform_(self.p)
        if self.core == "cp":
            nn.init.ones_(self.lam)
        else:
            nn.init.xavier_uniform_(self.c)

    def forward(self, mode: Mode) -> Factors:
        """The factors of matrix ``mode``; a tuple gives one mode a fold (None: no update of that fold).

        Returns:
            u (K, R), v and gain. CP: v (n, R), gain (G, R). Tucker: the core is folded into v, (G n, R), gain None.
        """
        rows = self._rows(mode)
        if self.core == "cp":
            return Factors(self.u, self.v, rows * self.lam)
        core = torch.tensordot(rows, self.c, dims=([1], [2]))  # S (G, R_u, R_v)
        folded = torch.matmul(self.v, core.transpose(1, 2))  # V S_g^T (G, n, R_u)
        return Factors(self.u, folded.reshape(-1, self.rank), None)

    def _rows(self, mode: Mode) -> Tensor:
        """p's rows of ``mode``, (G, R): a slice where they are neighbours, which costs no index tensor."""
        if isinstance(mode, int):
            return self.p[mode : mode + 1]
        first = mode[0]
        if first is not None and mode == tuple(range(first, first + len(mode))):
            return self.p[first : first + len(mode)]
        return torch.stack([self.p.new_zeros(self.rank) if m is None else self.p[m] for m in mode])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, modes={self.modes}, "
            f"core={self.core!r}, dropout={self.dropout}"
        )


class CPLinear(TunerLinear):
    """A linear layer with the update ``factors`` gives its mode, in one fused operation.

    Args:
        base_layer: the frozen linear layer (K -> N).
        factors: the shared :class:`CPFactors`; in_features == K, out_features divides N.
        mode: this matrix's row of P; or a tuple with one row for each of the N / n folds of the output, where None
            leaves a fold without update (a fused qkv of which only q and v are adapted: ``(0, None, 1)``).

    The layer has no parameters of its own: ``reset_parameters`` is the factors', and clears the update of all layers
    that share them.

    Raises:
        ValueError: sizes that do not fit, a mode out of range, as many modes as there are not folds.
    """

    def __init__(self, base_layer: nn.Module, factors: CPFactors, mode: int | Sequence[int | None]) -> None:
        super().__init__(base_layer)
        if not isinstance(factors, CPFactors):
            raise TypeError(f"CPLinear: factors must be a CPFactors, got {type(factors).__name__}")
        if factors.in_features != self.in_features:
            raise ValueError(
                f"CPLinear: expected factors.in_features == {self.in_features} (base_layer is {self.in_features} -> "
                f"{self.out_features}), got {factors.in_features}"
            )
        folds, rest = divmod(self.out_features, factors.out_features)
        if rest:
            raise ValueError(
                f"CPLinear: factors.out_features must divide {self.out_features} (base_layer's out_features), "
                f"got {factors.out_features}"
            )
        single = isinstance(mode, int) and not isinstance(mode, bool)
        modes: tuple[int | None, ...] = (mode,) if single else tuple(mode)  # type: ignore[arg-type, assignment]
        if len(modes) != folds:
            raise ValueError(
                f"CPLinear: expected {folds} modes, one for each fold of {factors.out_features} in base_layer's "
                f"{self.out_features} outputs, got {mode!r}"
            )
        for m in modes:
            if m is not None and not 0 <= m < factors.modes:
                raise ValueError(
                    f"CPLinear: mode must be in 0..{factors.modes - 1} (factors has {factors.modes}), got {m}"
                )
        if all(m is None for m in modes):
            raise ValueError("CPLinear: at least one fold must have a mode, got only None")
        self.factors = factors
        self.mode: Mode = modes[0] if single else modes  # type: ignore[assignment]

    @property
    def dropout_p(self) -> float:  # type: ignore[override]
        return self.factors.dropout

    def get_factors(self) -> Factors:
        return self.factors(self.mode)

    def reset_parameters(self) -> None:
        self.factors.reset_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"
