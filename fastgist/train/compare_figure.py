"""The figure of ``fastgist compare``: accuracies of every seed, and paired differences with their intervals."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fastgist.train.checkpoint import write_atomically

__all__ = ["differences", "draw", "save", "seeds_of"]

# Okabe and Ito's colours, told apart in every common form of colour blindness; shapes differ as well.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#666666"


def draw(path: Path, found: dict[str, Any]) -> None:
    """Write the figure of what compare.json holds; the suffix of ``path`` names the format."""
    from matplotlib.figure import Figure

    rows = found["rows"]
    figure = Figure(figsize=(11, 1.9 + 0.65 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    for place, row in enumerate(rows):
        for name, colour, marker, shift in (("plain", BLUE, "o", -0.14), ("gist", VERMILION, "D", 0.14)):
            seeds_of(left, row[name], place + shift, colour, marker)
    left.plot([], [], "o", mfc="none", mec=BLUE, label="one seed, plain")
    left.plot([], [], "D", mfc="none", mec=VERMILION, label="one seed, with gist")
    left.plot([], [], "|", color="black", ms=12, mew=2.5, label="mean")
    left.set_xlabel(f"{found['measured'].replace('_', ' ')} (%)")
    left.set_yticks(range(len(rows)), [row["method"] for row in rows])
    differences(right, [row["difference"] for row in rows], "gist minus plain (points), paired by seed")
    right.set_yticks(range(len(rows)), [])
    for axes in (left, right):
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    save(figure, path)


def seeds_of(axes: Any, entry: dict[str, Any], place: float, colour: str, marker: str) -> None:
    """The values of every seed in percent, and their mean as a bar."""
    values = [100 * value for value in entry["values"]]
    axes.plot(values, [place] * len(values), marker, mfc="none", mec=colour, ms=5, alpha=0.7)
    axes.plot([100 * entry["mean"]], [place], "|", color=colour, ms=17, mew=3)


def differences(axes: Any, entries: list[dict[str, Any]], label: str) -> None:
    """Mean differences in points with their intervals, a row each, beside the line of no difference."""
    axes.axvline(0, color=GREY, lw=1.2, ls="--")
    for place, gap in enumerate(entries):
        middle = 100 * gap["mean"]
        if gap["low"] is not None:
            sides = [[max(0.0, middle - 100 * gap["low"])], [max(0.0, 100 * gap["high"] - middle)]]
            axes.errorbar([middle], [place], xerr=sides, fmt="none", color="black", capsize=5, lw=1.6)
        axes.plot([middle], [place], "s", color="black", ms=6)
        axes.annotate(
            f"{middle:+.2f}", (middle, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9
        )
    sure = f"mean and {entries[0]['confidence']:.0%} interval" if entries[0]["low"] is not None else "one pair"
    axes.set_xlabel(f"{label}: {sure}")


def save(figure: Any, path: Path) -> None:
    """Write ``figure`` by a rename; an SVG of the same numbers has the same bytes."""
    import matplotlib

    drawn = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    with matplotlib.rc_context({"svg.hashsalt": "fastgist"}):
        figure.savefig(drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, drawn.getvalue())
