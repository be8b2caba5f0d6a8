"""fastgist compare-text: the runs are finetune-text's own, paired by seed, and what is written is what they gave."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

for _package in ("transformers", "accelerate", "datasets", "torchmetrics", "scipy", "matplotlib", "typer"):
    pytest.importorskip(_package)

from texts import few, write_bert, write_csv  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from fastgist import cli  # noqa: E402
from fastgist.train import compare as module  # noqa: E402
from fastgist.train.config import Method, UserError  # noqa: E402
from fastgist.train.stdlib_text import StdlibText  # noqa: E402
from fastgist.train.text import finetune_text  # noqa: E402
from fastgist.train.text_config import CompareTextConfig, TextConfig  # noqa: E402

SMALL = {"epochs": 1, "batch_size": 8, "max_length": 16, "device": "cpu", "progress": False, "lr": 0.01, "rank": None}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    for (name, part), each in zip(StdlibText.load().parts().items(), (8, 4, 8), strict=True):
        write_csv(folder / f"{name}.csv", ["text", "label"], few(part, 2, each))
    return {"data": str(folder), "model": str(write_bert(folder / "bert"))}


def test_methods_are_compared_by_the_test_texts(given: dict[str, str], tmp_path: Path) -> None:
    flags = [
        given["data"], "--model", given["model"], "--methods", "lora,prefix", "--seeds", "0,3", "--set", "lora:rank=2",
        "--method-lr", "prefix=0.02", "--epochs", "1", "--batch-size", "8", "--max-length", "16", "--device", "cpu",
        "--no-progress", "--lr", "0.01", "--gist-length", "2", "--output-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    said = CliRunner().invoke(cli.build_app(), ["compare-text", *flags], env={"COLUMNS": "100"})
    assert said.exit_code == 0, said.output
    assert "test accuracy, 2 seeds" in said.output and "prefix" in said.output
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["measured"] == "test_accuracy" and found["texts"] == {"train": 16, "val": 8, "test": 16}
    assert [row["method"] for row in found["rows"]] == ["lora", "prefix"]
    for row, lr, settings in zip(found["rows"], (0.01, 0.02), (["rank=2"], []), strict=True):
        assert row["gist"]["trained"] > row["plain"]["trained"]
        for index, seed in enumerate((0, 3)):
            values = row["gist"]["values"][index], row["plain"]["values"][index]
            for gist, value in zip((True, False), values, strict=True):
                name = f"{row['method']}{'-gist' if gist else ''}-seed{seed}"
                summary = json.loads((tmp_path / "out" / "runs" / name / "summary.json").read_text())
                assert summary["test"]["test"]["accuracy"] == value
                assert (summary["config"]["lr"], summary["config"]["set"]) == (lr, settings)
                assert summary["config"]["gist_length"] == (2 if gist else 1)
    lines = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert len(lines) == 8 and {"val_accuracy", "test_accuracy", "test_f1"} <= lines[0].keys()
    assert (tmp_path / "out" / "compare.svg").stat().st_size > 1000
    alone = TextConfig(**given, **SMALL | {"rank": 2}, method=Method.LORA, gist_length=2, output_dir=tmp_path / "alone")
    alone = finetune_text(alone, say=lambda line: None)
    assert found["rows"][0]["gist"]["values"][0] == alone["test"]["test"]["accuracy"]
    assert lines[1]["test_loss"] == str(alone["test"]["test"]["loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "lora,nothing"}, "--methods: no method is called 'nothing'"),
        ({"set": ["adapter:bottleneck_dim=2"]}, "--set adapter:bottleneck_dim=2: expected METHOD:..."),
        ({"seeds": "x"}, "--seeds x"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"data": None}, "no data: give a file"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(given, changes: dict, message: str, tmp_path: Path) -> None:
    settings = {**given, **SMALL, "methods": "lora", "output_dir": tmp_path / "out"} | changes
    with pytest.raises(UserError, match=message):
        module.compare(CompareTextConfig(**settings).resolved())
    assert not (tmp_path / "out").exists()


def test_data_without_a_score_is_no_comparison(given, tmp_path: Path) -> None:
    settings = {
        **given,
        **SMALL,
        "methods": "lora",
        "seeds": "0",
        "output_dir": tmp_path / "out",
        "metrics": "matthews",
    }
    found = module.compare(CompareTextConfig(**settings).resolved())
    assert found["measured"] == "test_matthews"
    with pytest.raises(UserError, match="neither test nor val texts"):
        module.compare(
            CompareTextConfig(
                **settings | {"test_name": "", "val_name": "", "val_split": 0.0, "output_dir": tmp_path / "none"}
            ).resolved()
        )
