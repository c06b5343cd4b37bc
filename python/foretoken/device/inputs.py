"""What the forwards of a round of chains are fed, written in one launch from the texts on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from foretoken import _core
from foretoken.device.rows import Rows
from foretoken.drafters import Proposal
from foretoken.ops import RequestState
from foretoken.step import Step

# Tokens that a draft model's cache may lack when a round begins.
CATCH_UP = 2


class StepInputs:
    """The buffers of rounds of B rows and K drafts; forwards read them where they are.

    Attributes
    ----------
    tokens, positions, lengths, num_tokens, slots
        Of the target's `Step`. Whoever draws drafts writes them into ``tokens``, behind its first column, so
        that nothing has to be moved.
    drafts
        ``tokens`` without its first column.
    num_drafts
        int32 ``[B]``: how many drafts count, -1 where nobody is decoding and in a padded row.
    base
        int64 ``[B]``: what the round is keyed by.
    first_tokens, first_positions
        int64 ``[B, 2]``: the one or two tokens that a draft model's cache lacks.
    draft_lengths, draft_used
        int64 ``[K, B]`` and int32 ``[2, B]``: lengths of each of its steps; tokens of the first, and of each
        other.
    """

    def __init__(self, rows: int, drafts: int, device: torch.device) -> None:
        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        with torch.inference_mode(False):
            self.tokens, self.positions = zeros(rows, drafts + 1), zeros(rows, drafts + 1)
            self.drafts = self.tokens[:, 1:]
            self.lengths, self.base = zeros(rows), zeros(rows)
            self.num_tokens, self.num_drafts, self.slots = (zeros(rows, dtype=torch.int32) for _ in range(3))
            self.first_tokens, self.first_positions = zeros(rows, CATCH_UP), zeros(rows, CATCH_UP)
            self.draft_lengths = zeros(drafts, rows)
            self.draft_used = zeros(2, rows, dtype=torch.int32)

    def write(
        self, state: RequestState, seats: Tensor, reach: Tensor | None = None, cache_rows: int = 0
    ) -> None:
        """Fill the buffers from the state as the rounds before leave it.

        Parameters
        ----------
        seats
            int32 ``[B]``: the slot of each row, no slot twice; -1: a padded row, in which nothing is fed.
        reach, cache_rows
            int64 ``[S]``: rows of a draft model's cache that hold the text, which becomes what they will be
            when all its steps have run, and how many a slot has. None: no model drafts.
        """
        _core.write_step_inputs(
            state.text,
            state.base,
            state.next_drafts,
            seats,
            self.tokens,
            self.positions,
            self.lengths,
            self.num_tokens,
            self.num_drafts,
            self.base,
            self.slots,
            reach,
            self.first_tokens,
            self.first_positions,
            self.draft_lengths,
            self.draft_used,
            cache_rows,
        )

    def draft_ngrams(self, state: RequestState, min_ngram: int, max_ngram: int) -> None:
        """Behind `write`, of no draft model: draft what followed the longest match of the last tokens of each
        text, of equals the most recent. A row without one drafts nothing.
        """
        _core.draft_ngrams(
            state.text,
            self.base,
            self.slots,
            self.tokens,
            self.num_drafts,
            self.num_tokens,
            min_ngram,
            max_ngram,
        )

    def step(self, rows: Rows, requests: Any, max_length_after: int, shortfall: Tensor | None) -> Step:
        """The target's."""
        return self._step(
            self.tokens, self.positions, self.num_tokens, self.lengths,
            rows, requests, max_length_after, shortfall,
        )  # fmt: skip

    def draft_step(
        self, k: int, rows: Rows, requests: Any, max_length_after: int, shortfall: Tensor | None
    ) -> Step:
        """That of a draft model, out of which draft ``k`` is drawn."""
        lengths = self.draft_lengths[k]
        tokens, positions, used = (
            (self.first_tokens, self.first_positions, self.draft_used[0])
            if k == 0
            else (self.drafts[:, k - 1 : k], lengths[:, None], self.draft_used[1])
        )
        return self._step(
            tokens, positions, used, lengths, rows, requests, max_length_after, shortfall
        )  # fmt: skip

    def _step(
        self,
        tokens: Tensor,
        positions: Tensor,
        num_tokens: Tensor,
        lengths: Tensor,
        rows: Rows,
        requests: Any,
        max_length_after: int,
        shortfall: Tensor | None,
    ) -> Step:
        return Step(
            "decode",
            tokens,
            positions,
            num_tokens,
            lengths,
            self.slots,
            requests,
            max_length_after,
            False,
            rows.range,
            True,
            slot_numbers=rows.slot_numbers,
            shortfall=shortfall,
        )


@dataclass(slots=True, eq=False)
class FedProposal(Proposal):
    """A proposal whose step is already written."""

    inputs: StepInputs | None = None


def last_logits(logits: Tensor, used: Tensor | None, out: Tensor) -> Tensor:
    """Copy the logits of each row's last token, cut or filled up to the width of ``out``; one launch.

    Parameters
    ----------
    logits
        ``[B, T, V]``.
    used
        int32 ``[B]``: tokens of each row; None: all are.
    out
        ``[B, W]``; what the vocabulary lacks has no mass.
    """
    missing = out.shape[1] - logits.shape[2]
    if missing > 0:
        logits = pad(logits, (0, missing), value=-torch.inf)
    _core.last_logits(logits, used, out)
    return out
