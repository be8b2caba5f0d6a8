"""Which images or texts a run trains on and selects by: few-shot draws, draws of a given size, a held-out share.

Test data are never among them. A draw is a function of (seed, class) or of the seed alone, so runs of the same seed
share it whatever they train, and a draw of fewer is part of one of more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, Self, TypeVar

import torch

from fastgist.train.config import FinetuneConfig, UserError
from fastgist.train.data import Split, Splits, derive_seed

__all__ = ["Labelled", "draw", "few", "few_shot", "hold_out", "notes_of"]

#: Of a few-shot run without a size for it, images of each class to select by: as many as the shots, at most so many.
FEW_SHOT_VAL = 4

_SHOTS, _IMAGES, _VAL = 11, 12, 13  # streams of random numbers, apart from the others


class Labelled(Protocol):
    """A split: the class of every row, and the split of some rows. ``kind`` is what a row is, in the plural."""

    @property
    def kind(self) -> str: ...

    @property
    def labels(self) -> Sequence[int]: ...

    def subset(self, rows: list[int]) -> Self: ...


Some = TypeVar("Some", bound=Labelled)


def draw(splits: Splits, config: FinetuneConfig) -> Splits:
    """The splits with the training images that ``--shots`` or ``--train-images`` asks for.

    Images for selection come from the val split where there is one, else from the training images that were not drawn:
    ``--val-images`` of them; or, for few-shot, as many a class as the shots and at most four; none with --val-split 0.

    Raises:
        UserError: both were asked for, or there are not enough images.
    """
    if config.shots is not None and config.train_images is not None:
        raise UserError("--shots and --train-images exclude each other")
    if config.shots is None and config.train_images is None:
        if config.val_images is None:
            return splits
        if splits.val is None:
            raise UserError("--val-images without a val split needs --shots or --train-images (or take --val-split)")
        return replace(splits, val=_some(splits.val, config.val_images, config.seed, _VAL, "--val-images"))
    if config.shots is not None:
        train, rest = few_shot(splits.train, config.shots, splits.classes, config.seed)
        about = f"{config.shots} images of each class"
    else:
        assert config.train_images is not None
        order = _permutation(len(splits.train), config.seed, _IMAGES)
        _enough(len(order), config.train_images, "--train-images")
        train, rest = (splits.train.subset(sorted(part)) for part in _cut(order, config.train_images))
        about = f"{config.train_images} images"
    val = _selection(rest if splits.val is None else splits.val, config, splits.classes)
    notes = notes_of(about, config.seed, val, splits.val is None)
    return replace(splits, train=train, val=val, notes=[*splits.notes, *notes])


def few_shot(split: Some, shots: int, classes: Sequence[str], seed: int) -> tuple[Some, Some]:
    """(``shots`` rows of each class, the rest) of a training split.

    Raises:
        UserError: a class has fewer.
    """
    train: list[int] = []
    rest: list[int] = []
    for label, name in enumerate(classes):
        members = [i for i, other in enumerate(split.labels) if other == label]
        if len(members) < shots:
            raise UserError(f"--shots {shots}: class {name!r} has {len(members)} training {split.kind}")
        drawn, left = _cut(_permutation(len(members), seed, _SHOTS, label), shots)
        train += [members[i] for i in drawn]
        rest += [members[i] for i in left]
    return split.subset(sorted(train)), split.subset(sorted(rest))


def few(source: Some, shots: int, classes: Sequence[str], seed: int) -> Some:
    """The rows of ``source`` that a few-shot run selects by: as many of each class as the shots, four at most.

    Raises:
        UserError: there is none.
    """
    found: list[int] = []
    for label in range(len(classes)):
        members = [i for i, other in enumerate(source.labels) if other == label]
        order = _permutation(len(members), seed, _VAL, label)
        found += [members[i] for i in order[: min(shots, FEW_SHOT_VAL)]]
    if not found:
        raise UserError(
            f"no {source.kind} are left to select by: give fewer --shots, a val split, or pass --val-split 0"
        )
    return source.subset(sorted(found))


def notes_of(about: str, seed: int, val: Labelled | None, from_train: bool) -> list[str]:
    """What the user is told of a draw."""
    notes = [f"trains on {about} drawn by seed {seed}"]
    if val is not None:
        notes.append(f"selects by {len(val.labels)} {val.kind} of the {'train' if from_train else 'val'} split")
    return notes


def _selection(source: Split, config: FinetuneConfig, classes: list[str]) -> Split | None:
    if config.val_images is not None:
        return _some(source, config.val_images, config.seed, _VAL, "--val-images")
    if config.val_split == 0 or config.shots is None:
        return None if config.val_split == 0 else _share(source, config)
    return few(source, config.shots, classes, config.seed)


def _share(source: Split, config: FinetuneConfig) -> Split:
    """For a draw of --train-images: --val-split says how many to select by, as a share of them."""
    assert config.train_images is not None
    count = max(1, round(config.val_split * config.train_images))
    return _some(source, min(count, len(source)), config.seed, _VAL, "--val-split")


def _cut(order: list[int], count: int) -> tuple[list[int], list[int]]:
    return order[:count], order[count:]


def _some(split: Split, count: int, seed: int, stream: int, flag: str) -> Split:
    _enough(len(split), count, flag)
    return split.subset(sorted(_permutation(len(split), seed, stream)[:count]))


def _enough(have: int, wanted: int, flag: str) -> None:
    if not 0 < wanted <= have:
        raise UserError(f"{flag}: {wanted} were asked for and there are {have}")


def _permutation(size: int, *parts: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(*parts, size))).tolist()


def hold_out(splits: Splits, share: float, seed: int) -> Splits:
    """Where there is no val split, take ``share`` of every class's training images for it."""
    if splits.val is not None or share <= 0:
        return splits
    generator = torch.Generator().manual_seed(derive_seed(seed, len(splits.train)))
    train: list[int] = []
    val: list[int] = []
    for label, name in enumerate(splits.classes):
        members = [i for i, other in enumerate(splits.train.labels) if other == label]
        if len(members) < 2:
            raise UserError(
                f"too few images: class {name!r} has {len(members)} and one must be held out for validation "
                "(add images, give a val/ folder, or pass --val-split 0)"
            )
        order = torch.randperm(len(members), generator=generator).tolist()
        held = min(max(1, round(share * len(members))), len(members) - 1)
        val += [members[i] for i in order[:held]]
        train += [members[i] for i in order[held:]]
    note = f"no val split: {len(val)} of {len(splits.train)} training images held out for selection"
    return replace(
        splits,
        train=splits.train.subset(sorted(train)),
        val=splits.train.subset(sorted(val)),
        notes=[*splits.notes, note],
    )
