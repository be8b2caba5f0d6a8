"""Modules of a package that are imported when they are first asked for, so that ``import fastgist`` waits for none of them."""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType

__all__ = ["modules_of"]


def modules_of(
    package: ModuleType, names: Iterable[str] | None = None
) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for ``package``, by which its modules work as attributes without an import of their own.

    names: those modules; None: all that lie in the package's folder.
    """
    chosen = frozenset(m.name for m in pkgutil.iter_modules(package.__path__)) if names is None else frozenset(names)

    def get(name: str) -> ModuleType:
        if name in chosen:
            return importlib.import_module(f"{package.__name__}.{name}")
        raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")

    def listed() -> list[str]:
        return sorted({*vars(package), *chosen})

    return get, listed
