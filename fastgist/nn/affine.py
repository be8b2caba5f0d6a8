"""Layers with a trained affine change of their output: SSF (arXiv 2210.08823) and BitFit (arXiv 2106.10199)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn._checks import check_one_of, check_place
from fastgist.nn._quantised import before_call, can_train
from fastgist.nn._tuner import fan, keep_original_state, keeps_columns, linear_slice, warn_of_merged

__all__ = ["AffineLayer", "BiasShift", "ScaleShift", "channels"]

INITS = ("identity", "paper")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELS_FIRST = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
#: What multiplies its output channels by ``weight`` (its rows) and adds ``bias``: an RMS norm has no bias to add, and
#: some of them multiply by 1 + weight.
_MERGEABLE = (nn.Linear, nn.LayerNorm, *_CONVOLUTIONS)


def channels(layer: nn.Module) -> int:
    """How many output channels a linear layer, a normalisation over the last dimension or a convolution has.

    Raises:
        TypeError: another kind of layer.
    """
    if isinstance(layer, _CONVOLUTIONS):
        return layer.out_channels
    sizes = fan(layer)
    if sizes is not None:
        return sizes[1]
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 1 and not isinstance(layer, _CHANNELS_FIRST):
        return weight.shape[0]
    kinds = "a linear layer, a normalisation over the last dimension or a convolution"
    raise TypeError(f"expected {kinds}, got {type(layer).__name__}")


class AffineLayer(nn.Module, ABC):
    """A layer f whose output gets a trained shift, and perhaps a scale, of each channel. Mergeable into f's weights.

    Raises:
        TypeError: ``base_layer`` has no channels to speak of (see :func:`channels`).
        ValueError: ``base_layer`` is wrapped already.
    """

    base_layer: Any
    _original_weight: Tensor | None
    _original_bias: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        owner = type(self).__name__
        if isinstance(base_layer, AffineLayer):
            raise ValueError(f"{owner}: base_layer is wrapped already, by {type(base_layer).__name__}")
        try:
            self.channels = channels(base_layer)
        except TypeError as error:
            raise TypeError(f"{owner}: {error}") from None
        self.base_layer = base_layer
        for name in ("in_features", "out_features"):  # what code around a linear layer asks for
            if hasattr(base_layer, name):
                setattr(self, name, getattr(base_layer, name))
        #: Whether channels stand before one, two or three places (a convolution), else they are last.
        self.places = base_layer.weight.dim() - 2 if isinstance(base_layer, _CONVOLUTIONS) else 0
        self.register_buffer("_original_weight", None, persistent=False)
        self.register_buffer("_original_bias", None, persistent=False)
        self.merged = False
        keep_original_state(self)

    @abstractmethod
    def merged_weights(self) -> tuple[Tensor | None, Tensor | None]:
        """(weight, bias) of a base layer that does what this layer does, in float32 or wider; None: as it is."""

    @abstractmethod
    def reset_parameters(self) -> None: ...

    def train(self, mode: bool = True) -> Any:
        warn_of_merged(self, mode)
        return super().train(mode)

    def _shaped(self, vector: Tensor, like: Tensor) -> Tensor:
        """A (channels,) vector in ``like``'s dtype, laid along its channels."""
        vector = vector.to(like.dtype)
        return vector.reshape(-1, *[1] * self.places) if self.places else vector

    # -- merging ----------------------------------------------------------------------------------------------------
    def check_mergeable(self) -> None:
        """Raise TypeError if the base layer's weights cannot take the change (quantised, parametrised)."""
        base = self.base_layer
        weight = getattr(base, "weight", None)
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or hasattr(base, "parametrizations"):
            raise TypeError(
                f"{type(self).__name__}.merge: base_layer is {type(base).__name__} without a dense floating-point weight"
            )

    @torch.no_grad()
    def merge(self) -> None:
        """Put the change into the base layer's weight and bias, whose originals are kept for :meth:`unmerge`.

        Raises:
            RuntimeError: merged already, or the result is not finite.
            TypeError: the base layer cannot be merged into.
        """
        owner = type(self).__name__
        if self.merged:
            raise RuntimeError(f"{owner}.merge: merged already")
        self.check_mergeable()
        base = self.base_layer
        weight, bias = self.merged_weights()
        for new in (weight, bias):
            if new is not None and not bool(new.to(base.weight.dtype).isfinite().all()):
                raise RuntimeError(f"{owner}.merge: the merged weights are not finite in {base.weight.dtype}")
        if weight is not None:
            self._original_weight = base.weight.detach().clone()
            base.weight.copy_(weight)
        if bias is not None and base.bias is None:
            base.bias = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)
        elif bias is not None:
            self._original_bias = base.bias.detach().clone()
            base.bias.copy_(bias)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight and bias back, bitwise.

        Raises:
            RuntimeError: not merged.
        """
        if not self.merged:
            raise RuntimeError(f"{type(self).__name__}.unmerge: not merged")
        if self._original_weight is not None:
            self.base_layer.weight.copy_(self._original_weight)
        if self._original_bias is not None:
            self.base_layer.bias.copy_(self._original_bias)
        else:
            self.base_layer.bias = None
        self._original_weight = self._original_bias = None
        self.merged = False

    def original_parameters(self) -> dict[str, Tensor]:
        """The base layer's parameters without the change, merged or not."""
        found = dict(self.base_layer.named_parameters(recurse=False))
        if self.merged:
            originals = {"weight": self._original_weight, "bias": self._original_bias}
            found |= {name: t for name, t in originals.items() if t is not None}
            if self._original_bias is None:
                found.pop("bias", None)
        return found

    def extra_repr(self) -> str:
        return f"channels={self.channels}, merged={self.merged}"


class ScaleShift(AffineLayer):
    """SSF: ``y = f(x) * scale + shift``, a pair for each channel.

    Args:
        base_layer: the frozen layer f: linear, a normalisation over the last dimension, or a convolution.
        init: "identity" (ones and zeros) or "paper" (normal about them, deviation 0.02).
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown init, or ``base_layer`` is wrapped already.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        init: str = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(base_layer)
        check_one_of("ScaleShift", "init", init, INITS)
        self.init = init
        place = check_place("ScaleShift", device, dtype)
        self.scale = nn.Parameter(torch.empty(self.channels, **place))
        self.shift = nn.Parameter(torch.empty(self.channels, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        deviation = 0.02 if self.init == "paper" else 0.0
        nn.init.normal_(self.scale, 1.0, deviation)
        nn.init.normal_(self.shift, 0.0, deviation)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before_call(self.base_layer, x)
        y = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return y
        return torch.addcmul(self._shaped(self.shift, y), y, self._shaped(self.scale, y))

    def forward_slice(self, x: Tensor, start: int, stop: int) -> Tensor | None:
        """Columns ``start:stop`` of ``forward(x)`` for a linear base layer, or None where only the whole can be had."""
        y = linear_slice(self.base_layer, x, start, stop)
        if y is None or self.merged:
            return y
        return torch.addcmul(self.shift[start:stop].to(y.dtype), y, self.scale[start:stop].to(y.dtype))

    def check_mergeable(self) -> None:
        super().check_mergeable()
        if not (isinstance(self.base_layer, _MERGEABLE) or keeps_columns(self.base_layer)):
            raise TypeError(
                f"{type(self).__name__}.merge: base_layer is {type(self.base_layer).__name__}; a scale and a shift go "
                "into a linear layer, a convolution or a normalisation of torch with a weight and a place for a bias"
            )

    def merged_weights(self) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale, shift = self.scale.to(wide), self.shift.to(wide)
        rows = scale if keeps_columns(self.base_layer) else scale.reshape(-1, *[1] * (weight.dim() - 1))
        return weight.to(wide) * rows, shift if bias is None else bias.to(wide) * scale + shift


class BiasShift(AffineLayer):
    """BitFit: the layer with a trained bias, kept as a change ``delta`` of the frozen one. No pass is added (but one over the
    output of a quantised layer).

    Args:
        base_layer: a frozen layer with a bias.
        device, dtype: of ``delta``, which starts at zero.

    Raises:
        ValueError: ``base_layer`` has no bias, or is wrapped already.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(base_layer)
        if not isinstance(getattr(base_layer, "bias", None), Tensor):
            raise ValueError(f"BiasShift: base_layer ({type(base_layer).__name__}) has no bias")
        self.delta = nn.Parameter(torch.empty(self.channels, **check_place("BiasShift", device, dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.delta)

    def _bias(self) -> Tensor:
        bias = self.base_layer.bias
        return bias + self.delta.to(bias.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        if not can_train(self.base_layer.weight):  # quantised: its own bias may be added in fewer bits than delta has
            before_call(self.base_layer, x)
            y = self.base_layer(x, *args, **kwargs)
            return y + self._shaped(self.delta, y)
        return torch.func.functional_call(self.base_layer, {"bias": self._bias()}, (x, *args), kwargs)

    def forward_slice(self, x: Tensor, start: int, stop: int) -> Tensor | None:
        """Columns ``start:stop`` of ``forward(x)`` for a plain linear base layer, else None."""
        if type(self.base_layer) is not nn.Linear:
            return None
        bias = self.base_layer.bias if self.merged else self._bias()
        return nn.functional.linear(x, self.base_layer.weight[start:stop], bias[start:stop])

    def merged_weights(self) -> tuple[Tensor | None, Tensor | None]:
        bias = self.base_layer.bias
        wide = torch.promote_types(bias.dtype, torch.float32)
        return None, bias.to(wide) + self.delta.to(wide)
