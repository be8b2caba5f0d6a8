"""Which form a launch of the losses on two logits tensors takes, with which tile. What is measured: launch_tables.json."""

from __future__ import annotations

import functools

import torch

from fastgist_kernels.common import cdiv, device_arch, launch_config, next_power_of_2
from fastgist_kernels.outer import processors

__all__ = [
    "SIZES",
    "alone_config",
    "choose_form",
    "few_rows",
    "form_name",
    "rows_config",
    "split_classes",
    "streams",
    "twice_config",
    "vector_width",
    "whole_config",
]

#: Arguments that Triton is not to look at: what a row is aligned to VEC says alone, as a compiler that knows more than VEC
#: lays tiles out so that threads must exchange them.
SIZES = ("M", "V", "classes", "first", "stride_zm", "stride_om", "stride_gm", "stride_tm")
#: A row of at most this many classes is held in registers whole.
WHOLE_CLASSES = 4096
#: A problem of at most this many (padded) elements a tensor is one program's.
ALONE_ELEMENTS = 8192


def form_name(specialisation) -> str:
    """The name of a compiled kernel whose FORM says what it is: what a profiler shows."""
    loss = "gist_loss" if "g_ptr" in specialisation.signature else "bidirectional_kl"
    return f"_{loss}_{specialisation.constants['FORM']}_kernel"


def vector_width(*tensors: torch.Tensor) -> int:
    """Elements a thread takes at once from (M, V) tensors: 16 bytes of the first, or half of it for half precision, where
    every row begins and ends on that many; else 1."""
    widest = 16 // tensors[0].element_size()
    for width in (widest, 4):
        if tensors[0].shape[1] % width == 0 and all(t.stride(1) == 1 and t.stride(0) % width == 0 for t in tensors):
            return width
    return 1


def rows_config(
    kernel: str, device: torch.device, classes: int, vec: int, num_warps: int = 4, packed: int = 8, ragged: int = 8
) -> dict[str, int]:
    """Tile for a kernel that walks rows: one access of ``vec`` elements a thread and tensor, or ``ragged`` of one; rows packed
    while V is small, up to ``packed`` elements a thread."""
    each = vec if vec > 1 else ragged
    block_v = min(next_power_of_2(classes), 32 * num_warps * each)
    block_m = max(1, 32 * num_warps * min(each, packed) // block_v)
    default = {"BLOCK_V": block_v, "BLOCK_M": block_m, "num_warps": num_warps, "num_stages": 1}
    return default | launch_config(kernel, device_arch(device), f"v{next_power_of_2(classes)}")


def whole_config(kernel: str, device: torch.device, rows: int, classes: int, vec: int) -> dict[str, int]:
    """Tile of whole rows in registers: 16 elements a thread and tensor (8 of several ragged rows, each with an address of its
    own), fewer where there are not rows enough to go round."""
    block_v = next_power_of_2(classes)
    share = next_power_of_2(cdiv(rows, 2 * processors(device)))
    block_m = max(1, min((2048 if vec > 1 else 1024) // block_v, share))
    each = 512 if vec > 1 or block_m == 1 else 256
    default = {"BLOCK_V": block_v, "BLOCK_M": block_m, "num_warps": _warps(block_m * block_v, each), "num_stages": 1}
    return default | launch_config(kernel, device_arch(device), f"v{block_v}")


def alone_config(rows: int, classes: int, vec: int, ragged: int = 2048) -> dict[str, int]:
    """Tile of a problem whose rows one program takes, some at a time: ``ragged`` elements of rows that are."""
    block_v = next_power_of_2(classes)
    elements, each = (4096, 256) if vec > 1 else (ragged, 128)  # ragged: an address for every element takes registers
    block_m = max(1, min(next_power_of_2(rows), elements // block_v))
    return {"BLOCK_V": block_v, "BLOCK_M": block_m, "num_warps": _warps(block_m * block_v, each), "num_stages": 1}


def _warps(elements: int, each: int) -> int:
    return max(1, min(16, elements // each))


def twice_config(kernel: str, logits: torch.Tensor, vec: int, ragged: int = 8) -> dict[str, int]:
    """Tile of a kernel that reads its row twice, the second time from L2: so many warps that the rows of all programs at
    work fit there. ``ragged``: elements a thread of rows that are."""
    classes = logits.shape[1]
    fit = _cache(logits.device) // (processors(logits.device) * 2 * classes * logits.element_size())
    return rows_config(kernel, logits.device, classes, vec, 4 if fit >= 8 else 8 if fit >= 4 else 16, ragged=ragged)


@functools.cache
def _cache(device: torch.device) -> int:
    """Bytes of L2 that rows may take: four fifths of it (of an H100's, where kernels are interpreted)."""
    size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 50 * 2**20
    return size * 4 // 5


def choose_form(logits: torch.Tensor) -> str:
    """How gradients are finished with the loss. "alone": all rows in one program, which adds them up too; "whole": rows in
    registers; "split": few long rows, each by several programs in two launches; "rows": a row a program, read twice."""
    rows, classes = logits.shape
    if classes <= WHOLE_CLASSES:
        return "alone" if next_power_of_2(rows) * next_power_of_2(classes) <= ALONE_ELEMENTS else "whole"
    return "split" if few_rows(logits) else "rows"


def few_rows(logits: torch.Tensor) -> bool:
    """Whether rows are long and too few to keep the processors at work, a program a row."""
    rows, classes = logits.shape
    return classes > WHOLE_CLASSES and rows < 2 * processors(logits.device)


def split_classes(logits: torch.Tensor, block_v: int) -> tuple[int, int]:
    """(parts of a row, classes in each): about four programs a processor, at least two tiles a part."""
    rows, classes = logits.shape
    parts = cdiv(4 * processors(logits.device), rows)
    stretch = max(cdiv(cdiv(classes, parts), block_v), 2) * block_v
    return cdiv(classes, stretch), stretch


#: Tiles that a form reads or writes on its way over a row; two reads of the forms that look a tile ahead.
_TILES = {"alone": 4, "whole": 4, "rows": 8, "chunk": 8, "split": 4, "merge": 4, "fwd": 4, "bwd": 4, "classes": 4}


def streams(form: str, dtype: str, tile: tuple[int, int, int, int]) -> int:
    """Accesses of 16 bytes that the SASS of ``form`` must have at least, where a thread has as many. ``tile``: elements of an
    access, rows, columns, warps."""
    vec, block_m, block_v, warps = tile
    return block_m * block_v // (32 * warps * vec) * _TILES[form] if vec == {"fp32": 4}.get(dtype, 8) else 0
