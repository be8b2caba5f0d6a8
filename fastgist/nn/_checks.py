"""Checks of what layers and configurations are given: errors name the owner, the argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

__all__ = [
    "check_bool",
    "check_dropout",
    "check_module",
    "check_number",
    "check_one_of",
    "check_positive",
    "check_tensor",
]


def check_positive(owner: str, name: str, value: object) -> int:
    """``value`` as an int if it is a whole number > 0 (NumPy's too)."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{owner}: {name} must be a positive int, got {value!r}")
    if value <= 0:
        raise ValueError(f"{owner}: {name} must be a positive int, got {value}")
    return int(value)


def check_number(
    owner: str, name: str, value: object, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> float:
    """``value`` as a float if it is a finite number, at least ``least``, more than ``above`` and less than ``below``. A tensor
    is none, nor is True."""
    if below < math.inf:
        wanted = f"a number in [{least:g}, {below:g})"
    else:
        bounds = [f">= {least:g}"] * (least > -math.inf) + [f"> {above:g}"] * (above > -math.inf)
        wanted = " ".join(["a finite number", *bounds])
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{owner}: {name} must be {wanted}, got {_shown(value)}")
    number = float(value)
    if not (math.isfinite(number) and least <= number < below and number > above):
        raise ValueError(f"{owner}: {name} must be {wanted}, got {value}")
    return number


def check_dropout(owner: str, dropout: object) -> float:
    return check_number(owner, "dropout", dropout, least=0.0, below=1.0)


def check_bool(owner: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {_shown(value)}")
    return value


def check_one_of(owner: str, name: str, value: object, known: Sequence[Any]) -> None:
    """``value`` is among ``known``; anything else is a ValueError, of whatever type it is."""
    if not any(value is k or (type(value) is type(k) and value == k) for k in known):
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(str, known))}, got {_shown(value)}")


def check_module(owner: str, name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{owner}: {name} must be a torch.nn.Module, got {_shown(value)}")


def check_tensor(owner: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} must be a Tensor, got {_shown(value)}")


def _shown(value: object) -> str:
    """A value in an error: itself where that is short, else what it is."""
    if isinstance(value, Tensor | nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
