"""scripts/numerics.py: what its tables claim, on a few of their rows, and that the committed page is of these tables."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_scripts import _load

from benchmarks import peers
from fastgist import backends, functional

ROOT = Path(__file__).parents[1]
OP = "bidirectional_kl"


@pytest.fixture(scope="module")
def numerics():
    return _load("scripts/numerics.py")


def ours(op: str):
    return lambda *args: getattr(functional, op)(*args[:-1], temperature=args[-1])


def rows(numerics):
    small = (t for t in numerics.TABLES if t.title != "By classes")
    return [(table.title, row, problem) for table in small for row, problem in table.problems.items()]


@pytest.mark.parametrize("op", ["bidirectional_kl", "gist_loss"])
def test_nothing_of_the_tables_takes_us_far_from_float64(numerics, op):
    peer = peers.log_softmax_kl if op == "bidirectional_kl" else peers.gist(peers.log_softmax_kl)
    for title, row, problem in rows(numerics):
        found, other = numerics.error(op, problem, ours(op)), numerics.error(op, problem, peer)
        where = f"{op}, {title}, {row}: {found}, log_softmax form {other}"
        assert math.isfinite(found.loss), where
        assert math.isfinite(found.gradient), where
        if math.isfinite(other.gradient):
            assert found.gradient <= 2 * other.gradient + 1e-6, where


def test_the_authors_expression_leaves_the_numbers_at_the_gap_the_page_says(numerics):
    problems = {row: problem for title, row, problem in rows(numerics) if title == "A gap between the heads"}
    found = {row: numerics.error(OP, problem, peers.authors_kl) for row, problem in problems.items()}
    assert math.isfinite(found["100"].gradient)
    assert not math.isfinite(found["320"].gradient)


def test_an_error_is_of_the_rounded_inputs_and_sees_a_wrong_result(numerics):
    problem = replace(numerics.BASE, dtype="bfloat16", classes=50, rows=4)
    right = numerics.error(OP, problem, ours(OP))
    assert right.loss < 1e-6  # float32 sums: of the unrounded inputs it would be 1e-3
    wrong = numerics.error(OP, problem, lambda z, g, t: functional.bidirectional_kl(z, g, temperature=1.001 * t))
    assert wrong.loss > 1e-4


def test_page_and_figure(numerics, monkeypatch, tmp_path):
    monkeypatch.setattr(numerics, "TABLES", numerics.TABLES[:1])
    assert numerics.main(["--out", str(tmp_path), "--no-compile", "--no-progress"]) == 0
    page = (tmp_path / "numerics.md").read_text()
    assert page.count("| bfloat16 |") == 2
    assert "not on a GPU" in page
    assert "By dtype" in (tmp_path / "numerics.svg").read_text()
    assert numerics._said(float("nan")) == "**NaN**"
    assert numerics._said(6e-259) == "0"


def test_the_committed_page_has_every_table_row_and_provider(numerics):
    page = (ROOT / "docs" / "numerics.md").read_text()
    for table in numerics.TABLES:
        assert page.count(f"**{table.title}.**") == 2
        for row in table.problems:
            assert f"\n| {row} | " in page
    names = [name for name, _ in numerics.providers(OP, True)]
    for name in {*names, "fastgist native", "fastgist triton", "fastgist reference"} - {"fastgist cuda"}:
        assert f" {name} |" in page, f"docs/numerics.md lacks {name}: run scripts/numerics.py"
    assert set(numerics.FORMULAS) <= set(backends.OPS)
