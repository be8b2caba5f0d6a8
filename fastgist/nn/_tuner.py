"""What every low-rank layer around a linear layer has in common: the fused call, merging, and its way back."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from fastgist import functional
from fastgist.nn._quantised import BeforeCall, before_call

__all__ = [
    "Factors",
    "TunerLinear",
    "factory",
    "fan",
    "is_hooked",
    "is_plain",
    "keeps_columns",
    "linear_slice",
]

#: Rows of what is decoded step by step.
_FEW = 16
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)
#: Packages whose linear layers, by a forward of their own, return a new tensor and keep no hold of it.
_KNOWN = ("bitsandbytes", "torchao")


class Factors(NamedTuple):
    """The update of one weight: rows g n + j of dW are ``(v_j * gain_g) u^T``.

    u: (in, R). v: (n, R) with out = G n. gain: (G, R), (R,) or None for ones.
    """

    u: Tensor
    v: Tensor
    gain: Tensor | None = None


def autocast_enabled(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def is_hooked(module: nn.Module) -> bool:
    """True if calling ``module`` runs more than its class's forward: hooks (but ours, which changes no value), or a forward
    replaced on the instance."""
    before = module._forward_pre_hooks
    return bool(
        module._forward_hooks
        or (before and not all(type(hook) is BeforeCall for hook in before.values()))
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def fan(layer: Any) -> tuple[int, int] | None:
    """(in, out) of a linear layer, which transformers' Conv1D calls nx and nf; None for anything else."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        inner, outer = (getattr(layer, name, None) for name in names)
        if isinstance(inner, int) and isinstance(outer, int):
            return inner, outer
    return None


def is_plain(layer: nn.Module) -> bool:
    """True for an ordinary dense ``nn.Linear``: its weight may be read, fused with and merged into.

    A quantised layer (a subclass, or a tensor subclass as weight), a parametrised one and any other module are not:
    those are reached through their own forward.
    """
    return (
        type(layer) is nn.Linear  # a parametrised layer is of a class of its own
        and type(layer.weight) in (nn.Parameter, Tensor)
        and layer.weight.dtype in _DTYPES
    )


def keeps_columns(layer: nn.Module) -> bool:
    """True for transformers' Conv1D, a linear layer whose dense weight is (in, out)."""
    kind = type(layer)
    return (
        (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
        and type(layer.weight) is nn.Parameter
        and layer.weight.dtype in _DTYPES
    )


def _gives_away(layer: nn.Module) -> bool:
    """Whether the tensor that ``layer(x)`` returns is the caller's alone, so that it may be written to.

    True of linear layers that are known: nn.Linear and its subclasses with its forward (a parametrised one, a weight of
    torchao), bitsandbytes' layers, and PEFT's around such a one. Not where a hook may have kept the output. Of other
    layers, such as one that ends in an activation which needs its result in the backward, nothing is known.
    """
    if every_module._global_forward_hooks:
        return False
    while not is_hooked(layer):
        package = type(layer).__module__.split(".", 1)[0]
        if type(layer).__call__ is not nn.Module.__call__:
            return False
        if isinstance(layer, nn.Linear):
            return type(layer).forward is nn.Linear.forward or package in _KNOWN
        inner = getattr(layer, "base_layer", None)
        if package != "peft" or not isinstance(inner, nn.Module):
            return False
        layer = inner
    return False


def _has_no_backward(y: Tensor) -> bool:
    """Whether ``y`` came of an operation without a backward: outside autograd, or one for which torch has put a node that only
    warns, and passes no gradient on."""
    return not y.requires_grad or (y.grad_fn is not None and y.grad_fn.name().endswith("WarnNotImplemented"))


def keep_original_state(layer: Any) -> None:
    """Make ``layer``'s state_dict the same merged or not, and refuse to load into it while it is merged.

    A merged weight in a state_dict would get its update a second time wherever it is loaded.
    """
    layer.register_state_dict_post_hook(_write_originals)
    layer.register_load_state_dict_pre_hook(_refuse_merged)


def _write_originals(layer: Any, state: dict[str, Any], prefix: str, metadata: object) -> None:
    if layer.merged:
        originals = layer.original_parameters()
        for name, p in layer.base_layer.named_parameters(recurse=False):
            key = f"{prefix}base_layer.{name}"
            if name not in originals:
                state.pop(key, None)
            elif originals[name] is not p and key in state:
                state[key] = originals[name]


def _refuse_merged(
    layer: Any,
    state: object,
    prefix: str,
    metadata: object,
    strict: object,
    missing: object,
    unexpected: object,
    errors: list,
) -> None:
    if layer.merged:
        errors.append(f"{prefix.rstrip('.')} is merged: unmerge the model before loading into it")


def warn_of_merged(layer: Any, mode: bool) -> None:
    """To be told by ``layer.train(mode)``: nothing of a merged layer trains."""
    if mode and layer.merged and any(p.requires_grad for p in layer.parameters()):
        warnings.warn(
            f"{type(layer).__name__}: train() of a merged layer: what is merged runs, and the layer's own parameters get no "
            "gradient; unmerge(model) before training goes on",
            UserWarning,
            stacklevel=4,
        )


class TunerLinear(nn.Module, ABC):
    """A linear layer with a low-rank update of its frozen weight, ``y = x W^T + b + scale * (x U * gain) V^T``.

    ``base_layer`` is kept as it is. A plain ``nn.Linear`` is fused with the update in one operation
    (:func:`fastgist.functional.cp_linear`); anything else (a quantised, sharded, parametrised or wrapped layer, a layer
    with hooks) is called, and the update added to what it returns by another (:func:`fastgist.functional.cp_update`).
    That goes into the same memory where the layer is known to give its output away (see :func:`_gives_away`) and
    autograd does not hold it for a view. The layer has no ``weight``: code that reads the weight past the layer fails
    instead of losing the update.

    Factors in another dtype than the base's are cast at the edge, so float32 factors serve a bfloat16 model. Beside a layer
    that is called float32 factors stay as they are.

    A base without a backward, whose input wants a gradient, is refused at the call (RuntimeError): layers below would lose
    theirs in silence. bitsandbytes' 4-bit layers, which have none once evaluated on some CPUs, are unpacked first.

    Raises:
        TypeError: ``base_layer`` has no ``in_features`` and ``out_features`` (nor ``nx`` and ``nf``).
        ValueError: ``base_layer`` is wrapped already.
    """

    base_layer: Any
    _original_weight: Tensor | None

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        owner = type(self).__name__
        if isinstance(base_layer, TunerLinear):
            raise ValueError(f"{owner}: base_layer is wrapped already, by {type(base_layer).__name__}")
        sizes = fan(base_layer)
        if sizes is None:
            raise TypeError(f"{owner}: base_layer must be a linear layer, got {type(base_layer).__name__}")
        self.base_layer = base_layer
        self.in_features, self.out_features = sizes
        self.register_buffer("_original_weight", None, persistent=False)
        keep_original_state(self)

    @property
    def _plain(self) -> bool:
        return is_plain(self.base_layer)  # asked anew: a model may be quantised after it was wrapped

    # -- what a subclass says ---------------------------------------------------------------------------------------
    scale: float = 1.0
    dropout_p: float = 0.0

    @abstractmethod
    def get_factors(self) -> Factors:
        """The factors of this layer's update, in the parameters' dtype."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw this layer's own parameters anew; the update is zero afterwards."""

    # -- forward ----------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        base = self.base_layer
        if self._original_weight is not None:
            return base(x)
        factors = self.get_factors()
        p = self.dropout_p if self.training else 0.0
        few = p == 0.0 and factors.u.is_cpu and factors.v.is_cpu and self._is_few(x, factors.u.dtype)
        if is_plain(base) and not is_hooked(base):
            if few and x.dtype == base.weight.dtype and base.weight.is_cpu:
                return self._few_rows(nn.functional.linear(x, base.weight, base.bias), x, factors)
            u, v, gain = self._cast(factors, base.weight)
            return functional.cp_linear(
                x, base.weight, base.bias, u, v, gain, scale=self.scale, dropout_p=p, training=self.training
            )
        through = x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        before_call(base, x)
        y = base(x)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"{type(self).__name__}: base_layer, a {type(base).__name__}, must return a Tensor, got "
                f"{type(y).__name__}"
            )
        if through and _has_no_backward(y):
            raise RuntimeError(
                f"{type(self).__name__}: base_layer, a {type(base).__name__}, has no backward here: its output does not "
                "depend on its input for autograd, and every layer below would silently lose its gradient. Some quantised "
                "layers have none on this device, or once they were evaluated: train on another device, or load the model "
                "anew and train before evaluating. Where nothing below is trained, give x.detach(), or call under "
                "torch.no_grad()"
            )
        if few and x.dtype == y.dtype:
            return self._few_rows(y, x, factors)
        if not autocast_enabled(y.device):
            x = x.to(y.dtype)
            if not (y.dtype in _HALF and factors.u.dtype == torch.float32):
                factors = self._cast(factors, y)
        u, v, gain = factors
        options: dict[str, Any] = {"dropout_p": p, "training": self.training, "inplace": self._in_place(y, x)}
        return functional.cp_update(y, x, u, v, gain, scale=self.scale, **options)

    def _in_place(self, y: Tensor, x: Tensor) -> bool:
        """Whether the update may be written into ``y``, which the base layer has returned. A compiler decides by itself."""
        return (
            not torch.compiler.is_compiling()
            and type(y) is Tensor
            and y is not x
            and not (y._is_view() and torch.is_grad_enabled())  # autograd would go through what it is a view of
            and not (y.is_leaf and y.requires_grad)
            and _gives_away(self.base_layer)
        )

    def _is_few(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether x is a few rows on a CPU without autograd, autocast or a compiler, such as a token that is decoded, and
        ``dtype``, the factors', holds what x and h = x U do (float16's range does not hold h)."""
        return (
            not torch.compiler.is_compiling()  # first: a comparison of sizes would hold for a traced batch for ever
            and not torch.is_grad_enabled()
            and x.device.type == "cpu"
            and x.dim() > 0
            and x.shape[-1] == self.in_features
            and 0 < x.numel() <= _FEW * self.in_features
            and torch.promote_types(x.dtype, dtype) == dtype != torch.float16
            and not torch.is_autocast_enabled("cpu")
        )

    def _few_rows(self, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """y, the base layer's, with the update of a few rows x, without autograd. Such products take less than an operation's
        checks: x and h are widened to the factors' dtype instead of the factors being narrowed."""
        u, v, gain = factors
        h = torch.mm(x.reshape(-1, x.shape[-1]).to(u.dtype), u)
        folds = self.out_features // v.shape[0]
        if folds == 1:
            h = h if gain is None else h * gain
        else:  # a row for each fold of a row
            h = h[:, None] if gain is None else h[:, None] * gain
            h = h.expand(-1, folds, -1).reshape(-1, v.shape[1])
        total = torch.addmm(y.reshape(-1, v.shape[0]).to(u.dtype), h, v.transpose(0, 1), alpha=self.scale)
        return total.to(y.dtype).view_as(y)

    def forward_slice(self, x: Tensor, start: int, stop: int) -> Tensor | None:
        """Columns ``start:stop`` of ``forward(x)`` without computing the others, or None where that is not exact.

        It is not while dropout is active (the mask belongs to the rows of the whole call), for a base layer that can
        only be called whole, or when the cut is not between folds.
        """
        base = self.base_layer
        if not self._plain:
            return None
        bias = None if base.bias is None else base.bias[start:stop]
        if self._original_weight is not None:
            return nn.functional.linear(x, base.weight[start:stop], bias)
        if self.training and self.dropout_p > 0.0:
            return None
        u, v, gain = self._cast(self.get_factors(), base.weight)
        width = v.shape[0]
        if width == self.out_features:
            v = v[start:stop]
        elif start % width or stop % width:
            return None
        elif gain is not None and gain.dim() == 2:
            gain = gain[start // width : stop // width]
        return functional.cp_linear(x, base.weight[start:stop], bias, u, v, gain, scale=self.scale)

    @staticmethod
    def _cast(factors: Factors, weight: Tensor) -> Factors:
        """``factors`` in the dtype of ``weight`` (or of any tensor), unless autocast sees to that."""
        if factors.u.dtype == weight.dtype or autocast_enabled(weight.device):
            return factors
        u, v, gain = factors
        return Factors(u.to(weight.dtype), v.to(weight.dtype), None if gain is None else gain.to(weight.dtype))

    def _folded(self, v: Tensor, gain: Tensor | None) -> Tensor:
        """(out, R): V times each fold's gain, the folds stacked."""
        folds = self.out_features // v.shape[0]
        if gain is None:
            return v.repeat(folds, 1) if folds > 1 else v
        return (v * gain.reshape(-1, 1, v.shape[1])).expand(folds, -1, -1).reshape(-1, v.shape[1])

    # -- merging ----------------------------------------------------------------------------------------------------
    def get_delta_weight(self) -> Tensor:
        """The dense update as ``nn.Linear`` stores weights, (out, in), in the factors' dtype; also around a Conv1D."""
        u, v, gain = self.get_factors()
        return self.scale * (self._folded(v, gain) @ u.transpose(0, 1))

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the update at present."""
        return self._original_weight is not None

    def train(self, mode: bool = True) -> Any:
        warn_of_merged(self, mode)
        return super().train(mode)

    def original_parameters(self) -> dict[str, Tensor]:
        """The base layer's parameters without the update, merged or not."""
        found: dict[str, Tensor] = dict(self.base_layer.named_parameters(recurse=False))
        return found if self._original_weight is None else found | {"weight": self._original_weight}

    def check_mergeable(self) -> None:
        """Raise TypeError if the base layer's weight cannot take the update without loss (quantised, parametrised)."""
        base = self.base_layer
        if not (is_plain(base) or keeps_columns(base)):
            weight = getattr(base, "weight", None)
            what = type(base).__name__
            if isinstance(weight, Tensor):
                what += f" with a {type(weight.data).__name__} weight of {str(weight.dtype).removeprefix('torch.')}"
            raise TypeError(
                f"{type(self).__name__}.merge: base_layer is {what}; only a dense floating-point torch.nn.Linear (or "
                "transformers' Conv1D) can be merged into (a quantised weight would lose most of the update: load the "
                "adapter into the model unquantised, and merge there)"
            )

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base weight, which from then on is all that runs.

        The sum is taken in float32 (float64) and rounded once. The original weight is kept beside it, so that
        :meth:`unmerge` restores it bitwise: a second copy of this weight in memory while merged. It is not part of the
        state_dict.

        Raises:
            RuntimeError: merged already, or the sum is not finite.
            TypeError: the base layer cannot be merged into (see :meth:`check_mergeable`).
        """
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}.merge: merged already")
        self.check_mergeable()
        weight = self.base_layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = self.get_delta_weight().to(wide)
        delta = delta.transpose(0, 1) if keeps_columns(self.base_layer) else delta
        total = (weight.to(wide) + delta).to(weight.dtype)
        if bool(weight.isfinite().all()) and not bool(total.isfinite().all()):
            raise RuntimeError(
                f"{type(self).__name__}.merge: the merged weight is not finite in "
                f"{str(weight.dtype).removeprefix('torch.')}"
            )
        self._original_weight = weight.detach().clone()
        weight.copy_(total)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original base weight back, bitwise.

        Raises:
            RuntimeError: not merged.
        """
        if self._original_weight is None:
            raise RuntimeError(f"{type(self).__name__}.unmerge: not merged")
        self.base_layer.weight.copy_(self._original_weight)
        self._original_weight = None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, merged={self.merged}"


def linear_slice(layer: Any, x: Tensor, start: int, stop: int) -> Tensor | None:
    """Columns ``start:stop`` of ``layer(x)``, or None where only the whole can be computed."""
    if hasattr(layer, "forward_slice"):  # one of our layers around it
        return layer.forward_slice(x, start, stop)
    if not is_plain(layer):
        return None
    return nn.functional.linear(x, layer.weight[start:stop], None if layer.bias is None else layer.bias[start:stop])


def factory(layer: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """Where and in what a layer's own parameters are made: as asked, else beside ``layer``'s, in float32 or wider."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        device = weight.device if device is None else device
        if dtype is None and weight.dtype in _DTYPES:
            dtype = torch.promote_types(weight.dtype, torch.float32)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    return {"device": device, "dtype": dtype}


def uniform_fan_in_(tensor: Tensor, fan_in: int) -> None:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what ``nn.Linear`` draws, for transposed storage too."""
    bound = 1.0 / math.sqrt(fan_in)
    nn.init.uniform_(tensor, -bound, bound)
