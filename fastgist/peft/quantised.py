"""What is in a frozen weight of 4 or 8 bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgist.nn._quantised import can_train, package

__all__ = ["dequantised", "stored"]


def _weight(layer: nn.Module) -> Any:
    """A quantised layer's weight, if it is in memory."""
    weight = layer._parameters.get("weight")
    return None if weight is None or can_train(weight) or weight.is_meta else weight


def dequantised(layer: nn.Module) -> Tensor | None:
    """The weight that a linear layer which bitsandbytes or torchao quantised multiplies by, dense, as ``nn.Linear`` stores it;
    by their own functions. None of another layer."""
    weight = _weight(layer)
    if package(weight) == "torchao":
        return weight.dequantize()
    if package(weight) != "bitsandbytes":
        return None
    from fastgist.integrations import bitsandbytes

    return bitsandbytes.dequantised(layer)


def stored(layer: nn.Module) -> tuple[list[Tensor], list[Tensor]] | None:
    """(stored numbers, their scales) of such a layer's weight; None of another layer."""
    weight = _weight(layer)
    if package(weight) == "torchao":
        parts = [getattr(weight, name) for name in sorted(weight.__tensor_flatten__()[0])]
        if any(type(part) is not Tensor for part in parts):
            return None
        return [p for p in parts if not p.is_floating_point()], [p for p in parts if p.is_floating_point()]
    if package(weight) != "bitsandbytes":
        return None
    from fastgist.integrations import bitsandbytes

    numbers, scales = bitsandbytes.stored(layer)
    return [numbers], [] if scales is None else [scales]
