"""Prefix tokens: which are the model's own, and what has to count ours beside them."""

from __future__ import annotations

from typing import Any

from fastgist.gist.model import GistInsert
from fastgist.nn import PromptedBlock

__all__ = ["GIST_PATH", "count_prefix", "own_prefix"]

#: Before this module the gist token goes in.
GIST_PATH = "norm_pre"


def own_prefix(model: Any) -> int:
    """How many prefix tokens the model itself has: class and register tokens, no gist token and no prompts."""
    return model.__dict__.get(_COUNTED, (model.num_prefix_tokens, 0))[0]


#: Where a model keeps (its own prefix tokens, ours that its counters include).
_COUNTED = "_fastgist_prefix"


def count_prefix(model: Any) -> None:
    """Bring everything that counts prefix tokens in line with the gist token and the prompts that are there now."""
    own, counted = model.__dict__.get(_COUNTED, (model.num_prefix_tokens, 0))
    insert = model.get_submodule(GIST_PATH)
    gist = insert.gist.length if isinstance(insert, GistInsert) else 0
    prompted = [block for block in model.blocks if isinstance(block, PromptedBlock)]
    ours = gist + (prompted[0].length if prompted else 0)
    for block in prompted:
        block.index = own + gist
    model.num_prefix_tokens = own + ours
    for module in model.blocks.modules():  # rotary attention leaves the prefix unrotated
        if isinstance(getattr(module, "num_prefix_tokens", None), int):
            module.num_prefix_tokens += ours - counted
    for method in ("_pos_embed", "set_input_size", _COUNTED):
        model.__dict__.pop(method, None)
    if ours:
        model.__dict__[_COUNTED] = (own, ours)
        if model.dynamic_img_size:
            model._pos_embed = _WithOwnPrefix(model, "_pos_embed", own)
        if hasattr(model, "set_input_size"):
            model.set_input_size = _WithOwnPrefix(model, "set_input_size", own)


class _WithOwnPrefix:
    """A method of ``model`` that sees the number of the model's own prefix tokens; copied and pickled with it."""

    def __init__(self, model: Any, method: str, prefix: int) -> None:
        self.model, self.method, self.prefix = model, method, prefix

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.method == "_pos_embed":  # runs in every forward: read through a view, so that threads do not meet
            return type(self.model)._pos_embed(_View(self.model, self.prefix), *args, **kwargs)
        counted, pos_embed = self.model.num_prefix_tokens, self.model.pos_embed
        self.model.num_prefix_tokens = self.prefix
        try:
            return getattr(type(self.model), self.method)(self.model, *args, **kwargs)
        finally:
            self.model.num_prefix_tokens = counted
            if pos_embed is not None:  # a resampled one is a new parameter, which older versions of timm unfreeze
                self.model.pos_embed.requires_grad_(pos_embed.requires_grad)


class _View:
    """Reads a model's attributes, but for num_prefix_tokens."""

    def __init__(self, model: Any, prefix: int) -> None:
        self.model = model
        self.num_prefix_tokens = prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
