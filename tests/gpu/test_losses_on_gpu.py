"""The CUDA C++ forwards that finish the gradients, torch.ops.fastgist_native.*_fwd_bwd, and gist_loss in two calls, on every
way that csrc/cuda/plan.h chooses, against float64. Needs a GPU; has not run on one.

tests/aot/test_csrc.py runs the same kernels on an emulated device.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from losses import gradient_terms, loss_terms
from torch import Tensor

from fastgist import _extension
from fastgist.reference.bidirectional_kl import bidirectional_kl as kl_formula
from fastgist.reference.gist_loss import gist_loss as gist_formula
from fastgist.testing import assert_within_budget, layouts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _extension.has_cuda(), reason="the extension was built without CUDA kernels"),
]

DEVICE = "cuda"
INF, NAN = float("inf"), float("nan")
HALF = [torch.bfloat16, torch.float16]
#: A warp a row; a block; clusters of 2, 4, 8 (and 16 in float32); rows that no cluster keeps. Odd ones begin anywhere.
SIZES = [1, 2, 127, 1000, 1024, 1025, 4097, 28_000, 32_000, 50_257, 128_256, 131_073, 262_144, 1_000_000]
KINDS = ["classes", "smoothed", "soft", "soft float32", "T=1.7"]
SCALE, IGNORED = 1.5, -100
native = torch.ops.fastgist_native


def rows_for(classes: int) -> int:
    """More than a GPU works on at once, so that a warp or cluster takes several."""
    return (
        3001
        if classes <= 1024
        else 281
        if classes <= 30_000
        else 141
        if classes <= 60_000
        else 71
        if classes < 10**6
        else 5
    )


def accumulates(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    z, o = (torch.randn(rows, classes, device=DEVICE) * 3 for _ in range(2))
    return z.to(dtype), (o + 20).to(dtype)  # an offset between the heads, which must not cost anything


@dataclass
class Gist:
    """Target and options of a gist_loss."""

    target: Tensor
    alpha: float = 0.5
    beta: float = 0.75
    beta_z: float = 0.75
    beta_o: float = 0.75
    temperature: float = 3.0
    smoothing: float = 0.0

    def options(self) -> tuple:
        betas = (self.alpha, self.beta, self.beta_z, self.beta_o)
        return (*betas, self.temperature, self.smoothing, IGNORED)

    @classmethod
    def of(cls, kind: str, rows: int, classes: int, dtype: torch.dtype, **options) -> Gist:
        if kind.startswith("soft"):
            weights = torch.randn(rows, classes, device=DEVICE).softmax(-1)
            weights = torch.where(torch.rand(rows, classes, device=DEVICE) < 0.3, 0.0, weights)
            return cls(weights if kind == "soft float32" else weights.to(dtype), smoothing=0.1, **options)
        target = torch.randint(classes, (rows,), device=DEVICE)
        target[1::5] = IGNORED
        changes = {"smoothed": {"smoothing": 0.2}, "T=1.7": {"temperature": 1.7}}.get(kind, {})
        return cls(target, **changes, **options)


def finish(z, o, gist: Gist | None = None, mask=None, divisor=None, need=(True, True), temperature=3.0, scale=SCALE):
    """(row_loss, loss, grad_z, grad_o) from outputs that were NaN before."""
    dtype = accumulates(z.dtype)
    row_loss = torch.full((z.shape[0],), NAN, dtype=dtype, device=z.device)
    loss = torch.full((), NAN, dtype=dtype, device=z.device)
    grads = [torch.full(z.shape, NAN, dtype=z.dtype, device=z.device) if n else None for n in need]
    if gist is None:
        native.bidirectional_kl_fwd_bwd(z, o, mask, divisor, temperature, scale, row_loss, loss, *grads)
    else:
        native.gist_loss_fwd_bwd(z, o, gist.target, divisor, *gist.options(), scale, row_loss, loss, *grads)
    return row_loss, loss, *grads


def by_formula(z, o, gist: Gist | None, mask, factor: float, to: torch.dtype, temperature=3.0):
    """The same by autograd through plain PyTorch, in dtype ``to``."""
    z, o = (x.detach().to(to).requires_grad_() for x in (z, o))
    if gist is None:
        row_loss = kl_formula(z, o, temperature=temperature, reduction="none", mask=mask)
    else:
        target = gist.target.to(to) if gist.target.is_floating_point() else gist.target
        options = {"alpha": gist.alpha, "temperature": gist.temperature, "label_smoothing": gist.smoothing}
        row_loss = gist_formula(z, o, target, beta=gist.beta, ignore_index=IGNORED, reduction="none", **options)
    grads = torch.autograd.grad(row_loss.sum() * factor, (z, o))
    row_loss = row_loss.detach() * factor
    return row_loss, row_loss.sum(), *grads


def check(z, o, gist: Gist | None = None, mask=None, divisor: float | None = None) -> None:
    """Against float64 within the budget, the plain formula in the same dtype as the peer."""
    given = None if divisor is None else torch.tensor(divisor, dtype=accumulates(z.dtype), device=DEVICE)
    ours = finish(z, o, gist, mask, given)
    hold(ours, z, o, gist, mask, SCALE / (divisor or 1.0))


def hold(ours, z, o, gist, mask, factor: float) -> None:
    plain = by_formula(z, o, gist, mask, factor, z.dtype)
    exact = by_formula(z, o, gist, mask, factor, torch.float64)
    temperature = 3.0 if gist is None else gist.temperature
    terms, size = loss_terms(z, o, temperature), gradient_terms(z, o, temperature)
    if gist is not None:
        spread = max(float((x.double().amax(-1) - x.double().amin(-1)).max()) for x in (z, o))
        # d comes of two centred logits, which may be larger than it is.
        terms, size = 2 * spread + gist.beta * terms, 2 + gist.beta * (size + spread / temperature)
    scales = (factor * terms, factor * terms * z.shape[0], factor * size, factor * size)
    for what, mine, p, e, scale in zip(
        ("row_loss", "loss", "grad_z", "grad_o"), ours, plain, exact, scales, strict=True
    ):
        if mine is None:
            continue
        if z.dtype == torch.float64:  # there is nothing more exact to hold it against: two ways of rounding
            assert float((mine - e).abs().max()) <= 32 * torch.finfo(torch.float64).eps * scale, what
        else:
            assert_within_budget(mine, p.to(mine.dtype), e, what=what, scale=scale)


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("classes", SIZES)
def test_bidirectional_kl_agrees_with_float64(classes, dtype):
    rows = rows_for(classes)
    mask = torch.rand(rows, device=DEVICE) < 0.8
    check(*logits(rows, classes, dtype), mask=mask, divisor=float(mask.sum().clamp(min=1)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("classes", SIZES)
def test_gist_loss_agrees_with_float64(classes, dtype):
    rows = rows_for(classes)
    for kind in KINDS if classes <= 4097 else KINDS[:1] if classes >= 10**6 else KINDS[:3]:
        check(*logits(rows, classes, dtype), Gist.of(kind, rows, classes, dtype), divisor=float(rows))


@pytest.mark.parametrize("classes", [1, 127, 1025, 32_000])
def test_float64(classes):
    z, o = logits(37, classes, torch.float64)
    check(z, o, divisor=3.0)
    for kind in KINDS:
        check(z, o, Gist.of(kind, 37, classes, torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 0.5])
@pytest.mark.parametrize("classes", [1000, 32_000])
def test_temperatures_of_gist_loss(classes, temperature):
    gist = Gist(torch.randint(classes, (64,), device=DEVICE), temperature=temperature)
    check(*logits(64, classes, torch.float32), gist)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [1, 127, 1000, 4097, 50_257])
@pytest.mark.parametrize("kind", KINDS)
def test_gist_loss_in_two_calls(classes, dtype, kind):
    rows = 37
    z, o = logits(rows, classes, dtype)
    gist = Gist.of(kind, rows, classes, dtype)
    row_loss = torch.full((rows,), NAN, dtype=accumulates(dtype), device=DEVICE)
    stats = torch.full((9, rows), NAN, dtype=accumulates(dtype), device=DEVICE)
    native.gist_loss_fwd(z, o, gist.target, *gist.options(), row_loss, stats)
    row_grad = torch.full((rows,), SCALE, dtype=accumulates(dtype), device=DEVICE)
    for row_grads in (row_grad, row_grad[:1].expand(rows)):
        grads = [torch.full_like(z, NAN) for _ in range(2)]
        native.gist_loss_bwd(z, o, gist.target, stats, row_grads, *gist.options(), *grads)
        hold((row_loss * SCALE, row_loss.sum() * SCALE, *grads), z, o, gist, None, SCALE)


# -- layouts and sides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [65, 1000, 3000, 33_001])
@pytest.mark.parametrize("with_gist", [False, True])
def test_every_layout(classes, dtype, with_gist):
    z, o = logits(9, classes, dtype)
    gist = Gist.of("soft", 9, classes, dtype) if with_gist else None
    wide = torch.full((9, classes + 24), NAN, dtype=dtype, device=DEVICE)
    begins_later = [(f"begins {at} later", wide.clone()[:, at : at + classes].copy_(z)) for at in (1, 8)]
    for _, z_as in [*layouts(z), *begins_later]:
        for _, o_as in layouts(o):
            hold(finish(z_as, o_as, gist), z, o, gist, None, SCALE)
    hold(finish(z[:1].expand(9, classes), o, gist), z[:1].expand(9, classes), o, gist, None, SCALE)


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("classes", [100, 5000, 50_257, 300_000])
@pytest.mark.parametrize("with_gist", [False, True])
def test_sides_that_want_no_gradient(need, classes, with_gist):
    z, o = logits(7, classes, torch.bfloat16)
    gist = Gist.of("classes", 7, classes, torch.bfloat16) if with_gist else None
    both = finish(z, o, gist)
    for mine, wanted, needed in zip(finish(z, o, gist, need=need), both, (True, True, *need), strict=True):
        assert torch.equal(mine, wanted) if needed else mine is None


@pytest.mark.parametrize("classes", [100, 5000, 50_257, 300_000])
@pytest.mark.parametrize("side", ["z", "o"])
def test_a_side_detached_from_the_divergence(classes, side):
    """Its gradient is the cross-entropy's alone, whatever the other side holds."""
    z, o = logits(7, classes, torch.float32)
    gist = Gist.of("classes", 7, classes, torch.float32, **{f"beta_{side}": 0.0})
    whole = Gist(**{**vars(gist), "beta_z": 0.75, "beta_o": 0.75})
    alone = Gist(**{**vars(gist), "beta": 0.0, "beta_z": 0.0, "beta_o": 0.0})
    ours, with_it, without = (finish(z, o, g) for g in (gist, whole, alone))
    at = 2 if side == "z" else 3
    torch.testing.assert_close(ours[at], without[at])
    assert torch.equal(ours[5 - at], with_it[5 - at])
    assert torch.equal(ours[0], with_it[0])
    other = o if side == "z" else z
    other[2, classes // 2], other[3, 0] = -INF, NAN
    torch.testing.assert_close(finish(z, o, gist)[at], finish(z, o, alone)[at], equal_nan=False)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("classes", [100, 5000, 300_000])
def test_an_absent_term_brings_nothing_across(bad, classes):
    z, o = logits(4, classes, torch.float32)
    o[:, 5:9] = bad
    target = torch.randint(classes, (4,), device=DEVICE)
    row_loss, loss, grad_z, grad_o = finish(z, o, Gist(target, 0.0, 0.0, 0.0, 0.0), scale=1.0)
    leaf = z.clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    wanted.sum().backward()
    torch.testing.assert_close(row_loss, wanted.detach())
    torch.testing.assert_close(loss, wanted.detach().sum())
    torch.testing.assert_close(grad_z, leaf.grad)
    assert not grad_o.any()


# -- special values --------------------------------------------------------------------------------------------------

WAYS = [7, 900, 5000, 50_257, 131_073, 600_000]


@pytest.mark.parametrize("classes", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_do_not_count_are_not_read(classes, dtype):
    z, o = logits(150, classes, dtype)
    mask = torch.rand(150, device=DEVICE) < 0.5
    target = torch.randint(classes, (150,), device=DEVICE).masked_fill(~mask, IGNORED)
    wanted = finish(z, o, mask=mask), finish(z, o, Gist(target))
    z[~mask], o[~mask] = NAN, INF
    for ours, theirs in zip((finish(z, o, mask=mask), finish(z, o, Gist(target))), wanted, strict=True):
        for mine, his in zip(ours, theirs, strict=True):
            assert torch.equal(mine, his)
        assert not any(x[~mask].any() for x in (ours[0], *ours[2:]))


@pytest.mark.parametrize("classes", WAYS)
def test_absent_classes(classes):
    """-inf on both sides: the result is that of the row without those classes."""
    z, o = logits(4, classes, torch.float32)
    absent = torch.arange(classes, device=DEVICE) % 3 == 0
    z[:, absent] = o[:, absent] = -INF
    label = torch.arange(4, device=DEVICE) * 3 % (classes - 1) + 1
    label[label % 3 == 0] -= 2
    gist = Gist(label)
    without = Gist(label - label // 3 - 1)
    for ours, near in (
        (finish(z, o), finish(z[:, ~absent], o[:, ~absent])),
        (finish(z, o, gist), finish(z[:, ~absent], o[:, ~absent], without)),
    ):
        torch.testing.assert_close(ours[0], near[0], rtol=1e-5, atol=1e-5)
        for grad, wanted in zip(ours[2:], near[2:], strict=True):
            assert not grad[:, absent].any()
            torch.testing.assert_close(grad[:, ~absent], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("bad_z", "bad_o", "expected"),
    [(-INF, None, INF), (None, -INF, INF), (NAN, None, NAN), (None, NAN, NAN), (INF, None, NAN), (INF, -INF, NAN)],
)
@pytest.mark.parametrize("classes", WAYS)
def test_what_is_bad_stays_in_its_row(classes, bad_z, bad_o, expected):
    z, o = logits(40, classes, torch.float32)
    target = torch.full((40,), 1, device=DEVICE)
    for where in (0, classes // 2, classes - 1):
        for gist in (None, Gist(target)):
            clean = finish(z, o, gist)
            z_bad, o_bad = z.clone(), o.clone()
            if bad_z is not None:
                z_bad[2, where] = bad_z
            if bad_o is not None:
                o_bad[2, where] = bad_o
            row_loss, loss, *grads = finish(z_bad, o_bad, gist)
            others = torch.arange(40, device=DEVICE) != 2
            for mine, his in ((row_loss, clean[0]), *zip(grads, clean[2:], strict=True)):
                assert torch.equal(mine[others], his[others])
            for number in (row_loss[2], loss):
                assert number == INF if expected == INF else number.isnan()
            assert all(grad[2].isnan().all() for grad in grads)


@pytest.mark.parametrize("classes", WAYS)
def test_a_target_that_is_no_class(classes):
    z, o = logits(5, classes, torch.bfloat16)
    target = torch.tensor([0, classes, 1, -1, IGNORED], device=DEVICE)
    row_loss, loss, *grads = finish(z, o, Gist(target))
    wrong = [False, True, False, True, False]
    assert row_loss.isnan().tolist() == wrong
    assert loss.isnan()
    assert all(grad.isnan().all(-1).tolist() == wrong for grad in grads)
    assert all(grad[[0, 2, 4]].isfinite().all() for grad in grads)


def test_equal_logits_have_no_loss_and_no_gradient():
    for classes in WAYS:
        z, _ = logits(3, classes, torch.float32)
        assert not any(x.any() for x in finish(z, z.clone()))


@pytest.mark.parametrize(("rows", "classes"), [(0, 5), (3, 0), (0, 0)])
def test_empty(rows, classes):
    row_loss, loss, grad_z, grad_o = finish(*logits(rows, classes, torch.float32))
    assert loss == 0
    assert not row_loss.any()
    assert grad_z.shape == grad_o.shape == (rows, classes)


# -- determinism, graphs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reruns_are_bitwise_equal(classes, dtype):
    rows = min(rows_for(classes), 300)
    z, o = logits(rows, classes, dtype)
    for gist in (None, Gist.of("classes", rows, classes, dtype), Gist.of("soft", rows, classes, dtype)):
        first = finish(z, o, gist)
        for _ in range(100):
            for mine, his in zip(finish(z, o, gist), first, strict=True):
                assert torch.equal(mine.nan_to_num(), his.nan_to_num())


@pytest.mark.parametrize("classes", WAYS)
def test_replay_of_a_graph_equals_eager(classes):
    z, o = logits(40, classes, torch.bfloat16)
    gist = Gist.of("classes", 40, classes, torch.bfloat16)
    wanted = finish(z, o, gist)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        finish(z, o, gist)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = finish(z, o, gist)
    for x in held:
        x.fill_(NAN)
    graph.replay()
    for mine, his in zip(held, wanted, strict=True):
        assert torch.equal(mine, his)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divisor": torch.ones(2)}, "divisor must hold one number, got 2"),
        ({"divisor": torch.ones((), dtype=torch.float64)}, "divisor must be Float, got Double"),
        ({"loss": torch.ones(3)}, "loss must hold one number, got 3"),
        ({"row_loss": torch.ones(2)}, r"row_loss of shape \(3,\)"),
        ({"grad_logits": torch.ones(3, 4).half()}, "grad_logits must be Float, got Half"),
        ({"grad_other": torch.ones(4, 3).T}, "grad_other must be contiguous"),
    ],
)
def test_bidirectional_kl_refuses(change, message):
    z, o = logits(3, 4, torch.float32)
    arguments = {"logits": z, "other_logits": o, "mask": None, "divisor": None, "temperature": 1.0, "scale": 1.0}
    arguments |= {"row_loss": z[:, 0].clone(), "loss": z[0, 0].clone(), "grad_logits": None, "grad_other": None}
    arguments |= {name: x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(RuntimeError, match=rf"fastgist_native::bidirectional_kl_fwd_bwd: .*{message}"):
        native.bidirectional_kl_fwd_bwd(**arguments)


def test_gist_loss_refuses_two_weights_of_the_divergence():
    z, o = logits(3, 4, torch.float32)
    gist = Gist(torch.zeros(3, dtype=torch.int64, device=DEVICE), beta_z=0.5, beta_o=0.75)
    with pytest.raises(RuntimeError, match="beta_logits and beta_gist must be equal unless one is 0, got 0.5 and 0.75"):
        finish(z, o, gist)
