"""Prompts that begin alike: their pages are shared, written once and right, and come back in order."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import foretoken as ft
from foretoken import _core
from foretoken.cache import OutOfPagesError, SessionPages
from foretoken.session import Session

VOCAB = 30


class Tagged:
    """A pool whose rows hold the token and position that were written there, and a forward over it."""

    def __init__(self, session: Session, pages: int, size: int, slots: int, most: int, share: bool = True):
        self.session = session
        self.pool = torch.full((pages, size, 1, 2), -1.0)
        self.pages = SessionPages(
            [self.pool, self.pool.clone()], max_slots=slots, max_length=most, share_prefixes=share
        )
        self.written = self.most_used = 0

    def __call__(self, step: Any, fail_at: int | None = None) -> torch.Tensor:
        """Rows of the step are written one by one; before number `fail_at` it breaks off."""
        rest = self.pages.prepare(step)
        written = 0
        for row in range(0 if rest is None else len(rest.slots)):
            slot, length = int(rest.slots[row]), int(rest.lengths[row])
            for column in range(int(rest.num_tokens[row])):
                if written == fail_at:
                    raise ZeroDivisionError
                assert int(rest.positions[row, column]) == length + column
                page = self.pages.pages(slot)[(length + column) // self.pages.page_size]
                tag = torch.tensor([float(rest.tokens[row, column]), float(length + column)])
                self.pool[page, (length + column) % self.pages.page_size, 0] = tag
                written += 1
        self.written += written
        self.check(step)
        return torch.randn(*step.tokens.shape, VOCAB, generator=torch.Generator().manual_seed(self.written))

    def check(self, step: Any) -> None:
        """All rows that a query of the step sees are its own text's."""
        size, held = self.pages.page_size, set()
        for row, request in enumerate(step.requests):
            slot, mine = int(step.slots[row]), self.pages.pages(int(step.slots[row]))
            text = self.session.tokens(request)
            tokens = [*text[: int(step.lengths[row])], *step.tokens[row, : step.num_tokens[row]].tolist()]
            assert self.pages.block_table[slot].tolist()[: len(mine)] == mine
            for position, token in enumerate(tokens):
                seen = self.pool[mine[position // size], position % size, 0].tolist()
                assert seen == [token, position], (request, position)
        for slot in range(len(self.pages.block_table)):
            held |= set(self.pages.pages(slot))
        assert len(held) + self.pages.free_pages == self.pages.num_pages
        self.most_used = max(self.most_used, len(held))


def admit(session: Session, prompt: list[int], new: int = 4) -> Any:
    return session.admit(prompt, ft.Sampling(temperature=0.0), max_new_tokens=new)


def run(session: Session, forward: Tagged) -> None:
    while (step := session.plan()) is not None:
        logits = forward(step)
        session.commit(None if step.kind == "prefill" else logits)


@pytest.mark.parametrize("seed", range(6))
def test_random_programs(seed: int) -> None:
    """Requests of few beginnings come and go, chunks end inside pages, forwards break off half way, rows are
    cancelled before others have what they waited for, and the pool is at times too small.
    """
    dice = random.Random(seed)
    slots, size, most = dice.choice([2, 4, 5]), dice.choice([1, 2, 3, 4]), 40
    session = Session(
        max_batch=slots, vocab_size=VOCAB, max_length=most, prefill_chunk=dice.choice([3, 8, 64])
    )
    forward = Tagged(session, dice.choice([2, 3]) * -(-most // size), size, slots, most)
    stems = [[dice.randrange(VOCAB) for _ in range(30)] for _ in range(3)]
    live: list[Any] = []
    seen = {"broken": 0, "full": 0}
    for _ in range(250):
        if dice.random() < 0.3:
            stem, tail = dice.choice(stems), [dice.randrange(VOCAB) for _ in range(dice.randrange(3))]
            prompt = stem[: dice.randrange(1, 31)] + tail
            live.append(admit(session, prompt, dice.randrange(1, 6)))
        if live and dice.random() < 0.07:
            session.cancel(live.pop(dice.randrange(len(live))))
        step = session.plan()
        if step is None:
            continue
        before = forward.pages.free_pages
        try:
            logits = forward(step, dice.randrange(6) if dice.random() < 0.15 else None)
        except ZeroDivisionError:
            seen["broken"] += 1
            continue
        except OutOfPagesError:
            seen["full"] += 1
            assert forward.pages.free_pages >= before
            session.cancel(dice.choice(step.requests))
            continue
        session.commit(None if step.kind == "prefill" else logits)
    while (step := session.plan()) is not None:
        session.cancel(step.requests[0])
    forward.pages.reset()
    assert forward.pages.free_pages == forward.pages.num_pages
    assert seen["broken"] > 3


def test_samples_of_one_prompt_take_its_pages_once() -> None:
    prompt = list(range(3, 25))  # 22 tokens, of which 21 are fed in front of the first round
    for share, written, used in ((False, 4 * 21, 4 * 6), (True, 20 + 4, 5 + 4)):
        session = Session(max_batch=4, vocab_size=VOCAB, max_length=32)
        forward = Tagged(session, 40, 4, 4, 32, share)
        for _ in range(4):
            admit(session, prompt, 1)
        step = session.plan()
        forward(step)
        session.commit(None)
        assert (forward.written, forward.most_used) == (written, used)
        run(session, forward)
        assert forward.pages.free_pages == 40 - (4 * 6 if not share else 9)


def test_a_prompt_s_pages_outlive_it_until_they_are_needed() -> None:
    session = Session(max_batch=1, vocab_size=VOCAB, max_length=32)
    forward = Tagged(session, 10, 4, 1, 32)  # the third text takes what was used longest ago, from its end on
    first, second, third = ([start, *range(1, 19)] for start in (20, 21, 22))
    for prompt, written in ((first, 18), (second, 18), (first, 2), (third, 18), (first, 2), (second, 14)):
        before = forward.written
        admit(session, prompt, 1)
        forward(session.plan())
        session.commit(None)
        assert forward.written - before == written
        run(session, forward)


def test_who_is_left_behind_goes_on_writing() -> None:
    """The first of two rows breaks off in the middle of a page that the other one waits for."""
    session = Session(max_batch=2, vocab_size=VOCAB, max_length=32, prefill_chunk=6)
    forward = Tagged(session, 16, 4, 2, 32)
    prompt = list(range(1, 23))
    first, second = admit(session, prompt), admit(session, prompt)
    forward(session.plan())
    assert forward.written == 6
    session.commit(None)
    session.cancel(first)
    run(session, forward)
    assert forward.pages.pages(0) or forward.pages.pages(1)
    assert second.finish_reason == "length"


def test_a_forward_that_broke_off_has_written_nothing_for_others() -> None:
    session = Session(max_batch=2, vocab_size=VOCAB, max_length=32)
    forward = Tagged(session, 16, 4, 2, 32)
    prompt = list(range(1, 23))
    first, second = admit(session, prompt), admit(session, prompt)
    with pytest.raises(ZeroDivisionError):
        forward(session.plan(), fail_at=5)
    session.cancel(first)
    run(session, forward)
    assert second.finish_reason == "length"


def test_shared_pages_are_not_asked_for_twice_and_errors_change_nothing() -> None:
    """Nine pages are enough for two texts of six that share four, not for a third that begins otherwise."""
    session = Session(max_batch=3, vocab_size=VOCAB, max_length=24)
    forward = Tagged(session, 9, 4, 3, 24)
    prompt = list(range(1, 20))
    both = [admit(session, prompt, 5), admit(session, prompt, 5)]
    forward(session.plan())
    session.commit(None)
    assert forward.pages.free_pages == 9 - 4 - 2
    third = admit(session, prompt[::-1], 5)
    step = session.plan()
    tables = forward.pages.block_table.clone(), forward.pool.clone()
    with pytest.raises(OutOfPagesError, match="the 3 free of 9 pages are enough, got 5 pages' worth"):
        forward(step)
    assert torch.equal(forward.pages.block_table, tables[0])
    assert torch.equal(forward.pool, tables[1])
    session.cancel(third)
    run(session, forward)
    assert [request.finish_reason for request in both] == ["length"] * 2


def test_hold_is_refused_where_not_all_of_a_step_need_be_run() -> None:
    session = Session(max_batch=1, vocab_size=VOCAB, max_length=24)
    forward = Tagged(session, 9, 4, 1, 24)
    admit(session, [1, 2, 3])
    with pytest.raises(RuntimeError, match="hold: prefixes are shared; expected a call of prepare"):
        forward.pages.hold(session.plan())


def table_of(pages: int) -> Any:
    table = _core.PageTable(pages=pages, page_size=2, max_slots=3, max_length=12, window=0)
    sizes = ((3, 6), torch.int32), ((3,), torch.int64), *(((3,), torch.int32) for _ in range(4))
    table.bind(*(torch.zeros(shape, dtype=dtype) for shape, dtype in sizes))
    return table


def test_the_table_lends_pages_of_slots_and_those_that_came_back() -> None:
    table = table_of(6)
    table.hold([0, 1], [4, 6], [[], [-1, -1]])
    assert table.pages(0) == [0, 1]
    assert table.pages(1) == [0, 1, 2]
    assert table.free_pages == 3
    for page in (0, 1, 2):
        table.keep(page)
    contents = [table.content(page) for page in range(3)]
    table.free(0)
    assert table.free_pages == 3
    table.free(1)
    assert table.free_pages == 6
    table.hold([2], [8], [[0, 1]])  # back to life, and two that nobody kept
    assert table.pages(2) == [0, 1, 3, 4]
    assert [table.content(page) for page in range(3)] == contents
    table.hold([0], [4])
    assert set(table.pages(0)) == {5, 2}
    assert table.content(2) == contents[2] + 1


def test_of_kept_pages_the_end_of_the_oldest_text_goes_first() -> None:
    table = table_of(6)
    for slot in (0, 1):
        table.hold([slot], [4])
        for page in table.pages(slot):
            table.keep(page)
    older, newer = table.pages(0), table.pages(1)
    table.free(0)
    table.free(1)
    table.hold([2], [12])
    assert table.pages(2) == [4, 5, *older[::-1], *newer[::-1]]


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ([[0]], "shared: expected pages of 2 rows, got 1"),
        ([[-1], []], "shared: expected 0 to 5, got -1"),
        ([[], [6]], "shared: expected -1 to 5, got 6"),
        ([[0, 1], []], "shared: expected 0 to 1, got 2"),
    ],
)
def test_what_cannot_be_lent_is_refused(shared: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_of(6).hold([0, 1], [2, 2], shared)


def test_lending_what_nobody_has_needs_free_pages_too() -> None:
    table = table_of(3)
    table.hold([0], [4])
    table.keep(0)
    table.keep(1)
    table.free(0)
    with pytest.raises(OutOfPagesError, match="the 3 free of 3 pages are enough, got 4"):
        table.hold([0, 1], [8, 4], [[0, 1], [0, 1]])
    assert table.free_pages == 3
    table.hold([0, 1], [6, 4], [[0, 1], [0, 1]])
    assert table.free_pages == 0
