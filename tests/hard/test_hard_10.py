"""Hard case 10: out of memory leaves parameters and gradients intact; too little shared memory means a smaller tile."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from every_op import make
from test_hard_09 import _Kernel

from fastgist.backends import OPS

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
def test_what_cannot_shrink_is_an_error_not_a_crash():
    from fastgist_kernels import common

    kernel = _Kernel(*[_out_of_resources() for _ in range(64)])
    with pytest.raises(Exception, match="out of resource") as caught:
        common.launch(kernel, lambda c: (1,), {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}, torch.zeros(3))
    assert type(caught.value).__name__ == "OutOfResources"


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
