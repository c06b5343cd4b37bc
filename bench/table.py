"""Markdown tables of a `--benchmark-json` file of bench_verify.py: `python bench/table.py FILE`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Table = dict[tuple[Any, ...], dict[str, Figures]]


def read(path: Path) -> Table:
    """(batch, drafts, vocabulary, dtype) -> what was timed -> its figures."""
    shapes: Table = {}
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        figures = benchmark["extra_info"]
        if "shape" in figures:
            name = benchmark["name"].removeprefix("bench_").split("[")[0]
            law = benchmark["params"].get("law")
            key = (*figures["shape"], figures["dtype"])
            shapes.setdefault(key, {})[f"{name} {law}" if law else name] = figures
    return shapes


def lines(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    found = list(rows)
    return (
        ["", *("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *found])]
        if found
        else []
    )


def label(key: tuple[Any, ...]) -> list[str]:
    return [str(part) for part in key]


def time_and_share(figures: Figures | None) -> list[str]:
    if figures is None:
        return ["", "", ""]
    return [f"{figures['us']:,.0f}", f"{figures['gb_s']:.1f}", f"{figures['share_of_plain_read']:.0%}"]


def ratio(figures: Figures | None) -> str:
    return f"{figures['ratio']:.2f}" if figures and "ratio" in figures else ""


def share(figures: Figures | None) -> str:
    return f"{figures['share_of_plain_read']:.0%}" if figures else ""


def verification(shapes: Table) -> list[str]:
    header = ["B", "K", "V", "dtype", "token us", "GB/s", "of a plain read", "plain GB/s", "accepted"]
    header += ["block / token", "block of a plain read", "point law of one", "greedy of one", "auto / token"]
    header += ["filters / none"]

    def row(key: tuple[Any, ...], timed: dict[str, Figures]) -> list[str]:
        token = timed["token"]
        return [
            *label(key),
            *time_and_share(token),
            f"{token['plain_read_gb_s']:.1f}",
            f"{token['accepted']:.2f}",
            ratio(timed.get("block")),
            share(timed.get("block")),
            share(timed.get("point_law")),
            share(timed.get("greedy")),
            ratio(timed.get("auto")),
            ratio(timed.get("filters")),
        ]

    return lines(header, (row(key, timed) for key, timed in shapes.items() if "token" in timed))


def rivals(shapes: Table) -> list[str]:
    names = ["textbook", "careful", "transformers"]
    header = ["B", "K", "V", "dtype", "token us", *(f"{name} / ours" for name in names)]
    header += ["from the last-level cache: token us", "of a plain read"]

    def row(key: tuple[Any, ...], timed: dict[str, Figures]) -> list[str]:
        cached = timed.get("token_cached")
        return [
            *label(key),
            f"{timed['token']['us']:,.0f}",
            *(ratio(timed.get(name)) for name in names),
            f"{cached['us']:,.0f}" if cached else "",
            share(cached),
        ]

    return lines(header, (row(key, timed) for key, timed in shapes.items() if "textbook" in timed))


def sampling(shapes: Table) -> list[str]:
    laws = ["plain", "top_p", "filters"]
    header = ["B", "V", "dtype"]
    header += [title for law in laws for title in (f"{law} us", "GB/s", "of a plain read")]
    header += ["softmax + multinomial / plain", "top-p by sorting / top_p"]

    def row(key: tuple[Any, ...], timed: dict[str, Figures]) -> list[str]:
        batch, _, vocab, dtype = label(key)
        shares = [cell for law in laws for cell in time_and_share(timed.get(f"sample {law}"))]
        others = [ratio(timed.get(name)) for name in ("softmax_multinomial", "top_p_by_sorting")]
        return [batch, vocab, dtype, *shares, *others]

    return lines(header, (row(key, timed) for key, timed in shapes.items() if "sample plain" in timed))


def main() -> None:
    shapes = dict(sorted(read(Path(sys.argv[1])).items()))
    for title, table in (("Verify", verification), ("Beside others", rivals), ("Sample", sampling)):
        sys.stdout.write("\n".join(["", f"### {title}", *table(shapes), ""]))


if __name__ == "__main__":
    main()
