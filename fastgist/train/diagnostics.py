"""What ``fastgist env`` reports and what ``fastgist warmup`` does. PyTorch is all that is needed here."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgist import _extension, backends
from fastgist import functional as F
from fastgist.train.config import UserError
from fastgist.train.measure import commit, versions

__all__ = ["environment", "warmup"]


def _driver() -> str | None:
    """The NVIDIA driver's version, if its tool is there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (run.stdout.splitlines() or [""])[0].strip() or None


#: extra -> the packages that it brings, in the order of pyproject.toml; "" for one that no extra of a user's names.
EXTRAS = {
    "triton": ("triton",),
    "models": ("numpy", "safetensors", "timm", "torchvision", "transformers"),
    "train": (
        "accelerate", "datasets", "huggingface_hub", "matplotlib", "pyyaml", "rich", "scikit-learn", "scipy",
        "torchmetrics", "tqdm", "typer",
    ),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "tensorboard": ("tensorboard",),
    "tensorly": ("tensorly",),
    "quantized": ("bitsandbytes", "torchao"),
    "": ("peft",),
}  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, devices, the compiled extension, and what each operation runs on here: JSON values. ``missing``: packages that
    are not installed, and how to get them."""
    found: dict[str, Any] = {"versions": versions(package for packages in EXTRAS.values() for package in packages)}
    found["missing"] = {
        package: f"pip install 'fastgist[{extra}]'" if extra else f"pip install {package}"
        for extra, packages in EXTRAS.items()
        for package in packages
        if package not in found["versions"]
    }
    found["versions"] |= {"commit": commit() or "not a git checkout", "platform": platform.platform()}
    found["versions"] |= {
        "CUDA of PyTorch": torch.version.cuda or "none",
        "ROCm of PyTorch": torch.version.hip or "none",
    }
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    found["devices"] = [{"name": "cpu", "about": f"{platform.machine()}, {os.cpu_count()} cores, {threads}"}]
    if torch.cuda.is_available():
        found["versions"]["driver"] = _driver() or "unknown"
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            words = f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB"
            found["devices"].append({"name": f"cuda:{index}", "about": words})
    if torch.backends.mps.is_available():
        found["devices"].append({"name": "mps", "about": "Apple GPU, served by the PyTorch reference"})
    missing = _extension.load()
    found["extension"] = {"state": f"not loaded: {missing}" if missing else "loaded", **(_extension.build_info() or {})}
    found["implementations"] = backends.available()
    found["operations"] = {op: backends.explain(op) for op in backends.OPS}
    return found


def warmup(
    device: str, dtype: str, batch: int, tokens: int, dim: int, classes: int, rank: int, bottleneck_dim: int
) -> None:
    """Run every operation forward and backward once for each dtype on ``device``; its kernels are compiled by that.

    Kernels are specialised on dtypes, widths and divisibility by 16, so give the widths that training will have.
    """
    from tqdm import tqdm

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cuda, cpu or auto, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device")
    dtypes = [_dtype(name.strip()) for name in dtype.split(",") if name.strip()]
    if not dtypes:
        raise UserError(f"--dtype takes float32, bfloat16 and float16, by commas, got {dtype!r}")
    probes = [torch.empty(0, dtype=d, device=device) for d in dtypes]
    chosen = {(op, probe.dtype): backends.resolve(op, "auto", probe) for op in backends.OPS for probe in probes}
    if "triton" not in chosen.values():
        print(f"nothing to compile for {device}: {_implementations(chosen)}")
        return
    shapes = (batch, tokens, dim, classes, rank, bottleneck_dim)
    cases = [(op, d, run) for d in dtypes for op, run in _cases(device, d, *shapes)]
    lines = []
    for op, d, run in tqdm(cases, desc="compiling", unit="op"):
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        name = str(d).removeprefix("torch.")
        lines.append(f"{op:18} {name:9} {chosen[op, d]:9} first {seconds[0]:6.2f} s, then {seconds[1] * 1e3:8.2f} ms")
    print("\n".join(lines))


def _implementations(chosen: dict[tuple[str, torch.dtype], str]) -> str:
    by_name: dict[str, list[str]] = {}
    for (op, _), name in chosen.items():
        if op not in by_name.setdefault(name, []):
            by_name[name].append(op)
    return "; ".join(f"{', '.join(ops)} run{'s' if len(ops) == 1 else ''} on {name}" for name, ops in by_name.items())


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"--dtype takes float32, bfloat16 and float16, got {name!r}")
    return dtype


def _cases(
    device: str, dtype: torch.dtype, batch: int, tokens: int, dim: int, classes: int, rank: int, bottleneck_dim: int
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each operation as training calls it: everything trainable, the base weight frozen."""

    def make(*shape: int, trained: bool = True) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).mul_(0.02).requires_grad_(trained)

    target = torch.randint(classes, (batch,), device=device)

    def runner(op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Callable[[], None]:
        def run() -> None:
            out = op(*args, **kwargs)
            out.backward(torch.ones_like(out))

        return run

    logits, other = make(batch, classes), make(batch, classes)
    yield "bidirectional_kl", runner(F.bidirectional_kl, logits, other, temperature=3.0)
    yield "gist_loss", runner(F.gist_loss, logits, other, target)
    head, bias = make(classes, dim), make(classes)
    yield "gist_linear_loss", runner(F.gist_linear_loss, make(batch, dim), make(batch, dim), head, bias, target)
    teacher = other.detach().float().log_softmax(-1).topk(min(64, classes))
    yield "topk_kl", runner(F.topk_kl, logits, *teacher)
    x = make(batch, tokens, dim)
    qkv, qkv_bias = make(3 * dim, dim, trained=False), make(3 * dim, trained=False)
    u, v, gain = make(dim, rank), make(dim, rank), make(3, rank)
    yield "cp_linear", runner(F.cp_linear, x, qkv, qkv_bias, u, v, gain, dropout_p=0.1, training=True)
    y = make(batch, tokens, 3 * dim, trained=False)
    yield "cp_update", runner(F.cp_update, y, x, u, v, gain, dropout_p=0.1, training=True)
    down, up = make(bottleneck_dim, dim), make(dim, bottleneck_dim)
    yield "adapter", runner(F.adapter, x, down, make(bottleneck_dim), up, make(dim))
    yield "gelu", runner(F.gelu, make(batch, tokens, 4 * dim))
