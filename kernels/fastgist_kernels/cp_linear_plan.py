"""Which form and which tile cp_linear takes: the measured table's entry, else a model. Nothing here launches anything.

Sizes M rows, N out, K in, R rank, n = N / G, as in cp_linear.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastgist_kernels.common import cdiv, device_arch, launch_config, next_power_of_2
from fastgist_kernels.cp_linear_forms import FORMS
from fastgist_kernels.outer import processors, rank_block

__all__ = [
    "FORMS",
    "TILES",
    "TILE_NAMES",
    "cp_linear_form",
    "family",
    "matmul_config",
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


def _aligned(t: torch.Tensor) -> bool:
    """Whether a tile of ``t`` can be fetched 16 bytes at a time, as Triton sees it.

    Else every load of the loop goes through registers: tiles with BLOCK_K = 64 then spill and, where u is not aligned
    either, meet a fault of ptxas 12.8 (see :func:`fastgist_kernels.aot.undefined_uniform`).
    """
    return t.data_ptr() % 16 == 0 and all(s == 1 or s % 16 == 0 for s in t.stride())


def _columns(weights: Sequence[torch.Tensor], forward: bool) -> int:
    """Of the product with weights (N_i, K): N forward, K backward."""
    return sum(w.shape[0] for w in weights) if forward else weights[0].shape[1]


def matmul_config(
    x: torch.Tensor, weights: Sequence[torch.Tensor], fold_n: int, rank: int, tf32: bool, *, forward: bool = True
) -> dict[str, int]:
    """The tile of y = x W^T + ..., or with ``forward=False`` of dx = dy W + ..., x being dy. The weights (N_i, K) stand one
    above the other; folds of a piece of its own width have ``fold_n`` at most."""
    arch = device_arch(x.device)
    rows, inner = x.shape
    out = _columns(weights, forward)
    if arch == "interpret":
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2}
    tiles = TILES[family(arch)]
    large_m, large_n = tiles["large"][:2]
    programs = cdiv(rows, large_m) * (out // fold_n) * cdiv(fold_n, large_n)
    if x.dtype == torch.float32:
        kind = "tf32" if tf32 else "ieee"
    elif rows <= 32:
        kind = "small"
    elif not (_aligned(x) and all(map(_aligned, weights))):
        kind = "ragged"
    elif x.dtype == torch.bfloat16 and programs >= processors(x.device) and (rank <= 16 or rank % 16 == 0):
        kind = "large"  # ragged ranks load V element by element, for which its registers do not suffice
    else:
        kind = "medium"
    default = dict(zip(TILE_NAMES, tiles[kind], strict=True)) | {"GROUP_M": 8}
    return default | launch_config("cp_linear_fwd", arch, shape_class(rows, out, inner, rank))


def cp_linear_form(
    x: torch.Tensor, weights: Sequence[torch.Tensor], fold_n: int, rank: int, tf32: bool, *, forward: bool = True
) -> str:
    """Which form computes (x W^T + update), or with ``forward=False`` (dy W + dL/dh U^T), x being dy.

    The table's entry, where one was measured; else by a model: the library's matmul is ahead for float32, and at large
    N K by more than the extra pass over y costs; below, a second read of x costs as much as the extra columns at
    N R = 47,000 for 256-wide tiles (790 TFLOP/s against 4.3 TB/s). float16 stays in the kernels, which keep h in float32.
    Only a forward can be fused: dL/dh is needed beyond dx.
    """
    arch = device_arch(x.device)
    out = _columns(weights, forward)
    can_fuse = forward and rank <= rank_tile(x, rank, tf32, fused=True)
    can_blas = x.dtype != torch.float16
    measured = launch_config("cp_linear_form", arch, shape_class(x.shape[0], out, x.shape[1], rank))
    if measured:
        form = FORMS[measured["form"]]
        return "started" if (form == "fused" and not can_fuse) or (form == "blas" and not can_blas) else form
    if can_blas and arch != "interpret" and (x.dtype == torch.float32 or out * x.shape[1] >= 2048**2):
        return "blas"
    block_n = matmul_config(x, weights, fold_n, rank, tf32, forward=forward)["BLOCK_N"]
    return "fused" if can_fuse and out * rank * 256 <= 47_000 * block_n else "started"
