"""What the requests of an experiment ask for: rules, filters, penalties, a grammar."""

from __future__ import annotations

import random
from dataclasses import dataclass

from covering import Configuration, makes_sense
from reference import Filters

FILTERS = {
    "cold": Filters(temperature=0.3),
    "hot": Filters(temperature=2.0),
    "greedy": Filters(temperature=0.0),
    "top_k": Filters(top_k=3),
    "top_p": Filters(top_p=0.8),
    "min_p": Filters(min_p=0.2),
    "all": Filters(temperature=0.8, top_k=3, top_p=0.9, min_p=0.05),
}
PENALTIES = {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": 0.4}
NO_PENALTIES = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
BIAS = {1: 0.7}
PROMPT, OUTPUT = (0, 2), (2, 3, 0)
TEXT = len(PROMPT) + len(OUTPUT)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a request asks for."""

    rule: str
    filters: str = "none"
    side: str = "both"

    def on(self, side: str) -> Filters:
        return FILTERS.get(self.filters, Filters()) if self.side in ("both", side) else Filters()

    def penalised(self, side: str) -> bool:
        return self.filters == "penalties" and self.side in ("both", side)

    @property
    def masked(self) -> bool:
        return self.filters == "bitmask"


def kinds_of(row: Configuration) -> list[Kind]:
    """The request in question twice, and two others."""
    own = Kind(row.rule, row.filters, row.side)
    if row.mix not in ("mixed", "shuffled"):
        return [own]
    rules = [
        rule
        for rule in ("rrs", "traversal", "target_only", "spectr", "coupled")
        if makes_sense(Configuration(rule, row.law, row.draw, row.shape, "none", "both"))
    ]
    pick = random.Random(str(row))
    other, another = pick.choice(rules), pick.choice(rules)
    return [own, Kind(other), own, Kind(another, "hot", "target")]


def penalised(logits: list[float], path: tuple[int, ...], ids: list[int] | None = None) -> list[float]:
    """Bias, repetition over prompt and output, frequency and presence over output, in float64."""
    text, output = (*PROMPT, *OUTPUT, *path), (*OUTPUT, *path)
    row = []
    for token, x in zip(ids or range(len(logits)), logits, strict=True):
        x += BIAS.get(token, 0.0)
        if token in text:
            x = x / PENALTIES["repetition_penalty"] if x > 0 else x * PENALTIES["repetition_penalty"]
        if token in output:
            x -= PENALTIES["frequency_penalty"] * output.count(token) + PENALTIES["presence_penalty"]
        row.append(x)
    return row
