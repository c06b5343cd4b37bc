"""Grids of `bench_cuda_loop.py --grid --json FILE` as a table, and as a picture of one of their figures.

python bench/heatmap.py FILE... [--figure speedup|of_bound] [-o PICTURE.svg]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Cells = dict[tuple[float, int, Any], dict[str, Any]]
TITLES = {"speedup": "tokens a second beside plain decoding", "of_bound": "share of what the forwards allow"}
WIDE, HIGH, LEFT, TOP = 64, 30, 70, 46
LOW_COLOUR, MIDDLE_COLOUR, HIGH_COLOUR = (178, 70, 60), (246, 243, 232), (88, 160, 190)


def read(path: Path) -> Cells:
    """(rate, batch, drafts) -> figures."""
    lines = [line for line in json.loads(path.read_text()) if "rate" in line and line["drafts"] != 0]
    return {(line["rate"], line["batch"], line["drafts"]): line for line in lines}


def axes(cells: Cells) -> tuple[list[Any], list[Any], list[Any]]:
    rates, batches, drafts = (list(dict.fromkeys(key[i] for key in cells)) for i in range(3))
    return rates, batches, drafts


def tables(cells: Cells, figure: str) -> list[str]:
    rates, batches, drafts = axes(cells)
    lines = ["| acceptance | B | " + " | ".join(d if d == "auto" else f"K = {d}" for d in drafts) + " |"]
    lines.append("|" + "---|" * (len(drafts) + 2))
    for rate in rates:
        for batch in batches:
            row = [cells.get((rate, batch, d), {}).get(figure) for d in drafts]
            best = max((value for value in row if value is not None), default=None)
            shown = ["" if v is None else f"**{v:.2f}**" if v == best else f"{v:.2f}" for v in row]
            lines.append(f"| {rate} | {batch} | " + " | ".join(shown) + " |")
    return lines


def colour(value: float, low: float, high: float) -> str:
    """Red below 1, pale at 1, blue above."""
    share = (value - 1) / (high - 1) if value > 1 else (1 - value) / max(1 - low, 1e-9)
    far = HIGH_COLOUR if value > 1 else LOW_COLOUR
    share = min(max(share, 0.0), 1.0)
    return "#" + "".join(f"{round(m + share * (f - m)):02x}" for m, f in zip(MIDDLE_COLOUR, far, strict=True))


def picture(cells: Cells, figure: str) -> str:
    """SVG: for each acceptance a map of batch by drafts."""
    rates, batches, drafts = axes(cells)
    values = [line[figure] for line in cells.values() if figure in line]
    low, high = min(*values, 0.9), max(*values, 1.1)
    tall = TOP + HIGH * len(batches) + 16
    wide, high_all = LEFT + WIDE * len(drafts) + 10, tall * len(rates) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high_all}" '
        f'viewBox="0 0 {wide} {high_all}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high_all}" fill="white"/>',
    ]

    def text(x: float, y: float, words: str, anchor: str = "middle", weight: str = "normal") -> None:
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}"'
        parts.append(f"<text {place}>{words}</text>")

    for number, rate in enumerate(rates):
        top = number * tall
        text(8, top + 18, f"acceptance {rate}: {TITLES[figure]}", "start", "bold")
        for j, count in enumerate(drafts):
            text(LEFT + WIDE * (j + 0.5), top + TOP - 8, count if count == "auto" else f"K = {count}")
        for i, batch in enumerate(batches):
            y = top + TOP + HIGH * i
            text(LEFT - 8, y + 19, f"B = {batch}", "end")
            for j, count in enumerate(drafts):
                value = cells.get((rate, batch, count), {}).get(figure)
                if value is None:
                    continue
                box = f'x="{LEFT + WIDE * j}" y="{y}" width="{WIDE - 2}" height="{HIGH - 2}"'
                parts.append(f'<rect {box} fill="{colour(value, low, high)}"/>')
                text(LEFT + WIDE * (j + 0.5) - 1, y + 19, f"{value:.2f}")
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", type=Path, nargs="+", help="of equal cells the last one counts")
    parser.add_argument("--figure", choices=TITLES, default="speedup")
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    cells = {key: line for path in asked.files for key, line in read(path).items()}
    print("\n".join(tables(cells, asked.figure)))
    if asked.output is not None:
        asked.output.write_text(picture(cells, asked.figure))


if __name__ == "__main__":
    main()
