"""How large the trees of a session may grow."""

from __future__ import annotations

from dataclasses import dataclass

from foretoken.ops import MAX_CHILDREN, MAX_DRAFTS


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

    Raises
    ------
    TypeError, ValueError
        A number that is none, or out of its range, named in the message.

    Examples
    --------
    >>> TreePlan(nodes=8, branches=2)
    TreePlan(nodes=8, branches=2, depth=5)
    """

    nodes: int = 16
    branches: int = 4
    depth: int = 5

    def __post_init__(self) -> None:
        for name, most in (("nodes", MAX_DRAFTS), ("branches", MAX_CHILDREN), ("depth", MAX_DRAFTS)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
            if not 1 <= value <= most:
                raise ValueError(f"{name}: expected 1 to {most}, got {value}")
