"""CP mode approximation (PETAL, Aurora) as a method of Hugging Face PEFT: the same factors for all chosen layers of a shape.

PEFT's registry takes only types of its ``PeftType`` enumeration, which has no room for others: :func:`register` adds one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType, register_peft_method
from torch import Tensor, nn

from fastgist import functional
from fastgist.nn import CPFactors, Factors, factory, is_hooked, is_plain

__all__ = ["FastgistCPConfig", "FastgistCPLayer", "FastgistCPModel", "register"]

TYPE = "FASTGIST_CP"


@dataclass
class FastgistCPConfig(PeftConfig):
    """r: the rank. core: "cp" or "tucker". dropout: on the low-rank side. The rest is as in PEFT's other configurations."""

    r: int = field(default=64)
    core: str = field(default="cp")
    dropout: float = field(default=0.1)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = getattr(PeftType, TYPE)
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(set(self.target_modules))


class FastgistCPLayer(nn.Module, BaseTunerLayer):
    """A linear layer with the updates that each adapter's shared :class:`fastgist.nn.CPFactors` give its mode."""

    adapter_layer_names = ("fastgist_cp_factors",)
    other_param_names = ("fastgist_cp_mode",)

    def __init__(
        self, base_layer: nn.Linear, adapter_name: str, factors: CPFactors, mode: int, inference: bool
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.fastgist_cp_factors = nn.ModuleDict()
        self.fastgist_cp_mode: dict[str, int] = {}
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, factors, mode, inference)

    def update_layer(self, adapter_name: str, factors: CPFactors, mode: int, inference: bool) -> None:
        self.fastgist_cp_factors[adapter_name] = factors
        self.fastgist_cp_mode[adapter_name] = mode
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference)

    def factors(self, name: str) -> Factors:
        return self.fastgist_cp_factors[name](self.fastgist_cp_mode[name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        base: Any = self.get_base_layer()
        active = [name for name in self.active_adapters if name in self.fastgist_cp_factors]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) == 1 and self.base_layer is base and is_plain(base) and not is_hooked(base):
            u, v, gain = _cast(self.factors(active[0]), base.weight.dtype)
            return functional.cp_linear(x, base.weight, base.bias, u, v, gain, **self._options(active[0]))
        y = self.base_layer(x, *args, **kwargs)
        for name in active:
            factors = self.factors(name)
            wide = y.dtype in (torch.bfloat16, torch.float16) and factors.u.dtype == torch.float32
            u, v, gain = factors if wide else _cast(factors, y.dtype)
            y = functional.cp_update(y, x.to(y.dtype), u, v, gain, **self._options(name))
        return y

    def _options(self, name: str) -> dict[str, Any]:
        factors: Any = self.fastgist_cp_factors[name]
        return {"dropout_p": factors.dropout, "training": self.training}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """(out, in)."""
        u, v, gain = self.factors(adapter)
        return (v if gain is None else v * gain) @ u.T

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base: Any = self.get_base_layer()
        if not is_plain(base):
            raise TypeError(
                f"FASTGIST_CP: base_layer is {type(base).__name__}; only a dense floating-point torch.nn.Linear can be merged "
                "into (a quantised weight would lose most of the update)"
            )
        weight = base.weight
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.fastgist_cp_factors:
                merged = weight + self.get_delta_weight(name).to(weight.dtype)
                if safe_merge and not bool(merged.isfinite().all()):
                    raise ValueError(f"FASTGIST_CP: the weight merged with adapter {name!r} is not finite")
                weight.copy_(merged)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            weight.sub_(self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype))


def _cast(factors: Factors, dtype: torch.dtype) -> Factors:
    u, v, gain = factors
    return Factors(u.to(dtype), v.to(dtype), None if gain is None else gain.to(dtype))


class FastgistCPModel(BaseTuner):
    """PEFT's tuner of the type: all chosen linear layers of one shape share an adapter's factors."""

    prefix = "fastgist_cp_"
    tuner_layer_cls = FastgistCPLayer
    target_module_mapping = {k: list(v) for k, v in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()}

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """The factors of one more adapter. (PEFT calls ``_pre_injection_hook`` for the first adapter only.)"""
        counts: Counter[tuple[int, int]] = Counter()
        place: dict[str, Any] = {}
        for key, module in model.named_modules():
            base = module.get_base_layer() if isinstance(module, FastgistCPLayer) else module
            if isinstance(base, nn.Linear) and self._check_target_module_exists(peft_config, key):
                counts[base.in_features, base.out_features] += 1
                place = place or factory(base, None, None)
        #: what :meth:`_create_and_replace` hands out: factors by shape, and modes in the order of the layers
        self.__dict__["_shared"] = {
            shape: CPFactors(*shape, peft_config.r, count, peft_config.core, peft_config.dropout, **place)
            for shape, count in counts.items()
        }
        self.__dict__["_given"] = Counter()

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear):
            raise TypeError(f"FASTGIST_CP: {current_key} is {type(base).__name__}; it adapts torch.nn.Linear")
        shape = base.in_features, base.out_features
        factors, mode = self._shared[shape], self._given[shape]
        self._given[shape] += 1
        if isinstance(target, FastgistCPLayer):
            target.update_layer(adapter_name, factors, mode, peft_config.inference_mode)
            return
        layer = FastgistCPLayer(target, adapter_name, factors, mode, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Shared factors once, under the name of the first layer that has them."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        first = cls._first(model, adapter_name)
        return {key: tensor for key, tensor in found.items() if first.get(key, key) == key}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The same tensors under the names of all layers that share them, so that none counts as missing."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return found | {key: found[name] for key, name in cls._first(model, adapter_name).items() if name in found}

    @staticmethod
    def _first(model: nn.Module, adapter_name: str) -> dict[str, str]:
        """The full name of each factor of an adapter -> the name under which it comes first."""
        seen: dict[int, str] = {}
        names: dict[str, str] = {}
        for path, layer in model.named_modules():
            if isinstance(layer, FastgistCPLayer) and adapter_name in layer.fastgist_cp_factors:
                for name, p in layer.fastgist_cp_factors[adapter_name].named_parameters():
                    key = f"{path}.fastgist_cp_factors.{adapter_name}.{name}"
                    names[key] = seen.setdefault(id(p), key)
        return names


def register() -> type[FastgistCPConfig]:
    """See :func:`fastgist.integrations.peft.register`. A second call changes nothing."""
    if TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, TYPE)
        member._name_, member._value_ = TYPE, TYPE
        type.__setattr__(PeftType, TYPE, member)
        PeftType._member_map_[TYPE] = member
        PeftType._value2member_map_[TYPE] = member
        PeftType._member_names_.append(TYPE)
        register_peft_method(name=TYPE.lower(), config_cls=FastgistCPConfig, model_cls=FastgistCPModel)
    return FastgistCPConfig
