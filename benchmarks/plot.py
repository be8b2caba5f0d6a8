#!/usr/bin/env python3
"""``make plot``: draws the committed results (benchmarks/results/<device>/<op>.json) as one SVG, docs/benchmark.svg.

Bars are medians over the floor of their case, so 1 is what the machine allows; each panel names its device. Rows that
failed their parity check, and functions that compute something else, are not drawn. SVG is written by hand, with fixed
digits, so the same results give the same file.
"""

from __future__ import annotations

import argparse
import json
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH, LABEL, BAR, GAP, PANEL = 860, 250, 15, 4, 26
OURS, PEER, AXIS, TEXT, FAINT = "#1f77b4", "#b9c4cf", "#d62728", "#222222", "#666666"


def load(folder: Path, devices: list[str]) -> list[tuple[dict, list[dict]]]:
    """(environment, rows) of each result file, devices in name order, only rows that count."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        if devices and path.parent.name not in devices:
            continue
        data = json.loads(path.read_text())
        if "rows" not in data:
            continue
        rows = [r for r in data["rows"] if r.get("median_s") and r["parity"] == "within the budget"]
        if rows:
            found.append((data["environment"], rows))
    return found


def panels(results: list[tuple[dict, list[dict]]]) -> list[tuple[str, str, list[dict]]]:
    """(device line, title, rows fastest first) for each op, case and direction."""
    out = []
    for environment, rows in results:
        device = environment["device"]
        if "threads" in environment:
            device += f", {environment['threads']} threads"
        device += f", torch {environment['versions']['torch']}, {environment['date']}"
        groups: dict[tuple[str, ...], list[dict]] = {}
        for row in rows:
            key = row["op"], row["case"].replace("_", " "), row["dtype"], row["direction"].replace("_", "+", 1)
            groups.setdefault(key, []).append(row)
        for key, members in groups.items():
            out.append((device, "  ".join(key), sorted(members, key=lambda r: r["median_s"])))
    return out


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def draw(results: list[tuple[dict, list[dict]]]) -> str:
    drawn = panels(results)
    parts: list[str] = []
    y = 14
    last_device = None
    for device, title, rows in drawn:
        if device != last_device:
            y += 14
            parts.append(_text(10, y, f"Measured on: {device}", TEXT, 13, bold=True))
            y += 10
            last_device = device
        y += PANEL - 8
        floor = rows[0]["floor_s"]
        parts.append(_text(10, y, f"{title}   (floor {_time(floor)}: {rows[0]['floor']})", TEXT, 12))
        y += 6
        most = max(row["median_s"] / row["floor_s"] for row in rows)
        room = WIDTH - LABEL - 130
        for row in rows:
            ratio = row["median_s"] / row["floor_s"]
            length = max(1.0, room * ratio / most)
            colour = OURS if row["provider"].startswith("fastgist") else PEER
            parts.append(f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>')
            parts.append(_text(LABEL - 6, y + 12, row["provider"], TEXT, 11, anchor="end"))
            said = f"{_time(row['median_s'])}, {ratio:.3g} x floor"
            parts.append(_text(LABEL + length + 5, y + 12, said, FAINT, 10))
            y += BAR + GAP
        x = LABEL + room / most
        top = y - len(rows) * (BAR + GAP)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{y - GAP}" stroke="{AXIS}" stroke-dasharray="3 2"/>'
        )
        y += 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}" '
        'font-family="Helvetica, Arial, sans-serif">\n'
        f'<rect width="{WIDTH}" height="{y + 10}" fill="white"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def _text(x: float, y: float, words: str, colour: str, size: int, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{escape(words)}</text>"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmark.svg")
    parser.add_argument("--device", action="append", default=[], help="only this folder of results (may be repeated)")
    args = parser.parse_args(argv)
    results = load(args.results, args.device)
    if not results:
        print(f"plot: no results under {args.results}; 'make bench ARGS=\"--save-results {args.results}\"' makes some")
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(draw(results))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
