r"""PETAL's adaptive instruction mixture of experts (arXiv 2312.12458): K small experts enrich the instruction.

With experts :math:`E_k(x) = B_k (A_k x + a_k) + b_k`:

.. math::
    y = x + \sum_k g_k E_k(x) \quad (\text{"softmax"}) \qquad
    y = 0.6\, x + 0.4\, \tfrac{1}{K} \sum_k E_k(x) \quad (\text{"uniform"})

The paper's figure has a gating network, which its released code lacks: "uniform" is the released form, "softmax" our
reconstruction of the figure, with g = softmax(G i + c) from the pooled instruction i. K dense experts of width h are one
adapter of width K h whose hidden units and output biases the gate scales: one fused operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastgist import functional
from fastgist.nn._checks import check_one_of, check_place, check_positive
from fastgist.nn._tuner import autocast_enabled, uniform_fan_in_
from fastgist.nn.adapter import ACTIVATIONS, INITS

__all__ = ["Gate", "InstructionMixer", "InstructionMoE", "load_balance_loss", "mix_instructions", "pool_instruction"]

GATINGS = ("softmax", "uniform")
#: The released form's factors of x and of the experts' mean.
UNIFORM_RESIDUAL, UNIFORM_SCALE = 0.6, 0.4


class Gate(NamedTuple):
    """How much of each expert a sample takes.

    weights: (B, K), what the experts are scaled by; zero for those that ``top_k`` leaves out.
    probabilities: (B, K), the softmax over all experts, which the load-balance loss is about.
    """

    weights: Tensor
    probabilities: Tensor


Mixed = TypeVar("Mixed", Tensor, Gate)


def pool_instruction(instruction: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The mean of an instruction's real tokens.

    Args:
        instruction: (B, L, D) embeddings.
        attention_mask: (B, L) bool or integer, nonzero at real tokens; None if all are. What stands at the others does
            not matter, NaN included. A row without real tokens pools to zero.

    Returns:
        (B, D) in float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a floating-point mask (the additive kind would be read the wrong way round).
    """
    if instruction.dim() != 3:
        raise ValueError(f"pool_instruction: expected instruction (B, L, D), got shape {tuple(instruction.shape)}")
    wide = instruction.to(torch.promote_types(instruction.dtype, torch.float32))
    if attention_mask is None:
        return wide.mean(1)
    if attention_mask.is_floating_point():
        raise TypeError(
            "pool_instruction: attention_mask must be bool or integer, nonzero at real tokens, got "
            f"{str(attention_mask.dtype).removeprefix('torch.')}"
        )
    if attention_mask.shape != instruction.shape[:2]:
        raise ValueError(
            f"pool_instruction: expected attention_mask.shape == {tuple(instruction.shape[:2])}, got "
            f"{tuple(attention_mask.shape)}"
        )
    real = attention_mask != 0
    total = torch.where(real[..., None], wide, 0.0).sum(1)
    return total / real.sum(1, keepdim=True).clamp(min=1).to(wide.dtype)


def mix_instructions(phrasings: Sequence[Mixed], weights: Tensor | Sequence[float] | None = None) -> Mixed:
    """The weighted mean of what several phrasings of one instruction gave: their pooled embeddings or their gates.

    Phrasings differ in the text alone, so one image's features serve them all: pool or gate each phrasing, mix, and run the
    model once.

    Args:
        phrasings: P tensors of one shape (pooled embeddings (B, D), say), or P :class:`Gate`.
        weights: P numbers, or a tensor (P,), divided by their sum; None for the plain mean.

    Raises:
        ValueError: no phrasings, shapes that differ, as many weights as there are not phrasings, negative or infinite
            numbers, or a sum of zero. (The values of a tensor are not read.)
    """
    if len(phrasings) == 0:
        raise ValueError("mix_instructions: expected at least one phrasing, got none")
    first = phrasings[0]
    if isinstance(first, Gate):
        sides = zip(*phrasings, strict=True)
        return Gate(*(mix_instructions(side, weights) for side in sides))
    shapes = [tuple(p.shape) for p in phrasings]
    if len(set(shapes)) > 1:
        raise ValueError(f"mix_instructions: expected phrasings of one shape, got {', '.join(map(str, shapes))}")
    stacked = torch.stack(list(phrasings))
    if weights is None:
        return stacked.mean(0)
    if isinstance(weights, Tensor):
        if tuple(weights.shape) != (len(phrasings),):
            raise ValueError(
                f"mix_instructions: expected weights.shape == ({len(phrasings)},), got {tuple(weights.shape)}"
            )
        shares = weights.to(stacked) / weights.to(stacked).sum()
    else:
        if len(weights) != len(phrasings):
            raise ValueError(f"mix_instructions: expected {len(phrasings)} weights, got {len(weights)}")
        total = math.fsum(weights)
        if not (math.isfinite(total) and total > 0 and min(weights) >= 0):
            raise ValueError(f"mix_instructions: weights must be finite, >= 0 and not all 0, got {list(weights)}")
        parts = [p * (w / total) for p, w in zip(phrasings, weights, strict=True)]  # no copy of numbers to the device
        return torch.stack(parts).sum(0)
    return (shares.view(-1, *[1] * (stacked.dim() - 1)) * stacked).sum(0)


class InstructionMixer(nn.Module):
    """:func:`mix_instructions` with learned weights: the softmax of ``logits`` (P,), which start at zero: the plain mean.

    Args:
        num_instructions: P.
        device, dtype: of the parameter.
    """

    def __init__(
        self,
        num_instructions: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_instructions = check_positive("InstructionMixer", "num_instructions", num_instructions)
        self.logits = nn.Parameter(torch.empty(num_instructions, **check_place("InstructionMixer", device, dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.logits)

    def forward(self, phrasings: Sequence[Mixed]) -> Mixed:
        """The mean of ``num_instructions`` tensors or gates, in the learned shares."""
        if len(phrasings) != self.num_instructions:
            raise ValueError(f"InstructionMixer: expected {self.num_instructions} phrasings, got {len(phrasings)}")
        return mix_instructions(phrasings, torch.softmax(self.logits, 0))

    def extra_repr(self) -> str:
        return f"num_instructions={self.num_instructions}"


def load_balance_loss(gate: Gate) -> Tensor:
    """K sum_k f_k P_k: 1 where a batch uses all experts alike, K where it uses one (Switch, arXiv 2101.03961).

    P_k is the batch's mean probability of expert k, f_k its mean share of the weights, which counts as a constant. Without
    top-k both are the same, and 1 is the least value there is. In a batch of one instruction its own gate is what gets
    levelled.

    Returns:
        A scalar in the gate's dtype.
    """
    shares = gate.weights / gate.weights.sum(-1, keepdim=True)
    return gate.weights.shape[-1] * (shares.mean(0).detach() * gate.probabilities.mean(0)).sum()


class InstructionMoE(nn.Module):
    """A mixture of K bottleneck experts, gated by the instruction, in one fused operation.

    Args:
        dim: D, width of what goes in and out, and of the instruction.
        num_experts: K.
        bottleneck_dim: h, width inside one expert.
        gating: "softmax" (a gate from the pooled instruction; our reconstruction of the paper's figure) or "uniform" (the
            released code's form, which has no gate).
        top_k: with "softmax", take the k experts of the highest probability only, and renormalise. With k = 1 the
            probability itself scales the expert: renormalised it would be 1 and the gate would learn nothing.
        activation: inside the experts; "identity" as released, or "gelu", "gelu_tanh", "relu", "silu".
        init: "identity": experts' output weights and biases zero, so that a fresh module returns x. "paper": all of the
            experts as nn.Linear draws them. Default "identity" with a gate; "uniform", which starts at 0.6 x and the
            experts' mean, knows only "paper".
        device, dtype: of the parameters.

    Parameters: ``down_weight`` (K h, D), ``down_bias`` (K h,), ``up_weight`` (D, K h), ``up_bias`` (K, D) and, with
    "softmax", ``gate_weight`` (K, D) as nn.Linear draws it and ``gate_bias`` (K,) zero.

    :attr:`last_gate` is the :class:`Gate` of the last call, in its graph (None before, and while a model is exported): see
    :meth:`load_balance_loss` and :attr:`usage`. It is no state: copies and files do not have it.

    Raises:
        ValueError: a size that is not positive, unknown gating, activation or init, top_k outside 1..K or with "uniform".
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 6,
        bottleneck_dim: int = 64,
        gating: str = "softmax",
        top_k: int | None = None,
        *,
        activation: str = "identity",
        init: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_positive("InstructionMoE", "dim", dim)
        self.num_experts = check_positive("InstructionMoE", "num_experts", num_experts)
        self.bottleneck_dim = check_positive("InstructionMoE", "bottleneck_dim", bottleneck_dim)
        check_one_of("InstructionMoE", "gating", gating, GATINGS)
        check_one_of("InstructionMoE", "activation", activation, ACTIVATIONS)
        if init is None:
            init = "identity" if gating == "softmax" else "paper"
        check_one_of("InstructionMoE", "init", init, INITS)
        if gating == "uniform" and init == "identity":
            raise ValueError("InstructionMoE: gating='uniform' keeps 0.6 x and cannot start as the identity")
        if top_k is not None:
            if gating == "uniform":
                raise ValueError(f"InstructionMoE: top_k needs gating='softmax', got top_k={top_k} with 'uniform'")
            if check_positive("InstructionMoE", "top_k", top_k) > num_experts:
                raise ValueError(f"InstructionMoE: top_k must be in 1..{num_experts} (num_experts), got {top_k}")
        self.gating, self.top_k, self.activation, self.init = gating, top_k, activation, init
        kwargs = check_place("InstructionMoE", device, dtype)
        hidden = num_experts * bottleneck_dim
        self.down_weight = nn.Parameter(torch.empty(hidden, dim, **kwargs))
        self.down_bias = nn.Parameter(torch.empty(hidden, **kwargs))
        self.up_weight = nn.Parameter(torch.empty(dim, hidden, **kwargs))
        self.up_bias = nn.Parameter(torch.empty(num_experts, dim, **kwargs))
        if gating == "softmax":
            self.gate_weight = nn.Parameter(torch.empty(num_experts, dim, **kwargs))
            self.gate_bias = nn.Parameter(torch.empty(num_experts, **kwargs))
        self.last_gate: Gate | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        uniform_fan_in_(self.down_weight, self.dim)
        uniform_fan_in_(self.down_bias, self.dim)
        if self.init == "identity":
            nn.init.zeros_(self.up_weight)
            nn.init.zeros_(self.up_bias)
        else:
            uniform_fan_in_(self.up_weight, self.bottleneck_dim)  # each expert is a layer of its own
            uniform_fan_in_(self.up_bias, self.bottleneck_dim)
        if self.gating == "softmax":
            uniform_fan_in_(self.gate_weight, self.dim)
            nn.init.zeros_(self.gate_bias)

    # -- the gate -------------------------------------------------------------------------------------------------------
    def get_gate(self, instruction: Tensor, attention_mask: Tensor | None = None) -> Gate:
        """The gate of each sample, to be mixed with others (:func:`mix_instructions`) or used in several calls.

        Args:
            instruction: (B, L, D) token embeddings, or (B, D) if pooled already.
            attention_mask: (B, L), as :func:`pool_instruction`'s.

        Returns:
            Weights and probabilities (B, K) in float32 (float64), also under autocast. 1 / K with "uniform".
        """
        if instruction.dim() not in (2, 3) or instruction.shape[-1] != self.dim:
            raise ValueError(
                f"InstructionMoE: expected instruction (B, L, {self.dim}) or (B, {self.dim}), got shape "
                f"{tuple(instruction.shape)}"
            )
        if instruction.dim() == 3:
            instruction = pool_instruction(instruction, attention_mask)
        elif attention_mask is not None:
            raise ValueError("InstructionMoE: attention_mask needs an instruction (B, L, D), got one that is pooled")
        wide = torch.promote_types(instruction.dtype, torch.float32)
        if self.gating == "uniform":
            shape = (instruction.shape[0], self.num_experts)
            even = torch.full(shape, 1.0 / self.num_experts, dtype=wide, device=instruction.device)
            return Gate(even, even)
        # products and a sum: autocast would take a matrix product to half precision
        logits = (instruction.to(wide)[:, None] * self.gate_weight.to(wide)).sum(-1) + self.gate_bias.to(wide)
        probabilities = torch.softmax(logits, -1)
        if self.top_k is None or self.top_k == self.num_experts:
            return Gate(probabilities, probabilities)
        kept = torch.zeros_like(probabilities).scatter(-1, logits.topk(self.top_k, dim=-1).indices, 1.0)
        weights = probabilities * kept
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        return Gate(weights, probabilities)

    @property
    def usage(self) -> Tensor | None:
        """(K,) on the device: the mean weight of each expert in the last call, without graph. None before the first."""
        return None if self.last_gate is None else self.last_gate.weights.detach().mean(0)

    def load_balance_loss(self, gate: Gate | None = None) -> Tensor:
        """:func:`load_balance_loss` of ``gate``, by default the last call's.

        Raises:
            RuntimeError: no gate given and no call yet.
        """
        gate = self.last_gate if gate is None else gate
        if gate is None:
            raise RuntimeError("InstructionMoE.load_balance_loss: call the module first, or give a gate")
        return load_balance_loss(gate)

    # -- forward --------------------------------------------------------------------------------------------------------
    def forward(
        self,
        x: Tensor,
        instruction: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        gate: Gate | None = None,
    ) -> Tensor:
        """Enrich x.

        Args:
            x: (B, ..., D): queries, or text embeddings.
            instruction: (B, L, D) or pooled (B, D); None if x (B, L, D) is the instruction itself.
            attention_mask: (B, L), the instruction's real tokens. It says what is pooled; all rows of x are enriched.
            gate: one that :meth:`get_gate` gave, in place of an instruction.

        Returns:
            x's shape, in x's dtype (autocast's under autocast). Parameters of another dtype than x's take x's for the call.

        Raises:
            ValueError: shapes that do not fit, a gate and an instruction both.
        """
        if x.dim() < 2 or x.shape[-1] != self.dim:
            raise ValueError(f"InstructionMoE: expected x (B, ..., {self.dim}), got shape {tuple(x.shape)}")
        if gate is None:
            gate = self.get_gate(x if instruction is None else instruction, attention_mask)
        elif instruction is not None or attention_mask is not None:
            raise ValueError(
                "InstructionMoE: a gate takes the place of instruction and attention_mask; give one of them"
            )
        wanted = (x.shape[0], self.num_experts)
        for given in gate:
            if tuple(given.shape) != wanted:
                raise ValueError(
                    f"InstructionMoE: expected a gate {wanted} (a row for each of x's {wanted[0]} samples, "
                    f"{wanted[1]} experts), got {tuple(given.shape)}"
                )
        if not torch.compiler.is_exporting():  # an exported program has no attributes to write to
            self.last_gate = gate
        weights: list[Tensor] = [self.down_weight, self.down_bias, self.up_weight, self.up_bias]
        if self.gating == "uniform":
            weights[3] = self.up_bias.sum(0)
        in_kernel = x.dtype.itemsize == 2 and weights[0].dtype == torch.float32  # float32 experts in a half model
        if x.dtype != weights[0].dtype and not in_kernel and not autocast_enabled(x.device):
            weights = [w.to(x.dtype) for w in weights]
        if self.gating == "uniform":  # a constant gate is a scale
            scale = UNIFORM_SCALE / self.num_experts
            return functional.adapter(
                x, *weights, activation=self.activation, scale=scale, residual_scale=UNIFORM_RESIDUAL
            )
        scaled = gate.weights.to(x.dtype).view(wanted[0], *[1] * (x.dim() - 2), wanted[1])
        scaled = scaled.expand(*x.shape[:-1], wanted[1])
        return functional.adapter(x, *weights, activation=self.activation, gate=scaled)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last_gate": None}  # tensors in a graph can be neither copied nor pickled

    def extra_repr(self) -> str:
        top = "" if self.top_k is None else f", top_k={self.top_k}"
        return (
            f"{self.dim} -> {self.num_experts} x {self.bottleneck_dim} -> {self.dim}, gating={self.gating!r}{top}, "
            f"activation={self.activation!r}"
        )
