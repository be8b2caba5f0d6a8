"""The compiled extension's ops, torch.ops.fastgist_native, as they are: the layer below fastgist.functional.

The same tests serve CPU and, with FASTGIST_TEST_DEVICE=cuda, the CUDA kernels.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgist import _extension
from fastgist.ops.bidirectional_kl import STATS
from fastgist.reference.bidirectional_kl import bidirectional_kl as formula
from fastgist.testing import assert_within_budget, layouts

ROOT = Path(__file__).parents[1]
DEVICE = os.environ.get("FASTGIST_TEST_DEVICE", "cpu")
COMPILER = next((c for c in map(shutil.which, ("c++", "g++", "clang++")) if c), None)

if _extension.load() is not None:
    if COMPILER is None:
        pytest.skip(f"no C++ compiler and no extension: {_extension.load()}", allow_module_level=True)
    if os.environ.get("FASTGIST_NO_EXT", "0") not in ("", "0"):
        pytest.skip("FASTGIST_NO_EXT is set", allow_module_level=True)
    pytest.fail(f"there is a compiler, so the extension must be built (make setup): {_extension.load()}", pytrace=False)
if DEVICE != "cpu" and not _extension.has_cuda():
    pytest.skip("the extension was built without CUDA kernels", allow_module_level=True)

# Compiled code does not change under TRITON_INTERPRET=1: leave that run to the kernels that do.
pytestmark = [] if os.environ.get("TRITON_INTERPRET", "0") == "1" else [pytest.mark.kernel]

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [1, 2, 127, 1000, 4097, 50257]
native = torch.ops.fastgist_native


def accumulates(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits(rows: int, classes: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    return tuple((torch.randn(rows, classes, device=DEVICE) * spread).to(dtype) for _ in range(2))


def run(z, o, mask=None, *, temperature=3.0, row_grad=None, need=(True, True)):
    """(row_loss, stats, grad_z, grad_o) from outputs that were NaN before."""
    dtype = accumulates(z.dtype)
    row_loss = torch.full((z.shape[0],), NAN, dtype=dtype, device=z.device)
    stats = torch.full((len(STATS), z.shape[0]), NAN, dtype=dtype, device=z.device)
    native.bidirectional_kl_fwd(z, o, mask, temperature, row_loss, stats)
    grads = [torch.full(z.shape, NAN, dtype=z.dtype, device=z.device) if n else None for n in need]
    row_grad = torch.ones(z.shape[0], dtype=dtype, device=z.device) if row_grad is None else row_grad
    native.bidirectional_kl_bwd(z, o, mask, stats, row_grad, temperature, *grads)
    return row_loss, stats, *grads


def by_formula(z, o, row_grad, temperature):
    """(row_loss, grad_z, grad_o) by autograd through plain PyTorch, in the dtype of z."""
    z, o = z.detach().requires_grad_(), o.detach().requires_grad_()
    loss = formula(z, o, temperature=temperature, reduction="none")
    return loss.detach(), *torch.autograd.grad(loss, (z, o), row_grad.to(loss.dtype))


def scales(z, o, row_grad, temperature):
    """The largest sums of absolute terms behind a row's loss and behind an element of a gradient."""
    u, v = z.double() / temperature, o.double() / temperature
    p, q = u.softmax(-1), v.softmax(-1)
    d = ((u - u.amax(-1, keepdim=True)) - (v - v.amax(-1, keepdim=True))).abs()
    terms = ((p + q) * d).sum(-1, keepdim=True)
    size = row_grad.double().abs()[:, None] / temperature * (p + q) * (1 + d + terms)
    return float(terms.max()), float(size.max())


def check(z, o, temperature=3.0, row_grad=None):
    if row_grad is None:
        row_grad = torch.randn(z.shape[0], dtype=accumulates(z.dtype), device=z.device)
    loss, _, grad_z, grad_o = run(z, o, temperature=temperature, row_grad=row_grad)
    plain = by_formula(z, o, row_grad, temperature)
    exact = by_formula(z.double(), o.double(), row_grad, temperature)
    loss_scale, grad_scale = scales(z, o, row_grad, temperature)
    for what, ours, p, e, scale in (
        ("row_loss", loss, plain[0], exact[0], loss_scale),
        ("grad_z", grad_z, plain[1], exact[1], grad_scale),
        ("grad_o", grad_o, plain[2], exact[2], grad_scale),
    ):
        if z.dtype == torch.float64:  # there is nothing more exact to hold it against: two ways of rounding
            assert float((ours - e).abs().max()) <= 32 * torch.finfo(torch.float64).eps * scale, what
        else:
            assert_within_budget(ours, p, e, what=what, scale=scale)
    return loss, grad_z, grad_o


def assert_same(ours, theirs, what=""):
    """Bitwise on a CPU; on a GPU a layout may take another path, whose sums run in another order."""
    if DEVICE == "cpu":
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
    else:
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=lambda m: f"{what}: {m}")


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    settings = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [sys.executable, *arguments], env=settings, capture_output=True, text=True, check=False, timeout=300
    )


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", SIZES)
def test_agrees_with_float64(classes, dtype):
    check(*logits(5, classes, dtype))


@pytest.mark.parametrize("temperature", [0.25, 1.0, 10.0])
def test_temperatures(temperature):
    check(*logits(4, 1000, torch.float32), temperature=temperature)


@pytest.mark.parametrize("classes", [100, 2500])
@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_classes_masked_by_the_least_float_on_one_side(classes, temperature):
    """Their p is 0 and their d, over T, more than a float holds. (q, of the other side, is 0 there too.)"""
    z, o = logits(4, classes, torch.float32)
    z[:, 5] = torch.finfo(torch.float32).min
    o[:, 5] = -1e4
    check(z, o, temperature=temperature)


def test_maxima_that_rise_all_along_the_row():
    z, o = logits(4, 5000, torch.float32)
    check(z.sort(-1).values, o.sort(-1, descending=True).values)
    check(z.sort(-1).values, o.sort(-1).values)


def test_an_offset_between_the_heads_costs_nothing():
    """100 units apart and almost equal otherwise: J about 1e-5, where plain float32 keeps no digit."""
    z = torch.randn(4, 1000, device=DEVICE).mul(256).round().div(256)  # + 128 is exact
    o = z + torch.randn_like(z).mul(3e-3 * 256).round().div(256)
    near = run(z, o)
    far = run(z, o + 128)
    assert float(near[0].max()) < 1e-4
    for a, b in zip((near[0], *near[2:]), (far[0], *far[2:]), strict=True):
        assert_same(a, b, "an offset of 128")


@pytest.mark.parametrize("gap", [320.0, 1e4, 60000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_wide_gaps_stay_finite(gap, dtype):
    z = torch.tensor([[gap, -gap, 0.0], [0.0, 1.0, gap]], device=DEVICE).to(dtype)
    o = torch.tensor([[-gap, gap, 0.0], [gap, 0.0, 1.0]], device=DEVICE).to(dtype)
    loss, _, grad_z, grad_o = run(z, o, temperature=0.5)
    ones = torch.ones(2, device=DEVICE)
    plain, exact = by_formula(z, o, ones, 0.5), by_formula(z.double(), o.double(), ones, 0.5)
    for what, ours, p, e in zip(("row_loss", "grad_z", "grad_o"), (loss, grad_z, grad_o), plain, exact, strict=True):
        assert_within_budget(ours, p, e, what=what)  # at a scale of the result: a gap adds no error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swapping_the_sides_swaps_the_gradients(dtype):
    z, o = logits(4, 1500, dtype)
    loss, _, grad_z, grad_o = run(z, o)
    swapped, _, grad_second, grad_first = run(o, z)
    assert_same(loss, swapped)
    assert_same(grad_z, grad_first)
    assert_same(grad_o, grad_second)


def test_equal_logits_have_no_loss_and_no_gradient():
    z, _ = logits(3, 1000, torch.float32)
    loss, _, grad_z, grad_o = run(z, z)
    assert not loss.any()
    assert not grad_z.any()
    assert not grad_o.any()


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [65, 3000])
def test_every_layout_of_both_inputs(classes, dtype):
    z, o = logits(5, classes, dtype)
    wanted = run(z, o)
    for (name, z_as), (other_name, o_as) in itertools.product(layouts(z), layouts(o)):
        for ours, theirs in zip(run(z_as, o_as), wanted, strict=True):
            assert_same(ours, theirs, f"{name} and {other_name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_stride_zero(dtype):
    z, o = logits(5, 300, dtype)
    for z_as, o_as in (
        (z[:1].expand(5, 300), o),
        (z[:, :1].expand(5, 300), o),
        (z[:1, :1].expand(5, 300), o[:1].expand(5, 300)),
    ):
        for ours, theirs in zip(run(z_as, o_as), run(z_as.contiguous(), o_as.contiguous()), strict=True):
            assert_same(ours, theirs)


def test_layouts_of_mask_and_row_grad():
    z, o = logits(6, 50, torch.float32)
    mask = torch.tensor([True, False, True, True, False, True], device=DEVICE)
    grad = torch.randn(6, device=DEVICE)
    wanted = run(z, o, mask, row_grad=grad)
    ours = run(z, o, mask[:, None].expand(6, 3).contiguous()[:, 1], row_grad=torch.stack((grad, grad), 1)[:, 1])
    for a, b in zip(ours, wanted, strict=True):
        assert_same(a, b)
    one = torch.tensor(2.5, device=DEVICE)
    for a, b in zip(run(z, o, row_grad=one.expand(6)), run(z, o, row_grad=one.repeat(6)), strict=True):
        assert_same(a, b)
    for a, b in zip(run(z, o, mask[:1].expand(6)), run(z, o), strict=True):
        assert_same(a, b)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs memory that is only touched where it is read")
def test_offsets_past_two_to_the_31():
    z, o = logits(3, 4, torch.float16)
    strided = torch.empty_strided((3, 4), (1 << 30, 1 << 28), dtype=torch.float16)  # the last element is past 2^31
    strided.copy_(z)
    for ours, theirs in zip(run(strided, o), run(z, o), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize(("rows", "classes"), [(0, 5), (3, 0), (0, 0)])
def test_empty(rows, classes):
    loss, stats, grad_z, grad_o = run(*logits(rows, classes, torch.float32))
    assert loss.shape == (rows,)
    assert grad_z.shape == grad_o.shape == (rows, classes)
    assert not loss.any()
    assert not stats.any()


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subsets_of_gradients(need, dtype):
    z, o = logits(3, 1500, dtype)
    both = run(z, o)[2:]
    for grad, wanted, needed in zip(run(z, o, need=need)[2:], both, need, strict=True):
        if needed:
            assert_same(grad, wanted)
        else:
            assert grad is None


# -- special values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_are_zero_and_not_read(dtype):
    z, o = logits(7, 1100, dtype)
    mask = torch.tensor([True, True, False, True, False, False, True], device=DEVICE)  # one may be looked at ahead
    wanted = run(z, o)
    z[2], o[2, 3], o[4], z[5] = NAN, INF, -INF, NAN
    loss, stats, *grads = run(z, o, mask)
    for ours, full in ((loss, wanted[0]), (stats.T, wanted[1].T), *zip(grads, wanted[2:], strict=True)):
        assert_same(ours[mask], full[mask])
        assert not ours[~mask].any()
    nothing = run(z, o, torch.zeros(7, dtype=torch.bool, device=DEVICE))
    assert not any(x.any() for x in nothing)


@pytest.mark.parametrize("classes", [7, 700, 5000])
def test_absent_classes(classes):
    """-inf on both sides: the result is that of the row without those classes; also where a row begins with them."""
    z, o = logits(4, classes, torch.float32)
    absent = torch.zeros(classes, dtype=torch.bool, device=DEVICE)
    absent[: classes // 2] = True
    absent[-1] = True
    z[:, absent] = o[:, absent] = -INF
    loss, _, grad_z, grad_o = run(z, o)
    exact = by_formula(z[:, ~absent].double(), o[:, ~absent].double(), torch.ones(4, device=DEVICE), 3.0)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=1e-6)
    for grad, wanted in ((grad_z, exact[1]), (grad_o, exact[2])):
        assert not grad[:, absent].any()
        torch.testing.assert_close(grad[:, ~absent].double(), wanted, rtol=1e-5, atol=1e-7)


BAD = {
    "z -inf on one side": ((-INF, None), INF),
    "o -inf on one side": ((None, -INF), INF),
    "NaN": ((NAN, None), NAN),
    "NaN in other": ((None, NAN), NAN),
    "+inf": ((INF, None), NAN),
    "+inf on both": ((INF, INF), NAN),
    "+inf against -inf": ((INF, -INF), NAN),
    "NaN against -inf": ((NAN, -INF), NAN),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize(("classes", "where"), [(5, 2), (3000, 0), (3000, 2999)])
def test_what_is_bad_stays_in_its_row(case, classes, where):
    (bad_z, bad_o), expected = BAD[case]
    z, o = logits(4, classes, torch.float32)
    clean = run(z, o)
    if bad_z is not None:
        z[2, where] = bad_z
    if bad_o is not None:
        o[2, where] = bad_o
    loss, _, grad_z, grad_o = run(z, o)
    others = [0, 1, 3]
    for ours, theirs in ((loss, clean[0]), (grad_z, clean[2]), (grad_o, clean[3])):
        assert_same(ours[others], theirs[others])
    assert loss[2] == INF if expected == INF else loss[2].isnan()
    assert grad_z[2].isnan().all()
    assert grad_o[2].isnan().all()


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7FFFFFFF, -1])
@pytest.mark.parametrize(("classes", "where"), [(5, 2), (3000, 5), (3000, 2999)])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_of_any_bits_is_nan(bits, classes, where, side):
    """Kernels build powers of two in a float's bits: no NaN may become a number there."""
    z, o = pair = logits(4, classes, torch.float32)
    pair[side][2, where] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    target = torch.arange(4)
    row_loss, stats = torch.empty(4), torch.empty(9, 4)
    for options in ((0.5, 0.75, 0.75, 0.75, 1.0), (0.5, 0.0, 0.0, 0.0, 3.0)):
        torch.ops.fastgist_native.gist_loss_fwd(z, o, target, *options, 0.0, -100, row_loss, stats)
        assert row_loss.isnan().tolist() == [False, False, True, False]
    loss, _, grad_z, grad_o = run(z, o)
    for found in (loss.isnan(), grad_z.isnan().all(-1), grad_o.isnan().all(-1)):
        assert found.tolist() == [False, False, True, False]


def test_a_side_that_is_all_minus_inf():
    z, o = logits(4, 50, torch.float32)
    z[1], o[2], z[3], o[3] = -INF, -INF, -INF, -INF
    loss, _, grad_z, grad_o = run(z, o)
    assert loss.isnan().tolist() == [False, True, True, True]
    for grad in (grad_z, grad_o):
        assert grad.isnan().all(-1).tolist() == [False, True, True, True]


def test_infinite_where_the_probability_underflows():
    """p is 0 in float32 at the class where q is exactly 0: still +inf, never clamped."""
    z = torch.tensor([[0.0, -1e5]], device=DEVICE)
    o = torch.tensor([[0.0, -INF]], device=DEVICE)
    assert run(z, o)[0].item() == INF
    assert run(o, z)[0].item() == INF


# -- determinism -----------------------------------------------------------------------------------------------------


def test_reruns_are_bitwise_equal():
    z, o = logits(64, 3000, torch.float32)
    first = run(z, o)
    for _ in range(5):
        for ours, theirs in zip(run(z, o), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU threads")
def test_threads_do_not_change_the_result():
    z, o = logits(64, 3000, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(z, o))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert torch.equal(ours, theirs)


def test_several_callers_at_once():
    z, o = logits(16, 2000, torch.float32)
    wanted = run(z, o)
    found: list = [None] * 4

    def work(i: int) -> None:
        found[i] = [run(z, o) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for results in found:
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


# -- errors ----------------------------------------------------------------------------------------------------------


def _fwd_arguments() -> dict:
    z, o = logits(3, 4, torch.float32)
    return {
        "logits": z,
        "other_logits": o,
        "mask": None,
        "temperature": 1.0,
        "row_loss": torch.empty(3, device=DEVICE),
        "stats": torch.empty(6, 3, device=DEVICE),
    }


def _bwd_arguments() -> dict:
    z, o = logits(3, 4, torch.float32)
    return {
        "logits": z,
        "other_logits": o,
        "mask": None,
        "stats": torch.empty(6, 3, device=DEVICE),
        "row_grad": torch.ones(3, device=DEVICE),
        "temperature": 1.0,
        "grad_logits": torch.empty(3, 4, device=DEVICE),
        "grad_other": None,
    }


FWD_ERRORS = {
    "integers": (
        lambda a: {"logits": a["logits"].int(), "other_logits": a["other_logits"].int()},
        "logits must be float32",
    ),
    "one dimension": (lambda a: {"logits": a["logits"][0]}, r"expected logits of shape \(M, V\), got 1"),
    "other shape": (
        lambda a: {"other_logits": a["other_logits"][:, :3]},
        r"other_logits of shape \(3, 4\), got \(3, 3\)",
    ),
    "other rows": (lambda a: {"other_logits": a["other_logits"][:2]}, r"other_logits of shape \(3, 4\), got \(2, 4\)"),
    "other dtype": (lambda a: {"other_logits": a["other_logits"].double()}, "other_logits must be Float, got Double"),
    "mask dtype": (lambda a: {"mask": torch.ones(3, device=DEVICE)}, "mask must be Bool, got Float"),
    "mask shape": (lambda a: {"mask": torch.ones(2, dtype=torch.bool, device=DEVICE)}, r"mask of shape \(3,\)"),
    "temperature 0": (lambda a: {"temperature": 0.0}, "temperature must be finite and > 0, got 0"),
    "temperature -1": (lambda a: {"temperature": -1.0}, "temperature must be finite and > 0, got -1"),
    "temperature NaN": (lambda a: {"temperature": NAN}, "temperature must be finite and > 0, got nan"),
    "temperature inf": (lambda a: {"temperature": INF}, "temperature must be finite and > 0, got inf"),
    "row_loss size": (lambda a: {"row_loss": torch.empty(2, device=DEVICE)}, r"row_loss of shape \(3,\)"),
    "row_loss dtype": (lambda a: {"row_loss": a["row_loss"].double()}, "row_loss must be Float, got Double"),
    "row_loss strided": (lambda a: {"row_loss": torch.empty(6, device=DEVICE)[::2]}, "row_loss must be contiguous"),
    "stats shape": (lambda a: {"stats": torch.empty(4, 3, device=DEVICE)}, r"stats of shape \(6, 3\), got \(4, 3\)"),
    "stats strided": (lambda a: {"stats": torch.empty(3, 6, device=DEVICE).T}, "stats must be contiguous"),
}
BWD_ERRORS = {
    "row_grad dtype": (lambda a: {"row_grad": a["row_grad"].double()}, "row_grad must be Float, got Double"),
    "row_grad shape": (lambda a: {"row_grad": a["row_grad"][:2]}, r"row_grad of shape \(3,\)"),
    "grad dtype": (lambda a: {"grad_logits": a["grad_logits"].half()}, "grad_logits must be Float, got Half"),
    "grad shape": (lambda a: {"grad_other": a["grad_logits"][:, :2]}, r"grad_other of shape \(3, 4\), got \(3, 2\)"),
    "grad strided": (lambda a: {"grad_other": torch.empty(4, 3, device=DEVICE).T}, "grad_other must be contiguous"),
    "stats dtype": (lambda a: {"stats": a["stats"].double()}, "stats must be Float, got Double"),
}


@pytest.mark.parametrize("case", FWD_ERRORS)
def test_forward_refuses(case):
    change, message = FWD_ERRORS[case]
    arguments = _fwd_arguments()
    with pytest.raises(RuntimeError, match=rf"fastgist_native::bidirectional_kl_fwd: .*{message}"):
        native.bidirectional_kl_fwd(**(arguments | change(arguments)))


@pytest.mark.parametrize("case", BWD_ERRORS)
def test_backward_refuses(case):
    change, message = BWD_ERRORS[case]
    arguments = _bwd_arguments()
    with pytest.raises(RuntimeError, match=rf"fastgist_native::bidirectional_kl_bwd: .*{message}"):
        native.bidirectional_kl_bwd(**(arguments | change(arguments)))


def test_meta_tensors_are_refused():
    z = torch.empty(3, 4, device="meta")
    with pytest.raises(NotImplementedError):
        native.bidirectional_kl_fwd(z, z, None, 1.0, z[:, 0], torch.empty(6, 3, device="meta"))
