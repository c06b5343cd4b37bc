"""The law that drafts were drawn from, and the checks that all parts of a tree share."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, SupportsIndex

from torch import Tensor

from foretoken.ops import Draw

Law = Literal["point", "dense", "topk"]
"""What drafts were drawn from: nothing random, a row over the vocabulary, or k ids with probabilities."""

_DRAWS = ("deterministic", "iid", "without_replacement")


class LawRows:
    """Rows of one form of law, in blocks as they were given; a block given whole is never copied."""

    def __init__(self) -> None:
        self.form: str | None = None
        """The argument of ``ops.verify`` that the rows go to; None as long as there is none."""
        self.blocks: list[tuple[Tensor, ...]] = []
        """``[m, V]`` each, or ids and probabilities ``[m, k]``."""

    def __len__(self) -> int:
        return sum(len(block[0]) for block in self.blocks)

    @property
    def kind(self) -> Law:
        return "point" if self.form is None else "topk" if self.form == "draft_topk" else "dense"

    def add(self, form: str, block: tuple[Tensor, ...]) -> int:
        """Take in rows and return the number of the first."""
        if len({part.shape for part in block}) > 1:
            got = " and ".join(str(list(part.shape)) for part in block)
            raise ValueError(f"{form}: expected ids and probabilities of one shape, got {got}")
        common("law", [form] if self.form is None else [self.form, form])
        if self.blocks:
            check_alike(form, self.blocks[0], block)
        self.form = form
        self.blocks.append(block)
        return len(self) - len(block[0])


def stacked(laws: Sequence[LawRows]) -> tuple[Tensor, ...]:
    """Parts ``[B, M, V]`` of B laws, rows behind a law's own being 0."""
    if len(laws) == 1 and len(laws[0].blocks) == 1:
        return tuple(part.unsqueeze(0) for part in laws[0].blocks[0])
    example = next(law.blocks[0] for law in laws if law.blocks)
    most = max(map(len, laws))
    whole = tuple(part.new_zeros(len(laws), most, part.shape[-1]) for part in example)
    for b, law in enumerate(laws):
        first = 0
        for block in law.blocks:
            check_alike(law.form or "law", example, block)
            last = first + len(block[0])
            for to, part in zip(whole, block, strict=True):
                to[b, first:last] = part
            first = last
    return whole


def check_alike(form: str, example: tuple[Tensor, ...], block: tuple[Tensor, ...]) -> None:
    for want, part in zip(example, block, strict=True):
        if part.dtype != want.dtype or part.shape[-1] != want.shape[-1]:
            raise ValueError(
                f"{form}: expected rows of one kind, {want.dtype} [*, {want.shape[-1]}], "
                f"got {part.dtype} [*, {part.shape[-1]}]"
            )


def integer(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None


def integers(name: str, values: Iterable[SupportsIndex] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        dims(name, values, 1)
        values = values.tolist()
    return [integer(name, value) for value in values]


def dims(name: str, tensor: Tensor, rank: int) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor of {rank} dimensions, got {type(tensor).__name__}")
    if tensor.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got {list(tensor.shape)}")
    return tensor


def check_size(name: str, values: Sequence[Any], size: int, tokens: int) -> None:
    if len(values) != size:
        raise ValueError(f"{name}: expected {size} entries for {tokens} tokens, got {len(values)}")


def path_scores(
    scores: Sequence[Sequence[float]] | None, paths: Sequence[Sequence[int]]
) -> Sequence[Sequence[float | None]]:
    """A score for every token of every path."""
    if scores is None:
        return [[None] * len(path) for path in paths]
    if [len(row) for row in scores] != [len(path) for path in paths]:
        raise ValueError(
            f"scores: expected one per token of each path, {[len(path) for path in paths]} of them, "
            f"got {[len(row) for row in scores]}"
        )
    return scores


def checked_draw(draw: Draw) -> Draw:
    if isinstance(draw, tuple):
        known = len(draw) == 2 and draw[0] == "iid_paths" and isinstance(draw[1], int) and draw[1] > 0
    else:
        known = draw in _DRAWS
    if not known:
        raise ValueError(f"draw: expected one of {', '.join(_DRAWS)} or ('iid_paths', n), got {draw!r}")
    return draw


def only_one(**laws: Any) -> tuple[str | None, tuple[Tensor, ...]]:
    given = {form: law for form, law in laws.items() if law is not None}
    if len(given) > 1:
        raise ValueError(f"{next(reversed(given))}: expected None beside {next(iter(given))}, got both laws")
    for form, law in given.items():
        if form == "draft_topk" and not (isinstance(law, tuple) and len(law) == 2):
            raise TypeError(f"{form}: expected ids and probabilities, got {type(law).__name__}")
        return form, law if form == "draft_topk" else (law,)
    return None, ()


def common(name: str, values: Sequence[Any]) -> Any:
    """The one value there is, None if there is none."""
    for value in values:
        if value != values[0]:
            raise ValueError(f"{name}: expected one for all, got {values[0]!r} and {value!r}")
    return values[0] if values else None
