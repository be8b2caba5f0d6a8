"""The demo's figure: accuracies with their spread, and a sample of test images with what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgist.train.digits import DigitImages

__all__ = ["draw"]

# Okabe and Ito's colours, told apart in every common form of colour blindness; shapes differ as well.
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#666666"
_COLUMNS, _ROWS = 7, 5


def draw(path: Path, metrics: dict[str, Any], test: DigitImages, predicted: Tensor, shown: str) -> None:
    """Write the PNG. ``predicted`` are the classes that the method named ``shown`` gave on its first draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    _accuracies(halves[0], metrics)
    _sample(halves[1], metrics, test, predicted, shown)
    figure.savefig(path, dpi=150)


def _accuracies(figure: Any, metrics: dict[str, Any]) -> None:
    axes = figure.subplots()
    rows = metrics["rows"]
    for place, row in enumerate(rows):
        colour, marker = (_VERMILION, "D") if row["gist"] else (_BLUE, "o")
        values = [100 * v for v in row["accuracies"].values()]
        axes.plot(values, [place] * len(values), marker, mfc="none", mec=colour, ms=6, alpha=0.8, zorder=3)
        spread = 100 * row["std"] if row["std"] is not None else None
        axes.errorbar(
            100 * row["mean"], place, xerr=spread, fmt="|", color=colour, ms=18, mew=3, capsize=5, lw=2, zorder=2
        )
        deviation = f" ± {spread:.1f}" if spread is not None else ""
        axes.annotate(
            f"{100 * row['mean']:.1f}%{deviation}", (100 * row["mean"], place), xytext=(0, 15), ha="center",
            textcoords="offset points", fontsize=10, color=colour,
        )  # fmt: skip
    pixels = metrics["pixels_logistic_regression"]
    axes.axvline(100 * pixels["mean"], color=_GREY, ls="--", lw=1.2, zorder=1)
    names = [f"{row['name']}\n{row['trained']:,} of {row['all']:,} trained" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.margins(x=0.08)
    axes.set_xlabel(f"accuracy (%) on {metrics['test_images']} held-out images of the digits 5-9")
    draws = len(metrics["seeds"])
    axes.set_title(f"{metrics['shots']} training images a digit, {draws} draw{'s' if draws > 1 else ''}", fontsize=12)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.plot([], [], "o", mfc="none", mec=_BLUE, label="one draw, without GIST")
    axes.plot([], [], "D", mfc="none", mec=_VERMILION, label="one draw, with GIST")
    axes.plot([], [], "|-", color="black", ms=12, mew=3, label="mean ± standard deviation")
    axes.plot([], [], "--", color=_GREY, label="logistic regression on pixels (mean)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.13), ncols=2, fontsize=9, frameon=False)


def _sample(figure: Any, metrics: dict[str, Any], test: DigitImages, predicted: Tensor, shown: str) -> None:
    first = metrics["new_digits"][0]
    right = predicted == test.labels
    figure.suptitle(
        f"{shown}, first draw: {100 * float(right.double().mean()):.1f}% right\n"
        f"every {round(len(test) / (_ROWS * _COLUMNS))}th test image; wrong ones framed: true > predicted",
        fontsize=12,
    )
    grid = figure.subplots(_ROWS, _COLUMNS)
    picks = torch.linspace(0, len(test) - 1, _ROWS * _COLUMNS).round().long().tolist()
    for axes, index in zip(grid.flat, picks, strict=True):
        axes.imshow(test.images[index, 0].numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        truth, guess = int(test.labels[index]) + first, int(predicted[index]) + first
        wrong = truth != guess
        axes.set_title(f"{truth} > {guess}" if wrong else f"{guess}", fontsize=11, pad=3,
                       color=_VERMILION if wrong else "black", fontweight="bold" if wrong else "normal")  # fmt: skip
        for spine in axes.spines.values():
            spine.set(color=_VERMILION if wrong else "#BBBBBB", linewidth=3 if wrong else 0.8)
