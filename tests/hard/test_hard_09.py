"""Hard case 9: threads, processes on a cold kernel cache, CUDA after fork, first use inside a graph capture."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, INTERPRETING
from every_op import PAIRS, make

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def _environment(**settings: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | settings


@pytest.mark.kernel
@pytest.mark.skipif(INTERPRETING, reason="Triton's interpreter patches the language for one thread at a time")
@pytest.mark.parametrize(("op", "by"), PAIRS)
def test_two_threads_agree_with_one(op, by):
    call = make(op)
    want, want_grads = call.run(impl=by)
    results: list = []
    start = threading.Barrier(2)

    def work() -> None:
        try:
            start.wait()
            for _ in range(3):
                results.append(call.run(impl=by))
        except Exception as e:
            results.append(e)

    threads = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(results) == 6
    for result in results:
        if isinstance(result, Exception):
            raise result
        assert torch.equal(result[0], want)
        assert all(torch.equal(mine, w) for mine, w in zip(result[1], want_grads, strict=True))


@needs_triton
@pytest.mark.skipif(INTERPRETING, reason="interpreted kernels are not compiled")
def test_eight_processes_compile_into_one_cold_cache(tmp_path, monkeypatch):
    """Needs no GPU: the compiler alone, for sm_90."""
    from fastgist_kernels import aot

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    task = False, next(i for i, s in enumerate(aot.all_specs()) if "_bidirectional_kl_kernel[bwd" in s.name), 90
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"fastgist_kernels.{module}" for module in aot.MODULES])
    with context.Pool(8) as pool:
        rows = pool.map(aot._row, [task] * 8, chunksize=1)
    assert all(row == rows[0] for row in rows)
    assert rows[0]["registers"] > 0
    assert list(tmp_path.rglob("*.cubin"))


@pytest.mark.gpu
@needs_triton
def test_eight_processes_run_from_one_cold_cache(tmp_path):
    script = (
        "import torch\nfrom every_op import make\n"
        "for op in ('bidirectional_kl', 'gist_loss', 'cp_linear', 'adapter'):\n"
        "    out, grads = make(op, device='cuda').run(impl='triton')\n"
        "    print(op, *(t.double().sum().item().hex() for t in (out, *grads)))\n"
    )
    env = _environment(TRITON_CACHE_DIR=str(tmp_path), FASTGIST_TEST_DEVICE="cuda")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    done = [p.communicate(timeout=500) for p in started]
    assert all(p.returncode == 0 for p in started), done[0][1][-2000:]
    assert len({out for out, _ in done}) == 1


@pytest.mark.gpu
def test_cuda_after_fork_is_a_clear_error():
    script = (
        "import os, sys, torch\nfrom every_op import make\n"
        "make('bidirectional_kl', device='cuda').run()\n"
        "if os.fork() == 0:\n"
        "    try:\n        make('bidirectional_kl', device='cuda').run()\n"
        "    except RuntimeError as e:\n        print(e)\n"
        "    sys.stdout.flush()\n    os._exit(0)\n"
        "os.wait()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=_environment(FASTGIST_TEST_DEVICE="cuda"),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "forked subprocess" in done.stdout, done.stderr[-2000:]


class _OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a CUDA device: enough for the launcher's decisions."""

    @property
    def is_cuda(self):
        return True


class _Kernel:
    """Stands in for a jit function: ``outcomes[i]`` is raised by launch i, or None for a launch that works."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes, self.configs = list(outcomes), []
        self.fn = types.SimpleNamespace(__name__="_some_kernel")

    def __getitem__(self, grid):
        def run(*args, **options):
            self.configs.append((grid, options))
            outcome = self.outcomes.pop(0)
            if outcome is not None:
                raise outcome

        return run


@needs_triton
def test_first_use_inside_a_capture_names_the_way_out(monkeypatch):
    from fastgist_kernels import common

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kernel = _Kernel(RuntimeError("operation not permitted when stream is capturing"))
    tensor = torch.zeros(3).as_subclass(_OnCuda)
    with pytest.raises(RuntimeError, match=r"_some_kernel: the first use of a kernel.*`fastgist warmup`"):
        common.launch(kernel, lambda c: (1,), {"BLOCK_M": 16}, tensor)


@pytest.mark.gpu
@needs_triton
def test_first_use_inside_a_capture_on_a_gpu(tmp_path):
    script = (
        "import torch\nfrom every_op import make\n"
        "call = make('gist_loss', device='cuda')\nvalues = call.values(grad=False)\n"
        "torch.cuda.synchronize()\ngraph = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph):\n    call(*values, impl='triton')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=_environment(TRITON_CACHE_DIR=str(tmp_path), FASTGIST_TEST_DEVICE="cuda"),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    # Where a driver allows loading during capture it just works; where it does not, the message says what to do.
    assert done.returncode == 0 or "fastgist warmup" in done.stderr, done.stderr[-3000:]


def test_the_device_under_test_is_what_was_asked_for():
    assert DEVICE == os.environ.get("FASTGIST_TEST_DEVICE", "cpu")
