"""InformationBottleneckLoss: gradients of scores and values of bounds against Gaussians, whose information is known."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgist.nn import InformationBottleneckLoss
from fastgist.nn._estimators import Club, Mine, as_tokens, dense, stein_score
from fastgist.testing import assert_within_budget

NARROW: dict[str, Any] = {"z_dim": 12, "x_dim": 10, "y_dim": 20}


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum() / a.double().norm() / b.double().norm())


def pair(rows: int, width: int, rho: float) -> tuple[Tensor, Tensor]:
    left = torch.randn(rows, width)
    return left, rho * left + math.sqrt(1 - rho**2) * torch.randn(rows, width)


def batch(rows: int = 4, tokens: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.randint(0, 20, (rows, 3)) if tokens else torch.randn(rows, 20)
    return torch.randn(rows, 12, requires_grad=True), torch.randn(rows, 10), y


@pytest.mark.parametrize("rows", [2, 16])
def test_the_gradient_of_compression_has_the_analytic_direction(rows: int) -> None:
    torch.manual_seed(0)
    mix = torch.randn(1408, 8) @ torch.randn(8, 768) / (8 * 1408) ** 0.5
    loss = InformationBottleneckLoss(768, compression="score", relevance=None, eta=1.0, bank=512)
    for _ in range(512 // rows):
        z = (torch.randn(rows, 1408) @ mix).requires_grad_()
        loss(z).backward()
        assert not z.grad.any()  # until the bank is full
    value = loss(z.grad.zero_() + z)
    value.backward()
    basis = loss.z_projection.double()
    covariance = basis.T @ (mix.T @ mix).double() @ basis + 0.25 * torch.eye(8, dtype=torch.float64)
    exact = z.detach().double() @ basis @ torch.linalg.inv(covariance) @ basis.T
    assert float(value.detach()) == 0.0
    assert cosine(z.grad, exact) >= 0.9
    assert 0.8 < float(z.grad.norm() * rows / exact.norm()) < 1.25


def relevance_gradient(rho: float) -> tuple[Tensor, Tensor]:
    """Ours and the analytic one of -I(W^T z; P^T y) in z; both depend on four directions."""
    torch.manual_seed(0)
    to_z, to_y = torch.randn(4, 768) / 2, torch.randn(4, 1000)
    loss = InformationBottleneckLoss(768, y_dim=1000, compression=None, relevance="score", eta=1.0)
    for step in range(33):
        h, n = pair(32, 4, rho)
        z, y = (n @ to_z).requires_grad_(), h @ to_y
        loss(z, None, y).backward()
        assert step == 32 or not z.grad.any()
    basis, a = loss.z_projection[:, :4].double(), to_z.double()
    a, b = a @ basis, to_y.double() @ loss.y_projection.double()
    marginal = a.T @ a + 0.25 * torch.eye(4, dtype=torch.float64)
    back = torch.linalg.solve(b.T @ b, rho * b.T @ a)  # E[u | q] = q back
    conditional = marginal - rho * a.T @ b @ back
    u, q = z.detach().double() @ basis, y.double() @ loss.y_projection.double()
    score = -(u - q @ back) @ torch.linalg.inv(conditional) + u @ torch.linalg.inv(marginal)
    return z.grad * 32, -score @ basis.T


def test_the_gradient_of_relevance_has_the_analytic_direction_and_vanishes_without_dependence() -> None:
    ours, exact = relevance_gradient(0.9)
    assert cosine(ours, exact) >= 0.9
    independent, zero = relevance_gradient(0.0)
    assert float(zero.norm()) < 1e-6
    assert float(independent.norm()) < 0.2 * float(ours.norm())


def test_compression_of_a_z_that_says_nothing_of_x_has_no_gradient() -> None:
    torch.manual_seed(0)
    loss = InformationBottleneckLoss(768, compression="score", relevance=None, eta=1.0)
    z = torch.ones(32, 768, requires_grad=True)
    for _ in range(33):
        z.grad = None
        loss(z).backward()
    one_sided = 8**0.5 / 0.5  # a row's score, -eps / sigma, without its pair
    assert float(z.grad.norm(dim=1).mean() * 32) < 0.1 * one_sided


@pytest.mark.parametrize("degree", [1, 2])
def test_stein_score_is_that_of_eigh(degree: int) -> None:
    torch.manual_seed(0)
    samples, at = torch.randn(512, 4).double(), torch.randn(9, 4).double()
    count = 5 if degree == 1 else 15
    factor = torch.linalg.cholesky(torch.cov(samples.T))
    white, points = ((t - samples.mean(0)) @ torch.linalg.inv(factor).T for t in (samples, at))
    gram, cross = (torch.exp(-(torch.cdist(t, white) ** 2) / 32) for t in (white, points))
    gradients = (white * gram.sum(1, keepdim=True) - gram @ white) / 16
    values, vectors = (part[..., -count:] for part in torch.linalg.eigh(gram))
    exact = -cross @ vectors @ ((vectors.T @ gradients) / values[:, None] ** 2) @ torch.linalg.inv(factor)
    assert cosine(stein_score(samples, at, degree), exact) > 0.999


def test_club_and_mine_near_their_values() -> None:
    torch.manual_seed(0)
    club, mine = Club(2, 2, 32, 1e-2, 1), Mine(2, 2, 64, 5e-3, 1)
    read: dict[str, list[float]] = {"club": [], "mine": []}
    for _ in range(500):
        left, right = pair(64, 2, 0.5)
        read["club"].append(float(club(left, right, torch.randint(1, 64, (1,)))))
        club.fit(left, right)
        left, right = pair(64, 2, 0.8)
        read["mine"].append(float(mine(left, right)))
        mine.fit(left, right)
    club_value, mine_value = (sum(v[-150:]) / 150 for v in read.values())
    assert club_value == pytest.approx(2 * 0.25 / 0.75, rel=0.15)  # the bound of an exact q, not I
    assert club_value > -math.log(0.75)
    assert mine_value == pytest.approx(-math.log(0.36), rel=0.15)


@pytest.mark.parametrize("rows", [2, 5])
def test_clubs_gathered_columns_equal_the_dense_form(rows: int) -> None:
    torch.manual_seed(0)
    club = Club(6, 20, 8, 1e-2, 3)
    ids = torch.randint(0, 20, (rows, 4))
    ids[0], ids[1, 2:] = 7, -100  # a token four times, padding
    tokens, shift = as_tokens(ids, 20, -100, torch.float32), torch.tensor([1])
    for _ in range(5):
        club.fit(torch.randn(rows, 6), tokens)
    source = torch.randn(rows, 6)
    results = []
    for dtype, target in (
        (torch.float32, tokens),
        (torch.float32, dense(tokens, 20)),
        (torch.float64, dense(tokens, 20).double()),
    ):
        club.to(dtype)
        leaf = source.to(dtype, copy=True).requires_grad_()
        value = club(leaf, target, shift)
        value.backward()
        results.append((value.detach(), leaf.grad))
    for ours, plain, exact in zip(*results, strict=True):
        scale = float(club.var_out.abs().max() + 1) * max(float(exact.abs().max()), 1.0)
        assert_within_budget(ours, plain, exact, scale=scale)
    assert results[2][1].abs().max() > 0


def test_released_has_the_opposite_signs_and_its_constants() -> None:
    loss = InformationBottleneckLoss(**NARROW, preset="released", eta=2.0)
    assert (loss.b, loss.sigma, loss.club.width, loss.club.source) == (0.1, 0.0, 20, 12)
    assert loss.club.mu_in.shape == (32, 12) and loss.mine.left.shape == (12, 64) and loss.mine.right.shape == (10, 64)
    for _ in range(20):
        value = loss(*batch(tokens=True))
    terms = loss.values
    assert terms["compression"] != 0 and terms["relevance"] != 0
    torch.testing.assert_close(value.detach(), 2.0 * (terms["compression"] - 0.1 * terms["relevance"]))


CHOICES = [("score", "score"), ("club", "mine"), ("score", "mine"), ("club", "score")]


@pytest.mark.parametrize(("compression", "relevance"), CHOICES)
def test_resumes_from_its_state_dict_bit_for_bit(compression: str, relevance: str) -> None:
    torch.manual_seed(0)
    loss = InformationBottleneckLoss(
        **NARROW, compression=compression, relevance=relevance, projection="learned", bank=512
    )
    assert not list(loss.parameters())
    for _ in range(3):
        loss(*batch(200))
    state = copy.deepcopy(loss.state_dict())
    fresh = InformationBottleneckLoss(
        **NARROW, compression=compression, relevance=relevance, projection="learned", bank=512
    )
    fresh.load_state_dict(state)
    grads = []
    for module in (loss, fresh):
        torch.manual_seed(1)
        for _ in range(2):
            inputs = batch(2)
            module(*inputs).backward()
        assert inputs[0].grad.isfinite().all() and inputs[0].grad.any()
        grads.append(inputs[0].grad)
    assert torch.equal(*grads)
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(*batch())
    assert all(torch.equal(a, before[name]) for name, a in loss.state_dict().items())


@pytest.mark.parametrize(("compression", "relevance"), CHOICES)
def test_a_bad_row_is_not_learned_and_half_precision_is_left_outside(compression: str, relevance: str) -> None:
    torch.manual_seed(0)
    loss = InformationBottleneckLoss(**NARROW, compression=compression, relevance=relevance, bank=512).bfloat16()
    for step in range(4):
        z, x, y = batch(200)
        if step == 3:
            z.data[0] = math.inf
        with torch.autocast("cpu", torch.bfloat16):
            assert loss(z.bfloat16(), x.bfloat16(), y).dtype == torch.float32
    for name, buffer in loss.state_dict().items():
        assert buffer.dtype in (torch.float32, torch.int64) and buffer.isfinite().all(), name


@pytest.mark.parametrize(("compression", "relevance"), CHOICES)
def test_nothing_asks_for_a_value_on_the_host(compression: str, relevance: str) -> None:
    with FakeTensorMode():  # a fake tensor has none to give
        loss = InformationBottleneckLoss(**NARROW, compression=compression, relevance=relevance, projection="learned")
        loss(*batch()).backward()


BAD = [
    ({"eta": -1.0}, "eta"),
    ({"b": math.nan}, "b must"),
    ({"dims": 9}, "dims"),
    ({"bank": 511}, "512"),
    ({"sigma": 0.0}, "sigma"),
    ({"compression": "mine"}, "compression"),
    ({"relevance": "club"}, "relevance"),
    ({"preset": "paper"}, "preset"),
    ({"y_dim": None}, "y_dim"),
    ({"compression": "club", "x_dim": None}, "x_dim"),
    ({"z_dim": 4}, "dims=8"),
    ({"club_hidden": 0}, "club_hidden"),
]


@pytest.mark.parametrize(("change", "named"), BAD)
def test_bad_options_are_named(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        InformationBottleneckLoss(**{**NARROW, **change})


def test_bad_inputs_are_named() -> None:
    loss = InformationBottleneckLoss(**NARROW, compression="club", relevance="mine")
    z, x, y = batch()
    for inputs, named in (
        ((z[:, 1:], x, y), "z of shape"),
        ((z, None, y), "needs x"),
        ((z, x[1:], y), "4 rows of x"),
        ((z, x, torch.full((4, 2), 20)), "token 20"),
        ((z, x, torch.zeros(4, 2, dtype=torch.int32)), "int64"),
    ):
        with pytest.raises(ValueError, match=named):
            loss(*inputs)
    assert float(loss(*(t[:1] for t in (z, x, y))).detach()) == 0.0
    assert float(loss(*(t[:0] for t in (z, x, y))).detach()) == 0.0
