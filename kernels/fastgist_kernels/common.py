"""What kernels of more than one operation use unchanged: the dot, launch tables, and small host helpers."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["INTERPRET", "LOG2E", "cdiv", "device_arch", "dot", "launch", "launch_config", "next_power_of_2"]

#: Whether this process interprets kernels on the CPU (TRITON_INTERPRET=1 before triton is imported).
INTERPRET: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own is a function of constexprs too: on the host it takes ten times as long.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n >= 1 or more."""
    return 1 << (n - 1).bit_length()


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. The interpreter computes half-precision dots wrongly (bf16) or narrowly: there the
    operands are widened first, which is exact."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@functools.cache
def device_arch(device: torch.device) -> str:
    """Key of the launch tables: "sm_90", or "interpret" on the CPU."""
    if device.type != "cuda":
        return "interpret"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def _tables() -> dict:
    """launch_tables.json: {op: {arch: {shape class: {meta-parameter: value}}}}, written by the tuning script from
    measurements on a card. Absent entries take the default that stands beside the kernel."""
    return json.loads((Path(__file__).parent / "launch_tables.json").read_text())


@functools.cache
def launch_config(kernel: str, arch: str, shape_class: str) -> dict[str, int]:
    """Measured launch parameters of ``kernel`` on ``arch`` for ``shape_class``; {} where nothing was measured."""
    return _tables().get(kernel, {}).get(arch, {}).get(shape_class, {})


def _smaller(config: Mapping[str, int]) -> Mapping[str, int] | None:
    """The next thing to try on a device without room for ``config``: fewer stages, then half of the largest side."""
    if config.get("num_stages", 1) > 2:
        return {**config, "num_stages": config["num_stages"] - 1}
    sides = [name for name, value in config.items() if name.startswith("BLOCK_") and value > 16]
    if not sides:
        return None
    largest = max(sides, key=config.__getitem__)
    return {**config, largest: config[largest] // 2}


@dataclass(frozen=True)
class _Ready:
    """The tile that fits, and of a kernel that is compiled and loaded (not of an interpreted one) its launcher and the
    constexprs that end its arguments."""

    config: Mapping[str, int]
    run: Callable[..., None] | None = None
    function: int = 0
    metadata: tuple = ()
    tail: tuple = ()


#: What a launch is decided by -> the kernel it takes. Filled by the first launch of its kind.
_READY: dict[tuple, _Ready] = {}
#: Launches of which no tile fits the device: (bytes asked for at least, bytes there are, of what).
_REFUSED: dict[tuple, tuple] = {}


def _specialisation(args: tuple) -> list:
    """What Triton distinguishes arguments by: dtypes and 16-byte alignment of pointers; of integers whether they are 1, a
    multiple of 16, and how wide; of tensor descriptors dtype and tile; the kind of anything else."""
    found: list = []
    for a in args:
        kind = type(a)
        if kind is int:  # 0: the constant 1; else the sum of two bits and 1
            found.append(0 if a == 1 else 1 + (a & 15 == 0) + 2 * (not -0x80000000 <= a < 0x80000000))
        elif isinstance(a, torch.Tensor):
            found.append(a.dtype)
            found.append(a.data_ptr() & 15 == 0)
        elif isinstance(a, TensorDescriptor):
            found.append((a.base.dtype, *a.block_shape))
        else:
            found.append(kind)
    return found


def launch(
    kernel, grid: tuple[int, ...] | Callable[[Mapping], tuple], config: Mapping[str, int], *args, **constexprs
) -> None:
    """``kernel[grid](*args)`` on the device of the first tensor; ``grid`` may be a function of the configuration taken.

    The first launch of its kind goes through Triton's JIT, which compiles and loads; later ones go straight to the loaded
    kernel. (On the host of an H200 an adapter took 352 us a call through the JIT, eager PyTorch 69.)

    Where that device has too little shared memory for the tile, a smaller one is taken and remembered; where it has none for
    the smallest, Triton's OutOfResources is raised, at once the next time ("auto" then takes plain PyTorch). Inside a CUDA
    graph capture a kernel cannot be compiled or loaded: its first use there raises and names the way out.
    """
    tensor = next(a for a in args if isinstance(a, torch.Tensor))
    device = tensor.device
    key = (id(kernel), device.index, *config.items(), *constexprs.items(), *_specialisation(args))
    ready = _READY.get(key)
    if key in _REFUSED:
        raise OutOfResources(*_REFUSED[key])
    if ready is None or ready.run is None or _watched():
        first = config if ready is None else ready.config
        _READY[key] = _through_jit(key, kernel, grid, first, tensor, args, constexprs)
        return
    size = (*(grid(ready.config) if callable(grid) else grid), 1, 1)
    if torch.cuda.current_device() == device.index:
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        ready.run(*size[:3], stream, ready.function, ready.metadata, None, None, None, *args, *ready.tail)
    else:
        with torch.cuda.device(device):
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            ready.run(*size[:3], stream, ready.function, ready.metadata, None, None, None, *args, *ready.tail)


def _watched() -> bool:
    """Whether somebody has asked Triton to be told of launches, such as a profiler. A hook is a chain of functions, empty
    as long as nobody has."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _through_jit(
    key: tuple, kernel, grid, config: Mapping[str, int], tensor: torch.Tensor, args: tuple, constexprs: dict
) -> _Ready:
    """Launch through Triton's JIT, with smaller tiles while the device has no room; what it compiled is the result."""
    while True:
        try:
            with torch.cuda.device_of(tensor):
                compiled = kernel[grid(config) if callable(grid) else grid](
                    *args, **constexprs, enable_fp_fusion=True, **config
                )
            if compiled is None:  # interpreted
                return _Ready(config)
            given = constexprs | dict(config)
            tail = tuple(given[name] for name in kernel.arg_names[len(args) :])
            return _Ready(config, compiled.run, compiled.function, compiled.packed_metadata, tail)
        except OutOfResources as error:
            smaller = _smaller(config)
            if smaller is None:
                _REFUSED[key] = error.required, error.limit, error.name
                raise
            config = smaller
        except Exception as error:
            if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{kernel.fn.__name__}: the first use of a kernel, which compiles and loads it, cannot be inside a CUDA "
                    "graph capture. Run the same step once before capturing, or `fastgist warmup` for the shapes in use"
                ) from error
            raise
