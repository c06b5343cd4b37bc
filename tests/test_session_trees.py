"""Sessions whose drafts form trees: texts, laws, caches, counters, and what is refused."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import foretoken as ft
from foretoken.drafters import ModelDrafter, NgramDrafter, Proposal
from foretoken.generate import decode, settle
from foretoken.ops import Status
from foretoken.sampling import Sampling
from foretoken.session import Session
from foretoken.tree import TreePlan
from goodness import assert_fits, assert_misfits, fit
from reference import Filters, row_law
from toys import (
    GREEDY,
    VOCAB,
    Ask,
    TableModel,
    alike,
    context_of,
    greedy,
    rounds,
    some_asks,
    table,
)

TABLE = table(VOCAB, seed=1)
PLAN = TreePlan(nodes=10, branches=3, depth=4)


class RandomTrees:
    """Trees of any shape whose right continuations stand anywhere, of which it knows some."""

    def __init__(self, logits: torch.Tensor, seed: int, *, knows: float = 0.8) -> None:
        self.logits, self.knows = logits, knows
        self.pick = random.Random(seed)
        self.tokens_of = None
        self.proposed: list[tuple[list[int], list[int]]] = []

    def tree(self, text: list[int], nodes: int, depth: int) -> tuple[list[int], list[int]]:
        tokens, parents, depths, texts = [], [], [0], [text]
        while len(tokens) < nodes:
            parent = self.pick.choice([i for i, d in enumerate(depths) if d < depth])
            siblings = {tokens[i] for i, above in enumerate(parents) if above == parent}
            right = int(self.logits[context_of(texts[parent])].argmax())
            token = right if self.pick.random() < self.knows else self.pick.randrange(VOCAB)
            if token in siblings:
                token = next(t for t in range(VOCAB) if t not in siblings)
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            texts.append([*texts[parent], token])
        return tokens, parents

    def propose(self, context, budget):
        rows = []
        for request, nodes, depth in zip(
            context.requests, context.nodes.tolist(), budget.tolist(), strict=True
        ):
            count = self.pick.randint(0, nodes) if depth > 0 else 0
            rows.append(self.tree(self.tokens_of(request), count, depth))
        self.proposed += rows
        width = max(len(tokens) for tokens, _ in rows)
        padded = [[part + [0] * (width - len(part)) for part in row] for row in rows]
        return Proposal(
            torch.tensor([row[0] for row in padded], dtype=torch.int64).view(len(rows), width),
            torch.tensor([len(tokens) for tokens, _ in rows], dtype=torch.int32),
            parents=torch.tensor([row[1] for row in padded], dtype=torch.int32).view(len(rows), width),
        )

    def observe(self, context, verdict):
        pass

    def reset(self, slot):
        pass

    def truncate(self, slot, length):
        pass


def session_with(drafter, *, max_batch=1, max_length=80, plan=PLAN, logits=TABLE, **options):
    session = Session(
        max_batch=max_batch,
        vocab_size=logits.shape[1],
        max_length=max_length,
        drafter=drafter,
        tree=plan,
        prefill_chunk=6,
        **options,
    )
    target = TableModel(logits, max_batch, max_length)
    target.tokens_of = session.tokens
    if isinstance(drafter, RandomTrees):
        drafter.tokens_of = session.tokens
    return session, target


def run_all(session, target, asks):
    requests = [ask.admit(session) for ask in asks]
    for _ in rounds(session, target):
        pass
    assert all(request.status == Status.OK for request in requests)
    return [session.generated(request) for request in requests]


# ---- texts ----


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_texts_are_those_of_plain_decoding(seed, max_batch):
    """Random trees, ragged, in slots used again; the cache is held against the text at every step."""
    asks = some_asks(15, seed=seed, vocab=VOCAB, eos_ids=(3,))
    session, target = session_with(RandomTrees(TABLE, seed), max_batch=max_batch)
    assert run_all(session, target, asks) == [greedy(TABLE, ask)[0] for ask in asks]
    assert any(kind == "compact" for kind, _, _ in target.steps)
    counters = session.metrics.counters
    assert counters.acceptance_length > 1.8
    assert len(counters.accepted_tokens_per_pos) == PLAN.depth


@pytest.mark.parametrize("max_batch", [1, 4])
def test_ngram_trees_give_the_plain_text_in_no_more_rounds_than_chains(max_batch):
    looping = table(VOCAB, seed=1)
    looping[::3] = looping[0]  # many contexts go on alike: n-grams come back with other continuations
    asks = some_asks(12, seed=9, vocab=5, eos_ids=(3,))
    for ask in asks:
        ask.max_new_tokens += 25
    counters = []
    for plan in (PLAN, None):
        session, target = session_with(NgramDrafter(), max_batch=max_batch, plan=plan, logits=looping)
        assert run_all(session, target, asks) == [greedy(looping, ask)[0] for ask in asks]
        counters.append(session.metrics.counters)
    assert counters[0].rounds < counters[1].rounds


def model_drafter(logits, max_batch, max_length=80, *, seed=99, share=0.7):
    draft = TableModel(alike(logits, seed, share), max_batch, max_length)
    draft.ahead = True
    return draft, ModelDrafter(
        draft, max_batch=max_batch, vocab_size=logits.shape[1], max_length=max_length, prefill_chunk=5
    )


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        TreePlan(16, 4, 5),
        TreePlan(3, 16, 2),
        TreePlan(40, 2, 9),
        TreePlan(16, 4, 5, "without_replacement"),
        TreePlan(9, 2, 4, "iid"),
    ],
    ids=str,
)
def test_model_trees_give_the_plain_text(plan, max_batch):
    """Both caches are held against the text at every step; the drafter's between its levels, too."""
    asks = some_asks(12, seed=7, vocab=VOCAB, eos_ids=(3,))
    draft, drafter = model_drafter(TABLE, max_batch)
    session, target = session_with(drafter, max_batch=max_batch, plan=plan)
    draft.tokens_of = session.tokens
    assert run_all(session, target, asks) == [greedy(TABLE, ask)[0] for ask in asks]
    assert session.metrics.counters.acceptance_length > 1.8
    assert any(kind == "compact" for kind, _, _ in draft.steps)


def test_model_trees_hold_the_likeliest_nodes():
    """Against a search over all paths, in plain Python."""
    plan = TreePlan(nodes=7, branches=3, depth=3)
    draft, drafter = model_drafter(TABLE, 1)
    session, target = session_with(drafter, plan=plan)
    prompt = [4, 1, 7]
    session.admit(prompt, GREEDY, max_new_tokens=20)
    target(session.plan())
    session.commit(None)
    step = session.plan()
    tokens, parents = step.tokens[0, 1:].tolist(), session.parents(step)[0].tolist()
    found = set()
    for node in range(1, 8):
        path = []
        while node:
            path.insert(0, tokens[node - 1])
            node = parents[node - 1]
        found.add(tuple(path))

    level, worth = [()], {}
    for _ in range(plan.depth):
        below = {}
        for path in level:
            law = draft.logits[context_of(prompt + list(path))].log_softmax(0)
            for token in law.argsort(descending=True)[: plan.branches].tolist():
                below[(*path, token)] = worth.get(path, 0.0) + float(law[token])
        worth |= below
        level = sorted(below, key=below.get, reverse=True)[: plan.branches]
    assert found == set(sorted(worth, key=worth.get, reverse=True)[: plan.nodes])


def test_a_drafter_that_is_right_has_every_path_accepted():
    """Equal models: the whole first path of every tree, and the drafter is fed no token of it twice."""
    draft, drafter = model_drafter(TABLE, 2, share=1.0)
    session, target = session_with(drafter, max_batch=2, plan=TreePlan(6, 2, 4))
    draft.tokens_of = session.tokens
    asks = [Ask([1, 2, 3], 41), Ask([5], 41)]
    assert run_all(session, target, asks) == [greedy(TABLE, ask)[0] for ask in asks]
    positions = session.metrics.counters.accepted_tokens_per_pos
    assert positions[0] == session.metrics.counters.drafts
    decodes = [columns for kind, _, columns in draft.steps if kind == "decode"]
    assert max(decodes[8:]) == 2


def test_drafters_with_shorter_slots_grow_smaller_trees():
    draft, drafter = model_drafter(TABLE, 1, 20)
    session, target = session_with(drafter, plan=TreePlan(12, 3, 5), max_length=60)
    ask = Ask([1, 2, 3], 40)
    assert run_all(session, target, [ask]) == [greedy(TABLE, ask)[0]]
    assert draft.steps[-1][0] in ("decode", "compact")


def test_a_draft_forward_that_fails_loses_nothing():
    draft, drafter = model_drafter(TABLE, 2)
    session, target = session_with(drafter, max_batch=2)
    draft.tokens_of = session.tokens
    pick, whole = random.Random(2), draft.__class__.__call__

    class Flaky:
        compact = draft.compact

        def __call__(self, step):
            if pick.random() < 0.15:
                raise RuntimeError("flaky")
            return whole(draft, step)

    drafter.forward = Flaky()
    asks = some_asks(6, seed=3, vocab=VOCAB)
    requests = [ask.admit(session) for ask in asks]
    failures = 0
    while True:
        try:
            step = session.plan()
        except RuntimeError:
            failures += 1
            continue
        if step is None:
            break
        logits = target(step)
        if step.kind == "prefill":
            session.commit(None)
        else:
            settle(session, target, step, logits)
    assert failures > 3
    assert [session.generated(r) for r in requests] == [greedy(TABLE, ask)[0] for ask in asks]


def test_a_chain_among_trees_moves_nothing():
    session, target = session_with(NgramDrafter(), plan=TreePlan(nodes=4, branches=1, depth=4))
    asks = some_asks(6, seed=2, vocab=VOCAB)
    assert run_all(session, target, asks) == [greedy(TABLE, ask)[0] for ask in asks]
    assert not any(kind == "compact" for kind, _, _ in target.steps)


def test_steps_built_again_and_rows_that_leave():
    """A forward that failed, a neighbour truncated while a step of trees is outstanding."""
    asks = some_asks(9, seed=5, vocab=VOCAB)
    session, target = session_with(RandomTrees(TABLE, 3), max_batch=4)
    requests = [ask.admit(session) for ask in asks]
    pick, cut = random.Random(0), set()
    while (step := session.plan()) is not None:
        if step.kind == "prefill":
            target(step)
            session.commit(None)
            continue
        before = step.tokens.clone(), step.positions.clone(), step.num_tokens.clone()
        if pick.random() < 0.3:
            target(step)
            step = session.plan()
            again = step.tokens, step.positions, step.num_tokens
            assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
        live = [request for request in step.requests if request.num_generated > 1]
        if len(live) > 1 and len(cut) < 3 and pick.random() < 0.5:
            cut.add(live[0].id)
            session.truncate(live[0], 1)
            if (step := session.plan()) is None:
                break
        settle(session, target, step, target(step))
    assert cut
    for request, ask in zip(requests, asks, strict=True):
        text = greedy(TABLE, ask)[0]
        assert session.generated(request) == (text[:1] if request.id in cut else text)


def test_trees_end_where_a_slot_does():
    """The node budget shrinks with the room that is left, and the last token is written all the same."""
    session, target = session_with(RandomTrees(TABLE, 1), max_length=24)
    ask = Ask([1, 2, 3], 21)
    assert run_all(session, target, [ask]) == [greedy(TABLE, ask)[0]]
    assert min(columns for kind, _, columns in target.steps if kind == "decode") < PLAN.nodes


def test_kinds_and_counters_of_a_tree():
    """A path that ends at a leaf closes with a bonus, one that ends above children with a recovery."""

    class Fixed(RandomTrees):
        def propose(self, context, budget):
            text = self.tokens_of(context.requests[0])
            right = []
            for _ in range(3):
                right.append(int(TABLE[context_of(text + right)].argmax()))
            wrong = [(token + 1) % VOCAB for token in right]
            tokens = [wrong[0], right[0], wrong[1], right[1], *([wrong[2]] if len(text) > 4 else [])]
            parents = [0, 0, 2, 2, 4][: len(tokens)]
            return Proposal(
                torch.tensor([tokens]),
                torch.tensor([len(tokens)], dtype=torch.int32),
                parents=torch.tensor([parents], dtype=torch.int32),
            )

    session, target = session_with(Fixed(TABLE, 0))
    request = session.admit([1, 2], GREEDY, max_new_tokens=30)
    target(session.plan())
    session.commit(None)
    kinds = []
    for _ in range(2):
        step = session.plan()
        settle(session, target, step, target(step))
        kinds += [event.kinds for event in session.events()]
    assert kinds == [["accepted", "accepted", "bonus"], ["accepted", "accepted", "recovery"]]
    assert request.metrics.draft_tokens == 9
    assert request.metrics.accepted_tokens_per_pos == (2, 2, 0, 0)
    assert session.generated(request) == greedy(TABLE, Ask([1, 2], 6))[0]


def test_ends_are_held_open_by_depth():
    """A request below its minimum cannot end at any node of its tree, wherever its column stands."""
    ends = tuple(range(0, VOCAB, 2))
    for seed in range(6):
        session, target = session_with(RandomTrees(TABLE, seed))
        request = session.admit([1, 2], GREEDY, max_new_tokens=30, eos_ids=ends, min_new_tokens=9)
        for _ in rounds(session, target):
            pass
        text = [1, 2]
        while True:
            law = TABLE[context_of(text)].clone()
            if len(text) - 2 < 9:
                law[list(ends)] = -torch.inf
            text.append(int(law.argmax()))
            if text[-1] in ends or len(text) == 32:
                break
        assert session.generated(request) == text[2:]


# ---- laws ----

SMALL, LENGTH = 4, 3
SMALL_TABLE = table(SMALL, seed=3, spread=1.2)
PROMPT = [2, 1, 1, 2, 3, 1, 0, 2, 1]


def exact_law(law: Sampling | None = None) -> np.ndarray:
    cells = np.zeros((SMALL,) * LENGTH)
    filters = Filters() if law is None else Filters(law.temperature, law.top_k, law.top_p)
    for text in itertools.product(range(SMALL), repeat=LENGTH):
        mass = 1.0
        for i, token in enumerate(text):
            mass *= row_law(SMALL_TABLE[context_of(PROMPT + list(text[:i]))].tolist(), filters)[token]
        cells[text] = mass
    return cells.ravel()


def counts_of_texts(drafter, plan: TreePlan, *, rule="auto", texts=2000, law=None) -> np.ndarray:
    session, target = session_with(
        drafter, max_batch=100, max_length=24, plan=plan, logits=SMALL_TABLE, rule=rule
    )
    if isinstance(drafter, RandomTrees):
        drafter.tokens_of = session.tokens
    requests = [
        session.admit(PROMPT, replace(law or Sampling(), seed=seed), max_new_tokens=LENGTH)
        for seed in range(texts)
    ]
    for _ in rounds(session, target):
        pass
    cells = torch.tensor([session.generated(request) for request in requests])
    weights = SMALL ** torch.arange(LENGTH - 1, -1, -1)
    assert session.metrics.counters.accepted_tokens > texts // 10
    return torch.bincount(cells @ weights, minlength=SMALL**LENGTH).numpy()


@pytest.mark.parametrize("rule", ["auto", "coupled", "rrs", "traversal"])
def test_sampled_texts_of_ngram_trees_have_the_plain_law(rule):
    counts = counts_of_texts(NgramDrafter(), TreePlan(nodes=6, branches=3, depth=2), rule=rule)
    assert_fits(fit(counts, exact_law()), rule)


@pytest.mark.parametrize("rule", ["auto", "coupled"])
def test_sampled_texts_of_model_trees_have_the_plain_law(rule):
    _, drafter = model_drafter(SMALL_TABLE, 100, 24, seed=9, share=0.4)
    counts = counts_of_texts(drafter, TreePlan(nodes=5, branches=2, depth=2), rule=rule)
    assert_fits(fit(counts, exact_law()), rule)


FILTERED = Sampling(temperature=0.8, top_k=3, top_p=0.9)


@pytest.mark.parametrize(
    ("draw", "law", "rule"),
    [
        ("iid", Sampling(), "auto"),
        ("iid", FILTERED, "auto"),
        ("without_replacement", FILTERED, "auto"),
        ("without_replacement", Sampling(), "rrs"),
    ],
)
def test_sampled_texts_of_drawn_trees_have_the_plain_law(draw, law, rule):
    plan = TreePlan(nodes=6, branches=3, depth=2, draw=draw)
    _, drafter = model_drafter(SMALL_TABLE, 100, 24, seed=9, share=0.4)
    counts = counts_of_texts(drafter, plan, law=law, rule=rule, texts=1500)
    assert_fits(fit(counts, exact_law(law)), draw)


def test_drawn_trees_that_are_sorted_afterwards_shift_the_law():
    """The control: siblings sorted by probability after the draw."""

    class Sorting(ModelDrafter):
        def propose(self, context, budget):
            said = super().propose(context, budget)
            if said.draft_topk is None:
                return said
            ids, probs = said.draft_topk
            rows = torch.arange(len(ids))
            first, second = ids[:, 0] == said.tokens[:, :1], ids[:, 0] == said.tokens[:, 1:2]
            worse = (probs[:, 0] * first).sum(1) < (probs[:, 0] * second).sum(1)
            swap = torch.where(worse, 1, 0)
            tokens = said.tokens.clone()
            tokens[:, 0], tokens[:, 1] = said.tokens[rows, swap], said.tokens[rows, 1 - swap]
            return replace(said, tokens=tokens)

    draft = TableModel(alike(SMALL_TABLE, 9, 0.4), 100, 24)
    draft.ahead = True
    drafter = Sorting(draft, max_batch=100, vocab_size=SMALL, max_length=24)
    counts = counts_of_texts(drafter, TreePlan(2, 2, 1, "without_replacement"), texts=3000)
    assert_misfits(fit(counts, exact_law()), "sorted after the draw")


def test_shapes_of_drawn_trees():
    """Budget, branches and depth are kept; draws without replacement differ, those with it need not."""
    for draw, rows in (("without_replacement", 8), ("iid", 8)):
        plan = TreePlan(nodes=11, branches=3, depth=4, draw=draw)
        _, drafter = model_drafter(TABLE, rows)
        session, target = session_with(drafter, max_batch=rows, plan=plan)
        for i in range(rows):
            session.admit([1, i], Sampling(seed=i), max_new_tokens=3 + 4 * i)
        target(session.plan())
        session.commit(None)
        step = session.plan()
        equal = 0
        for row, count in enumerate(step.num_tokens.tolist()):
            parents = session.parents(step)[row, : count - 1].tolist()
            tokens = step.tokens[row, 1:count].tolist()
            depth = max((step.positions[row, :count] - step.lengths[row]).tolist())
            assert depth == min(4, 2 + 4 * row)
            assert count - 1 == (11 if row > 0 else 6)
            assert max(parents.count(node) for node in range(count)) <= 3
            equal += len(tokens) - len(set(zip(parents, tokens, strict=True)))
        assert (equal > 0) == (draw == "iid")


def test_a_tree_declared_as_draws_shifts_the_law():
    """The control: deterministic nodes said to be independent draws from a flat law."""

    class Lying(NgramDrafter):
        def propose(self, context, budget):
            said = super().propose(context, budget)
            if said.parents is None:
                return said
            rows, columns = said.tokens.shape
            flat = torch.zeros(rows, columns + 1, SMALL)
            return replace(said, draft_logits=flat, draw="without_replacement")

    counts = counts_of_texts(Lying(), TreePlan(nodes=6, branches=3, depth=2))
    assert_misfits(fit(counts, exact_law()), "a declared law that is not the drawn one")


# ---- what is refused ----


class Saying:
    def __init__(self, tokens, parents):
        self.said = tokens, parents

    def propose(self, context, budget):
        tokens, parents = self.said if int(budget[0]) > 1 else ([], [])
        return Proposal(
            torch.tensor([tokens], dtype=torch.int64),
            torch.tensor([len(tokens)], dtype=torch.int32),
            parents=torch.tensor([parents], dtype=torch.int32),
        )

    def observe(self, context, verdict):
        pass

    def reset(self, slot):
        pass


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([1, 2], [0, 2], r"proposal.parents: expected a node number in \[0, 1\] at entry 1 of row 0, got 2"),
        ([1, 2], [0, -1], r"proposal.parents: expected a node number"),
        ([1, 2, 3], [0, 1, 2], r"proposal.parents: expected paths of at most 2 drafts in row 0, got 3"),
        ([1, 2, 3, 4, 5], [0] * 5, r"num_drafts: expected 0 to 4 in row 0, got 5"),
    ],
)
def test_trees_that_break_the_contract_are_refused(tokens, parents, message):
    session, _ = session_with(Saying(tokens, parents), plan=TreePlan(nodes=4, branches=4, depth=2))
    session.admit([1], GREEDY, max_new_tokens=20)
    with pytest.raises(ValueError, match=message):
        session.plan()


def test_a_session_of_chains_refuses_trees():
    session, _ = session_with(Saying([1, 2], [0, 0]), plan=None)
    session.admit([1], GREEDY, max_new_tokens=20)
    with pytest.raises(ValueError, match=r"proposal.parents: expected None, as this session drafts chains"):
        session.plan()


def test_ids_outside_the_vocabulary_cost_the_tree():
    session, target = session_with(Saying([1, VOCAB, 2], [0, 0, 1]))
    request = session.admit([1], GREEDY, max_new_tokens=6)
    for _ in rounds(session, target):
        pass
    assert session.generated(request) == greedy(TABLE, Ask([1], 6))[0]
    assert session.metrics.bad_drafts > 0


def test_a_draft_forward_that_cannot_move_rows_is_refused():
    draft, drafter = model_drafter(TABLE, 1)
    drafter.forward = lambda step: draft(step)
    session, _ = session_with(drafter)
    session.admit([1], GREEDY, max_new_tokens=6)
    with pytest.raises(TypeError, match="forward: expected a method compact"):
        session.plan()


def test_a_forward_that_cannot_move_rows_is_refused():
    session, target = session_with(Saying([1, 2], [0, 0]))
    session.admit([1], GREEDY, max_new_tokens=6)
    with pytest.raises(TypeError, match="forward: expected a method compact"):
        decode(session, lambda step: target(step))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"nodes": 0}, ValueError, "nodes: expected 1 to 255, got 0"),
        ({"branches": 17}, ValueError, "branches: expected 1 to 16, got 17"),
        ({"depth": 2.0}, TypeError, "depth: expected an integer, got float"),
    ],
)
def test_plans_out_of_range_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        ft.TreePlan(**options)
