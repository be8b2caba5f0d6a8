"""What README.md says of installing, held against pyproject.toml and the messages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch

from fastgist import _extension, backends

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", README, flags=re.MULTILINE | re.DOTALL)
    return found


def test_every_extra_has_its_line() -> None:
    install = section("Install")
    named = re.findall(r"`([a-z]+)`", "".join(re.findall(r"^\| (`[^|]+) \|", install, flags=re.MULTILINE)))
    assert sorted(named) == sorted(PROJECT["optional-dependencies"])
    assert PROJECT["dependencies"] == ["torch>=2.11"] and "torch 2.11 or newer" in install
    assert PROJECT["requires-python"] == ">=3.11,<3.14" and "Python 3.11 to 3.13" in install


def test_no_line_takes_it_from_an_index() -> None:
    """pip gets a path ("." in the clone), but where the text says that it is installed already."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]:
        for line in page.read_text().splitlines():
            taken = re.findall(r"pip install[^`#\n]*?\bfastgist\b[^`#\n]*", line)
            assert not taken or "In an environment that has it" in line, f"{page.name}: {line}"


def test_the_hint_is_the_way_that_gives_the_extension(monkeypatch) -> None:
    monkeypatch.setattr(_extension, "load", lambda: "it was not built with this installation")
    backends._resolve.cache_clear()
    with pytest.raises(RuntimeError) as raised:
        backends.resolve("gist_loss", "native", torch.empty(1))
    backends._resolve.cache_clear()
    assert "'pip install --no-build-isolation .' in a clone" in str(raised.value)
    assert "'pip install .'" not in str(raised.value)
    assert "pip install --no-build-isolation ." in section("Install")


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    pages = [
        *(ROOT / name for name in ("README.md", "DESIGN.md", "CONTRIBUTING.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    ]
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            place = (page.parent / name).resolve() if name else page
            assert place.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(place), f"{page.name}: {target}"
