"""Prompts in a decoder (arXiv 2104.08691; deep: P-tuning v2, arXiv 2110.07602): trained rows before each row's first real
token, where all that is real sees them.

They are tokens as words are: the row's positions start with theirs (the words' are moved on by their number), windows count
them, a cache holds them, and the model's own dropout of its embeddings acts on them. Right before the first real token,
behind padding on the left, they stand as in a row alone, whatever counts positions or distances. A call whose cache is
empty puts them in; one that goes on from a cache finds them there.

The hooks stand on the body while there are prompts, and are functions of this module, so that deepcopy and pickle keep them.
Hidden states and attentions that a model is asked to return have the prompts in them, its logits do not.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgist.integrations.transformers.rows import unhook
from fastgist.nn import PromptedBlock

__all__ = ["count_prompts", "merged", "order", "prompts_in"]

_KNOWN = "_fastgist_prompts"
#: The argument by which layers learn where each row's prompts are (B, 1); without it there are none in the call.
_PLACE = "prompt_place"


@dataclass(frozen=True)
class _Known:
    """``layers``: the name of the body's layers; ``names``: its forward's arguments in order; ``most``: how many positions a
    model with a table of them has."""

    layers: str
    names: tuple[str, ...]
    most: int | None


def prompts_in(layers: Any) -> int:
    """How many prompts stand in the sequence that runs through ``layers``."""
    return layers[0].length if isinstance(layers[0], PromptedBlock) else 0


def count_prompts(body: Any, layers: str, most: int | None) -> None:
    """Bring ``body``, whose blocks are its ``layers``, in line with the prompts that are in them now."""
    unhook(body, "_forward_pre_hooks", _put_prompts, _KNOWN)
    unhook(body, "_forward_hooks", _take_prompts, _KNOWN)
    blocks = getattr(body, layers)
    if not prompts_in(blocks):
        return
    for block in blocks:
        if isinstance(block, PromptedBlock):
            block.index = None
    names = tuple(inspect.signature(type(body).forward).parameters)[1:]
    body.__dict__[_KNOWN] = _Known(layers, names, most)
    body.register_forward_pre_hook(_put_prompts, with_kwargs=True)
    body.register_forward_hook(_take_prompts, with_kwargs=True)


def order(place: Tensor, number: int, length: int) -> Tensor:
    """(B, number + length): where each place of a longer row comes from, in the row followed by ``length`` more, which go to
    ``place`` (B, 1)."""
    j = torch.arange(number + length, device=place.device)
    return torch.where(j < place, j, torch.where(j < place + length, j - place + number, j - length))


def merged(rows: Tensor, more: Tensor, index: Tensor) -> Tensor:
    """rows (B or 1, N, ...), more (B, length, ...) -> (B, N + length, ...) in the order of ``index``."""
    both = torch.cat((rows.expand(index.shape[0], *rows.shape[1:]), more), dim=1)
    return both.gather(1, index if both.dim() == 2 else index[..., None].expand_as(both))


def _put_prompts(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    known: _Known = module._fastgist_prompts
    given = dict(zip(known.names, args, strict=False)) | kwargs
    if len(args) > len(known.names) or (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
        return args, kwargs  # its forward says what is wrong
    mask, cache = given.get("attention_mask"), given.get("past_key_values")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{type(module).__name__} with prompts: expected attention_mask of shape (B, N), got {got} (generate makes others "
            "for a cache of a fixed size, which has no room for prompts)"
        )
    prompts: PromptedBlock = getattr(module, known.layers)[0]
    past = 0 if cache is None else cache.get_seq_length()
    if past:
        return (), _going_on(module, prompts.length, past, given)
    states = given.get("inputs_embeds")
    ids = given.pop("input_ids", None)
    states = module.get_input_embeddings()(ids) if states is None else states
    batch, number = states.shape[:2]
    if mask is not None and mask.shape != (batch, number):
        raise ValueError(
            f"{type(module).__name__} with prompts: expected attention_mask of shape ({batch}, {number}), got "
            f"{tuple(mask.shape)}"
        )
    if mask is None:
        place = torch.zeros((batch, 1), dtype=torch.long, device=states.device)
    else:
        place = _first(mask)
    index = order(place, number, prompts.length)
    steps = torch.arange(prompts.length, device=place.device)
    given["inputs_embeds"] = merged(states, prompts.rows(states), index)
    if mask is not None:
        given["attention_mask"] = merged(mask, mask.new_ones(batch, prompts.length), index)
    positions = given.get("position_ids")
    if positions is not None:
        positions = positions.expand(batch, -1)
        later = torch.arange(number, device=place.device) >= place
        moved = positions + later * prompts.length
        positions = merged(moved, positions.gather(1, place) + steps, index)
        given["position_ids"] = positions
    types = given.get("token_type_ids")
    if types is not None:
        types = types.expand(batch, -1)
        given["token_type_ids"] = merged(types, types.gather(1, place).expand(-1, prompts.length), index)
    if known.most is not None and number + prompts.length > known.most:
        _refuse_long(module, positions, known.most, prompts.length)
    given[_PLACE] = place
    return (), given


def _first(mask: Tensor) -> Tensor:
    """(B, 1): each row's first place that counts; 0 where none does."""
    return (mask != 0).int().argmax(dim=1, keepdim=True)  # of equals, argmax gives the first


def _going_on(module: Any, length: int, past: int, given: dict[str, Any]) -> dict[str, Any]:
    """``given`` for a cache of ``past`` rows, the prompts among them."""
    rows, mask = given.get("input_ids"), given.get("attention_mask")
    rows = given["inputs_embeds"] if rows is None else rows
    words, positions = past + rows.shape[1] - length, given.get("position_ids")
    if mask is not None:
        fits = mask.shape[1] == words
        if fits:
            given["attention_mask"] = merged(
                mask, mask.new_ones(mask.shape[0], length), order(_first(mask), words, length)
            )
    else:
        fits = positions is None or torch.compiler.is_compiling() or bool((positions[:, -1] == words - 1).all())
    if not fits:
        raise ValueError(
            f"{type(module).__name__} with prompts: the cache holds {past} rows, {length} of which are the prompts, and what "
            f"is given counts other than {words} words. generate takes a cache's rows for words where it goes on from one "
            "that was filled before: let it start with an empty one"
        )
    if positions is not None:
        given["position_ids"] = positions + length
    return given


def _refuse_long(module: Any, positions: Tensor | None, most: int, length: int) -> None:
    text = (
        f"{type(module).__name__} with prompts: a row needs more than the {most} positions there are, {length} of which the "
        f"prompts take; shorten it to {most - length}"
    )
    if positions is None:
        raise ValueError(text)
    if torch.compiler.is_compiling():
        torch._assert_async((positions < most).all(), text)
    elif bool((positions >= most).any()):
        raise ValueError(text)


def _take_prompts(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    place = kwargs.get(_PLACE)
    if place is None:
        return output
    length = getattr(module, module._fastgist_prompts.layers)[0].length
    states: Tensor = output[0]
    j = torch.arange(states.shape[1] - length, device=place.device)
    index = torch.where(j < place, j, j + length)
    kept = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
    if isinstance(output, tuple):
        return kept, *output[1:]
    output["last_hidden_state"] = kept
    return output
