"""Logits processors: which become `Sampling`, which are called for every node, which forbid drafting.

transformers calls a list of processors once per emitted token, on the rows as they stand. A round looks
several tokens ahead, so each processor is one of three kinds:

- **translated**: the end of the list, as far as it is temperature, top-k, top-p, min-p in this order with
  default edges, becomes `Sampling` and runs in the native sampler, for target and drafter alike;
- **pure**: a function of (input_ids, scores). It is called for every node with the ids Hugging Face would
  hold there: the row with its own left padding, what was generated, and the drafted path to the node;
- anything else may keep a memory of its calls, so it gets exactly the calls transformers would make: no
  drafting.

Known types are judged by exact type (a subclass may do anything). A processor of your own counts as pure
once `pure(...)` has marked it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from foretoken.sampling import Sampling

_P = TypeVar("_P")

# Functions of (input_ids, scores), row by row. The watermark of Kirchenbauer et al. reseeds itself from
# the ids at every call; SynthID's keeps a history and is therefore not here.
_PURE = frozenset(
    {
        hf.MinLengthLogitsProcessor,
        hf.MinNewTokensLengthLogitsProcessor,
        hf.TemperatureLogitsWarper,
        hf.RepetitionPenaltyLogitsProcessor,
        hf.EncoderRepetitionPenaltyLogitsProcessor,
        hf.TopPLogitsWarper,
        hf.TopKLogitsWarper,
        hf.TopHLogitsWarper,
        hf.MinPLogitsWarper,
        hf.TypicalLogitsWarper,
        hf.EpsilonLogitsWarper,
        hf.EtaLogitsWarper,
        hf.NoRepeatNGramLogitsProcessor,
        hf.EncoderNoRepeatNGramLogitsProcessor,
        hf.SequenceBiasLogitsProcessor,
        hf.NoBadWordsLogitsProcessor,
        hf.PrefixConstrainedLogitsProcessor,
        hf.ForcedBOSTokenLogitsProcessor,
        hf.ForcedEOSTokenLogitsProcessor,
        hf.InfNanRemoveLogitsProcessor,
        hf.ExponentialDecayLengthPenalty,
        hf.LogitNormalization,
        hf.SuppressTokensAtBeginLogitsProcessor,
        hf.SuppressTokensLogitsProcessor,
        hf.WatermarkLogitsProcessor,
    }
)
# The sampling part of a generation config, which `sampling=` replaces.
_WARPERS = frozenset(
    {
        hf.TemperatureLogitsWarper,
        hf.TopHLogitsWarper,
        hf.TopKLogitsWarper,
        hf.TopPLogitsWarper,
        hf.MinPLogitsWarper,
        hf.TypicalLogitsWarper,
        hf.EpsilonLogitsWarper,
        hf.EtaLogitsWarper,
    }
)
_MARK = "foretoken_pure"


def pure(processor: _P) -> _P:
    """Declare that `processor` is a function of ``(input_ids, scores)`` alone, and return it.

    It may then be called for every drafted token: several times for one position, for rows that are later
    dropped, and with rows of the batch that are not asked for. A processor that remembers its calls must
    not be marked.

    Examples
    --------
    >>> from foretoken.hf import pure
    >>> processors = LogitsProcessorList([pure(MyBias())])                     # doctest: +SKIP
    >>> foretoken.generate(model, ids, drafter=draft, logits_processor=processors)  # doctest: +SKIP
    """
    setattr(processor, _MARK, True)
    return processor


def is_pure(processor: Any) -> bool:
    return type(processor) in _PURE or bool(getattr(processor, _MARK, False))


@dataclass(frozen=True, slots=True)
class Law:
    """A list of processors, divided: `nodes` are called in Python, `tail` is what `sampling` does
    natively."""

    nodes: tuple[Any, ...]
    tail: tuple[Any, ...]
    sampling: dict[str, float]
    may_draft: bool
    stateful: tuple[Any, ...]


def divide(processors: Sequence[Any], *, do_sample: bool) -> Law:
    """Split `processors` for one call. Greedy rows keep the whole list: only its arg max counts."""
    tail: list[Any] = []
    options: dict[str, float] = {"temperature": 1.0 if do_sample else 0.0}
    if do_sample:
        rest = list(processors)
        if rest and type(rest[-1]) is hf.LogitNormalization:
            tail.append(rest.pop())  # subtracts one number from the whole row: the law stays
        last = len(_TRANSLATIONS)
        while rest:
            translated = _translate(rest[-1])
            if translated is None or translated[0] >= last:
                break
            last, name, value = translated
            options[name] = min(options[name], value) if name == "top_k" and name in options else value
            tail.append(rest.pop())
    else:
        rest = list(processors)
    stateful = tuple(p for p in rest if not is_pure(p))
    return Law(tuple(rest), tuple(reversed(tail)), options, not stateful, stateful)


def without_warpers(processors: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
    """Drop the warpers that come from a generation config, keeping those the caller passed in."""
    return [p for p in processors if type(p) not in _WARPERS or any(p is k for k in kept)]


def _translate(processor: Any) -> tuple[int, str, float] | None:
    """Rank in `Sampling`'s order, field and value; None if `Sampling` does not do exactly this."""
    for rank, (kind, read) in enumerate(_TRANSLATIONS):
        if type(processor) is kind:
            translated = read(processor)
            return None if translated is None else (rank, *translated)
    return None


def _plain(processor: Any) -> bool:
    """Whether a filter removes what it removes, and needs to keep no more than one token."""
    return bool(processor.filter_value == -math.inf and processor.min_tokens_to_keep == 1)


def _top_k(processor: Any) -> tuple[str, float] | None:
    # min_tokens_to_keep is in top_k already. Ties with the k-th are kept on both sides.
    return ("top_k", processor.top_k) if processor.filter_value == -math.inf else None


def _top_p(processor: Any) -> tuple[str, float] | None:
    # Of tokens tied at the threshold transformers drops some, whichever its sort puts first; Sampling
    # keeps all. top_p = 0 leaves the most likely token.
    if not _plain(processor):
        return None
    return ("top_p", processor.top_p) if processor.top_p > 0 else ("top_k", 1)


def _min_p(processor: Any) -> tuple[str, float] | None:
    # min_p = 1 leaves the most likely token and what is tied with it, as top_k = 1 does.
    if not _plain(processor):
        return None
    return ("min_p", float(processor.min_p)) if processor.min_p < 1 else ("top_k", 1)


_TRANSLATIONS: tuple[tuple[type, Callable[[Any], tuple[str, float] | None]], ...] = (
    (hf.TemperatureLogitsWarper, lambda p: ("temperature", p.temperature)),
    (hf.TopKLogitsWarper, _top_k),
    (hf.TopPLogitsWarper, _top_p),
    (hf.MinPLogitsWarper, _min_p),
)


def warpers_of(sampling: Sampling, row: int) -> list[Any]:
    """The warpers that say for one row what `sampling` says, to fill `scores` of the output."""

    def value(name: str) -> Any:
        field = getattr(sampling, name)
        return field if isinstance(field, (int, float)) else field[row]

    warpers: list[Any] = []
    temperature, top_k, top_p, min_p = (value(n) for n in ("temperature", "top_k", "top_p", "min_p"))
    if temperature == 0:
        return warpers
    if temperature != 1:
        warpers.append(hf.TemperatureLogitsWarper(float(temperature)))
    if top_k > 0:
        warpers.append(hf.TopKLogitsWarper(int(top_k)))
    if top_p < 1:
        warpers.append(hf.TopPLogitsWarper(float(top_p)))
    if min_p > 0:
        warpers.append(hf.MinPLogitsWarper(float(min_p)))
    return warpers


class NodeProcessors:
    """Calls processors on the nodes of a step.

    Parameters
    ----------
    processors
        `Law.nodes`.
    ids
        int64 [B, W], every row as Hugging Face holds it (left padding, prompt, generated), `W` long enough
        for the drafted tokens behind it; shared with the owner, who appends what is committed.
    filler
        Token that stands in `ids` where a row has ended.
    """

    def __init__(self, processors: Sequence[Any], ids: Tensor, filler: int) -> None:
        self._processors = tuple(processors)
        for processor in self._processors:
            _check_signature(processor)
        self._ids = ids
        self._filler = filler
        self._batch = ids.shape[0]
        # Types whose rows do not know their number in the batch can be asked for some rows only.
        self._whole_batch = not all(type(p) in _PURE for p in self._processors)
        self._narrowed: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._processors)

    def __call__(
        self,
        logits: Tensor,
        tokens: Tensor,
        num_tokens: Sequence[int],
        rows: Sequence[int],
        lengths: Sequence[int],
        parents: Tensor | None = None,
    ) -> Tensor:
        """Process the logits of one step.

        Parameters
        ----------
        logits
            [b, T, V]; row i belongs to row `rows[i]` of the batch.
        tokens
            int64 [b, T]: the last committed token and the drafted ones, `num_tokens[i]` of them in use.
        lengths
            Tokens row `rows[i]` has in `ids`, the last committed one included. `rows` ascends.
        parents
            int [b, T - 1] of trees: the parent of node i + 1; None: chains.

        Returns
        -------
        Tensor
            float32 [b, T, V]; nodes not in use as they came.
        """
        out = logits.to(torch.float32, copy=True)
        # Nodes that are asked for together: texts of one length, of each row one, whose path stands in ids.
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        paths: dict[tuple[int, int], Tensor] = {}
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            used = num_tokens[i]
            if parents is None:
                self._ids[row, length : length + used - 1] = tokens[i, 1:used]
                for node in range(used):
                    groups.setdefault((length + node, 0), []).append((i, node))
                continue
            for node, path in enumerate(_paths(parents[i].tolist()[: used - 1])):
                alike = sum(len(paths[i, other]) == len(path) for other in range(node))
                paths[i, node] = tokens[i, path]
                groups.setdefault((length + len(path), alike), []).append((i, node))
        for (length, _), members in groups.items():
            for i, node in members if parents is not None else ():
                self._ids[rows[i], lengths[i] : length] = paths[i, node]
            at = tuple(torch.tensor(index, device=out.device) for index in zip(*members, strict=True))
            group = [rows[i] for i, _ in members]
            scores = out[at].to(self._ids.device)
            out[at] = self._apply(group, length, scores).to(out.device, torch.float32)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            self._ids[row, length : length + num_tokens[i] - 1] = self._filler
        return out

    def write(self, row: int, start: int, tokens: Tensor) -> None:
        """Put drafted tokens into `ids`, until the next call for this row takes them out again."""
        self._ids[row, start : start + len(tokens)] = tokens

    def _apply(self, rows: list[int], length: int, scores: Tensor) -> Tensor:
        if self._whole_batch:
            # Rows that are not asked for stand as they were at this length, or filled up if they never got
            # there. A copy of the ids, because a processor may keep them.
            whole = scores.new_zeros((self._batch, scores.shape[1]))
            whole[rows] = scores
            return self._run(self._processors, self._ids[:, :length].clone(), whole)[rows]
        key = tuple(rows)
        if key not in self._narrowed:
            self._narrowed[key] = tuple(_for_rows(p, rows, self._batch) for p in self._processors)
        ids = self._ids[:, :length] if len(rows) == self._batch else self._ids[rows, :length]
        return self._run(self._narrowed[key], ids, scores)

    @staticmethod
    def _run(processors: Sequence[Any], ids: Tensor, scores: Tensor) -> Tensor:
        for processor in processors:
            scores = processor(ids, scores)
        return scores


def _paths(parents: Sequence[int]) -> list[list[int]]:
    """Nodes on the way from the root to each node, the root not among them."""
    found: list[list[int]] = [[]]
    for node, parent in enumerate(parents, 1):
        found.append([*found[parent], node])
    return found


def _check_signature(processor: Any) -> None:
    """Refuse what transformers' own list refuses, before any forward."""
    names = list(inspect.signature(processor.__call__).parameters)
    if len(names) > 2:
        raise ValueError(
            f"logits_processor: {type(processor).__name__} takes {', '.join(names)}, "
            "but gets input_ids and scores only"
        )


def _for_rows(processor: Any, rows: list[int], batch: int) -> Any:
    """A known processor as it would have been made for `rows` alone."""
    narrowed: Any = copy.copy(processor)
    if type(processor) is hf.RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        if isinstance(ignored, Tensor):
            narrowed.prompt_ignore_length = ignored[rows]
    elif type(processor) is hf.PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        narrowed._prefix_allowed_tokens_fn = lambda i, ids: allowed(rows[i], ids)
    elif type(processor) is hf.EncoderRepetitionPenaltyLogitsProcessor:
        encoded = processor.encoder_input_ids
        repeats = batch // encoded.shape[0]
        narrowed.encoder_input_ids = encoded[[row // repeats for row in rows]]
    elif type(processor) is hf.EncoderNoRepeatNGramLogitsProcessor:
        repeats = batch // processor.batch_size
        narrowed.generated_ngrams = [processor.generated_ngrams[row // repeats] for row in rows]
        narrowed.batch_size = len(rows)
    else:
        return processor
    return narrowed
