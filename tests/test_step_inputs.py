"""What a round of chains feeds its forwards: a launch against tensor operations, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foretoken import _core
from foretoken.device.inputs import StepInputs, last_logits
from foretoken.drafters import ModelDrafter, NgramDrafter
from foretoken.ops import RequestState
from foretoken.sampling import Sampling
from foretoken.step import Step
from rounds_ahead import GatherModel, one_round, sessions_ahead
from toys import VOCAB, table

CPU = torch.device("cpu")
SLOTS, LENGTH = 9, 40
PLACES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]


def state_of(seed: int, place: str) -> RequestState:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, size, generator=generator).to(dtype).to(place)

    state = RequestState.empty(SLOTS, LENGTH, device=place)
    state.text.copy_(draw(0, 1000, SLOTS, LENGTH))
    state.base.copy_(draw(1, LENGTH + 1, SLOTS, dtype=torch.int64))
    state.next_drafts.copy_(draw(-1, 7, SLOTS))
    return state


def chosen(seed: int, rows: int, place: str, padded: bool) -> Tensor:
    seats = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(seed))[:rows].to(torch.int32)
    if padded:
        seats[rows // 2 :] = torch.tensor([-1, SLOTS])[torch.arange(rows - rows // 2) % 2].to(torch.int32)
    return seats.to(place)


def fields(inputs: StepInputs) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in vars(inputs).items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("cache_rows", [None, LENGTH + 5, 24, 1])
@pytest.mark.parametrize("drafts", [0, 1, 4, 40])
def test_inputs_are_those_of_tensor_operations(
    drafts: int, cache_rows: int | None, padded: bool, place: str
) -> None:
    if drafts == 0 and cache_rows is not None:
        return
    for seed in range(5):
        rows = 1 + 2 * seed % SLOTS
        state, seats = state_of(seed, place), chosen(seed, rows, place, padded)
        reach = None
        if cache_rows is not None:
            reach = torch.randint(0, LENGTH, (SLOTS,), generator=torch.Generator().manual_seed(seed))
            before, reach = reach.clone(), reach.to(place)
        inputs = StepInputs(rows, drafts, torch.device(place))
        inputs.tokens.fill_(77)
        inputs.write(state, seats, reach, cache_rows or 0)
        got = fields(inputs)
        live = ((seats >= 0) & (seats < SLOTS)).cpu()
        slots = torch.where(live, seats.cpu(), 0).long()
        text, base = state.text.cpu()[slots].long(), torch.where(live, state.base.cpu()[slots], 1)
        budget = torch.where(live, state.next_drafts.cpu()[slots].clamp_max(drafts), -1)
        if cache_rows is not None:
            budget = budget.minimum((cache_rows + 1 - base).clamp_min(0).to(torch.int32))
        last = torch.where(live, text.gather(1, (base - 1)[:, None])[:, 0], 0)
        assert torch.equal(got["slots"].long(), slots)
        assert torch.equal(got["base"], base)
        assert torch.equal(got["lengths"], base - 1)
        assert torch.equal(got["num_drafts"], budget)
        assert torch.equal(got["num_tokens"], torch.where(live, 1 + budget.clamp_min(0), 0).to(torch.int32))
        assert torch.equal(got["positions"], (base - 1)[:, None] + torch.arange(drafts + 1))
        assert torch.equal(got["tokens"][:, 0], last)
        assert not got["drafts"].any()
        if reach is None or cache_rows is None:
            continue
        held = torch.where(live, before[slots], 0).minimum(base - 1)
        lacking = (base - held).clamp(1, 2)
        first = torch.where(budget > 0, held, held.clamp_max(max(cache_rows - 2, 0)))
        places = first[:, None] + torch.arange(2)
        tokens = text.gather(1, places.clamp_max(LENGTH - 1))
        tokens = torch.where((torch.arange(2) < lacking[:, None]) & live[:, None], tokens, 0)
        assert torch.equal(got["first_tokens"], tokens)
        assert torch.equal(got["first_positions"], places)
        assert torch.equal(got["draft_lengths"][0], first)
        for k in range(1, drafts):
            inside = (base + (k - 1)).clamp_max(max(cache_rows - 1, 0))
            assert torch.equal(got["draft_lengths"][k], torch.where(budget > k, base + (k - 1), inside))
        assert torch.equal(got["draft_used"], torch.stack([lacking, torch.ones_like(base)]) * live)
        before[slots[live]] = base[live] + (drafts - 1)
        assert torch.equal(reach.cpu(), before)


def longest_match(text: list[int], low: int, high: int) -> int | None:
    """The place before the last token; of equals the most recent."""
    best, found = low - 1, None
    for place in range(len(text) - 1):
        length = 0
        while length < high and length <= place and text[place - length] == text[-1 - length]:
            length += 1
        if length >= max(best, low):
            best, found = length, place
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("vocab", [2, 4, 30])
@pytest.mark.parametrize(("low", "high"), [(1, 4), (2, 2), (3, 15)])
@pytest.mark.parametrize("length", [7, 700])
def test_ngrams_are_those_of_a_plain_search(length: int, low: int, high: int, vocab: int, place: str) -> None:
    generator = torch.Generator().manual_seed(vocab)
    for drafts in (1, 5, 40):
        state = RequestState.empty(SLOTS, length, device=place)
        state.text.copy_(torch.randint(0, vocab, (SLOTS, length), generator=generator))
        state.text[3] = 1
        state.base.copy_(torch.randint(1, length + 1, (SLOTS,), generator=generator))
        state.next_drafts.copy_(torch.tensor([5, 3, 0, 9, 4, -1, 5, 5, 5]))
        seats = torch.tensor([0, 2, 3, 5, -1, 7, SLOTS, 8], dtype=torch.int32)
        inputs = StepInputs(len(seats), drafts, torch.device(place))
        inputs.write(state, seats.to(place))
        before = fields(inputs)
        inputs.tokens[:, 1:] = -5
        inputs.draft_ngrams(state, low, high)
        got = fields(inputs)
        for b, slot in enumerate(seats.tolist()):
            text = state.text[slot, : int(state.base[slot])].tolist() if 0 <= slot < SLOTS else [0]
            found, budget = longest_match(text, low, high), int(before["num_drafts"][b])
            expected = [0] * drafts
            if found is None:
                budget = min(budget, 0)
            else:
                copied = text[found + 1 :]
                expected = [copied[i % len(copied)] for i in range(drafts)]
            assert got["drafts"][b].tolist() == expected
            assert int(got["num_drafts"][b]) == budget
            padded = int(before["num_tokens"][b]) == 0
            assert int(got["num_tokens"][b]) == (0 if padded else 1 + max(budget, 0))
        for name in ("positions", "lengths", "base", "slots"):
            assert torch.equal(got[name], before[name])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 31, 512, 5000])
def test_the_logits_of_each_rows_last_token_are_copied(width: int, dtype: torch.dtype, place: str) -> None:
    for vocab in (width, width + 3):
        logits = torch.randn(5, 3, vocab).to(place, dtype)
        law = torch.zeros(5, 4, width, dtype=dtype, device=place)
        used = torch.tensor([2, 1, 0, 3, 9], dtype=torch.int32, device=place)
        last_logits(logits, used, law[:, 2])
        columns = torch.tensor([1, 0, 0, 2, 2], device=place)
        assert torch.equal(law[:, 2], logits[torch.arange(5, device=place), columns, :width])
        last_logits(logits, None, law[:, 1])
        assert torch.equal(law[:, 1], logits[:, 2, :width])
        assert not law[:, 0].any()
        assert not law[:, 3].any()
        wide = torch.zeros(5, vocab + 2, dtype=dtype, device=place)
        last_logits(logits, used, wide)
        assert torch.equal(wide[:, :vocab], logits[torch.arange(5, device=place), columns])
        assert bool((wide[:, vocab:] == -torch.inf).all())


def test_what_does_not_fit_is_refused() -> None:
    inputs, state = StepInputs(2, 3, CPU), state_of(0, "cpu")
    with pytest.raises(ValueError, match=r"seats: expected int32 \[2\]"):
        inputs.write(state, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"reach: expected int64 \[9\]"):
        inputs.write(state, torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), 8)
    with pytest.raises(ValueError, match="reach: expected None where nothing is drafted"):
        StepInputs(2, 0, CPU).write(state, torch.zeros(2, dtype=torch.int32), torch.zeros(SLOTS).long(), 8)
    with pytest.raises(ValueError, match=r"min_ngram, max_ngram: expected 1 <= .* <= 15, got 2 and 16"):
        inputs.draft_ngrams(state, 2, 16)
    with pytest.raises(ValueError, match="out: expected at most 4 logits a row, got 5"):
        _core.last_logits(torch.zeros(1, 1, 4), None, torch.zeros(1, 5))


class Launches(TorchDispatchMode):
    """Names of the tensor operations that are more than views, outside of forwards."""

    VIEWS = ("slice", "select", "view", "unsqueeze", "expand", "alias", "detach", "transpose", "as_strided")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.inside and name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def around(self, forward: Callable[[Step], Tensor]) -> Callable[[Step], Tensor]:
        def call(step: Step) -> Tensor:
            self.inside = True
            try:
                return forward(step)
            finally:
                self.inside = False

        return call


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["none", "model", "ngram"])
def test_a_round_of_chains_launches_nothing_beside_models_and_ops(
    monkeypatch: pytest.MonkeyPatch, kind: str, sampled: bool
) -> None:
    """But for the copy of its record."""
    launches = Launches()
    logits = table(VOCAB, 3)
    drafter: Any = NgramDrafter() if kind == "ngram" else None
    if kind == "model":
        forward = launches.around(GatherModel(logits, 2, 96))
        drafter = ModelDrafter(forward, max_batch=2, vocab_size=VOCAB, max_length=96)
    session = sessions_ahead(monkeypatch)(
        max_batch=2, vocab_size=VOCAB, max_length=96, num_drafts=4, drafter=drafter
    )
    law = Sampling(seed=3) if sampled else Sampling(temperature=0.0)
    for row in range(2):
        session.admit([row + 1, 5], law, max_new_tokens=90)
    target = launches.around(GatherModel(logits, 2, 96))
    for number in range(6):
        if number == 4:
            launches.names.clear()
            with launches:
                one_round(session, target)
            assert launches.names == ["copy_"]
        else:
            one_round(session, target)
