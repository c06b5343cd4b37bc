"""Draft trees: tokens, parents, the law they were drawn from, and the draw."""

from foretoken.tree.draft_tree import DraftTree
from foretoken.tree.law import Law
from foretoken.tree.plan import TreePlan, Trees

__all__ = ["DraftTree", "Law", "TreePlan", "Trees"]
