"""Growing and cutting a draft tree in plain float64 loops, written from the paper (EAGLE-2, arXiv:2406.16858,
section 4: expansion by cumulative confidence, then reranking of everything that was expanded).
"""

from __future__ import annotations

import math

import numpy as np


def children_of(logits: np.ndarray, score: float, k: int) -> list[tuple[int, float]]:
    """(token, cumulative log-probability) of the k likeliest children of one node, best first."""
    row = np.asarray(logits, dtype=np.float64)
    if np.isnan(row).any() or (row == np.inf).any() or not np.isfinite(row).any():
        return []
    high = row.max()
    log_mass = math.log(np.exp(row - high).sum())
    order = sorted((v for v in range(len(row)) if row[v] > -np.inf), key=lambda v: (-row[v], v))
    return [(v, score + (row[v] - high - log_mass)) for v in order[:k]]


def kept_tree(scores: list[float], parents: list[int], most: int) -> list[int]:
    """The candidates that stay, in the order of their node numbers: depth first, the best child first."""

    def best_first(candidates: list[int]) -> list[int]:
        return sorted(candidates, key=lambda i: (-scores[i], i))

    there = [i for i, score in enumerate(scores) if score != -math.inf]
    kept = set(best_first(there)[:most])
    found: list[int] = []

    def visit(candidate: int) -> None:
        for child in best_first([i for i in kept if parents[i] == candidate]):
            found.append(child)
            visit(child)

    visit(-1)
    return found
