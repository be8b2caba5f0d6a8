"""fastgist compare, --seeds and the studies: pairing, statistics, what is written, what is not repeated."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

for _package in ("timm", "accelerate", "sklearn", "scipy", "matplotlib", "typer"):
    pytest.importorskip(_package)

from typer.testing import CliRunner  # noqa: E402

from fastgist import cli  # noqa: E402
from fastgist.recipes import digits as recipes  # noqa: E402
from fastgist.train import compare as module  # noqa: E402
from fastgist.train import sweep as sweeping  # noqa: E402
from fastgist.train.config import CompareConfig, FinetuneConfig, Method, UserError  # noqa: E402
from fastgist.train.finetune import Interrupted, finetune  # noqa: E402
from fastgist.train.statistics import paired, spread  # noqa: E402


def invoke(*arguments: object):
    return CliRunner().invoke(cli.build_app(), [*map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture(autouse=True)
def _short_pretraining(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the base's training, kept for the whole session away from the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(recipes, "PRETRAIN", recipes.quick(recipes.PRETRAIN))


# -- statistics ------------------------------------------------------------------------------------------------------


def test_paired_differences_are_the_textbooks() -> None:
    """Student's sleep data (1908): ten pairs, t = 4.0621, 95% from 0.7001 to 2.4599, p = 0.002833."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired(second, first)
    assert found["mean"] == pytest.approx(1.58) and found["n"] == 10 and found["std"] == pytest.approx(1.229995)
    assert found["low"] == pytest.approx(0.7001142, abs=1e-6) and found["high"] == pytest.approx(2.4598858, abs=1e-6)
    assert found["p_value"] == pytest.approx(0.00283289, abs=1e-7)
    narrow = paired(second, first, confidence=0.5)
    assert found["low"] < narrow["low"] < found["mean"] < narrow["high"] < found["high"]


def test_pairs_that_say_nothing_about_the_spread() -> None:
    one = paired([0.5], [0.25])
    assert one["mean"] == 0.25 and one["low"] is one["high"] is one["p_value"] is one["std"] is None
    # differences that are equal but for rounding
    equal = paired([0.3, 0.7, 0.9], [0.2, 0.6, 0.8])
    assert equal["std"] == 0.0 and equal["low"] == equal["high"] == equal["mean"] and equal["p_value"] is None
    assert spread([2.0]) == {"mean": 2.0, "std": None, "n": 1}
    for ours, base in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="paired: expected pairs"):
            paired(ours, base)
    with pytest.raises(ValueError, match="confidence must be in"):
        paired([1.0], [1.0], confidence=1.0)


@pytest.mark.parametrize(("words", "seeds"), [("0,1,2", [0, 1, 2]), ("0-3", [0, 1, 2, 3]), ("7, 2-3", [7, 2, 3])])
def test_seeds_in_words(words: str, seeds: list[int]) -> None:
    assert sweeping.parse_seeds(words) == seeds


@pytest.mark.parametrize("words", ["", "a", "1,1", "3-1", "0-2,1", "-1", "1-", "1.5"])
def test_wrong_seeds_are_named(words: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        sweeping.parse_seeds(words)


# -- digits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory):
    """The command on digits, two seeds of two methods."""
    out = tmp_path_factory.mktemp("compare") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr(recipes, "PRETRAIN", recipes.quick(recipes.PRETRAIN))
        flags = ["--methods", "linear-probe,lora", "--seeds", "3,5", "--epochs", 4, "--device", "cpu", "--no-progress"]
        result = invoke("compare", "digits", *flags, "--lr-gist", "0.02", "--output-dir", out)
    assert result.exit_code == 0, result.output
    return out, flags, result.stdout


def test_what_is_written_is_what_the_runs_gave(compared) -> None:
    out, _, printed = compared
    found = json.loads((out / "compare.json").read_text())
    rows = list(csv.DictReader((out / "compare.csv").open()))
    assert len(rows) == 8 and found["seeds"] == [3, 5] and found["measured"] == "test_accuracy"
    for row in found["rows"]:
        for gist, kind in ((0, "plain"), (1, "gist")):
            ours = [r for r in rows if r["method"] == row["method"] and int(r["gist"]) == gist]
            values = [float(r["test_accuracy"]) for r in sorted(ours, key=lambda r: int(r["seed"]))]
            assert row[kind]["values"] == values and row[kind]["mean"] == pytest.approx(sum(values) / 2)
            for run, value in zip(sorted(ours, key=lambda r: int(r["seed"])), values, strict=True):
                name = f"{row['method']}{'-gist' if gist else ''}-seed{run['seed']}"
                summary = json.loads((out / "runs" / name / "summary.json").read_text())
                assert summary["test_accuracy"] == value and summary["gist"] is bool(gist)
        gains = [a - b for a, b in zip(row["gist"]["values"], row["plain"]["values"], strict=True)]
        assert row["difference"]["mean"] == pytest.approx(sum(gains) / 2)
        assert row["gist"]["trained"] == row["plain"]["trained"] + 64  # the token: one row of the demo's width
        assert row["method"] in printed and f"{100 * row['difference']['mean']:+.2f}" in printed
    assert "2 comparisons: the p-values are not corrected" in printed
    assert max(map(len, printed.split("mean ±")[0].splitlines())) <= 80
    svg = (out / "compare.svg").read_text()
    assert svg.startswith("<?xml") and len(svg) > 5000


def test_the_demos_numbers_stand_beneath_the_flags() -> None:
    config = CompareConfig.of(data="digits", methods="cp,adapter", epochs=7)
    assert (config.epochs, config.batch_size, config.shots) == (7, 25, 10)
    runs = module.plan(config)
    assert len(runs) == 2 * 2 * 5
    cp = runs["cp", True, 4]
    assert (cp.lr, cp.set, cp.method, cp.seed, cp.seeds) == (1e-2, ["rank=16"], Method.CP, 4, None)
    assert runs["adapter", False, 0].lr == 3e-2
    images = CompareConfig.of(data="folder", lr=0.1, method_lr=["lora=0.2"], set=["lora:rank=2"], lr_gist=0.5)
    runs = module.plan(images)
    assert (images.epochs, runs["lora", True, 0].lr, runs["adapter", True, 0].lr) == (100, 0.2, 0.1)
    assert runs["lora", True, 0].lr_gist == 0.5 and runs["lora", False, 0].lr_gist is None
    assert len({run.output_dir for run in runs.values()}) == len(runs)


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(compared, monkeypatch) -> None:
    out, flags, printed = compared
    from fastgist.train.digits_bench import DigitsBench

    made = []
    original = DigitsBench.run
    monkeypatch.setattr(DigitsBench, "run", lambda self, run: made.append(run.output_dir.name) or original(self, run))
    again = ["compare", "digits", *flags, "--lr-gist", "0.02", "--output-dir", out]
    assert invoke(*again).stdout == printed and not made
    result = invoke(*again, "--epochs", 5)
    assert result.exit_code == 2 and "holds a run with --epochs = 4, this one has 5" in result.stderr
    (out / "runs" / "lora-gist-seed5" / "summary.json").unlink()
    assert invoke(*again).stdout == printed  # made again: the same to the last bit
    assert made == ["lora-gist-seed5"]
    (out / "runs" / "lora-seed3" / "summary.json").write_text("{")
    result = invoke(*again)
    assert result.exit_code == 2 and "is no summary of a run" in result.stderr


def test_runs_of_a_seed_share_draw_head_and_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Plain and gist see the same images, in the same order, from the same head: else nothing is paired."""
    from fastgist.train import digits_bench

    seen: dict[bool, list] = {False: [], True: []}
    original = digits_bench.fit

    def spy(model, train, recipe, *args, **kwargs):
        head = model.model.head if recipe.gist else model.head
        seen[recipe.gist].append((recipe.seed, train.images.sum().item(), head.weight.sum().item()))
        return original(model, train, recipe, *args, **kwargs)

    monkeypatch.setattr(digits_bench, "fit", spy)
    config = CompareConfig.of(
        data="digits", methods="lora", seeds="0-1", epochs=1, device="cpu", progress=False, output_dir=tmp_path
    )
    module.compare(config)
    assert seen[False] == seen[True] and len(set(seen[False])) == 2


def test_ctrl_c_keeps_what_is_finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastgist.train.digits_bench import DigitsBench

    original, count = DigitsBench.run, []

    def press(self, run):
        count.append(run)
        if len(count) == 2:
            raise KeyboardInterrupt
        return original(self, run)

    monkeypatch.setattr(DigitsBench, "run", press)
    config = CompareConfig.of(
        data="digits", methods="lora", seeds="0", epochs=1, device="cpu", progress=False, output_dir=tmp_path
    )
    with pytest.raises(Interrupted, match="1 of 2 runs are finished; the same command makes the others"):
        module.compare(config)
    found = module.compare(config)
    assert len(count) == 3 and found["rows"][0]["difference"]["p_value"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "adapter,lara"}, "no method is called 'lara'; there are linear-probe, adapter"),
        ({"methods": "lora,lora"}, "a method is named twice"),
        ({"method_lr": ["cp=1"]}, r"--method-lr cp=1: expected METHOD=..., the method one of adapter, lora"),
        ({"method_lr": ["lora=fast"]}, "--method-lr lora=fast: expected a number"),
        ({"set": ["rank=2"]}, "--set rank=2: expected METHOD:"),
        ({"seeds": "x"}, "--seeds x"),
        ({"image_size": 8}, "--image-size is for images, not for digits"),
        ({"shots": 500}, "--shots 500: the smallest class of the digits' pool has"),
        ({"temperature": -1.0}, "--temperature must be finite and > 0"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(changes: dict, message: str, tmp_path: Path) -> None:
    given = {"data": "digits", "device": "cpu", "progress": False, "output_dir": tmp_path / "out"} | changes
    with pytest.raises(UserError, match=message):
        module.compare(CompareConfig.of(**given))
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"--output-dir .*out: .*out is a file"):
        module.compare(CompareConfig.of(data="digits", output_dir=tmp_path / "out"))


# -- images ----------------------------------------------------------------------------------------------------------

SMALL = {
    "model": "test_vit", "pretrained": False, "image_size": 32, "epochs": 1, "batch_size": 8, "workers": 0,
    "device": "cpu", "progress": False, "lr": 0.01,
}  # fmt: skip


def test_a_folder_of_images_is_compared_by_its_test_images(digits: Path, tmp_path: Path) -> None:
    config = CompareConfig.of(data=str(digits), methods="lora", seeds="0", output_dir=tmp_path / "out", **SMALL)
    found = module.compare(config)
    assert found["measured"] == "test_accuracy" and found["images"] == {"train": 24, "val": 12, "test": 12}
    alone = finetune(
        FinetuneConfig(data=str(digits), method=Method.LORA, output_dir=tmp_path / "alone", **SMALL), say=lambda _: None
    )
    assert found["rows"][0]["gist"]["values"] == [alone["test_accuracy"]]


def test_several_seeds_are_folders_with_a_summary_of_all(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [
        "finetune", digits, "--model", "test_vit", "--no-pretrained", "--image-size", 32, "--epochs", 1, "--batch-size",
        8, "--workers", 0, "--device", "cpu", "--no-progress", "--lr", 0.01, "--output-dir", out,
    ]  # fmt: skip
    result = invoke(*flags, "--seeds", "0,4")
    assert result.exit_code == 0, result.output
    together = json.loads((out / "summary.json").read_text())
    runs = [json.loads((out / f"seed-{seed}" / "summary.json").read_text()) for seed in (0, 4)]
    for name in ("test_accuracy", "test_loss", "val_accuracy"):
        values = [run[name] for run in runs]
        assert together[name]["mean"] == pytest.approx(sum(values) / 2) and together[name]["n"] == 2
        assert together[name]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert runs[1]["config"]["seed"] == 4 and runs[1]["config"]["seeds"] is None
    assert (out / "seed-4" / "adapter" / "adapter_model.safetensors").exists()
    again = invoke(*flags, "--seeds", "0,4")
    assert again.exit_code == 2 and "holds finished runs: pass --resume" in again.stderr
    before = (out / "seed-4" / "summary.json").stat().st_mtime_ns
    more = invoke(*flags, "--seeds", "0,4,5", "--resume")
    assert more.exit_code == 0 and "seed 4 (2 of 3): finished before" in more.stdout
    assert json.loads((out / "summary.json").read_text())["test_accuracy"]["n"] == 3
    assert (out / "seed-4" / "summary.json").stat().st_mtime_ns == before
    other = invoke(*flags, "--seeds", "0,4", "--resume", "--lr", 0.5)
    assert other.exit_code == 2 and "holds a run with --lr = 0.01, this one has 0.5" in other.stderr
    both = invoke(*flags, "--seeds", "6", "--seed", 1, "--resume")
    assert both.exit_code == 2 and "--seed and --seeds exclude each other" in both.stderr
    with pytest.raises(UserError, match="takes several --seeds"):
        finetune(replace(FinetuneConfig(data=str(digits), seeds="0,1"), output_dir=out))


# -- the studies -----------------------------------------------------------------------------------------------------


def test_the_studies_pair_every_value_with_the_papers(tmp_path: Path) -> None:
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("studies", Path(__file__).parents[1] / "scripts" / "studies.py")
    studies = importlib.util.module_from_spec(spec)
    sys.modules["studies"] = studies
    spec.loader.exec_module(studies)
    flags = ["--seeds", "0-1", "--epochs", "1", "--out", tmp_path, "--runs", tmp_path / "runs", "--no-progress"]
    studies.main([str(flag) for flag in flags])
    names = {p.name for p in (tmp_path / "runs").iterdir()}
    cells = ("plain", "T1-L1", "T3-L1", "T10-L1", "T3-L2", "T3-L5", "T3-L10")  # the reference serves both
    assert names == {f"{cell}-seed{seed}" for cell in cells for seed in (0, 1)}
    for name, count in (("temperature", 4), ("length", 5)):
        found = json.loads((tmp_path / f"studies-{name}.json").read_text())
        assert len(found["rows"]) == count and (tmp_path / f"studies-{name}.svg").stat().st_size > 5000
        reference = next(row for row in found["rows"] if row["name"] == found["reference"])
        assert "difference" not in reference
        for row in found["rows"]:
            if row is not reference:
                expected = sum(a - b for a, b in zip(row["values"], reference["values"], strict=True)) / 2
                assert row["difference"]["mean"] == pytest.approx(expected)
    long = json.loads((tmp_path / "runs" / "T3-L10-seed0" / "summary.json").read_text())
    short = json.loads((tmp_path / "runs" / "T3-L1-seed0" / "summary.json").read_text())
    assert long["trained_parameters"] - short["trained_parameters"] == 9 * 64
    assert (
        json.loads((tmp_path / "runs" / "T10-L1-seed1" / "summary.json").read_text())["config"]["temperature"] == 10.0
    )
