"""scripts/text_study.py on a BERT of width 32: pairs, intervals, the cache, the figure."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

import torch
from texts import write_bert

from fastgist.recipes import stdlib_text as recipes
from fastgist.train.statistics import paired
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


@pytest.fixture
def by_hand(script, tmp_path, monkeypatch):
    """A study whose runs are numbers: a draw and a token add to them, and each says what it was asked."""
    asked = []

    def accuracy(method, gist, lr, seed, *, judge, **options):
        asked.append((method, gist, seed))
        value = 0.5 + 0.01 * seed + (0.1 if gist and method == "lora" else 0.0)
        return {"accuracy": value, "trained": 7, "seconds": 1.0, "commit": "0123456789ab"}

    study = script.Study(StdlibText.load(), tmp_path / "base-1", shots=2, fresh=False)
    monkeypatch.setattr(study, "accuracy", accuracy)
    monkeypatch.setattr(study, "words", lambda seed: 0.8)
    return study, asked


def test_rows_are_added_to_what_was_made_of_the_same(script, by_hand, tmp_path):
    study, asked = by_hand
    path = tmp_path / "text-study.json"
    first = script.compare(study, ["linear-probe", "lora"], [0, 1, 2])
    assert first["all methods"]["difference"] == pytest.approx(0.05) and first["commits"] == ["0123456789ab"]
    del first["commits"]
    for row in first["rows"]:
        del row["commits"]
    path.write_text(json.dumps(first | {"commit": "ba9876543210"}))
    asked.clear()
    before = script.earlier(path, study, [0, 1])
    assert asked == [("linear-probe", True, 0)], "one run is made again"
    found = script.compare(study, ["prefix"], [0, 1], before)
    assert {name for name, _, _ in asked[1:]} == {"prefix"}
    assert [row["method"] for row in found["rows"]] == ["linear-probe", "lora", "prefix"]
    assert [row["commits"] for row in found["rows"]] == [["ba9876543210"], ["ba9876543210"], ["0123456789ab"]]
    assert found["commits"] == ["0123456789ab", "ba9876543210"]
    assert [len(row["gist"]) for row in found["rows"]] == [3, 3, 2] and found["seeds"] == [0, 1, 2]
    assert found["all methods"]["difference"] == pytest.approx(0.1 / 3) and found["all methods"]["draws"] == 2
    assert [script.named(row, found) for row in found["rows"]] == ["linear-probe", "lora", "prefix (2 draws)"]
    assert found["full from random weights"] == first["full from random weights"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [1, 0]}, r"has draws \[1, 0\], of which these are not the first: \[0, 1\]"),
        ({"base": "other"}, "was made with base = other, this is base-1"),
        ({"text": "0"}, "was made with text = 0"),
        ({"versions": {"torch": "1.0"}}, "was made with versions"),
        ({"settings": {"epochs": 9}}, "was made with settings"),
        ({"accuracy": 0.25}, "linear-probe with a token, draw 0: .* has 0.25, now 0.5"),
    ],
)
def test_nothing_is_added_to_what_was_made_of_something_else(script, by_hand, tmp_path, changes, words):
    study, _ = by_hand
    found = script.compare(study, ["linear-probe"], [0, 1])
    found["rows"][0]["gist"][0] = changes.pop("accuracy", 0.5)
    (tmp_path / "a.json").write_text(json.dumps(found | changes))
    with pytest.raises(script.UserError, match=words):
        script.earlier(tmp_path / "a.json", study, [0, 1])


def test_variants_are_settings_that_a_small_bert_takes():
    """Each names a method of the command and settings of it, and no two come to the same."""
    from transformers import BertConfig, BertForSequenceClassification

    from fastgist.peft.state import state_of
    from fastgist.train.config import Method
    from fastgist.train.models import adapt

    seen = {}
    for name, (kind, settings) in recipes.VARIANTS.items():
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(vocab_size=30, **recipes.ARCHITECTURE, intermediate_size=64))
        adapt(model, Method(kind), gist=False, settings=settings)
        (record,) = state_of(model).records.values()
        seen[name] = record.config
    assert len({repr(config) for config in seen.values()}) == len(recipes.VARIANTS)


# -- what is committed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text-study", "text-study-causal"])
def test_what_is_committed_is_what_the_script_writes(name, script):
    """Every method that has a place, with and without a token on the same draws, from commits and not from a changed tree."""
    found = json.loads((ROOT / "docs" / f"{name}.json").read_text())
    left_out = recipes.NOT_CAUSAL if name.endswith("causal") else ()
    rates = {method: lr for method, lr in recipes.LEARNING_RATES.items() if method not in left_out}
    assert {r["method"]: r["lr"] for r in found["rows"]} == rates and [r["method"] for r in found["rows"]] == list(
        rates
    )
    seeds = found["seeds"]
    assert len(seeds) >= 3 and found["settings"] == recipes.STUDY
    for row in found["rows"]:
        assert 3 <= len(row["plain"]) == len(row["gist"]) <= len(seeds)
        assert all(0 <= value <= 1 and _is_count(value, found["test_texts"]) for value in row["plain"] + row["gist"])
        middle, low, high = script.interval([b - a for a, b in zip(row["plain"], row["gist"])])
        assert row["difference"] == pytest.approx(middle) and row["interval"] == pytest.approx([low, high])
        assert row["commits"] and all(re.fullmatch("[0-9a-f]{12}", commit) for commit in row["commits"])
    every = script.together(found["rows"])
    assert found["all methods"].keys() == every.keys() and found["all methods"]["draws"] == every["draws"]
    assert found["all methods"]["difference"] == pytest.approx(every["difference"])
    assert found["all methods"]["interval"] == pytest.approx(every["interval"])
    assert found["commits"] == sorted({commit for row in found["rows"] for commit in row["commits"]})
    figure = (ROOT / "docs" / f"{name}.svg").read_text()
    assert all(script.named(row, found) in figure for row in found["rows"])


@pytest.mark.parametrize("study", ["temperature", "length"])
def test_the_committed_studies_of_t_and_length(study):
    """T in 1, 3, 10 and lengths 1, 2, 5, 10 on docstrings: paired with the paper's value, and of a commit."""
    found = json.loads((ROOT / "docs" / f"studies-text-{study}.json").read_text())
    values = {"temperature": ["T = 1", "T = 3", "T = 10"], "length": ["L = 1", "L = 2", "L = 5", "L = 10"]}[study]
    assert [row["name"] for row in found["rows"]] == ["no gist", *values]
    assert found["reference"] == {"temperature": "T = 3", "length": "L = 1"}[study]
    assert len(found["seeds"]) >= 3 and len(set(found["seeds"])) == len(found["seeds"])
    kept = ("shots", "epochs", "lr", "batch_size", "max_length")
    assert {name: found[name] for name in kept} == {name: recipes.TEXT_STUDIES[name] for name in kept}
    (reference,) = [row["values"] for row in found["rows"] if row["name"] == found["reference"]]
    for row in found["rows"]:
        assert len(row["values"]) == len(found["seeds"])
        assert all(_is_count(value, found["texts"]["test"]) for value in row["values"])
        if row["name"] != found["reference"]:
            assert row["difference"] == paired(row["values"], reference)
    assert found["commits"] and all(re.fullmatch("[0-9a-f]{12}", commit) for commit in found["commits"])


def test_both_studies_have_the_same_runs_of_the_reference():
    one, other = (json.loads((ROOT / "docs" / f"studies-text-{s}.json").read_text()) for s in ("temperature", "length"))
    values = [{row["name"]: row["values"] for row in found["rows"]} for found in (one, other)]
    assert values[0]["T = 3"] == values[1]["L = 1"] and values[0]["no gist"] == values[1]["no gist"]


def _is_count(value: float, total: int) -> bool:
    """Whether an accuracy is so many texts of ``total``."""
    return abs(value * total - round(value * total)) < 1e-3
