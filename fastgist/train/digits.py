"""The demo's data: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, shipped inside that package.

Digits 0-4 are the task of pre-training, 5-9 the new task. The new digits are cut once, by a fixed seed, into a pool and
a test half. Few-shot training images are drawn from the pool; what is left of the pool is what the demo's learning
rates were chosen on; the test half is looked at once, at the end of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastgist.train.data import Draw, derive_seed

__all__ = ["NEW", "OLD", "DigitImages", "Digits"]

OLD = (0, 1, 2, 3, 4)
NEW = (5, 6, 7, 8, 9)
_CUT_SEED = 20240901


@dataclass
class DigitImages(Dataset):
    """Images (M, 1, 8, 8) in [-1, 1] and labels (M,) counted from 0 within their task."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: Draw | int) -> tuple[Tensor, Tensor]:
        index = draw.row if isinstance(draw, Draw) else draw
        return self.images[index], self.labels[index]

    def cut(self, share: float, seed: int) -> tuple[DigitImages, DigitImages]:
        """Two parts, ``share`` of every class in the first."""
        return self._divide([round(share * int((self.labels == c).sum())) for c in self.labels.unique()], seed)

    def draw(self, shots: int, seed: int) -> tuple[DigitImages, DigitImages]:
        """``shots`` images of every class, and the rest."""
        return self._divide([shots] * len(self.labels.unique()), seed)

    def _divide(self, first: list[int], seed: int) -> tuple[DigitImages, DigitImages]:
        generator = torch.Generator().manual_seed(derive_seed(seed, len(self)))
        mine, rest = [], []
        for label, count in zip(self.labels.unique().tolist(), first, strict=True):
            members = torch.nonzero(self.labels == label).flatten()
            members = members[torch.randperm(len(members), generator=generator)]
            mine.append(members[:count])
            rest.append(members[count:])
        one, other = torch.cat(mine), torch.cat(rest)
        return DigitImages(self.images[one], self.labels[one]), DigitImages(self.images[other], self.labels[other])


@dataclass
class Digits:
    """The four parts of the data; no image is in two of them."""

    old_train: DigitImages
    old_test: DigitImages
    pool: DigitImages
    test: DigitImages

    @classmethod
    def load(cls) -> Digits:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
        labels = torch.from_numpy(bunch.target).long()
        old, new = (
            DigitImages(images[members], labels[members] - task[0])
            for task in (OLD, NEW)
            for members in [torch.isin(labels, torch.tensor(task))]
        )
        old_train, old_test = old.cut(0.8, _CUT_SEED)
        pool, test = new.cut(0.5, _CUT_SEED)
        return cls(old_train, old_test, pool, test)
