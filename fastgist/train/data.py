"""Images for training: from folders or the Hugging Face hub, checked before the first step, drawn reproducibly.

Randomness is a function of (seed, epoch, image) and not of what was drawn before: a resumed run, or one with another
number of loader processes, sees the same augmentations without any generator's state being saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch.utils.data import Dataset, Sampler

from fastgist.train.config import FinetuneConfig, UserError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Draw", "EpochBatches", "Split", "Splits", "derive_seed", "load_splits", "seed_everything", "unreadable"]

_VAL_NAMES = ("val", "valid", "validation", "dev")
_SPLITS: dict[str, tuple[str, ...]] = {"train": ("train",), "val": _VAL_NAMES, "test": ("test",)}


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers; different numbers give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(*parts: int) -> None:
    """Seed torch (all devices), Python and NumPy from several numbers."""
    import numpy

    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)


# -- splits ----------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where images come from."""

    def name(self, row: int) -> str:
        """What to call image ``row`` in a message."""

    def open(self, row: int) -> contextlib.AbstractContextManager[Any]:
        """A binary file of image ``row``, as a context manager."""


class FolderSource:
    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    def name(self, row: int) -> str:
        return self.paths[row]

    def open(self, row: int) -> contextlib.AbstractContextManager[Any]:
        return open(self.paths[row], "rb")


class HubSource:
    def __init__(self, table: Any, column: str, split: str) -> None:
        self.table, self.column, self.split = table, column, split

    def name(self, row: int) -> str:
        return f"{self.split}[{row}]"

    def open(self, row: int) -> contextlib.AbstractContextManager[Any]:
        image = self.table[row][self.column]
        if image is None:
            raise OSError("no image in this row")
        return io.BytesIO(image["bytes"]) if image["bytes"] is not None else open(image["path"], "rb")


class Draw(NamedTuple):
    """One image in one epoch: what a sampler asks a split for."""

    row: int
    epoch: int


@dataclass
class Split(Dataset):
    """Rows of a source with their labels; an item is (transformed image, label)."""

    kind: ClassVar[str] = "images"

    source: Source
    rows: list[int]
    labels: list[int]
    transform: Callable[[Any], torch.Tensor] | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw | int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        index, epoch = (draw.row, draw.epoch) if isinstance(draw, Draw) else (draw, 0)
        try:
            with self.source.open(self.rows[index]) as file, Image.open(file) as picture:
                image = to_rgb(picture)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"cannot read image {self.source.name(self.rows[index])}: {error}") from None
        if self.transform is None:
            raise RuntimeError("this split has no transform yet")
        seed_everything(self.seed, epoch, self.rows[index])
        return self.transform(image), self.labels[index]

    def subset(self, keep: Sequence[int]) -> Split:
        return replace(self, rows=[self.rows[i] for i in keep], labels=[self.labels[i] for i in keep])

    def fingerprint(self) -> str:
        """A short digest of which files carry which labels, to notice data that changed under a resumed run."""
        named = [(Path(self.source.name(row)).name, label) for row, label in zip(self.rows, self.labels, strict=True)]
        return hashlib.sha256(repr(named).encode()).hexdigest()[:16]


def check_mode(picture: Image.Image) -> None:
    """Raise ValueError for pixels without a known range."""
    if picture.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known: convert them to 8 or 16 bits")


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB, turned as its EXIF orientation says. 16 bits lose their lower 8: Pillow's own conversion would clip."""
    from PIL import Image, ImageOps

    check_mode(picture)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        import numpy as np

        high = np.asarray(picture).astype(np.int64) >> 8  # mode "I" too: how Pillow reads some 16-bit files
        picture = Image.fromarray(np.clip(high, 0, 255).astype(np.uint8))
    return picture.convert("RGB")


@dataclass
class Splits:
    """What a run trains on, selects by and is judged on. ``notes`` are remarks for the user."""

    train: Split
    val: Split | None
    test: Split | None
    classes: list[str]
    notes: list[str]

    def named(self) -> dict[str, Split]:
        found = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}


def split_names(words: str | None) -> dict[str, str] | None:
    """``train=NAME,val=NAME,test=NAME`` by our names; None for none given. UserError where one serves twice."""
    if words is None:
        return None
    pairs = [word.partition("=") for word in words.split(",")]
    names = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    wrong = [ours for ours, theirs in names.items() if ours not in ("train", "val", "test") or not theirs]
    if wrong or len(names) < len(pairs) or "train" not in names:
        raise UserError(f"--splits {words}: expected train=NAME and perhaps val=NAME, test=NAME, by commas")
    if len(set(names.values())) < len(names):
        raise UserError(
            f"--splits {words}: one split cannot serve twice (test images must not be trained on or select)"
        )
    return names


def load_splits(config: FinetuneConfig) -> Splits:
    """Find the images of ``config.data``; raises UserError for whatever is wrong with their layout."""
    names = split_names(config.splits)
    root = Path(config.data).expanduser()
    if root.is_file():
        raise UserError(f"{root} is a file; a folder of images or the name of a data set is needed")
    if not root.exists():
        if config.data.count("/") > 1 or config.data.startswith((".", "/", "~")):
            raise UserError(f"no such folder: {root}")
        return _load_hub(config.data, config, names)
    saved = (root / "dataset_dict.json").exists() or (root / "state.json").exists()
    if saved or any(root.glob("*.parquet")) or any(root.glob("*/*.parquet")):
        return _load_hub(str(root), config, names, saved=saved)
    tars = _tars(root)
    if tars:
        return _load_hub(str(root), config, names, tars=tars)
    return _load_folder(root, names)


# -- folders ---------------------------------------------------------------------------------------------------------


def _class_folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _scan(root: Path, classes: list[str]) -> tuple[Split, list[int]]:
    """The images under ``root``, one folder a class, and how many each class has."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    indices = {name: i for i, name in enumerate(classes)}
    present = {name: i for name, i in indices.items() if (root / name).is_dir()}
    samples = make_dataset(str(root), present, extensions=IMG_EXTENSIONS, allow_empty=True)
    split = Split(FolderSource([p for p, _ in samples]), list(range(len(samples))), [label for _, label in samples])
    counts = [0] * len(classes)
    for label in split.labels:
        counts[label] += 1
    empty = [name for name, i in present.items() if counts[i] == 0]
    if empty:
        extensions = " ".join(IMG_EXTENSIONS)
        raise UserError(f"no images in class folder {root / empty[0]}{_and_more(empty)} (looked for {extensions})")
    return split, counts


def _and_more(items: Sequence[object]) -> str:
    return f" and {len(items) - 1} more" if len(items) > 1 else ""


def _load_folder(root: Path, names: dict[str, str] | None) -> Splits:
    folders = {p.name.lower(): p for p in _class_folders(root)}
    if names is None:
        val_folder = next((folders[name] for name in _VAL_NAMES if name in folders), None)
        test_folder, train_folder = folders.get("test"), folders.get("train")
    else:
        for name in names.values():
            if name.lower() not in folders:
                raise UserError(f"{root} has no folder {name!r} (it has {', '.join(folders) or 'none'})")
        chosen = {ours: folders[theirs.lower()] for ours, theirs in names.items()}
        train_folder, val_folder, test_folder = (chosen.get(ours) for ours in ("train", "val", "test"))
    if train_folder is None:
        held_out_folder = val_folder or test_folder
        if held_out_folder is not None:
            raise UserError(f"{root} has {held_out_folder.name}/ but no train/ folder")
        if not folders:
            raise UserError(f"{root} holds no train/ folder and no class folders (one folder a class, images inside)")
        train_folder = root
    classes = [p.name for p in _class_folders(train_folder)]
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise UserError(f"at least two class folders are needed in {train_folder}, found {found}")
    train, _ = _scan(train_folder, classes)
    held_out: dict[str, Split] = {}
    notes: list[str] = []
    for name, folder in (("val", val_folder), ("test", test_folder)):
        if folder is None:
            continue
        unknown = sorted({p.name for p in _class_folders(folder)} - set(classes))
        if unknown:
            raise UserError(
                f"{folder} has class {unknown[0]!r}{_and_more(unknown)} that {train_folder} does not have "
                f"({len(classes)} classes: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"
            )
        held_out[name], counts = _scan(folder, classes)
        missing = [classes[i] for i, count in enumerate(counts) if count == 0]
        if len(missing) == len(classes):
            raise UserError(f"{folder} holds no class folders")
        if missing:
            notes.append(f"{folder} has no images of class {missing[0]!r}{_and_more(missing)}")
    return Splits(train, held_out.get("val"), held_out.get("test"), classes, notes)


# -- the hub ---------------------------------------------------------------------------------------------------------


def _tars(root: Path) -> dict[str, list[str]]:
    """WebDataset's tar files by split, in order: ``root/<split>/*.tar``, ``root/<split>-*.tar`` or
    ``root/data/<split>-*.tar``. None where other folders stand there: an archive beside its images is no data set.

    What the archives hold is for datasets' own builder: ``<key>.webp`` and ``<key>.cls`` are columns webp and cls.
    """
    folders = _class_folders(root)
    found: dict[str, list[str]] = {}
    if any(_class_folders(folder) or not any(folder.glob("*.tar")) for folder in folders):
        return found
    for path in sorted(path for folder in (root, *folders) for path in folder.glob("*.tar")):
        apart = path.parent in folders and path.parent.name != "data"
        split = path.parent.name if apart else re.split(r"[^a-z]", path.stem.lower())[0]
        found.setdefault(split or "train", []).append(str(path))
    return found


def _load_hub(
    name: str,
    config: FinetuneConfig,
    names: dict[str, str] | None,
    saved: bool = False,
    tars: dict[str, list[str]] | None = None,
) -> Splits:
    """A data set of the hub, one ``saved`` to a folder here, or a folder's ``tars``."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"reading {name} needs the datasets library: pip install 'fastgist[train]'") from None
    try:
        if saved:
            tables = datasets.load_from_disk(name)
        elif tars is not None:  # text files may stand beside them, of which datasets would guess another format
            tables = datasets.load_dataset("webdataset", data_files=tars)
        else:
            tables = datasets.load_dataset(name, config.subset)
    except Exception as error:
        reason = " ".join(str(error).split())
        what = "is no folder here and" if not (saved or tars) else "is a folder that"
        raise UserError(f"{name} {what} could not be loaded as a data set: {reason}") from error
    if isinstance(tables, datasets.Dataset):
        tables = datasets.DatasetDict(train=tables)
    wanted = {ours: (theirs,) for ours, theirs in names.items()} if names else _SPLITS
    for theirs in wanted.values() if names else (wanted["train"],):
        if theirs[0] not in tables:
            raise UserError(f"data set {name} has no {theirs[0]} split (it has {', '.join(tables)})")
    whole = wanted["train"][0]
    image_column, label_column = _columns(name, tables[whole], config)
    if not isinstance(tables[whole].features[label_column], datasets.ClassLabel):
        tables = tables.class_encode_column(label_column)
    classes = list(tables[whole].features[label_column].names)
    notes: list[str] = []
    splits: dict[str, Split] = {}
    for ours, theirs in wanted.items():
        found = next((t for t in theirs if t in tables), None)
        if found is None:
            continue
        labelled = list(tables[found].features[label_column].names)
        unknown = sorted(set(labelled) - set(classes))
        if unknown:
            raise UserError(f"split {found} of {name} has class {unknown[0]!r}{_and_more(unknown)} that train has not")
        table = tables[found].cast_column(image_column, datasets.Image(decode=False))
        raw = [int(label) if label is not None else -1 for label in table[label_column]]
        labels = [classes.index(labelled[label]) if 0 <= label < len(labelled) else -1 for label in raw]
        keep = [row for row, label in enumerate(labels) if label >= 0]
        if len(keep) < len(labels):
            notes.append(f"{len(labels) - len(keep)} of {len(labels)} images in split {found} have no label: left out")
        if keep:
            splits[ours] = Split(HubSource(table, image_column, found), keep, [labels[row] for row in keep])
    if "train" not in splits:
        raise UserError(f"the train split of {name} has no labelled images")
    present = set(splits["train"].labels)
    absent = [c for i, c in enumerate(classes) if i not in present]
    if absent:
        raise UserError(f"no training images of class {absent[0]!r}{_and_more(absent)} in data set {name}")
    return Splits(splits["train"], splits.get("val"), splits.get("test"), classes, notes)


def _columns(name: str, table: Any, config: FinetuneConfig) -> tuple[str, str]:
    """The image and the label column, as asked for or by their types."""
    import datasets

    for given in (config.image_column, config.label_column):
        if given is not None and given not in table.features:
            raise UserError(f"data set {name} has no column {given!r} (it has {', '.join(table.features)})")
    images = [c for c, f in table.features.items() if isinstance(f, datasets.Image)]
    labels = [c for c, f in table.features.items() if isinstance(f, datasets.ClassLabel)]
    labels = labels or [c for c in ("label", "labels", "class") if c in table.features]
    image_column = config.image_column or (images[0] if images else None)
    label_column = config.label_column or (labels[0] if labels else None)
    for kind, column in (("image", image_column), ("label", label_column)):
        if column is None:
            raise UserError(
                f"found no {kind} column in data set {name} (it has {', '.join(table.features)}): "
                f"name one with --{kind}-column"
            )
    return str(image_column), str(label_column)


# -- checks ----------------------------------------------------------------------------------------------------------


def unreadable(split: Split, description: str, progress: bool) -> list[tuple[int, str]]:
    """Decode every image once, in threads; returns (index, reason) of those that cannot be decoded."""
    from PIL import Image
    from tqdm import tqdm

    def check(index: int) -> str | None:
        try:
            with split.source.open(split.rows[index]) as file, Image.open(file) as picture:
                check_mode(picture)
                picture.draft("RGB", (32, 32))  # a JPEG at an eighth of its size: all bytes read, few computed
                picture.load()
        except Image.UnidentifiedImageError:
            return "not an image, or damaged"
        except Exception as error:
            return " ".join(str(error).split())
        return None

    logging.getLogger("PIL").setLevel(logging.ERROR)
    with ThreadPoolExecutor() as pool:
        reasons = tqdm(
            pool.map(check, range(len(split))),
            description,
            total=len(split),
            unit="img",
            leave=False,
            disable=not progress,
        )
        return [(index, reason) for index, reason in enumerate(reasons) if reason is not None]


def without(splits: Splits, bad: dict[str, list[tuple[int, str]]], skip: bool) -> Splits:
    """Leave unreadable images out, or raise a UserError that names the first of them."""
    count = sum(map(len, bad.values()))
    if not count:
        return splits
    parts = splits.named()
    name, (index, reason) = next((name, found[0]) for name, found in bad.items() if found)
    where = parts[name].source.name(parts[name].rows[index])
    if not skip:
        plural = f"{count} images cannot be read, the first is" if count > 1 else "cannot read image"
        raise UserError(f"{plural} {where} ({reason}): remove it, or pass --skip-unreadable")
    kept = {}
    for name, split in parts.items():
        drop = {index for index, _ in bad.get(name, [])}
        kept[name] = split.subset([i for i in range(len(split)) if i not in drop])
        emptied = sorted(set(split.labels) - set(kept[name].labels))
        if emptied and name == "train":
            raise UserError(f"no readable training image of class {splits.classes[emptied[0]]!r} is left")
        if not kept[name].rows:
            raise UserError(f"no readable image is left in the {name} split")
    note = f"left out {count} unreadable image{'s' if count > 1 else ''}, the first is {where} ({reason})"
    return Splits(kept["train"], kept.get("val"), kept.get("test"), splits.classes, [*splits.notes, note])


# -- order -----------------------------------------------------------------------------------------------------------


class EpochBatches(Sampler[list[Draw]]):
    """This process's batches of one epoch: a permutation that depends on (seed, epoch) alone, from any position.

    All processes share the permutation; of each global batch, process r takes every ``world``-th image from the r-th
    on. Where the images fill at least one global batch the ragged end of the permutation is dropped (other images
    every epoch); where they do not, the one batch is filled up from its beginning so that processes have equal shares.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.size, self.seed, self.rank, self.world = size, seed, rank, world
        self.total = batch_size * world
        self.steps = max(1, size // self.total)
        self.epoch = 0
        self.start = 0

    def seek(self, epoch: int, start: int) -> None:
        """The next iteration yields batches ``start`` and on of ``epoch``."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        if self.size < self.total:
            order += (order * self.world)[: -self.size % self.world]
        for step in range(self.start, self.steps):
            batch = order[step * self.total : (step + 1) * self.total]
            yield [Draw(index, self.epoch) for index in batch[self.rank :: self.world]]
