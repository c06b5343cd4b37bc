"""Stopping criteria and streamers, fed exactly as transformers feeds them, behind rows that run ahead of
each other.

transformers' loop moves all rows by one token, asks the criteria about the whole batch, and hands the
streamer one token of every row. Rounds move rows by different counts. `Replay` holds the batch as
transformers would and takes its steps once every row has the token: criteria see the same tensors in the
same order, once per emitted token, and what a row had emitted beyond its stop is cut off. Criteria that
look at nothing but their own row (end of sequence, length, stop strings) are asked as soon as tokens
arrive, so that their rows stop at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

_BEYOND = 2**31 - 1  # more would not survive pad(), which takes a float
_ROW_BY_ROW = (EosTokenCriteria, MaxLengthCriteria)


def shared_criteria(criteria: StoppingCriteriaList) -> list[Any]:
    """Those that may look at the whole batch, or at anything."""
    return [c for c in criteria if type(c) not in _ROW_BY_ROW and type(c) is not StopStringCriteria]


class Replay:
    """The batch as transformers' loop would hold it.

    Parameters
    ----------
    input_ids
        int64 [B, L], prompts with their padding.
    criteria
        The complete list.
    max_new_tokens, eos_ids
        What the criteria of exact type `MaxLengthCriteria` and `EosTokenCriteria` say.
    pad_id
        Fills rows that have ended. None: no criterion is about an end of sequence, and transformers lets a
        stopped row go on until all have stopped.
    lookahead
        Columns kept free behind the committed tokens, for drafted ones.
    """

    def __init__(
        self,
        input_ids: Tensor,
        criteria: StoppingCriteriaList,
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        pad_id: int | None,
        lookahead: int = 0,
        streamer: Any = None,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self.batch, self.prompt_length = input_ids.shape
        self.filler = 0 if pad_id is None else pad_id
        width = self.prompt_length + max_new_tokens + lookahead
        self.ids = torch.full((self.batch, width), self.filler, dtype=torch.long, device=input_ids.device)
        self.ids[:, : self.prompt_length] = input_ids
        self._max_new_tokens = max_new_tokens
        self._eos = frozenset(eos_ids)
        self._strings = [c for c in criteria if type(c) is StopStringCriteria]
        self._lengths = [c for c in criteria if type(c) is MaxLengthCriteria]
        self._shared = StoppingCriteriaList(shared_criteria(criteria))
        self._streamer = streamer
        # Rows end one by one where transformers pads them; a single row has nobody to wait for.
        self._end_alone = pad_id is not None or self.batch == 1
        self._certain = not self._shared and (self._end_alone or not self._strings)
        self._count = [0] * self.batch
        self._flagged: list[int | None] = [None] * self.batch
        self._reason: list[str | None] = [None] * self.batch
        self._ended = [False] * self.batch
        self._stopped = [False] * self.batch
        self.step = 0
        self.done = False
        self.scores: list[Tensor] | None = [] if keep_scores else None
        self.logits: list[Tensor] | None = [] if keep_logits else None
        self._row_scores: list[list[Tensor]] = [[] for _ in range(self.batch)]
        self._row_logits: list[list[Tensor]] = [[] for _ in range(self.batch)]

    def length(self, row: int) -> int:
        """Tokens of `row` in `ids`: padding, prompt, and what it has generated."""
        return self.prompt_length + self._count[row]

    def generated(self, row: int) -> int:
        return self._count[row]

    def ended(self, row: int) -> bool:
        """Whether `row` needs no more tokens."""
        return self._ended[row]

    def reason(self, row: int) -> str | None:
        """Why `row` stopped: "eos", "length" or "stop"; None while it goes on."""
        return self._reason[row]

    def certain(self, row: int) -> int:
        """How many generated tokens of `row` no later step can take back."""
        return self._count[row] if self._certain else min(self._count[row], self.step)

    def append(
        self, row: int, tokens: Sequence[int], scores: Tensor | None = None, logits: Tensor | None = None
    ) -> None:
        """Take in tokens that `row` has emitted, with their [n, V] scores and logits if they are kept."""
        if self._ended[row]:
            return
        start = self.length(row)
        self.ids[row, start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        if scores is not None:
            self._row_scores[row] += scores.unbind(0)
        if logits is not None:
            self._row_logits[row] += logits.unbind(0)
        first, self._count[row] = self._count[row], self._count[row] + len(tokens)
        if self._flagged[row] is None:
            self._flag(row, first, tokens)

    def advance(self) -> None:
        """Take every step of transformers' loop for which all rows have their token."""
        while not self.done and all(
            ended or count > self.step for ended, count in zip(self._ended, self._count, strict=True)
        ):
            step = self.step + 1
            self._collect(step)
            now = self.ids[:, : self.prompt_length + step]
            stop = [flagged == step for flagged in self._flagged]
            if self._shared:
                scores = None if self.scores is None else tuple(self.scores)
                # A copy, because transformers hands out a new tensor at every step and a criterion may
                # keep it.
                verdict = self._shared(now.clone(), scores)
                stop = [a or b for a, b in zip(stop, verdict.tolist(), strict=True)]
            if self._streamer is not None:
                self._streamer.put(now[:, -1].cpu().clone())
            self.step = step
            for row in range(self.batch):
                if stop[row] and not self._stopped[row]:
                    self._stopped[row] = True
                    self._reason[row] = self._reason[row] if self._flagged[row] == step else "stop"
                    if self._end_alone:
                        self._end(row, step)
            if all(self._stopped):
                self.done = True
                for row in range(self.batch):
                    self._end(row, min(step, self._count[row]))
                for criterion in self._lengths:
                    criterion(
                        now[:, :-1], None
                    )  # reminds of the model's own maximum length, as it would have

    def sequences(self) -> Tensor:
        """int64 [B, L + steps], as `model.generate` returns it."""
        return self.ids[:, : self.prompt_length + self.step].clone()

    def _flag(self, row: int, first: int, tokens: Sequence[int]) -> None:
        """Find the first of the new tokens at which a criterion about this row alone says stop."""
        strings = self._string_steps(row, first, len(tokens))
        for step, token in enumerate(tokens, start=first + 1):
            if token in self._eos:
                self._reason[row] = "eos"
            elif step in strings:
                self._reason[row] = "stop"
            elif step >= self._max_new_tokens:
                self._reason[row] = "length"
            else:
                continue
            self._flagged[row] = step
            if self._end_alone:
                self._end(row, step)
            return

    def _string_steps(self, row: int, first: int, count: int) -> frozenset[int]:
        """Steps among the next `count` at which a stop string is complete."""
        steps = range(first + 1, first + count + 1)
        found: set[int] = set()
        first_end, last_end = self.prompt_length + first + 1, self.prompt_length + first + count
        for criterion in self._strings:
            # It looks at `reach` tokens from the end, and takes an id beyond its vocabulary for the start of
            # the text; so one call serves all steps.
            reach = criterion.maximum_token_len
            text = self.ids[row, max(0, first_end - reach) : last_end]
            text = pad(text, (max(0, reach - first_end), 0), value=_BEYOND)
            hits = criterion(text.unfold(0, reach, 1), None).tolist()
            found.update(step for step, hit in zip(steps, hits, strict=True) if hit)
        return frozenset(found)

    def _end(self, row: int, count: int) -> None:
        self._ended[row] = True
        if count < self._count[row]:
            self._count[row] = count
        self.ids[row, self.length(row) :] = self.filler

    def _collect(self, step: int) -> None:
        """Put the scores of one step side by side; a row that has ended has none and gets zeros."""
        for kept, rows in ((self.scores, self._row_scores), (self.logits, self._row_logits)):
            if kept is None:
                continue
            like = next(row[step - 1] for row in rows if len(row) >= step)
            blank = torch.zeros_like(like)
            kept.append(
                torch.stack(
                    [
                        row[step - 1] if step <= self._count[b] and len(row) >= step else blank
                        for b, row in enumerate(rows)
                    ]
                )
            )
