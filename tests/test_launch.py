"""How launches are told apart and split, without a GPU."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.launches import Ledger, on_a_card
from fastgist import functional
from fastgist_kernels import adapter_bwd_once as once
from fastgist_kernels import common
from fastgist_kernels.common import _specialisation, cdiv, launch, next_power_of_2
from fastgist_kernels.cp_linear_forms import aligned as fetched_whole
from fastgist_kernels.outer import _splits


def _same(a, b) -> bool:
    return _specialisation((a,)) == _specialisation((b,))


def test_launches_are_told_apart_as_triton_does():
    x = torch.empty(64)
    assert _same(x, torch.empty(9))
    assert not _same(x, x[1:]), "an unaligned pointer is another kernel"
    assert _same(x, x[4:])
    assert not _same(x, x.double()) and not _same(x, None)
    assert _same(32, 48) and _same(3, 5) and not _same(3, 48) and not _same(1, 3), "1 is a constant"
    assert not _same(2**31, 16) and not _same(2**31 + 1, 5), "a 64-bit argument is another kernel"
    assert _same(0.5, 2.0) and not _same(0.5, 1)


@pytest.mark.parametrize(
    ("tensor", "aligned"),
    [
        (torch.empty(8, 64), True),
        (torch.empty(8, 72), False),
        (torch.empty(64, 8).t(), False),
        (torch.empty(64, 16).t(), True),
        (torch.empty(8, 128)[:, 64:], True),
        (torch.empty(8, 128)[:, 1:65], False),
    ],
)
def test_what_can_be_fetched_sixteen_bytes_at_a_time(tensor, aligned):
    assert fetched_whole(tensor) == aligned


def test_rows_are_split_over_four_programs_a_processor_while_partial_sums_stay_small():
    assert _splits(132, 6, 50688, 128, 16, 2) == 4 * 132 // 6
    assert _splits(132, 1, 100, 64, 16, 2) == 2, "no more than there are row blocks"
    rows, rank, columns = 16384, 256, 4096
    splits = _splits(132, 32, rows, 64, rank, 2)
    assert splits * columns * rank * 4 <= max(132 // 32 * columns * rank * 4, rows * columns * 2 // 8)
    assert _splits(132, 1000, 64, 64, 16, 2) == 1


def test_sizes_of_grids():
    assert [cdiv(n, 4) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert [next_power_of_2(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


class _Compiled:
    """What a launch through Triton's JIT returns."""

    function, packed_metadata = 7, (1, 2)

    def __init__(self):
        self.runs = []

    def run(self, *args):
        self.runs.append(args)


class _Kernel:
    """A kernel that counts its trips through the JIT."""

    arg_names = ("x", "n", "FLAG", "BLOCK")

    def __init__(self):
        self.jits, self.compiled = 0, _Compiled()

    def __getitem__(self, grid):
        def run(*args, **options):
            self.jits += 1
            return self.compiled

        return run


def test_a_second_launch_goes_past_the_jit_unless_somebody_watches(monkeypatch):
    from triton import knobs

    monkeypatch.setattr(common, "_READY", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # a CPU tensor's index
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5, raising=False)
    kernel, x = _Kernel(), torch.empty(8)

    def go(n, flag=True):
        launch(kernel, lambda config: (cdiv(n, config["BLOCK"]),), {"BLOCK": 4}, x, n, FLAG=flag)

    go(8)
    assert kernel.jits == 1 and not kernel.compiled.runs
    go(12)
    (run,) = kernel.compiled.runs
    assert kernel.jits == 1
    assert run[:9] == (3, 1, 1, 5, 7, (1, 2), None, None, None)
    assert run[9] is x and run[10:] == (12, True, 4)
    go(16)
    assert kernel.jits == 2, "16 is another kernel: Triton compiles for multiples of it"
    go(12, flag=False)
    assert kernel.jits == 3
    hook = lambda *args: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        go(8)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert kernel.jits == 4 and len(kernel.compiled.runs) == 1
    go(8)
    assert kernel.jits == 4 and len(kernel.compiled.runs) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["bidirectional_kl", "gist_loss"])
def test_a_small_loss_is_two_launches_forward_and_backward(op, dtype):
    """64 rows of 100 classes: one program's worth, where launches are what is waited for. The incoming gradient is 1 and on
    the device, so the second launch looks at it and returns."""
    z, g = (torch.randn(64, 100, dtype=dtype, requires_grad=True) for _ in range(2))
    more = (torch.zeros(64, dtype=torch.long),) if op == "gist_loss" else ()
    with on_a_card(), Ledger() as ledger:
        loss = getattr(functional, op)(z, g, *more)
        torch.autograd.grad(loss, [z, g], torch.ones_like(loss))
    ours = {name: count for name, count in ledger.found.items() if name != "ones_like"}
    assert sum(ours.values()) <= 2, ledger.found


def test_one_pass_knows_the_shared_memory_that_it_takes():
    """At least what the compilers of the resource table found, and little more."""
    checked = 0
    with (Path(__file__).parents[1] / "benchmarks" / "resources.csv").open(newline="") as f:
        rows = {r["kernel"]: r for r in csv.DictReader(f) if r["kernel"].startswith("_adapter_bwd_once")}
    for spec in once.SPECS:
        if spec.name in rows:
            columns, taken = spec.constexprs["COLUMNS"], int(rows[spec.name]["shared"])
            known = once._bytes(columns, once._tile_defaults(columns, spec.constexprs["BLOCK_H"]))
            assert taken <= known <= 1.3 * taken, spec.name
            checked += 1
    assert checked >= 6


@pytest.mark.parametrize(
    ("rows", "width", "hidden", "dtype", "one"),
    [
        (40, 64, 4, torch.bfloat16, True),
        (40, 768, 15, torch.bfloat16, True),
        (40, 640, 7, torch.bfloat16, True),
        (40, 640, 8, torch.bfloat16, False),
        (40, 768, 16, torch.bfloat16, False),
        (40, 784, 4, torch.bfloat16, False),
        (40, 72, 4, torch.bfloat16, False),
        (40, 64, 4, torch.float16, False),
    ],
)
def test_which_backwards_go_in_one_pass(rows, width, hidden, dtype, one):
    x, down, up = (torch.empty(shape, dtype=dtype) for shape in ((rows, width), (hidden, width), (width, hidden)))
    assert once.applies(x, x, down, up, None, None, down, up) == one
    assert not once.applies(x, x, down, up, None, None, None, up), "a frozen weight needs no second pass over x"
    assert not once.applies(x, x, down.t().contiguous().t(), up, None, None, down, up)
    assert not once.applies(x.t().contiguous().t(), x, down, up, None, None, down, up)
    assert not once.applies(x[:, :32], x, down, up, None, None, down, up), "D' = D"
