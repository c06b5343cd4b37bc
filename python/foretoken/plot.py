"""``foretoken plot``: acceptance by position and tokens a round, out of JSON records."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Series:
    """One line and one bar of the picture."""

    label: str
    by_position: tuple[float, ...]
    """Share of the rounds with drafts that accepted draft 1, 2, ..."""
    tokens_per_round: float


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``foretoken plot``."""
    parser = commands.add_parser(
        "plot",
        help="draw acceptance by position and tokens a round from JSON",
        description="Draws records of sessions (json.dumps(session.metrics.record(requests))) and reports of "
        "`foretoken demo --json`. Needs matplotlib: pip install 'foretoken[plot]'.",
    )
    parser.add_argument("records", metavar="FILE", nargs="+", help="JSON; - is standard input")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="a picture: .png, .svg, .pdf")
    parser.add_argument("--requests", action="store_true", help="one line per request of a session's record")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    try:
        found = [one for path in options.records for one in read(path, options.requests)]
        draw(found, options.output)
    except ImportError as error:
        sys.stderr.write(f"foretoken plot: {error}. It needs the extra: pip install 'foretoken[plot]'\n")
        return 1
    except (OSError, ValueError) as error:
        sys.stderr.write(f"foretoken plot: {error}\n")
        return 2
    return 0


def read(path: str, requests: bool = False) -> list[Series]:
    """What a file holds.

    Raises
    ------
    ValueError
        It is no JSON, or no record.
    """
    text = sys.stdin.read() if path == "-" else Path(path).read_text()
    name = "stdin" if path == "-" else Path(path).stem
    try:
        return series_of(json.loads(text), name, requests)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a session's record or a report of `foretoken demo --json`, got "
            f"{type(error).__name__}: {error}"
        ) from error


def series_of(record: dict[str, Any], name: str, requests: bool = False) -> list[Series]:
    """The series of a session's record, or of a report of the demo."""
    if "rows" in record:
        return [_of_row(row) for row in record["rows"] if row["acceptance_by_position"]]
    if not requests:
        return [_of_record(record, name)]
    return [_of_record(one, f"{name}, request {one['id']}") for one in record["requests"]]


def _of_record(record: dict[str, Any], label: str) -> Series:
    return Series(label, tuple(record["acceptance_by_position"]), float(record["tokens_per_round"]))


def _of_row(row: dict[str, Any]) -> Series:
    label = f"{row['method']}, K={row['drafts']}, T={row['temperature']:g}"
    return Series(label, tuple(row["acceptance_by_position"]), float(row["tokens_per_round"]))


def draw(found: list[Series], path: str) -> None:
    """The picture of some series.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    ValueError
        There is nothing to draw, or the file's ending names no picture.
    """
    if not found:
        raise ValueError("expected records with rounds that checked drafts, got none")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = max(4.2, 1.2 + 0.3 * len(found))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, height), layout="constrained")
    for one in found:
        left.plot(range(1, len(one.by_position) + 1), one.by_position, marker="o", label=one.label)
    longest = max(len(one.by_position) for one in found)
    left.set(xlabel="draft", ylabel="share of rounds that accept it", ylim=(0, 1.02))
    left.set_xticks(range(1, longest + 1))
    left.set_title("acceptance by position")
    left.legend(fontsize=7)
    bars = right.barh(range(len(found)), [one.tokens_per_round for one in found])
    right.bar_label(bars, fmt="%.2f", padding=3)
    right.set_yticks(range(len(found)), [one.label for one in found], fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="tokens a round, the closing one included")
    right.set_title("tokens a round")
    try:
        figure.savefig(path, dpi=150)
    finally:
        pyplot.close(figure)
