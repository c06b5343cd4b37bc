"""Rounds issued by the host under torch's stream sanitizer (``torch.cuda._sanitizer``), by test_cuda_streams.

It knows which streams have waited for which, and raises when a tensor that one has written is used by another
that has not. It sees torch's operations; here also those of foretoken, each told as one that writes all its
tensors, and replays of whole rounds as one that writes the state. What is captured does not run and is left
out; so is what a capture begins with, as torch then writes two numbers of its generator on whatever stream
captures. Enabled for good once it is imported, so this has to be a process of its own:

    python stream_sanitizer.py [defect]      # with the waits of captured forwards left out
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.cuda import _sanitizer

import foretoken as ft
from foretoken import _core
from foretoken.device import replay
from foretoken.hf import captured

RUNS = (
    ("model", "module", "parts"),
    ("model", "graph", "parts"),
    ("model", "graph", "whole rounds"),
    ("model drawn trees", "graph", "parts"),
    ("model drawn trees", "graph", "whole rounds"),
    ("ngram auto", "graph", "whole rounds"),
)
OPS = (
    "append", "commit", "compact", "draft_ngrams", "draft_topk", "finalize_tree", "last_logits", "sample",
    "tile_stats", "tree_attention", "tree_index", "verify", "write_step_inputs",
)  # fmt: skip


class Touches:
    """An operation of torch that does nothing, and is seen to write what it is given."""

    def __init__(self) -> None:
        self.library = torch.library.Library("foretoken_streams", "DEF")
        self.library.define("touch(Tensor(a!)[] tensors) -> ()")
        self.library.impl("touch", lambda tensors: None, "CompositeExplicitAutograd")
        self.count: dict[str, int] = {}

    def __call__(self, name: str, given: Any) -> None:
        tensors = [one for one in given if isinstance(one, torch.Tensor) and one.is_cuda and one.numel()]
        self.count[name] = self.count.get(name, 0) + 1
        if tensors:
            torch.ops.foretoken_streams.touch(tensors)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            self(name, (*given, *options.values()))
            return function(*given, **options)

        return call


def watch() -> Touches:
    """From now on foretoken's operations are seen, and what is being captured is not."""
    touches = Touches()
    for name in OPS:
        setattr(_core, name, touches.around(name, getattr(_core, name)))

    def replayed(graph: Any) -> torch.Tensor:
        state = graph._whole.rounds._state
        touches("replay", [graph._record, state.text, state.base, state.next_drafts])
        record: torch.Tensor = issue(graph)
        return record

    issue, replay.Replayed.__call__ = replay.Replayed.__call__, replayed  # type: ignore[method-assign]
    leave_captures_out()
    return touches


def leave_captures_out() -> None:
    handler: Any = _sanitizer.EventHandler
    seen, begin = handler._handle_kernel_launch, torch.cuda.CUDAGraph.capture_begin
    beginning: list[object] = []

    def launched(self: Any, *arguments: Any) -> Any:
        captures = beginning or torch.cuda.is_current_stream_capturing()
        return [] if captures else seen(self, *arguments)

    def begun(self: Any, *arguments: Any, **options: Any) -> None:
        beginning.append(self)
        try:
            begin(self, *arguments, **options)
        finally:
            beginning.clear()

    handler._handle_kernel_launch = launched
    torch.cuda.CUDAGraph.capture_begin = begun  # type: ignore[method-assign]


def leave_waits_out() -> None:
    @contextmanager
    def aside(self: Any) -> Iterator[None]:
        with torch.cuda.stream(captured._side_stream(self._device)):
            yield

    captured.CapturedForwards._aside = aside  # type: ignore[method-assign]


def described(error: Any) -> str:
    """Both sides of a race, with the last places of this repository on the way to them."""

    def side(access: Any) -> str:
        lines = [
            f"    {Path(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in access.stack_trace
            if "foretoken" in frame.filename or "tests" in frame.filename
        ]
        return "\n".join([f"  stream {access.stream:#x}: {access.operator} {access.aliases}", *lines[-7:]])

    return "\n".join(["data race", side(error.current_access), side(error.previous_access)])


def main() -> int:
    touches = watch()
    if "defect" in sys.argv:
        leave_waits_out()
    from test_cuda_replay import by_parts, stand, told, wanted_of

    _sanitizer.enable_cuda_sanitizer()
    wanted = wanted_of(2)
    for ask in wanted:
        ask.max_new_tokens = 10
    for kind, runner, way in RUNS:
        try:
            told(*stand(kind, runner, 2), wanted, by_parts if way == "parts" else ft.decode)
        except _sanitizer.CUDASanitizerErrors as found:
            print(f"{kind}, {runner}, {way}:", *map(described, found.errors))
            return 1
        print(f"{kind}, {runner}, {way}: clean", flush=True)
    seen = touches.count.keys()
    assert {"sample", "verify", "commit", "write_step_inputs", "replay"} <= seen, seen
    print("seen:", " ".join(f"{name}={count}" for name, count in sorted(touches.count.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
