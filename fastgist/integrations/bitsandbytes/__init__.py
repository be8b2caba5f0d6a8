"""bitsandbytes: what its layers store in 4 or 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor

from fastgist.nn._quantised import four_bit_state, unpack

__all__ = ["dequantised", "stored"]


def dequantised(layer: Any) -> Tensor | None:
    """The weight that a layer multiplies by, dense (out, in); None where its scales are not to be found."""
    state = four_bit_state(layer)
    if state is not None:
        unpack(layer)
        return functional.dequantize_4bit(layer.weight.data, state)
    scales = _scales_of_8_bits(layer)
    return None if scales is None else functional.int8_vectorwise_dequant(layer.weight.data, scales)


def stored(layer: Any) -> tuple[Tensor, Tensor | None]:
    """(stored numbers, their scales) of a layer's weight. The numbers are the same before and after an evaluation; the scales
    of 4 bits are not to the last bit, since they are in bfloat16 from the first one on a CPU."""
    state = four_bit_state(layer)
    if state is None:
        return layer.weight.data, _scales_of_8_bits(layer)
    unpack(layer)
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    return layer.weight.data.reshape(-1).view(torch.uint8), scales


def _scales_of_8_bits(layer: Any) -> Tensor | None:
    """The weight has them, until the first call moves them into the layer's state."""
    scales = getattr(layer.weight, "SCB", None)
    return getattr(getattr(layer, "state", None), "SCB", None) if scales is None else scales
