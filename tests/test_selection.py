"""Few-shot draws, draws of a size, named splits, and the benchmarks' recipes on digits in the benchmarks' format."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from images import write_digits

for _package in ("timm", "accelerate", "sklearn", "datasets", "typer"):
    pytest.importorskip(_package)

from fastgist.recipes.benchmarks import FGVC, SHOTS, VTAB, names, settings_of  # noqa: E402
from fastgist.train.config import FinetuneConfig, UserError  # noqa: E402
from fastgist.train.data import FolderSource, Split, Splits, load_splits, split_names  # noqa: E402
from fastgist.train.selection import draw  # noqa: E402


def made(train: int = 30, val: int | None = None, test: int = 6, classes: int = 3) -> Splits:
    """Splits whose image names say where they are from; labels go round."""

    def split(name: str, count: int) -> Split:
        rows = list(range(count))
        return Split(FolderSource([f"{name}/{row}" for row in rows]), rows, [row % classes for row in rows])

    given = None if val is None else split("val", val)
    return Splits(split("train", train), given, split("test", test), [f"c{i}" for i in range(classes)], [])


def chosen(split: Split | None) -> set[str]:
    assert split is not None
    found = [split.source.name(row) for row in split.rows]
    assert len(set(found)) == len(found)
    return set(found)


def config(**changes: object) -> FinetuneConfig:
    return FinetuneConfig(data="data", **changes)


@pytest.mark.parametrize("shots", [1, 2, 4, 8])
def test_shots_are_so_many_of_each_class_and_selection_is_by_others(shots: int) -> None:
    splits = draw(made(), config(shots=shots))
    assert Counter(splits.train.labels) == dict.fromkeys(range(3), shots)
    few = min(shots, 4, 10 - shots)  # of ten images a class
    assert splits.val is not None and Counter(splits.val.labels) == dict.fromkeys(range(3), few)
    assert not chosen(splits.train) & chosen(splits.val)
    assert chosen(splits.test) == {f"test/{i}" for i in range(6)}
    assert all(name.startswith("train/") for name in chosen(splits.train) | chosen(splits.val))


def test_draws_follow_the_seed_and_fewer_shots_are_part_of_more() -> None:
    drawn = {
        (shots, seed): chosen(draw(made(), config(shots=shots, seed=seed)).train)
        for shots in SHOTS[:4]
        for seed in (0, 1)
    }
    assert drawn[8, 0] == chosen(draw(made(), config(shots=8)).train)
    assert drawn[1, 0] < drawn[2, 0] < drawn[4, 0] < drawn[8, 0]
    assert drawn[4, 0] != drawn[4, 1]
    # a class's draw does not depend on how many images another has
    longer = made(33)
    longer.train = longer.train.subset([i for i, label in enumerate(longer.train.labels) if label != 0 or i < 30])
    label = {name: int(name.split("/")[1]) % 3 for name in drawn[4, 0]}
    assert {n for n in drawn[4, 0] if label[n] == 0} <= chosen(draw(longer, config(shots=4)).train)


def test_a_val_split_is_what_is_selected_by() -> None:
    splits = draw(made(val=12), config(shots=2))
    assert all(name.startswith("val/") for name in chosen(splits.val)) and Counter(splits.val.labels) == {
        0: 2,
        1: 2,
        2: 2,
    }
    assert chosen(draw(made(val=12), config(shots=2, val_images=12)).val) == {f"val/{i}" for i in range(12)}
    assert draw(made(), config(shots=2, val_split=0.0)).val is None
    assert len(chosen(draw(made(val=12), config(val_images=5)).val)) == 5


def test_a_number_of_images_and_what_they_leave() -> None:
    splits = draw(made(), config(train_images=20, val_images=8))
    assert len(chosen(splits.train)) == 20 and len(chosen(splits.val)) == 8
    assert not chosen(splits.train) & chosen(splits.val)
    assert chosen(splits.train) != chosen(draw(made(), config(train_images=20, val_images=8, seed=1)).train)
    assert len(chosen(draw(made(), config(train_images=20)).val)) == 4  # --val-split 0.2 of them
    assert draw(made(), config()).train.rows == list(range(30))  # nothing asked for, nothing drawn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 11}, "--shots 11: class 'c0' has 10 training images"),
        ({"shots": 10}, "no images are left to select by: give fewer --shots, a val split, or pass --val-split 0"),
        ({"shots": 1, "train_images": 3}, "--shots and --train-images exclude each other"),
        ({"train_images": 31}, "--train-images: 31 were asked for and there are 30"),
        ({"train_images": 25, "val_images": 6}, "--val-images: 6 were asked for and there are 5"),
        ({"val_images": 3}, "--val-images without a val split needs --shots or --train-images"),
    ],
)
def test_what_cannot_be_drawn_is_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(made(), config(**changes))


def test_named_splits() -> None:
    assert split_names("train=train, test=validation") == {"train": "train", "test": "validation"}
    for words in ("test=test", "train", "train=", "train=a,dev=b", "train=a,train=b", ""):
        with pytest.raises(UserError, match="expected train=NAME"):
            split_names(words)
    with pytest.raises(UserError, match="one split cannot serve twice"):
        split_names("train=train,val=test,test=test")


def test_folders_take_named_splits(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data", {"train": 3, "val": 2, "extra": 4})
    splits = load_splits(FinetuneConfig(data=str(data), splits="train=extra,test=val"))
    assert {name: len(split) for name, split in splits.named().items()} == {"train": 12, "test": 6}
    with pytest.raises(UserError, match=r"has no folder 'none' \(it has extra, train, val\)"):
        load_splits(FinetuneConfig(data=str(data), splits="train=none"))


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_the_benchmarks_are_whole_and_never_select_by_test() -> None:
    from fastgist.train.settings import understood

    assert len(VTAB) == 19 and len(FGVC) == 5 and SHOTS == (1, 2, 4, 8, 16)
    groups = [list(VTAB)[:7], list(VTAB)[7:11], list(VTAB)[11:]]  # natural, specialised, structured
    assert [len(group) for group in groups] == [7, 4, 8]
    counts = [102, 100, 47, 102, 37, 397, 10, 5, 10, 2, 45, 8, 6, 6, 16, 16, 4, 18, 9]
    assert [task.classes for task in VTAB.values()] == counts
    assert [task.classes for task in FGVC.values()] == [101, 37, 196, 102, 100]
    for name in names():
        settings = understood(settings_of(name), FinetuneConfig, name)
        splits = split_names(settings["splits"])
        assert splits is not None and splits["test"] not in (splits["train"], splits.get("val"))
        size = (settings.get("train_images"), settings.get("val_images"), settings.get("shots"))
        assert size == ((800, 200, None) if name.startswith("vtab/") else (None, None, 16))
    with pytest.raises(
        UserError, match=r"'vtab/caltech' \(did you mean vtab/caltech101\?\); there are vtab/caltech101, vtab/cifar"
    ):
        settings_of("vtab/caltech")


def _write_tars(root: Path, cuts: dict[str, int], image_column: str, label_column: str) -> Path:
    """Real digits as the clip-benchmark's sets have them: split/0.tar and on of <key>.webp and <key>.cls, texts beside."""
    import io
    import tarfile

    from PIL import Image
    from sklearn.datasets import load_digits

    digits, first = load_digits(), 0
    for split, count in cuts.items():
        (root / split).mkdir(parents=True)
        shards = 1 + (count > 50)
        (root / split / "nshards.txt").write_text(str(shards))
        for shard in range(shards):
            with tarfile.open(root / split / f"{shard}.tar", "w") as archive:
                for row in range(first + shard * count // shards, first + (shard + 1) * count // shards):
                    picture = io.BytesIO()
                    Image.fromarray((digits.images[row] * 15.9).astype("uint8")).save(picture, "webp", lossless=True)
                    parts = {image_column: picture.getvalue(), label_column: str(digits.target[row]).encode()}
                    for name, data in parts.items():
                        member = tarfile.TarInfo(f"s{row:07d}.{name}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
        first += count
    (root / "classnames.txt").write_text("\n".join(map(str, range(10))))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}")
    return root


def _write_parquet(root: Path, cuts: dict[str, int], image_column: str, label_column: str, named: bool) -> Path:
    """Real digits, cut into splits, as the hub has them: parquet files with encoded images."""
    import datasets
    from sklearn.datasets import load_digits

    digits = load_digits()
    label = datasets.ClassLabel(names=[f"n{i}" for i in range(10)]) if named else datasets.Value("int64")
    features = datasets.Features({image_column: datasets.Image(), label_column: label})
    first = 0
    (root / "data").mkdir(parents=True)
    for split, count in cuts.items():
        rows = range(first, first + count)
        first += count
        pictures = [(digits.images[row] * 15.9).astype("uint8") for row in rows]
        columns = {image_column: pictures, label_column: [int(digits.target[row]) for row in rows]}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


SMALL = (
    "--model test_vit --no-pretrained --image-size 32 --epochs 1 --workers 0 --device cpu --no-progress --lr 0.01 "
    "--warmup-epochs 0.1"
).split()


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Split]:
    """What the loop is given to train on and to select by, and what is judged at the end."""
    import datasets

    from fastgist.train import finetune as module

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    found: dict[str, Split] = {}
    fit, evaluate = module.fit, module.evaluate

    def spy(model, train, *args, val, **kwargs):
        found.update(train=train, val=val)
        return fit(model, train, *args, val=val, **kwargs)

    def judge(model, data, *args):
        found["test"] = data
        return evaluate(model, data, *args)

    monkeypatch.setattr(module, "fit", spy)
    monkeypatch.setattr(module, "evaluate", judge)
    return found


def invoke(*arguments: object):
    from typer.testing import CliRunner

    from fastgist import cli

    return CliRunner().invoke(cli.build_app(), ["finetune", *map(str, arguments)], env={"COLUMNS": "200"})


def test_a_vtab_task_runs_from_its_recipe(tmp_path: Path, seen: dict) -> None:
    """800 + 200 drawn from train, all of test, at the end alone; labels that are plain numbers; no augmentation."""
    data = _write_parquet(tmp_path / "svhn", {"train": 1300, "test": 300}, "webp", "cls", named=False)
    result = invoke("--recipe", "vtab/svhn", data, *SMALL, "--output-dir", tmp_path / "out", "--batch-size", 200)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["images"] == {"train": 800, "val": 200, "test": 300} and summary["steps"] == 4
    assert summary["selected_by"] == "val accuracy" and len(summary["classes"]) == 10
    assert [seen[name].source.split for name in ("train", "val", "test")] == ["train", "train", "test"]
    assert not set(seen["train"].rows) & set(seen["val"].rows)
    held = json.loads((tmp_path / "out" / "config.json").read_text())
    assert held["augment"] is False and held["data"] == str(data) and held["image_column"] == "webp"
    image, _ = seen["train"][5]
    assert torch.equal(image, seen["train"][5][0])  # nothing random about it


@pytest.mark.usefixtures("seen")
def test_webdatasets_tar_files_are_read_by_split(tmp_path: Path) -> None:
    """In folders of splits, or with the split's name in front; with the recipe's columns. Never where images lie about."""
    import tarfile

    import numpy as np
    from sklearn.datasets import load_digits

    data = _write_tars(tmp_path / "set", {"train": 120, "test": 40}, "webp", "cls")
    settings = FinetuneConfig(data=str(data), **{k: v for k, v in settings_of("vtab/svhn").items() if k != "data"})
    splits = load_splits(settings)
    assert {name: len(split) for name, split in splits.named().items()} == {"train": 120, "test": 40}
    want, names = load_digits(), splits.classes
    assert [int(names[label]) for label in splits.train.labels] == want.target[:120].tolist()
    assert [int(names[label]) for label in splits.test.labels] == want.target[120:160].tolist()
    splits.test.transform = lambda picture: torch.from_numpy(np.array(picture))[:, :, 0]
    for row in (0, 39):
        assert torch.equal(splits.test[row][0], torch.from_numpy((want.images[120 + row] * 15.9).astype("uint8")))
    for split in ("train", "test"):  # the same files under other names
        for path in sorted((data / split).glob("*.tar")):
            path.rename(data / f"{split}-{path.name}")
        (data / split / "nshards.txt").unlink()
        (data / split).rmdir()
    again = load_splits(settings)
    assert again.train.labels == splits.train.labels and again.test.labels == splits.test.labels
    (data / "train-0.tar").write_bytes(b"no archive")
    with pytest.raises(UserError, match="set is a folder that could not be loaded as a data set: "):
        load_splits(settings)
    images = write_digits(tmp_path / "digits", {"train": 2, "test": 2})
    for folder in (images, images / "train"):
        tarfile.open(folder / "train.tar", "w").close()
    assert len(load_splits(FinetuneConfig(data=str(images))).train) == 6


def test_a_few_shot_task_runs_from_its_recipe(tmp_path: Path, seen: dict) -> None:
    cuts = {"train": 200, "validation": 120, "test": 90}
    data = _write_parquet(tmp_path / "flowers", cuts, "image", "label", named=True)
    flags = [data, *SMALL, "--batch-size", 10, "--shots", 4, "--seed", 2]
    result = invoke("--recipe", "fgvc/oxford_flowers", *flags, "--output-dir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert Counter(seen["train"].labels) == Counter(seen["val"].labels) == dict.fromkeys(range(10), 4)
    assert [seen[name].source.split for name in ("train", "val", "test")] == ["train", "validation", "test"]
    assert len(seen["test"]) == 90 and "trains on 4 images of each class drawn by seed 2" in result.stdout
    first = list(seen["train"].rows)
    # without a recipe, on any data set, the same draw; and a file of settings above a recipe, flags above both
    (tmp_path / "more.yaml").write_text("shots: 2\nseed: 9\n")
    result = invoke(*flags[:-4], "--shots", 4, "--seed", 2, "--output-dir", tmp_path / "plain")
    assert result.exit_code == 0 and list(seen["train"].rows) == first
    above = ["--config", tmp_path / "more.yaml", "--recipe", "fgvc/oxford_flowers", "--seed", 2]
    result = invoke(*flags[:-4], *above, "--output-dir", tmp_path / "file")
    assert result.exit_code == 0 and set(seen["train"].rows) < set(first) and len(seen["train"]) == 20


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(label column, splits) of a task -> digits as its data set has them: tar files or parquet."""
    root = tmp_path_factory.mktemp("hub")
    made: dict[tuple[str, str], Path] = {}
    for task in (*VTAB.values(), *FGVC.values()):
        key = task.label_column, task.splits
        if key in made:
            continue
        assert (task.image_column, task.label_column) in (("webp", "cls"), ("image", "label"))
        cuts = dict.fromkeys((split_names(task.splits) or {}).values(), 40) | {"train": 100}
        folder = root / str(len(made))
        if task.label_column == "cls":
            made[key] = _write_tars(folder, cuts, task.image_column, task.label_column)
        else:
            made[key] = _write_parquet(folder, cuts, task.image_column, task.label_column, named=True)
    return made


@pytest.mark.parametrize("name", names())
def test_every_recipe_runs(name: str, hub: dict, tmp_path: Path, seen: dict) -> None:
    """One step, on digits in the format of the recipe's data set."""
    group, _, task_name = name.partition("/")
    task = {"vtab": VTAB, "fgvc": FGVC}[group][task_name]
    few = ["--train-images", 20, "--val-images", 10] if group == "vtab" else ["--shots", 1]
    flags = [hub[task.label_column, task.splits], *SMALL, *few, "--batch-size", 20, "--output-dir", tmp_path / "out"]
    result = invoke("--recipe", name, *flags)
    assert result.exit_code == 0, result.output
    splits = {"val": "train"} | (split_names(task.splits) or {})
    assert {part: split.source.split for part, split in seen.items()} == splits
    assert [len(seen[part]) for part in ("train", "val", "test")] == ([20, 10, 40] if group == "vtab" else [10, 10, 40])
    held = json.loads((tmp_path / "out" / "config.json").read_text())
    assert held["augment"] is (group == "fgvc") and held["splits"] == task.splits
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 1 and len(summary["classes"]) == 10 and 0 <= summary["test_accuracy"] <= 1


def test_food_is_judged_by_what_it_calls_validation(tmp_path: Path, seen: dict) -> None:
    data = _write_parquet(tmp_path / "food", {"train": 200, "validation": 60}, "image", "label", named=True)
    result = invoke("--recipe", "fgvc/food-101", data, *SMALL, "--shots", 1, "--output-dir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [seen[name].source.split for name in ("train", "val", "test")] == ["train", "train", "validation"]
    assert len(seen["test"]) == 60 and not set(seen["train"].rows) & set(seen["val"].rows)
    result = invoke("--recipe", "fgvc/stanford_cars", data, *SMALL, "--output-dir", tmp_path / "other")
    assert result.exit_code == 2 and "has no test split (it has train, validation)" in result.stderr
    result = invoke("--recipe", "fgvc/stanford", data, *SMALL)
    assert result.exit_code == 2 and "no recipe is called 'fgvc/stanford'" in result.stderr
