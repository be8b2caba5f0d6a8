"""Our rows in the sequence: what counts tokens grows where they go in, and the head gets the states without them.

transformers makes masks, positions and position biases inside of the body's forward, from what it is given and from
what comes out of the embeddings. So two kinds of hooks stand on its parts while there are rows of ours: before a module
that takes a mask, to make that longer, and behind the body, to take the rows out of the final states. Both are
functions of this module that read their numbers from the module they hang on, so that deepcopy and pickle keep them.
Hidden states and attentions that a model is asked to return have our rows in them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist.model import GistInsert
from fastgist.integrations.transformers.kinds import Kind
from fastgist.nn import PromptedBlock

__all__ = ["GIST_STATES", "count_rows", "unhook"]

#: Under this key the body's output holds the gist token's final states (B, length, D).
GIST_STATES = "fastgist_gist"
_MASK, _TAKEN = "_fastgist_mask", "_fastgist_rows"


@dataclass(frozen=True)
class _Mask:
    """``count`` ones go into the mask called ``argument`` at ``index``; ``names``: the forward's arguments in order."""

    argument: str
    names: tuple[str, ...]
    index: int
    count: int
    positions: bool
    #: Why there cannot be a mask.
    refusal: str | None = None


@dataclass(frozen=True)
class _Taken:
    """The gist token's ``gist`` rows stand at ``index``, and ``prompts`` prompts behind them."""

    index: int
    gist: int
    prompts: int


def count_rows(model: nn.Module, kind: Kind) -> None:
    """Bring masks, positions and the prompts' place in line with the rows that are in ``model`` now."""
    own = kind.own(model)
    insert = model.get_submodule(kind.entry_of(model))
    gist = insert.gist.length if isinstance(insert, GistInsert) else 0
    layers: Any = model.get_submodule(kind.layers)
    first = layers[0] if kind.prompts is None else model.get_submodule(kind.prompts)
    prompts = first.length if isinstance(first, PromptedBlock) else 0
    for layer in layers:
        if isinstance(layer, PromptedBlock):
            layer.index = own + gist
    if isinstance(first, PromptedBlock) and first.after:
        first.index = own  # the gist token is not in yet, and goes in before them
    for path, argument, prompts_alone in kind.grown():
        module = model.get_submodule(path)
        count = prompts if prompts_alone else gist + prompts
        unhook(module, "_forward_pre_hooks", _grow_mask, _MASK)
        if count:
            names = tuple(inspect.signature(type(module).forward).parameters)[1:]
            refusal = None
            if kind.image and prompts:
                refusal = f"{type(model).__name__} with prompts takes no attention_mask"
            module.__dict__[_MASK] = _Mask(argument, names, own, count, kind.positions, refusal)
            module.register_forward_pre_hook(_grow_mask, with_kwargs=True)
    body = model.get_submodule(kind.body)
    unhook(body, "_forward_hooks", _take_rows, _TAKEN)
    if gist + prompts:
        body.__dict__[_TAKEN] = _Taken(own, gist, prompts)
        body.register_forward_hook(_take_rows)


def unhook(module: nn.Module, where: str, hook: Any, attribute: str) -> None:
    """Take ``hook`` out of ``module``'s ``where``, and the ``attribute`` that it reads."""
    module.__dict__.pop(attribute, None)
    hooks = module.__dict__[where]
    for key in [key for key, known in hooks.items() if known is hook]:
        del hooks[key]
        module.__dict__[f"{where}_with_kwargs"].pop(key, None)


def _grow_mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rows: _Mask = module._fastgist_mask
    if len(args) > len(rows.names):
        return args, kwargs  # its forward says what is wrong
    given = dict(zip(rows.names, args, strict=False)) | kwargs
    mask = given.get(rows.argument)
    if mask is not None:
        if rows.refusal is not None:
            raise ValueError(rows.refusal)
        if mask.dim() != 2:
            raise ValueError(
                f"{type(module).__name__} with a gist token or prompts: expected {rows.argument} of shape (B, N), got "
                f"{tuple(mask.shape)}"
            )
        ones = mask.new_ones(mask.shape[0], rows.count)
        given[rows.argument] = torch.cat((mask[:, : rows.index], ones, mask[:, rows.index :]), dim=1)
    if rows.positions:
        given["position_ids"] = _grown_positions(given, rows)
    return (), given


def _grown_positions(given: dict[str, Any], rows: _Mask) -> Tensor:
    """(1 or B, N + count): our rows follow the first token's position, the others move up."""
    positions = given.get("position_ids")
    if positions is None:
        sequence = given.get("input_ids")
        sequence = given["inputs_embeds"] if sequence is None else sequence
        return torch.arange(sequence.shape[1] + rows.count, device=sequence.device)[None]
    ours = positions[:, rows.index - 1 : rows.index] + torch.arange(1, rows.count + 1, device=positions.device)
    return torch.cat((positions[:, : rows.index], ours, positions[:, rows.index :] + rows.count), dim=1)


def _take_rows(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    rows: _Taken = module._fastgist_rows
    states: Tensor = output[0]
    start, stop = rows.index, rows.index + rows.gist + rows.prompts
    kept = torch.cat((states[:, :start], states[:, stop:]), dim=1)
    if isinstance(output, tuple):
        return kept, *output[1:]
    output["last_hidden_state"] = kept
    output[GIST_STATES] = states[:, start : start + rows.gist]
    return output
