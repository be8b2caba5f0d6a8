"""The CUDA sources of the extension, compiled by nvcc for each architecture without a GPU: no spills, stores of 16 bytes,
and registers and static shared memory held against csrc/cuda/resources.csv. ``make aot UPDATE=1`` rewrites that table: commit
it with the change behind it.

FASTGIST_CUDA=1, with which setup.py fails where the CUDA kernels cannot be built, makes these tests fail without nvcc.
"""

from __future__ import annotations

import csv
import fcntl
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
DEVICE_CODE = sorted(p for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in {".cu", ".cuh", ".h"})
RESOURCES = ROOT / "csrc" / "cuda" / "resources.csv"
FIELDS = ("nvcc", "kernel", "arch", "registers", "stack", "spill_stores", "spill_loads", "shared")
ARCHS = ("80", "90a", "100a")
#: Registers may grow this much before the table must be looked at and rewritten.
SLACK = 1.10
NVCC = shutil.which("nvcc")
DEMANDED = os.environ.get("FASTGIST_CUDA", "0") not in ("", "0")
MISSING = "nvcc is not on PATH: the CUDA sources are compiled by nobody here (FASTGIST_CUDA=1 makes this a failure)"

needs_nvcc = pytest.mark.skipif(NVCC is None and not DEMANDED, reason=MISSING)


def nvcc(*arguments: str | Path) -> str:
    assert NVCC is not None, "FASTGIST_CUDA is set and nvcc is not on PATH"
    done = subprocess.run([NVCC, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@functools.cache
def version() -> str:
    return re.search(r"release (\d+\.\d+)", nvcc("--version"))[1]


KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill "
    r"stores, (?P<spill_loads>\d+) bytes spill loads\s.*?Used (?P<registers>\d+) registers"
    r"(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
#: The template arguments of csrc/cuda's kernels: storage type, then numbers and flags.
SYMBOL = re.compile(r"(?<=\d)(?P<name>_[a-z]\w*?_kernel)I(?P<type>\d*[a-z_]\w*?)(?P<rest>(?:L[bi]\d+E)*)E")
TYPES = {"f": "float", "d": "double", "13__nv_bfloat16": "bfloat16", "6__half": "half"}
LOSSES = ("kl", "gist T=3", "gist")
FLAGS = ("strided", "vectorised")


def kernel_name(symbol: str) -> str:
    """Kernel, dtype, loss where it is one of several, layout, warps a row: ``_again_rows_kernel[half gist strided 8]``."""
    found = SYMBOL.search(symbol)
    assert found, f"a kernel whose name this test cannot read: {symbol}"
    rest = [(kind, int(value)) for kind, value in re.findall(r"L([bi])(\d+)E", found["rest"])]
    words = [FLAGS[value] if kind == "b" else str(value) for kind, value in rest]
    if "_rows_" in found["name"]:
        words[0] = LOSSES[rest[0][1]]
    return f"{found['name']}[{' '.join([TYPES[found['type']], *words])}]"


def own_text(source: Path) -> str:
    """``source`` and the .cuh files that it includes, directly or not."""
    text, seen, left = "", set(), [source]
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        here = path.read_text()
        text += here
        left += [source.parent / name for name in re.findall(r'#include "(\w+\.cuh)"', here)]
    return text


def compile_for(source: Path, arch: str, folder: Path) -> list[dict[str, str]]:
    """What ptxas says of each kernel in ``source``."""
    out = folder / f"{source.stem}.sm_{arch}.cubin"
    said = nvcc("-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-Xptxas=-v", "-o", out, source)
    assert out.stat().st_size > 0
    warnings = [line for line in said.splitlines() if "warning" in line.lower()]
    assert not warnings, warnings
    return [
        {"nvcc": version(), "kernel": kernel_name(k["symbol"]), "arch": arch}
        | {field: k[field] or "0" for field in FIELDS if field in k.groupdict()}
        for k in KERNEL.finditer(said)
    ]


def wide_stores(cubin: Path) -> dict[str, int]:
    """Stores of 16 bytes to global memory in the SASS of each kernel."""
    from triton.backends.nvidia import __file__ as nvidia  # whose wheel brings a disassembler

    tool = Path(nvidia).parent / "bin" / "nvdisasm"
    sass = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True, timeout=100).stdout
    kernels = re.split(r"^\.text\.(\w+):$", sass, flags=re.MULTILINE)[1:]
    return {
        kernel_name(symbol): len(re.findall(r"\bSTG\.(?:[A-Z0-9]+\.)*128\b", text))
        for symbol, text in zip(kernels[::2], kernels[1::2], strict=True)
    }


def recorded() -> list[dict[str, str]]:
    if not RESOURCES.exists():
        return []
    with RESOURCES.open(newline="") as file:
        return list(csv.DictReader(file))


def record(rows: list[dict[str, str]]) -> None:
    """Put ``rows`` in the place of their like. Several processes may do so at once."""
    lock = os.open(RESOURCES.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        key = lambda row: (row["nvcc"], row["kernel"], ARCHS.index(row["arch"]))  # noqa: E731
        table = {key(row): row for row in recorded()} | {key(row): row for row in rows}
        with RESOURCES.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table[k] for k in sorted(table))
    finally:
        os.close(lock)


def test_there_are_sources():
    assert SOURCES


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_compiles_without_spills(source, arch, tmp_path):
    rows = compile_for(source, arch, tmp_path)
    kernels = {row["kernel"].split("[")[0] for row in rows}
    assert kernels == set(re.findall(r"\b(_\w+_kernel)\(", own_text(source))), "a kernel was not compiled"
    for row in rows:
        spilled = row["stack"], row["spill_stores"], row["spill_loads"]
        assert spilled == ("0", "0", "0"), f"{row['kernel']} spills or has a stack on sm_{arch}: {row}"
    for kernel, stores in wide_stores(tmp_path / f"{source.stem}.sm_{arch}.cubin").items():
        if re.match(r"_kept_rows|_again_rows.* vectorised|_bidirectional_kl_bwd.* vectorised", kernel):
            assert stores >= 2, f"{kernel} on sm_{arch} stores no chunk of either gradient in one instruction"
    if os.environ.get("UPDATE", "0") not in ("", "0"):
        record(rows)
    before = {(row["nvcc"], row["kernel"], row["arch"]): row for row in recorded()}
    for row in rows:
        old = before.get((row["nvcc"], row["kernel"], row["arch"]))
        if old is None:
            # Another nvcc than the recorded ones has no numbers to hold; a new kernel must bring its own.
            assert row["nvcc"] not in {r["nvcc"] for r in before.values()}, (
                f"{row['kernel']} on sm_{arch} is not in {RESOURCES.name}: run 'make aot UPDATE=1' and commit the table"
            )
        else:
            for field, most in (("registers", int(old["registers"]) * SLACK), ("shared", int(old["shared"]))):
                assert int(row[field]) <= most, (
                    f"{row['kernel']} on sm_{arch}: {field} {row[field]}, {old[field]} recorded; "
                    "if this is meant, run 'make aot UPDATE=1' and commit the table"
                )


def run_check(source: str, folder: Path, *flags: str) -> str:
    program = folder / "check"
    nvcc("-std=c++17", *flags, "-o", program, ROOT / "csrc" / "tests" / source)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_nvcc
def test_online_sums_on_the_host(tmp_path):
    """The arithmetic of the CUDA kernels' sums needs no GPU: nvcc compiles it for the host too."""
    assert "0 failures" in run_check("check_cuda_sums.cu", tmp_path, "-arch=sm_90a", "-O1")


@needs_nvcc
def test_ways_chosen_for_rows(tmp_path):
    """Rows of every length, dtype and layout on every architecture: what is asked of a device is what it has."""
    assert "0 failures" in run_check("check_plan.cpp", tmp_path, "-O1")


@needs_nvcc
def test_row_kernels_on_an_emulated_device(tmp_path):
    """The kernels' own code, each CUDA thread a fiber: indices, barriers, copies, clusters and results, without a GPU."""
    # Plain arithmetic, as the kernels' is where it matters; and fibers leap between stacks, which fortified longjmp forbids.
    flags = "-Xcompiler=-ffp-contract=off,-U_FORTIFY_SOURCE,-Wno-unknown-pragmas"
    assert re.search(r"[1-9]\d{5,} checks, 0 failures", run_check("check_rows.cpp", tmp_path, "-O1", flags))


@pytest.mark.parametrize("path", DEVICE_CODE, ids=lambda p: p.name)
def test_device_code_includes_cuda_headers_only(path):
    allowed = re.compile(
        r"cuda\w*\.h|c?(algorithm|atomic|mutex|std\w+|limits|type_traits|cmath)|\.\./(bidirectional_kl|gist_loss)\.h|\w+\.(cuh|h)"
    )
    for include in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE):
        assert allowed.fullmatch(include), f"{path.name} includes {include}"
