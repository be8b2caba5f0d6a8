"""scripts/numerics.py: what its tables claim, on a few of their rows, and that the committed page is of these tables."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_scripts import _load

from benchmarks import peers
from fastgist import backends, functional

ROOT = Path(__file__).parents[1]
OP = "bidirectional_kl"
PROBE = torch.empty(1)


@pytest.fixture(scope="module")
def numerics():
    return _load("scripts/numerics.py")


def ours(op: str):
    return lambda *args: getattr(functional, op)(*args[:-1], temperature=args[-1])


def rows(numerics, op: str = OP):
    small = (t for t in numerics.TABLES if t.title != "By classes" and op in t.ops)
    return [(table.title, row, problem) for table in small for row, problem in table.problems.items()]


@pytest.mark.parametrize("op", ["bidirectional_kl", "gist_loss", "gist_linear_loss", "topk_kl"])
def test_nothing_of_the_tables_takes_us_far_from_float64(numerics, op):
    peer = numerics.peers_of(op)["pooled log_softmax" if op == "topk_kl" else "log_softmax"]
    for title, row, problem in rows(numerics, op):
        if problem.dtype == "float64" and not numerics.served(
            op, problem, f"fastgist {backends.resolve(op, 'auto', PROBE)}"
        ):
            continue  # what "auto" takes is another implementation then, of which the table has a column
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
    kept = tmp_path / "kept.jsonl"
    arguments = ["--out", str(tmp_path), "--no-compile", "--no-progress", "--keep", str(kept)]
    assert numerics.main(arguments) == 0
    page = (tmp_path / "numerics.md").read_text()
    assert page.count("| bfloat16 |") == len(numerics.FORMULAS)
    assert "not on a GPU" in page
    assert re.search(r"from the sources of commit \w{7,}", page)
    assert "By dtype" in (tmp_path / "numerics.svg").read_text()
    assert numerics._said(float("nan")) == "**NaN**"
    assert numerics._said(6e-259) == "0"
    monkeypatch.setattr(numerics, "error", lambda *_: pytest.fail("what was kept is measured again"))
    monkeypatch.setattr(numerics, "other_functions", dict)
    assert numerics.main(arguments) == 0
    assert (tmp_path / "numerics.md").read_text().startswith(page.split("## Other")[0])


def test_other_functions_are_held_against_their_own_formula(numerics, monkeypatch):
    """Liger's and flash-linear-attention's kernels need a GPU: what is compared them with is tried on plain forms."""

    def forms(shift: float):
        kl = lambda tensors: lambda z, g: numerics._one_sided(z, g) + shift  # noqa: E731
        jsd = lambda tensors: lambda h, g, w, *_: numerics._jsd(h @ w.T, (g @ w.T).detach()) + shift  # noqa: E731
        return {"Liger KL": kl, "Liger fused linear JSD": jsd}

    for shift, right in ((0.0, True), (0.1, False)):
        made = {n: (op, forms(shift)[n], f) for n, (op, _, f) in numerics.OTHER_FUNCTIONS.items() if n in forms(shift)}
        monkeypatch.setattr(numerics, "OTHER_FUNCTIONS", made)
        for name, found in numerics.other_functions().items():
            assert (found.loss < 1e-5) == right, (name, found)
            assert found.gradient < 1e-5, (name, found)
        monkeypatch.undo()


@functools.cache
def cells() -> dict[tuple[str, str, str, str], tuple[float, float]]:
    """(operation, table, row, column) of docs/numerics.md -> (error of the loss, of the gradients)."""
    found = {}
    op = title = ""
    names: list[str] = []
    for line in (ROOT / "docs" / "numerics.md").read_text().splitlines():
        if line.startswith("## "):
            op, names = line[3:], []
        elif line.startswith("**") and (start := re.match(r"\*\*(.+?)\.\*\*", line)):
            title, names = start[1], []
        elif line.startswith("| ") and title:
            row, *values = (cell.strip() for cell in line.strip("|").split(" | "))
            if not names:
                names = values
                continue
            for name, value in zip(names, values, strict=True):
                if " / " in value:
                    loss, gradient = (float(v.strip("*")) for v in value.split(" / "))
                    found[op, title, row, name] = loss, gradient
    return found


#: A page that was written elsewhere may have rounded otherwise: other vectors, other orders of sums. A cell may be this much
#: off, and what is below FLOOR, some roundings of float32, is as good as any.
FACTOR, FLOOR = 10.0, 5e-7
#: Of two nearly equal heads the loss keeps few digits, and by chance more: gradients alone are held there.
BY_CHANCE = ("Two heads that nearly agree", "An offset of one head")


@pytest.mark.parametrize("op", ["bidirectional_kl", "gist_loss", "gist_linear_loss", "topk_kl"])
def test_the_committed_page_says_what_is_so_now(numerics, op):
    held = 0
    for name, loss in numerics.providers(op, False):
        if name == "fastgist triton":
            continue  # seconds a cell in the interpreter
        for title, row, problem in rows(numerics, op):
            if not numerics.served(op, problem, name) or problem.classes > 1000:
                continue
            now, page = numerics.error(op, problem, loss), cells()[op, title, row, name]
            pairs = [(now.gradient, page[1])] + [(now.loss, page[0])] * (title not in BY_CHANCE)
            for mine, written in pairs:
                where = f"{op}, {title}, {row}, {name}: {now}, docs/numerics.md has {page}: run scripts/numerics.py"
                assert math.isfinite(mine) == math.isfinite(written), where
                if math.isfinite(mine):
                    ratio = max(mine, FLOOR) / max(written, FLOOR)
                    assert 1 / FACTOR <= ratio <= FACTOR, where
                held += 1
    assert held > 20


def test_the_committed_page_has_every_table_row_and_provider(numerics):
    page = (ROOT / "docs" / "numerics.md").read_text()
    there = {place[:3] for place in cells()}
    for op in numerics.FORMULAS:
        for table in numerics.TABLES:
            if op in table.ops:
                assert {(op, table.title, row) for row in table.problems} <= there
        names = [name for name, _ in numerics.providers(op, True)]
        for name in {*names, "fastgist native", "fastgist reference"} - {"fastgist cuda", "fastgist triton"}:
            if name != "fastgist native" or (op != "topk_kl"):
                assert any(place[0] == op and place[3] == name for place in cells()), (
                    f"docs/numerics.md lacks {op}'s {name}"
                )
    assert any(place[3] == "fastgist triton" for place in cells())
    for name in numerics.OTHER_FUNCTIONS:
        assert f"| {name} | " in page
    assert set(numerics.FORMULAS) <= set(backends.OPS)
