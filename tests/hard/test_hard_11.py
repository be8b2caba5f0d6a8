"""Hard case 11: an implementation that was asked for by name and cannot run says what is missing and how to get it."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import DEVICE, INTERPRETING
from every_op import make

from fastgist import _extension, backends
from fastgist.backends import OPS


@pytest.fixture(autouse=True)
def _fresh_answers():
    backends._resolve.cache_clear()
    yield
    backends._resolve.cache_clear()


@pytest.mark.skipif(INTERPRETING or DEVICE != "cpu", reason="there triton does run")
@pytest.mark.parametrize("op", OPS)
def test_triton_on_a_cpu(op):
    call = make(op)
    with pytest.raises(
        RuntimeError, match=rf"{op}: impl='triton' cannot run here: .*need a CUDA device.*TRITON_INTERPRET=1"
    ):
        call(*call.values(), impl="triton")


@pytest.mark.skipif(DEVICE != "cpu", reason="there it may run")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("extension", ["as it is", "without kernels", "with kernels", "not built"])
def test_cuda_on_a_cpu(op, extension, monkeypatch):
    """Whatever the extension holds: the first thing that is missing is named."""
    if extension != "as it is":
        monkeypatch.setattr(_extension, "load", lambda: "it was not built" if extension == "not built" else None)
        monkeypatch.setattr(_extension, "has_cuda", lambda: extension == "with kernels")
    call = make(op)
    wanted = {
        "as it is": "(no cuda implementation|not available|without CUDA kernels|runs on cuda tensors and these are on cpu)",
        "without kernels": r"the compiled extension was built without CUDA kernels \(nvcc was not found at build time\)$",
        "with kernels": "impl='cuda' runs on cuda tensors and these are on cpu$",
        "not built": r"the compiled extension is not available: it was not built \(build it with",
    }[extension]
    if (op, "cuda") not in backends._SERVES:
        wanted = f"{op} has no cuda implementation$"
    with pytest.raises(RuntimeError, match=rf"^{op}: impl='cuda' cannot run here: .*{wanted}"):
        call(*call.values(), impl="cuda")


@pytest.mark.parametrize("op", OPS)
def test_native_without_the_extension(op, monkeypatch):
    monkeypatch.setattr(_extension, "load", lambda: "it was not built")
    call = make(op)
    if (op, "native") in backends._SERVES:
        wanted = rf"{op}: impl='native' cannot run here: .*not available: it was not built \(build it with"
    else:
        wanted = rf"{op}: impl='native' cannot run here: {op} has no native implementation"
    with pytest.raises(RuntimeError, match=wanted):
        call(*call.values(), impl="native")
    if DEVICE == "cpu" and not INTERPRETING:
        assert backends.resolve(op, "auto", torch.empty(1)) == "reference"


@pytest.mark.parametrize("op", OPS)
def test_a_misspelt_implementation(op):
    call = make(op)
    with pytest.raises(ValueError, match=rf"{op}: impl must be one of .*got 'tritno'"):
        call(*call.values(), impl="tritno")


@pytest.mark.parametrize("op", OPS)
def test_explain_names_what_runs_and_why(op, monkeypatch):
    said = backends.explain(op)["cpu"]
    assert said.split(" (")[0] in ("reference", "native", "triton")
    assert os.environ.get("TRITON_INTERPRET") == "1" or "triton: " in said
