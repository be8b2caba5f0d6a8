"""What surgery needs to know of a model family, behind one small interface. Families live in fastgist.integrations."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from fastgist.nn import AttentionForward, BlockForward, channels, fan

__all__ = ["AttentionSite", "Family", "LinearSite", "Selection", "find_family", "register_family", "select"]


@dataclass(frozen=True)
class LinearSite:
    """A linear layer that can be adapted: its path, other names it answers to, and the names of its equal parts."""

    path: str
    module: nn.Module
    aliases: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionSite:
    """An attention layer's forward with its keys and values left open, and their heads and width of a head."""

    run: AttentionForward
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Selection:
    """A chosen layer; ``parts`` are the indices of the chosen parts, None for the layer as a whole."""

    site: LinearSite
    parts: tuple[int, ...] | None


class Family(ABC):
    """One kind of model. Methods get the plain model (not a gist model around it)."""

    name: str

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` is of this family."""

    def why_not(self, model: nn.Module) -> str | None:
        """Why ``model``, which no family matches, cannot be adapted, as a sentence; None where nothing is known of it."""
        return None

    @abstractmethod
    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of the task head's modules: trained, saved and swapped with an adapter."""

    @abstractmethod
    def linears(self, model: nn.Module) -> list[LinearSite]:
        """The linear layers that low-rank methods may adapt. The model is not wrapped when this is called."""

    @abstractmethod
    def sublayers(self, model: nn.Module) -> dict[str, list[str]]:
        """Paths of the "mlp" and "attention" sublayers, for adapters. The model is not wrapped when this is called."""

    def affine_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Layers whose output channels a method may scale and shift, by path. The model is not wrapped when this is called.

        Linear layers, normalisations and convolutions outside the head and outside :meth:`reserved_paths`.
        """
        apart = (*self.head_paths(model), *self.reserved_paths(model))
        found = {}
        for path, module in model.named_modules():
            if any(path == p or path.startswith(f"{p}.") for p in apart):
                continue
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and (weight.is_floating_point() or fan(module) is not None):  # or quantised
                with contextlib.suppress(TypeError):
                    channels(module)
                    found[path] = module
        return found

    def reserved_paths(self, model: nn.Module) -> tuple[str, ...]:
        """Modules in whose place something else may be put, such as a gist token."""
        return ()

    def residual_blocks(self, model: nn.Module) -> dict[str, BlockForward]:
        """Paths of the transformer blocks, and how each runs with its additions left open.

        Raises:
            ValueError: the blocks are of a kind whose additions are not known.
        """
        raise ValueError(f"how the blocks of {type(model).__name__} add up is not known")

    def prompt_blocks(self, model: nn.Module) -> list[str]:
        """Paths of the blocks, in order, that may put prompts into the sequence. The model is not wrapped then.

        Raises:
            ValueError: prompts have no place in this model.
        """
        raise ValueError(f"where prompts go in a {type(model).__name__} is not known")

    def prompts_after(self, model: nn.Module) -> bool:
        """Whether prompts go into what comes out of the first of :meth:`prompt_blocks`, not into what goes in."""
        return False

    def attentions(self, model: nn.Module) -> dict[str, AttentionSite]:
        """Attention layers by path, and how each runs with its keys and values left open.

        Raises:
            ValueError: the attention layers are of a kind whose inside is not known.
        """
        raise ValueError(f"what happens inside the attention of {type(model).__name__} is not known")

    def width(self, model: nn.Module, path: str) -> int:
        """The width of a sublayer's output."""
        raise NotImplementedError

    def after_change(self, model: nn.Module) -> None:  # noqa: B027 - optional
        """Called when layers or the head were swapped: bring dependent attributes in line."""

    def example_inputs(self, model: nn.Module) -> tuple[Any, ...]:
        """Arguments for one forward of a small random batch, for :func:`fastgist.assert_training`."""
        raise NotImplementedError(f"{self.name}: no example inputs known; pass some to assert_training")

    def gist_host(self, model: nn.Module) -> Any:
        """How a gist token goes into ``model`` (a :class:`fastgist.gist.GistHost`); raises ValueError if it cannot."""
        raise TypeError(f"add_gist: not known how to put a gist token into {self.name} models")


_FAMILIES: list[Family] = []
#: The integrations' families, which are known once a model of their library is met: for errors before that.
_INTEGRATED = (
    "timm SwinTransformer and SwinTransformerV2",
    "timm VisionTransformer, Eva and Beit",
    "transformers BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT, DeBERTa-v2, ModernBERT, T5 encoder, "
    "ViT, DeiT, DINOv2 and CLIP classifiers",
    "transformers InstructBLIP and BLIP-2 (their Q-Former)",
    "transformers Llama, Mistral, Qwen2, Qwen3, Gemma and GPT-2 sequence classifiers and language models",
)


def register_family(family: Family) -> Family:
    """Make a family known; later ones are asked first."""
    _FAMILIES.insert(0, family)
    return family


def find_family(model: nn.Module, caller: str) -> Family:
    """The family of ``model``.

    Raises:
        TypeError: none matches; the error gives the reason where a family knows it.
    """
    libraries = {base.__module__.split(".")[0] for base in type(model).__mro__}
    of_timm = "timm" in libraries
    if of_timm:
        import fastgist.integrations.timm as timm_models
    elif "transformers" in libraries:
        import fastgist.integrations.transformers  # noqa: F401
    for family in _FAMILIES:
        if family.matches(model):
            return family
    reason = next((why for family in _FAMILIES if (why := family.why_not(model)) is not None), None)
    if reason is not None:
        raise TypeError(f"{caller}: {reason}")
    known = "; ".join(sorted({*_INTEGRATED, *(f.name for f in _FAMILIES)}))
    reason = f" ({timm_models.why_unknown(model)})" if of_timm else ""
    raise TypeError(
        f"{caller}: the structure of {type(model).__module__}.{type(model).__name__} is not known"
        f"{reason}; known: {known}. Others can be added with fastgist.peft.register_family"
    )


def select(owner: str, sites: Sequence[LinearSite], targets: Sequence[str]) -> list[Selection]:
    """The sites that ``targets`` name. A target is a part's name, the end of a path ("qkv", "attn.qkv"), an alias, or a
    pattern with ``*``, ``?`` or ``[...]`` that the whole path matches ("*.layers.[01].*_proj").

    Raises:
        ValueError: no targets, one given twice or matching nothing (the error lists what names exist), a layer matched
            twice.
    """
    names = _names(sites)
    if not targets:
        raise ValueError(f"{owner}: targets is empty; this model has {names}")
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(f"{owner}: target {target!r} is given twice")
    chosen: dict[str, tuple[LinearSite, str, list[int] | None]] = {}
    for target in targets:
        found = False
        for site in sites:
            part = site.parts.index(target) if target in site.parts else None
            whole = target in site.aliases or f".{site.path}".endswith(f".{target}") or fnmatchcase(site.path, target)
            if part is None and not whole:
                continue
            found = True
            known = chosen.get(site.path)
            if known is None:
                chosen[site.path] = (site, target, None if whole else [part])  # type: ignore[list-item]
            elif whole or known[2] is None:
                raise ValueError(f"{owner}: layer {site.path} is matched twice, by {known[1]!r} and {target!r}")
            else:
                known[2].append(part)  # type: ignore[arg-type]
        if not found:
            raise ValueError(f"{owner}: nothing in this model is called {target!r}; it has {names}")
    return [
        Selection(site, None if parts is None else tuple(sorted(parts)))
        for site, _, parts in (chosen[s.path] for s in sites if s.path in chosen)
    ]


def _names(sites: Sequence[LinearSite]) -> str:
    """What targets may say, each once: last path components, aliases and parts."""
    names: dict[str, None] = {}
    for site in sites:
        names |= dict.fromkeys((site.path.rsplit(".", 1)[-1], *site.aliases, *site.parts))
    return ", ".join(names) or "no linear layers that can be adapted"
