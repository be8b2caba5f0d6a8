"""The Triton kernels that finish a loss's gradients with it, form by form: whole rows, rows read twice, rows split over
programs, and one program for all; and the kernel that scales finished gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, INTERPRETING
from losses import gradient_terms
from torch import Tensor

from fastgist.reference.bidirectional_kl import bidirectional_kl as kl_formula
from fastgist.reference.gist_loss import gist_loss as gist_formula
from fastgist.testing import assert_within_budget

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not INTERPRETING and DEVICE == "cpu", reason="Triton's kernels need a GPU or its interpreter"),
]

FORMS = ["alone", "whole", "rows", "split"]
OPS = ["bidirectional_kl", "gist_loss"]
SHAPES = [(1, 1), (3, 1), (3, 2), (1, 127), (3, 257), (2, 1000), (1, 4097), (40, 100)]
SCALE = 0.7
each = pytest.mark.parametrize("op", OPS)
each_form = pytest.mark.parametrize("form", FORMS)


def logits(rows: int, classes: int, dtype=torch.float32, spread: float = 3.0) -> list[Tensor]:
    return [(torch.randn(rows, classes, device=DEVICE) * spread).to(dtype) for _ in range(2)]


def finish(
    op: str, pair, rest, form: str | None, *, divisor=None, options=None, wanted=(True, True), temperature=3.0
) -> tuple:
    """(loss, row losses, gradients) by the launcher, from outputs that held NaN."""
    import fastgist_kernels.bidirectional_kl as kl
    import fastgist_kernels.gist_loss as gist

    rows = len(pair[0])
    row_loss = torch.full((rows,), torch.nan, device=DEVICE)
    loss = torch.full((), torch.nan, device=DEVICE)
    grads = [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) if w else None
             for x, w in zip(pair, wanted, strict=True)]  # fmt: skip
    if op == "bidirectional_kl":
        kl.bidirectional_kl_fwd_bwd(*pair, rest, divisor, temperature, SCALE, row_loss, loss, *grads, form=form)
    else:
        options = options or (0.5, 0.75, 0.75, 0.75, temperature, 0.0, -100)
        gist.gist_loss_fwd_bwd(*pair, rest, divisor, *options, SCALE, row_loss, loss, *grads, form=form)
    return loss, row_loss, grads


def exact(op: str, pair, rest, dtype, factor: float = SCALE, **options) -> tuple:
    """The same by the formula, in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in pair]
    if op == "bidirectional_kl":
        rows = kl_formula(*leaves, mask=rest, reduction="none", temperature=options.get("temperature", 3.0))
    else:
        rows = gist_formula(*leaves, rest, reduction="none", **options)
    rows = rows * factor
    return (
        rows.sum().detach(),
        rows.detach(),
        torch.autograd.grad(rows.sum(), leaves, allow_unused=True, materialize_grads=True),
    )


def check(op: str, pair, rest, got: tuple, factor: float = SCALE, **options) -> None:
    true, plain = (exact(op, pair, rest, to, factor, **options) for to in (torch.float64, pair[0].dtype))
    terms = float(true[1].abs().sum()) + factor * len(pair[0])
    assert_within_budget(got[0], plain[0].float(), true[0], what="loss", scale=terms)
    assert_within_budget(got[1], plain[1].float(), true[1], what="row losses", scale=terms)
    for mine, p, t in zip(got[2], plain[2], true[2], strict=True):
        assert_within_budget(mine, p, t, what="gradient", scale=factor)


def some_rows(op: str, rows: int, classes: int):
    """A mask, or class targets, that leave the second row out."""
    out = torch.arange(rows, device=DEVICE) == 1
    if op == "bidirectional_kl":
        return ~out
    return torch.randint(classes, (rows,), device=DEVICE).masked_fill(out, -100)


@each
@each_form
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_form_at_every_shape(op, form, rows, classes, dtype):
    if form in ("whole", "alone") and classes > 4096:
        pytest.skip("these hold a row in one tile")
    pair, rest = logits(rows, classes, dtype), some_rows(op, rows, classes)
    check(op, pair, rest, finish(op, pair, rest, form))


@each
@each_form
def test_what_is_not_counted_is_not_read_and_what_is_not_wanted_not_written(op, form):
    pair, rest = logits(3, 300), some_rows(op, 3, 300)
    whole = finish(op, pair, rest, form)
    for x in pair:
        x[1] = torch.nan
    for wanted in ((True, False), (False, True), (True, True)):
        loss, row_loss, grads = finish(op, pair, rest, form, wanted=wanted)
        assert torch.equal(loss, whole[0]) and torch.equal(row_loss, whole[1])
        for mine, all_of_it, want in zip(grads, whole[2], wanted, strict=True):
            assert (mine is not None) == want
            assert mine is None or (torch.equal(mine, all_of_it) and bool((mine[1] == 0).all()))


@each
@each_form
@pytest.mark.parametrize("divisor", [5.0, 0.3, float("nan")])
def test_a_divisor_on_the_device(op, form, divisor):
    pair, rest = logits(3, 300), some_rows(op, 3, 300)
    got = finish(op, pair, rest, form, divisor=torch.tensor(divisor, device=DEVICE))
    if divisor != divisor:
        assert got[0].isnan() and all(g[0].isnan().all() for g in got[2])
        return
    check(op, pair, rest, got, SCALE / divisor)


@each
@each_form
@pytest.mark.parametrize("laid", ["strided columns", "padded rows", "every second row", "one row for all"])
def test_any_strides(op, form, laid):
    """The contiguous result to the last bit where the columns are as wide on the threads, within the budget elsewhere."""
    pair, rest = logits(4, 304), some_rows(op, 4, 304)
    z = pair[0]
    if laid == "strided columns":
        z = z.t().contiguous().t()
    elif laid == "padded rows":
        z = torch.nn.functional.pad(z, (0, 5))[:, :304]
    elif laid == "every second row":
        z = z.repeat_interleave(2, 0)[::2]
    else:
        z = z[:1].expand(4, -1)
    check(op, [z, pair[1]], rest, finish(op, [z, pair[1]], rest, form))


@each
@each_form
def test_masks_of_different_depth_below_temperature_1(op, form):
    """By the least number on one side and by -1e9 on the other: d / T is infinite there, and times a probability of 0."""
    pair, rest = logits(2, 300), torch.full((2,), 150, device=DEVICE) if op == "gist_loss" else None
    pair[0][:, :100], pair[1][:, :100] = torch.finfo(torch.float32).min, -1e9
    options = (0.5, 0.75, 0.75, 0.75, 0.5, 0.0, -100)
    _, row_loss, grads = finish(op, pair, rest, form, options=options, temperature=0.5)
    short, targets = [x[:, 100:] for x in pair], rest if rest is None else rest - 100
    true, plain = (exact(op, short, targets, to, temperature=0.5) for to in (torch.float64, torch.float32))
    assert_within_budget(row_loss, plain[1], true[1], scale=float(true[1].sum()) + 1.0)
    terms = gradient_terms(*short, 0.5)
    for mine, p, t in zip(grads, plain[2], true[2], strict=True):
        assert_within_budget(mine[:, 100:], p, t, scale=terms)
        assert bool((mine[:, :100] == 0).all())


@each
@each_form
def test_absent_lone_and_broken_classes(op, form):
    pair, rest = logits(6, 300), torch.full((6,), 7, device=DEVICE) if op == "gist_loss" else None
    for x in pair:
        x[:, 200:] = -torch.inf  # a whole lane of a ragged row, and whole tiles of a split one
        x[:, :5] = -1e9
    pair[0][:, :5] = torch.finfo(torch.float32).min  # a lane's sum of these overflows
    pair[0][1, 9] = -torch.inf  # alone
    pair[1][2, 9] = torch.nan
    pair[0][3] = -torch.inf
    pair[1][4, 9] = torch.inf
    loss, row_loss, grads = finish(op, pair, rest, form)
    assert loss.isnan() and row_loss[1].isposinf() and row_loss[[2, 3, 4]].isnan().all()
    assert all(g[1].isnan().any() and g[[2, 4]].isnan().any(1).all() for g in grads)
    assert grads[0][3].isnan().all()
    fine = [0, 5]
    short = [x[fine, 5:200] for x in pair]
    targets = rest if rest is None else rest[fine] - 5
    true, plain = (exact(op, short, targets, to) for to in (torch.float64, torch.float32))
    assert_within_budget(row_loss[fine], plain[1], true[1], scale=float(true[1].sum()) + 1.0)
    for mine, p, t in zip(grads, plain[2], true[2], strict=True):
        assert_within_budget(mine[fine, 5:200], p, t, scale=1.0)
        assert bool((mine[fine, 200:] == 0).all()) and bool((mine[fine, :5] == 0).all())


@each
@each_form
def test_a_later_maximum_and_an_offset_between_the_sides(op, form):
    """Every lane and part must come down to the maximum of the last column, and 1,000 between the sides cost nothing."""
    pair, rest = logits(3, 1000), some_rows(op, 3, 1000)
    pair[0][:, -1], pair[1][:, 3] = 20.0, 20.0
    pair[1] = pair[1] + 1000.0
    check(op, pair, rest, finish(op, pair, rest, form))


@each
@each_form
def test_reruns_are_bitwise_equal(op, form):
    pair, rest = logits(5, 1500), some_rows(op, 5, 1500)
    first, again = (finish(op, pair, rest, form) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert all(torch.equal(a, b) for a, b in zip(first[2], again[2], strict=True))


@each_form
@pytest.mark.parametrize("kind", ["smoothed", "all smoothed", "soft", "soft smoothed"])
def test_targets(form, kind):
    pair, rest = logits(3, 270), some_rows("gist_loss", 3, 270)
    smoothing = {"soft": 0.0, "all smoothed": 1.0}.get(kind, 0.2)
    if kind.startswith("soft"):
        rest = torch.rand(3, 270, device=DEVICE) ** 8
        rest = torch.where(rest < 0.1, 0.0, rest) / 30
    options = (0.5, 0.75, 0.75, 0.75, 1.7, smoothing, -100)
    got = finish("gist_loss", pair, rest, form, options=options)
    check("gist_loss", pair, rest, got, temperature=1.7, label_smoothing=smoothing)


@each_form
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_a_detached_side_takes_nothing_of_the_other(form, side, alpha):
    pair, rest = logits(3, 270), some_rows("gist_loss", 3, 270)
    betas = (0.0, 0.75) if side == 0 else (0.75, 0.0)
    options = (alpha, 0.75, *betas, 3.0, 0.0, -100)
    detach = "logits" if side == 0 else "gist_logits"
    got = finish("gist_loss", pair, rest, form, options=options)
    check("gist_loss", pair, rest, got, alpha=alpha, detach=detach)
    pair[1 - side][0, 3] = torch.nan
    loss, _, grads = finish("gist_loss", pair, rest, form, options=options)
    assert loss.isnan() and bool(grads[side].isfinite().all())
    assert torch.equal(grads[side], got[2][side])
    assert alpha or side == 0 or bool((grads[1] == 0).all())


@each_form
def test_an_impossible_target_is_nan(form):
    pair = logits(4, 300)
    rest = torch.tensor([3, 300, -100, -1], device=DEVICE)
    _, row_loss, grads = finish("gist_loss", pair, rest, form)
    assert row_loss.isnan().tolist() == [False, True, False, True]
    for g in grads:
        assert g.isnan().all(1).tolist() == [False, True, False, True] and bool((g[2] == 0).all())


@each
@pytest.mark.parametrize("rows", [1, 3])
def test_statistics_by_parts_are_those_of_whole_rows(op, rows, monkeypatch):
    """Evaluation and float16 leave statistics; of few long rows they are merged from parts."""
    import fastgist_kernels.bidirectional_kl as kl
    import fastgist_kernels.gist_loss as gist

    pair, rest = logits(rows, 5000), some_rows(op, rows, 5000)
    found = []
    for few in (True, False):
        monkeypatch.setattr(kl, "few_rows", lambda _, few=few: few)
        monkeypatch.setattr(gist, "few_rows", lambda _, few=few: few)
        row_loss = torch.full((rows,), torch.nan, device=DEVICE)
        stats = torch.full((6 if op == "bidirectional_kl" else 9, rows), torch.nan, device=DEVICE)
        if op == "bidirectional_kl":
            kl.bidirectional_kl_fwd(*pair, rest, 3.0, row_loss, stats)
        else:
            gist.gist_loss_fwd(*pair, rest, 0.5, 0.75, 0.75, 0.75, 3.0, 0.1, -100, row_loss, stats)
        found.append((row_loss, stats))
    torch.testing.assert_close(found[0], found[1], rtol=3e-6, atol=1e-5)
    assert bool((found[0][1][:2] == found[1][1][:2]).all()), "maxima are not rounded"


def test_forms_by_shape(monkeypatch):
    from fastgist_kernels import pair_plan

    monkeypatch.setattr(pair_plan, "processors", lambda _: 132)
    at = lambda rows, classes: pair_plan.choose_form(torch.empty(rows, classes, device="meta"))  # noqa: E731
    assert at(64, 100) == at(1, 5) == at(8, 1000) == "alone"
    assert at(65, 100) == at(512, 1000) == at(8, 4096) == "whole"
    assert at(263, 32000) == at(1, 4097) == "split"
    assert at(264, 4097) == at(8192, 32000) == "rows"


@pytest.mark.parametrize(("rows", "classes"), [(1, 4097), (8, 32000), (263, 50257), (1, 1_000_000)])
def test_parts_cover_a_row_once(rows, classes, monkeypatch):
    from fastgist_kernels import pair_plan

    monkeypatch.setattr(pair_plan, "processors", lambda _: 132)
    parts, stretch = pair_plan.split_classes(torch.empty(rows, classes, device="meta"), 1024)
    assert (parts - 1) * stretch < classes <= parts * stretch
    assert stretch % 1024 == 0 and stretch >= 2048
    assert rows * parts <= 8 * 132 or stretch == 2048


def test_rows_are_as_wide_as_all_of_their_tensors_allow():
    from fastgist_kernels.pair_plan import vector_width

    half, full = torch.empty(4, 80, dtype=torch.bfloat16), torch.empty(4, 80)
    assert vector_width(half, half) == 8 and vector_width(full, full) == 4
    assert vector_width(half[:, :76], half[:, :76]) == 4 and vector_width(half[:, :75], half[:, :75]) == 1
    assert vector_width(half, torch.empty(80, 4, dtype=torch.bfloat16).t()) == 1
    assert vector_width(half, torch.empty(4, 81, dtype=torch.bfloat16)[:, :80]) == 1
    assert vector_width(half, half, torch.empty(4, 84)[:, :80]) == 4


# -- scale_unless_one ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0, -2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 2])
def test_scale_unless_one(dtype, factor, count):
    from fastgist_kernels.scale import scale_unless_one

    for rows, classes in ((3, 1001), (1, 1), (40, 128)):
        grads = [torch.randn(rows, classes, device=DEVICE).to(dtype) for _ in range(count)]
        wanted = [(g.float() * factor).to(dtype) for g in grads]
        scale_unless_one(grads, torch.tensor(factor, device=DEVICE))
        for g, w in zip(grads, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


def test_scale_by_one_touches_nothing(monkeypatch):
    """Not even NaN's bits; and no rows are no launch."""
    from fastgist_kernels.scale import scale_unless_one

    bits = torch.tensor([[0x7FC12345, 0x7F812345]], dtype=torch.int32, device=DEVICE)
    grads = [bits.clone().view(torch.float32), bits.clone().view(torch.float32)]
    scale_unless_one(grads, torch.ones((), device=DEVICE))
    assert all(torch.equal(g.view(torch.int32), bits) for g in grads)
    scale_unless_one([torch.empty(0, 5, device=DEVICE)], torch.tensor(2.0, device=DEVICE))


# -- Triton or CUDA C++ ----------------------------------------------------------------------------------------------


def test_a_card_decides_between_triton_and_cuda(monkeypatch):
    """By the launch tables' entry of the loss, architecture and number of classes; Triton where there is none."""
    from fastgist.ops import _common
    from fastgist_kernels import common

    table = {
        ("bidirectional_kl_impl", "sm_90", "v32768"): {"cuda": 1},
        ("gist_loss_impl", "sm_90", "v1024"): {"cuda": 0},
    }
    monkeypatch.setattr(common, "device_arch", lambda device: "sm_90")
    monkeypatch.setattr(common, "launch_config", lambda *key: table.get(key, {}))
    at = lambda op, classes: _common._quicker.__wrapped__(op, torch.device("cuda", 0), classes)  # noqa: E731
    assert at("bidirectional_kl", 32000) == at("bidirectional_kl", 16385) == "cuda"
    assert at("bidirectional_kl", 1000) == at("gist_loss", 1000) == at("gist_loss", 32000) == "triton"
