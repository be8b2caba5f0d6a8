"""Small folders of real images for tests: scikit-learn's digits as PNG files."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_digits"]


def write_digits(
    root: Path, counts: dict[str, int] | None = None, classes: tuple[int, ...] = (0, 1, 2), suffix: str = ".png"
) -> Path:
    """``root/<split>/digit<c>/<row>.png``, 32 x 32; ``counts`` images of each class in each split ("" for no split)."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for c in classes:
        rows = iter(np.flatnonzero(bunch.target == c))
        for split, count in (counts or {"train": 8, "val": 4, "test": 4}).items():
            folder = root / split / f"digit{c}"
            folder.mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                row = next(rows)
                picture = Image.fromarray((bunch.images[row] * 15.9).astype("uint8"))
                picture.resize((32, 32)).save(folder / f"{row}{suffix}")
    return root
