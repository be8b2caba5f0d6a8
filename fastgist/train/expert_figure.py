"""The figure of an instruction mixture of experts: how much of each expert every instruction takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fastgist.train.compare_figure import save

__all__ = ["draw"]


def draw(path: Path, usage: Mapping[str, Sequence[float] | Tensor]) -> None:
    """Write a heat map, a row an instruction and a column an expert; the suffix of ``path`` names the format.

    Args:
        path: where to.
        usage: each instruction's text -> its K shares, such as ``InstructionMoE.usage`` after a call with it.

    Raises:
        ValueError: no instruction, no expert, or instructions of different numbers of experts.
    """
    from matplotlib.figure import Figure

    rows = [[float(share) for share in shares] for shares in usage.values()]
    counts = sorted({len(row) for row in rows})
    if len(counts) != 1 or counts == [0]:
        raise ValueError(f"draw: expected the same number of experts (> 0) for every instruction, got {counts}")
    figure = Figure(figsize=(3.5 + 0.8 * counts[0], 1.6 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    top = max(max(row) for row in rows)
    image = axes.imshow(rows, cmap="Blues", vmin=0.0, vmax=max(top, 1.0 / counts[0]), aspect="auto")
    for place, row in enumerate(rows):
        for expert, share in enumerate(row):
            colour = "white" if share > 0.6 * max(top, 1.0 / counts[0]) else "black"
            axes.text(expert, place, f"{100 * share:.0f}%", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(counts[0]), [str(expert + 1) for expert in range(counts[0])])
    axes.set_yticks(range(len(rows)), list(usage))
    axes.set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="mean weight")
    save(figure, path)
