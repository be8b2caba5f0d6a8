"""Images for fastgist finetune: order, folders, data sets, and what it says of those that are wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from images import write_digits
from runs import config, quiet

from fastgist.train.config import UserError
from fastgist.train.data import EpochBatches, derive_seed
from fastgist.train.finetune import finetune

# -- order and seeds --------------------------------------------------------------------------------------------------


def test_processes_share_out_every_batch() -> None:
    alone = EpochBatches(22, 8, seed=3)
    pair = [EpochBatches(22, 4, seed=3, rank=rank, world=2) for rank in range(2)]
    for epoch in range(3):
        for sampler in (alone, *pair):
            sampler.seek(epoch, 0)
        whole = list(alone)
        assert len(whole) == 2 and all(len(batch) == 8 for batch in whole)
        halves = [list(sampler) for sampler in pair]
        for batch, one, other in zip(whole, *halves, strict=True):
            assert sorted(batch) == sorted(one + other) and len(one) == len(other) == 4
    seen = [draw.row for batch in whole for draw in batch]
    assert len(set(seen)) == len(seen) == 16


def test_any_position_of_an_epoch_can_be_taken_up() -> None:
    sampler = EpochBatches(40, 4, seed=0)
    sampler.seek(5, 0)
    whole = list(sampler)
    sampler.seek(5, 7)
    assert list(sampler) == whole[7:]
    sampler.seek(6, 0)
    assert list(sampler) != whole


@pytest.mark.parametrize(("size", "world"), [(1, 4), (3, 2), (5, 8), (7, 8)])
def test_too_few_images_for_a_batch_still_give_equal_shares(size: int, world: int) -> None:
    batches = [list(EpochBatches(size, 8, seed=0, rank=rank, world=world)) for rank in range(world)]
    assert {len(b) for b in batches} == {1}
    assert len({len(b[0]) for b in batches}) == 1
    assert {draw.row for b in batches for draw in b[0]} == set(range(size))


def test_derived_seeds_do_not_collide() -> None:
    seeds = {derive_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_sixteen_bits_orientation_and_unknown_ranges(tmp_path: Path) -> None:
    """Pillow alone clips 16 bits to white and ignores the camera's orientation."""
    import numpy as np
    from PIL import Image

    from fastgist.train.data import to_rgb

    ramp = np.arange(256, dtype=np.uint16)[None].repeat(4, 0) * 257
    Image.fromarray(ramp).save(tmp_path / "16.png")
    with Image.open(tmp_path / "16.png") as picture:
        assert np.array_equal(np.asarray(to_rgb(picture))[:, :, 1], ramp >> 8)
    turned = Image.new("RGB", (60, 40))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as picture:
        assert to_rgb(picture).size == (40, 60)
    with pytest.raises(ValueError, match="floating-point pixels"):
        to_rgb(Image.fromarray(np.zeros((2, 2), np.float32)))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


# -- data sets --------------------------------------------------------------------------------------------------------


def _table(digits: Path, split: str, names: bool = False):
    import datasets

    paths = sorted((digits / split).glob("*/*.png"))
    labels: list = [p.parent.name for p in paths]
    if not names:
        labels = [int(label.removeprefix("digit")) for label in labels]
    label = datasets.Value("string") if names else datasets.ClassLabel(names=["zero", "one", "two"])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    data = {"image": [{"bytes": p.read_bytes(), "path": None} for p in paths], "label": labels}
    return datasets.Dataset.from_dict(data, features=features)


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.mark.usefixtures("datasets_cache")
def test_a_folder_of_parquet_files_is_loaded_as_a_data_set(digits: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / "data" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        _table(digits, split).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    summary = quiet(config(tmp_path / "data", tmp_path / "out", epochs=1))
    assert summary["classes"] == ["zero", "one", "two"]
    assert summary["images"] == {"train": 18, "val": 6, "test": 12}


@pytest.mark.usefixtures("datasets_cache")
def test_a_saved_data_set_with_names_for_labels_and_a_bad_image(digits: Path, tmp_path: Path) -> None:
    import datasets

    table = _table(digits, "train", names=True)
    bad = table.cast_column("image", datasets.Image(decode=False)).to_dict()
    bad["image"][5]["bytes"] = bad["image"][5]["bytes"][:60]
    tables = datasets.DatasetDict(train=datasets.Dataset.from_dict(bad, features=table.features))
    tables.save_to_disk(str(tmp_path / "data"))
    settings = config(tmp_path / "data", tmp_path / "out", epochs=1)
    with pytest.raises(UserError, match=r"cannot read image train\[5\]"):
        quiet(settings)
    assert not settings.output_dir.exists()
    summary = quiet(replace(settings, skip_unreadable=True))
    assert summary["classes"] == ["digit0", "digit1", "digit2"] and summary["images"] == {"train": 18, "val": 5}
    with pytest.raises(UserError, match=r"no column 'picture' \(it has image, label\)"):
        quiet(replace(settings, image_column="picture", output_dir=tmp_path / "other"))


@pytest.mark.usefixtures("datasets_cache")
def test_a_data_set_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def absent(name: str, subset: str | None) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(
        UserError, match="digitz is no folder here and could not be loaded as a data set: .* on the Hub"
    ):
        quiet(config("digitz", tmp_path / "out"))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_: datasets.DatasetDict(test=datasets.Dataset.from_dict({"a": [1]}))
    )
    with pytest.raises(UserError, match=r"data set digitz has no train split \(it has test\)"):
        quiet(config("digitz", tmp_path / "out"))


# -- what is wrong, in one line ---------------------------------------------------------------------------------------


def _break(data: Path, how: str) -> None:
    """Damage a copy of the digits."""
    if how == "no train":
        shutil.rmtree(data / "train")
    elif how == "no classes":
        for split in ("train", "val", "test"):
            shutil.rmtree(data / split)
    elif how == "one class":
        for c in (1, 2):
            shutil.rmtree(data / "train" / f"digit{c}")
    elif how == "empty class":
        for path in (data / "train" / "digit1").iterdir():
            path.rename(path.with_suffix(".txt"))
    elif how == "other classes":
        (data / "val" / "digit1").rename(data / "val" / "digitl")
    elif how == "too few":
        shutil.rmtree(data / "val")
        for path in sorted((data / "train" / "digit2").iterdir())[1:]:
            path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no train", r"has test/ but no train/ folder|has val/ but no train/ folder"),
        ("no classes", r"holds no train/ folder and no class folders"),
        ("one class", r"at least two class folders are needed in .*train, found only 'digit0'"),
        ("empty class", r"no images in class folder .*train/digit1 \(looked for \.jpg"),
        ("other classes", r"val has class 'digitl' that .*train does not have \(3 classes: digit0, digit1, digit2\)"),
        ("too few", r"too few images: class 'digit2' has 1 and one must be held out"),
    ],
)
def test_a_wrong_layout_is_named(digits: Path, tmp_path: Path, how: str, message: str) -> None:
    shutil.copytree(digits, tmp_path / "data")
    _break(tmp_path / "data", how)
    with pytest.raises(UserError, match=message):
        quiet(config(tmp_path / "data", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_named_before_training_and_can_be_skipped(digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_digits(data, suffix=".jpg")
    broken = sorted((data / "train" / "digit1").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:-200])  # a truncated JPEG still opens and verifies
    settings = config(data, tmp_path / "out", epochs=1)
    with pytest.raises(UserError, match=f"cannot read image {broken} .*--skip-unreadable"):
        quiet(settings)
    (data / "test" / "digit0" / "words.png").write_text("no picture")
    with pytest.raises(UserError, match="2 images cannot be read, the first is"):
        quiet(settings)
    assert not settings.output_dir.exists()
    lines: list[str] = []
    summary = finetune(replace(settings, skip_unreadable=True), say=lines.append)
    assert summary["images"] == {"train": 23, "val": 12, "test": 12}
    assert any("left out 2 unreadable images" in line for line in lines)
    for path in (data / "train" / "digit1").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no readable training image of class 'digit1'"):
        quiet(replace(settings, skip_unreadable=True, output_dir=tmp_path / "other"))
    with pytest.raises(RuntimeError, match=f"cannot read image {data / 'train' / 'digit1'}"):
        quiet(replace(settings, verify=False, output_dir=tmp_path / "unverified"))
