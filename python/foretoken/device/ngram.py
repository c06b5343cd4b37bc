"""Trees of n-grams, by comparing the end of a text with all of it: tensor operations, and no index."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from foretoken import ops
from foretoken.ops import MAX_CANDIDATES, FinalTree
from foretoken.ops._commit import upload
from foretoken.step import numbers

# As csrc/drafters/ngram_tree.cpp has them.
MOST_OCCURRENCES, MOST_VISITS = 32, 96
WEIGHT_OF_TOKEN = 4.0
MOST_DEPTH = MAX_CANDIDATES // MOST_OCCURRENCES


@dataclass(slots=True)
class Matches:
    """Where the ends of B texts stood before."""

    text: Tensor
    """``[B, W]``."""
    last: Tensor
    """int64 ``[B, 1]``: the place of each text's last token."""
    length: Tensor
    """int64 ``[B, W]``: how many tokens that end here are those that end the text, at most ``max_ngram``; 0
    where they are fewer than ``min_ngram``, and from the last token on.
    """
    min_ngram: int
    max_ngram: int


def matches_in(text: Tensor, base: Tensor, min_ngram: int, max_ngram: int) -> Matches:
    """Compare the ends of texts ``[B, W]`` of ``base`` tokens with all of them."""
    last = (base - 1)[:, None]
    places = numbers(text.shape[1], text.device)
    first = last + (1 - max_ngram)
    suffix = text.gather(1, (first + numbers(max_ngram, text.device)).clamp_min(0))
    windows = pad(text, (max_ngram - 1, 0), value=-1).unfold(1, max_ngram, 1)
    same = (windows == suffix[:, None]).flip(2)
    matched = same.to(torch.int32).cumprod(2).sum(2)
    usable = (matched >= min_ngram) & (places < last)
    return Matches(text, last, matched.masked_fill(~usable, 0), min_ngram, max_ngram)


def continuations(matches: Matches, place: Tensor, count: int) -> Tensor:
    """int64 ``[B, n, count]``: what follows places ``[B, n]``; behind the end a copy goes on with itself."""
    period = (matches.last - place).clamp_min(1)[:, :, None]
    ahead = place[:, :, None] + 1 + numbers(count, place.device) % period
    found = matches.text.gather(1, ahead.clamp(0, matches.text.shape[1] - 1).flatten(1))
    return found.view(ahead.shape).long()


def trees(
    matches: Matches, depth: Tensor, nodes: Tensor, *, branches: int, most_depth: int, most_nodes: int
) -> FinalTree:
    """The trees of :class:`foretoken.drafters.NgramDrafter`, node by node.

    Parameters
    ----------
    depth, nodes
        int64 and int32 ``[B]``: of each row, the most drafts of a path and in all; ``nodes`` of -1 makes a
        padded row.
    branches
        The most children of a node.
    most_depth, most_nodes
        What they do not exceed, at most 32 and 255.
    """
    place, weight = _occurrences(matches)
    tokens = continuations(matches, place, most_depth)
    trie = _Trie(tokens, weight, depth)
    chosen, rank = trie.choose(branches)
    count = tokens.shape[1] * most_depth
    return ops.finalize_tree(
        tokens.reshape(-1, count),
        (-rank).to(torch.float32).masked_fill(~chosen, -torch.inf),
        trie.parents().reshape(-1, count),
        most_nodes,
        budget=nodes,
    )


def _occurrences(matches: Matches) -> tuple[Tensor, Tensor]:
    """Places ``[B, O]`` whose continuations are merged, the best match first, of equals the most recent, and
    their weights, float64, 0 for none.

    The index visits every level of match lengths from the longest on, and what it has seen before again; so
    many visits, and no more.
    """
    width = matches.text.shape[1]
    places = numbers(width, matches.text.device)
    visited = torch.zeros_like(matches.last)
    visits = torch.zeros_like(matches.length)
    for length in range(matches.max_ngram, matches.min_ngram - 1, -1):
        there = matches.length >= length
        behind = there.flip(1).cumsum(1).flip(1)
        visits = torch.where(matches.length == length, visited + behind, visits)
        visited = visited + behind[:, :1]
    usable = (matches.length > 0) & (visits <= MOST_VISITS)
    key = torch.where(usable, matches.length * width + places, -1)
    best, place = key.topk(min(MOST_OCCURRENCES, width), 1)
    more = (matches.length.gather(1, place) - matches.min_ngram).clamp_min(0)
    weight = _weights(place.device).index_select(0, more.view(-1)).view(more.shape)
    return place, weight.masked_fill(best < 0, 0.0)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """float64 ``[16]``: what an occurrence weighs whose match is so many tokens longer than the least."""
    with torch.inference_mode(False):
        weights = torch.tensor([WEIGHT_OF_TOKEN**more for more in range(16)], dtype=torch.float64)
        return upload(weights, torch.float64, device)


class _Trie:
    """Continuations ``[B, O, D]`` merged: a node is the first occurrence that passes it, and its depth."""

    def __init__(self, tokens: Tensor, weight: Tensor, depth: Tensor) -> None:
        device = tokens.device
        self._columns = numbers(tokens.shape[2], device)
        self._rows = numbers(tokens.shape[1], device)
        self._tokens = tokens
        known = weight > 0.0
        alike = (tokens[:, :, None] == tokens[:, None]).to(torch.int8).cumprod(3).bool()
        self._alike = alike & known[:, None, :, None]
        """bool ``[B, O, O, D]``: up to this depth one occurrence says what the other says."""
        self._there = known[:, :, None] & (self._columns < depth[:, None, None])
        self._first = torch.where(self._alike, self._rows[:, None], len(self._rows)).amin(2)
        self._first = self._first.clamp_max(len(self._rows) - 1)
        self._is_node = self._there & (self._first == self._rows[:, None])
        self._on_first = self._there & (self._first == 0)
        self._worth = self._find_worth(weight)

    def _find_worth(self, weight: Tensor) -> Tensor:
        """float64 ``[B, O, D]``: a node's share of its parent's weight, times the parent's worth."""
        least = torch.where(weight > 0.0, weight, torch.inf).amin(1, keepdim=True)
        above, worth = weight.sum(1, keepdim=True), torch.ones_like(least)
        found = []
        for level in range(len(self._columns)):
            own = (self._alike[..., level] * weight[:, None]).sum(2)
            worth = worth * own / (above + least)
            above = own
            found.append(worth)
        return torch.stack(found, 2)

    def choose(self, branches: int) -> tuple[Tensor, Tensor]:
        """Which candidates are nodes that may stand in a tree, and all candidates' order, ``[B, O * D]``:
        those of the first continuation, then by worth, of equals the first that was merged.
        """
        worth, rows = self._worth, self._rows
        # Rivals have the same parent, which is where the path to it ends.
        siblings = torch.ones_like(self._alike)
        siblings[..., 1:] = self._alike[..., :-1]
        rivals = siblings & (self._is_node & ~self._on_first)[:, None]
        mine, other = worth[:, :, None], worth[:, None]
        ahead = (other > mine) | ((other == mine) & (rows < rows[:, None])[:, :, None])
        elder = (rivals & ahead).sum(2)
        has_first = torch.ones_like(self._on_first)
        has_first[..., 1:] = self._on_first[..., :-1]
        fits = self._on_first | (elder + has_first < branches)
        # A node stands in a tree if all on the way to it do.
        fits = fits.gather(1, self._first).to(torch.int8).cumprod(2).bool()
        chosen = (self._is_node & fits).flatten(1)
        first = 2.0 + len(self._columns) - self._columns
        key = torch.where(self._on_first, first, worth).flatten(1).masked_fill(~chosen, -1.0)
        order = key.sort(dim=1, stable=True, descending=True).indices
        ranks = numbers(order.shape[1], order.device).expand_as(order)
        return chosen, torch.empty_like(order).scatter_(1, order, ranks)

    def parents(self) -> Tensor:
        """int64 ``[B, O, D]``: the candidate that each hangs on, -1 for the root."""
        columns = len(self._columns)
        above = torch.full_like(self._first, -1)
        above[..., 1:] = self._first[..., :-1] * columns + self._columns[:-1]
        return above
