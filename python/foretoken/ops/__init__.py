"""The kernels: tensors in, tensors out, caller-owned buffers.

Nothing here allocates when ``out=`` is given, and nothing checks in Python: shapes, dtypes,
devices, strides and overlaps are checked in C++, and a fault is one exception that names the
argument, what was expected and what came.
"""

from __future__ import annotations

from foretoken.ops._attention import merge, tree_attention
from foretoken.ops._cache import CachePlan, append, compact
from foretoken.ops._commit import RequestState, RoundCounters, commit, record_width
from foretoken.ops._draft_tree import (
    MAX_CANDIDATES,
    MAX_CHILDREN,
    DraftTopK,
    FinalTree,
    draft_topk,
    finalize_tree,
)
from foretoken.ops._sample import sample
from foretoken.ops._tile_stats import TILE, tile_stats
from foretoken.ops._tree import MAX_DRAFTS, TreeIndex, tree_index
from foretoken.ops._verdict import Status, Tolerance, Verdict
from foretoken.ops._verify import Draw, Rule, rule_codes, verify
from foretoken.sampling import Sampling, SamplingTable

__all__ = [
    "MAX_CANDIDATES",
    "MAX_CHILDREN",
    "MAX_DRAFTS",
    "TILE",
    "CachePlan",
    "DraftTopK",
    "Draw",
    "FinalTree",
    "RequestState",
    "RoundCounters",
    "Rule",
    "Sampling",
    "SamplingTable",
    "Status",
    "Tolerance",
    "TreeIndex",
    "Verdict",
    "append",
    "commit",
    "compact",
    "draft_topk",
    "finalize_tree",
    "merge",
    "record_width",
    "rule_codes",
    "sample",
    "tile_stats",
    "tree_attention",
    "tree_index",
    "verify",
]
