"""Trees that grow by a draft model's confidence, level by level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foretoken import ops
from foretoken.sampling import SamplingTable
from foretoken.step import WORD_BITS, Step, StepTree
from foretoken.tree.plan import TreePlan


@dataclass(slots=True)
class Rows:
    """The rows that draft: where their roots stand in the drafter's cache, and how far their trees may go."""

    slots: Tensor
    """int32 ``[A]``, ascending."""
    lengths: Tensor
    """int64 ``[A]``: the cache row of the root, which has been fed."""
    requests: Sequence[Any]
    depth: Tensor
    """int64 ``[A]``: the most drafts of a path, at least 1."""
    nodes: Tensor
    """int32 ``[A]``: the most drafts."""
    chain: Tensor
    """bool ``[A]``: one child each, please."""


@dataclass(slots=True)
class GrownTrees:
    """Trees of the rows, their law, and where their nodes stand in the drafter's cache."""

    rows: Rows
    tokens: Tensor
    """int32 or int64 ``[A, N]``."""
    parents: Tensor
    """int32 ``[A, N]``."""
    num_drafts: Tensor
    """int32 ``[A]``."""
    fed: Tensor
    """int64 ``[A, N]``: cache rows from the root's to that of node i + 1, -1: it was not fed."""
    law: tuple[Tensor, Tensor] | None = None
    """Ids and probabilities ``[A, M, k]`` of what was drawn; None: nodes were chosen."""
    draft_row: Tensor | None = None
    """int32 ``[A, N + 1]``, with a law."""

    def spread(self, places: Tensor, batch: int) -> dict[str, Any]:
        """The fields of a proposal for ``batch`` rows, these at ``places``; the others draft nothing."""

        def whole(part: Tensor, fill: int = 0) -> Tensor:
            spread = torch.full((batch, *part.shape[1:]), fill, dtype=part.dtype)
            spread[places] = part
            return spread

        fields: dict[str, Any] = {
            "tokens": whole(self.tokens.to(torch.int64)),
            "num_drafts": whole(self.num_drafts),
            "parents": whole(self.parents),
        }
        if self.law is not None and self.draft_row is not None:
            fields["draft_topk"] = whole(self.law[0]), whole(self.law[1])
            fields["draft_row"] = whole(self.draft_row, -1)
        return fields

    def settle(
        self, slots: Tensor, path: Tensor, num_accepted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What of the accepted paths the drafter has fed, for the rows that are left of those that drafted.

        Parameters
        ----------
        slots, path, num_accepted
            Of the verdict's rows.

        Returns
        -------
        tuple of Tensor
            Slots, lengths, path and number of rows to keep, as `compact` takes them.
        """
        place = {slot: row for row, slot in enumerate(slots.tolist())}
        left = [(row, place[slot]) for row, slot in enumerate(self.rows.slots.tolist()) if slot in place]
        ours, theirs = torch.tensor(left, dtype=torch.int64).view(-1, 2).unbind(1)
        nodes, accepted = path[theirs].to(torch.int64), num_accepted[theirs]
        fed = self.fed[ours].gather(1, (nodes - 1).clamp(0, self.fed.shape[1] - 1))
        # What hangs below an accepted node was drafted because the node was fed.
        known = (torch.arange(nodes.shape[1]) < accepted[:, None]) & (fed >= 0)
        kept = known.cumprod(1).sum(1)
        return self.rows.slots[ours], self.rows.lengths[ours], fed, kept


class ConfidenceGrowth:
    """EAGLE-2's trees (Li et al. 2024, arXiv:2406.16858): every level's best nodes get children, and of all
    that there are the best stay.

    Nodes are chosen and not drawn, so the trees are deterministic proposals. Levels are fed behind the root
    one after the other, ``branches`` nodes each.
    """

    def __init__(self, plan: TreePlan, forward: Callable[[Step], Tensor]) -> None:
        self._plan = plan
        self._forward = forward
        self._frontier = plan.branches
        most = 1 + (ops.MAX_CANDIDATES - plan.branches) // (self._frontier * plan.branches)
        self._levels = min(plan.depth, most)

    def depth_in(self, room: Tensor) -> Tensor:
        """The deepest tree that needs no more than ``room`` cache rows, the root's included."""
        return 1 + torch.div(room - 1, self._frontier, rounding_mode="floor")

    def grow(self, logits: Tensor, rows: Rows, base: Tensor, sampling: SamplingTable) -> GrownTrees:
        """Trees from the logits behind the roots, ``[A, V]``. No random number is used."""
        count, k, width = logits.shape[0], self._plan.branches, self._frontier
        levels = min(self._levels, int(rows.depth.max()))
        size = k + (levels - 1) * width * k
        tokens = torch.full((count, size), -1, dtype=torch.int32)
        scores = torch.full((count, size), -torch.inf)
        parents = torch.full((count, size), -1, dtype=torch.int32)
        fed = torch.full((count, size), -1)
        level = ops.draft_topk(logits, k)
        words = words_of(1 + (levels - 1) * width)
        seen = words[:1].expand(count, 1, -1)
        start = 0
        live = torch.arange(count)
        for depth in range(1, levels + 1):
            values = level.scores.flatten(1)  # a view: what is no child counts nowhere
            values.view(len(live), -1, k)[rows.chain[live], :, 1:] = -torch.inf
            end = start + values.shape[1]
            for kept, new in ((tokens, level.tokens), (scores, level.scores), (parents, level.parents)):
                kept[live, start:end] = new.flatten(1)
            if depth == levels:
                break
            deeper = (rows.depth[live] > depth).nonzero().squeeze(1)
            live, values, seen = live[deeper], values[deeper], seen[deeper]
            order = torch.sort(values, stable=True, dim=1, descending=True).indices[:, :width]
            entries = start + order
            first = 1 + (depth - 1) * width
            above = order // k if depth > 1 else torch.zeros_like(order)
            seen = seen.gather(1, above.unsqueeze(-1).expand(-1, -1, words.shape[1]))
            seen = seen | words[first : first + order.shape[1]]
            fed[live[:, None], entries] = first + torch.arange(order.shape[1])
            chosen = tokens[live[:, None], entries].clamp_min(0).to(torch.int64)
            found = self._forward(level_step(rows, live, chosen, seen, first, depth))
            level = ops.draft_topk(found, k, scores=values.gather(1, order), entries=entries)
            start = end
        final = ops.finalize_tree(tokens, scores, parents, int(rows.nodes.max()), budget=rows.nodes)
        source = final.source.to(torch.int64)
        fed = fed.gather(1, source.clamp_min(0)).masked_fill_(source < 0, -1)
        return GrownTrees(rows, final.tokens, final.parents, final.num_drafts, fed)


def words_of(count: int) -> Tensor:
    """int64 ``[count, W]``: in word row i bit i alone."""
    places = torch.arange(count)
    words = torch.zeros(count, -(-count // WORD_BITS), dtype=torch.int64)
    words[places, places // WORD_BITS] = torch.ones((), dtype=torch.int64) << places % WORD_BITS
    return words


def level_step(rows: Rows, live: Tensor, tokens: Tensor, seen: Tensor, first: int, depth: int) -> Step:
    """A level's forward: ``tokens`` ``[R, n]`` go to the cache rows from ``first`` behind the root's on."""
    roots, slots = rows.lengths[live], rows.slots[live]
    count, columns = tokens.shape
    numbers, starts = slots.tolist(), roots + first
    neighbours = numbers[-1] - numbers[0] == count - 1
    return Step(
        kind="decode",
        tokens=tokens,
        positions=(roots + depth)[:, None].expand(-1, columns).contiguous(),
        num_tokens=torch.full((count,), columns, dtype=torch.int32),
        lengths=starts,
        slots=slots,
        requests=[rows.requests[row] for row in live.tolist()],
        max_length_after=int(starts.max()) + columns,
        uniform=True,
        slot_range=(numbers[0], numbers[-1] + 1) if neighbours else None,
        tree=StepTree(roots, seen.contiguous()),
    )
