"""Which implementation each operation takes here, and why.

Implementations: ``triton`` (CUDA devices; CPU tensors under TRITON_INTERPRET=1), ``cuda`` and ``native`` (the compiled
extension, on CUDA and CPU tensors), ``reference`` (plain PyTorch, everywhere). ``impl="auto"`` takes the first that
serves the tensor's device and dtype in the order below; a name given explicitly is taken or refused, never replaced.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from dataclasses import dataclass

import torch

from fastgist import _extension

__all__ = ["IMPLEMENTATIONS", "OPS", "available", "explain", "resolve", "interpreting", "vector_bytes"]

IMPLEMENTATIONS = ("auto", "triton", "cuda", "native", "reference")
OPS = ("bidirectional_kl", "gist_loss", "gist_linear_loss", "topk_kl", "cp_linear", "cp_update", "adapter", "gelu")

_HALF_AND_FLOAT = frozenset({torch.float32, torch.bfloat16, torch.float16})
_ALL = _HALF_AND_FLOAT | {torch.float64}


@dataclass(frozen=True)
class _Implementation:
    """What an implementation of one operation serves."""

    device: str
    dtypes: frozenset[torch.dtype]


#: (op, implementation) -> what it serves. The reference serves everything and is not listed.
#: Triton kernels accumulate in float32, so float64 (for checking formulas) is the reference's.
_SERVES: dict[tuple[str, str], _Implementation] = {
    **{(op, "triton"): _Implementation("cuda", _HALF_AND_FLOAT) for op in OPS},
    ("bidirectional_kl", "native"): _Implementation("cpu", _ALL),
    ("gist_loss", "native"): _Implementation("cpu", _ALL),
    ("gist_linear_loss", "native"): _Implementation("cpu", _ALL),
    ("adapter", "native"): _Implementation("cpu", _ALL),
    ("cp_linear", "native"): _Implementation("cpu", _ALL),
    ("cp_update", "native"): _Implementation("cpu", _ALL),
    ("bidirectional_kl", "cuda"): _Implementation("cuda", _ALL),
    ("gist_loss", "cuda"): _Implementation("cuda", _ALL),
}

#: The order in which "auto" asks. The losses compiled for CPUs are faster than plain PyTorch at every shape measured
#: (DESIGN.md, "The CPU path"), adapter, cp_linear and cp_update by size (their own files). On a GPU Triton comes first but
#: where a card said otherwise
#: (ops/_common.py, resolve_loss): neither its one-launch losses nor those in CUDA C++ have been timed on one.
#: (In two launches CUDA C++ was the faster on an H200: bidirectional_kl of 8192 rows, bfloat16, forward and backward, 0.48 ms
#: against 0.66 at 1,000 classes, 1.00 against 1.33 at 32,000, 3.58 against 4.72 at 128,256, host included.)
_AUTO = {"cuda": ("triton", "cuda"), "cpu": ("native",)}

#: An isolated build has no torch to compile against, and makes a package without the extension.
_BUILD_IT = (
    "build it with 'pip install --no-build-isolation .' in a clone, or with 'make setup' for the clone's own .venv"
)


@functools.cache
def interpreting() -> bool:
    """True where TRITON_INTERPRET=1 was set when first asked: Triton kernels then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _triton_missing() -> str | None:
    """Why Triton cannot be used at all here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'fastgist[triton]'; Linux only)"
    if importlib.util.find_spec("fastgist_kernels") is None:
        return "the package fastgist_kernels is not installed beside fastgist"
    if torch.version.hip is not None and not interpreting():
        return "this PyTorch is built for ROCm, where the kernels have not been measured"
    return None


def _obstacle(op: str, impl: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``impl`` cannot run ``op`` on such a tensor, or None if it can."""
    if impl == "reference":
        return None
    serves = _SERVES.get((op, impl))
    if serves is None:
        return f"{op} has no {impl} implementation"
    if impl == "triton":
        missing = _triton_missing()
        if missing:
            return missing
        if interpreting():
            wanted = "cpu"
        else:
            wanted = "cuda"
            if device == "cpu":
                return (
                    "Triton kernels need a CUDA device and the tensors are on the CPU "
                    "(move them to one, or set TRITON_INTERPRET=1 before Python starts to interpret the kernels, slowly)"
                )
        if device != wanted:
            return f"Triton kernels run on {wanted} tensors here and the tensors are on {device}"
    else:
        missing = _extension.load()
        if missing:
            return f"the compiled extension is not available: {missing} ({_BUILD_IT})"
        if impl == "cuda" and not _extension.has_cuda():
            return "the compiled extension was built without CUDA kernels (nvcc was not found at build time)"
        if device != serves.device:
            return f"impl={impl!r} runs on {serves.device} tensors and these are on {device}"
    if dtype not in serves.dtypes:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in serves.dtypes))
        return f"{op} in {impl} serves {names}, got {str(dtype).removeprefix('torch.')}"
    return None


def _auto_order(device: str) -> tuple[str, ...]:
    return ("triton",) if interpreting() and device == "cpu" else _AUTO.get(device, ())


def _worth_it(op: str, impl: str, dtype: torch.dtype) -> bool:
    """Whether "auto" takes what could run. adapter in C++ lost to BLAS with vectors of 16 bytes and in float64 (in which
    formulas are checked); fastgist.ops.adapter decides further, by size."""
    return (op, impl) != ("adapter", "native") or (dtype != torch.float64 and _extension.vector_bytes() >= 32)


def _runs(op: str, impl: str, device: str, dtype: torch.dtype) -> bool:
    return _obstacle(op, impl, device, dtype) is None and _worth_it(op, impl, dtype)


def _auto(op: str, device: str, dtype: torch.dtype) -> str:
    return next((name for name in _auto_order(device) if _runs(op, name, device, dtype)), "reference")


@functools.cache
def _warn_of_a_broken_extension() -> None:
    if reason := _extension.broken():
        warnings.warn(
            f"fastgist: the compiled extension is there and of no use: {reason}. Plain PyTorch serves in its place, slower "
            f"({_BUILD_IT}, or delete it)",
            RuntimeWarning,
            stacklevel=2,
        )


@functools.cache
def _resolve(op: str, impl: str, device: str, dtype: torch.dtype) -> str:
    if impl == "auto":
        chosen = _auto(op, device, dtype)
        if chosen == "reference" and any((op, name) in _SERVES for name in _auto_order(device) if name != "triton"):
            _warn_of_a_broken_extension()
        return chosen
    obstacle = _obstacle(op, impl, device, dtype)
    if obstacle:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run here: {obstacle}")
    return impl


def vector_bytes() -> int:
    """Bytes of a vector in the instruction set that the compiled extension takes here; 0 where it is not loaded."""
    return _extension.vector_bytes()


def resolve(op: str, impl: str, tensor: torch.Tensor) -> str:
    """The implementation that ``op`` takes for ``tensor``. An explicit ``impl`` that cannot run raises RuntimeError."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    return _resolve(op, impl, "cpu" if tensor.is_cpu else tensor.device.type, tensor.dtype)  # .device takes as long


def serves(op: str, impl: str, tensor: torch.Tensor) -> bool:
    """Whether ``impl`` could run ``op`` for ``tensor``."""
    return _runs(op, impl, tensor.device.type, tensor.dtype)


def available() -> dict[str, str]:
    """Each implementation and, in words, whether it can run here."""
    if _triton_missing():
        triton = f"no: {_triton_missing()}"
    elif interpreting():
        triton = "yes, interpreted on CPU tensors (TRITON_INTERPRET=1): for checking, not for speed"
    elif torch.cuda.is_available():
        triton = "yes, on CUDA tensors"
    else:
        triton = "no: installed, but there is no CUDA device"
    missing = _extension.load()
    if missing:
        cuda = native = f"no: {missing}"
    else:
        native = "yes, on CPU tensors"
        if not _extension.has_cuda():
            cuda = "no: the extension was built without CUDA kernels"
        elif not torch.cuda.is_available():
            cuda = "no: built, but there is no CUDA device"
        else:
            cuda = "yes, on CUDA tensors"
    return {"triton": triton, "cuda": cuda, "native": native, "reference": "yes, on every device (plain PyTorch)"}


def explain(op: str) -> dict[str, str]:
    """For each device kind present, what ``op`` runs on by default and why the faster ones are passed over.

    >>> explain("gelu")["cpu"]  # doctest: +SKIP
    'reference (triton: Triton kernels need a CUDA device ...; native: gelu has no native implementation)'
    """
    if op not in OPS:
        raise ValueError(f"explain: no operation named {op!r}; there are {', '.join(OPS)}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    out = {}
    for device in devices:
        chosen = _auto(op, device, torch.float32)
        passed = []
        for name in ("triton", "cuda" if device == "cuda" else "native"):
            if name == chosen:
                continue
            obstacle = _obstacle(op, name, device, torch.float32)
            reason = obstacle.split(" (", 1)[0] if obstacle else f"not measured faster; impl={name!r} takes it"
            passed.append(f"{name}: {reason}")
        out[device] = chosen + (f" ({'; '.join(passed)})" if passed else "")
    return out
