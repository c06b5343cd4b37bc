"""The comparison as a picture."""

from __future__ import annotations

from typing import Any


def draw(report: dict[str, Any], path: str) -> None:
    """Acceptance by position, and where a round's time goes, for every temperature.

    Raises
    ------
    ImportError
        matplotlib is not installed (`pip install 'foretoken[plot]'`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    temperatures = sorted({row["temperature"] for row in report["rows"]})
    figure, axes = pyplot.subplots(
        len(temperatures), 2, figsize=(13, 4.2 * len(temperatures)), squeeze=False, layout="constrained"
    )
    for (left, right), temperature in zip(axes, temperatures, strict=True):
        rows = [row for row in report["rows"] if row["temperature"] == temperature]
        _acceptance(left, rows, temperature)
        _parts(right, rows, temperature)
    figure.suptitle(report["models"])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _acceptance(axis: Any, rows: list[dict[str, Any]], temperature: float) -> None:
    for row in rows:
        shares = row["acceptance_by_position"]
        if shares:
            axis.plot(
                range(1, len(shares) + 1), shares, marker="o", label=f"{row['method']}, K={row['drafts']}"
            )
    longest = max((len(row["acceptance_by_position"]) for row in rows), default=1)
    axis.set(xlabel="draft", ylabel="share of rounds that accept it", ylim=(0, 1))
    axis.set_xticks(range(1, longest + 1))
    axis.set_title(f"acceptance by position, T={temperature:g}")
    axis.legend(fontsize=7)


def _parts(axis: Any, rows: list[dict[str, Any]], temperature: float) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds_per_round"]))
    left = [0.0] * len(rows)
    for name in names:
        widths = [row["milliseconds_per_round"].get(name, 0.0) for row in rows]
        axis.barh([row["method"] for row in rows], widths, left=left, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds of a round")
    axis.set_title(f"a round's time, T={temperature:g}")
    axis.legend(fontsize=7)
