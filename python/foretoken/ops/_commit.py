"""What a round changes, in the arrays of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import pad

from foretoken import _core
from foretoken.ops._verdict import Verdict

__all__ = ["RequestState", "RoundCounters", "commit", "record_width"]

IDLE = -1
SUMS = (
    "rounds",
    "drafts",
    "draft_tokens",
    "accepted_tokens",
    "emitted_tokens",
    "rollbacks",
    "moved_rows",
    "bad_draft_rows",
    "law_lost_rows",
    "bad_rows",
)


@dataclass(slots=True)
class RequestState:
    """S request slots with texts of up to L tokens, where the kernels are: on the device of the logits."""

    text: Tensor
    """int32 ``[S, L]``: prompt and output."""
    base: Tensor
    """int64 ``[S]``: tokens of the text; what the next round is keyed by."""
    next_drafts: Tensor
    """int32 ``[S]``: drafts that the next round may check, -1 for a slot in which nothing is decoded."""
    ends: Tensor
    """int32 ``[S]``: what ended it: 0 nothing yet, 1 an EOS id, 2 a stop id, 3 its length."""
    limits: Tensor
    """int64 ``[S]``: the text's length when all new tokens are there, at most L."""
    budgets: Tensor
    """int32 ``[S]``: the most drafts of a round."""
    eos_ids: Tensor
    """int32 ``[S, n]``, -1 is no id: what ends a text with reason 1."""
    stop_ids: Tensor
    """int32 ``[S, m]``, -1 is no id: with reason 2."""

    @classmethod
    def empty(
        cls,
        slots: int,
        length: int,
        *,
        num_eos: int = 0,
        num_stop: int = 0,
        device: torch.device | str = "cpu",
    ) -> RequestState:
        """Slots in which nothing is decoded."""

        def ints(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return cls(
            text=ints(0, slots, length),
            base=ints(1, slots, dtype=torch.int64),
            next_drafts=ints(IDLE, slots),
            ends=ints(0, slots),
            limits=ints(0, slots, dtype=torch.int64),
            budgets=ints(0, slots),
            eos_ids=ints(-1, slots, num_eos),
            stop_ids=ints(-1, slots, num_stop),
        )

    def seat(
        self,
        slot: int,
        prompt: Sequence[int] | Tensor,
        *,
        max_new_tokens: int,
        num_drafts: int = 0,
        eos_ids: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
    ) -> None:
        """Begin a request in a slot. On a device this waits for nothing that runs there. Tables of ids grow.

        Raises
        ------
        ValueError
            A longer text than there is room for.
        """
        length, room = len(prompt), self.text.shape[1]
        if length + max_new_tokens > room:
            raise ValueError(
                f"prompt and max_new_tokens: expected at most {room}, got {length + max_new_tokens}"
            )
        self.text[slot, :length] = upload(prompt, torch.int32, self.text.device)
        self.base[slot : slot + 1].fill_(length)
        self.limits[slot : slot + 1].fill_(length + max_new_tokens)
        self.budgets[slot : slot + 1].fill_(num_drafts)
        self.next_drafts[slot : slot + 1].fill_(max(min(num_drafts, max_new_tokens - 1), 0))
        self.ends[slot : slot + 1].fill_(0)
        self.eos_ids = _with_ids(self.eos_ids, slot, eos_ids)
        self.stop_ids = _with_ids(self.stop_ids, slot, stop_ids)


@dataclass(slots=True)
class RoundCounters:
    """Sums over the rounds of S slots, kept where the kernels are. They only grow: :func:`commit` adds to
    them, and whoever wants to begin anew writes zeros.
    """

    sums: Tensor
    """int64 ``[S, 10]``: rounds (verdicts that emitted something), those of them that checked drafts, drafts
    checked, drafts kept, tokens kept, rounds that dropped a draft, accepted nodes whose cache rows had to
    move, and rows whose status had ``BAD_DRAFT``, ``LAW_LOST``, ``BAD_ROW``.
    """
    accepted_per_pos: Tensor
    """int64 ``[S, D]``: rounds that kept the draft at depth i + 1."""
    rounds_by_drafts: Tensor
    """int64 ``[S, N + 1]``: rounds that checked so many drafts."""

    @classmethod
    def empty(
        cls, slots: int, depth: int, num_nodes: int | None = None, *, device: torch.device | str = "cpu"
    ) -> RoundCounters:
        """Zeros for rounds of up to ``num_nodes`` drafts (None: ``depth``), ``depth`` of them in line."""
        nodes = depth if num_nodes is None else num_nodes

        def zeros(columns: int) -> Tensor:
            return torch.zeros(slots, columns, dtype=torch.int64, device=device)

        return cls(zeros(len(SUMS)), zeros(depth), zeros(nodes + 1))


class Outbox(NamedTuple):
    """Memory of the host that `commit` writes a round's record to: one place after the other, in turn."""

    state: Tensor
    """int32 ``[2]`` on the device, zeros at first: records written, modulo 2^32; what the kernel counts."""
    memory: Tensor
    """int32 ``[places, n]``, pinned where there is a device, a power of two of places. To be read behind an
    event that follows the commit.
    """


def record_width(columns: int, logprobs: bool = False) -> int:
    """Columns of a record of rounds whose verdicts have ``columns`` tokens a row."""
    return _core.record_width(columns, logprobs)


def commit(
    verdict: Verdict,
    state: RequestState,
    *,
    num_drafts: Tensor,
    parents: Tensor | None = None,
    slots: Tensor | None = None,
    record: Tensor | None = None,
    counters: RoundCounters | None = None,
    outbox: Outbox | None = None,
) -> None:
    """Append what a round emitted to the texts, up to what ends them, and prepare the next round.

    An EOS id or stop id inside an accepted run, or the limit, ends the text there: the rest of the run is
    dropped. Of a row whose verdict is empty (a padded row) or whose request has ended nothing is touched.

    Parameters
    ----------
    verdict
        Of B rows of up to C tokens.
    state
        Written: ``text``, ``base``, ``ends`` and ``next_drafts``, which becomes -1 where the text ended and
        else what the budget and the limit leave.
    num_drafts
        int32 ``[B]``: drafts that the round checked, for the record.
    parents
        int32 or int64 ``[B, N]``: of the trees that the round checked; None: chains. The accepted path is
        the verdict's.
    slots
        int32 ``[B]``, no slot twice: the slot of each row; None: row b is slot b.
    record
        int32 ``[B, record_width(C)]`` to write, a line a row, for a host that reads it later: drafts checked,
        tokens emitted (0 for a row that was not touched), accepted, kept, status bits, what ended it, whether
        the last accepted draft had no children, accepted nodes whose cache rows have to move, then the C
        tokens, -1 behind the emitted ones; and, when the verdict has them, the bits of C logprobs.
    counters
        To add the round to; None: nothing is counted.
    outbox
        Where the record is written as well, for a host that does not copy it.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape or device, named in the message. A slot or base that
        only the device can see to be outside the state costs its row ``Status.BAD_ROW`` in the record.

    Examples
    --------
    >>> state = RequestState.empty(1, 8, num_eos=1)
    >>> state.seat(0, [5, 6], max_new_tokens=6, num_drafts=3, eos_ids=[2])
    >>> verdict = Verdict.empty(1, 3)
    >>> verdict.tokens[:] = torch.tensor([[7, 2, 9, -1]])
    >>> verdict.num_emitted[:], verdict.num_accepted[:], verdict.status[:] = 3, 2, 0
    >>> commit(verdict, state, num_drafts=torch.tensor([3], dtype=torch.int32))
    >>> state.text[0, :4].tolist(), int(state.base), int(state.ends), int(state.next_drafts)
    ([5, 6, 7, 2], 4, 1, -1)
    """
    if is_dynamo_compiling() and outbox is None:
        from foretoken.ops import _library

        _library.commit(verdict, state, num_drafts, parents, slots, record, counters)
        return
    _core.commit(
        verdict.tokens,
        verdict.num_emitted,
        verdict.num_accepted,
        verdict.status,
        verdict.logprobs,
        verdict.path,
        num_drafts,
        parents,
        slots,
        state.text,
        state.base,
        state.next_drafts,
        state.ends,
        state.limits,
        state.budgets,
        state.eos_ids,
        state.stop_ids,
        record,
        *((None, None, None) if counters is None else counter_tensors(counters)),
        *(() if outbox is None else (outbox.state, outbox.memory.data_ptr(), *outbox.memory.shape)),
    )


def counter_tensors(counters: RoundCounters) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernel takes them."""
    return counters.sums, counters.accepted_per_pos, counters.rounds_by_drafts


def upload(numbers: Sequence[int] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy on the device, by way of pinned memory: copying from there waits for nothing."""
    here = torch.as_tensor(numbers, dtype=dtype)
    if device.type == "cpu":
        return here.clone()
    return here.pin_memory().to(device, non_blocking=True)


def _with_ids(table: Tensor, slot: int, ids: Sequence[int]) -> Tensor:
    missing = len(ids) - table.shape[1]
    if missing > 0:
        table = pad(table, (0, missing), value=-1)
    if table.shape[1] > 0:
        table[slot] = upload([*ids, *[-1] * (table.shape[1] - len(ids))], table.dtype, table.device)
    return table
