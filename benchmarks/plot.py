#!/usr/bin/env python3
"""``make plot``: draws the committed results (benchmarks/results/<device>/<op>.json): docs/benchmark.svg for the CPUs,
docs/benchmark-gpu.svg for the GPUs; of the losses bandwidth and memory by number of classes, docs/losses-<device>.svg; of
cp_linear, cp_update and adapter the time over the floor, case by case and provider by provider, docs/layers-<device>.svg.

Throughput (a line marks what the floor of the case would allow) and peak memory; each panel names its device and, of a CPU,
its threads, and no panel has rows of two runs. Functions that compute something else are not drawn; a peer beyond the error
budget says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

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


def measured(environment: dict) -> str:
    """Where and when a file's rows were measured."""
    threads = environment.get("threads")
    on = "" if threads is None else f", {threads} thread{'s' * (threads != 1)}"
    return f"measured on {environment['device']}{on}, torch {environment['versions']['torch']}, {environment['date']}"


def panels(results: list[tuple[dict, list[dict]]]) -> list[tuple[str, str, list[dict]]]:
    """(device line, title, rows fastest first) for each op, case and direction."""
    out = []
    for environment, rows in results:
        groups: dict[tuple[str, ...], list[dict]] = {}
        shown = {op: _shown(op, rows) for op in {row["op"] for row in rows}}
        for row in rows:
            if "threads" in environment and row["case"] not in shown[row["op"]]:
                continue  # by_classes or by_layers draws it
            if row["op"] in LOSSES and "threads" in environment:
                if (row["dtype"], row["direction"]) != ("float32", "fwd_bwd"):
                    continue
            key = row["op"], row["case"].replace("_", " "), row["dtype"], row["direction"].replace("_", "+", 1)
            groups.setdefault(key, []).append(row)
        for key, members in groups.items():
            out.append((measured(environment), "  ".join(key), sorted(members, key=lambda r: r["median_s"])))
    return out


def _shown(op: str, rows: list[dict]) -> set[str]:
    """The cases of an operation on a CPU that have panels of their own: all, or of many :data:`SHOWN`'s; else the last."""
    cases = list(dict.fromkeys(row["case"] for row in rows if row["op"] == op))
    if op not in SHOWN or (op in LAYERS and len(cases) == 1):
        return set(cases)
    return set(cases) & set(SHOWN[op]) or set(cases[-1:])


def _time(seconds: float) -> str:
    if seconds >= 1.0:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def draw(results: list[tuple[dict, list[dict]]], out: Path) -> None:
    """One panel a case, bars by rising time, a line at the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text, and the same results give the same file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "fastgist", "font.size": 8, "font.family": "sans-serif"}
    drawn = panels(results)
    with pyplot.rc_context(style):
        titles = [_titles(*panel) for panel in drawn]
        heights = [0.2 * len(rows) + 0.36 + 0.13 * len(lines) for lines, (*_, rows) in zip(titles, drawn, strict=True)]
        figure, axes = pyplot.subplots(
            len(drawn), 2, figsize=(11, sum(heights)), width_ratios=(3, 2),
            height_ratios=[len(rows) + 1.2 for *_, rows in drawn], squeeze=False, layout="constrained",
        )  # fmt: skip
        for (speed, memory), lines, (*_, rows) in zip(axes, titles, drawn, strict=True):
            what = _what(rows)
            rates = [_count(row) / row["median_s"] for row in rows]
            floor = rows[0]["floor_s"]
            said = [
                f"{_rate(rate, what)}, {_time(row['median_s'])}, {row['median_s'] / floor:.3g} x floor"
                + (f"; {_time(row['graph_replay_s'])} as a CUDA graph" if row.get("graph_replay_s") else "")
                for row, rate in zip(rows, rates, strict=True)
            ]
            _bars(speed, rows, rates, said, room=2.9 if any(row.get("graph_replay_s") for row in rows) else 2.0)
            speed.axvline(_count(rows[0]) / floor, color=AXIS, linestyle="--", linewidth=1)
            speed.set_title("\n".join(lines), loc="left", fontsize=8)
            held = [row["peak_bytes"] for row in rows]
            _bars(memory, rows, held, [_bytes(count) for count in held], room=1.5)
            memory.set_title("peak memory of a call,\nbeside its arguments", loc="left", fontsize=8)
            memory.tick_params(labelleft=False)
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _what(rows: list[dict]) -> str:
    return "rows" if "M" in rows[0] else "images"


def _titles(device: str, title: str, rows: list[dict]) -> list[str]:
    """The lines above a panel; the memory's title begins where a line of more characters would end."""
    about = f"{_what(rows)}/s; the line is the floor, {_time(rows[0]['floor_s'])}: {rows[0]['floor']}"
    return [title, device, *textwrap.wrap(about, 84)]


LOSSES = ("bidirectional_kl", "gist_loss")
LAYERS = ("cp_linear", "cp_update", "adapter")
#: Of an operation's cases on a CPU those that have panels of their own.
SHOWN = dict.fromkeys(LOSSES, ("M512_V1000", "M256_V32000"))
SHOWN |= {
    "cp_linear": ("M3152_d768_R32",),
    "cp_update": ("M3152_d768_R32", "M512_d2048_R16"),
    "adapter": ("M3152_d768_H8", "M3152_d768_H64"),
}
#: Okabe and Ito's colours, told apart in every common form of colour blindness; shapes differ as well.
_COLOURS = (
    "#0072B2 #56B4E9 #D55E00 #E69F00 #009E73 #CC79A7 #666666 #000000 #882255 #44AA99 #F0E442 #332288 #AA4499 #117733 #999933"
).split()
LINES = tuple(zip(_COLOURS, "osx^DvP*<>hdpHX", strict=True))


#: An operation, and where and when it was measured.
Run = tuple[str, str]


def by_classes(results: list[tuple[dict, list[dict]]]) -> dict[str, dict[Run, list[dict]]]:
    """device -> run -> rows of forward and backward, in the dtype with the most numbers of classes; where there are three."""
    found: dict[str, dict[Run, list[dict]]] = {}
    for environment, rows in results:
        for op in LOSSES:
            mine = [r for r in rows if r["op"] == op and r["direction"] == "fwd_bwd" and r["provider"] in _drawn(rows)]
            mine = [
                r for r in mine if not r.get("absent") and not r.get("detached")
            ]  # other inputs, or another function
            dtypes = {r["dtype"]: {q["V"] for q in mine if q["dtype"] == r["dtype"]} for r in mine}
            if dtypes and max(map(len, dtypes.values())) >= 3:
                most = max(dtypes, key=lambda d: len(dtypes[d]))
                chosen = sorted((r for r in mine if r["dtype"] == most), key=lambda r: r["V"])
                found.setdefault(environment["device_slug"], {})[op, measured(environment)] = chosen
    return found


def _drawn(rows: list[dict]) -> set[str]:
    """Providers that compute the loss itself: ours, and each peer as it is fastest."""
    names = {r["provider"] for r in rows if not r["parity"].startswith("another function")}
    return {n for n in names if f"{n}, compiled" not in names or n.startswith("fastgist")}


def draw_by_classes(of_op: dict[Run, list[dict]], out: Path) -> None:
    """Bytes that must move over the time taken, and peak memory over the two tensors, against the classes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"svg.fonttype": "none", "svg.hashsalt": "fastgist", "font.size": 8, "font.family": "sans-serif"}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            len(of_op), 2, figsize=(10, 3.1 * len(of_op)), squeeze=False, layout="constrained"
        )
        for (speed, memory), ((op, where), rows) in zip(axes, of_op.items(), strict=True):
            for name, (colour, marker) in zip(dict.fromkeys(r["provider"] for r in rows), LINES, strict=False):
                mine = [r for r in rows if r["provider"] == name]
                classes = [r["V"] for r in mine]
                look = {"color": colour, "marker": marker, "label": name, "linewidth": 1.2, "markersize": 5}
                speed.plot(classes, [r["bytes"] / r["median_s"] / 1e9 for r in mine], **look)
                memory.plot(classes, [r["peak_bytes"] / (r["bytes"] / 2) for r in mine], **look)
            floor = {r["V"]: r["bytes"] / r["floor_s"] / 1e9 for r in rows}
            speed.plot(list(floor), list(floor.values()), color=AXIS, linestyle="--", linewidth=1, label="floor")
            about = f"{op}, {rows[0]['dtype']}, forward and backward"
            speed.set_title(
                f"{about}\n{where}\nGB/s, of logits read and gradients written once", loc="left", fontsize=8
            )
            memory.set_title(
                "peak memory of a call beside its arguments,\nover the two logits tensors", loc="left", fontsize=8
            )
            speed.set_yscale("log")
            for panel in (speed, memory):
                panel.set_xscale("log")
                panel.set_xlabel("classes V")
                panel.grid(alpha=0.3)
                panel.spines[["top", "right"]].set_visible(False)
            memory.set_ylim(bottom=0)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def by_layers(results: list[tuple[dict, list[dict]]]) -> dict[str, dict[Run, dict[str, dict[str, float]]]]:
    """device -> run -> case -> provider -> time over the floor, where there are several cases; a peer as it is fastest,
    compiled or not."""
    found: dict[str, dict[Run, dict[str, dict[str, float]]]] = {}
    for environment, rows in results:
        for op in LAYERS:
            cases: dict[str, dict[str, float]] = {}
            for row in rows:
                if row["op"] == op and not row["parity"].startswith("another function"):
                    direction = (
                        row["direction"].replace("_", " + ").replace("fwd", "forward").replace("bwd", "backward")
                    )
                    of_case = cases.setdefault(f"{row['case'].replace('_', ' ')}, {row['dtype']}, {direction}", {})
                    name = row["provider"].removesuffix(", compiled")
                    of_case[name] = min(row["median_s"] / row["floor_s"], of_case.get(name, float("inf")))
            if len(cases) > 1:
                found.setdefault(environment["device_slug"], {})[op, measured(environment)] = cases
    return found


def draw_by_layers(of_op: dict[Run, dict[str, dict[str, float]]], out: Path) -> None:
    """A row a case, a mark a provider, at its time over the case's floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"svg.fonttype": "none", "svg.hashsalt": "fastgist", "font.size": 8, "font.family": "sans-serif"}
    names = list(dict.fromkeys(n for cases in of_op.values() for found in cases.values() for n in found))
    looks = dict(zip(names, LINES, strict=False))
    with pyplot.rc_context(style):
        heights = [len(cases) + 2.0 for cases in of_op.values()]
        figure, axes = pyplot.subplots(
            len(of_op), 1, figsize=(10, 0.35 * sum(heights) + 0.8), height_ratios=heights, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for (axis,), ((op, where), cases) in zip(axes, of_op.items(), strict=True):
            for name, (colour, marker) in looks.items():
                points = [(found[name], place) for place, found in enumerate(cases.values()) if name in found]
                axis.plot(
                    *zip(*points, strict=True) if points else ((), ()), marker, color=colour, label=name, markersize=5
                )
            axis.axvline(1.0, color=AXIS, linestyle="--", linewidth=1, label="floor")
            axis.set_yticks(range(len(cases)), list(cases))
            axis.set_ylim(len(cases) - 0.5, -0.5)
            axis.set_xscale("log")
            largest = max(ratio for found in cases.values() for ratio in found.values())
            ticks = [t for t in (0.5, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100) if t <= 1.2 * largest]
            axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(
                f"{op}: time over the floor, a peer as it is fastest (compiled or not)\n{where}", loc="left", fontsize=8
            )
        handles: dict[str, Any] = {}
        for (axis,) in axes:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
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
    names = [row["provider"] + ("" if _exact(row) else ", beyond budget") for row in rows]
    bars = axis.barh(names, values, color=colours)
    for text in axis.bar_label(bars, said, padding=3, color="#555555"):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # above the floor's line
        text.set_zorder(4)
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
    drawn: list[Path] = []
    for name, cpu in (("benchmark.svg", True), ("benchmark-gpu.svg", False)):
        results = load(args.results, args.device, cpu)
        args.out.mkdir(parents=True, exist_ok=True)
        if panels(results):
            draw(results, args.out / name)
            drawn.append(args.out / name)
        for device, of_op in by_classes(results).items():
            drawn.append(args.out / f"losses-{device}.svg")
            draw_by_classes(of_op, drawn[-1])
        for device, of_layer in by_layers(results).items():
            drawn.append(args.out / f"layers-{device}.svg")
            draw_by_layers(of_layer, drawn[-1])
    for path in drawn:
        print(path)
    if not drawn:
        print(f"plot: no results under {args.results}; 'make bench ARGS=\"--save-results {args.results}\"' makes some")
    return int(not drawn)


if __name__ == "__main__":
    sys.exit(main())
