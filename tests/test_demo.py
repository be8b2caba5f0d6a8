"""fastgist demo, whole but short: what it writes, what it says, and that it can be repeated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

for _package in ("timm", "accelerate", "sklearn", "matplotlib", "typer"):
    pytest.importorskip(_package)

from fastgist.recipes import digits as recipes  # noqa: E402
from fastgist.train import demo as module  # noqa: E402
from fastgist.train.config import DemoConfig  # noqa: E402
from fastgist.train.digits import Digits  # noqa: E402


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory):
    """The command with --quick: its output, its folder and its cache."""
    from typer.testing import CliRunner

    from fastgist.cli import build_app

    folder = tmp_path_factory.mktemp("demo")
    arguments = ["demo", "--quick", "--seeds", "2", "--device", "cpu", "--output-dir", str(folder / "out")]
    result = CliRunner().invoke(build_app(), arguments, env={"XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result, folder


def test_the_table_and_the_numbers(ran) -> None:
    result, folder = ran
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert [row["name"] for row in metrics["rows"]] == [c.name for c in recipes.CONTESTANTS]
    for row in metrics["rows"]:
        assert row["name"] in result.stdout and f"{row['trained']:,}/{row['all']:,}" in result.stdout
        assert set(row["accuracies"]) == {"0", "1"} and row["std"] is not None
        assert row["mean"] == pytest.approx(sum(row["accuracies"].values()) / 2)
        assert row["reloaded_identical"] is True
        assert row["peak_memory_bytes"] > 4 * row["all"] and row["images_per_second"] > 0
        assert f"{row['mean']:.1%}" in result.stdout
    assert metrics["versions"]["torch"] == torch.__version__ and metrics["device"] == "cpu" and metrics["quick"]
    assert "profiler" in metrics["peak_memory_method"] and "5 of 5 adapters" in result.stdout
    assert metrics["seconds"] < 90


def test_the_figure_is_a_picture_of_a_sensible_size(ran) -> None:
    from PIL import Image

    with Image.open(ran[1] / "out" / "demo.png") as picture:
        assert picture.format == "PNG" and picture.width > 1200 and picture.height > 500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_adapters_are_saved(ran) -> None:
    folders = sorted(p.parent.name for p in (ran[1] / "out" / "adapters").glob("*/adapter_model.safetensors"))
    assert folders == ["adapter", "adapter-gist", "cp-gist", "linear-probe", "lora-gist"]


def test_the_base_model_is_cached_checked_and_made_again_when_damaged(ran, monkeypatch, capsys) -> None:
    from accelerate import Accelerator

    cache = ran[1] / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (path,) = (cache / "fastgist").iterdir()
    config = DemoConfig(output_dir=ran[1] / "out", quick=True, device="cpu")
    data, accelerator = Digits.load(), Accelerator(cpu=True)
    with module.one_thread(accelerator.device):
        first, about = module._base(config, data, accelerator)
        assert about["cached"]
        whole = path.read_bytes()
        path.write_bytes(whole[:-40] + b"\x01" * 40)
        again, about = module._base(config, data, accelerator)
        assert not about["cached"] and "damaged" in capsys.readouterr().out
        assert path.read_bytes() == whole  # the same seed, the same weights, bit for bit
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_run_is_its_seeds(ran, monkeypatch) -> None:
    """What the demo reported for a draw is what that draw gives when it is run alone."""
    from accelerate import Accelerator

    from fastgist.train.engine import predict

    monkeypatch.setenv("XDG_CACHE_HOME", str(ran[1] / "cache"))
    data, accelerator = Digits.load(), Accelerator(cpu=True)
    metrics = json.loads((ran[1] / "out" / "metrics.json").read_text())
    contestant = recipes.CONTESTANTS[4]
    with module.one_thread(accelerator.device):
        base, _ = module._base(DemoConfig(output_dir=Path(), quick=True), data, accelerator)
        train, _ = data.pool.draw(10, seed=1)
        recipe = dataclasses.replace(recipes.quick(contestant.recipe), seed=1)
        model, _ = module.adapt_to(base, contestant, train, recipe, accelerator)
        logits, labels = predict(model, data.test, 256, accelerator.device)
    row = next(row for row in metrics["rows"] if row["name"] == contestant.name)
    assert float((logits.argmax(-1) == labels).double().mean()) == row["accuracies"]["1"]


def test_no_image_is_in_two_parts() -> None:
    data = Digits.load()
    parts = [data.old_train, data.old_test, data.pool, data.test]
    assert sum(map(len, parts)) == 1797
    rows = torch.cat([part.images.flatten(1) for part in parts])
    assert len(rows.unique(dim=0)) == len(rows)
    for seed in (0, 100):
        drawn, rest = data.pool.draw(10, seed)
        assert len(drawn) == 50 and len(rest) == len(data.pool) - 50
        assert drawn.labels.bincount().tolist() == [10] * 5
        both = torch.cat([drawn.images, rest.images]).flatten(1)
        assert len(both.unique(dim=0)) == len(data.pool)
