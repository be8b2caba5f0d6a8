"""Error budgets and helpers that tests, benchmarks and users of fastgist share.

One rule says whether an implementation is accurate enough, with no tolerance picked by hand::

    err(ours against float64) <= 2 * err(plain torch in the same dtype against float64) + floor

for every element, where the plain error is the largest of its tensor, and ``floor`` is what rounding the exact result
to the working dtype costs at the scale s of the tensor: ``2 s max |((ref / s + 0.3) - 0.3) - ref / s|``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["assert_within_budget", "error_floor", "layouts", "poisoned_allocations", "within_budget"]


def error_floor(exact: Tensor, dtype: torch.dtype, scale: float | None = None) -> float:
    """What representing ``exact`` (float64) in ``dtype`` costs, at scale ``s`` (default max |exact|), twice over.

    A grid over [-1, 1] joins the tensor's own values, so that one number that happens to round exactly does not make the
    floor zero. At most 2^-7 s in bfloat16: an all-zero result still fails.
    """
    finite = exact[exact.isfinite()].double()
    s = float(finite.abs().max()) if scale is None and finite.numel() else (scale or 0.0)
    if s == 0.0 or not math.isfinite(s) or finite.numel() == 0:
        return 0.0
    grid = torch.linspace(-1.0, 1.0, 256, dtype=torch.float64, device=finite.device)
    unit = torch.cat([finite.flatten() / s, grid]).to(dtype)
    return 2.0 * s * float((((unit + 0.3) - 0.3) - unit).abs().max())


def within_budget(
    ours: Tensor,
    plain: Tensor | Sequence[Tensor],
    exact: Tensor,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> str | None:
    """None if ``ours`` is within the budget, else what is wrong with it.

    Args:
        ours: the result under test.
        plain: the same from plain PyTorch in the same dtype, on the same inputs; several results (of several devices, say)
            count by the one that errs most: the error of a handful of elements is a matter of luck.
        exact: the same in float64 from float64 copies of those inputs.
        scale: s of the floor; default max |exact|. For a scalar, give the sum of the absolute terms that make it.
        dtype: the working dtype of the floor; default ``ours.dtype``. A float32 loss of bfloat16 logits is float32.
    """
    if not isinstance(plain, Tensor):
        plain = max(plain, key=lambda p: _largest_error(p, exact))
    if ours.shape != exact.shape or plain.shape != exact.shape:
        return f"shapes differ: ours {tuple(ours.shape)}, plain {tuple(plain.shape)}, exact {tuple(exact.shape)}"
    if exact.dtype != torch.float64:
        return f"exact must be float64, got {exact.dtype}"
    if ours.dtype != plain.dtype:
        return f"dtypes differ: ours {ours.dtype}, plain {plain.dtype}"
    if exact.numel() == 0:
        return None
    ours64, plain64, exact = ours.detach().double().cpu(), plain.detach().double().cpu(), exact.detach().cpu()
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(ours64) != test(exact)
        if bool(wrong.any()):
            where = tuple(int(i) for i in wrong.nonzero()[0])
            places = f"{kind} at {int(wrong.sum())} places that differ, first at {where}"
            return f"{places}: ours {ours64[where]}, exact {exact[where]}"
    finite = exact.isfinite()
    if not bool(finite.any()):
        return None
    error = torch.where(finite, (ours64 - exact).abs(), 0.0)
    plain_error = torch.where(finite & plain64.isfinite(), (plain64 - exact).abs(), 0.0)
    floor = error_floor(exact, dtype or ours.dtype, scale)
    budget = 2.0 * float(plain_error.max()) + floor
    if float(error.max()) <= budget:
        return None
    flat = int(error.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
    return (
        f"error {float(error.max()):.3e} exceeds the budget {budget:.3e} (2 x plain error {float(plain_error.max()):.3e} "
        f"+ floor {floor:.3e}) at {int((error > budget).sum())} of {error.numel()} elements, worst at {where}: "
        f"ours {float(ours64[where])!r}, exact {float(exact[where])!r}"
    )


def _largest_error(result: Tensor, exact: Tensor) -> float:
    error = (result.detach().double().cpu() - exact.detach().cpu()).abs()
    return float(error[error.isfinite()].max()) if bool(error.isfinite().any()) else 0.0


def assert_within_budget(
    ours: Tensor, plain: Tensor | Sequence[Tensor], exact: Tensor, *, what: str = "result", **options
) -> None:
    """Raise AssertionError naming ``what`` unless :func:`within_budget`."""
    problem = within_budget(ours, plain, exact, **options)
    if problem is not None:
        raise AssertionError(f"{what}: {problem}")


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """``x`` (at least 2-D) in every memory layout worth a test: equal values, other strides. All are fresh tensors."""
    yield "contiguous", x.clone(memory_format=torch.contiguous_format)
    yield "transposed", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    strided = wide[..., 1 : 1 + 2 * x.shape[-1] : 2]
    strided.copy_(x)
    yield "strided slice", strided
    joined = torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], dim=-1)
    yield "slice of a cat", joined[..., x.shape[-1] : 2 * x.shape[-1]]


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Every ``torch.empty`` / ``empty_like`` / ``new_empty`` comes filled with NaN (or the largest integer): an element that
    a kernel forgets to write shows."""

    def poison(make: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            out = make(*args, **kwargs)
            if isinstance(out, Tensor) and out.numel() and out.device.type != "meta":
                if out.is_floating_point():
                    out.fill_(torch.nan)
                elif out.dtype != torch.bool:
                    out.fill_(torch.iinfo(out.dtype).max)
            return out

        return wrapped

    originals: dict[tuple[Any, str], Callable[..., Any]] = {
        (torch, "empty"): torch.empty,
        (torch, "empty_like"): torch.empty_like,
        (Tensor, "new_empty"): Tensor.new_empty,
    }
    try:
        for (owner, name), make in originals.items():
            setattr(owner, name, poison(make))
        yield
    finally:
        for (owner, name), make in originals.items():
            setattr(owner, name, make)
