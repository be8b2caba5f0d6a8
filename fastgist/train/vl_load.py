"""The vision-language data sets by name, their files found under the names that they are published by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastgist.train import vl_captions as captions
from fastgist.train import vl_questions as questions
from fastgist.train.config import UserError
from fastgist.train.vl_records import Missing, VLDataset

__all__ = ["NAMES", "load"]

_Loader = Callable[[Path, Path, str, Missing], VLDataset]


def load(
    name: str, root: Path | str, split: str, images: Path | str | None = None, missing: Missing = "error"
) -> VLDataset:
    """Data set ``name`` from the files in ``root``, or in a folder in it.

    Args:
        name: one of :data:`NAMES`.
        root: where the annotations lie; nothing is downloaded.
        split: as the data set calls it: "train", "val", "test", VQAv2's "test-dev", GQA's "testdev".
        images: the folder of images, as the loader of the data set describes it; ``root`` if not given.
        missing: what to do about images that are not there.

    Raises:
        UserError: a file is not there or not as published, or images are missing.
        ValueError: no such data set.
    """
    if name not in _LOADERS:
        raise ValueError(f"load: expected one of {', '.join(NAMES)}, got {name!r}")
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    return _LOADERS[name](root, Path(images) if images is not None else root, split, missing)


def _find(root: Path, *names: str) -> Path:
    """The first of ``names`` that is in ``root`` or, in one place only, in a folder in it."""
    for name in names:
        if (root / name).exists():
            return root / name
        found = sorted(root.glob(f"*/{name}"))
        if len(found) > 1:
            raise UserError(f"{root}: {name} is there more than once: {', '.join(str(path) for path in found)}")
        if found:
            return found[0]
    raise UserError(f"{root} holds no {' or '.join(names)}, nor does a folder in it")


def _vqa(loader: Callable[..., VLDataset], prefix: str) -> _Loader:
    subsets = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}

    def found(root: Path, images: Path, split: str, missing: Missing) -> VLDataset:
        subset = subsets.get(split)
        if subset is None:
            raise ValueError(f"split: expected one of {', '.join(subsets)}, got {split!r}")
        asked = _find(root, f"{prefix}OpenEnded_mscoco_{subset}_questions.json")
        answered = None if split.startswith("test") else _find(root, f"{prefix}mscoco_{subset}_annotations.json")
        return loader(asked, images, answered, split, missing)

    return found


def _one_file(loader: Callable[..., VLDataset], *patterns: str) -> _Loader:
    def found(root: Path, images: Path, split: str, missing: Missing) -> VLDataset:
        return loader(_find(root, *(pattern.format(split) for pattern in patterns)), images, split, missing=missing)

    return found


_LOADERS: dict[str, _Loader] = {
    "vqav2": _vqa(questions.vqav2, "v2_"),
    "okvqa": _vqa(questions.okvqa, ""),
    "aokvqa": _one_file(questions.aokvqa, "aokvqa_v1p0_{}.json"),
    "gqa": _one_file(questions.gqa, "{}_balanced_questions.json"),
    "textvqa": _one_file(questions.textvqa, "TextVQA_0.5.1_{}.json"),
    "coco2014": _one_file(captions.coco, "captions_{}2014.json", "image_info_{}2014.json"),
    "coco2017": _one_file(captions.coco, "captions_{}2017.json", "image_info_{}2017.json"),
    "coco": _one_file(captions.coco_karpathy, "dataset_coco.json"),
    "flickr30k": _one_file(captions.flickr30k, "dataset_flickr30k.json"),
    "textcaps": _one_file(captions.textcaps, "TextCaps_0.1_{}.json"),
    "nocaps": _one_file(captions.nocaps, "nocaps_{}_4500_captions.json", "nocaps_{}_image_info.json"),
}

#: "coco" and "flickr30k" are Karpathy's splits, "coco2014" and "coco2017" COCO's own.
NAMES = tuple(_LOADERS)
