"""scripts/text_study.py on a BERT of width 32: pairs, intervals, the cache, the figure."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

from texts import write_bert

from fastgist.recipes import stdlib_text as recipes
from fastgist.train.stdlib_text import Part, StdlibText

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("text_study", ROOT / "scripts" / "text_study.py")
    module = sys.modules["text_study"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_intervals_are_students(script):
    """Student's t at 2 degrees of freedom is 4.302653 at 97.5 %."""
    middle, low, high = script.interval([0.01, 0.03, 0.05])
    half = 4.302652729911275 * 0.02 / 3**0.5
    assert (middle, low, high) == pytest.approx((0.03, 0.03 - half, 0.03 + half))


def test_draws_are_stratified_and_differ_by_seed(script):
    part = Part([f"text {i}" for i in range(60)], [i % 3 for i in range(60)])
    one, other = script.draw(part, 5, 0), script.draw(part, 5, 1)
    assert sorted(one.labels) == [0] * 5 + [1] * 5 + [2] * 5 and len(set(one.texts)) == 15
    assert all(part.labels[part.texts.index(t)] == y for t, y in zip(one.texts, one.labels))
    assert set(one.texts) != set(other.texts) and script.draw(part, 5, 0) == one


def test_every_method_of_the_study_has_a_rate_of_its_grid(script):
    assert recipes.LEARNING_RATES.keys() == recipes.TUNING_GRID.keys()
    assert all(recipes.LEARNING_RATES[m] in grid for m, grid in recipes.TUNING_GRID.items())


def test_a_small_study(script, tmp_path, monkeypatch):
    corpus = StdlibText.load()
    corpus = StdlibText(corpus.classes, *(Part(p.texts[::9], p.labels[::9]) for p in corpus.parts().values()), [], [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(script.STUDY, "epochs", 1)
    base = write_bert(tmp_path / "bert")
    judged = []
    original = script.finetune_text
    monkeypatch.setattr(script, "finetune_text", lambda run, say: judged.append(run) or original(run, say))
    study = script.Study(corpus, base, shots=2, fresh=False)
    found = script.compare(study, ["lora"], [0, 1])
    assert len(judged) == 6 and all(run.val_name == "" and run.val_split == 0 for run in judged)
    for row in found["rows"]:
        assert (
            len(row["plain"]) == len(row["gist"]) == 2 and row["interval"][0] <= row["difference"] <= row["interval"][1]
        )
        pairs = [r for r in judged if r.method.value == row["method"] and r.pretrained]
        assert len({r.lr for r in pairs}) == 1 and {(r.seed, r.gist) for r in pairs} == {
            (s, g) for s in (0, 1) for g in (False, True)
        }
        assert row["difference"] == pytest.approx(sum(b - a for a, b in zip(row["plain"], row["gist"])) / 2)
    assert script.compare(study, ["lora"], [0, 1])["rows"] == found["rows"] and len(judged) == 6, "from the cache"
    found |= {"model": "stdlib-bert"}
    script.plot(found, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert "lora" in text and "all methods" in text
    script.show(json.loads(json.dumps(found)))


def test_what_is_committed_is_what_the_script_writes():
    found = json.loads((ROOT / "docs" / "text-study.json").read_text())
    assert len(found["seeds"]) >= 3 and [r["method"] for r in found["rows"]] == list(recipes.LEARNING_RATES)
    assert {r["method"]: r["lr"] for r in found["rows"]} == recipes.LEARNING_RATES
    for row in found["rows"]:
        differences = [b - a for a, b in zip(row["plain"], row["gist"])]
        assert row["difference"] == pytest.approx(sum(differences) / len(differences))
