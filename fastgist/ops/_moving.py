"""Numbers that move between calls of compiled code: temperatures and weights that follow a schedule.

A Python number is a constant of a compiled graph where it is an operator's ``float`` argument, and another value another
graph. torch makes one that has changed once symbolic, but only in arithmetic with tensors. There it becomes a tensor of one
number on the CPU, which a twin of the operator takes in the float's place and reads when it runs. No device is waited for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgist.ops import _common

__all__ = ["define", "packed"]

#: What no schedule is likely to be compared with: an answer known beforehand is one about a constant.
_ODD = 0.123456789e-3
#: What a CUDA graph replays is the number that it was captured with: these operators run between graphs. Versions of torch
#: without the tag capture nothing that has a tensor on the CPU.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def packed(*numbers: float) -> Tensor | None:
    """(n,) float64 on the CPU if compiled code has one of the numbers as one that moves; None where all are constants, as they
    always are in eager."""
    if not torch.compiler.is_compiling() or not any(_moves(n) for n in numbers):
        return None
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([torch.mul(one, n) for n in numbers])


def _moves(number: float) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # late: it imports sympy

    return not (statically_known_true(number == _ODD) or statically_known_true(number != _ODD))


def define(schema: str, implementation: Callable, fake: Callable, public: str) -> tuple[Callable, Callable]:
    """:func:`fastgist.ops._common.define`, and the same for a twin, named ``..._moving``, that takes a tensor () on the CPU in
    the place of each ``float``. ``fake`` must not look at those."""
    name, arguments = schema.split("(", 1)
    places = [i for i, a in enumerate(arguments.split(")", 1)[0].split(", ")) if a.startswith("float ")]

    def run(*args):
        args = list(args)
        for i in places:
            args[i] = args[i].item()
        return implementation(*args)

    twin = f"{name}_moving({arguments.replace('float ', 'Tensor ')}"
    return (
        _common.define(schema, implementation, fake, public),
        _common.define(twin, run, fake, public, _TAGS),
    )
