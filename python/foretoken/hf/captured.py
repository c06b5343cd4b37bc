"""Forwards as CUDA graphs: one for each shape of a step, replayed over buffers that stay where they are."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from foretoken.device import is_unrolled
from foretoken.step import Step, StepTree

RunnerKind = Literal["auto", "module", "graph", "compiled"]
KINDS: tuple[str, ...] = get_args(RunnerKind)

# A step of a few tokens costs what its weights cost to read, so up to so many it may be filled up with
# rows that nobody looks at; beyond, at most as many again.
FREE_TOKENS = 16
# Chunks as long as this are prefill, in which launches do not matter.
MOST_COLUMNS = 256
# Where torch's attention reads up to a bound, the smallest bound that is captured.
LEAST_REACH = 256


class ShapeKey(NamedTuple):
    """What a graph is captured for; everything else of a step is in its buffers."""

    rows: int
    columns: int
    reach: int | None
    """Cache rows that torch's attention reads; None: attention goes by the lengths on the device."""
    slot_range: tuple[int, int] | None
    tree_words: int
    rooted: bool
    """Nodes of a tree hang on nothing but nodes of this step."""


def check_kind(kind: object, name: str = "runner") -> None:
    """Refuse what is no kind of runner.

    Raises
    ------
    ValueError
        Naming the argument.
    """
    if kind not in KINDS:
        wanted = ", ".join(f'"{known}"' for known in KINDS)
        raise ValueError(f"{name}: expected one of {wanted}, got {kind!r}")


def bucket_rows(rows: int, columns: int, max_batch: int) -> int:
    """Rows of the graph that serves a step of so many rows and columns: a power of two, or all there are."""
    bucket = 1
    while bucket < rows or 2 * bucket * columns <= FREE_TOKENS:
        bucket *= 2
    return min(bucket, max_batch)


def bucket_columns(columns: int, widest: int) -> int:
    """Columns of the graph: those of the widest step that was announced, where a round drafts fewer."""
    return widest if 1 < columns < widest and widest <= FREE_TOKENS else columns


def bucket_reach(bound: int, max_length: int) -> int:
    """Cache rows that are read where the host only knows a bound."""
    reach = LEAST_REACH
    while reach < bound:
        reach *= 2
    return min(reach, max_length)


@dataclass(slots=True, eq=False)
class _Shape:
    """The buffers of one shape, and its graph from the second step on."""

    step: Step
    graph: Any = None
    logits: Tensor | None = None
    filled: int = 0
    views: dict[torch.Size, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)

    def fill(self, step: Step) -> None:
        """Write a step's tensors into the buffers; rows that are left over count nothing."""
        mine, size = self.step, step.tokens.shape
        rows, columns = size
        views = self.views.get(size)
        if views is None:
            views = self.views[size] = (
                [mine.tokens[:rows, :columns], mine.positions[:rows, :columns], mine.lengths[:rows]],
                [mine.num_tokens[:rows], mine.slots[:rows]],
            )
        torch._foreach_copy_(views[0], [step.tokens, step.positions, step.lengths])
        torch._foreach_copy_(views[1], [step.num_tokens, step.slots])
        if rows < self.filled:
            mine.num_tokens[rows : self.filled].zero_()
        self.filled = rows
        if mine.tree is not None and step.tree is not None:
            mine.tree.ancestors[:rows].copy_(step.tree.ancestors)
            if mine.tree.visible is not mine.lengths:
                mine.tree.visible[:rows].copy_(step.tree.visible)


class CapturedForwards:
    """Runs steps whose lengths are on the device, each shape as a graph.

    The first step of a shape runs as it is, which also makes what is made once; the second is captured.
    Logits stay valid until the next step.

    Parameters
    ----------
    forward
        Runs a step; what it launches becomes the graph.
    bounded
        Whether that depends on ``max_length_after``: attention that does not go by lengths on the device.
    """

    def __init__(
        self,
        forward: Callable[[Step], Tensor],
        *,
        max_batch: int,
        max_length: int,
        bounded: bool,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._max_batch, self._max_length = max_batch, max_length
        self._bounded = bounded
        self._device = device
        self._shapes: dict[ShapeKey, _Shape] = {}
        self._pool: Any = None
        self.widest = 1
        self.replays = 0
        self.why_not: str | None = None

    @property
    def graphs(self) -> int:
        """Shapes that are captured."""
        return sum(shape.graph is not None for shape in self._shapes.values())

    @property
    def repeatable(self) -> bool:
        """Whether steps of any lengths, padded rows among them, may become part of other graphs."""
        return self.why_not is None and not self._bounded

    def takes(self, step: Step) -> bool:
        """Whether a step may be replayed: decode steps outside other captures."""
        return (
            self.why_not is None
            and step.kind == "decode"
            and step.tokens.shape[1] <= MOST_COLUMNS
            and not is_unrolled()
            and not torch.cuda.is_current_stream_capturing()
        )

    def key(self, step: Step) -> ShapeKey:
        """The shape that serves a step."""
        rows, columns = step.tokens.shape
        tree = step.tree
        words = 0 if tree is None else tree.ancestors.shape[2]
        rooted = tree is None or tree.visible is step.lengths
        if self._bounded or not rooted:
            reach = bucket_reach(step.max_length_after, self._max_length)
            return ShapeKey(rows, columns, reach, step.slot_range, words, rooted)
        if tree is None:
            columns = bucket_columns(columns, self.widest)
        return ShapeKey(bucket_rows(rows, columns, self._max_batch), columns, None, None, words, rooted)

    def __call__(self, step: Step) -> Tensor:
        """Logits ``[B, T, V]``, in memory that the next step writes."""
        key = self.key(step)
        shape = self._shapes.get(key)
        known = shape is not None
        if shape is None:
            shape = self._shapes[key] = _Shape(self._buffers(key))
        shape.fill(step)
        if shape.graph is None and known:
            self._capture(shape)
        rows, columns = step.tokens.shape
        if shape.graph is None:
            return self._run(shape)[:rows, :columns]
        shape.graph.replay()
        self.replays += 1
        logits = shape.logits
        if logits is None:
            raise RuntimeError("a captured forward has no logits")
        return logits[:rows, :columns]

    def _buffers(self, key: ShapeKey) -> Step:
        rows, columns = key.rows, key.columns

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self._device)

        with torch.inference_mode(False):
            lengths, tree = zeros(rows), None
            if key.tree_words:
                tree = StepTree(lengths if key.rooted else zeros(rows), zeros(rows, columns, key.tree_words))
            return Step(
                "decode",
                zeros(rows, columns),
                zeros(rows, columns),
                zeros(rows, dtype=torch.int32),
                lengths,
                zeros(rows, dtype=torch.int32),
                (),
                self._max_length if key.reach is None else key.reach,
                False,
                key.slot_range,
                True,
                tree,
            )

    def _run(self, shape: _Shape) -> Tensor:
        """As it is, on the stream that captures: what a stream keeps is made outside of graphs."""
        here = torch.cuda.current_stream(self._device)
        with self._aside():
            logits = self._forward(shape.step)
        logits.record_stream(here)
        return logits

    def _capture(self, shape: _Shape) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # what it ends may call what no capture survives
        try:
            with self._aside():
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    logits = self._forward(shape.step)
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        except RuntimeError as error:
            self.why_not = f"its forward cannot be captured: {str(error).splitlines()[0]}"
            return
        finally:
            if collects:
                gc.enable()
        shape.graph, shape.logits = graph, logits

    @contextmanager
    def _aside(self) -> Iterator[None]:
        side, here = _side_stream(self._device), torch.cuda.current_stream(self._device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            yield
        here.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> Any:
    make: Any = torch.cuda.Stream
    return make(device)
