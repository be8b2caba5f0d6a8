"""Prefix tokens: which are the model's own, and what has to count ours beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist.model import GistInsert
from fastgist.nn import AdaptedBlock, AdaptedLayer, PrefixedAttention, PromptedBlock

__all__ = ["count_prefix", "gist_path", "own_prefix", "plain_input_size"]


def gist_path(model: Any) -> str:
    """Where the gist token goes in: before ``norm_pre``, or behind ``pos_drop`` in a model without it (BEiT)."""
    return "norm_pre" if hasattr(model, "norm_pre") else "pos_drop"


def own_prefix(model: Any) -> int:
    """How many prefix tokens the model itself has: class and register tokens, no gist token and no prompts."""
    return model.__dict__.get(_COUNTED, (model.num_prefix_tokens, 0))[0]


#: Where a model keeps (its own prefix tokens, ours that its counters include).
_COUNTED = "_fastgist_prefix"


def count_prefix(model: Any) -> None:
    """Bring everything that counts prefix tokens in line with the gist token and the prompts that are there now."""
    own, counted = model.__dict__.get(_COUNTED, (model.num_prefix_tokens, 0))
    insert = model.get_submodule(gist_path(model))
    gist = insert.gist.length if isinstance(insert, GistInsert) else 0
    prompted = [block for block in model.blocks if isinstance(block, PromptedBlock)]
    ours = gist + (prompted[0].length if prompted else 0)
    for block in prompted:
        block.index = own + gist
    model.num_prefix_tokens = own + ours
    for module in model.blocks.modules():  # rotary attention leaves the prefix unrotated
        if isinstance(getattr(module, "num_prefix_tokens", None), int):
            module.num_prefix_tokens += ours - counted
    for method in ("_pos_embed", _COUNTED):
        model.__dict__.pop(method, None)
    if ours:
        model.__dict__[_COUNTED] = (own, ours)
        if getattr(model, "dynamic_img_size", False):
            model._pos_embed = _WithOwnPrefix(model, own)
    for module, method in _position_biases(model):
        module.__dict__.pop(method, None)
        if ours:
            setattr(module, method, _BiasOfMore(module, method, ours))
    plain_input_size(model)


class _WithOwnPrefix:
    """``_pos_embed`` of a model that sees the number of the model's own prefix tokens; copied and pickled with it."""

    def __init__(self, model: Any, prefix: int) -> None:
        self.model, self.prefix = model, prefix

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # runs in every forward: read through a view, so that threads do not meet
        return type(self.model)._pos_embed(_View(self.model, self.prefix), *args, **kwargs)


class _View:
    """Reads a model's attributes, but for num_prefix_tokens."""

    def __init__(self, model: Any, prefix: int) -> None:
        self.model = model
        self.num_prefix_tokens = prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


# -- BEiT's position bias --------------------------------------------------------------------------------------------


def _position_biases(model: Any) -> Iterator[tuple[Any, str]]:
    """Modules that make a relative position bias for a class token and the patches, and the method that does."""
    for module in model.blocks.modules():
        if getattr(module, "relative_position_bias_table", None) is not None:
            yield module, "_get_rel_pos_bias"
    if isinstance(getattr(model, "rel_pos_bias", None), nn.Module):
        yield model.rel_pos_bias, "forward"


class _BiasOfMore:
    """A relative position bias (..., N, N) in which ``count`` more tokens, behind the class token, have the class token's.

    The table knows three relations beside the distances: class token to patch, patch to class token, class token to
    itself. A gist token (or prompt) has no place in the grid either and gathers what the class token gathers, so it
    stands in the same relations: to and from a patch as the class token, to itself, to the class token and to its like
    as the class token to itself.
    """

    def __init__(self, module: Any, method: str, count: int) -> None:
        self.module, self.method, self.count = module, method, count

    def __call__(self) -> Tensor:
        bias = getattr(type(self.module), self.method)(self.module)
        for dim in (-2, -1):
            bias = torch.cat([bias.narrow(dim, 0, 1)] * self.count + [bias], dim=dim)
        return bias


# -- another input size ----------------------------------------------------------------------------------------------


def plain_input_size(model: Any) -> None:
    """Let ``model.set_input_size`` find the model as timm knows it: without our modules around its own."""
    model.__dict__.pop("set_input_size", None)
    if hasattr(model, "set_input_size") and any(isinstance(m, _WRAPPERS) for m in model.modules()):
        model.set_input_size = _PlainInputSize(model)


_WRAPPERS = (AdaptedBlock, AdaptedLayer, PrefixedAttention, PromptedBlock, GistInsert)


class _PlainInputSize:
    """A model's own ``set_input_size``, called while our wrappers are out; copied and pickled with the model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        counted = getattr(model, "num_prefix_tokens", None)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        wrapped = [(path, m) for path, m in model.named_modules() if isinstance(m, _WRAPPERS)]
        places = [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], m) for path, m in wrapped]
        for parent, leaf, module in places:
            setattr(parent, leaf, module.base_layer)
        if counted is not None:
            model.num_prefix_tokens = own_prefix(model)
        try:
            return type(model).set_input_size(model, *args, **kwargs)
        finally:
            for parent, leaf, module in places:
                setattr(parent, leaf, module)
            if counted is not None:
                model.num_prefix_tokens = counted
            for name, p in model.named_parameters():  # a resampled one is new, and older versions of timm unfreeze it
                p.requires_grad_(flags.get(name, p.requires_grad))
