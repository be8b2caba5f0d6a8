"""docs/pairs.md is what scripts/pairs_table.py finds here, every row of it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from pairs import (
    DECODER_BACKBONES,
    DECODER_PAIRS,
    ENCODER_PAIRS,
    METHODS,
    PAIRS,
    TIMM_BACKBONES,
    TRANSFORMERS_BACKBONES,
)

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {
    "timm": TIMM_BACKBONES, "transformers, encoders": TRANSFORMERS_BACKBONES, "transformers, decoders": DECODER_BACKBONES,
}  # fmt: skip


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows(text: str, section: str) -> dict[str, list[str]]:
    head, _, *lines = text.partition(f"## {section}\n")[2].strip().split("\n\n")[0].splitlines()
    assert cells(head) == ["", *METHODS]
    return {name: values for name, *values in map(cells, lines)}


def test_the_table_of_pairs_is_what_the_script_writes() -> None:
    """Every pair is built and trained anew: results, reasons and their numbers."""
    script = runpy.run_path(str(ROOT / "scripts" / "pairs_table.py"))
    text = (ROOT / "docs" / "pairs.md").read_text()
    found = script["page"]()
    for section in SECTIONS:
        for name, values in rows(found, section).items():
            assert rows(text, section)[name] == values, f"{section}, {name}: python scripts/pairs_table.py"
    assert text == found


def test_the_table_has_a_row_for_every_backbone_and_says_yes_where_the_tests_do() -> None:
    text = (ROOT / "docs" / "pairs.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [*SECTIONS, "Merging", "Why not"]
    for section, backbones in SECTIONS.items():
        assert list(rows(text, section)) == list(backbones)
    tests = {"timm": PAIRS, "transformers, encoders": ENCODER_PAIRS, "transformers, decoders": DECODER_PAIRS}
    assert tests.keys() == SECTIONS.keys()
    for section, tried in tests.items():
        found = rows(text, section).items()
        yes = [(name, m) for name, row in found for m, cell in zip(METHODS, row, strict=True) if cell == "yes"]
        assert yes == tried
