"""Pictures with questions or captions: one typed record an item, whatever the data set; pictures opened when asked for.

:mod:`fastgist.train.vl_questions` and :mod:`fastgist.train.vl_captions` read records from the files as published,
:mod:`fastgist.train.vl_collate` makes a model's inputs of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import Dataset

from fastgist.train.config import UserError
from fastgist.train.data import Draw, to_rgb

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Example", "Missing", "Record", "VLDataset"]

#: What to do about images that are not there: raise, leave their records out, or do not look.
Missing = Literal["error", "drop", "ignore"]


@dataclass(frozen=True, slots=True)
class Record:
    """One question about an image, or one image with its captions.

    Attributes:
        dataset: name of the data set, as in :data:`fastgist.train.vl_load.NAMES`.
        split: "train", "val", "test", ... as the data set calls it.
        id: what a results file is keyed by: the question's id, or for captions the image's.
        image_id: the image's id, of the type that the data set's file has.
        image: where the image lies.
        question: None for captions.
        answers: what the annotators said, one entry each, in the file's order; None where the split has none.
        references: the image's captions; None for questions, and where the split has none.
        answer_type: VQA's "yes/no", "number", "other", where given.
        domain: NoCaps' "in-domain", "near-domain", "out-domain".
        choices, correct_choice: A-OKVQA's options and the right one's index.
        difficult: A-OKVQA's ``difficult_direct_answer``: not counted by the official evaluation of direct answers.
    """

    dataset: str
    split: str
    id: int | str
    image_id: int | str
    image: Path
    question: str | None = None
    answers: tuple[str, ...] | None = None
    references: tuple[str, ...] | None = None
    answer_type: str | None = None
    domain: str | None = None
    choices: tuple[str, ...] | None = None
    correct_choice: int | None = None
    difficult: bool = False

    @property
    def targets(self) -> tuple[str, ...] | None:
        """What a model should say, repeated as often as it was said: the answers or the captions."""
        return self.references if self.question is None else self.answers

    @property
    def counts(self) -> dict[str, int]:
        """target -> how often it was given, the most frequent first (of equals, the file's first)."""
        return dict(Counter(self.targets or ()).most_common())

    @property
    def soft_scores(self) -> dict[str, float]:
        """answer -> VQA accuracy of just saying it: the mean of min(others who said so / 3, 1) over the annotators.

        Of ten: 0.3, 0.6, 0.9, 1, 1, ... for 1, 2, 3, 4, 5, ... Strings are compared as they are. An only answer scores 1.
        """
        counts = self.counts
        total = sum(counts.values())
        if total == 1:
            return dict.fromkeys(counts, 1.0)
        return {
            answer: (count * min(count - 1, 3) + (total - count) * min(count, 3)) / (3 * total)
            for answer, count in counts.items()
        }


@dataclass(frozen=True)
class Example:
    """A record with its picture, and which draw of which row it is: from that follows what is sampled."""

    record: Record
    picture: Any
    row: int = 0
    epoch: int = 0


class VLDataset(Dataset):
    """Records as a map-style data set: item ``row`` is an :class:`Example`, its picture read then, upright and RGB.

    An item is also asked for by a :class:`fastgist.train.data.Draw` of row and epoch, as
    :class:`fastgist.train.data.EpochBatches` does. With plain numbers the epoch is the one last set by
    :meth:`set_epoch`, which accelerate's and so Trainer's loaders call.

    Args:
        records: of one data set or several.
        transform: applied to the PIL picture; None gives it as it is.
    """

    def __init__(self, records: Iterable[Record], transform: Callable[[Any], Any] | None = None) -> None:
        self.records = list(records)
        self.transform = transform
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, draw: Draw | int) -> Example:
        row, epoch = draw if isinstance(draw, Draw) else (draw, self.epoch)
        record = self.records[row]
        picture = read_picture(record.image)
        if self.transform is not None:
            picture = self.transform(picture)
        return Example(record, picture, row % len(self.records), epoch)

    def __add__(self, other: Any) -> VLDataset:  # type: ignore[override]  # torch's knows no draws and no epochs
        if not isinstance(other, VLDataset):
            return NotImplemented
        return VLDataset([*self.records, *other.records], self.transform)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of draws by plain number. Loader processes that live on between epochs do not hear of it."""
        self.epoch = epoch

    def subset(self, rows: Iterable[int]) -> VLDataset:
        """The records of ``rows``, in that order."""
        return VLDataset([self.records[row] for row in rows], self.transform)

    def one_per_reference(self) -> VLDataset:
        """An item for every caption instead of every image, as captioning models are usually trained; not to evaluate.

        Raises:
            UserError: a record has no captions.
        """
        without = next((r for r in self.records if r.references is None), None)
        if without is not None:
            raise UserError(f"image {without.image_id} of {without.dataset} ({without.split}) has no captions")
        records = [replace(r, references=(text,)) for r in self.records for text in r.references or ()]
        return VLDataset(records, self.transform)


def read_picture(path: Path) -> Image.Image:
    """The image at ``path`` as 8-bit RGB, turned as its EXIF orientation says. UserError where it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return to_rgb(picture)
    except Image.UnidentifiedImageError:
        raise UserError(f"cannot read image {path} (not an image, or damaged)") from None
    except Exception as error:  # Pillow raises many kinds for damaged files, SyntaxError among them
        raise UserError(f"cannot read image {path} ({' '.join(str(error).split())})") from error


def image_folder(images: Path, *names: str) -> Path:
    """Where images of a split lie: ``images/<name>`` or ``images/images/<name>``, the first there is, or ``images``.

    Raises:
        UserError: ``images`` is no folder.
    """
    if not images.is_dir():
        raise UserError(f"no such folder of images: {images}")
    for name in names:
        for folder in (images / name, images / "images" / name):
            if folder.is_dir():
                return folder
    return images


def checked(records: Sequence[Record], source: Path, missing: Missing) -> list[Record]:
    """``records``, their images looked for by one listing of each folder.

    Raises:
        UserError: no record at all, or images are missing and ``missing`` is "error", or all are.
    """
    if missing not in ("error", "drop", "ignore"):
        raise ValueError(f"missing: expected 'error', 'drop' or 'ignore', got {missing!r}")
    if not records:
        raise UserError(f"{source}: holds no record")
    if missing == "ignore":
        return list(records)
    listings: dict[Path, frozenset[str]] = {}
    wanted: dict[Path, bool] = {}
    for record in records:
        if record.image not in wanted:
            folder = record.image.parent
            if folder not in listings:
                listings[folder] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
            wanted[record.image] = record.image.name in listings[folder]
    absent = [path for path, there in wanted.items() if not there]
    if absent and (missing == "error" or len(absent) == len(wanted)):
        raise UserError(f"{source}: {len(absent)} of its {len(wanted)} images are missing, the first is {absent[0]}")
    return [record for record in records if wanted[record.image]]
