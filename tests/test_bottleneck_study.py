"""scripts/bottleneck_study.py: its page and the docstring say what its JSON holds, and its cells measure what they name; the
estimators at their smallest batch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_bottleneck import cosine, pair
from test_scripts import _load

from fastgist.nn import InformationBottleneckLoss
from fastgist.nn._estimators import Club, Mine

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def study():
    return _load("scripts/bottleneck_study.py")


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads((ROOT / "docs" / "studies-bottleneck.json").read_text())


def test_the_docstring_says_what_was_measured(study, found) -> None:
    said = " ".join((InformationBottleneckLoss.__doc__ or "").split())
    claims = list(study.claims(found))
    assert len(claims) == 19
    for claim in claims:
        assert claim in said, f"not in the docstring: {claim}"


def test_the_page_is_the_json_of_these_cells(study, found) -> None:
    assert (ROOT / "docs" / "bottleneck.md").read_text() == study.page(found), (
        "python scripts/bottleneck_study.py --page"
    )
    assert [(r["table"], r["name"], r["options"]) for r in found["rows"]] == [
        (c.table, c.name, c.options) for c in study.CELLS
    ]
    assert found["seeds"] == list(study.SEEDS)
    assert all(len(v) == 3 and all(map(math.isfinite, v)) for r in found["rows"] for v in r["values"].values())


def test_its_cells_tell_a_good_estimate_from_noise(study) -> None:
    """Cheap ones of the page, run again; narrow bounds would hold on one machine alone."""
    cells = {c.name: c for c in study.CELLS}

    def again(name: str, seed: int = 0) -> dict[str, float]:
        return cells[name].run(seed, **cells[name].options)

    assert again("two clusters, degree 1")["cosine"] < 0.5
    assert abs(again(study.PUBLISHED)["cosine"]) < 0.1
    small = again("MINE, two wide, B = 64")
    assert small["read"] == pytest.approx(small["truth"], rel=0.15) and small["nats"] == pytest.approx(-math.log(0.36))


def test_between_and_claims_read_the_right_numbers(study) -> None:
    assert study.between([0.1234, 0.5], 2) == "0.12 to 0.50"
    assert study.between([0.501, 0.499], 2) == "0.50"
    assert study.between([-0.001, 0.001], 2) == "0.00"
    rows = [{"name": "a", "values": {"x": [1.0]}}, {"name": "b", "values": {"x": [2.0]}}]
    assert study.of({"rows": rows}, "b", "x") == [2.0]


# -- the estimators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rows", [2, 16])
def test_compression_has_the_analytic_direction_at_every_seed(rows, seed) -> None:
    """With x of another spread than the page's, and the bank filled in a few large calls."""
    torch.manual_seed(seed)
    mix = torch.randn(64, 8) @ torch.randn(8, 96) / (8 * 64) ** 0.5
    loss = InformationBottleneckLoss(96, compression="score", relevance=None, eta=1.0, bank=512)
    for _ in range(2):
        loss(torch.randn(256, 64) @ mix)
    z = (torch.randn(rows, 64) @ mix).requires_grad_()
    loss(z).backward()
    basis = loss.z_projection.double()
    covariance = basis.T @ (mix.T @ mix).double() @ basis + 0.25 * torch.eye(8, dtype=torch.float64)
    exact = z.detach().double() @ basis @ torch.linalg.inv(covariance) @ basis.T
    assert cosine(z.grad, exact) >= 0.9
    assert 0.7 < float(z.grad.norm() * rows / exact.norm()) < 1.4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_relevance_has_the_analytic_direction_at_every_seed(study, seed, monkeypatch) -> None:
    monkeypatch.setattr(study, "Z", 96)
    monkeypatch.setattr(study, "Y", 100)
    dependent, independent = study.relevance(seed, 0.9), study.relevance(seed, 0.0)
    assert dependent["cosine"] >= 0.9
    assert independent["norm"] < 0.3 * dependent["norm"] and independent["nats"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["club", "mine"])
def test_two_rows_a_step_stay_finite_and_bounded(kind, seed) -> None:
    """200 steps at B = 2, of the estimator alone and through the loss: weights, values and gradients."""
    torch.manual_seed(seed)
    estimator = Club(3, 3, 16, 1e-2, 1) if kind == "club" else Mine(3, 3, 16, 1e-2, 1)
    loss = InformationBottleneckLoss(
        3, 3, 3, eta=1.0, compression="club" if kind == "club" else None, relevance=None if kind == "club" else "mine"
    )
    values, sizes = [], []
    for _ in range(200):
        left, right = pair(2, 3, 0.8)
        leaf = left.clone().requires_grad_()
        value = estimator(leaf, right, *([torch.tensor([1])] if kind == "club" else []))
        value.backward()
        values.append(float(value.detach()))
        estimator.fit(left, right)
        z = right.clone().requires_grad_()
        loss(z, left, left).backward()
        sizes += [float(leaf.grad.norm()), float(z.grad.norm())]
    assert all(map(math.isfinite, (*values, *sizes)))
    read = sum(values[100:]) / 100
    nats = -1.5 * math.log(1 - 0.64)
    exact = 3 * 0.64 / 0.36 if kind == "club" else nats
    assert 0.2 * nats < read < 2 * exact, "neither asleep nor away"
    assert max(map(abs, values)) < 100 and max(sizes) < 100
    assert max(float(b.abs().max()) for b in (*estimator.buffers(), *loss.buffers())) < 250  # steps are counted, too
