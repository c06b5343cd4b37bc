"""What a drafter proposes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foretoken import ops
from foretoken.sampling import Sampling, SamplingTable

__all__ = ["Proposal"]


@dataclass(slots=True)
class Proposal:
    """What a drafter proposes for B rows, and the law it drew from.

    Without ``draft_logits``, ``draft_probs`` and ``draft_topk`` the proposal is deterministic (a point law).
    The declared law is the one the tokens were really drawn from, whatever else: that is what keeps the
    output exact.
    """

    tokens: Tensor
    """int64 ``[B, K]``; what lies behind a row's ``num_drafts`` is not read."""
    num_drafts: Tensor
    """int32 ``[B]``, at most the row's budget (of trees, its ``nodes``). 0: the row is decoded plainly."""
    draft_logits: Tensor | None = None
    """``[B, M, V]``: row i is what draft i was drawn from, through ``draft_sampling``."""
    draft_probs: Tensor | None = None
    """``[B, M, V]``: the same as final probabilities."""
    draft_topk: tuple[Tensor, Tensor] | None = None
    """Ids and probabilities ``[B, M, k]``: the same as short lists."""
    draft_row: Tensor | None = None
    """int32 ``[B, K + 1]``: the law row that the children of each node were drawn from (in a chain
    draft i is the child of node i), -1 for a point law; None: row r for node r.
    """
    draft_sampling: Sampling | SamplingTable | None = None
    """Law applied to ``draft_logits``; None: the request's own."""
    parents: Tensor | None = None
    """int32 ``[B, K]``: the parent of node i + 1, a node number of at most i (0 is the root); None: chains.
    For sessions with ``tree`` alone; no path may be longer than the row's budget.
    """
    draw: ops.Draw | None = None
    """How siblings came about; None: ``"iid"`` with a law, ``"deterministic"`` without one."""
    draft_records: Tensor | None = None
    """int64 ``[B, M, 4]``: the laws of ``draft_logits`` as ``sample(records=...)`` wrote them, which spares
    verification a pass over those rows; None: it computes them.
    """

    def select(self, rows: Tensor) -> Proposal:
        """The proposal of some of the rows (int64 ``[R]``), in that order."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, rows)

        topk = self.draft_topk
        return Proposal(
            tokens=self.tokens.index_select(0, rows),
            num_drafts=self.num_drafts.index_select(0, rows),
            draft_logits=pick(self.draft_logits),
            draft_probs=pick(self.draft_probs),
            draft_topk=None
            if topk is None
            else (topk[0].index_select(0, rows), topk[1].index_select(0, rows)),
            draft_row=pick(self.draft_row),
            draft_sampling=self.draft_sampling,
            parents=pick(self.parents),
            draw=self.draw,
            draft_records=pick(self.draft_records),
        )
