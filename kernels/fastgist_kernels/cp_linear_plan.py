"""Which form and which tile cp_linear takes: the measured table's entry, else cp_linear_cost.py's model. Nothing here launches
anything, and what is asked at every call is kept by its sizes.

Sizes M rows, N out, K in, R rank, G folds of width n = N / G, as in cp_linear.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from fastgist_kernels.common import cdiv, device_arch, launch_config, next_power_of_2
from fastgist_kernels.cp_linear_cost import Cost, Sizes, card_of, cost, dy_pass, narrow, of_u
from fastgist_kernels.cp_linear_forms import FORMS, aligned, can
from fastgist_kernels.outer import processors, rank_block

__all__ = [
    "FORMS",
    "MEASURED_ONLY",
    "TILES",
    "TILE_NAMES",
    "by_model",
    "cp_linear_form",
    "family",
    "form_class",
    "grad_u_by_library",
    "matmul_config",
    "narrow_by_library",
    "one_pass",
    "predicted",
    "product_precision",
    "rank_tile",
    "shape_class",
]

#: Tiles of the matmul kernel, read off the compiler (registers, shared memory,
#: no spill), not off a clock. "sm_80" also serves the smaller parts of later generations.
TILE_NAMES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
TILES = {
    "sm_80": {
        "large": (128, 128, 32, 8, 4),
        "medium": (128, 128, 32, 8, 4),
        "small": (16, 64, 64, 4, 4),
        "ragged": (64, 64, 32, 8, 3),
        "tf32": (128, 64, 32, 8, 3),
        "ieee": (64, 64, 16, 8, 3),
    },
    "sm_90": {
        "large": (128, 256, 64, 8, 3),
        "medium": (128, 128, 64, 8, 3),
        "small": (16, 64, 64, 4, 4),
        "ragged": (64, 128, 32, 8, 3),
        "tf32": (128, 64, 32, 8, 3),
        "ieee": (64, 64, 16, 8, 3),
    },
}


def shape_class(rows: int, out: int, inner: int, rank: int) -> str:
    return "_".join(
        f"{name}{next_power_of_2(size)}" for name, size in zip("mnkr", (rows, out, inner, rank), strict=True)
    )


def family(arch: str) -> str:
    return "sm_90" if arch in ("sm_90", "sm_100", "sm_103") else "sm_80"


def product_precision(dtype: torch.dtype, tf32: bool) -> str:
    """input_precision of the dots: float16's low-rank operands are float32 and lose nothing in tf32."""
    return "tf32" if tf32 or dtype == torch.float16 else "ieee"


def rank_tile(x: torch.Tensor, rank: int, tf32: bool, fused: bool) -> int:
    """The rank tile of the matmul kernel. Full float32 products take registers for every element of it."""
    most = 32 if x.dtype == torch.float32 and not tf32 else 64
    if device_arch(x.device) == "interpret" and not fused:
        most = 16  # so that small tests walk over several rank blocks
    return rank_block(rank, most)


def _columns(weights: Sequence[torch.Tensor], forward: bool) -> int:
    """Of the product with weights (N_i, K): N forward, K backward."""
    return sum(w.shape[0] for w in weights) if forward else weights[0].shape[1]


@functools.cache
def _card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _rows(rows: int) -> int:
    """What a choice sees of M: above 128, whole tiles of rows, so that batches of many lengths share what was worked out."""
    return rows if rows <= 128 else 128 * cdiv(rows, 128)


@functools.cache
def _dtype_name(dtype: torch.dtype, tf32: bool) -> str:
    return "tf32" if dtype == torch.float32 and tf32 else str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=4096)
def _tile_kind(arch: str, name: str, sms: int, s: Sizes) -> str:
    """The kind of tile for a product (M, K) times (K, N) of operands that can be fetched 16 bytes at a time."""
    if s.dtype in ("tf32", "float32"):
        return "tf32" if s.dtype == "tf32" else "ieee"
    if s.rows <= 32:
        return "small"
    if s.dtype != "bfloat16" or (s.rank > 16 and s.rank % 16):
        return "medium"  # ragged ranks load V element by element, for which the large tile's registers do not suffice
    form = "fused" if s.rank <= s.fused_rank else "started"
    c, tiles = card_of(arch, name, sms), TILES[family(arch)]
    return min(("large", "medium"), key=lambda kind: cost(form, s, c, tiles[kind][:2]).seconds)


def matmul_config(
    given: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    fold_n: int,
    rank: int,
    tf32: bool,
    *,
    forward: bool = True,
) -> dict[str, int]:
    """The tile of y = x W^T + ..., ``given`` being x alone, or with ``forward=False`` of dx = dy W + ..., ``given`` being dy's
    pieces. The weights (N_i, K) stand one above the other; folds of a piece of its own width have ``fold_n`` at most."""
    x = given[0]
    arch = device_arch(x.device)
    rows, out, inner = x.shape[0], _columns(weights, forward), _columns(weights, not forward)
    if arch == "interpret":
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2}
    s = Sizes(_rows(rows), out, inner, rank, max(1, out // fold_n), _dtype_name(x.dtype, tf32))
    kind = _tile_kind(arch, _card_name(x.device), processors(x.device), s)
    if kind in ("large", "medium") and not all(map(aligned, (*given, *weights))):
        kind = "ragged"
    default = dict(zip(TILE_NAMES, TILES[family(arch)][kind], strict=True)) | {"GROUP_M": 8}
    return default | launch_config("cp_linear_fwd", arch, shape_class(rows, out, inner, rank))


# -- forms -------------------------------------------------------------------------------------------------------------

#: Not taken on the model's word alone: what descriptors do wrong shows on a card only. scripts/tune.py checks each form's
#: results before it times them, and where one of these is right and the fastest, its entry in the table makes it the choice.
MEASURED_ONLY = ("tma_fused", "tma_started")


@functools.lru_cache(maxsize=4096)
def form_class(s: Sizes, forward: bool) -> str:
    """Key of the measured forms: three folds of one weight are not three weights, whose products the library makes one by one.
    Rows are rounded up to a power of two and the rank to the tile that it is padded to; widths
    are as they are: a model has few of them, and 768 is not 1024."""
    rows, rank, folds = next_power_of_2(s.rows), next_power_of_2(s.padded_rank), s.folds if forward else 1
    return f"{s.dtype}_m{rows}_n{s.out}_k{s.inner}_r{rank}_g{folds}_w{s.weights}_{'fwd' if forward else 'bwd'}"


@functools.lru_cache(maxsize=4096)
def predicted(arch: str, name: str, sms: int, s: Sizes, forward: bool) -> tuple[tuple[str, Cost], ...]:
    """What each form is expected to cost on a card of architecture ``arch`` called ``name`` with ``sms`` processors, cheapest
    first, for operands that any form could take; forms that do not exist at these sizes are left out."""
    c = card_of(arch, name, sms)
    s = s if forward else s._replace(folds=1)
    product = s if forward else s._replace(out=s.inner, inner=s.out, weights=1)
    tile = TILES[family(arch)][_tile_kind(arch, name, sms, product)][:2]
    one = not forward and _one_pass(arch, name, sms, s)
    costs = [(form, cost(form, s, c, tile, forward=forward, one_pass=one)) for form in FORMS]
    return tuple(sorted((c for c in costs if c[1].seconds < math.inf), key=lambda c: c[1].seconds))


@functools.lru_cache(maxsize=4096)
def by_model(arch: str, name: str, sms: int, s: Sizes, forward: bool) -> tuple[str, ...]:
    """The forms in the order in which they are taken where nothing was measured."""
    return tuple(form for form, _ in predicted(arch, name, sms, s, forward) if form not in MEASURED_ONLY)


def _interpreted(s: Sizes, forward: bool) -> tuple[str, ...]:
    """Where nothing has a price: as on a card with small tiles, so that tests see more than one form."""
    return ("fused", "started") if forward and s.out * s.rank <= 5_875 else ("started",)


def cp_linear_form(
    x: torch.Tensor, weights: Sequence[torch.Tensor], fold_n: int, rank: int, tf32: bool, *, forward: bool = True
) -> str:
    """Which form computes (x W^T + update), or with ``forward=False`` (dy W + dL/dh U^T), x being dy or a piece
    of it: the table's entry, where one was measured and these operands allow it; else the cheapest that they allow by the
    model. Folds count forward only."""
    arch = device_arch(x.device)
    rows, out, inner = x.shape[0], _columns(weights, True), _columns(weights, False)
    folds = max(1, out // fold_n, len(weights)) if forward else 1
    s = Sizes(_rows(rows), out, inner, rank, folds, _dtype_name(x.dtype, tf32), len(weights))
    if arch == "interpret":
        order = _interpreted(s, forward)
    else:
        order = by_model(arch, _card_name(x.device), processors(x.device), s, forward)
    measured = launch_config("cp_linear_form", arch, form_class(s, forward))
    if measured:
        order = FORMS[measured["form"]], *order
    return next(form for form in order if can(form, x, weights, rank, tf32, forward=forward))


@functools.lru_cache(maxsize=4096)
def _narrow_by_library(arch: str, name: str, sms: int, s: Sizes) -> bool:
    return narrow(card_of(arch, name, sms), s).by_library


def narrow_by_library(a: torch.Tensor, columns: int, rank: int, tf32: bool) -> bool:
    """Whether the library forms a (M, columns) or what it is a piece of times (columns, R) rather than the kernel
    made for it. Not for float16, whose result is float32."""
    arch = device_arch(a.device)
    if arch == "interpret" or a.dtype == torch.float16:
        return False
    s = Sizes(_rows(a.shape[0]), rank, columns, rank, 1, _dtype_name(a.dtype, tf32))
    return _narrow_by_library(arch, _card_name(a.device), processors(a.device), s)


@functools.lru_cache(maxsize=4096)
def _grad_u_by_library(arch: str, name: str, sms: int, s: Sizes) -> bool:
    return of_u(card_of(arch, name, sms), s).by_library


def grad_u_by_library(x: torch.Tensor, rank: int, tf32: bool) -> bool:
    """Whether the library forms dU (K, R) = x^T dL/dh: its one launch in place of two, where x (M, K) is short."""
    arch = device_arch(x.device)
    if arch == "interpret":
        return False
    s = Sizes(_rows(x.shape[0]), rank, x.shape[1], rank, 1, _dtype_name(x.dtype, tf32))
    return _grad_u_by_library(arch, _card_name(x.device), processors(x.device), s)


@functools.lru_cache(maxsize=4096)
def _one_pass(arch: str, name: str, sms: int, s: Sizes) -> bool:
    if family(arch) != "sm_90" or s.itemsize != 2 or s.rank > 32:
        return False  # no such tile
    c = card_of(arch, name, sms)
    return dy_pass(c, s, True).seconds <= dy_pass(c, s, False).seconds


def one_pass(grad: torch.Tensor, columns: int, rank: int) -> bool:
    """Whether one kernel takes dL/dh and dV from dy (M, columns), ``grad`` being that or a piece of it. It adds to
    columns x R floats at each 128 rows, by fewer programs the larger R is; two kernels read dy twice. The table's entry, else
    the cheaper by the model."""
    arch = device_arch(grad.device)
    if arch == "interpret":
        return rank <= 16
    s = Sizes(_rows(grad.shape[0]), columns, 1, rank, 1, _dtype_name(grad.dtype, False))
    measured = launch_config("cp_linear_one_pass", arch, form_class(s, False))
    return (
        bool(measured["one_pass"]) if measured else _one_pass(arch, _card_name(grad.device), processors(grad.device), s)
    )
