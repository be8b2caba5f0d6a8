"""Hard case 8: an input that ends where memory ends. In a process of its own, which a read too far would kill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from every_op import PAIRS, VARIANTS

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.environ.get("FASTGIST_TEST_DEVICE", "cpu") != "cpu", reason="guard pages are the CPU's"),
    pytest.mark.skipif(sys.platform != "linux", reason="written for Linux's mmap"),
]

SCRIPT = """
import ctypes, mmap, sys
import torch
from every_op import PAIRS, VARIANTS, make, variants

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE


def guarded(t):
    '''A copy of t whose last byte is the last one before an unreadable page.'''
    size = t.numel() * t.element_size()
    room = -(-size // PAGE) * PAGE
    start = libc.mmap(None, room + PAGE, 3, 0x22, -1, 0)
    assert libc.mprotect(start + room, PAGE, 0) == 0
    memory = (ctypes.c_char * size).from_address(start + room - size)
    copy = torch.frombuffer(memory, dtype=t.dtype).view(t.shape)
    copy.copy_(t.detach())
    return copy


if sys.argv[1] == "read too far":
    t = guarded(torch.zeros(8))
    ctypes.string_at(t.data_ptr(), 33)
for op, impl, variant in [(*pair, None) for pair in PAIRS] + VARIANTS:
    for dtype in (torch.float32, torch.float16):
        call = make(op, dtype) if variant is None else variants(op, dtype)[variant]
        want, want_grads = call.run(impl=impl)
        values = [guarded(t).requires_grad_(n in call.leaves) for n, t in call.tensors.items()]
        out = call(*values, impl=impl)
        incoming = guarded(torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape).to(out.dtype))
        grads = torch.autograd.grad(out, call.wanted(values), incoming)
        close = dict(rtol=2e-2, atol=2e-2) if dtype == torch.float16 else {}
        torch.testing.assert_close(out.detach(), want, **close)
        for mine, w in zip(grads, want_grads):
            torch.testing.assert_close(mine, w, **close)
        print("read no further:", op, impl, variant, dtype, flush=True)
"""


def _run(argument: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, argument]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)


def test_no_read_past_the_end():
    done = _run("the operations")
    said = done.stdout.count("read no further:")
    assert done.returncode == 0, f"after {said} runs, signal or exit code {done.returncode}:\n{done.stderr[-2000:]}"
    assert said == 2 * (len(PAIRS) + len(VARIANTS))


def test_the_guard_page_kills():
    assert _run("read too far").returncode == -11, "a read past the end must not go unnoticed, or nothing was shown"
