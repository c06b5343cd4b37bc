"""Chain or tree: the choice that a row's own history makes."""

from __future__ import annotations

import pytest

import foretoken as ft
from foretoken.controller import TreeChoice
from foretoken.drafters import ModelDrafter
from toys import GREEDY, VOCAB, Ask, TableModel, alike, greedy, rounds, some_asks, table

TABLE = table(VOCAB, seed=1)


def simulate(chain: tuple[float, float], tree: tuple[float, float], count: int = 200) -> list[bool]:
    """What is chosen when rounds bring so many tokens in so many seconds."""
    choice, chosen = TreeChoice(), []
    for _ in range(count):
        chosen.append(choice.wants_tree())
        tokens, seconds = tree if chosen[-1] else chain
        choice.note(chosen[-1], int(tokens), seconds)
    return chosen


@pytest.mark.parametrize(
    ("chain", "tree", "wins"),
    [
        ((3, 1.0), (4, 1.1), True),
        ((3, 1.0), (4, 1.4), False),
        ((3, 1.0), (3, 1.0), False),
        ((1, 1.0), (5, 4.9), True),
        ((4, 1.0), (5, 2.0), False),
    ],
)
def test_the_kind_with_more_tokens_a_second_is_drafted(chain, tree, wins):
    chosen = simulate(chain, tree)
    assert chosen[:8] == [False] * 4 + [True] * 4
    assert chosen[8:].count(not wins) <= len(chosen[8:]) // 24  # looked at again, now and then
    assert (not wins) in chosen[8:]


def test_a_change_is_noticed():
    choice = TreeChoice()
    for i in range(400):
        tree = choice.wants_tree()
        choice.note(tree, 4 if tree and i > 200 else 2, 1.0)
    assert [choice.wants_tree() for _ in range(1)] == [True]
    assert choice.rate(True) > choice.rate(False)


def session_with(seconds, monkeypatch):
    """A session whose clock is the forward's: a step takes `seconds(columns)`."""
    clock = [0.0]
    monkeypatch.setattr("foretoken.session.perf_counter", lambda: clock[0])
    target, draft = (TableModel(logits, 3, 400) for logits in (TABLE, alike(TABLE, 99, 0.7)))
    draft.ahead = True
    drafter = ModelDrafter(draft, max_batch=3, vocab_size=VOCAB, max_length=400)
    session = ft.Session(max_batch=3, vocab_size=VOCAB, max_length=400, drafter=drafter, tree="auto")

    class Timed:
        compact = target.compact

        def __call__(self, step):
            clock[0] += seconds(step.tokens.shape[1])
            return target(step)

    return session, Timed(), target


@pytest.mark.parametrize(("slope", "wins"), [(0.0, True), (1.0, False)])
def test_a_session_drafts_trees_where_they_win(slope, wins, monkeypatch):
    """Nodes that cost nothing are worth it, nodes that cost as much as a pass are not."""
    session, forward, target = session_with(lambda columns: 1.0 + slope * columns, monkeypatch)
    asks = [Ask([1, 2, i], 300) for i in range(3)]
    requests = [ask.admit(session) for ask in asks]
    for _ in rounds(session, forward):
        pass
    assert [session.generated(r) for r in requests] == [greedy(TABLE, ask)[0] for ask in asks]
    widths = [columns for kind, _, columns in target.steps if kind == "decode"]
    late = widths[len(widths) // 2 :]
    trees = sum(columns > 6 for columns in late) / len(late)
    assert trees > 0.8 if wins else trees < 0.3


def test_requests_choose_for_themselves_and_slots_forget():
    session = ft.Session(
        max_batch=2,
        vocab_size=VOCAB,
        max_length=80,
        drafter=ft.NgramDrafter(),
        num_drafts=3,
        tree="auto",
    )
    target = TableModel(TABLE, 2, 80)
    target.tokens_of = session.tokens
    asks = some_asks(9, seed=4, vocab=VOCAB, sampling=GREEDY)
    requests = [ask.admit(session) for ask in asks]
    for _ in rounds(session, target):
        pass
    assert [session.generated(r) for r in requests] == [greedy(TABLE, ask)[0] for ask in asks]


def test_without_drafts_there_are_no_trees():
    session = ft.Session(max_batch=1, vocab_size=VOCAB, max_length=30, num_drafts=0, tree="auto")
    request = session.admit([1], GREEDY, max_new_tokens=5)
    for _ in rounds(session, TableModel(TABLE, 1, 30)):
        pass
    assert session.generated(request) == greedy(TABLE, Ask([1], 5))[0]
    with pytest.raises(TypeError, match="tree: expected a TreePlan"):
        ft.Session(max_batch=1, vocab_size=VOCAB, max_length=30, tree="always")
