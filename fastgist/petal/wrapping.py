"""What a user calls: PETAL around a model, its size, and instructions in several phrasings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastgist.nn import Gate, InstructionMoE, mix_instructions
from fastgist.nn._checks import shown
from fastgist.nn._quantised import count
from fastgist.peft import state as _state
from fastgist.peft.family import find_family
from fastgist.peft.surgery import add_record
from fastgist.petal.config import PetalConfig
from fastgist.petal.method import Petal  # noqa: F401 - registers the method
from fastgist.petal.parts import Enriched

__all__ = ["Shares", "experts_of", "instructed", "instruction_gate", "trainable_shares", "wrap"]


@dataclass(frozen=True)
class Shares:
    """How many numbers are trained, and of how many: in the Q-Former, its query tokens and what was added included, and in
    the whole model."""

    trainable: int
    qformer: int
    model: int
    parts: dict[str, int]

    def __str__(self) -> str:
        of = ", ".join(f"{name} {count:,}" for name, count in self.parts.items())
        return (
            f"trainable params: {self.trainable:,} ({of}) || Q-Former: {self.qformer:,} || "
            f"trainable%: {100 * self.trainable / self.qformer:.4f} || all params: {self.model:,} || "
            f"trainable%: {100 * self.trainable / self.model:.4f}"
        )


def wrap(model: nn.Module, config: PetalConfig | None = None, name: str = "default", *, verbose: bool = True) -> Any:
    """Freeze ``model`` and put PETAL into its Q-Former, in place.

    It is an adapter as :func:`fastgist.get_peft_model`'s are: ``save_adapter``, ``load_adapter``, ``set_adapter``,
    ``disable_adapter`` and ``unload`` know it. A fresh one is the identity of the model (with gating "uniform" or
    ``gated_query`` it is not: those are the released code's). In training ``output.loss`` holds what the configuration adds to
    the task's loss.

    Args:
        model: transformers' InstructBlipForConditionalGeneration, Blip2ForConditionalGeneration, or the same without a
            language head.
        config: default ``PetalConfig()``.
        name: of the adapter.
        verbose: print the number of trained parameters, with what it is a share of.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: a model without a Q-Former, or a configuration of another method.
        ValueError: sizes that do not fit; an adapter of that name is there already. The model is unchanged.
    """
    config = PetalConfig() if config is None else config
    if not isinstance(config, PetalConfig):
        raise TypeError(f"petal.wrap: config must be a PetalConfig, got {shown(config)}")
    _with_qformer(model, "petal.wrap")
    add_record(model, config, name, "petal.wrap")
    if verbose:
        print(trainable_shares(model))
    return model


def trainable_shares(model: nn.Module) -> Shares:
    """The numbers of trained parameters of a model that :func:`wrap` wrapped; ``print`` shows them as one line.

    Raises:
        TypeError: a model without a Q-Former.
    """
    plain = _with_qformer(model, "petal.trainable_shares")
    parts: dict[str, int] = {}
    seen: set[int] = set()
    for path, parameter in plain.named_parameters():
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            words = path.split(".")
            kind = "mode approximation" if "factors" in words else "experts" if "experts" in words else "other"
            parts[kind] = parts.get(kind, 0) + parameter.numel()
    return Shares(
        trainable=sum(parts.values()),
        qformer=plain.query_tokens.numel() + sum(count(p) for p in plain.qformer.parameters()),
        model=sum(count(p) for p in plain.parameters()),
        parts=parts,
    )


def _with_qformer(model: Any, caller: str) -> Any:
    """The plain model in ``model``, which has a Q-Former."""
    plain: Any = _state.inner(model) if isinstance(model, nn.Module) else model
    if not hasattr(plain, "qformer"):
        raise TypeError(
            f"{caller}: expected a model with a Q-Former (InstructBLIP, BLIP-2), got {type(plain).__name__}"
        )
    return plain


def _enriched(model: nn.Module, caller: str) -> Enriched:
    for module in _state.inner(model).modules():
        if isinstance(module, Enriched) and module.experts is not None:
            return module
    raise ValueError(f"{caller}: {type(model).__name__} has no experts of PETAL (petal.wrap with num_experts > 0)")


def experts_of(model: nn.Module) -> InstructionMoE:
    """The experts in a wrapped model; its ``usage`` is how much the last call took of each.

    Raises:
        ValueError: there are none.
    """
    experts = _enriched(model, "petal.experts_of").experts
    assert experts is not None
    return experts


def instruction_gate(model: nn.Module, qformer_input_ids: Tensor, qformer_attention_mask: Tensor | None = None) -> Gate:
    """The experts' gate for an instruction, from the Q-Former's embeddings alone: no image is looked at.

    Args:
        qformer_input_ids: (B, L), of InstructBLIP's Q-Former. qformer_attention_mask: (B, L), nonzero at real tokens.

    Raises:
        ValueError: the model has no experts, its Q-Former reads no instruction (BLIP-2), or shapes do not fit.
        TypeError: ids that are no integers.
    """
    site = _enriched(model, "petal.instruction_gate")
    plain: Any = _state.inner(model)
    if not isinstance(qformer_input_ids, Tensor) or qformer_input_ids.is_floating_point():
        got = (
            f"a {qformer_input_ids.dtype} Tensor" if isinstance(qformer_input_ids, Tensor) else shown(qformer_input_ids)
        )
        raise TypeError(f"petal.instruction_gate: qformer_input_ids must be an integer Tensor, got {got}")
    if qformer_input_ids.dim() != 2:
        raise ValueError(
            f"petal.instruction_gate: qformer_input_ids must be (B, L), got shape {tuple(qformer_input_ids.shape)}"
        )
    if not find_family(plain, "petal.instruction_gate").has_text(plain):  # type: ignore[attr-defined]
        raise ValueError(f"petal.instruction_gate: the Q-Former of {type(plain).__name__} reads no instruction")
    with site.plain():
        embedded = plain.qformer.embeddings(input_ids=qformer_input_ids)
    assert site.experts is not None
    return site.experts.get_gate(embedded, qformer_attention_mask)


@contextlib.contextmanager
def instructed(
    model: nn.Module, gates: Gate | Sequence[Gate], weights: Tensor | Sequence[float] | None = None
) -> Iterator[nn.Module]:
    """Within the context the experts take the mix of ``gates``, whatever the instruction in the call: several phrasings of
    one instruction, while image encoder and Q-Former run once.

    Args:
        gates: one, or those of P phrasings (:func:`instruction_gate`), for as many samples as the call has.
        weights: of the phrasings; None: the learned ones where ``PetalConfig(num_instructions=P)`` has some, else equal.

    Raises:
        ValueError: the model has no experts, or P differs from the number of weights.
        TypeError: ``gates`` are something else.
    """
    site = _enriched(model, "petal.instructed")
    if not isinstance(gates, Gate) and not (
        isinstance(gates, Sequence) and all(isinstance(gate, Gate) for gate in gates)
    ):
        raise TypeError("petal.instructed: gates must be what petal.instruction_gate gives, or a sequence of those")
    if isinstance(gates, Gate):
        mixed = gates
    elif weights is None and site.mixer is not None:
        mixed = site.mixer(list(gates))
    else:
        mixed = mix_instructions(list(gates), weights)
    with site.gated_by(mixed):
        yield model
