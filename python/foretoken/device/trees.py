"""Draft trees whose rows are known to the device alone: every row takes part in every level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken import ops
from foretoken.step import Step, StepTree, numbers
from foretoken.tree.growth import Rows as TreeRows
from foretoken.tree.growth import words_of


@dataclass(slots=True)
class DeviceTreeRows(TreeRows):
    """`Rows` without a number that the host would have to wait for. Rows that do not draft have depth 0."""

    numbers_of_slots: Sequence[int]
    slot_range: tuple[int, int] | None
    longest: int
    """What no length exceeds."""
    shortfall: Tensor | None
    """By how much lengths surely stay below that."""
    max_length: int
    """Rows of a slot of the drafter's cache."""
    depth_bound: int
    node_bound: int

    def most_depth(self) -> int:
        return self.depth_bound

    def most_nodes(self) -> int:
        return self.node_bound

    def those(self, wanted: Tensor) -> Tensor:
        return numbers(len(wanted), wanted.device)

    def step(
        self, live: Tensor, wanted: Tensor, tokens: Tensor, seen: Tensor, first: int, depth: int
    ) -> Step:
        columns = tokens.shape[1]
        roots, starts = self.lengths, self.lengths + first
        bound = self.longest + first + columns
        if bound > self.max_length:  # rows that are not wanted may be near the end of their slot
            starts, roots = starts.clamp_max(self.max_length), roots.clamp_max(self.max_length)
        return Step(
            kind="decode",
            tokens=tokens.masked_fill(~wanted[:, None], 0),
            positions=(self.lengths + depth)[:, None].expand(-1, columns),
            num_tokens=torch.where(wanted, columns, 0).to(torch.int32),
            lengths=starts,
            slots=self.slots,
            requests=self.requests,
            max_length_after=bound,
            uniform=False,
            slot_range=self.slot_range,
            on_device=True,
            slot_numbers=self.numbers_of_slots,
            shortfall=self.shortfall,
            tree=StepTree(roots, seen.contiguous()),
        )


def tree_of(parents: Tensor, num_drafts: Tensor, lengths: Tensor) -> tuple[Tensor, StepTree]:
    """Positions and ancestor words of a step of trees. Padding sees itself and what all see.

    Parameters
    ----------
    parents, num_drafts
        int32 ``[B, N]`` and ``[B]`` of the proposal.
    lengths
        int64 ``[B]``: the position of the roots.
    """
    index = ops.tree_index(parents, num_drafts=num_drafts, lengths=lengths)
    behind = index.depth < 0
    own = words_of(behind.shape[1], parents.device)
    if index.positions is None:
        raise RuntimeError("tree_index: expected positions beside lengths, got none")
    positions = torch.where(behind, lengths[:, None], index.positions)
    return positions, StepTree(lengths, torch.where(behind[:, :, None], own, index.ancestors))
