"""Trees that grow by a draft model's confidence, level by level."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foretoken import ops
from foretoken.sampling import SamplingTable
from foretoken.step import WORD_BITS, Step, StepTree, numbers
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

    def most_depth(self) -> int:
        """What no ``depth`` exceeds."""
        return int(self.depth.max())

    def most_nodes(self) -> int:
        """What no ``nodes`` exceeds."""
        return int(self.nodes.max())

    def those(self, wanted: Tensor) -> Tensor:
        """int64 ``[R]``: which rows take part in a level, for bool ``[A]`` that says which have to."""
        return wanted.nonzero().squeeze(1)

    def step(
        self, live: Tensor, wanted: Tensor, tokens: Tensor, seen: Tensor, first: int, depth: int
    ) -> Step:
        """A level's forward: ``tokens`` ``[R, n]`` of the rows ``live`` go to the cache rows from ``first``
        behind the root's on. ``wanted`` ``[R]``: the others' results are not looked at.
        """
        roots, slots = self.lengths[live], self.slots[live]
        count, columns = tokens.shape
        places, starts = slots.tolist(), roots + first
        neighbours = places[-1] - places[0] == count - 1
        return Step(
            kind="decode",
            tokens=tokens,
            positions=(roots + depth)[:, None].expand(-1, columns).contiguous(),
            num_tokens=torch.full((count,), columns, dtype=torch.int32),
            lengths=starts,
            slots=slots,
            requests=[self.requests[row] for row in live.tolist()],
            max_length_after=int(starts.max()) + columns,
            uniform=True,
            slot_range=(places[0], places[-1] + 1) if neighbours else None,
            tree=StepTree(roots, seen.contiguous()),
        )


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
        fed, kept = fed_of(self.fed[ours], path[theirs], num_accepted[theirs])
        return self.rows.slots[ours], self.rows.lengths[ours], fed, kept


def fed_of(fed: Tensor, path: Tensor, num_accepted: Tensor) -> tuple[Tensor, Tensor]:
    """Where the accepted nodes stand behind the root, and how many of them have been fed.

    Parameters
    ----------
    fed
        As of `GrownTrees`.
    path, num_accepted
        Of the verdict's rows, which are those of ``fed``.
    """
    nodes = path.to(torch.int64)
    found = fed.gather(1, (nodes - 1).clamp(0, fed.shape[1] - 1))
    # What hangs below an accepted node was drafted because the node was fed.
    accepted = numbers(nodes.shape[1], nodes.device) < num_accepted[:, None]
    kept = (accepted & (found >= 0)).cumprod(1).sum(1)
    return found, kept


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

    def know(self, sampling: SamplingTable, slots: Sequence[int], device: torch.device) -> None:
        """Nothing is drawn, so by no law."""

    def grow(self, logits: Tensor, rows: Rows, base: Tensor) -> GrownTrees:
        """Trees from the logits behind the roots, ``[A, V]``. No random number is used."""
        count, k, width = logits.shape[0], self._plan.branches, self._frontier
        device = logits.device
        levels = min(self._levels, rows.most_depth())
        size = k + (levels - 1) * width * k
        tokens = torch.full((count, size), -1, dtype=torch.int32, device=device)
        scores = torch.full((count, size), -torch.inf, device=device)
        parents = torch.full((count, size), -1, dtype=torch.int32, device=device)
        fed = torch.full((count, size), -1, device=device)
        level = ops.draft_topk(logits, k)
        words = words_of(1 + (levels - 1) * width, device)
        seen = words[:1].expand(count, 1, -1)
        start = 0
        live = numbers(count, device)
        for depth in range(1, levels + 1):
            values = level.scores.flatten(1)  # a view: what is no child counts nowhere
            chain = rows.chain[live][:, None, None]
            values.view(len(live), -1, k)[:, :, 1:].masked_fill_(chain, -torch.inf)
            end = start + values.shape[1]
            for kept, new in ((tokens, level.tokens), (scores, level.scores), (parents, level.parents)):
                kept[live, start:end] = new.flatten(1)
            if depth == levels:
                break
            # Of the rows of this level, in which places of it those of the next one are.
            deeper = rows.depth[live] > depth
            places = rows.those(deeper)
            live, values, seen, deeper = live[places], values[places], seen[places], deeper[places]
            order = torch.sort(values, stable=True, dim=1, descending=True).indices[:, :width]
            entries = start + order
            first = 1 + (depth - 1) * width
            above = order // k if depth > 1 else torch.zeros_like(order)
            seen = seen.gather(1, above.unsqueeze(-1).expand(-1, -1, words.shape[1]))
            seen = seen | words[first : first + order.shape[1]]
            where = first + numbers(order.shape[1], device)
            fed[live[:, None], entries] = torch.where(deeper[:, None], where, -1)
            chosen = tokens[live[:, None], entries].clamp_min(0).to(torch.int64)
            found = self._forward(rows.step(live, deeper, chosen, seen, first, depth))
            known = values.gather(1, order).masked_fill(~deeper[:, None], -torch.inf)
            level = ops.draft_topk(found, k, scores=known, entries=entries)
            start = end
        final = ops.finalize_tree(tokens, scores, parents, rows.most_nodes(), budget=rows.nodes)
        source = final.source.to(torch.int64)
        fed = fed.gather(1, source.clamp_min(0)).masked_fill_(source < 0, -1)
        return GrownTrees(rows, final.tokens, final.parents, final.num_drafts, fed)


@functools.lru_cache(maxsize=64)
def words_of(count: int, device: torch.device) -> Tensor:
    """int64 ``[count, W]``: in word row i bit i alone. Made once."""
    with torch.inference_mode(False):
        places = torch.arange(count, device=device)
        words = torch.zeros(count, -(-count // WORD_BITS), dtype=torch.int64, device=device)
        bits = torch.ones((), dtype=torch.int64, device=device) << places % WORD_BITS
        words[places, places // WORD_BITS] = bits
        return words
