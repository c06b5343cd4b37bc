"""Rounds issued by the host under torch's stream sanitizer (``torch.cuda._sanitizer``), by test_cuda_streams.

It knows which streams have waited for which, and raises when a tensor that one has written is used by another
that has not. It sees torch's operations; here also those of foretoken, each told as one that writes all its
tensors, and replays of whole rounds as one that writes the state. What is captured does not run and is left
out. Enabled for good once it is imported, so this has to be a process of its own:

    python stream_sanitizer.py [defect]      # with the waits of captured forwards left out
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.cuda import _sanitizer

import foretoken as ft
from foretoken import _core
from foretoken.device import replay
from foretoken.hf import captured

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
    handler: Any = _sanitizer.EventHandler
    seen = handler._handle_kernel_launch

    def launched(self: Any, *arguments: Any) -> Any:
        return [] if torch.cuda.is_current_stream_capturing() else seen(self, *arguments)

    handler._handle_kernel_launch = launched
    return touches


def leave_waits_out() -> None:
    @contextmanager
    def aside(self: Any) -> Iterator[None]:
        with torch.cuda.stream(captured._side_stream(self._device)):
            yield

    captured.CapturedForwards._aside = aside  # type: ignore[method-assign]


def main() -> None:
    touches = watch()
    if "defect" in sys.argv:
        leave_waits_out()
    from test_cuda_replay import KINDS, by_parts, stand, told, wanted_of

    _sanitizer.enable_cuda_sanitizer()
    wanted = wanted_of(3)
    for ask in wanted:
        ask.max_new_tokens = 14
    for kind in KINDS:
        for runner, run in (("module", by_parts), ("graph", by_parts), ("graph", ft.decode)):
            told(*stand(kind, runner, 2), wanted, run)
            print(f"{kind}, {runner}, {run.__name__}: clean")
    assert {"sample", "verify", "commit", "write_step_inputs", "replay"} <= touches.count.keys(), (
        touches.count
    )
    print("seen:", " ".join(f"{name}={count}" for name, count in sorted(touches.count.items())))


if __name__ == "__main__":
    main()
