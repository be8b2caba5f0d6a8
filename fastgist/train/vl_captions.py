"""Images with captions, from the files that the data sets' authors publish: COCO, Flickr30k, TextCaps, NoCaps.

One record an image, its captions in the file's order; :meth:`VLDataset.one_per_reference` gives one an image and caption.
A test split without captions gives records whose references are None. What is wrong with a file is a UserError that names
it; ``missing`` says what to do about images that are not there ("error", "drop", "ignore").
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastgist.train.config import UserError
from fastgist.train.vl_files import Table, field, read_json, read_text, wanted_split
from fastgist.train.vl_questions import check_named
from fastgist.train.vl_records import Missing, Record, VLDataset, checked, image_folder

__all__ = ["coco", "coco_karpathy", "flickr30k", "flickr30k_tokens", "nocaps", "textcaps"]

_SPLITS = ("train", "val", "test")
DOMAINS = ("in-domain", "near-domain", "out-domain")


def coco(
    annotations: Path | str, images: Path | str, split: str | None = None, missing: Missing = "error"
) -> VLDataset:
    """COCO captions (arXiv 1504.00325): ``captions_<split>2014.json`` or ``2017``, ``image_info_test2014.json``.

    Args:
        annotations: the file; its name says the split and the year.
        images: COCO's folder, with ``val2014/`` and so on in it, or that folder itself.
        split: where the name does not say it; raise if it says another.
    """
    path = Path(annotations)
    found = re.search(r"(train|val|test)(\d{4})", path.name)
    split = wanted_split(path, found.group(1) if found else None, split, _SPLITS)
    folder = image_folder(Path(images), *([found.group()] if found else []))
    return VLDataset(checked(_coco_format("coco", path, folder, split), path, missing))


def nocaps(
    annotations: Path | str, images: Path | str, split: str | None = None, missing: Missing = "error"
) -> VLDataset:
    """NoCaps (arXiv 1812.08658): ``nocaps_val_4500_captions.json``, COCO's format with a domain to each image.

    ``nocaps_val_image_info.json`` and ``nocaps_test_image_info.json``, of before the captions of val were published and
    for submissions, are read too: without captions, and without domains where they have none.

    Args:
        annotations: the file; its name says the split.
        images: the folder of Open Images' files ``0013ea2087020901.jpg``, or one with ``val/`` and ``test/`` in it.
        split: where the name does not say it; raise if it says another.
    """
    path = Path(annotations)
    found = re.search(r"(?<![a-z])(val|test)(?![a-z])", path.name)
    split = wanted_split(path, found.group() if found else None, split, ("val", "test"))
    folder = image_folder(Path(images), split)
    return VLDataset(checked(_coco_format("nocaps", path, folder, split), path, missing))


def _coco_format(name: str, path: Path, folder: Path, split: str) -> list[Record]:
    whole = read_json(path)
    pictures = Table.of(path, whole, "images")
    captions: dict[int | str, list[str]] = {}
    rows: dict[int | str, tuple[str, Any]] = {}
    for place, row in pictures:
        key = pictures.identity(place, row, "id")
        if key in rows:
            raise UserError(f"{path}: {place} repeats id {key}")
        rows[key] = place, row
        captions[key] = []
    annotated = "annotations" in whole or not (split == "test" or name == "nocaps")
    if annotated:
        table = Table.of(path, whole, "annotations")
        for place, row in table:
            key = table.identity(place, row, "image_id")
            if key not in captions:
                raise UserError(f"{path}: {place} is of image {key}, which 'images' does not have")
            captions[key].append(table.get(place, row, "caption", str))
        without = [key for key, texts in captions.items() if not texts]
        if without:
            raise UserError(
                f"{path}: {len(without)} of its {len(rows)} images have no caption, the first is {without[0]}"
            )
    records = []
    for key, (place, row) in rows.items():
        domain = row.get("domain")
        if domain is not None and domain not in DOMAINS:
            raise UserError(f"{path}: {place}['domain'] is {domain!r}, expected one of {', '.join(DOMAINS)}")
        references = tuple(captions[key]) if annotated else None
        image = folder / pictures.file(place, row, "file_name")
        records.append(Record(name, split, key, key, image, references=references, domain=domain))
    return records


# -- Karpathy's splits -----------------------------------------------------------------------------------------------


def coco_karpathy(
    annotations: Path | str, images: Path | str, split: str, restval: bool = True, missing: Missing = "error"
) -> VLDataset:
    """COCO in Karpathy's split (arXiv 1412.2306): ``dataset_coco.json``, images of train2014 and val2014.

    Args:
        annotations: the file.
        images: COCO's folder, with ``train2014/`` and ``val2014/`` in it.
        split: "train", "val" or "test".
        restval: the images of val2014 that are in neither val nor test count as "train", as usual.
    """
    return _karpathy("coco", Path(annotations), Path(images), split, restval, missing)


def flickr30k(annotations: Path | str, images: Path | str, split: str, missing: Missing = "error") -> VLDataset:
    """Flickr30k in Karpathy's split: ``dataset_flickr30k.json``; an image's id is its file's number.

    Args:
        annotations: the file.
        images: the folder with ``flickr30k-images/1000092795.jpg`` or those files themselves in it.
        split: "train", "val" or "test".
    """
    return _karpathy("flickr30k", Path(annotations), Path(images), split, False, missing)


def _karpathy(name: str, path: Path, images: Path, split: str, restval: bool, missing: Missing) -> VLDataset:
    if split not in _SPLITS:
        raise ValueError(f"split: expected one of {', '.join(_SPLITS)}, got {split!r}")
    whole = read_json(path)
    table = Table.of(path, whole, "images")
    said = whole.get("dataset", name)
    if said != name:
        raise UserError(f"{path}: is of the data set {said!r}, not {name!r}")
    kept = {split, "restval"} if split == "train" and restval else {split}
    base = image_folder(images, *(["flickr30k-images", "flickr30k_images"] if name == "flickr30k" else []))
    folders: dict[str, Path] = {}
    records = []
    for place, row in table:
        if table.get(place, row, "split", str) not in kept:
            continue
        file = table.file(place, row, "filename")
        sentences = table.get(place, row, "sentences", list)
        texts = tuple(field(path, f"{place}['sentences'][{i}]", s, "raw", str) for i, s in enumerate(sentences))
        if not texts:
            raise UserError(f"{path}: {place}['sentences'] is an empty list, expected captions")
        folder, key = base, flickr_id(file)
        if name == "coco":
            under = table.get(place, row, "filepath", str)
            folder = folders.setdefault(under, image_folder(images, under))
            key = table.get(place, row, "cocoid", int)
        records.append(Record(name, split, key, key, folder / file, references=texts))
    return VLDataset(checked(records, path, missing))


def flickr_id(file: str) -> int | str:
    """The number that a Flickr30k image's file is named by (its name, if by none)."""
    stem = file.rsplit("/", 1)[-1].split(".")[0]
    return int(stem) if stem.isascii() and stem.isdigit() else stem


def flickr30k_tokens(
    captions: Path | str,
    images: Path | str,
    split: str = "all",
    split_file: Path | str | None = None,
    missing: Missing = "error",
) -> VLDataset:
    """Flickr30k (TACL 2014): ``results_20130124.token``, lines ``1000092795.jpg#0<TAB>caption`` without any split.

    Args:
        captions: the file.
        images: the folder with ``flickr30k-images/`` or the files themselves in it.
        split: what the records are called.
        split_file: take these images alone, one a line, with or without ``.jpg``.
    """
    path = Path(captions)
    texts: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        found = re.fullmatch(r"([^\t#]+)#(\d+)\t(.+?)\s*", line)
        if found is None:
            raise UserError(f"{path}: line {number} is not 'NAME.jpg#NUMBER<tab>CAPTION': {line[:60]!r}")
        texts.setdefault(found[1], []).append((int(found[2]), found[3]))
    if split_file is not None:
        texts = _only(path, texts, Path(split_file))
    folder = image_folder(Path(images), "flickr30k-images", "flickr30k_images")
    records = []
    for file, numbered in texts.items():
        references = tuple(text for _, text in sorted(numbered, key=lambda pair: pair[0]))
        key = flickr_id(file)
        records.append(Record("flickr30k", split, key, key, folder / file, references=references))
    return VLDataset(checked(records, path, missing))


def _only(path: Path, texts: dict[str, list[tuple[int, str]]], split_file: Path) -> dict[str, list[tuple[int, str]]]:
    by_id = {flickr_id(file): file for file in texts}
    wanted = [flickr_id(line.strip()) for line in read_text(split_file).splitlines() if line.strip()]
    absent = [key for key in wanted if key not in by_id]
    if absent:
        raise UserError(
            f"{split_file}: {len(absent)} of its {len(wanted)} images have no caption in {path}, the first is {absent[0]}"
        )
    return {by_id[key]: texts[by_id[key]] for key in wanted}


# -- TextCaps --------------------------------------------------------------------------------------------------------


def textcaps(
    annotations: Path | str, images: Path | str, split: str | None = None, missing: Missing = "error"
) -> VLDataset:
    """TextCaps (arXiv 2003.12462): ``TextCaps_0.1_<split>.json``, an entry a caption, put together by image.

    Args:
        annotations: the file; its ``dataset_type`` says the split.
        images: the folder with ``train_images/`` (which holds the val images too) and ``test_images/``, or one of these.
        split: raise if the file is of another one.
    """
    path = Path(annotations)
    whole = read_json(path)
    check_named(path, whole, "textcaps")
    table = Table.of(path, whole, "data")
    split = wanted_split(path, field(path, "", whole, "dataset_type", str), split, _SPLITS)
    folder = image_folder(Path(images), "test_images" if split == "test" else "train_images")
    captions: dict[str, list[str] | None] = {}
    for place, row in table:
        key = table.get(place, row, "image_id", str)
        if split == "test" and not row.get("caption_str"):
            captions[key] = None
            continue
        texts = captions.setdefault(key, [])
        if texts is None:
            raise UserError(f"{path}: {place} is one caption of an image that has others without any")
        texts.append(table.get(place, row, "caption_str", str))
    records = [
        Record("textcaps", split, key, key, folder / f"{key}.jpg", references=None if texts is None else tuple(texts))
        for key, texts in captions.items()
    ]
    return VLDataset(checked(records, path, missing))
