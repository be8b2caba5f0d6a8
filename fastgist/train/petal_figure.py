"""The figure of ``fastgist demo petal``: accuracies by question, and captions that PETAL generated beside their images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgist.train.compare_figure import BLUE, GREY, VERMILION, save

__all__ = ["draw"]

_COLUMNS = 5
#: A colour and a shape for each row of the table (Okabe and Ito's).
_LOOKS = ((VERMILION, "D"), (BLUE, "o"), ("#009E73", "s"), ("#CC79A7", "^"))


def draw(path: Path, metrics: dict[str, Any], images: Tensor, picked: Sequence[int]) -> None:
    """Write the figure; the suffix of ``path`` names the format.

    Args:
        metrics: the demo's, with "rows", "untuned", "questions" and "example".
        images: (M, 1, 8, 8); picked: which of them the example's captions are of.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.8), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    left, right = halves
    _accuracies(left.subplots(), metrics)
    example = metrics["example"]
    replies = "\n".join(f"{question} {answer}" for question, answer in example["answers"].items())
    words = f"PETAL, first draw, {example['beams']} beams: {example['instruction']}\nthe first test image of each digit"
    right.suptitle(words, fontsize=11)
    grid = right.subplots(-(-len(picked) // _COLUMNS), _COLUMNS, squeeze=False)
    for axes, index, said, truth in zip(grid.flat, picked, example["captions"], example["right"], strict=True):
        axes.imshow(images[index, 0].numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        wrong = said != truth
        title = "\n".join(said.rsplit(" ", 1)) or "(nothing)"
        axes.set_title(title, fontsize=8, color=VERMILION if wrong else "black")
        for spine in axes.spines.values():
            spine.set(color=VERMILION if wrong else "#BBBBBB", linewidth=3 if wrong else 0.8)
    right.supxlabel(f"about the {example['of']}:\n{replies}", fontsize=9)
    save(figure, path)


def _accuracies(axes: Any, metrics: dict[str, Any]) -> None:
    names = ["all", *metrics["questions"]]
    rows = metrics["rows"]
    for number, (row, (colour, marker)) in enumerate(zip(rows, _LOOKS, strict=False)):
        shift = 0.16 * (number - (len(rows) - 1) / 2)
        for place, name in enumerate(names):
            values = [100 * found[name] for found in row["accuracies"].values()]
            axes.plot([place + shift] * len(values), values, marker, mfc="none", mec=colour, ms=5, alpha=0.8)
            axes.plot([place + shift], [100 * row["accuracy"][name]["mean"]], "_", color=colour, ms=13, mew=2.5)
        share = row["trained"] / row["qformer"]
        label = f"{row['name']}: {row['trained']:,} trained, {share:.1%} of the Q-Former"
        axes.plot([], [], marker, mfc="none", mec=colour, label=label)
    for place, name in enumerate(names):
        level = 100 * metrics["untuned"][name]
        axes.plot([place - 0.4, place + 0.4], [level, level], "--", color=GREY, lw=1.3)
    axes.plot([], [], "--", color=GREY, label="untuned base")
    axes.plot([], [], "_", color="black", ms=12, mew=2.5, label="mean of the draws")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(-3, 103)
    axes.set_ylabel(f"right answers (%) on {metrics['test_images']} held-out images")
    axes.set_title(f"new questions from {metrics['shots']} images of each digit", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=8, frameon=False)
