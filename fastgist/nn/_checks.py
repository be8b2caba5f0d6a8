"""Checks of what layers and configurations are given: errors name the owner, the argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "check_bool",
    "check_dropout",
    "check_module",
    "check_number",
    "check_one_of",
    "check_positive",
    "shown",
]


def check_positive(owner: str, name: str, value: object) -> int:
    """``value`` as an int if it is a whole number > 0 (NumPy's too)."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{owner}: {name} must be a positive int, got {value!r}")
    if value <= 0:
        raise ValueError(f"{owner}: {name} must be a positive int, got {value}")
    return int(value)


def check_number(
    owner: str,
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> float:
    """``value`` as a float if it is a finite number, at least ``least``, more than ``above``, less than ``below`` and at most
    ``most``. A tensor is none, nor is True."""
    if min(below, most) < math.inf:
        wanted = f"a number in [{least:g}, {below:g})" if below < math.inf else f"a number in [{least:g}, {most:g}]"
    else:
        bounds = [f">= {least:g}"] * (least > -math.inf) + [f"> {above:g}"] * (above > -math.inf)
        wanted = " ".join(["a finite number", *bounds])
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{owner}: {name} must be {wanted}, got {shown(value)}")
    number = float(value)
    if not (math.isfinite(number) and least <= number < below and above < number <= most):
        raise ValueError(f"{owner}: {name} must be {wanted}, got {value}")
    return number


def check_dropout(owner: str, dropout: object) -> float:
    return check_number(owner, "dropout", dropout, least=0.0, below=1.0)


def check_bool(owner: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {shown(value)}")
    return value


def check_one_of(owner: str, name: str, value: object, known: Sequence[Any]) -> None:
    """``value`` is among ``known``; anything else is a ValueError, of whatever type it is."""
    if not any(value is k or (type(value) is type(k) and value == k) for k in known):
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(str, known))}, got {shown(value)}")


def check_integer(owner: str, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{owner}: {name} must be an int, got {shown(value)}")
    return int(value)


def check_callable(owner: str, name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{owner}: {name} must be a function, got {shown(value)}")


def check_place(owner: str, device: Any, dtype: Any) -> dict[str, Any]:
    """Where and in what parameters are made, as torch's factories take it; None is torch's default.

    Raises:
        ValueError: a device that is none. TypeError: a dtype that is not one of floating point.
    """
    if device is not None:
        try:
            torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(
                f"{owner}: device must be a torch.device or its name, such as 'cpu' or 'cuda:0', got {shown(device)}"
            ) from None
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{owner}: dtype must be a floating-point torch.dtype, got {shown(dtype)}")
    return {"device": device, "dtype": dtype}


def check_module(owner: str, name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{owner}: {name} must be a torch.nn.Module, got {shown(value)}")


def shown(value: object) -> str:
    """A value in an error: itself where that is short, else what it is."""
    if isinstance(value, Tensor | nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
