"""Frozen weights in 4 or 8 bits, of bitsandbytes and torchao: what is known of them, without importing either."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["BeforeCall", "before_call", "can_train", "count", "four_bit_state", "guard", "package", "unpack"]


def package(tensor: Tensor) -> str:
    """The package that ``tensor``'s class is of; torchao's of inference alone (those of quantised training are trained)."""
    name = type(tensor).__module__
    if name.startswith(("torchao.quantization", "torchao.dtypes")):
        return "torchao"
    return name.split(".", 1)[0]


def can_train(parameter: Tensor) -> bool:
    """Whether an optimiser can step ``parameter``: torchao's quantised tensors call themselves floating point, and get no
    gradient."""
    return parameter.is_floating_point() and package(parameter) != "torchao"


def count(parameter: Tensor) -> int:
    """How many numbers ``parameter`` stands for: bitsandbytes stores two of 4 bits in a byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)


def four_bit_state(layer: nn.Module) -> Any:
    """bitsandbytes' 4-bit state of a layer; None of any other."""
    return getattr(layer._parameters.get("weight"), "quant_state", None)


def unpack(layer: nn.Module) -> None:
    """Undo what bitsandbytes does to a 4-bit layer evaluated on a CPU with AVX512-BF16: it packs the weight anew for a product
    that has no backward. Its ``state_dict`` packs the weight back, and may leave the scales as a transposed matrix.

    Raises:
        RuntimeError: it does not, in this version.
    """
    if (state := four_bit_state(layer)) is None:
        return
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()
        state = four_bit_state(layer)
        if getattr(state, "packing_format_for_cpu", False):
            raise RuntimeError(
                f"{type(layer).__name__}: bitsandbytes has packed this layer's weight for evaluation on a CPU, where it has "
                "no backward, and does not take that back: load the model anew, and train before evaluating"
            )
    if state.absmax.dim() == 2 and not state.nested:
        state.absmax = state.absmax.T.reshape(-1).float()


def before_call(layer: nn.Module, x: object) -> None:
    """Have ``layer`` as its next call wants it: with a backward where ``x`` wants a gradient, its scales as they belong."""
    state = four_bit_state(layer)
    if state is None or torch.compiler.is_compiling():
        return
    through = isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()
    if through or not getattr(state, "packing_format_for_cpu", False):
        unpack(layer)


class BeforeCall:
    """:func:`before_call` as a forward pre-hook."""

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        before_call(layer, args[0] if args else None)


def guard(model: nn.Module) -> Iterator[RemovableHandle]:
    """Give every layer of ``model`` that bitsandbytes may pack a :class:`BeforeCall`: those without an adapter would cut off
    the gradients of what is below them."""
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        if four_bit_state(module) is not None and weight.device.type == "cpu":
            yield module.register_forward_pre_hook(BeforeCall())
