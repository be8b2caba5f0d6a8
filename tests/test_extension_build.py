"""The compiled extension as built: under sanitizers, in each instruction set, beside an unreadable page, as a library."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
from test_extension import COMPILER, DEVICE, ROOT, python

from fastgist import _extension

pytestmark = [] if os.environ.get("TRITON_INTERPRET", "0") == "1" else [pytest.mark.kernel]

GUARD = """
import ctypes, mmap, os, signal, torch
from fastgist import _extension
assert _extension.load() is None
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE

def guarded(x):
    # A copy of x whose last byte is the last before a page that cannot be touched.
    n = x.numel() * x.element_size()
    pages = -(-n // PAGE)
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = libc.mmap(None, (pages + 1) * PAGE, access, kind, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value)
    assert libc.mprotect(base + pages * PAGE, PAGE, 0) == 0  # PROT_NONE
    raw = (ctypes.c_char * n).from_address(base + pages * PAGE - n)
    out = torch.frombuffer(raw, dtype=x.dtype).view(x.shape)
    out.copy_(x)
    return out

native = torch.ops.fastgist_native
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for classes in (1, 7, 16, 17, 1000, 1025):
        z, o = (guarded(torch.randn(2, classes).to(dtype)) for _ in range(2))
        mask, row_grad = guarded(torch.ones(2, dtype=torch.bool)), guarded(torch.ones(2, dtype=acc))
        row_loss, stats = guarded(torch.zeros(2, dtype=acc)), guarded(torch.zeros(6, 2, dtype=acc))
        grad_z, grad_o = guarded(torch.zeros_like(z)), guarded(torch.zeros_like(z))
        native.bidirectional_kl_fwd(z, o, mask, 3.0, row_loss, stats)
        native.bidirectional_kl_bwd(z, o, mask, stats, row_grad, 3.0, grad_z, grad_o)
        assert row_loss.isfinite().all()
        loss, divisor, options = guarded(torch.zeros((), dtype=acc)), guarded(torch.ones((), dtype=acc)), (1.0,) * 4
        target, wide = guarded(torch.zeros(2, dtype=torch.int64)), guarded(torch.zeros(9, 2, dtype=acc))
        native.bidirectional_kl_fwd_bwd(z, o, mask, divisor, 3.0, 1.0, row_loss, loss, grad_z, grad_o)
        for third in (target, guarded(z.softmax(-1))):
            native.gist_loss_fwd(z, o, third, *options, 3.0, 0.1, -100, row_loss, wide)
            native.gist_loss_bwd(z, o, third, wide, row_grad, *options, 3.0, 0.1, -100, grad_z, grad_o)
            native.gist_loss_fwd_bwd(z, o, third, divisor, *options, 3.0, 0.1, -100, 1.0, row_loss, loss, grad_z, grad_o)
            assert row_loss.isfinite().all() and loss.isfinite()
child = os.fork()
if child == 0:  # the guard itself must bite
    ctypes.string_at(z.data_ptr() + z.numel() * z.element_size(), 1)
    os._exit(0)
status = os.waitpid(child, 0)[1]
assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV, status
print("untouched")
"""


@pytest.mark.skipif(DEVICE != "cpu" or sys.platform != "linux", reason="mprotect on CPU memory")
def test_reads_nothing_past_an_unreadable_page():
    done = python("-c", GUARD)
    assert done.returncode == 0, done.stderr
    assert "untouched" in done.stdout


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU code")
def test_under_sanitizers_in_every_instruction_set(tmp_path):
    """csrc/cpu alone, against the formula in long double, with AddressSanitizer and UBSan; and exp's accuracy."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    checks = (p for p in (ROOT / "csrc/tests").glob("check_*.cpp") if '"../cuda/' not in p.read_text())
    sources = [*checks, *(ROOT / "csrc/cpu").glob("*.cpp")]
    flags = [
        "-std=c++20",
        "-O1",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",  # as setup.py builds: the sources say themselves where to fuse
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / "check_cpu"
    built = subprocess.run(
        [COMPILER, *flags, *sanitizers, *map(str, sources), "-o", str(program)],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    for isa in ("portable", "avx2", "avx512"):
        done = subprocess.run(
            [str(program)], env={"FASTGIST_CPU_ISA": isa}, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, f"{isa}: {done.stdout}{done.stderr}"
        assert ": 0 failures" in done.stdout
        measured = re.findall(r"exp_scaled ([\d.]+) \(([\d.]+) but", done.stdout)
        assert len(measured) == 4, "at each temperature: " + done.stdout


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU code")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lesser_instruction_sets_as_built(isa):
    """The extension's own code, optimised, for machines that have less than this one."""
    script = (
        "import test_extension as t, torch\n"
        "for dtype in t.DTYPES:\n"
        "    for classes in (1, 127, 4097): t.check(*t.logits(3, classes, dtype))\n"
        "info = t._extension.build_info()\n"
        "print(info.get('cpu_isa'))"
    )
    done = python("-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n{script}", FASTGIST_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("portable", isa, "None")


# -- the loader ------------------------------------------------------------------------------------------------------


def test_build_info():
    info = _extension.build_info()
    assert info is not None
    assert info["cuda_kernels"] is _extension.has_cuda()
    if "torch" in info:  # built for this Python
        assert {"torch", "torch_target", "compiler", "cuda", "cuda_archs", "cpu_isas", "cpu_isa", "openmp"} <= set(info)
        assert info["cpu_isa"] in info["cpu_isas"]
        assert bool(info["cuda"]) == info["cuda_kernels"]


def test_loading_again_is_free_and_silent(caplog):
    with caplog.at_level(logging.INFO, logger="fastgist"):
        assert _extension.load() is None
        assert _extension.load() is None
    assert not caplog.records


def test_library_holds_no_python_symbol():
    """One file for every Python, as its name (abi3) says."""
    (library,) = (ROOT / "fastgist").glob("_C*.so")
    assert library.name == "_C.abi3.so"
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))]
    assert "torch_parallel_for" in symbols
    assert not [s for s in symbols if s.startswith(("cuda", "__cuda"))], "the CUDA runtime must be linked in statically"
