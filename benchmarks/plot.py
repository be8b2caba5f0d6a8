#!/usr/bin/env python3
"""``make plot``: draws the committed results (benchmarks/results/<device>/<op>.json): docs/benchmark.svg for the CPUs,
docs/benchmark-gpu.svg for the GPUs.

Throughput (a line marks what the floor of the case would allow) and peak memory; each panel names its device. Functions
that compute something else are not drawn; a peer beyond the error budget says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS, PEER, AXIS = "#1f77b4", "#b9c4cf", "#d62728"


def load(folder: Path, devices: list[str], cpu: bool) -> list[tuple[dict, list[dict]]]:
    """(environment, rows) of each result file of a CPU, or of a GPU, devices in name order, only rows that count."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        if (devices and path.parent.name not in devices) or path.parent.name.startswith("cpu-") != cpu:
            continue
        data = json.loads(path.read_text())
        if "rows" not in data:
            continue
        rows = [r for r in data["rows"] if r.get("median_s") and (_exact(r) or _rough(r))]
        if rows:
            found.append((data["environment"], rows))
    return found


def _exact(row: dict) -> bool:
    return row["parity"].startswith("within the budget")  # itself, or the code that was compiled


def _rough(row: dict) -> bool:
    """A peer whose sums are less exact than plain PyTorch's by more than the budget: drawn, and marked as such."""
    return "exceeds the budget" in row["parity"] and not row["provider"].startswith("fastgist")


def panels(results: list[tuple[dict, list[dict]]]) -> list[tuple[str, str, list[dict]]]:
    """(device line, title, rows fastest first) for each op, case and direction."""
    out = []
    for environment, rows in results:
        device = environment["device"]
        if "threads" in environment:
            device += f", {environment['threads']} threads"
        device = f"measured on {device}, torch {environment['versions']['torch']}, {environment['date']}"
        groups: dict[tuple[str, ...], list[dict]] = {}
        for row in rows:
            key = row["op"], row["case"].replace("_", " "), row["dtype"], row["direction"].replace("_", "+", 1)
            groups.setdefault(key, []).append(row)
        for key, members in groups.items():
            out.append((device, "  ".join(key), sorted(members, key=lambda r: r["median_s"])))
    return out


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def draw(results: list[tuple[dict, list[dict]]], out: Path) -> None:
    """One panel a case, bars by rising time, a line at the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text, and the same results give the same file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "fastgist", "font.size": 8, "font.family": "sans-serif"}
    drawn = panels(results)
    with pyplot.rc_context(style):
        rows_each = [len(rows) for *_, rows in drawn]
        figure, axes = pyplot.subplots(
            len(drawn), 2, figsize=(10, sum(0.2 * n + 0.75 for n in rows_each)), width_ratios=(3, 2),
            height_ratios=[n + 1.2 for n in rows_each], squeeze=False, layout="constrained",
        )  # fmt: skip
        for (speed, memory), (device, title, rows) in zip(axes, drawn, strict=True):
            what = "rows" if "M" in rows[0] else "images"
            rates = [_count(row) / row["median_s"] for row in rows]
            floor = rows[0]["floor_s"]
            said = [
                f"{_rate(rate, what)}, {_time(row['median_s'])}, {row['median_s'] / floor:.3g} x floor"
                + (f"; {_time(row['graph_replay_s'])} as a CUDA graph" if row.get("graph_replay_s") else "")
                for row, rate in zip(rows, rates, strict=True)
            ]
            _bars(speed, rows, rates, said, room=2.0)
            speed.axvline(_count(rows[0]) / floor, color=AXIS, linestyle="--", linewidth=1)
            about = f"{what}/s; the line is the floor, {_time(floor)}: {rows[0]['floor']}"
            speed.set_title(f"{title}\n{device}\n{about}", loc="left", fontsize=8)
            mebibytes = [row["peak_bytes"] / 2**20 for row in rows]
            _bars(memory, rows, mebibytes, [f"{m:.3g} MiB" for m in mebibytes], room=1.4)
            memory.set_title("peak memory of a call, beside its arguments", loc="left", fontsize=8)
            memory.tick_params(labelleft=False)
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _count(row: dict) -> int:
    """Rows of an operation, images of a training step."""
    return row["M"] if "M" in row else row["B"]


def _rate(per_second: float, what: str) -> str:
    size, prefix = (1e6, " M") if per_second >= 1e6 else (1e3, " k") if per_second >= 1e3 else (1.0, "")
    return f"{per_second / size:.3g}{prefix} {what}/s"


def _bars(axis, rows: list[dict], values: list[float], said: list[str], room: float) -> None:
    """A bar a row, each with its words at its end; ``room``: the axis's length over the longest bar's."""
    colours = [OURS if row["provider"].startswith("fastgist") else PEER for row in rows]
    names = [row["provider"] + ("" if _exact(row) else ", beyond the error budget") for row in rows]
    bars = axis.barh(names, values, color=colours)
    axis.bar_label(bars, said, padding=3, color="#666666")
    axis.set_xlim(0, room * max(*values, 1e-9))
    axis.invert_yaxis()
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.tick_params(bottom=False, labelbottom=False, left=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="the folder of the figures")
    parser.add_argument("--device", action="append", default=[], help="only this folder of results (may be repeated)")
    args = parser.parse_args(argv)
    drawn = 0
    for name, cpu in (("benchmark.svg", True), ("benchmark-gpu.svg", False)):
        results = load(args.results, args.device, cpu)
        if results:
            args.out.mkdir(parents=True, exist_ok=True)
            draw(results, args.out / name)
            print(args.out / name)
            drawn += 1
    if not drawn:
        print(f"plot: no results under {args.results}; 'make bench ARGS=\"--save-results {args.results}\"' makes some")
    return int(not drawn)


if __name__ == "__main__":
    sys.exit(main())
