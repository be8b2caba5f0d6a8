"""Training runs: ``fastgist finetune`` (:mod:`fastgist.train.finetune`) and ``fastgist demo``
(:mod:`fastgist.train.demo`) over one loop (:mod:`fastgist.train.engine`); comparisons
(:mod:`fastgist.train.compare`); export (:mod:`fastgist.train.export`). For other loops: :func:`parameter_groups`."""

import importlib.util
import pkgutil
from types import ModuleType

from fastgist.train.optim import parameter_groups

__all__ = ["parameter_groups"]


def __getattr__(name: str) -> ModuleType:
    """A module of this package, imported when it is first asked for."""
    if name.isidentifier() and not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(module.name for module in pkgutil.iter_modules(__path__))})
