"""How adapter's launches are cut: chunks of hidden units, rows a program, tiles. Read off the compiler where no clock was."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

import torch

from fastgist_kernels.common import device_arch, launch_config, next_power_of_2
from fastgist_kernels.outer import processors, rank_block

__all__ = ["chunks", "most_hidden", "row_tiles", "tile_config", "tile_defaults"]


def most_hidden(wide: bool, ieee: bool, gated: bool, backward: bool) -> int:
    """Hidden units that a tile can hold: 256, or 128 where it also sums a gate's gradient; with float32 operands (``wide``:
    float16's low-rank ones are) 128, or 64 in full float32 (``ieee``), with a gate, and in the backward."""
    if wide:
        return 64 if gated or backward or ieee else 128
    return 128 if gated and backward else 256


def row_tiles(
    kernel: str, block_h: int, gated: bool, ragged: bool, cast: bool = False, normed: bool = False
) -> tuple[int, ...]:
    """Rows a program, smallest first: the fewest that leave each processor at most one program, else the last. ``cast``:
    weights of another dtype than x's, which the forward loads past the pipeline and so wants more programs beside: at
    50,688 rows of 768 on an H200 64 rows took 132 us, 32 took 85."""
    if kernel == "adapter_bwd":
        few = block_h > 128 or (gated and block_h == 128) or ragged
    else:
        few = (gated and (block_h == 256 or (normed and block_h == 128))) or cast
        few = few or (normed and ragged and block_h == 64)
    return (16, 32) if few else (16, 32, 64)


def chunks(x: torch.Tensor, hidden: int, tf32: bool, *, gated: bool, backward: bool = False) -> list[tuple[int, int]]:
    """(first unit, units) of every launch."""
    wide = x.dtype in (torch.float16, torch.float32)
    most = most_hidden(wide, x.dtype == torch.float32 and not tf32, gated, backward)
    if device_arch(x.device) == "interpret":
        most = 32
    return [(first, min(most, hidden - first)) for first in range(0, hidden, most)]


def tile_defaults(
    kernel: str, float32: bool, block_h: int, gated: bool, ragged: bool, normed: bool = False
) -> dict[str, int]:
    """Read off the compiler (registers, shared memory, no spill), not off a clock. ``ragged``: widths of x or y that 128
    does not divide cost masks and unaligned addresses, hence registers."""
    backward = kernel == "adapter_bwd"
    if float32:
        return {
            "BLOCK_D": 32,
            "BLOCK_N": 32,
            "num_warps": 8,
            "num_stages": 2 if backward and ragged and block_h == 64 and not gated else 3,
        }
    widest = 16 if backward or gated else 32 if normed else 64
    width = 128 if not ragged and block_h <= widest else 64
    if backward and block_h == 128:
        width = 32
    warps = 8 if block_h > 64 or (backward and (gated or normed)) else 4
    if normed and backward and ragged and block_h == 16:
        warps = 4
    return {"BLOCK_D": width, "BLOCK_N": width, "num_warps": warps, "num_stages": 3}


def tile_config(
    kernel: str,
    x: torch.Tensor,
    out: int,
    hidden: int,
    gated: bool = False,
    cast: bool = False,
    normed: bool = False,
) -> tuple[int, int, Mapping[str, int]]:
    """BLOCK_M, BLOCK_H, and what may shrink on a smaller device, for a launch over ``hidden`` units from x (M, D) to width
    ``out``."""
    return _tile_config(kernel, x.device, x.dtype == torch.float32, *x.shape, out, hidden, gated, cast, normed)


@functools.lru_cache(maxsize=4096)
def _tile_config(
    kernel: str,
    device: torch.device,
    float32: bool,
    rows: int,
    inner: int,
    out: int,
    hidden: int,
    gated: bool,
    cast: bool,
    normed: bool,
) -> tuple[int, int, Mapping[str, int]]:
    arch = device_arch(device)
    block_h = rank_block(hidden, 256)
    if arch == "interpret":
        return 16, block_h, {"BLOCK_D": 16, "BLOCK_N": 32}
    sms = processors(device)
    kind = float32, block_h, gated, bool(inner % 128 or out % 128)
    tiles = row_tiles(kernel, *kind[1:], cast, normed)
    block_m = next((tile for tile in tiles if rows <= tile * sms), tiles[-1])
    config = tile_defaults(kernel, *kind, normed)
    shape = f"m{next_power_of_2(rows)}_d{next_power_of_2(inner)}_h{block_h}{'_norm' * normed}"
    config |= launch_config(kernel, arch, shape)
    return config.pop("BLOCK_M", block_m), block_h, MappingProxyType(config)
