"""Adapters to other libraries. Each module is imported only when a model of that library is met."""

import importlib.util
import pkgutil
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """A module of this package, imported when it is first asked for."""
    if name.isidentifier() and not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(module.name for module in pkgutil.iter_modules(__path__))})
