"""A configuration of the covering array, run: drafts drawn by ``ops.sample``, rounds verified by
``ops.verify``, the first tokens of every row counted against the exact law of plain decoding.

Target and drafter are tables over the last two tokens of the round. A batch is many rounds behind the same
text; rows differ by their random numbers, and by kind: requests beside the one in question have other filters
and other rules. What an experiment does stands in small methods, so that a control can do one of them wrong.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import foretoken as ft
from covering import PATHS, Configuration
from experiment_kinds import BIAS, NO_PENALTIES, OUTPUT, PENALTIES, PROMPT, TEXT, Kind, kinds_of, penalised
from goodness import Fit, fit
from models_of_contexts import Models, models_for
from reference import Filters, row_law
from reference_draws import children_of, deepest, depth_of, path_to

BATCH = 20_000
SPACING = 16  # positions between two rounds, more than a round is long
SHARING = 4  # batches that share the seeds of their rows
SIDES = ("target", "draft", "plain")  # plain: what a drafter draws from whose filters are in its rows already
NO_TOKEN = 10**6  # what lies where nothing may be read
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class Round:
    """One batch: everything drawn and declared, by row."""

    base: Tensor  # [B]
    slots: Tensor  # [B]
    kinds: Tensor  # [B]
    counts: Tensor | None  # [B] num_drafts
    parents: Tensor  # [B, N]
    tokens: Tensor  # [B, N]
    states: Tensor  # [B, T] context of each node
    drawn: Tensor  # [B, N] the tokens as they were drawn; `tokens` may share their nodes
    tables: dict[str, ft.SamplingTable]
    seeds: list[int]  # by slot
    records: dict[int, Tensor] = field(default_factory=dict)  # by node
    history: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    verdict: Any = None

    @property
    def size(self) -> int:
        return len(self.base)


class Experiment:
    """Rounds of one configuration."""

    def __init__(self, row: Configuration, batch: int = BATCH) -> None:
        self.row, self.batch = row, batch
        vocab, self.length = (int(part) for part in row.cells.split("^"))
        self.vocab = vocab
        self.kinds = kinds_of(row)
        self.parents, self.nodes = row.parents, len(row.parents)
        self.depth = deepest(row.parents)
        self.models = self._models()
        self.penalised = any(kind.filters == "penalties" for kind in self.kinds)
        self.num_slots = batch if self.penalised else 64 if row.mix == "shuffled" else len(self.kinds)
        self._use_seeds(0)

    def _models(self) -> Models:
        filters = tuple((kind.on("target"), kind.on("draft")) for kind in self.kinds)
        return models_for(self.vocab, filters, self.row.law, DTYPES[self.row.dtype], self.kinds[0].masked)

    # ------------------------------------------------------------------------------ the batch

    def _use_seeds(self, number: int) -> None:
        self._seeds_number = number
        pick = random.Random(f"{self.row} {number}")
        seeds = self._seeds = [pick.getrandbits(64) for _ in range(self.num_slots)]
        self._tables = {side: self._sampling(side, seeds).prepare(len(seeds)) for side in SIDES}

    def _sampling(self, side: str, seeds: list[int]) -> ft.Sampling:
        of_slot = [self.kinds[slot % len(self.kinds)] for slot in range(len(seeds))]
        filters = [Filters() if side == "plain" else kind.on(side) for kind in of_slot]
        columns: dict = {
            name: [getattr(f, name) for f in filters] for name in ("temperature", "top_k", "top_p", "min_p")
        }
        if self.penalised and side != "plain":
            on = [kind.penalised(side) for kind in of_slot]
            columns |= {
                name: [(PENALTIES if yes else NO_PENALTIES)[name] for yes in on] for name in PENALTIES
            }
            columns["logit_bias"] = [BIAS if yes else {} for yes in on]
        return ft.Sampling(seed=seeds, **columns)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(random.Random(f"{self.row} {number}").getrandbits(62))

    def _empty_round(self, number: int) -> Round:
        rows = torch.arange(self.batch)
        if self.penalised:  # all behind one text: rows differ by seed, batches by ids that count for nothing
            group, part = divmod(number, SHARING)
            if group != self._seeds_number:
                self._use_seeds(group)
            base = torch.full((self.batch,), TEXT + SPACING * part)
            text = torch.tensor([*PROMPT, *OUTPUT, *([NO_TOKEN] * SPACING * SHARING)], dtype=torch.int32)
            history = {
                "history": text.expand(self.batch, -1),
                "prompt_lengths": torch.full((self.batch,), len(PROMPT), dtype=torch.int32),
            }
        else:  # rows differ by base
            history = {}
            base = 1 + SPACING * (number * self.batch + rows)
        slots = rows % self.num_slots
        if self.row.mix == "shuffled":
            slots = slots[torch.randperm(self.batch, generator=self._generator(number))]
        return Round(
            base,
            slots.to(torch.int32),
            slots % len(self.kinds),
            self._counts(number),
            torch.tensor(self.parents, dtype=torch.int64).expand(self.batch, -1),
            torch.zeros(self.batch, self.nodes, dtype=torch.int64),
            torch.zeros(self.batch, self.nodes + 1, dtype=torch.int64),
            torch.zeros(0),
            self._tables,
            self._seeds,
            history=history,
        )

    def _counts(self, number: int) -> Tensor | None:
        """How many drafts each row has, decided before any is drawn; paths come whole or not at all."""
        if self.row.mix != "padded":
            return None
        options = [-1, 0, self.nodes] if self.row.shape in PATHS else list(range(-1, self.nodes + 1))
        drawn = torch.randint(len(options), (self.batch,), generator=self._generator(number))
        return torch.tensor(options, dtype=torch.int32)[drawn]

    # ------------------------------------------------------------------------------ the drafts

    def is_point(self, parent: int) -> bool:
        """Whether the children of this node are chosen and not drawn."""
        return self.row.law == "point" or (self.row.law == "hybrid" and depth_of(self.parents, parent) > 0)

    def draw(self, this: Round) -> None:
        for node in range(1, self.nodes + 1):
            parent = self.parents[node - 1]
            elders = [elder for elder in children_of(self.parents, parent) if elder < node]
            states = this.states[:, parent]
            if self.is_point(parent):
                this.tokens[:, node - 1] = self.models.ranked[states, len(elders)]
            else:
                this.tokens[:, node - 1] = self.draw_node(this, node, parent, elders)
            this.states[:, node] = self.models.following[states, this.tokens[:, node - 1]]

    def step(self, node: int) -> int:
        return node - 1

    def draw_node(self, this: Round, node: int, parent: int, elders: list[int]) -> Tensor:
        row, states = self.row, this.states[:, parent]
        common = {"base": this.base, "slots": this.slots, "step": self.step(node), "purpose": "draft"}
        if row.law == "map":
            common |= {"vocab_map": self.models.vocab_map, "vocab_size": self.vocab}
        if row.law == "records" and not elders:
            this.records[parent] = torch.empty(this.size, 4, dtype=torch.int64)
        if row.law in ("probs", "topk") or row.draw == "without_replacement":
            if row.law == "records" and not elders:
                self.sample_logits(this, states, parent, records=this.records[parent], **common)
            logits = self.models.log_laws[this.kinds, states]
            for elder in elders if row.draw == "without_replacement" else ():
                columns = self.models.column_of[this.tokens[:, elder - 1]]
                logits = logits.scatter(1, columns[:, None], -torch.inf)
            return ft.ops.sample(logits, sampling=this.tables["plain"], **common)
        if row.law == "records":
            common["records"] = this.records[parent] if not elders else None
        return self.sample_logits(this, states, parent, **common)

    def sample_logits(self, this: Round, states: Tensor, parent: int, **common) -> Tensor:
        if self.penalised:
            common |= this.history | {"path": self.drafted_path(this, parent)}
        return ft.ops.sample(self.models.draft[states], sampling=this.tables["draft"], **common)

    def drafted_path(self, this: Round, node: int) -> Tensor:
        columns = [step - 1 for step in path_to(self.parents, node)]
        return this.tokens[:, columns]

    def share_prefixes(self, this: Round) -> None:
        """Equal prefixes of a row's paths become one path of nodes; the order of first drawing stays."""
        drawn = this.tokens.numpy()
        parents = np.zeros_like(drawn)
        tokens = np.full_like(drawn, NO_TOKEN)
        counts = np.zeros(this.size, np.int32)
        for b in range(this.size):
            number: dict[tuple[int, ...], int] = {(): 0}
            of_node: list[tuple[int, ...]] = [()]
            for node, parent in enumerate(self.parents, start=1):
                of_node.append((*of_node[parent], int(drawn[b, node - 1])))
                if of_node[node] not in number:
                    number[of_node[node]] = fresh = len(number)
                    parents[b, fresh - 1], tokens[b, fresh - 1] = number[of_node[parent]], drawn[b, node - 1]
            counts[b] = len(number) - 1
        this.parents, this.tokens = torch.from_numpy(parents), torch.from_numpy(tokens)
        whole = torch.from_numpy(counts)
        this.counts = whole if this.counts is None else torch.where(this.counts > 0, whole, this.counts)
        this.states = torch.zeros_like(this.states)
        for node in range(1, self.nodes + 1):
            before = this.states.gather(1, this.parents[:, node - 1 : node])[:, 0]
            real = this.tokens[:, node - 1].clamp(max=self.vocab - 1)
            this.states[:, node] = self.models.following[before, real]

    # ------------------------------------------------------------------------------ the verification

    def declared_laws(self, this: Round) -> dict:
        """The law of every node's children: row r for node r, or rows in any order behind ``draft_row``."""
        row, laws = self.row, self.nodes
        if row.law == "point":
            return {}
        states, kinds = this.states[:, :laws], this.kinds[:, None]
        if row.law == "probs":
            parts = {"draft_probs": self.models.probs[kinds, states]}
        elif row.law == "topk":
            parts = {"ids": self.models.top_ids[kinds, states], "probs": self.models.top_probs[kinds, states]}
        else:
            parts = {"draft_logits": self.models.draft[states]}
        if row.law == "records":
            none = torch.zeros(this.size, 4, dtype=torch.int64)
            parts["draft_records"] = torch.stack([this.records.get(node, none) for node in range(laws)], 1)
        if this.counts is not None:
            behind = torch.arange(laws) >= this.counts[:, None]
            for name in parts.keys() & {"draft_logits", "draft_probs"}:
                parts[name] = parts[name].masked_fill(behind[..., None], torch.nan)
        rows = torch.arange(laws).expand(this.size, -1)
        if row.mix == "shuffled":
            noise = torch.rand(this.size, laws, generator=self._generator(-1))
            rows = noise.argsort(1)
            place = rows.argsort(1)  # law row of each node
            parts = {name: part.gather(1, rows[..., None].expand_as(part)) for name, part in parts.items()}
            rows = place
        if row.mix == "shuffled" or row.law == "hybrid":
            rows = torch.cat([rows, torch.full((this.size, 1), -1)], 1).to(torch.int32)
            for node in range(laws):
                if self.is_point(node):
                    rows[:, node] = -1
            parts["draft_row"] = rows
        if "ids" in parts:
            parts["draft_topk"] = parts.pop("ids"), parts.pop("probs")
        if row.law == "map":
            parts["vocab_map"] = self.models.vocab_map
        return parts

    def target_rows(self, this: Round) -> dict:
        """Rows by node, or flattened without those of nodes that are not there."""
        parts = {"target_logits": self.models.target[this.states]}
        if self.kinds[0].masked:
            parts["bitmask"] = self.bitmask(this)
        if this.counts is None or self.row.mix != "padded":
            return parts
        there = torch.arange(self.nodes + 1) <= this.counts[:, None]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(1).cumsum(0)])
        return {name: part[there] for name, part in parts.items()} | {"row_offsets": offsets}

    def bitmask(self, this: Round) -> Tensor:
        free = torch.full_like(self.models.mask[this.states], -1)
        masked = torch.tensor([kind.masked for kind in self.kinds])[this.kinds]
        return torch.where(masked[:, None, None], self.models.mask[this.states], free)

    def rule(self) -> str | Tensor:
        if len({kind.rule for kind in self.kinds}) == 1 and self.row.mix != "shuffled":
            return self.row.rule
        return ft.ops.rule_codes([self.kinds[slot % len(self.kinds)].rule for slot in range(self.num_slots)])

    def declare(self, this: Round) -> dict:
        """The arguments of ``verify``."""
        row = self.row
        draw = (row.draw, PATHS[row.shape]) if row.draw == "iid_paths" else row.draw
        tokens = this.tokens
        if this.counts is not None:
            tokens = tokens.masked_fill(torch.arange(self.nodes) >= this.counts[:, None], NO_TOKEN)
        chain = self.parents == tuple(range(self.nodes))
        return {
            "draft_tokens": tokens.to(torch.int32) if row.mix == "shuffled" else tokens,
            "parents": None if chain and row.mix == "uniform" else this.parents,
            "num_drafts": this.counts,
            "draw": draw,
            "sampling": this.tables["target"],
            "draft_sampling": this.tables["draft"],
            "base": this.base,
            "slots": this.slots,
            "rule": self.rule(),
            **self.target_rows(this),
            **self.declared_laws(this),
            **this.history,
        }

    def round(self, number: int) -> Round:
        this = self._empty_round(number)
        self.draw(this)
        this.drawn = this.tokens
        if self.row.shape == "shared":
            self.share_prefixes(this)
        this.arguments = self.declare(this)
        this.verdict = ft.ops.verify(**this.arguments)
        return this

    # ------------------------------------------------------------------------------ the counts

    def first_tokens(self, this: Round) -> Tensor:
        """``[B, length]``: where fewer were emitted, what plain decoding puts behind them."""
        verdict = this.verdict
        first = torch.zeros(this.size, self.length, dtype=torch.int64)
        given = min(self.length, verdict.tokens.shape[1])
        first[:, :given] = verdict.tokens[:, :given]
        state = torch.zeros(this.size, dtype=torch.int64)
        for i in range(self.length):
            rows = torch.nonzero((verdict.num_emitted <= i) & (verdict.num_emitted > 0))[:, 0]
            if len(rows):
                first[rows, i] = self.plain_token(this, rows, state[rows], first[rows, :i], i)
            state = self.models.following[state, first[:, i].clamp(min=0)]
        return first

    def plain_token(self, this: Round, rows: Tensor, states: Tensor, path: Tensor, step: int) -> Tensor:
        more: dict = dict(this.history)
        if more:
            more["path"] = path
        if self.kinds[0].masked:
            masked = torch.tensor([kind.masked for kind in self.kinds])[this.kinds[rows]]
            more["bitmask"] = torch.where(masked[:, None], self.models.mask[states], -1).to(torch.int32)
        return ft.ops.sample(
            self.models.target[states],
            sampling=this.tables["target"],
            base=this.base[rows],
            slots=this.slots[rows],
            step=step,
            purpose="plain",
            **more,
        )

    def check(self, this: Round) -> None:
        """What holds of every row, whatever the coins."""
        verdict = this.verdict
        assert not verdict.status.any(), verdict.status.unique()
        counts = torch.full((this.size,), self.nodes) if this.counts is None else this.counts
        assert torch.equal(verdict.num_emitted == 0, counts < 0)
        assert torch.equal(verdict.next_lengths, this.base - 1 + verdict.num_emitted)
        assert (verdict.num_emitted <= counts + 1).all()
        assert (verdict.num_emitted <= self.depth + 1).all()
        there = torch.arange(verdict.tokens.shape[1]) < verdict.num_emitted[:, None]
        assert torch.equal(verdict.tokens >= 0, there)
        assert (verdict.tokens < self.vocab).all()

    def counts(self, numbers: Iterator[int] | range) -> dict[Kind, np.ndarray]:
        """Cells of the joint table, by kind of request."""
        cells = self.vocab ** torch.arange(self.length - 1, -1, -1)
        found = {kind: np.zeros(self.vocab**self.length, np.int64) for kind in self.kinds}
        for number in numbers:
            this = self.round(number)
            self.check(this)
            emitted = this.verdict.num_emitted > 0
            index = (self.first_tokens(this) * cells).sum(1)
            for k, kind in enumerate(self.kinds):
                chosen = index[emitted & (this.kinds == k)]
                found[kind] += torch.bincount(chosen, minlength=len(found[kind])).numpy()
        return found

    # ------------------------------------------------------------------------------ the exact law

    def allowed(self, kind: Kind, path: tuple[int, ...]) -> list[bool]:
        if not kind.masked:
            return [True] * self.vocab
        word = int(self.models.mask[self.models.state(path), 0])
        return [bool(word >> token & 1) for token in range(self.vocab)]

    def target_law(self, kind: Kind, path: tuple[int, ...]) -> list[float]:
        """The oracle's law behind ``path``."""
        logits = self.models.target[self.models.state(path)].tolist()
        if kind.penalised("target"):
            logits = penalised(logits, path)
        logits = [x if yes else -np.inf for x, yes in zip(logits, self.allowed(kind, path), strict=True)]
        return row_law(logits, kind.on("target"))

    def draft_law(self, kind: Kind, path: tuple[int, ...]) -> list[float]:
        """The law of drawn children behind ``path``, by the drafter's columns."""
        logits = self.models.draft[self.models.state(path)].tolist()
        if kind.penalised("draft"):
            logits = penalised(logits, path, self.models.vocab_map.tolist())
        hidden = self.models.vocab_map < 0
        logits = [-np.inf if no else x for x, no in zip(logits, hidden, strict=True)]
        return row_law(logits, kind.on("draft"))

    def law(self, kind: Kind) -> np.ndarray:
        """Of the first tokens under plain decoding."""
        cells = np.ones((self.vocab,) * self.length)
        for depth in range(self.length):
            for path in itertools.product(range(self.vocab), repeat=depth):
                row = np.array(self.target_law(kind, path))
                cells[path] *= row.reshape(-1, *([1] * (self.length - depth - 1)))
        return cells.ravel()

    def fits(self, counts: dict[Kind, np.ndarray]) -> dict[Kind, Fit]:
        return {kind: fit(counts[kind], self.law(kind)) for kind in self.kinds}
