"""The comparison as lines of text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from foretoken import info
from foretoken.demo.compare import Comparison, summarize
from foretoken.demo.models import Models

HEADS = (
    "",
    "K",
    "tokens/s",
    "x plain",
    "x HF",
    "a round",
    "accepted by position",
    "4-grams",
    "outside",
    "same",
)


def collect(result: Comparison, models: Models) -> dict[str, Any]:
    """Everything, JSON-ready, without the checks."""
    rows = [
        {"key": method.key, **summarize(result, models.target, models.prompts, temperature, method.key)}
        for temperature in result.plan.temperatures
        for method in result.methods
    ]
    sweeps = [
        {"temperature": temperature, "key": key, "tokens_per_second": rates}
        for (temperature, key), rates in result.sweep.items()
        if rates
    ]
    return {
        "models": models.title,
        "prompts": len(models.prompts),
        "prompt_tokens": [len(prompt) for prompt in models.prompts],
        "new_tokens": result.plan.new,
        "rows": rows,
        "sweep": sweeps,
        "machine": info.collect(),
    }


def table(report: dict[str, Any], temperature: float) -> list[str]:
    """The rows of one temperature, aligned; the first line is the head."""
    cells: list[tuple[str, ...]] = [HEADS]
    cells += [_cells(row, report["prompts"]) for row in report["rows"] if row["temperature"] == temperature]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = {0, 6}
    return [
        "  ".join(
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def notes(report: dict[str, Any], temperature: float) -> Iterator[str]:
    """What the table of one temperature cannot say."""
    rows = [row for row in report["rows"] if row["temperature"] == temperature]
    for row in rows:
        for where in row.get("differences", ()):
            yield (
                f"{row['method']}: prompt {where['prompt'] + 1} leaves the plain output at token "
                f"{where['position']}, where the target's best two logits are {where['top2_gap']:.1e} apart"
            )
    if temperature == 0.0:
        plain = [row["distinct_4grams"] for row in rows if row["drafter"] == "plain"]
        yield (
            f"At temperature 0 the target repeats itself: only {100 * min(plain):.0f} % of its 4-grams are "
            "new.\nThat flatters every drafter, and n-grams most; read temperature 0.8 beside it."
        )
    else:
        yield (
            "Above temperature 0 every method draws other random numbers: the texts differ, their law does "
            "not.\nSpeeds differ with the text that was drawn."
        )


def legend() -> list[str]:
    """What the columns mean."""
    return [
        "tokens/s: median over the prompts, reading the prompt included. x plain, x HF: median of the ratios",
        "to foretoken's plain decoding through the same forward, and to Hugging Face assisted generation.",
        "a round: tokens per target forward. accepted by position: share of the rounds that accepted draft",
        "1, 2, ... 4-grams: share that does not repeat. outside: share of the rounds' time outside the",
        "models' forwards. same: prompts whose tokens equal plain decoding through the same forward.",
    ]


def check_lines(checks: list[dict[str, Any]]) -> list[str]:
    """One line per figure that has a bound."""
    width = max(len(check["name"]) for check in checks)
    return [
        f"{check['name']:<{width}}  {check['value']:8.3f}  {'<=' if check['at_most'] else '>='} "
        f"{check['bound']:g}{'' if check['reached'] else '   not reached'}"
        for check in checks
    ]


def _cells(row: dict[str, Any], prompts: int) -> tuple[str, ...]:
    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    positions = " ".join(f"{share:.2f}".lstrip("0") for share in row["acceptance_by_position"])
    differences = row.get("differences")
    return (
        row["method"],
        str(row["drafts"] or "-"),
        f"{row['tokens_per_second']:.0f}",
        ratio(row["over_plain"]),
        ratio(row["over_hf_assisted"]),
        f"{row['tokens_per_round']:.2f}",
        positions or "-",
        f"{row['distinct_4grams']:.2f}",
        f"{100 * row['outside_forwards']:.0f} %",
        "-" if differences is None else f"{prompts - len(differences)}/{prompts}",
    )
