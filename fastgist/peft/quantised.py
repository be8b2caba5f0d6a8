"""What is in a frozen weight of 4 or 8 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastgist.nn._quantised import can_train, package

__all__ = ["dequantised", "sample", "same_before", "stored"]

#: A scale over the largest magnitude of its block: bitsandbytes' own, and those of symmetric 8 and 4 bits.
_SCALE_OVER_PEAK = (1.0, 1 / 127, 1 / 127.5, 1 / 128, 1 / 7, 1 / 7.5, 1 / 8)
_BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
#: What rounding to another dtype leaves of a number, and to 8 bits of a scale that is quantised itself.
_NEAR = 2.0**-6


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


def sample(tensor: Tensor) -> Tensor:
    """Some 256 elements, spread over all, on the CPU."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // 256)].to("cpu", copy=True)


def same_before(saved: Mapping[str, Any], weights: Sequence[Tensor]) -> bool:
    """Whether dense ``weights`` are those of which a part was quantised when ``saved`` was made of them.

    Args:
        saved: a fingerprint with ``scales`` (``files.backbone_fingerprint``): two numbers of each weight that was not
            quantised, two of each tensor of scales of those that were.
        weights: all frozen weights, in the fingerprint's order.

    Returns:
        True: what was not quantised is the same here, and the scales are what the other weights get by a rule known here.
        False: something differs, or the rule is another.
    """
    numbers, scales = list(saved.get("numbers", ())), list(saved["scales"])
    rest, k = [], 0
    for weight in weights:
        some = sample(weight).float()
        if k < len(numbers) and _near(numbers[k], float(some[0])) and _near(numbers[k + 1], float(some[-1])):
            k += 2
        else:
            rest.append(weight)
    if k != len(numbers) or not rest or any(w.dim() != 2 for w in rest) or len(scales) % (2 * len(rest)):
        return False
    parts = len(scales) // len(rest)  # two numbers of each tensor of scales
    for part in range(0, parts, 2):
        found = [(scales[i * parts + part], scales[i * parts + part + 1]) for i in range(len(rest))]
        for block in (0, *_BLOCKS):  # 0: a row
            peaks = [_peaks(w, block or w.shape[1]) for w in rest]
            if any(
                all(_near(s, r * p) for pair, two in zip(found, peaks) for s, p in zip(pair, two))
                for r in _SCALE_OVER_PEAK
            ):
                return True
    return False


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_NEAR, abs_tol=1e-6)


def _peaks(weight: Tensor, block: int) -> tuple[float, float]:
    """The largest magnitudes of the blocks whose scales a fingerprint has: the first, and the last of :func:`sample`."""
    flat = weight.detach().reshape(-1)
    blocks = -(-len(flat) // block)
    step = max(1, blocks // 256)
    last = (blocks - 1) // step * step
    first, end = flat[:block], flat[last * block : (last + 1) * block]
    return float(first.abs().amax()), float(end.abs().amax())
