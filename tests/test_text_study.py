"""scripts/text_study.py on a BERT of width 32: pairs, intervals, the cache, the figure."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

import torch
from texts import write_bert

from fastgist.recipes import stdlib_text as recipes
from fastgist.train.settings import written_settings
from fastgist.train.statistics import paired
from fastgist.train.stdlib_text import Part, StdlibText

ROOT = Path(__file__).parents[1]


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return _script("text_study")


@pytest.fixture(scope="module")
def studies():
    return _script("studies")


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


# -- T and length ----------------------------------------------------------------------------------------------------


def test_the_studies_on_text_differ_in_what_is_studied_alone(studies, tmp_path, monkeypatch):
    """Runs as numbers: which there are, what they are told, that pairs are paired, and that none is made twice."""
    pytest.importorskip("accelerate")
    from fastgist.train import text

    told: list = []

    def made(run, say):
        told.append(run)
        score = 0.25 + 0.125 * run.gist + 2**-6 * run.gist_length + 2**-10 * run.temperature + 2**-12 * run.seed
        summary = {"test": {"test": {"accuracy": score}}, "classes": ["a", "b"], "texts": {"test": 9}, "commit": "c"}
        run.output_dir.mkdir(parents=True)
        (run.output_dir / "summary.json").write_text(json.dumps(summary | {"config": written_settings(run)}))
        return summary

    monkeypatch.setattr(text, "finetune_text", made)
    flags = ["--data", "stdlib", "--seeds", "0-2", "--out", tmp_path, "--runs", tmp_path / "runs", "--no-progress"]
    studies.main([str(flag) for flag in flags])
    cells = ("plain", "T1-L1", "T3-L1", "T10-L1", "T3-L2", "T3-L5", "T3-L10")
    names = {f"text-{cell}-seed{seed}" for cell in cells for seed in range(3)}
    assert [run.output_dir.name for run in told].count("text-T3-L1-seed1") == 1, "the reference serves both studies"
    assert {run.output_dir.name for run in told} == names and len(told) == len(names)
    same = {name for name in written_settings(told[0]) if len({str(getattr(run, name)) for run in told}) == 1}
    assert set(written_settings(told[0])) - same == {"gist", "gist_length", "temperature", "seed", "output_dir"}
    assert told[0].val_name == "" and told[0].val_split == 0 and told[0].data == "stdlib"
    for name, values in (("temperature", (1, 3, 10)), ("length", (1, 2, 5, 10))):
        found = json.loads((tmp_path / f"studies-text-{name}.json").read_text())
        assert (tmp_path / f"studies-text-{name}.svg").stat().st_size > 5000
        step = {"temperature": 2**-10, "length": 2**-6}[name]
        reference = {"temperature": 3, "length": 1}[name]
        gaps = [row["difference"]["mean"] for row in found["rows"][1:] if "difference" in row]
        assert gaps == [step * (value - reference) for value in values if value != reference]
        assert found["rows"][0]["difference"]["mean"] == -0.125, "plain runs have T and length of the reference"
    studies.main([*map(str, flags), "--only", "temperature"])
    assert len(told) == len(names)


def test_a_run_of_the_studies_on_text_is_one_of_finetune_text(studies, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    small = {"model": str(write_bert(tmp_path / "bert")), "shots": 2, "max_length": 8, "batch_size": 64}
    monkeypatch.setattr(recipes, "TEXT_STUDIES", recipes.TEXT_STUDIES | small)
    monkeypatch.setattr(studies, "STUDIES", {"length": replace(studies.STUDIES["length"], values=(1, 5))})
    flags = ["--data", "stdlib", "--seeds", "3", "--epochs", "1", "--out", tmp_path, "--runs", tmp_path / "runs"]
    studies.main([*map(str, flags), "--no-progress"])
    found = json.loads((tmp_path / "studies-text-length.json").read_text())
    assert found["texts"]["train"] == 2 * len(found["classes"])
    trained = {}
    for path in (tmp_path / "runs").iterdir():
        summary = json.loads((path / "summary.json").read_text())
        assert (path / "adapter").is_dir() and summary["selected_by"] == "last epoch"
        trained[path.name] = summary["trained_parameters"]
    assert trained["text-T3-L5-seed3"] - trained["text-T3-L1-seed3"] == 4 * 32
    assert trained["text-T3-L1-seed3"] - trained["text-plain-seed3"] == 32


# -- what is committed -----------------------------------------------------------------------------------------------


def _committed(name: str) -> tuple[dict, dict[str, float]]:
    """What docs/<name>.json holds, and the learning rates of the methods that have a place in its model."""
    left_out = recipes.NOT_CAUSAL if name.endswith("causal") else ()
    rates = {method: lr for method, lr in recipes.LEARNING_RATES.items() if method not in left_out}
    return json.loads((ROOT / "docs" / f"{name}.json").read_text()), rates


@pytest.mark.parametrize("name", ["text-study", "text-study-causal"])
def test_what_is_committed_is_what_the_script_writes(name, script):
    """Each method with and without a token on the same draws; counts of the test texts, and differences of the pairs."""
    found, rates = _committed(name)
    assert {r["method"]: r["lr"] for r in found["rows"]} == rates
    seeds = found["seeds"]
    assert len(seeds) >= 3 and found["settings"] == recipes.STUDY
    for row in found["rows"]:
        assert 3 <= len(row["plain"]) == len(row["gist"]) <= len(seeds)
        assert all(0 <= value <= 1 and _is_count(value, found["test_texts"]) for value in row["plain"] + row["gist"])
        middle, low, high = script.interval([b - a for a, b in zip(row["plain"], row["gist"])])
        assert row["difference"] == pytest.approx(middle) and row["interval"] == pytest.approx([low, high])
    every = script.together(found["rows"])
    assert found["all methods"]["difference"] == pytest.approx(every["difference"])
    assert found["all methods"]["interval"] == pytest.approx(every["interval"])
    figure = (ROOT / "docs" / f"{name}.svg").read_text()
    assert all(script.named(row, found) in figure for row in found["rows"])


@pytest.mark.parametrize("name", ["text-study", "text-study-causal"])
def test_every_method_that_has_a_place_is_there_and_of_a_commit(name):
    found, rates = _committed(name)
    assert [row["method"] for row in found["rows"]] == list(rates)
    for row in found["rows"]:
        assert row["commits"] and all(re.fullmatch("[0-9a-f]{12}", commit) for commit in row["commits"])
    assert found["commits"] == sorted({commit for row in found["rows"] for commit in row["commits"]})


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
