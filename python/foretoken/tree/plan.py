"""How large the trees of a session may grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foretoken.ops import MAX_CHILDREN, MAX_DRAFTS

Trees = Literal["auto"]
"""Trees where they win."""
TreeDraw = Literal["deterministic", "iid", "without_replacement"]
_DRAWS = ("deterministic", "iid", "without_replacement")


@dataclass(frozen=True, slots=True)
class TreePlan:
    """Drafts of a round as a tree: a node budget, and its shape.

    Parameters
    ----------
    nodes
        The most drafts of a round.
    branches
        The most children of a node, 1 to 16.
    depth
        The most drafts one behind the other.
    draw
        How a draft model comes to the nodes. ``"deterministic"``: the likeliest are chosen. ``"iid"``,
        ``"without_replacement"``: they are drawn, siblings with and without their elders among what may come.
        n-grams are always chosen.

    Raises
    ------
    TypeError, ValueError
        A number that is none, or out of its range, named in the message.

    Examples
    --------
    >>> TreePlan(nodes=8, branches=2)
    TreePlan(nodes=8, branches=2, depth=5, draw='deterministic')
    """

    nodes: int = 16
    branches: int = 4
    depth: int = 5
    draw: TreeDraw = "deterministic"

    def __post_init__(self) -> None:
        for name, most in (("nodes", MAX_DRAFTS), ("branches", MAX_CHILDREN), ("depth", MAX_DRAFTS)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
            if not 1 <= value <= most:
                raise ValueError(f"{name}: expected 1 to {most}, got {value}")
        if self.draw not in _DRAWS:
            raise ValueError(f"draw: expected one of {', '.join(_DRAWS)}, got {self.draw!r}")


def settle_plan(
    tree: TreePlan | Trees | None, num_drafts: int | None, usual: int, ahead_on: str | None = None
) -> tuple[TreePlan | None, int]:
    """The shape of trees, None for chains alone, and how many drafts may stand one behind the other.

    Parameters
    ----------
    tree, num_drafts
        As they were asked for; ``usual`` drafts of a chain where nothing was.
    ahead_on
        The device, if its rounds are issued before the last ones are known: plans are of trees there.
    """
    if isinstance(tree, TreePlan):
        depth = tree.depth if num_drafts is None else min(num_drafts, tree.depth)
        if ahead_on is not None and depth >= tree.nodes:
            raise ValueError(
                f"tree: expected more nodes than drafts one behind the other on {ahead_on}, got {tree.nodes} "
                f"and {depth}: chains are what num_drafts alone gives"
            )
        return tree, depth
    if tree is None:
        return None, usual if num_drafts is None else num_drafts
    if tree != "auto":
        raise TypeError(f'tree: expected a TreePlan, "auto" or None, got {tree!r}')
    depth = TreePlan().depth if num_drafts is None else num_drafts
    if depth == 0 or (ahead_on is not None and depth >= TreePlan().nodes):
        return None, depth
    return TreePlan(depth=depth), depth
