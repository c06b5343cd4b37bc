"""What a verification reports, and how far a lossy one may go."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from foretoken import _core

__all__ = ["Status", "Tolerance", "Verdict"]


class Status(enum.IntFlag):
    """What ``status`` says of a row; its neighbours are never touched by it."""

    OK = 0
    BAD_DRAFT = 1
    """A draft's id, parent, count, law row or declared mass was unusable, or the tree's shape unfit for the
    rule: the row was decoded with no drafts.
    """
    LAW_LOST = 2
    """The closing row held NaN, an infinity or no mass at all: it was closed by the lowest id of
    its largest.
    """
    BAD_ROW = 4
    """A slot, rule, history, row offset, page or cache slot lies outside its table: nothing of the row was
    read, emitted, written or moved.
    """


_COUNTS = ("num_emitted", "num_accepted", "status")
_PACKED = frozenset(("tokens", "next_token", "next_lengths", "num_emitted", "num_accepted", "status", "path"))


class _Packed:
    """Fields that lie in one buffer, each of which becomes a tensor when it is first looked at: seven tensors
    cost more than everything else that issuing a verification does.
    """

    __slots__ = ("_buffer", "_sizes")

    _buffer: Tensor
    _sizes: tuple[int, int]

    @classmethod
    def packed(cls, buffer: Tensor, batch: int, nodes: int) -> Self:
        """Of ``batch`` chains of ``nodes`` drafts; ``_core.packed_verdict`` says how large a buffer is."""
        verdict = object.__new__(cls)
        verdict._buffer = buffer
        verdict._sizes = (batch, nodes)
        return verdict

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:  # called for what has not been set
            if name in _PACKED:
                value = self._unpack(name)
            elif name in self.__slots__ and name not in _Packed.__slots__:
                value = None  # what nobody asked for
            else:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            setattr(self, name, value)
            return value

    def _unpack(self, name: str) -> Tensor:
        """As the native VerdictPlaces lays them out: lengths, ids, then counts and the path."""
        buffer, (batch, nodes) = self._buffer, self._sizes
        wide = buffer.element_size() // 4
        tokens = 2 * batch // wide  # in front of it, in elements of ids
        next_token = tokens + batch * (nodes + 1)
        if name == "tokens":
            return buffer.as_strided((batch, nodes + 1), (nodes + 1, 1), tokens)
        if name == "next_token":
            return buffer.as_strided((batch,), (1,), next_token)
        if name == "next_lengths":
            return (buffer if wide == 2 else buffer.view(torch.int64)).as_strided((batch,), (1,), 0)
        counts = buffer if wide == 1 else buffer.view(torch.int32)
        first = wide * (next_token + batch)
        if name == "path":
            return counts.as_strided((batch, nodes), (max(nodes, 1), 1), first + 3 * batch)
        return counts.as_strided((batch,), (1,), first + batch * _COUNTS.index(name))


@dataclass(slots=True)
class Verdict(_Packed):
    """What a round of verification decided, for B rows of N drafts, paths of at most D nodes (D = N for
    chains).
    """

    tokens: Tensor
    """``[B, D + 1]``, dtype of the drafts: accepted drafts, the closing token, then -1."""
    num_emitted: Tensor
    """int32 ``[B]``: accepted + 1; 0 for a padded row."""
    num_accepted: Tensor
    """int32 ``[B]``."""
    path: Tensor
    """int32 ``[B, D]``: numbers of the accepted nodes, then -1."""
    next_token: Tensor
    """``[B]``, dtype of the drafts: the closing token, root of the next round; -1 for a padded row."""
    next_lengths: Tensor
    """int64 ``[B]``: valid K/V rows after the round, ``base - 1 + num_emitted``."""
    status: Tensor
    """int32 ``[B]``, :class:`Status` bits."""
    path_rows: Tensor | None = None
    """int64 ``[B, D + 1]`` or None: row of the flattened target logits that each emitted token came
    from (its hidden state is there too), then -1.
    """
    logprobs: Tensor | None = None
    """float32 ``[B, D + 1]`` or None: of each emitted token, under the law it was emitted from."""
    top_tokens: Tensor | None = None
    """``[B, D + 1, n]`` or None, dtype of the drafts: the likeliest tokens of that law, then -1."""
    top_logprobs: Tensor | None = None
    """float32 ``[B, D + 1, n]`` or None: theirs."""
    raw_logprobs: Tensor | None = None
    """As ``logprobs``, under the softmax of the logits as they were passed in."""
    raw_top_tokens: Tensor | None = None
    """As ``top_tokens``, of that softmax."""
    raw_top_logprobs: Tensor | None = None
    """As ``top_logprobs``, of that softmax."""
    workspace: Tensor | None = field(default=None, repr=False, compare=False)
    """uint8 or None: scratch of the kernels on CUDA, made at the first call that is given these buffers and
    needs it. Nothing else may use it while a call is under way.
    """

    @classmethod
    def empty(
        cls,
        batch: int,
        depth: int,
        *,
        dtype: torch.dtype = torch.int64,
        device: torch.device | str = "cpu",
        logprobs: bool = False,
        raw_logprobs: bool = False,
        num_top: int = 0,
        path_rows: bool = False,
    ) -> Verdict:
        """Buffers for ``batch`` rows whose paths have at most ``depth`` drafts, to be passed as
        ``out=`` round after round.

        Parameters
        ----------
        batch, depth
            B and D.
        dtype, device
            Of the drafts.
        logprobs, raw_logprobs
            Room for log-probabilities, under the processed law and under the plain softmax.
        num_top
            How many of the likeliest tokens to report beside each kind of log-probability asked for.
        path_rows
            Room for ``path_rows``.
        """
        columns = depth + 1

        def ids(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        def floats(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=device)

        def counts(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.int32, device=device)

        def longs(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.int64, device=device)

        top, raw_top = logprobs and num_top > 0, raw_logprobs and num_top > 0
        return cls(
            tokens=ids(batch, columns),
            num_emitted=counts(batch),
            num_accepted=counts(batch),
            path=counts(batch, depth),
            next_token=ids(batch),
            next_lengths=longs(batch),
            status=counts(batch),
            path_rows=longs(batch, columns) if path_rows else None,
            logprobs=floats(batch, columns) if logprobs else None,
            top_tokens=ids(batch, columns, num_top) if top else None,
            top_logprobs=floats(batch, columns, num_top) if top else None,
            raw_logprobs=floats(batch, columns) if raw_logprobs else None,
            raw_top_tokens=ids(batch, columns, num_top) if raw_top else None,
            raw_top_logprobs=floats(batch, columns, num_top) if raw_top else None,
        )


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far the lossy rules may go; a lossless rule reads none of it.

    Parameters
    ----------
    typical_epsilon, typical_delta
        ``lossy_typical`` keeps a draft whose target probability exceeds
        ``min(epsilon, delta * exp(-entropy))``.
    threshold_single, threshold_sum
        ``lossy_threshold`` keeps a draft of probability ``threshold_single``, or by a coin against the summed
        probability of the siblings so far over ``threshold_sum``; both at 1 it is lossless.
    relaxed_top_k, relaxed_delta
        ``lossy_relaxed`` keeps a draft among the ``top_k`` likeliest and within ``delta`` nats of the first.
    window_entropy, window_delta
        ``lossy_entropy_window`` keeps a draft within ``delta`` nats of the likeliest where the
        target's entropy is at most ``window_entropy`` nats, and is lossless elsewhere.
    rates
        ``lossy_synthetic`` keeps a draft of depth d at rate ``rates[d - 1]``, none behind the last.

    Raises
    ------
    ValueError
        A number is out of its range; the message names it.

    Examples
    --------
    >>> Tolerance(rates=(0.8, 0.8)).rates
    (0.8, 0.8)
    """

    typical_epsilon: float = 0.09
    typical_delta: float = 0.3
    threshold_single: float = 1.0
    threshold_sum: float = 1.0
    relaxed_top_k: int = 10
    relaxed_delta: float = 0.6
    window_entropy: float = 1.0
    window_delta: float = 0.6
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self.prepare()

    def prepare(self) -> _core.Tolerance:
        """The native form that the kernels read."""
        return _core.Tolerance(
            self.typical_epsilon,
            self.typical_delta,
            self.threshold_single,
            self.threshold_sum,
            self.relaxed_top_k,
            self.relaxed_delta,
            self.window_entropy,
            self.window_delta,
            list(self.rates),
        )
