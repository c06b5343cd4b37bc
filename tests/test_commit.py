"""``ops.commit`` against plain lists: what a verdict changes, what it leaves alone, what is refused."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import foretoken as ft
from foretoken.ops import RequestState, RoundCounters, Status, Verdict, commit, record_width
from foretoken.ops._commit import Outbox

FIELDS = 8
REASONS = {"eos": 1, "stop": 2, "length": 3}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@dataclass
class Text:
    """One request in plain Python."""

    tokens: list[int]
    limit: int
    budget: int
    eos: list[int]
    stop: list[int]
    drafts: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        self.drafts = max(min(self.budget, self.limit - len(self.tokens) - 1), 0)

    def take(self, emitted: list[int]) -> int:
        """How many of the tokens stay."""
        for kept, token in enumerate(emitted, start=1):
            self.tokens.append(token)
            self.end = 1 if token in self.eos else 2 if token in self.stop else 0
            if self.end == 0 and len(self.tokens) >= self.limit:
                self.end = 3
            if self.end:
                self.drafts = -1
                return kept
        self.drafts = max(min(self.budget, self.limit - len(self.tokens) - 1), 0)
        return len(emitted)


@dataclass
class Case:
    """A few slots of which some decode, and the verdict of a round over some of them."""

    seed: int
    slots: int = 7
    length: int = 40
    vocab: int = 12
    texts: dict[int, Text] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        dice = self.dice
        for slot in range(self.slots):
            if dice.random() < 0.2:
                continue
            prompt = [dice.randrange(self.vocab) for _ in range(dice.randint(1, 20))]
            ids = dice.sample(range(self.vocab), 5)
            self.texts[slot] = Text(
                prompt, len(prompt) + dice.randint(1, 20), dice.randint(0, 9), ids[: dice.randint(0, 2)],
                ids[2 : 2 + dice.randint(0, 3)],
            )  # fmt: skip

    def state(self, device: str) -> RequestState:
        state = RequestState.empty(self.slots, self.length, num_eos=self.dice.randint(0, 2), device=device)
        for slot, text in self.texts.items():
            state.seat(
                slot,
                text.tokens,
                max_new_tokens=text.limit - len(text.tokens),
                num_drafts=text.budget,
                eos_ids=text.eos,
                stop_ids=text.stop,
            )
        return state

    def round(self) -> tuple[list[int], list[list[int]], list[int]]:
        """Rows as slots, what is emitted in each, and how many drafts were checked."""
        rows = self.dice.sample(range(self.slots), self.dice.randint(1, self.slots))
        emitted, checked = [], []
        for slot in rows:
            text = self.texts.get(slot)
            idle = text is None or text.drafts < 0
            drafts = 0 if idle else self.dice.randint(0, text.drafts)
            checked.append(-1 if idle else drafts)
            # Of a slot in which nothing is decoded even a verdict with tokens changes nothing.
            count = self.dice.randint(0, 2) if idle else self.dice.randint(1, drafts + 1)
            emitted.append([self.dice.randrange(self.vocab) for _ in range(count)])
        return rows, emitted, checked


def verdict_of(
    emitted: list[list[int]], columns: int, device: str, dtype: torch.dtype, logprobs: bool
) -> Verdict:
    verdict = Verdict.empty(len(emitted), columns - 1, dtype=dtype, device="cpu", logprobs=logprobs)
    for b, tokens in enumerate(emitted):
        verdict.tokens[b] = torch.tensor(tokens + [-1] * (columns - len(tokens)))
        verdict.num_emitted[b] = len(tokens)
        verdict.num_accepted[b] = max(len(tokens) - 1, 0)
        verdict.status[b] = 2 * (b % 2)
    if verdict.logprobs is not None:
        verdict.logprobs[:] = -torch.rand(verdict.logprobs.shape)
    for name in ("tokens", "num_emitted", "num_accepted", "status", "logprobs"):
        value = getattr(verdict, name)
        setattr(verdict, name, value if value is None else value.to(device))
    return verdict


def int32(values: Any, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_same(state: RequestState, texts: dict[int, Text]) -> None:
    for slot, text in texts.items():
        assert state.text[slot, : len(text.tokens)].tolist() == text.tokens
        told = [int(part[slot]) for part in (state.base, state.ends, state.next_drafts)]
        assert told == [len(text.tokens), text.end, text.drafts]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(40))
def test_rounds_are_those_of_plain_lists(seed: int, device: str) -> None:
    case = Case(seed)
    state = case.state(device)
    for number in range(12):
        rows, emitted, checked = case.round()
        columns = max(1, *(len(tokens) for tokens in emitted)) + case.dice.randint(0, 2)
        logprobs = number % 3 == 0
        verdict = verdict_of(
            emitted, columns, device, torch.int64 if number % 2 else torch.int32, logprobs=logprobs
        )
        record = int32([], device).new_full((len(rows), record_width(columns, logprobs)), -9)
        before = copy.deepcopy(state)
        commit(verdict, state, num_drafts=int32(checked, device), slots=int32(rows, device), record=record)
        for b, slot in enumerate(rows):
            text = case.texts.get(slot)
            idle = text is None or text.drafts < 0
            kept = 0 if idle else text.take(emitted[b])
            line = record[b].tolist()
            count = 0 if idle else len(emitted[b])
            head = [
                max(checked[b], 0),
                count,
                max(count - 1, 0),
                kept,
                2 * (b % 2),
                0 if text is None else text.end,
                int(not idle and len(emitted[b]) - 1 == checked[b]),
                0,
            ]
            assert line[:FIELDS] == head
            assert line[FIELDS : FIELDS + columns] == emitted[b][:count] + [-1] * (columns - count)
            if verdict.logprobs is not None:
                bits = verdict.logprobs[b].cpu().view(torch.int32).tolist()
                assert line[FIELDS + columns :] == bits[:count] + [0] * (columns - count)
        assert_same(state, case.texts)
        for slot in set(range(case.slots)) - set(rows):
            for name in ("text", "base", "ends", "next_drafts"):
                assert torch.equal(getattr(state, name)[slot], getattr(before, name)[slot])


@pytest.mark.parametrize("device", DEVICES)
def test_a_long_run_ends_at_its_first_end(device: str) -> None:
    """Wider than a warp, with an end in every part of it."""
    for at in (0, 1, 31, 32, 63, 64, 100, 199, 255):
        state = RequestState.empty(1, 400, num_eos=1, num_stop=1, device=device)
        state.seat(0, [4], max_new_tokens=390, num_drafts=255, eos_ids=[1], stop_ids=[2])
        tokens = [3] * 256
        tokens[at] = 2
        tokens[-1] = 1
        commit(verdict_of([tokens], 256, device, torch.int64, False), state, num_drafts=int32([255], device))
        reason = REASONS["stop" if at < 255 else "eos"]
        tokens[-1] = 1
        assert [int(state.base), int(state.ends), int(state.next_drafts)] == [2 + at, reason, -1]
        assert not state.text[0, 2 + at :].any()


@pytest.mark.parametrize("device", DEVICES)
def test_what_only_the_device_can_see_costs_its_row_alone(device: str) -> None:
    state = RequestState.empty(3, 8, device=device)
    for slot in range(3):
        state.seat(slot, [1, 2], max_new_tokens=6)
    state.base[1] = 9
    before = copy.deepcopy(state)
    verdict = verdict_of([[5]] * 4, 1, device, torch.int64, False)
    record = torch.empty(4, record_width(1), dtype=torch.int32, device=device)
    commit(
        verdict, state, num_drafts=int32([0] * 4, device), slots=int32([3, -1, 1, 2], device), record=record
    )
    assert record[:, 1].tolist() == [0, 0, 0, 1]
    assert record[:3, 4].tolist() == [Status.BAD_ROW] * 3
    for name in ("text", "base", "ends", "next_drafts"):
        assert torch.equal(getattr(state, name)[:2], getattr(before, name)[:2])
    assert state.text[2, :3].tolist() == [1, 2, 5]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", ["num_emitted", "slots", "num_drafts", "limits", "budgets", "base", "next_drafts"]
)
def test_damaged_numbers_stay_in_their_row(name: str, device: str) -> None:
    """Any number anywhere: the other rows are those of an undamaged call, and nothing else is written."""
    for value in (-(2**63), -(2**31), -2, -1, 0, 1, 7, 8, 9, 255, 2**31 - 1, 2**63 - 1):
        results = []
        for damaged in (False, True):
            state = RequestState.empty(3, 8, device=device)
            for slot in range(3):
                state.seat(slot, [1, 2], max_new_tokens=6, num_drafts=3)
            verdict = verdict_of([[3, 4], [5, 6], [7, 8]], 2, device, torch.int64, False)
            rows = {"slots": int32([0, 1, 2], device), "num_drafts": int32([3, 3, 3], device)}
            arrays = {**rows, "num_emitted": verdict.num_emitted}
            tensor = arrays.get(name, getattr(state, name, None))
            if not torch.iinfo(tensor.dtype).min <= value <= torch.iinfo(tensor.dtype).max:
                break
            if name == "slots" and value in (0, 2):
                break  # a slot twice is the caller's fault
            if damaged:
                tensor[1] = value
            record = torch.empty(3, record_width(2), dtype=torch.int32, device=device)
            commit(verdict, state, record=record, **rows)
            results.append([part[[0, 2]].tolist() for part in (state.text, state.base, state.ends, record)])
            assert 1 <= int(state.base[1]) <= 8 or name == "base"
        assert len(results) < 2 or results[0] == results[1]


@dataclass
class Sums:
    """What `RoundCounters` say of one slot, added up in plain Python."""

    sums: list[int] = field(default_factory=lambda: [0] * 10)
    positions: list[int] = field(default_factory=lambda: [0] * 3)
    drafts: list[int] = field(default_factory=lambda: [0] * 12)

    def add(self, drafted: int, accepted: int, kept: int, moved: int, status: int) -> None:
        for bit in range(3):
            self.sums[7 + bit] += status >> bit & 1
        accepted = min(accepted, kept)
        for place, value in enumerate((1, drafted > 0, drafted, accepted, kept, drafted > accepted, moved)):
            self.sums[place] += value
        for place in range(min(accepted, len(self.positions))):
            self.positions[place] += 1
        if drafted < len(self.drafts):
            self.drafts[drafted] += 1


def a_tree(dice: random.Random, nodes: int, accepted: int) -> tuple[list[int], list[int]]:
    """Parents of a tree, and a path of at most so many of its nodes."""
    parents = [dice.randint(max(0, node - 3), node) for node in range(nodes)]
    path: list[int] = []
    while len(path) < accepted:
        last = path[-1] if path else 0
        children = [node + 1 for node, parent in enumerate(parents) if parent == last]
        if not children:
            break
        path.append(dice.choice(children))
    return parents, path


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(12))
def test_trees_and_counters_are_those_of_plain_lists(seed: int, device: str) -> None:
    """Ragged trees, padded rows, ends inside a path; wider than a warp; columns that no array has."""
    dice = random.Random(seed)
    nodes, slots = dice.choice([5, 11, 40, 90]), 6
    state = RequestState.empty(slots, 600, num_eos=1, device=device)
    for slot in range(slots):
        state.seat(slot, [4] * (slot + 1), max_new_tokens=500, num_drafts=nodes, eos_ids=[1])
    counters = RoundCounters.empty(slots, 3, 11, device=device)
    wanted = [Sums() for _ in range(slots)]
    ended: set[int] = set()
    for _ in range(5):
        rows = dice.sample(range(slots), dice.randint(1, slots))
        trees, drafted, emitted, paths = [], [], [], []
        for _slot in rows:
            count = dice.choice([-1, 0, dice.randint(1, nodes), nodes])
            parents, path = a_tree(dice, max(count, 0), dice.randint(0, nodes))
            trees.append(parents + [7] * (nodes - len(parents)))
            drafted.append(count)
            paths.append(path + [-1] * (nodes - len(path)))
            emitted.append(
                [] if count < 0 else [dice.choice([1, *range(2, 40)]) for _ in range(len(path) + 1)]
            )
        verdict = verdict_of(emitted, nodes + 1, device, torch.int64, False)
        verdict.path = int32(paths, device)
        verdict.status = int32([dice.randrange(8) for _ in rows], device)
        record = torch.empty(len(rows), record_width(nodes + 1), dtype=torch.int32, device=device)
        commit(
            verdict,
            state,
            num_drafts=int32(drafted, device),
            parents=torch.tensor(trees, device=device, dtype=dice.choice([torch.int32, torch.int64])),
            slots=int32(rows, device),
            record=record,
            counters=counters,
        )
        for b, slot in enumerate(rows):
            status = int(verdict.status[b])
            path = paths[b][: max(len(emitted[b]) - 1, 0)]
            if slot in ended or not emitted[b]:
                for bit in range(3):
                    wanted[slot].sums[7 + bit] += status >> bit & 1
                assert record[b, 6:8].tolist() == [0, 0]
                continue
            kept = emitted[b].index(1) + 1 if 1 in emitted[b] else len(emitted[b])
            if 1 in emitted[b]:
                ended.add(slot)
            moved = sum(node != at + 1 for at, node in enumerate(path))
            leaf = (path[-1] if path else 0) not in trees[b][: drafted[b]]
            assert record[b, 6:8].tolist() == [leaf, moved]
            wanted[slot].add(drafted[b], len(path), kept, moved, status)
    for slot, sums in enumerate(wanted):
        assert counters.sums[slot].tolist() == sums.sums
        assert counters.accepted_per_pos[slot].tolist() == sums.positions
        assert counters.rounds_by_drafts[slot].tolist() == sums.drafts


@pytest.mark.parametrize("device", DEVICES)
def test_records_go_to_the_outbox_place_by_place(device: str) -> None:
    """Rounds of other shapes do not disturb what has not been read."""
    pinned = device == "cuda"
    memory = torch.full((4, 12 * record_width(5, True)), -9, dtype=torch.int32, pin_memory=pinned)
    outbox = Outbox(torch.tensor([2**32 - 3 - 2**32, 0], dtype=torch.int32, device=device), memory)
    expected: list[list[int]] = []
    for number, (rows, columns, logprobs) in enumerate(
        [(12, 5, False), (1, 2, True), (9, 5, True), (4, 1, False), (12, 5, True), (2, 3, False)]
    ):
        state = RequestState.empty(rows, 40, device=device)
        for slot in range(rows):
            state.seat(slot, [slot], max_new_tokens=30, num_drafts=4)
        emitted = [[number + b] * (1 + b % columns) for b in range(rows)]
        verdict = verdict_of(emitted, columns, device, torch.int64, logprobs)
        record = torch.empty(rows, record_width(columns, logprobs), dtype=torch.int32, device=device)
        drafts = torch.full((rows,), columns - 1, dtype=torch.int32, device=device)
        commit(verdict, state, num_drafts=drafts, record=record, outbox=outbox)
        expected.append(record.flatten().tolist())
        for before in range(max(number - 3, 0), number + 1):
            place = memory[(before + 1) % 4].tolist()
            assert place[: len(expected[before])] == expected[before]
    assert outbox.state.tolist() == [3, 0]
    with pytest.raises(ValueError, match="outbox: expected a power of two of places for 22 numbers, got 3 "):
        commit(verdict, state, num_drafts=drafts, outbox=Outbox(outbox.state, memory[:3]))
    with pytest.raises(ValueError, match="for 22 numbers, got 4 for 21"):
        commit(verdict, state, num_drafts=drafts, outbox=Outbox(outbox.state, memory[:, :21]))


def test_a_full_text_takes_nothing() -> None:
    state = RequestState.empty(1, 4)
    state.seat(0, [1, 2], max_new_tokens=2)
    state.base[0] = 4
    commit(verdict_of([[5]], 1, "cpu", torch.int64, False), state, num_drafts=int32([0], "cpu"))
    assert [int(state.base), int(state.ends), int(state.next_drafts)] == [4, REASONS["length"], -1]


def test_malformed_arguments_are_refused_in_words() -> None:
    state = RequestState.empty(2, 8)
    verdict = verdict_of([[1], [2]], 1, "cpu", torch.int64, False)
    drafts = int32([0, 0], "cpu")
    record = torch.empty(2, record_width(1), dtype=torch.int32)

    def refuses(message: str, **changes) -> None:
        arguments = {"verdict": verdict, "state": state, "num_drafts": drafts, "record": record, **changes}
        with pytest.raises((TypeError, ValueError), match=message):
            commit(arguments.pop("verdict"), arguments.pop("state"), **arguments)

    refuses("num_drafts: expected int32", num_drafts=drafts.long())
    refuses("record: expected int32", record=record[:, 1:])
    refuses("slots: expected int32", slots=torch.tensor([0, 1]))
    refuses("state: expected at least 2 slots", state=RequestState.empty(1, 8))
    wrong = copy.deepcopy(state)
    wrong.text = wrong.text.long()
    refuses("state.text: expected int32", state=wrong)
    wrong = copy.deepcopy(state)
    wrong.base = wrong.base[:1]
    refuses("state.base: expected int64", state=wrong)
    wrong = copy.deepcopy(verdict)
    wrong.num_emitted = wrong.num_emitted[:1]
    refuses("verdict.num_emitted", verdict=wrong)
    wrong = copy.deepcopy(state)
    wrong.ends = wrong.next_drafts
    refuses("memory|overlap", state=wrong)
    with pytest.raises(ValueError, match="prompt and max_new_tokens: expected at most 8, got 9"):
        state.seat(0, [1, 2, 3], max_new_tokens=6)


def test_it_is_public() -> None:
    assert ft.ops.commit is commit
