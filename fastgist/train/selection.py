"""Which images a run trains on and selects by: few-shot draws, draws of a given size, a held-out share.

Test images are never among them. A draw is a function of (seed, class) or of the seed alone, so runs of the same seed
share it whatever they train, and a draw of fewer images is part of one of more.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fastgist.train.config import FinetuneConfig, UserError
from fastgist.train.data import Split, Splits, derive_seed

__all__ = ["draw", "hold_out"]

#: Of a few-shot run without a size for it, images of each class to select by: as many as the shots, at most so many.
FEW_SHOT_VAL = 4

_SHOTS, _IMAGES, _VAL = 11, 12, 13  # streams of random numbers, apart from the others


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
        train, rest = _each(splits.train, config.shots, splits.classes, config.seed)
        about = f"{config.shots} images of each class"
    else:
        assert config.train_images is not None
        order = _permutation(len(splits.train), config.seed, _IMAGES)
        _enough(len(order), config.train_images, "--train-images")
        train, rest = order[: config.train_images], order[config.train_images :]
        about = f"{config.train_images} images"
    source = splits.val if splits.val is not None else splits.train.subset(sorted(rest))
    val = _selection(source, config, splits.classes)
    notes = [*splits.notes, f"trains on {about} drawn by seed {config.seed}"]
    if val is not None:
        notes.append(f"selects by {len(val)} images of the {'train' if splits.val is None else 'val'} split")
    return replace(splits, train=splits.train.subset(sorted(train)), val=val, notes=notes)


def _selection(source: Split, config: FinetuneConfig, classes: list[str]) -> Split | None:
    if config.val_images is not None:
        return _some(source, config.val_images, config.seed, _VAL, "--val-images")
    if config.val_split == 0 or config.shots is None:
        return None if config.val_split == 0 else _share(source, config)
    few = min(config.shots, FEW_SHOT_VAL)
    found: list[int] = []
    for label in range(len(classes)):
        members = [i for i, other in enumerate(source.labels) if other == label]
        order = _permutation(len(members), config.seed, _VAL, label)
        found += [members[i] for i in order[:few]]
    if not found:
        raise UserError("no images are left to select by: give fewer --shots, a val split, or pass --val-split 0")
    return source.subset(sorted(found))


def _share(source: Split, config: FinetuneConfig) -> Split:
    """For a draw of --train-images: --val-split says how many to select by, as a share of them."""
    assert config.train_images is not None
    count = max(1, round(config.val_split * config.train_images))
    return _some(source, min(count, len(source)), config.seed, _VAL, "--val-split")


def _each(split: Split, shots: int, classes: list[str], seed: int) -> tuple[list[int], list[int]]:
    """``shots`` rows of each class, and the rest."""
    train: list[int] = []
    rest: list[int] = []
    for label, name in enumerate(classes):
        members = [i for i, other in enumerate(split.labels) if other == label]
        if len(members) < shots:
            raise UserError(f"--shots {shots}: class {name!r} has {len(members)} training images")
        order = _permutation(len(members), seed, _SHOTS, label)
        train += [members[i] for i in order[:shots]]
        rest += [members[i] for i in order[shots:]]
    return train, rest


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
