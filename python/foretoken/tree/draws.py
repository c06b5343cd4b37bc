"""Trees that are drawn from a draft model, level by level, every budget settled before the draw it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from foretoken import ops
from foretoken.ops._commit import upload
from foretoken.sampling import SamplingTable
from foretoken.step import Step, numbers
from foretoken.tree.growth import ConfidenceGrowth, GrownTrees, Rows, words_of
from foretoken.tree.plan import TreePlan

# Draws come from a node's likeliest tokens alone: that is the drafter's law, and it is declared as it is.
_SUPPORT = 64
# What one more child of a node is thought to be worth, over the child before it.
_NEXT_CHILD = log(0.3)


class SampledGrowth:
    """``branches`` draws behind the root, equal shares of what is left of the budget for the other levels.

    Who of a level gets the draws of the next one goes by how likely the drafter is to get there: that looks
    at what has been drawn, and not at what is about to be. Nothing drawn is dropped.

    Parameters
    ----------
    plan
        Its ``draw`` is not ``"deterministic"``.
    forward
        Logits of a step, as wide as the target's.
    """

    def __init__(self, plan: TreePlan, forward: Callable[[Step], Tensor]) -> None:
        self._plan = plan
        self._forward = forward
        self._draw: Literal["iid", "without_replacement"]
        self._draw = "iid" if plan.draw == "iid" else "without_replacement"
        levels = min(plan.depth, plan.nodes)
        first = min(plan.branches, plan.nodes - levels + 1)
        more, rest = divmod(plan.nodes - first, max(levels - 1, 1))
        self._widths = [first, *(more + (level < rest) for level in range(levels - 1))]
        self._ends = torch.tensor(self._widths).cumsum(0) + 1  # of each level, in cache rows
        self._laws: _Laws | None = None

    def depth_in(self, room: Tensor) -> Tensor:
        """The deepest tree that needs no more than ``room`` cache rows, the root's included."""
        if self._ends.device != room.device:
            self._ends = upload(self._ends, self._ends.dtype, room.device)
        return 1 + torch.searchsorted(self._ends, room, right=True)

    def know(self, sampling: SamplingTable, slots: Sequence[int], device: torch.device) -> None:
        """Write what has changed of the laws and seeds of some slots to where `grow` reads them, graphs of it
        included.
        """
        if self._laws is None or self._laws.size != sampling.size:
            self._laws = _Laws(sampling.size, device)
        self._laws.update(sampling, slots)

    def grow(self, logits: Tensor, rows: Rows, base: Tensor) -> GrownTrees:
        """Trees from the logits behind the roots, ``[A, V]``, of slots whose laws are known."""
        count, levels = logits.shape[0], min(len(self._widths), rows.most_depth())
        device = logits.device
        widths = self._widths[:levels]
        size, fed_size = sum(widths), sum(widths[:-1])
        support = min(_SUPPORT, logits.shape[-1])
        laws = self._laws
        if laws is None:
            raise RuntimeError("grow: expected laws that have been told, got none")
        law = laws.of(rows.slots, support)
        ids = torch.zeros(count, 1 + fed_size, support, dtype=torch.int64, device=device)
        probs = torch.zeros(count, 1 + fed_size, support, device=device)
        ids[:, 0], probs[:, 0] = law(logits, slice(None))
        open_probs = probs.clone()  # less the elder siblings, where these are not drawn again
        children = torch.zeros(count, 1 + fed_size, dtype=torch.int64, device=device)
        tokens = torch.zeros(count, size, dtype=torch.int64, device=device)
        parents = torch.zeros(count, size, dtype=torch.int64, device=device)  # 0 the root, i + 1 the draw i
        exists = torch.zeros(count, size, dtype=torch.bool, device=device)
        reach = torch.full((count, 1 + size), -torch.inf, device=device)
        reach[:, :1].fill_(0.0)
        words = words_of(1 + fed_size, device)
        seen = words.repeat(count, 1, 1)
        was_fed = torch.zeros(count, 1 + size, dtype=torch.bool, device=device)
        every = numbers(count, device)
        above, start = range(1), 0
        for depth, width in enumerate(widths, 1):
            for draw in range(start, start + width):
                rated = (
                    reach[:, above.start : above.stop] + _NEXT_CHILD * children[:, above.start : above.stop]
                )
                crowded = children[:, above.start : above.stop] >= self._plan.branches
                best, place = rated.masked_fill(crowded, -torch.inf).max(1)
                parent = above.start + place
                wanted = (best > -torch.inf) & (rows.depth >= depth) & (exists.sum(1) < rows.nodes)
                wanted &= ~rows.chain | (children[every, parent] == 0)
                left = open_probs[every, parent]
                possible = wanted & (left > 0).any(1)
                column = self._column(left, law, laws.seeds, base, rows.slots, draw)
                tokens[:, draw] = ids[every, parent, column]
                parents[:, draw], exists[:, draw] = parent, possible
                found = reach[every, parent] + probs[every, parent, column].log()
                reach[:, draw + 1] = torch.where(possible, found, -torch.inf)
                children[every, parent] += possible
                taken = possible & (law.greedy | (self._draw == "without_replacement"))
                rest = open_probs[every, parent, column].masked_fill(taken, 0.0)
                open_probs[every, parent, column] = rest
            above, start = range(start + 1, start + width + 1), start + width
            if depth == levels:
                break
            wanted = (rows.depth > depth) & exists[:, start - width : start].any(1)
            live = rows.those(wanted)
            if len(live) == 0:
                break
            was_fed[:, above.start : above.stop] = wanted[:, None]
            own = words[above.start : above.stop]
            upper = parents[:, start - width : start].unsqueeze(-1).expand(-1, -1, words.shape[1])
            seen[:, above.start : above.stop] = seen.gather(1, upper) | own
            level = rows.step(
                live,
                wanted[live],
                tokens[live, start - width : start],
                seen[live, above.start : above.stop],
                above.start,
                depth,
            )
            found_ids, found_probs = law(self._forward(level), live)
            ids[live, above.start : above.stop] = found_ids
            probs[live, above.start : above.stop] = found_probs
            open_probs[live, above.start : above.stop] = found_probs
        return _numbered(rows, tokens, parents, exists, was_fed, (ids, probs))

    def _column(
        self,
        left: Tensor,
        law: _Law,
        seeds: SamplingTable,
        base: Tensor,
        slots: Tensor,
        draw: int,
    ) -> Tensor:
        """Where in its law each row's draw falls; greedy rows take the likeliest that is left."""
        if law.all_greedy:
            return left.argmax(1)
        drawn = ops.sample(left.log(), sampling=seeds, base=base, step=draw, purpose="draft", slots=slots)
        return torch.where(law.greedy, left.argmax(1), drawn)


def _numbered(
    rows: Rows,
    tokens: Tensor,
    parents: Tensor,
    exists: Tensor,
    was_fed: Tensor,
    law: tuple[Tensor, Tensor],
) -> GrownTrees:
    """Draws that did not take place leave no number."""
    order = exists.logical_not().to(torch.int8).sort(dim=1, stable=True).indices
    new_numbers = pad(exists.cumsum(1), (1, 0))
    inside = numbers(exists.shape[1], exists.device) < exists.sum(1, keepdim=True)
    places = order + 1
    fed = places.masked_fill(~inside | ~was_fed.gather(1, places), -1)
    return GrownTrees(
        rows,
        tokens.gather(1, order).masked_fill_(~inside, 0),
        new_numbers.gather(1, parents).gather(1, order).masked_fill_(~inside, 0).to(torch.int32),
        exists.sum(1, dtype=torch.int32),
        fed,
        law,
        pad(fed, (1, 0), value=0).to(torch.int32),
    )


class _Laws:
    """Temperature and filters by slot, where the draws are made, and as the host knows them."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.seeds = SamplingTable(size)
        """No law: probabilities are drawn from as they are."""
        self._known: list[tuple[float, ...] | None] = [None] * size
        self._all_greedy = False
        with torch.inference_mode(False):
            self._columns = torch.zeros(size, 4, device=device)

    def update(self, sampling: SamplingTable, slots: Sequence[int]) -> None:
        """Take over what has changed of some slots, which are those that draw next."""
        laws = {slot: tuple(sampling.get(slot)) for slot in slots}
        self._all_greedy = all(law[0] == 0.0 for law in laws.values())
        changed = [slot for slot, law in laws.items() if self._known[slot] != law]
        if not changed:
            return
        for slot in changed:
            self._known[slot] = law = laws[slot]
            self.seeds.set(slot, 1.0, 0, 1.0, 0.0, law[4])
        device = self._columns.device
        rows = torch.tensor([laws[slot][:4] for slot in changed], dtype=torch.float32)
        places = upload(changed, torch.int64, device)
        self._columns.index_copy_(0, places, upload(rows, torch.float32, device))
        self.seeds.bring_to(places)

    def of(self, slots: Tensor, support: int) -> _Law:
        """Of rows in these slots."""
        return _Law(self._columns.index_select(0, slots), support, self._all_greedy)


class _Law:
    """What rows draw from: their likeliest tokens, by their temperature and filters."""

    def __init__(self, columns: Tensor, support: int, all_greedy: bool) -> None:
        self.support, self.all_greedy = support, all_greedy
        temperature, top_k, self._top_p, self._min_p = columns.unbind(1)
        self.greedy = temperature == 0.0
        self._temperature = temperature.masked_fill(self.greedy, 1.0)
        self._top_k = top_k.masked_fill(top_k == 0, support)

    def __call__(self, logits: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Ids and probabilities ``[.., k]`` of logits ``[.., V]`` of some rows, the likeliest first."""

        def of(column: Tensor) -> Tensor:
            return column[rows].view(-1, *[1] * (logits.ndim - 1))

        values, ids = logits.float().topk(self.support)
        hidden = numbers(self.support, logits.device) >= of(self._top_k)
        probs = (values / of(self._temperature)).masked_fill(hidden, -torch.inf).softmax(-1)
        hidden = (probs.cumsum(-1) - probs >= of(self._top_p)) | (probs < of(self._min_p) * probs[..., :1])
        hidden[..., 0] = False
        probs = probs.masked_fill(hidden, 0.0)
        return ids, probs / probs.sum(-1, keepdim=True)


Growth = ConfidenceGrowth | SampledGrowth


def growth_of(plan: TreePlan, forward: Callable[[Step], Tensor]) -> Growth:
    """How a model grows the trees of a plan."""
    kind = ConfidenceGrowth if plan.draw == "deterministic" else SampledGrowth
    return kind(plan, forward)
