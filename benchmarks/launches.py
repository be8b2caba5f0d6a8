"""Launches and bytes of a step as a GPU would see them, counted without one.

:func:`on_a_card` lets operations take what they take on a GPU, with CPU tensors: Triton's host code chooses forms, tiles and
temporaries as for that card, and its launches are noted instead of run, so results are memory that nobody wrote.
:class:`Ledger` counts what a step does. The rules:

- An ATen operator that computes is one launch, with one exception: a library's kernel that needs more (split products, an
  attention's backward) counts as one too, on both sides of a comparison. Views, allocations and looks are none.
- A launch of Triton is one.
- Bytes: every tensor that a launch takes or returns once, its elements times their size (of an expanded tensor what lies in
  memory); what is changed in place twice. What a kernel reads again, from a cache or not, is not seen: these are bytes that
  must move, not DRAM traffic.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Card", "Count", "HOPPER", "Ledger", "on_a_card"]


@dataclass(frozen=True)
class Card:
    """What host code asks of a device."""

    name: str
    arch: str
    processors: int
    shared_memory: int


HOPPER = Card("sm_90 with 132 processors", "sm_90", 132, 232448)


@dataclass
class Count:
    launches: int = 0
    bytes: int = 0

    def __sub__(self, other: Count) -> Count:
        return Count(self.launches - other.launches, self.bytes - other.bytes)


#: Launches of Triton are told to these.
_LISTENERS: list[Callable[[str, tuple], None]] = []


def _note(kernel: Any, grid: object, config: object, *args: object, **constexprs: object) -> None:
    """In the place of fastgist_kernels.common.launch."""
    for listener in _LISTENERS:
        listener(kernel.fn.__name__, args)


def _in_a_function(args: object) -> bool:
    return not torch.is_grad_enabled()


def _in_half(t: Tensor) -> bool:
    return t.dtype.itemsize == 2


@contextlib.contextmanager
def on_a_card(card: Card = HOPPER) -> Iterator[None]:
    """Operations on CPU tensors run as they would on ``card``, but for the kernels themselves, which do not run."""
    import fastgist_kernels
    from fastgist import backends
    from fastgist.integrations.timm import blocks
    from fastgist.ops import _common

    modules = [
        importlib.import_module(f"fastgist_kernels.{m.name}") for m in pkgutil.iter_modules(fastgist_kernels.__path__)
    ]
    answers: dict[str, Any] = {
        "launch": _note,
        "device_arch": lambda device: card.arch,
        "processors": lambda device: card.processors,
        "_shared_memory": lambda device: card.shared_memory,
    }
    remembered = [f for m in (*modules, backends) for f in vars(m).values() if hasattr(f, "cache_clear")]
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name in answers.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, answers[name]))
        stack.enter_context(mock.patch.object(backends, "interpreting", return_value=True))
        # Past the dispatcher, as in a step that nobody watches: a mode then sees what our operators call.
        stack.enter_context(mock.patch.object(_common, "_nobody_listens", _in_a_function))
        stack.enter_context(mock.patch.object(blocks, "_in_half_on_gpu", _in_half))
        for cached in remembered:
            cached.cache_clear()
        try:
            yield
        finally:
            for cached in remembered:
                cached.cache_clear()


#: Operators that name, look or make room.
_NOTHING = ("_unsafe_view", "_local_scalar_dense", "promote_types", "detach", "alias", "lift_fresh", "_reshape_alias")
#: In-place operators that do not read what they overwrite.
_OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_")


class Ledger(TorchDispatchMode):
    """Counts while it is active; ``total`` and, by kernel or operator, ``found``. ``forms_only``: matrix products are counted
    and not computed, so that large shapes cost nothing."""

    def __init__(self, forms_only: bool = False) -> None:
        super().__init__()
        self.forms_only = forms_only
        self.total = Count()
        self.found: Counter[str] = Counter()

    def __enter__(self) -> Ledger:
        _LISTENERS.append(self._launched)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _LISTENERS.remove(self._launched)
        super().__exit__(*error)

    def _launched(self, name: str, args: tuple) -> None:
        self._add(name, [t for t in args if isinstance(t, Tensor)])

    def _add(self, name: str, tensors: list[Tensor], again: int = 0) -> None:
        once = {(t.data_ptr(), t.shape, t.stride()): t for t in tensors}
        self.total.launches += 1
        self.total.bytes += sum(map(_bytes, once.values())) + again
        self.found[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastgist":
            raise RuntimeError(f"{func} went through the dispatcher: count under on_a_card, inside a Function")
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        product = _PRODUCTS.get(func._opname) if self.forms_only else None
        result = func(*args, **kwargs) if product is None else product(func, args, kwargs)
        if func.is_view or func._opname in _NOTHING or "empty" in func._opname:
            return result
        tensors = _tensors((args, kwargs.values(), result))
        read_too = func._opname.endswith("_") and func._opname not in _OVERWRITES
        if tensors:
            self._add(func._opname, tensors, _bytes(args[0]) if read_too else 0)
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [t for v in value for t in _tensors(v)]
    return []


def _shaped(first: int) -> Callable[..., Tensor]:
    """Of a product of arguments ``first`` and the next: its result, not computed."""

    def stand_in(func: Any, args: tuple, kwargs: dict) -> Tensor:
        if "out" in kwargs:
            return kwargs["out"]
        if func._opname.endswith("_"):
            return args[0]
        a, b = args[first : first + 2]
        return a.new_empty(*a.shape[:-1], b.shape[-1])

    return stand_in


_PRODUCTS = {"mm": _shaped(0), "bmm": _shaped(0)}
_PRODUCTS |= dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_"), _shaped(1))


def _bytes(t: Tensor) -> int:
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
