"""Whether a provider's result and gradients are right: within the error budget of fastgist.testing, before they are timed.

The plain error that the budget doubles is drawn more than once, because the largest error of a handful of numbers is a
matter of luck, and because there is more than one plain PyTorch:

- Of few rows the formula runs on the same numbers in other orders too (:func:`orders`). All columns of dL/dU at M = 1 are
  one row of R products dy V', each a sum of thousands: sixteen numbers carry the error of 32,768.
- Of many rows the formula runs a second time over all of them at once, as a user's code does, where a weight's gradient is
  wanted. Chunks of rows sum that in two stages, which errs less than the one product that peers take.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, outputs
from benchmarks.problems import DROPOUT, ROWWISE, Problem, arguments, make_problem, run
from fastgist.testing import within_budget

CHUNK = 256
#: Plain errors are drawn until so many rows have been.
LEAST_ROWS = 16
#: A layer's result of at most so many elements is formed at once, too.
AT_ONCE = 2**26
#: A gradient of at most so many elements has the size of its terms in the floor: there is one for every row.
WEIGHED = 2**16

WITHIN = "within the budget"
OTHER_MASK = "within the budget (without its dropout, whose mask is another)"

#: An axis a letter: those that may be summed over in any order, and how the result's columns go. M stays as it is.
_AXES: dict[str, dict[str, str]] = {
    "bidirectional_kl": {"z": "MV", "g": "MV"},
    "gist_loss": {"z": "MV", "g": "MV"},
    "topk_kl": {"z": "MV", "log_probs": "Mk", "indices": "Mk"},
    "gist_linear_loss": {"hidden": "MH", "gist_hidden": "MH", "weight": "VH", "bias": "V"},
    "cp_linear": {"x": "MK", "weight": "NK", "bias": "N", "u": "KR", "v": "nR", "gain": "R", "": "N"},
    "cp_update": {"y": "Mn", "x": "MK", "u": "KR", "v": "nR", "": "n"},
    "adapter": {"x": "MK", "down": "hK", "down_bias": "h", "up": "Kh", "up_bias": "K", "gate": "Me", "residual": "MK",
                "norm_weight": "K", "norm_bias": "K", "": "K"},
    "gelu": {"x": "MK", "": "K"},
}  # fmt: skip
#: Tensors of class indices: they name columns of V.
_INDICES = ("target", "indices")

Order = Mapping[str, Tensor]


def _formula(op: str) -> Callable[..., Tensor]:
    return getattr(importlib.import_module(f"fastgist.reference.{op}"), op)


def _plain(op: str, tensors: Mapping[str, Tensor | None], **options: Any) -> Tensor:
    positional, named = arguments(op, tensors)
    return _formula(op)(*positional, **named, **options)


def _rows(name: str, t: Tensor) -> Tensor:
    """The rows that parity compares: those of the first and of the last chunk. A large weight's are as many."""
    if t.shape[0] <= 2 * CHUNK or (name not in ROWWISE and t.numel() <= 2**25):
        return t
    return torch.cat([t[:CHUNK], t[(t.shape[0] - 1) // CHUNK * CHUNK :]])


def masked(problem: Problem) -> Problem:
    """The problem with its dropout's mask as what it is to the formula, a gate a hidden unit: so rows can be taken apart."""
    if "seed" not in problem.tensors:
        return problem
    from fastgist.reference import philox

    rest = {n: t for n, t in problem.tensors.items() if n != "seed"}
    seed, shape = problem.tensors["seed"], (problem.case["M"], problem.case["H"])
    gate = philox.keep_mask(seed, shape, DROPOUT).to(problem.case.dtype) / (1.0 - DROPOUT)
    return Problem(problem.op, problem.case, rest | {"gate": gate}, problem.leaves, problem.options)


def without_dropout(problem: Problem) -> Problem:
    rest = {n: t for n, t in problem.tensors.items() if n != "seed"}
    return Problem(problem.op, problem.case, rest, problem.leaves, problem.options)


# -- other orders of the same sums -------------------------------------------------------------------------------------


def orders(problem: Problem) -> list[Order]:
    """Orders of the axes that a plain error is drawn with: the given one (no entries), and of few rows more."""
    found: list[Order] = [{}]
    fixed = "Mkeh" if "gate" in problem.tensors else "Mke"  # a gate's column belongs to hidden units
    sizes = {
        axis: size
        for name, t in problem.tensors.items()
        for axis, size in zip(_axes(problem.op, name, t.dim()), t.shape, strict=True)
        if axis not in fixed
    }
    for seed in range(LEAST_ROWS // problem.case["M"] - 1):
        generator = torch.Generator().manual_seed(seed)
        order = {a: torch.randperm(n, generator=generator) for a, n in sizes.items() if a != "N"}
        if "N" in sizes:  # folds, or weights, stay in their places: each has V's rows in V's order
            n = sizes["n"]
            order["N"] = torch.cat([order["n"] + fold * n for fold in range(outputs(problem.case))])
        found.append({a: at.to(problem.device) for a, at in order.items()})
    return found


def _axes(op: str, name: str, dims: int) -> str:
    return _AXES[op].get(name, "")[-dims:].rjust(dims, "M")


def _in_order(op: str, name: str, t: Tensor, order: Order) -> Tensor:
    for i, axis in enumerate(_axes(op, name, t.dim())):
        if axis in order:
            t = t.index_select(i, order[axis])
    if name in _INDICES and "V" in order:
        t = order["V"].argsort()[t]
    return t


def _put_back(op: str, name: str, t: Tensor, order: Order) -> Tensor:
    return _in_order(op, name, t, {axis: at.argsort() for axis, at in order.items()})


def _chunk(problem: Problem) -> int:
    """Rows that the formula takes at once: as many as are compared, and of many classes a part of them, for memory."""
    most = min(CHUNK, max(1, 2**23 // problem.case.get("V", 1)))
    return 2 ** (most.bit_length() - 1)


# -- the formula, plain and exact --------------------------------------------------------------------------------------


def _evaluate(
    problem: Problem, dtype: torch.dtype, order: Order | None = None, chunk: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The formula in ``dtype``: the result and the gradients, on the CPU, of the rows that parity compares. ``order`` says in
    which order the axes are gone through; results are back in their own."""
    rows, op, order = problem.case["M"], problem.op, order or {}
    chunk = chunk or _chunk(problem)
    last = (rows - 1) // CHUNK * CHUNK  # where the last rows that are compared begin
    tensors = {n: _in_order(op, n, t, order) for n, t in problem.tensors.items()}
    fixed = {n: t for n, t in tensors.items() if n not in ROWWISE}
    fixed = {n: (t.to(dtype) if t.is_floating_point() else t) for n, t in fixed.items()}
    for name in fixed:
        fixed[name] = fixed[name].detach().requires_grad_(name in problem.leaves)
    outs, grads = [], {name: [] for name in problem.leaves if name in ROWWISE}
    edge_rows = rows <= 2 * CHUNK or chunk >= rows
    every_chunk = any(name not in ROWWISE for name in problem.leaves)
    for start in range(0, rows, chunk):
        part = {n: t[start : start + chunk] for n, t in tensors.items() if n in ROWWISE}
        part = {n: (t.to(dtype) if t.is_floating_point() else t).detach() for n, t in part.items()}
        compared = edge_rows or start < CHUNK or start >= last
        with torch.set_grad_enabled(compared or every_chunk):
            for name, t in part.items():
                t.requires_grad_(name in problem.leaves)
            args = {name: part.get(name, fixed.get(name)) for name in tensors}
            if problem.is_loss:
                out = _plain(op, args, reduction="sum", **problem.options) / rows
                if compared or every_chunk:
                    out.backward()
                outs.append(out.detach())
            else:
                out = _plain(op, args, **problem.options)
                if compared or every_chunk:
                    out.backward(_in_order(op, "", incoming_rows(problem, start, out), order))
                outs.append(out.detach())
        if compared:
            for name in grads:
                grads[name].append(part[name].grad)
    whole = chunk >= rows  # then the compared rows are still to be taken

    def found(name: str, t: Tensor) -> Tensor:
        t = _put_back(op, name, t, order)
        return (_rows(name, t) if whole or name not in ROWWISE else t).cpu()

    gradients = {name: found(name, torch.cat(parts)) for name, parts in grads.items()}
    gradients |= {name: found(name, fixed[name].grad) for name in problem.leaves if name in fixed}
    if problem.is_loss:
        return torch.stack(outs).double().sum().to(outs[0].dtype).cpu(), gradients
    return _rows("x", _put_back(op, "", torch.cat(outs), order)).cpu(), gradients


def incoming_rows(problem: Problem, start: int, out: Tensor) -> Tensor:
    """The rows of problems.incoming that belong to ``out``, a chunk of the result that begins at row ``start``."""
    whole = problem.tensors["x"]
    shape = (whole.shape[0], out.shape[1])
    grad = torch.randn(shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device).to(whole.dtype)
    return grad[start : start + out.shape[0]].to(out.dtype)


def term_scales(problem: Problem) -> dict[str, float]:
    """Of gradients of a layer that are sums over its rows (a bias's, a gain's, a narrow weight's): the largest sum of the
    absolute terms, which is what rounding is proportional to where they cancel."""
    names = [n for n in problem.leaves if n not in ROWWISE and problem.tensors[n].numel() <= WEIGHED]
    if problem.is_loss or not names:
        return {}
    wide = {n: t.detach().double() for n, t in problem.tensors.items()}
    rowwise = [n for n in problem.tensors if n in ROWWISE]
    totals = {n: torch.zeros_like(wide[n]) for n in names}

    def result(tensors: Mapping[str, Tensor]) -> Tensor:
        return _plain(problem.op, {n: tensors[n] for n in problem.tensors}, **problem.options)

    def row(leaves: dict[str, Tensor], grad: Tensor, *rows: Tensor) -> Tensor:
        return (result(wide | dict(zip(rowwise, (r[None] for r in rows), strict=True)) | leaves) * grad).sum()

    each = torch.func.vmap(torch.func.grad(row), in_dims=(None, 0, *(0 for _ in rowwise)))
    with torch.no_grad():
        width = result({n: t[:1] if n in rowwise else t for n, t in wide.items()}).shape[1]
    many = max(1, min(CHUNK, 2**23 // max(wide[n].numel() for n in names)))
    for start in range(0, problem.case["M"], many):
        rows = [wide[n][start : start + many] for n in rowwise]
        grads = incoming_rows(problem, start, rows[0].new_empty(rows[0].shape[0], width))
        for name, found in each({n: wide[n] for n in names}, grads, *rows).items():
            totals[name] += found.abs().sum(0)
    return {n: float(t.max()) for n, t in totals.items()}


@functools.lru_cache(maxsize=2)  # with and without dropout
def expected(
    op: str, case: Case, device: torch.device, dropout: bool = True
) -> tuple[list[tuple[Tensor, dict[str, Tensor]]], tuple[Tensor, dict[str, Tensor]], dict[str, float]]:
    """(plain ones, exact, scales): the formula in the case's dtype, drawn as often as it takes, and in float64, and
    :func:`term_scales`. Kept while one case's providers are compared."""
    problem = make_problem(op, case, device)
    problem = masked(problem) if dropout else without_dropout(problem)
    plain = [_evaluate(problem, case.dtype, order) for order in orders(problem)]
    width = case["V"] if problem.is_loss else case["d"] * outputs(case)
    summed = any(n not in ROWWISE for n in problem.leaves)  # over rows
    if summed and _chunk(problem) < case["M"] <= AT_ONCE // width:
        plain.append(_evaluate(problem, case.dtype, chunk=case["M"]))
    return plain, _evaluate(problem, torch.float64), term_scales(problem)


def parity(problem: Problem, provider: Callable[..., Any], direction: str = "fwd_bwd") -> str | None:
    """None if the provider's result and gradients are within the error budget, else what is wrong. With an incoming gradient
    of 2 ("fwd_bwd_scaled", the losses') the gradients are twice as large, which is exact."""
    times = 2.0 if problem.is_loss and direction.endswith("scaled") else 1.0
    has_dropout = "seed" in problem.tensors
    drawn, (exact, exact_grads), scales = expected(problem.op, problem.case, problem.device, has_dropout)
    out, grads = run(problem, provider, direction)
    plain = [result for result, _ in drawn]
    if problem.is_loss:
        out = out.to(plain[0].dtype)
        wrong = within_budget(out.cpu(), plain, exact, scale=float(exact.abs()) + 1.0)
    else:
        wrong = within_budget(_rows("x", out).cpu(), plain, exact)
    if wrong:
        return f"result: {wrong}"
    for name in problem.leaves:
        grad = grads[name]
        if grad is None:
            return f"no gradient for {name}"
        ours = _rows(name, grad).cpu()
        plain = [g[name] * times for _, g in drawn]
        wrong = within_budget(ours, plain, exact_grads[name] * times, scale=scales.get(name))
        if wrong:
            return f"gradient of {name}: {wrong}"
    return None


def verdict(
    problem: Problem,
    provider: Callable[..., Any],
    build: Callable[..., Any],
    ours: bool,
    direction: str = "fwd_bwd",
) -> str:
    """What a row says of its provider. A peer's dropout draws a mask of its own: it is held without dropout, built anew."""
    if ours or "seed" not in problem.tensors:
        return parity(problem, provider, direction) or WITHIN
    plain = without_dropout(problem)
    return parity(plain, build(plain.tensors)) or OTHER_MASK
