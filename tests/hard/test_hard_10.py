"""Hard case 10: out of memory leaves parameters and gradients intact; too little shared memory means a smaller tile, and
where none fits one warning and plain PyTorch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, INTERPRETING
from every_op import make
from test_hard_09 import _Kernel

from fastgist.backends import OPS
from fastgist.ops import _common

ROOT = Path(__file__).parents[2]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def _out_of_resources():
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300_000, 232_448, "shared memory")


@needs_triton
def test_a_tile_that_does_not_fit_is_replaced_and_remembered():
    from fastgist_kernels import common

    config = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3}
    kernel = _Kernel(_out_of_resources(), _out_of_resources(), None, None)
    grids = []
    common.launch(kernel, lambda c: grids.append(dict(c)) or (1,), config, torch.zeros(3))
    tried = [{k: v for k, v in options.items() if k in config} for _, options in kernel.configs]
    assert tried[0] == config
    assert tried[1] == config | {"num_stages": 2}, "fewer stages first: they cost the least"
    assert tried[2] == config | {"num_stages": 2, "BLOCK_N": 64}
    assert [{k: g[k] for k in config} for g in grids] == tried, "the grid follows the tile"
    common.launch(kernel, lambda c: (1,), config, torch.zeros(3))
    assert {k: v for k, v in kernel.configs[-1][1].items() if k in config} == tried[2], "what fits is remembered"


@needs_triton
def test_only_what_is_in_the_config_shrinks():
    """A tile that must hold the whole rank or bottleneck goes in as a constexpr: halved, it would drop columns."""
    from fastgist_kernels import common

    config = {"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 1}
    kernel = _Kernel(_out_of_resources(), _out_of_resources(), None)
    common.launch(kernel, lambda c: (1,), config, torch.zeros(3), BLOCK_H=256)
    assert all(options["BLOCK_H"] == 256 for _, options in kernel.configs)
    assert kernel.configs[-1][1]["BLOCK_M"] * kernel.configs[-1][1]["BLOCK_N"] == 256


@needs_triton
def test_what_cannot_shrink_is_refused_at_once_the_next_time(monkeypatch):
    from fastgist_kernels import common

    monkeypatch.setattr(common, "_REFUSED", {})
    kernel = _Kernel(*[_out_of_resources() for _ in range(64)])
    for tries in (1, 1, 2):  # the third is another tile
        config = {"BLOCK_M": 16 * tries, "num_warps": 4, "num_stages": 1}
        with pytest.raises(Exception, match="out of resource") as caught:
            common.launch(kernel, lambda c: (1,), config, torch.zeros(3))
        assert type(caught.value).__name__ == "OutOfResources"
    assert [options["BLOCK_M"] for _, options in kernel.configs] == [16, 32, 16]


@pytest.fixture
def no_room(monkeypatch):
    """Operations choose as on a card, and none of its kernels' tiles fits."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import launches

    def refuse(*args: object, **constexprs: object) -> None:
        raise _out_of_resources()

    monkeypatch.setattr(launches, "_note", refuse)
    _common._tell_once.cache_clear()
    with launches.on_a_card():
        yield
    _common._tell_once.cache_clear()


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETING, reason="kernels that run have room")
@pytest.mark.parametrize("op", OPS)
def test_without_room_for_any_tile_auto_warns_once_and_takes_plain_pytorch(no_room, op):
    call = make(op)
    want, want_grads = call.run(impl="reference")
    with pytest.warns(RuntimeWarning, match=rf"fastgist::{op}.*no room for any tile") as told:
        runs = [call.run() for _ in range(2)]
    messages = [str(w.message) for w in told if "no room" in str(w.message)]
    assert len(messages) == len(set(messages)), "once for each operator"
    for found, grads in runs:
        assert torch.equal(found, want)
        assert all(torch.equal(mine, w) for mine, w in zip(grads, want_grads, strict=True))
    with pytest.raises(Exception, match="out of resource"):
        call.run(impl="triton")


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_adapter_s_backward_without_room_forms_z_again(normed, dtype):
    """A kernel's forward kept none, and its backward has no room: what plain PyTorch's needs is formed of x."""
    from fastgist.ops import adapter as ops

    x, grad = (torch.randn(9, 12).to(dtype) for _ in range(2))
    down, down_bias, up = torch.randn(5, 12).to(dtype), torch.randn(5).to(dtype), torch.randn(12, 5).to(dtype)
    norm = (torch.randn(12).to(dtype), torch.randn(12).to(dtype)) if normed else (None, None)
    rest = ("gelu", 0.5, 1.0, 1e-5 if normed else None, 0.0, True, True, "reference")
    _, z, stats = ops._fwd(x, down, down_bias, up, None, x, None, None, *norm, None, *rest)
    stats = stats if normed else None
    needs = [True, True, True, True, False, False, normed, normed]
    tail = (None, "gelu", 0.5, 1.0, True, 0.0, needs, dtype, "reference")
    kept, again = (
        ops._bwd(grad, x, down, down_bias, up, None, None, given, *norm, stats, *tail) for given in (z, None)
    )
    assert all(t.numel() for t in again[:4])
    for mine, want in zip(again, kept, strict=True):
        torch.testing.assert_close(mine, want)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_out_of_memory_leaves_everything_as_it_was(op):
    call = make(op, device="cuda", rows=20_000)
    values = call.values()
    leaves = call.wanted(values)
    call(*values).float().sum().backward()
    before = [(leaf.detach().clone(), leaf.grad.clone()) for leaf in leaves]
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    hoard = []
    try:
        for size in (2**30, 2**26, 2**20, 2**12):
            while True:
                try:
                    hoard.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                except torch.OutOfMemoryError:
                    break
        with pytest.raises(torch.OutOfMemoryError):
            hoard.extend(call(*values) for _ in range(64))  # the allocator may have kept a few small blocks
    finally:
        del hoard
        torch.cuda.empty_cache()
    assert free > 0
    for leaf, (value, grad) in zip(leaves, before, strict=True):
        assert torch.equal(leaf, value)
        assert torch.equal(leaf.grad, grad)
    call(*values).float().sum().backward()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)
