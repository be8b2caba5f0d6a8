"""What a run measures about itself: memory, trainable share, and the versions that stand beside every number."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["StepMemory", "commit", "memory_method", "trainable_share", "versions"]


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """(trained numbers, all numbers); shared parameters count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def memory_method(device: torch.device) -> str:
    """How :class:`StepMemory` measures on ``device``, for the reader of the number."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated over one training step"
    if device.type == "cpu":
        return (
            "CPU: parameters, buffers and optimiser state, plus the largest sum of live allocations of PyTorch's CPU "
            "allocator during one training step (torch.profiler memory events)"
        )
    return "not measured on this device"


class StepMemory:
    """The peak memory of one training step, ``peak_bytes`` (None where it cannot be measured)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes: int | None = None

    @contextlib.contextmanager
    def measure(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Around one step (forward, backward, update) that starts with gradients set to None."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "cpu":
            resident = {id(t): t for t in [*model.parameters(), *model.buffers()]}
            states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
            resident.update({id(t): t for t in states})
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own remarks are not the user's
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
                yield
            self.peak_bytes = sum(t.numel() * t.element_size() for t in resident.values()) + _peak(prof)
        else:
            yield


def _peak(prof: torch.profiler.profile) -> int:
    """The largest running sum of the allocator's events: bytes live above what was live when profiling began."""
    live = peak = 0
    results: Any = prof.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


#: What a result may depend on.
PACKAGES = (
    "triton", "timm", "accelerate", "transformers", "numpy", "scikit-learn", "bitsandbytes", "torchao", "peft",
)  # fmt: skip


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of fastgist, Python, torch and ``packages``; absent ones are left out."""
    import fastgist

    found = {"fastgist": fastgist.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str | None:
    """The git commit of this source tree, if it is one ("-dirty" with uncommitted changes)."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None
