"""What tests of trees of their own have in common: how deep those are, and buffers for their verdicts."""

from __future__ import annotations

from torch import Tensor

import foretoken as ft
from mirrored import results_of


class TreeRoom:
    """Of requests with `tokens` and `parents` ``[B, N]``."""

    tokens: Tensor
    parents: Tensor

    @property
    def depth(self) -> int:
        longest = 0
        for parents in self.parents.tolist():
            depth = [0]
            for parent in parents:
                depth.append(depth[parent] + 1)
            longest = max(longest, *depth)
        return longest

    def room(self, depth: int) -> ft.ops.Verdict:
        out = ft.ops.Verdict.empty(len(self.tokens), depth, path_rows=True)
        for field in results_of(out):
            if (buffer := getattr(out, field.name)) is not None:
                buffer.fill_(-7)
        return out
