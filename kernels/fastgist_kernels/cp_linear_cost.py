"""What each form of cp_linear costs, by counting: launches, bytes through memory, products in waves of tiles.

A tiled product takes a launch and the longer of its bytes at the copy's speed and

    waves * (products of a tile / a processor's rate + an overhead),    waves = ceil(tiles / processors),

so columns beyond an edge are paid for, and so is a last wave that does not fill the card. Rate, overhead and launch of the
library were fitted to the H200's readings in benchmarks/results, :data:`READINGS`, and come within 8 % of each. How much of
that rate a Triton loop reaches no reading says: those shares are assumptions, and all that follows from them is a
prediction. What scripts/tune.py measures on a card goes into the launch table, which is asked before this model.

Sizes M rows, N out, K in, R rank, G folds of width n = N / G, W weights. Plain numbers throughout: no tensors, no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastgist_kernels.common import cdiv, next_power_of_2
from fastgist_kernels.cp_linear_forms import FEW_ROWS

__all__ = [
    "CARDS",
    "EAGER",
    "READINGS",
    "SPREAD",
    "Card",
    "Cost",
    "Sizes",
    "card_of",
    "cost",
    "dy_pass",
    "dy_programs",
    "eager_cost",
    "library_product",
    "narrow",
    "of_u",
    "roofline",
]

#: The eager forms that the benchmark compares with: x W^T + b + ((x U) * gain) V^T; x W^T + b + x (V' U^T)^T; and the first
#: one's two products into one buffer, its gradients by formula in a Function. Several weights are called one by one.
EAGER = ("factored", "dense", "chain")
#: (M, N, K, microseconds) of a product in bfloat16 on an H200, 17 readings: `frozen linear alone` of first-run/cp_linear.json
#: (d = 768, 1024, 4096; forward and backward), the products of second-run/probe.json, and 8192^3 as two runs' ceilings.
READINGS = (
    *((16384, 768, 768, us) for us in (33.9, 33.0)),
    *((16384, 1024, 1024, us) for us in (52.6, 50.5)),
    *((16384, 4096, 4096, us) for us in (687.0, 752.0, 699.0)),
    *((50688, 768, 768, us) for us in (94.9, 93.3)),
    (50688, 2304, 768, 267.0),
    (50688, 768, 2304, 244.1),
    (50688, 3072, 768, 353.3),
    (50688, 768, 3072, 320.1),
    (50688, 768, 3072, 319.0),
    (50688, 3072, 768, 351.5),
    *((8192, 8192, 8192, us) for us in (1366.3, 1410.8)),
)


#: How far a reading is from the model at most.
SPREAD = 0.08


class Sizes(NamedTuple):
    """One call. ``folds``: all of them, those of several weights too. ``dtype``: "bfloat16", "float16", "float32", or "tf32"
    for float32 whose products may be tf32. ``weights``: how many stand one above the other, each with its own result."""

    rows: int
    out: int
    inner: int
    rank: int
    folds: int = 1
    dtype: str = "bfloat16"
    weights: int = 1

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype in ("float32", "tf32") else 2

    @property
    def padded_rank(self) -> int:
        """What a tile holds of the rank: a multiple of 16."""
        return 16 * cdiv(self.rank, 16)

    @property
    def fused_rank(self) -> int:
        """The largest rank whose x U fits beside the accumulator."""
        return 32 if self.dtype == "float32" else 64


@dataclass(frozen=True)
class Card:
    """Rates of a card. ``measured`` names the fields that come from readings on it; the rest is assumed, or the data sheet's.

    copy: bytes a second, read plus written. rates: FLOP/s in a product's inner loop. launch: seconds from one kernel to the
    next, wave: seconds beside a tile's products. streams: share of the copy's speed at which kernels with a narrow
    result (x U, dy^T h) read. pointers, descriptors: a Triton loop's share of the library's rate with pointers and with
    tensor descriptors; persistent: the latter's overhead of a tile, in that of ``wave``. program: bytes/s that one program of
    a narrow kernel fetches (24 KB under way, answered after 0.8 us), resident: how many of them share a processor.
    """

    name: str
    processors: int
    copy: float
    rates: Mapping[str, float]
    launch: float = 2.9e-6
    wave: float = 2.0e-6
    streams: float = 0.73
    pointers: float = 0.85
    descriptors: float = 0.93
    persistent: float = 0.7
    program: float = 30e9
    resident: int = 4
    measured: tuple[str, ...] = ()


def _by_data_sheet(name: str, processors: int, terabytes: float, bf16: float, tf32: float, fp32: float) -> Card:
    """Data sheet's TB/s and TFLOP/s, less what an H200 misses of its own sheet's."""
    rates = {"bfloat16": bf16 * 0.83, "float16": bf16 * 0.79, "tf32": tf32 * 0.83, "float32": fp32 * 0.76}
    return Card(name, processors, terabytes * 0.886e12, {k: v * 1e12 for k, v in rates.items()})


#: Architecture -> cards, the first being taken for one that is not named. Only the H200's figures are readings: copy 4.22
#: to 4.28 TB/s, float16 0.96 of bfloat16, float32 51 TFLOP/s, streams from dy^T h (25 us for 78 MB). Its tf32 is the data
#: sheet's, less what bfloat16 misses of its own. The shares of a Triton loop lie between what others printed on an H100
#: (triton's pull request 5461: descriptors 13 % ahead of pointers in fp16; facebookexperimental/triton's 1038: 0.86 and
#: 0.97 of the library at 65536 x 1024 x 1024 without and with persistent programs).
CARDS: dict[str, tuple[Card, ...]] = {
    "sm_80": (_by_data_sheet("A100", 108, 2.04, 312, 156, 19.5),),
    "sm_86": (_by_data_sheet("A6000", 84, 0.768, 155, 77, 38.7),),
    "sm_89": (_by_data_sheet("L40S", 142, 0.864, 362, 183, 91.6),),
    "sm_90": (
        Card(
            "H200",
            132,
            4.25e12,
            {"bfloat16": 825e12, "float16": 790e12, "tf32": 411e12, "float32": 51e12},
            measured=("copy", "bfloat16", "float16", "float32", "launch", "wave", "streams"),
        ),
        _by_data_sheet("H100", 132, 3.35, 989, 494, 67),
    ),
    "sm_100": (_by_data_sheet("B200", 148, 8.0, 2250, 1100, 75),),
}


def card_of(arch: str, name: str = "", processors: int = 0) -> Card:
    """The card of architecture ``arch`` whose name occurs in ``name``, else the first; of an unknown architecture, the next
    older one's. ``processors``, where given, are this device's."""
    known = [known for known in CARDS if _generation(known) <= _generation(arch)] or [min(CARDS, key=_generation)]
    cards = CARDS[max(known, key=_generation)]
    found = next((c for c in cards if c.name in name), cards[0])
    return replace(found, processors=processors) if processors else found


def _generation(arch: str) -> int:
    digits = arch.removeprefix("sm_")
    return int(digits) if digits.isdigit() else 80  # "interpret" costs nothing that could be known


@dataclass(frozen=True)
class Cost:
    """seconds; launches; bytes through device memory; FLOPs, padding included."""

    seconds: float = 0.0
    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.launches + other.launches,
            self.bytes + other.bytes,
            self.flops + other.flops,
        )


_IMPOSSIBLE = Cost(float("inf"))


# -- kernels -----------------------------------------------------------------------------------------------------------


def _filled(block_m: int, block_n: int) -> float:
    """Share of the rate that a tile reaches, 1 from 128 x 256 on: smaller ones read more for each product. Assumed."""

    def reuse(m: int, n: int) -> float:
        each = m * n / (m + n)
        return each / (each + 40.0)

    return min(1.0, reuse(block_m, block_n) / reuse(128, 256))


def _product(
    c: Card,
    s: Sizes,
    moved: int,
    tile: tuple[int, int],
    *,
    beside: int = 0,
    start: int = 0,
    share: float = 1.0,
    overhead: float = 1.0,
) -> Cost:
    """(M, K) times (K, N) in tiles that do not straddle folds, ``beside`` more columns in the loop and ``start`` more products
    an element outside it."""
    block_m, block_n = tile
    tiles = cdiv(s.rows, block_m) * s.folds * cdiv(s.out // s.folds, block_n)
    waves = cdiv(tiles, c.processors)
    each = 2 * block_m * ((block_n + beside) * s.inner + start * block_n)
    rate = c.rates[s.dtype] / c.processors * share * _filled(block_m, block_n)
    by_products = waves * (each / rate + overhead * c.wave)
    by_bytes = moved / c.copy
    if s.rows <= FEW_ROWS:  # W is all there is to read, and few programs leave the memory idle
        by_bytes = max(by_bytes / c.streams, _fetched(c, tiles, block_n * s.inner * s.itemsize))
    return Cost(c.launch + max(by_products, by_bytes), 1, moved, tiles * each)


#: Tiles that the library is taken to choose from, and into how many parts it may split the inner dimension.
_LIBRARY_TILES = ((128, 256), (256, 128), (192, 192), (128, 128), (64, 128), (128, 64), (64, 64), (16, 64), (16, 128))
_LIBRARY_SPLITS = (1, 2, 4, 8)


def library_product(c: Card, s: Sizes, *, passes: int = 1) -> Cost:
    """The library's (M, K) times (K, N), its fastest tile and split. ``passes`` over the result: 2 where it is added to."""
    moved = (s.rows * s.inner + s.out * s.inner + passes * s.rows * s.out) * s.itemsize
    best = _IMPOSSIBLE
    for splits in _LIBRARY_SPLITS:
        parts = 0 if splits == 1 else 2 * splits * s.rows * s.out * 4
        part = s._replace(out=s.out * splits, inner=cdiv(s.inner, splits), folds=splits)
        for tile in _LIBRARY_TILES:
            found = _product(c, part, moved + parts, tile)
            best = min(best, found, key=lambda cost: cost.seconds)
    return best


def _fetched(c: Card, programs: int, each: int) -> float:
    """Seconds until ``programs`` have each fetched so many bytes, had the memory no limit."""
    return cdiv(programs, c.resident * c.processors) * each / c.program


def _stream(c: Card, s: Sizes, moved: int, flops: int, programs: int, each: int) -> Cost:
    """A kernel that reads: ``programs`` with ``each`` bytes to fetch."""
    by_products = flops / (c.rates[s.dtype] * c.pointers)
    seconds = max(moved / (c.copy * c.streams), _fetched(c, programs, each), by_products)
    return Cost(c.launch + seconds, 1, moved, flops)


class Narrow(NamedTuple):
    cost: Cost
    by_library: bool


def narrow(c: Card, s: Sizes) -> Narrow:
    """x U, (M, K) times (K, R), or dy V': a program of the kernel holds 64 rows and 64 of the rank, so that few rows are few
    programs; or the library's."""
    blocks, b = cdiv(s.rank, 64), s.itemsize
    moved = (blocks * s.rows * s.inner + (s.inner + s.rows) * s.rank) * b
    each = (min(s.rows, 64) + min(s.rank, 64)) * s.inner * b
    own = _stream(c, s, moved, 2 * s.rows * s.inner * s.padded_rank, cdiv(s.rows, 64) * blocks, each)
    if s.dtype == "float16":
        return Narrow(own, False)
    library = _by_library(c, s, s.inner)
    return Narrow(library, True) if library.seconds < own.seconds else Narrow(own, False)


def _by_library(c: Card, s: Sizes, columns: int) -> Cost:
    """A product of the library that reads (M, columns) for a result or a factor of the rank: it splits what it must."""
    moved = (s.rows * columns + (s.rows + columns) * s.rank) * s.itemsize
    flops = 2 * s.rows * columns * s.rank
    return Cost(c.launch + max(moved / (c.copy * c.streams), flops / c.rates[s.dtype]), 1, moved, flops)


def _outer(c: Card, s: Sizes, columns: int) -> Cost:
    """Stage one of a^T h, a (M, columns) and h (M, R), and the sum of its partial results (outer.py)."""
    b, blocks = s.itemsize, cdiv(s.rank, 128)
    tiles = cdiv(columns, 128) * blocks
    most = max(c.processors // tiles, s.rows * b // (32 * s.rank))
    splits = max(1, min(4 * c.processors // tiles, most, cdiv(s.rows, 64)))
    part = splits * columns * s.rank * 4
    moved = (blocks * s.rows * columns + s.rows * s.rank) * b + part
    flops = 2 * s.rows * columns * s.padded_rank
    read = _stream(c, s, moved, flops, tiles * splits, cdiv(s.rows, splits) * min(columns, 128) * b)
    return read + _elementwise(c, part + columns * s.rank * b)


def of_u(c: Card, s: Sizes) -> Narrow:
    """dU = x^T dL/dh: by outer.py, or the library where a second launch takes longer than reading x."""
    short = s.rows * s.inner * s.itemsize / (c.copy * c.streams) < c.launch and s.dtype != "float16"
    return Narrow(_by_library(c, s, s.inner) if short else _outer(c, s, s.inner), short)


def dy_programs(rows: int, rank: int, itemsize: int, block_m: int = 128) -> tuple[int, int]:
    """(programs, blocks of rows each) that take dL/dh and dV from one read of dy (M, N). A program's part of dV is N R floats:
    there are as many programs as keep the parts an eighth of dy, at least one."""
    row_blocks = cdiv(rows, block_m)
    blocks = cdiv(row_blocks, max(1, min(row_blocks, rows * itemsize // (32 * rank))))
    return cdiv(row_blocks, blocks), blocks


def dy_pass(c: Card, s: Sizes, one_pass: bool) -> Cost:
    """dL/dh (M, R) and dV from dy: by one kernel, whose programs add to their parts of dV at each 128 rows, or by a projection
    and outer.py."""
    if not one_pass:
        found = narrow(c, s._replace(inner=s.out))
        beside = _folded(c, s) + _launches(c, s.weights - 1) if found.by_library else Cost()
        return found.cost + beside + _outer(c, s, s.out)
    programs, blocks = dy_programs(s.rows, s.rank, s.itemsize)
    b, part = s.itemsize, programs * s.out * s.rank * 4
    moved = (s.rows * s.out + s.out * s.rank + 2 * s.rows * s.rank) * b + part * (2 * blocks - 1)
    flops = 4 * s.rows * s.out * s.padded_rank
    each = min(s.rows, 128 * blocks) * s.out * b + part // programs * (blocks - 1)
    read = _stream(c, s, moved, flops, programs, each)
    return read + _elementwise(c, part + s.out * s.rank * b)


def _elementwise(c: Card, moved: int) -> Cost:
    return Cost(c.launch + moved / c.copy, 1, moved)


def _launches(c: Card, count: int) -> Cost:
    """Of a few numbers each."""
    return Cost(count * c.launch, count)


def _folded(c: Card, s: Sizes) -> Cost:
    """V' (N, R) from V and the gain."""
    return _elementwise(c, (s.out + s.out // s.folds) * s.rank * s.itemsize)


def _to_each(c: Card, s: Sizes) -> Cost:
    """x W_i^T of each weight by the library."""
    one = library_product(c, s._replace(out=s.out // s.weights))
    return _times(one, s.weights)


def _from_each(c: Card, s: Sizes) -> Cost:
    """The sum of dy_i W_i by the library, a product for each weight, added to those before."""
    turned = s._replace(out=s.inner, inner=s.out // s.weights, folds=1)
    return library_product(c, turned) + _times(library_product(c, turned, passes=2), s.weights - 1)


def _times(each: Cost, count: int) -> Cost:
    return Cost(count * each.seconds, count * each.launches, count * each.bytes, count * each.flops)


# -- forms -------------------------------------------------------------------------------------------------------------


def cost(
    form: str, s: Sizes, c: Card, tile: tuple[int, int], *, forward: bool = True, one_pass: bool | None = None
) -> Cost:
    """Of y and x U (forward), or of the gradients of x, u, v and gain (a whole backward in which dx takes ``form``). ``tile``:
    rows and columns of the matmul kernel's. ``one_pass``: how the backward reads dy, None for the cheaper way. Infinite where
    the form does not exist at these sizes."""
    if not forward:
        return _backward(form, s, c, tile, one_pass)
    low = s.rows * s.rank * s.itemsize
    factors = (s.inner + s.out // s.folds) * s.rank * s.itemsize
    moved = (s.rows * (s.inner + s.out) + s.out * s.inner) * s.itemsize + low + factors
    if form == "blas":
        several = s.weights > 1
        found = narrow(c, s).cost + _folded(c, s) + _to_each(c, s)
        if several:  # the biases as one more rank: ones beside h, which is copied out, zeros and biases beside V'
            beside = s.padded_rank * (3 * s.rows + 2 * s.out) * s.itemsize
            found += _elementwise(c, beside) + _launches(c, 3)
        return found + _added(c, s, several)
    return _kernel(form, s, c, tile, moved)


def _kernel(form: str, s: Sizes, c: Card, tile: tuple[int, int], moved: int, project: bool = True) -> Cost:
    """x W^T + (x U) V^T in kernels of ours, moving ``moved`` bytes beside a second read of x."""
    descriptors = form.startswith("tma_")
    share, overhead = (c.descriptors, c.persistent) if descriptors else (c.pointers, 1.0)
    kind = form.removeprefix("tma_")
    if descriptors and s.weights > 1:
        return _IMPOSSIBLE
    if kind == "few":
        return _few(s, c) if s.rows <= FEW_ROWS else _IMPOSSIBLE
    if kind == "fused":
        if s.rank > s.fused_rank:
            return _IMPOSSIBLE
        rank = s.padded_rank
        return _product(c, s, moved, tile, beside=rank, start=rank, share=share, overhead=overhead)
    found = _product(c, s, moved, tile, start=s.padded_rank, share=share, overhead=overhead)
    return found + narrow(c, s).cost if project else found


def _few(s: Sizes, c: Card) -> Cost:
    """W read once by column tiles and ranges of K, two programs a processor; x read by each column tile and the partial sums
    written and read again (cp_linear_few.py). Both mostly stay in L2, but are counted at the copy's speed."""
    block_n = min(128, max(32, next_power_of_2(round((s.out * s.inner / 1056) ** 0.5))))
    tiles = cdiv(s.out, block_n)
    splits = min(cdiv(2 * c.processors, tiles), cdiv(s.inner, 64))
    part = splits * s.rows * (s.out + s.rank) * 4
    weights = (s.out + s.rank) * s.inner * s.itemsize
    again = tiles * s.rows * s.inner * s.itemsize
    flops = 2 * 16 * cdiv(s.rows, 16) * (s.out + s.padded_rank) * s.inner
    by_bytes = weights / (c.copy * c.streams) + (again + part) / c.copy
    by_products = flops / (c.rates[s.dtype] * c.pointers)
    read = Cost(c.launch + max(by_bytes, by_products), 1, weights + again + part, flops)
    return read + _elementwise(c, part + s.rows * s.out * s.itemsize)


def _added(c: Card, s: Sizes, biased: bool = False) -> Cost:
    """y += h V^T by the library. ``biased``: with the biases as one more rank, padded to whole 16 bytes."""
    return library_product(c, s._replace(inner=s.rank + (8 - s.rank % 8 if biased else 0)), passes=2)


def _backward(form: str, s: Sizes, c: Card, tile: tuple[int, int], one_pass: bool | None) -> Cost:
    turned = s._replace(out=s.inner, inner=s.out, folds=1)
    b = s.itemsize
    moved = (s.rows * (s.inner + s.out) + s.out * s.inner + (s.rows + s.inner) * s.rank) * b
    beside = of_u(c, s).cost + _launches(c, 1)  # the gain's gradient, a sum of few rows
    if form == "fused":  # dL/dh comes from the same kernel, with V of all folds; dV reads dy again
        dx = _kernel("fused", turned, c, tile, moved + s.out * s.rank * b)
        return _folded(c, s) + dx + _outer(c, s, s.out) + beside
    if form == "started":
        dx = _kernel("started", turned, c, tile, moved, project=False)
    elif form == "blas":
        dx = _from_each(c, s) + _added(c, turned)
    else:
        return _IMPOSSIBLE
    ways = [way for way in (True, False) if one_pass in (None, way)]
    return min((dy_pass(c, s, way) for way in ways), key=lambda found: found.seconds) + dx + beside


def eager_cost(name: str, s: Sizes, c: Card, *, forward: bool = True) -> Cost:
    """Of an eager form, by the library's products and a pass for each sum and factor: what the forms above must not exceed. Of
    several weights each is called by itself, but by "chain", which knows of all. Sums of few numbers are left out."""
    if name == "chain":
        return _chain(s, c, forward)
    if s.weights > 1:
        one = s._replace(out=s.out // s.weights, folds=max(1, s.folds // s.weights), weights=1)
        found = _times(eager_cost(name, one, c, forward=forward), s.weights)
        sums = _elementwise(c, 3 * s.rows * s.inner * s.itemsize)
        return found if forward else found + _times(sums, s.weights - 1)
    b, low = s.itemsize, s.rows * s.rank * s.itemsize
    turned = s._replace(out=s.inner, inner=s.out, folds=1)
    base = library_product(c, s if forward else turned)
    if name == "factored":
        gained = _elementwise(c, (1 + s.folds) * low)  # (M, G R)
        if forward:
            update = s._replace(rows=s.rows * s.folds, out=s.out // s.folds, inner=s.rank, folds=1)
            low_rank = _by_library(c, s, s.inner) + gained
            return base + low_rank + library_product(c, update) + _elementwise(c, 3 * s.rows * s.out * b)
        low_rank = (
            _by_library(c, s, s.out) + gained + _elementwise(c, (1 + 2 * s.folds) * low)
        )  # dy V, then of the gain
        low_rank += _times(_elementwise(c, s.folds * low), 1 + (s.folds > 1))
        factors = _by_library(c, s, s.out) + _by_library(c, s, s.inner)
        dx = library_product(c, turned._replace(inner=s.rank)) + _elementwise(c, 3 * s.rows * s.inner * b)
        return base + low_rank + factors + dx
    delta = library_product(c, Sizes(s.out, s.inner, s.rank, s.rank, 1, s.dtype))
    if forward:
        return base + _folded(c, s) + delta + base + _elementwise(c, 3 * s.rows * s.out * b)
    of_delta = library_product(c, Sizes(s.out, s.inner, s.rows, s.rank, 1, s.dtype))  # dy^T x
    of_factors = library_product(c, Sizes(s.out, s.rank, s.inner, s.rank, 1, s.dtype))
    of_factors += library_product(c, Sizes(s.inner, s.rank, s.out, s.rank, 1, s.dtype))
    return base + base + _elementwise(c, 3 * s.rows * s.inner * b) + of_delta + of_factors + _of_folded(c, s)


def _of_folded(c: Card, s: Sizes) -> Cost:
    """Gradients of V and the gain from those of V', by autograd: two products and a sum a fold, and one more over folds."""
    return _times(_elementwise(c, 2 * s.out * s.rank * s.itemsize), 3 + (s.folds > 1))


def _chain(s: Sizes, c: Card, forward: bool) -> Cost:
    """x U once for all weights, each product added to a buffer; backward x U again, nothing that was kept."""
    one = s._replace(out=s.out // s.weights, folds=max(1, s.folds // s.weights), weights=1)
    h = _by_library(c, s, s.inner)
    if forward:
        return h + _times(_folded(c, one) + library_product(c, one) + _added(c, one), s.weights)
    narrow_products = _by_library(c, one, one.out)  # dy_i V_i', dy_i^T h
    dx = _from_each(c, s) + _added(c, s._replace(out=s.inner, folds=1))
    of_factors = _times(narrow_products + narrow_products + _of_folded(c, one), s.weights)
    return h + dx + of_factors + h


# -- the floor ---------------------------------------------------------------------------------------------------------


def roofline(s: Sizes, c: Card, *, forward: bool = True) -> Cost:
    """What no factored implementation beats on ``c``: the longer of the least bytes at the copy's speed and the products, none
    of them padding, at the inner loop's rate. One launch forward, the fewest that split sums need backward: two."""
    m, n, k, r, b = s.rows, s.out, s.inner, s.rank, s.itemsize
    narrow = (k + n // s.folds) * r
    if forward:
        moved, flops = (m * (k + n) + n * k + narrow) * b, 2 * m * n * k + 2 * m * r * (n + k)
    else:
        moved = (m * (2 * k + n) + n * k + 2 * narrow + m * r) * b
        flops = 2 * m * n * k + 4 * m * r * (n + k)
    return Cost(max(moved / c.copy, flops / c.rates[s.dtype]), 1 if forward else 2, moved, flops)
