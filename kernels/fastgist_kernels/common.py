"""What kernels of more than one operation use unchanged: the dot, launch tables, and small host helpers."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRET", "LOG2E", "cdiv", "device_arch", "dot", "launch_config", "next_power_of_2"]

#: Whether this process interprets kernels on the CPU (TRITON_INTERPRET=1 before triton is imported).
INTERPRET: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. The interpreter computes half-precision dots wrongly (bf16) or narrowly: there the
    operands are widened first, which is exact."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


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
