"""What to add to a model: one dataclass a method, in a registry that others can add to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from fastgist.nn import affine, lora
from fastgist.nn._checks import check_bool, check_dropout, check_number, check_one_of, check_positive
from fastgist.nn.adapter import ACTIVATIONS, INITS
from fastgist.nn.cp import CORES
from fastgist.nn.threshold import POLICIES

__all__ = [
    "AdapterConfig",
    "BitFitConfig",
    "CPConfig",
    "FacTConfig",
    "FullConfig",
    "LinearProbeConfig",
    "LoraConfig",
    "PeftConfig",
    "PrefixConfig",
    "PromptConfig",
    "SSFConfig",
    "ThresholdConfig",
    "config_from_dict",
]

CP_INITS = ("identity", "weights")
PLACEMENTS = ("pfeiffer", "houlsby", "parallel", "adaptformer", "shared")
#: FacT's forms -> the core of :class:`fastgist.nn.CPFactors`.
FACT_CORES = {"tt": "tt", "tk": "tucker"}


#: What Hugging Face PEFT calls a field, and what it is called here.
_PEFT_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}
_Config = TypeVar("_Config", bound=type)


def _hinting(config_class: _Config) -> _Config:
    """A dataclass whose error about a field that PEFT calls otherwise says what it is here."""
    plain: Any = vars(config_class)["__init__"]
    fields = {f.name for f in dataclasses.fields(config_class)}

    @functools.wraps(plain)
    def init(self, *args, **values):
        for name in values:
            if name not in fields and _PEFT_NAMES.get(name) in fields:
                raise TypeError(f"{type(self).__name__}: no field {name!r}; here it is called {_PEFT_NAMES[name]!r}")
        plain(self, *args, **values)

    config_class.__init__ = init  # type: ignore[misc]
    return config_class


@dataclass
class PeftConfig:
    """Base of all configurations. ``method`` is the name under which files and the registry know it.

    Raises:
        ValueError: a value out of range. TypeError: one of another type. Both name the field.
    """

    method: ClassVar[str]

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if any(f.name == "targets" for f in dataclasses.fields(self)):
            targets: Any = vars(self)["targets"]
            if isinstance(targets, str):
                raise TypeError(f"{owner}: targets must be a tuple of names, got the string {targets!r}")
            names = tuple(targets) if isinstance(targets, Iterable) else (None,)
            if not all(isinstance(name, str) for name in names):
                raise TypeError(f"{owner}: targets must be a tuple of names, got {targets!r}")
            self.targets = names

    def _check(self, *names: str) -> None:
        """Fields that several configurations have: sizes, a factor, a dropout."""
        owner = type(self).__name__
        for name in names:
            value = getattr(self, name)
            if name == "dropout":
                check_dropout(owner, value)
            elif name == "scale":
                check_number(owner, name, value)
            else:
                setattr(self, name, check_positive(owner, name, value))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with ``method``; :func:`config_from_dict` reads it back."""
        return {"method": self.method, **dataclasses.asdict(self)}


@dataclass
class AdapterConfig(PeftConfig):
    """Bottleneck adapters.

    placement: "pfeiffer" (after each MLP), "houlsby" (after each attention and each MLP, with parameters of their own),
    "parallel" (beside each MLP, on the MLP's normed input; He et al. 2022), "adaptformer" (beside each MLP branch, on the
    block's un-normed state; Chen et al. 2022, whose scale is 0.1 and dropout 0.1) or "shared" (one adapter a block, beside
    both branches, un-normed: GIST's own, with bottleneck_dim 4, scale 0.1 and init "paper"). init: "identity" or "paper" (see
    :class:`fastgist.nn.Adapter`). norm: a LayerNorm of the adapter's own in front of it, trained. dropout: of its hidden
    units.
    """

    method: ClassVar[str] = "adapter"
    bottleneck_dim: int = 8
    placement: str = "pfeiffer"
    activation: str = "gelu"
    scale: float = 1.0
    init: str = "identity"
    norm: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("bottleneck_dim", "scale", "dropout")
        check_one_of("AdapterConfig", "placement", self.placement, PLACEMENTS)
        check_one_of("AdapterConfig", "activation", self.activation, ACTIVATIONS)
        check_one_of("AdapterConfig", "init", self.init, INITS)
        check_bool("AdapterConfig", "norm", self.norm)


@_hinting
@dataclass
class LoraConfig(PeftConfig):
    """LoRA. targets: names of linear layers, or of parts of a fused one ("q", "v" of a timm ViT's qkv).

    rank: one above the smaller width of every layer is refused where the layers are made, above that of some warned of
    (so for :class:`CPConfig` and :class:`FacTConfig`).
    """

    method: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    init: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("rank", "dropout")
        check_number("LoraConfig", "alpha", self.alpha, above=0.0)
        check_one_of("LoraConfig", "init", self.init, lora.INITS)


@dataclass
class ThresholdConfig:
    """A threshold on mode approximation's updates: the arguments of :class:`fastgist.nn.CPThreshold`, one of which each
    group of shared factors gets.

    gamma is a number here, because a file holds it; a schedule goes to CPThreshold itself. A dynamic one moves in
    :func:`fastgist.nn.update_thresholds`, which the training commands call after each step and a loop of one's own must.

    Raises:
        ValueError: an unknown policy, a number out of range. TypeError: a field of another type.
    """

    policy: str = "modes"
    gamma: float = 0.5
    dynamic: bool = False
    decay: float = 0.9
    softness: float = 0.25
    floor: float = 0.05

    def __post_init__(self) -> None:
        check_one_of("ThresholdConfig", "policy", self.policy, POLICIES)
        check_bool("ThresholdConfig", "dynamic", self.dynamic)
        self.decay = check_number("ThresholdConfig", "decay", self.decay, least=0.0, below=1.0)
        for name in ("gamma", "softness", "floor"):
            setattr(self, name, check_number("ThresholdConfig", name, getattr(self, name), above=0.0))

    @classmethod
    def of(cls, owner: str, value: object) -> ThresholdConfig | None:
        """What a field ``threshold`` of ``owner`` may be: None, a policy's name, the fields as a dict, or one of these.

        Raises:
            ValueError: a name or a field that is not known. TypeError: something else.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str):
            if value not in POLICIES:
                raise ValueError(
                    f"{owner}: threshold must be None, one of {', '.join(POLICIES)}, or a ThresholdConfig, got {value!r}"
                )
            return cls(value)
        if isinstance(value, dict):
            unknown = sorted(map(str, set(value) - {f.name for f in dataclasses.fields(cls)}))
            if unknown:
                raise ValueError(f"{owner}: threshold: ThresholdConfig has no field {', '.join(unknown)}")
            return cls(**value)
        raise TypeError(
            f"{owner}: threshold must be None, one of {', '.join(POLICIES)}, or a ThresholdConfig, got "
            f"{type(value).__name__}"
        )


@_hinting
@dataclass
class CPConfig(PeftConfig):
    """Mode approximation: U and V shared by all targets of the same shape, one row of P for each matrix.

    A layer whose outputs are a multiple of its inputs (fc1: 768 -> 4 x 768), or the reverse (fc2), counts as that many
    square matrices, so that it joins the group of the square ones. core: "cp" or "tucker" (see
    :class:`fastgist.nn.CPFactors`).

    threshold: None, or how far updates may go: "modes" or "trust" with CPThreshold's defaults, a :class:`ThresholdConfig`,
    or its fields as a dict.

    init: "identity" (U and P drawn, V = 0: the papers' own) or "weights": U, P and lambda (or C) from a decomposition of
    the group's pre-trained weights, V = 0, which needs tensorly (``pip install 'fastgist[tensorly]'``). With V = 0 the start
    is exactly the identity, and the directions that the update reads, and how much of each a matrix takes, are those that the
    weights have already (see :func:`fastgist.integrations.tensorly.init_from_weights`). To keep V as decomposed and take
    as much off the weights, as PiSSA does, would change frozen weights, which unload and disable_adapter promise back
    bitwise.
    """

    method: ClassVar[str] = "cp"
    rank: int = 64
    core: str = "cp"
    targets: tuple[str, ...] = ("q", "k", "v")
    dropout: float = 0.1
    threshold: ThresholdConfig | dict[str, Any] | str | None = None
    init: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("rank", "dropout")
        self.threshold = ThresholdConfig.of("CPConfig", self.threshold)
        check_one_of("CPConfig", "core", self.core, CORES)
        check_one_of("CPConfig", "init", self.init, CP_INITS)


@_hinting
@dataclass
class FacTConfig(PeftConfig):
    """FacT (arXiv 2212.03145): the updates of all of a transformer's matrices as one tensor, of low rank.

    form: "tt" (tensor train: an R x R matrix for each weight between shared factors) or "tk" (Tucker). scale: factor on
    the update, which the paper searches per task.
    """

    method: ClassVar[str] = "fact"
    rank: int = 16
    form: str = "tt"
    targets: tuple[str, ...] = ("q", "k", "v", "proj", "fc1", "fc2")
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("rank", "scale", "dropout")
        check_one_of("FacTConfig", "form", self.form, tuple(FACT_CORES))


@dataclass
class PromptConfig(PeftConfig):
    """Visual prompt tuning (VPT, arXiv 2203.12119): trained rows after the class token (and the gist token).

    deep: False puts them in before the first block; True gives every block prompts of its own, in the place of the last.
    Not the identity at the start: the patches see the prompts at once. In a decoder they stand before the first real token
    and have positions of their own: with a table of positions a row may be ``length`` shorter.
    """

    method: ClassVar[str] = "prompt"
    length: int = 10
    deep: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("length", "dropout")
        check_bool("PromptConfig", "deep", self.deep)


@dataclass
class PrefixConfig(PeftConfig):
    """Prefix tuning (arXiv 2101.00190): ``length`` trained keys and values before those of every attention layer.

    Not the identity at the start: the prefix takes some of the attention's weight. It has no position: neither rotary angles
    nor windows nor a cache know of it.
    """

    method: ClassVar[str] = "prefix"
    length: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("length")


@dataclass
class SSFConfig(PeftConfig):
    """SSF (arXiv 2210.08823): a scale and a shift of every channel after each linear layer, norm and patch embedding.

    init: "identity" or "paper" (see :class:`fastgist.nn.ScaleShift`).
    """

    method: ClassVar[str] = "ssf"
    init: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("SSFConfig", "init", self.init, affine.INITS)


@dataclass
class BitFitConfig(PeftConfig):
    """BitFit (arXiv 2106.10199): the biases of every layer that has one, as a change of the frozen ones.

    Biases that a model keeps outside its layers (those of q and v in timm's EVA, BEiT and Swin V2) stay as they are.
    """

    method: ClassVar[str] = "bitfit"


@dataclass
class FullConfig(PeftConfig):
    """Full fine-tuning, the ceiling that the others are compared with: everything is trained, and saved.

    It stands alone (no other named adapter beside it), and there is no way back: disable_adapter refuses, and unload
    leaves the weights as trained.
    """

    method: ClassVar[str] = "full"


@dataclass
class LinearProbeConfig(PeftConfig):
    """The head alone."""

    method: ClassVar[str] = "linear_probe"


def config_from_dict(data: dict[str, Any], known: dict[str, type[PeftConfig]]) -> PeftConfig:
    """The configuration that :meth:`PeftConfig.to_dict` wrote.

    Raises:
        ValueError: a method that is not among ``known``, or fields it does not have.
    """
    data = dict(data)
    method = data.pop("method", None)
    if method not in known:
        raise ValueError(f"unknown adapter method {method!r}; known here: {', '.join(sorted(known))}")
    fields = {f.name for f in dataclasses.fields(known[method])}
    unknown = sorted(set(data) - fields)
    if unknown:
        raise ValueError(f"{known[method].__name__} has no field {', '.join(unknown)}")
    return known[method](**data)
