"""How each configuration becomes layers: a method builds wrappers for chosen places, installing is the same for all."""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fastgist.nn import (
    AdaptedBlock,
    AdaptedLayer,
    Adapter,
    BiasShift,
    CPFactors,
    CPLinear,
    CPThreshold,
    LoRALinear,
    PrefixedAttention,
    PromptedBlock,
    ScaleShift,
    factory,
    fan,
)
from fastgist.nn._checks import check_one_of
from fastgist.nn._quantised import can_train
from fastgist.peft.config import (
    FACT_CORES,
    PLACEMENTS,
    AdapterConfig,
    BitFitConfig,
    CPConfig,
    FacTConfig,
    FullConfig,
    LinearProbeConfig,
    LoraConfig,
    PeftConfig,
    PrefixConfig,
    PromptConfig,
    SSFConfig,
    ThresholdConfig,
)
from fastgist.peft.family import Family, Selection, select

__all__ = ["Method", "method_of", "register_method", "registered_configs"]


class Method(ABC):
    """What a configuration does to a model.

    ``build`` returns wrappers by the path they go to, each with the module now there as ``base_layer``; it must leave
    the model alone. ``mergeable``: wrappers have merge() and unmerge(). A wrapper with ``attached(model)`` and
    ``detached(model)`` is told when it has gone into a model and before it goes out (to hook what it needs).
    """

    mergeable = False
    #: How an error about a method that cannot merge calls it.
    title = "this method"
    #: Whether it trains the model's own weights too, so that they belong to the adaptation and are saved with it.
    whole = False

    def can_merge(self, config: PeftConfig) -> bool:
        return self.mergeable

    @abstractmethod
    def build(self, model: nn.Module, family: Family, config: PeftConfig) -> dict[str, nn.Module]: ...

    def start(self, built: Mapping[str, nn.Module], config: PeftConfig) -> None:  # noqa: B027 - optional
        """Give what ``build`` returned a start that takes more than a draw. Not called where a file fills it at once."""


_METHODS: dict[str, tuple[type[PeftConfig], Method]] = {}


def register_method(config_class: type[PeftConfig], method: Method) -> None:
    """Make ``config_class`` known to get_peft_model and to adapter files under its ``method`` name.

    Raises:
        ValueError: the name is taken by another class.
    """
    name = config_class.method
    taken = _METHODS.get(name)
    if taken is not None and taken[0] is not config_class:
        raise ValueError(f"register_method: {name!r} is taken by {taken[0].__name__}")
    _METHODS[name] = (config_class, method)


def registered_configs() -> dict[str, type[PeftConfig]]:
    return {name: config_class for name, (config_class, _) in _METHODS.items()}


def method_of(config: PeftConfig) -> Method:
    """The method of a configuration.

    Raises:
        TypeError: its class is not registered.
    """
    for config_class, method in _METHODS.values():
        if type(config) is config_class:
            return method
    names = [c.__name__ for c, _ in _METHODS.values()]
    if isinstance(config, type):
        got = f"the class {config.__name__} (write {config.__name__}())"
    else:
        got = type(config).__name__
        if got in names or type(config).__module__.split(".")[0] == "peft":
            got = f"{type(config).__module__}.{got}"
    if got.startswith("peft."):
        got += " of Hugging Face PEFT: take fastgist's, or peft.get_peft_model, whose PeftModel add_gist takes"
    raise TypeError(f"get_peft_model: config must be one of {', '.join(names)} (or registered), got {got}")


class _Adapters(Method):
    title = "an adapter (a nonlinear bottleneck)"
    #: placement -> (kind of sublayer, where the adapter sits)
    placements: ClassVar[dict[str, tuple[tuple[str, str], ...]]] = {
        "pfeiffer": (("mlp", "sequential"),),
        "houlsby": (("attention", "sequential"), ("mlp", "sequential")),
        "parallel": (("mlp", "parallel"),),
    }
    #: placement -> branches of a block that its one adapter stands beside
    beside: ClassVar[dict[str, tuple[str, ...]]] = {"adaptformer": ("mlp",), "shared": ("attention", "mlp")}

    def build(self, model: nn.Module, family: Family, config: PeftConfig) -> dict[str, nn.Module]:
        assert isinstance(config, AdapterConfig)
        if config.placement in self.beside:
            return self._beside(model, family, config)
        check_one_of(
            "AdapterConfig", "placement", config.placement, PLACEMENTS
        )  # a field may be set after it was checked
        sublayers = family.sublayers(model)
        built: dict[str, nn.Module] = {}
        for kind, side in self.placements[config.placement]:
            if not sublayers.get(kind):
                have = ", ".join(f"{len(paths)} {name}" for name, paths in sublayers.items() if paths) or "none"
                raise ValueError(
                    f"AdapterConfig: placement {config.placement!r} needs {kind} sublayers; this model has {have}"
                )
            for path in sublayers[kind]:
                base = model.get_submodule(path)
                width = family.width(model, path)
                if side == "parallel" and getattr(base, "in_features", width) != width:
                    raise ValueError(
                        f"AdapterConfig: placement {config.placement!r} needs sublayers that keep the width; {path} does not "
                        "('adaptformer' stands beside the branch as a whole)"
                    )
                built[path] = AdaptedLayer(base, self._adapter(model, family, config, path), side)
        return built

    def _beside(self, model: nn.Module, family: Family, config: AdapterConfig) -> dict[str, nn.Module]:
        try:
            blocks = family.residual_blocks(model)
        except ValueError as error:
            raise ValueError(f"AdapterConfig: placement {config.placement!r} is not to be had: {error}") from None
        return {
            path: AdaptedBlock(
                model.get_submodule(path),
                self._adapter(model, family, config, path),
                run,
                self.beside[config.placement],
            )
            for path, run in blocks.items()
        }

    @staticmethod
    def _adapter(model: nn.Module, family: Family, config: AdapterConfig, path: str) -> Adapter:
        return Adapter(
            family.width(model, path),
            config.bottleneck_dim,
            config.activation,
            config.scale,
            init=config.init,
            norm=config.norm,
            dropout=config.dropout,
            **factory(_first_linear(model.get_submodule(path)), None, None),
        )


def _first_linear(module: nn.Module) -> nn.Module:
    """The first layer with a floating-point weight matrix: new parameters go to its device, in its dtype or wider."""
    for child in module.modules():
        weight = getattr(child, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            return child
    return module


def _sizes(choice: Selection) -> tuple[int, int]:
    """(in, out) of a chosen layer."""
    sizes = fan(choice.site.module)
    assert sizes is not None  # a family's linears have them
    return sizes


def _check_rank(owner: str, rank: int, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a rank above the smaller width of every layer, where no update is of low rank; warn where some are narrower.

    Args:
        sizes: (in, out) of the matrix that is updated, by the layer's path.

    Raises:
        ValueError: as said.
    """
    narrow = [path for path, size in sizes.items() if rank > min(size)]
    if not narrow:
        return
    path = max(narrow, key=lambda p: min(sizes[p]))
    inner, outer = sizes[path]
    if len(narrow) == len(sizes):
        raise ValueError(
            f"{owner}: rank must be at most {min(inner, outer)}, {path} being {inner} -> {outer}, got {rank}"
        )
    warnings.warn(
        f"{owner}: rank {rank} is above the smaller width of {len(narrow)} of {len(sizes)} layers ({path} is {inner} -> "
        f"{outer}): an update there is not of low rank",
        UserWarning,
        stacklevel=2,
    )


class _LoRA(Method):
    mergeable = True
    title = "LoRA"

    def build(self, model: nn.Module, family: Family, config: PeftConfig) -> dict[str, nn.Module]:
        assert isinstance(config, LoraConfig)
        built: dict[str, nn.Module] = {}
        choices = select("LoraConfig", family.linears(model), config.targets)
        sizes = {}
        for choice in choices:
            inner, outer = _sizes(choice)
            sizes[choice.site.path] = inner, outer if choice.parts is None else outer // len(choice.site.parts)
        _check_rank("LoraConfig", config.rank, sizes)
        for choice in choices:
            site = choice.site
            fused: dict[str, Any] = {} if choice.parts is None else {"folds": len(site.parts), "parts": choice.parts}
            built[site.path] = LoRALinear(
                site.module, config.rank, config.alpha, config.dropout, init=config.init, **fused
            )
        return built


def start_from_weights(built: Mapping[str, nn.Module], config: PeftConfig) -> None:
    """Mode approximation that starts from a decomposition of the weights, where ``config.init`` is "weights".

    Raises:
        ImportError: tensorly is not installed.
    """
    if getattr(config, "init", None) != "weights":
        return
    try:
        from fastgist.integrations.tensorly import init_from_weights
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{type(config).__name__}: init='weights' needs {error.name}: pip install 'fastgist[tensorly]'"
        ) from error
    init_from_weights(built)


class _CP(Method):
    mergeable = True
    title = "CP"

    def build(self, model: nn.Module, family: Family, config: PeftConfig) -> dict[str, nn.Module]:
        assert isinstance(config, CPConfig)
        threshold = ThresholdConfig.of("CPConfig", config.threshold)
        return self.shared(model, family, config, config.core, 1.0, threshold)

    def start(self, built: Mapping[str, nn.Module], config: PeftConfig) -> None:
        start_from_weights(built, config)

    def shared(
        self,
        model: nn.Module,
        family: Family,
        config: CPConfig | FacTConfig,
        core: str,
        scale: float,
        threshold: ThresholdConfig | None = None,
    ) -> dict[str, nn.Module]:
        """Layers around the targets of ``config``, with one CPFactors for all of a shape, each with a threshold of its own."""
        choices = select(type(config).__name__, family.linears(model), config.targets)
        shapes = [self._shape(choice) for choice in choices]
        sizes = {choice.site.path: shape[:2] for choice, shape in zip(choices, shapes, strict=True)}
        _check_rank(type(config).__name__, config.rank, sizes)
        counts: Counter[tuple[int, int]] = Counter()
        modes: list[tuple[int | None, ...]] = []
        for choice, (inner, outer, folds) in zip(choices, shapes, strict=True):
            active = range(folds) if choice.parts is None else choice.parts
            first = counts[inner, outer]
            rows = {fold: first + i for i, fold in enumerate(active)}
            modes.append(tuple(rows.get(fold) for fold in range(folds)))
            counts[inner, outer] += len(rows)
        factors: dict[tuple[int, int], CPFactors] = {}
        built: dict[str, nn.Module] = {}
        for choice, (inner, outer, _), mode in zip(choices, shapes, modes, strict=True):
            if (inner, outer) not in factors:
                factors[inner, outer] = CPFactors(
                    inner,
                    outer,
                    config.rank,
                    counts[inner, outer],
                    core,
                    config.dropout,
                    threshold=None if threshold is None else CPThreshold(**dataclasses.asdict(threshold)),
                    **factory(choice.site.module, None, None),
                )
            built[choice.site.path] = CPLinear(choice.site.module, factors[inner, outer], mode, scale)
        return built

    @staticmethod
    def _shape(choice: Selection) -> tuple[int, int, int]:
        """(in, out, number) of the equal matrices that a chosen layer counts as: folds of its output or of its input."""
        inner, outer = _sizes(choice)
        if choice.parts is None and inner > outer and inner % outer == 0:
            return outer, outer, inner // outer
        square = outer // inner if outer % inner == 0 else 1
        folds = square if choice.parts is None else len(choice.site.parts)
        return inner, outer // folds, folds


class _FacT(_CP):
    title = "FacT"

    def build(self, model: nn.Module, family: Family, config: PeftConfig) -> dict[str, nn.Module]:
        assert isinstance(config, FacTConfig)
        check_one_of("FacTConfig", "form", config.form, tuple(FACT_CORES))
        return self.shared(model, family, config, FACT_CORES[config.form], config.scale)


class _Prompts(Method):
    title = "prompts (rows of the sequence)"

    def build(self, model: nn.Module, family: Family, config: PeftConfig) -> dict[str, nn.Module]:
        assert isinstance(config, PromptConfig)
        try:
            paths = family.prompt_blocks(model)
        except ValueError as error:
            raise ValueError(f"PromptConfig: {error}") from None
        built: dict[str, nn.Module] = {}
        for path in paths if config.deep else paths[:1]:
            base = model.get_submodule(path)
            built[path] = PromptedBlock(
                base,
                family.width(model, path),
                config.length,
                insert=path == paths[0],
                after=path == paths[0] and family.prompts_after(model),
                dropout=config.dropout,
                **factory(_first_linear(base), None, None),
            )
        return built


class _Prefix(Method):
    title = "a prefix (rows beside the keys and values)"

    def build(self, model: nn.Module, family: Family, config: PeftConfig) -> dict[str, nn.Module]:
        assert isinstance(config, PrefixConfig)
        try:
            sites = family.attentions(model)
        except ValueError as error:
            raise ValueError(f"PrefixConfig: {error}") from None
        built: dict[str, nn.Module] = {}
        for path, site in sites.items():
            base = model.get_submodule(path)
            place = factory(_first_linear(base), None, None)
            built[path] = PrefixedAttention(base, site.run, site.heads, site.head_dim, config.length, **place)
        return built


class _SSF(Method):
    mergeable = True
    title = "SSF"

    def build(self, model: nn.Module, family: Family, config: PeftConfig) -> dict[str, nn.Module]:
        assert isinstance(config, SSFConfig)
        layers = family.affine_layers(model)
        return {p: ScaleShift(m, init=config.init, **factory(m, None, None)) for p, m in layers.items()}


class _BitFit(Method):
    mergeable = True
    title = "BitFit"

    def build(self, model: nn.Module, family: Family, config: PeftConfig) -> dict[str, nn.Module]:
        layers = family.affine_layers(model)
        biased = {p: m for p, m in layers.items() if isinstance(getattr(m, "bias", None), torch.Tensor)}
        if not biased:
            raise ValueError("BitFitConfig: no layer of this model has a bias")
        return {p: BiasShift(m, **factory(m, None, None)) for p, m in biased.items()}


class _LinearProbe(Method):
    mergeable = True  # there is nothing to merge
    title = "a linear probe"

    def build(self, model: nn.Module, family: Family, config: PeftConfig) -> dict[str, nn.Module]:
        return {}


class _Full(_LinearProbe):
    title = "full fine-tuning"
    whole = True

    def build(self, model: nn.Module, family: Family, config: PeftConfig) -> dict[str, nn.Module]:
        frozen = [name for name, p in model.named_parameters() if not can_train(p)]
        if frozen:
            shown = ", ".join(frozen[:4]) + (f" and {len(frozen) - 4} more" if len(frozen) > 4 else "")
            raise ValueError(
                f"FullConfig: trains every weight, and {len(frozen)} of {len(list(model.parameters()))} are quantised, which "
                f"cannot be trained: {shown}; load the model unquantised, or take LoraConfig(), CPConfig() or an adapter"
            )
        return {}


register_method(AdapterConfig, _Adapters())
register_method(LoraConfig, _LoRA())
register_method(CPConfig, _CP())
register_method(FacTConfig, _FacT())
register_method(PromptConfig, _Prompts())
register_method(PrefixConfig, _Prefix())
register_method(SSFConfig, _SSF())
register_method(BitFitConfig, _BitFit())
register_method(FullConfig, _Full())
register_method(LinearProbeConfig, _LinearProbe())
