"""``fastgist finetune-text --shots`` and ``--seeds``: few texts of each class, and several runs with a summary of all."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

for _package in ("transformers", "accelerate", "datasets", "torchmetrics", "typer"):
    pytest.importorskip(_package)

from texts import few, write_bert, write_csv  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from fastgist import cli  # noqa: E402
from fastgist.train.config import UserError  # noqa: E402
from fastgist.train.stdlib_text import StdlibText  # noqa: E402
from fastgist.train.text import finetune_text  # noqa: E402
from fastgist.train.text_config import TextConfig  # noqa: E402
from fastgist.train.text_data import TextSplits, load_texts  # noqa: E402

CLASSES = 3


@pytest.fixture(scope="module")
def corpus() -> StdlibText:
    return StdlibText.load()


@pytest.fixture(scope="module")
def train(tmp_path_factory, corpus) -> Path:
    """Ten texts of each class and no split to select by."""
    return write_csv(tmp_path_factory.mktemp("one") / "train.csv", ["text", "label"], few(corpus.train, CLASSES, 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus) -> Path:
    root = tmp_path_factory.mktemp("three")
    for (name, part), each in zip(corpus.parts().items(), (10, 6, 4)):
        write_csv(root / f"{name}.csv", ["text", "label"], few(part, CLASSES, each))
    return root


def drawn(data: Path, **changes) -> TextSplits:
    return load_texts(TextConfig(data=str(data), **changes).resolved())


@pytest.mark.parametrize("shots", [1, 2, 4, 8])
def test_shots_are_so_many_of_each_class_and_selection_is_by_others(train, shots) -> None:
    whole, found = drawn(train, val_split=0.0), drawn(train, shots=shots)
    assert Counter(found.train["label"]) == dict.fromkeys(range(CLASSES), shots)
    assert found.val is not None
    assert Counter(found.val["label"]) == dict.fromkeys(range(CLASSES), min(shots, 4, 10 - shots))
    assert not set(found.train["text"]) & set(found.val["text"])
    pairs = set(zip(whole.train["text"], whole.train["label"]))
    assert {*zip(found.train["text"], found.train["label"]), *zip(found.val["text"], found.val["label"])} <= pairs
    assert found.notes[0] == f"trains on {shots} texts of each class drawn by seed 0"
    assert found.notes[1] == f"selects by {len(found.val)} texts of the train split"


def test_draws_follow_the_seed_and_fewer_shots_are_part_of_more(train) -> None:
    texts = {(n, seed): set(drawn(train, shots=n, seed=seed).train["text"]) for n in (2, 4, 8) for seed in (0, 1)}
    for seed in (0, 1):
        assert texts[2, seed] < texts[4, seed] < texts[8, seed]
        assert set(drawn(train, shots=4, seed=seed).train["text"]) == texts[4, seed]
    assert texts[4, 0] != texts[4, 1]


def test_a_val_split_is_what_is_selected_by_and_the_test_split_stays(folder) -> None:
    whole, found = drawn(folder), drawn(folder, shots=3)
    assert found.val is not None and whole.val is not None
    assert Counter(found.val["label"]) == dict.fromkeys(range(CLASSES), 3)
    assert set(found.val["text"]) < set(whole.val["text"])
    assert found.tests["test"]["text"] == whole.tests["test"]["text"]
    assert found.notes[1] == "selects by 9 texts of the val split"
    assert drawn(folder, shots=3, val_split=0.0).val is None


def test_what_cannot_be_drawn_is_named(train, tmp_path) -> None:
    with pytest.raises(UserError, match="--shots 11: class '0' has 10 training texts"):
        drawn(train, shots=11)
    with pytest.raises(UserError, match=r"no texts are left to select by: give fewer --shots"):
        drawn(train, shots=10)
    assert len(drawn(train, shots=10, val_split=0.0).train) == 30
    numbers = write_csv(tmp_path / "numbers.csv", ["text", "label"], [(f"word {i}", i / 7) for i in range(12)])
    with pytest.raises(UserError, match="--shots counts texts of a class, and these labels are numbers"):
        drawn(numbers, shots=2)


def test_several_seeds_are_folders_with_a_summary_of_all(folder, tmp_path) -> None:
    out, bert = tmp_path / "out", write_bert(tmp_path / "bert")
    flags = [
        "finetune-text", folder, "--model", bert, "--epochs", 1, "--shots", 3, "--batch-size", 4, "--max-length", 16,
        "--rank", 2, "--lr", 0.01, "--device", "cpu", "--no-progress", "--output-dir", out,
    ]  # fmt: skip

    def invoke(*more):
        return CliRunner().invoke(cli.build_app(), [str(a) for a in (*flags, *more)], env={"COLUMNS": "200"})

    result = invoke("--seeds", "0,4")
    assert result.exit_code == 0, result.output
    together = json.loads((out / "summary.json").read_text())
    runs = [json.loads((out / f"seed-{seed}" / "summary.json").read_text()) for seed in (0, 4)]
    assert together["seeds"] == [0, 4]
    assert together["runs"] == {"0": "seed-0", "4": "seed-4"}
    for part, scores in (("val", [run["val"] for run in runs]), ("test", [run["test"]["test"] for run in runs])):
        for name in ("accuracy", "f1", "loss"):
            values, found = [score[name] for score in scores], together[f"{part}_{name}"]
            assert found["mean"] == pytest.approx(sum(values) / 2)
            assert found["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
            assert found["n"] == 2
            assert f"{part} {name}: {found['mean']:.4f} ± {found['std']:.4f} (n = 2)" in result.stdout
    assert together["test_loss"]["std"] > 0
    assert [run["config"]["seed"] for run in runs] == [0, 4]
    assert {run["config"]["seeds"] for run in runs} == {None}
    assert runs[0]["texts"] == {"train": 9, "val": 9, "test": 12}

    again = invoke("--seeds", "0,4")
    assert again.exit_code == 2
    assert "holds finished runs: pass --resume" in again.stderr
    before = (out / "seed-4" / "summary.json").stat().st_mtime_ns
    more = invoke("--seeds", "0,4,5", "--resume")
    assert more.exit_code == 0, more.output
    assert "seed 4 (2 of 3): finished before" in more.stdout
    assert json.loads((out / "summary.json").read_text())["test_accuracy"]["n"] == 3
    assert (out / "seed-4" / "summary.json").stat().st_mtime_ns == before
    for change, words in (
        (("--shots", 2), "holds a run with --shots = 3, this one has 2"),
        (("--lr-head", 0.5), "holds a run with --lr-head = None, this one has 0.5"),
        (("--seed", 1), "--seed and --seeds exclude each other"),
    ):
        other = invoke("--seeds", "0,4", "--resume", *change)
        assert other.exit_code == 2
        assert words in other.stderr
    with pytest.raises(UserError, match="takes several --seeds"):
        finetune_text(replace(TextConfig(data=str(folder), seeds="0,1"), output_dir=out))


def test_a_named_recipe_and_a_runs_own_settings_are_the_same_run(folder, tmp_path) -> None:
    """What a recipe filled in is compared, not the recipe's name: config.json of a sweep gives the sweep again."""
    from fastgist.train import sweep

    seen = []

    def run(config, say):
        seen.append(config)
        return {"val": None, "test": {"validation_matched": {"accuracy": 0.25 * len(seen)}, "b": {"f1": 1.0}}}

    config = TextConfig(recipe="glue/mnli", seeds="1-2", output_dir=tmp_path, device="cpu").resolved()
    found = sweep.sweep(config, run, lambda line: None)
    assert found["validation_matched_accuracy"] == {"mean": 0.375, "std": pytest.approx(0.25 / 2**0.5), "n": 2}
    assert found["b_f1"]["mean"] == 1.0
    assert [each.seed for each in seen] == [1, 2]
    assert found["config"]["epochs"] == config.epochs
    assert found["config"]["data"] == config.data
