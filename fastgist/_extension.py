"""The compiled extension (csrc/), loaded on first use. Optional: without it other implementations serve.

``fastgist/_C*.so`` registers ``torch.ops.fastgist_native`` through libtorch's stable ABI; it is a plain shared library,
not a Python module. ``fastgist._build_info`` is one, and only says what was built.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from pathlib import Path

__all__ = ["broken", "build_info", "has_cuda", "load", "vector_bytes"]

_logger = logging.getLogger("fastgist")
_lock = threading.Lock()
_FOLDER = Path(__file__).resolve().parent
_PROBE = "fastgist_native::bidirectional_kl_fwd"
#: What this version's extension holds for CPUs at least; one left over from an older version may not.
_HOLDS = ("bidirectional_kl_fwd_bwd", "gist_loss_fwd_bwd", "gist_loss_bwd_classes", "adapter_bwd", "dropout")


_ABSENT = "it was not built with this installation"


def _load() -> str | None:
    libraries = sorted(_FOLDER.glob("_C*.so"))
    if not libraries:
        return _ABSENT
    import torch

    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        return f"{libraries[0].name} could not be loaded: {str(error).strip().splitlines()[0]}"
    absent = [name for name in _HOLDS if not _runs(name)]
    if absent:
        return f"{libraries[0].name} was built from an older version, without {', '.join(absent)}"
    return None


def _runs(name: str) -> bool:
    import torch

    known = hasattr(torch.ops.fastgist_native, name)  # torch's next question raises where there is no such operator
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgist_native::{name}", "CPU")


@functools.cache
def _load_once() -> str | None:
    reason = _load()
    if reason is not None:
        _logger.info("fastgist runs without its compiled extension: %s", reason)
    return reason


def load() -> str | None:
    """Load the extension once a process. None when it is loaded, else why it is not (one INFO line says so, once)."""
    with _lock:  # functools.cache alone would let two threads load it twice
        return _load_once()


def broken() -> str | None:
    """Why the extension that is there does not load; None where it does, or where there is none."""
    reason = load()
    return None if reason == _ABSENT else reason


def has_cuda() -> bool:
    """Whether the loaded extension holds CUDA kernels. Says nothing about this machine having a GPU."""
    if load() is not None:
        return False
    import torch

    return torch._C._dispatch_has_kernel_for_dispatch_key(_PROBE, "CUDA")


@functools.cache
def vector_bytes() -> int:
    """Bytes of a vector in the instruction set that the extension takes here (64, 32 or 16); 0 where it is not loaded."""
    if load() is not None:
        return 0
    import torch

    return torch.ops.fastgist_native.vector_bytes()


def build_info() -> dict[str, object] | None:
    """What the extension was built from and for: torch, compiler, CUDA version and architectures, CPU instruction sets.

    None where there is no extension. Where ``_build_info`` was built for another Python, only what the loaded library
    itself shows is there.
    """
    if load() is not None:
        return None
    try:
        built = importlib.import_module("fastgist._build_info").info()
    except ImportError:
        built = {}
    return {**built, "cuda_kernels": has_cuda()}
