"""Trees side by side, as the arguments of ``ops.verify``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from foretoken.tree.law import common, stacked
from foretoken.tree.nodes import TreeNodes


def batch_arguments(trees: Sequence[TreeNodes | None], device: torch.device | str | None) -> dict[str, Any]:
    """See :meth:`foretoken.tree.DraftTree.batch`."""
    held = [TreeNodes() if tree is None else tree for tree in trees]
    size = max(map(len, held), default=0)
    draw = common("draw", [tree.draw for tree in held if tree.draw != "deterministic"])
    if isinstance(draw, tuple):
        _check_paths(held, draw[1])
    form = common("law", [tree.laws.form for tree in held if tree.laws.form is not None])
    law = () if form is None else stacked([tree.laws for tree in held])
    where = device if device is not None else law[0].device if law else "cpu"

    def padded(rows: Iterable[Sequence[int]], width: int, fill: int, dtype: torch.dtype) -> Tensor:
        cells = [[*row, *[fill] * (width - len(row))] for row in rows]
        return torch.tensor(cells, dtype=dtype, device=where).view(len(held), width)

    counts = [-1 if tree is None else len(tree) for tree in trees]
    arguments: dict[str, Any] = {
        "draft_tokens": padded((tree.tokens for tree in held), size, 0, torch.int64),
        "parents": padded((tree.parents for tree in held), size, 0, torch.int32),
        "num_drafts": torch.tensor(counts, dtype=torch.int32, device=where),
        "draw": draw or "deterministic",
    }
    if draw is not None:
        rows = (tree.draft_row.tolist() for tree in held)
        arguments["draft_row"] = padded(rows, size + 1, -1, torch.int32)
    if form is not None:
        parts = tuple(part.to(where) for part in law)
        arguments[form] = parts if form == "draft_topk" else parts[0]
    return arguments


def _check_paths(trees: Sequence[TreeNodes], count: int) -> None:
    for b, tree in enumerate(trees):
        paths = len(tree.children())
        if len(tree) > 0 and (tree.draw == "deterministic" or paths != count):
            raise ValueError(
                f"trees: expected {count} independent paths in tree {b}, got {paths} with draw={tree.draw!r}"
            )
