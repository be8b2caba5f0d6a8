"""What cp_linear, cp_update and adapter share on the way in: shapes of the factors, numbers, dropout, autocast."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgist import backends
from fastgist.ops import _common
from fastgist.reference.cp_linear import Dropout

__all__ = [
    "cast_for_autocast",
    "check_dropout",
    "check_low_rank",
    "check_matrices",
    "check_number",
    "check_writable",
    "dropout_for",
    "empty_unless",
]


def check_matrices(op: str, **matrices: Tensor) -> None:
    for name, t in matrices.items():
        if t.dim() != 2:
            raise ValueError(f"{op}: {name} must be 2-D, got shape {tuple(t.shape)}")


def check_low_rank(op: str, u: Tensor, v: Tensor, gain: Tensor | None, width: int, side: str, units: str) -> None:
    """Rank, folds and gain of an update of ``width`` outputs: of ``side``, for an error, and so many ``units``. u, v: 2-D."""
    rank, rows = u.shape[1], v.shape[0]
    if rank == 0:
        raise ValueError(f"{op}: expected a rank of at least 1, got u of shape {tuple(u.shape)}")
    if v.shape[1] != rank:
        raise ValueError(f"{op}: expected v.shape[1] == {rank} (the rank of u), got {v.shape[1]}")
    if rows == 0 or width == 0 or width % rows:
        raise ValueError(
            f"{op}: expected {side} to be a multiple of v.shape[0] (G folds of width n share v), got {width} {units} and "
            f"{rows} rows of v"
        )
    folds = width // rows
    if gain is not None and tuple(gain.shape) not in ((rank,), (folds, rank)):
        raise ValueError(
            f"{op}: expected gain.shape == ({rank},) or ({folds}, {rank}) (rank {rank}, {width} / {rows} folds), got "
            f"{tuple(gain.shape)}"
        )


def check_writable(op: str, name: str, t: Tensor) -> None:
    """That each dimension of ``t``, which is to be written to, steps over all that narrower ones reach: then no two elements
    share memory. (Strides that interleave without meeting are refused too.)"""
    if t.numel() == 0:
        return
    shape, strides = t.shape, t.stride()
    for i in range(t.dim()):
        reach = sum((shape[j] - 1) * strides[j] for j in range(t.dim()) if j != i and strides[j] <= strides[i])
        if shape[i] > 1 and strides[i] <= reach:
            raise ValueError(
                f"{op}: inplace=True, but elements of {name} share memory (shape {tuple(shape)}, strides {tuple(strides)}): "
                "it is expanded, or its rows overlap"
            )


def check_number(op: str, name: str, value: object) -> float:
    """A finite Python number as float."""
    if isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Python number (reading a tensor would synchronise), got a Tensor")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # torch.compile, which may make the number symbolic, cannot trace isfinite
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return float(value)


def check_dropout(
    op: str, x: Tensor, dropout_p: object, training: bool, seed: Tensor | None
) -> tuple[float, Tensor | None]:
    """p and the seed, both zeroed where dropout is not active; a seed is drawn, on the device, where none is given."""
    dropout_p = check_number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: expected 0 <= dropout_p < 1, got {dropout_p}")
    if seed is not None:
        if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed must be an int64 Tensor, got {getattr(seed, 'dtype', type(seed).__name__)}")
        if seed.numel() != 1:
            raise ValueError(f"{op}: seed must hold one number, got shape {tuple(seed.shape)}")
        _common.check_same_device(op, x=x, seed=seed)
    if not training or dropout_p == 0.0:
        return 0.0, None
    if seed is None:  # by the default generator, which checkpointing and graph capture know how to replay
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    return dropout_p, seed


def _dropped_in_place(h: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """The dropout of :mod:`fastgist.reference.cp_linear` in C++, bit for bit, over h itself where that is contiguous."""
    if seed is None or h.numel() == 0:
        return h
    out = h if h.is_contiguous() else torch.empty_like(h, memory_format=torch.contiguous_format)
    torch.ops.fastgist_native.dropout(h, seed, dropout_p, out)
    return out


def dropout_for(impl: str, seed: Tensor | None) -> Dropout | None:
    """What drops out x U where plain PyTorch multiplies: C++ on CPUs where the extension is there. None: the reference's
    own, also where ``impl``, as the caller gave it, is "reference"."""
    native = impl == "auto" and seed is not None and seed.device.type == "cpu" and backends.vector_bytes() > 0
    return _dropped_in_place if native else None


def cast_for_autocast(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """All tensors in autocast's dtype where it is on, as nn.Linear's are (float64 stays). The casts are differentiable, so
    that a float32 parameter gets a float32 gradient."""
    dtype = _common.autocast_dtype(x.device.type)
    tensors = [x, *others]
    if dtype is None:
        return tensors
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def empty_unless(tensor: Tensor | None, like: Tensor) -> Tensor:
    """What a raw op of fixed arity returns for a result: itself, or an empty tensor where it was not computed."""
    return like.new_empty(0) if tensor is None else tensor
