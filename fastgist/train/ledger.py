"""What autograd keeps for the backward, by module: where the memory of a training step goes."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["saved_tensor_ledger"]


def saved_tensor_ledger(model: nn.Module, forward: Callable[[], object], *, by_block: bool = False) -> dict[str, int]:
    """Bytes that one ``forward()`` of ``model`` keeps for its backward, by the module in which they are kept.

    Parameters and buffers are not counted, nor is a storage that another saved tensor shares. Numbers in a path become
    "*" (one line for the same part of all blocks) unless ``by_block``. What is kept outside a module's children, by its own
    forward or by a function that runs its parts in the forward's place, stands under the module's path and the name of
    the function.

    Hooks would change what some models run, so none are set: the module is read from the call stack.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}  # held, so that no storage is freed and its address used again
    found: Counter[str] = Counter()

    def pack(t: Tensor) -> Tensor:
        address = t.untyped_storage().data_ptr()
        if address not in known and address not in seen:
            seen[address] = t.detach()
            found[_where(paths, by_block)] += t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return dict(found.most_common())


def _where(paths: dict[int, str], by_block: bool) -> str:
    """The innermost module on the call stack that ``paths`` knows: the first argument of a method, or of a function that
    runs a module's parts."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not saved_tensor_ledger.__code__:
        names = frame.f_code.co_varnames
        owner = frame.f_locals.get(names[0]) if names else None
        if isinstance(owner, nn.Module) and id(owner) in paths:
            path, function = paths[id(owner)], frame.f_code.co_name
            path = path if by_block else re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
            own = any(True for _ in owner.children()) and f"{path}.{function}".lstrip(".")
            return own or path or function
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
