"""How PETAL's hooks read a call of transformers' models, and what they note of it."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["IGNORED", "PerThread", "arguments", "items_of"]

#: transformers' label of a word that no loss counts.
IGNORED = -100


class PerThread:
    """What one part of a call notes for a later one, by name; each begins as given. Each thread has its own, so that calls
    of one model do not mix; copies and pickles begin anew. (torch.compile reads a subclass of threading.local wrongly.)"""

    def __init__(self, **start: Any) -> None:
        self._start = start
        self._notes = threading.local()

    def __getitem__(self, name: str) -> Any:
        return getattr(self._notes, name, self._start[name])

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._notes, name, value)

    def __reduce__(self) -> tuple[Callable[[], PerThread], tuple[()]]:
        return functools.partial(type(self), **self._start), ()


def arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``module`` by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def items_of(model: Any, given: dict[str, Any]) -> Any:
    """What a training forward divides its loss by in place of its own number of words: ``num_items_in_batch``, by which
    transformers' Trainer weighs accumulated batches. None where the model does not heed it: T5's loss is always a mean."""
    return given.get("num_items_in_batch") if model.config.use_decoder_only_language_model else None
