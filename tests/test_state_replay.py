"""Checkpoints of recurrent states against plain token lists, with a layer whose sums are exact integers."""

from __future__ import annotations

import random

import pytest
import torch

from foretoken.cache import ReplayLayer, StateReplay, TensorSpec
from hf_models import one_thread

__all__ = ["one_thread"]

CPU = torch.device("cpu")
MODULUS = 1_000_003
TOKEN = TensorSpec((2,), torch.int64, CPU)
LAYERS = (
    ReplayLayer((TensorSpec((3, 2), torch.int64, CPU),), (TOKEN,)),
    ReplayLayer((TensorSpec((), torch.int64, CPU), TensorSpec((4,), torch.int64, CPU)), (TOKEN, TOKEN)),
)


def embed(tokens):
    return torch.stack([tokens, tokens * 7 + 1], -1)


def step(layer, states, token):
    """A step that depends on the order of tokens; `token` is ``[b, 2]``."""
    value = token[:, 0] * 3 + token[:, 1]
    if layer == 0:
        return ((states[0] * 31 + value[:, None, None] + torch.arange(3)[:, None]) % MODULUS,)
    window = torch.cat([states[1][:, 1:], value[:, None]], 1)
    return (states[0] * 17 + value) % MODULUS, window


def make_run(layer):
    def run(inputs, states, counts=None):
        for i in range(inputs[0].shape[1]):
            behind = step(layer, states, inputs[0][:, i])
            if counts is not None:
                behind = tuple(
                    torch.where((counts > i).view(-1, *[1] * (one.ndim - 1)), one, other)
                    for one, other in zip(behind, states, strict=True)
                )
            states = behind
        return states

    return run


def expected(layer, text):
    states = tuple(torch.zeros((1, *spec.shape), dtype=spec.dtype) for spec in LAYERS[layer].states)
    return make_run(layer)((embed(torch.tensor([text], dtype=torch.int64)),), states)


def forward(
    replay,
    slots,
    lengths,
    rows,
    *,
    final=False,
    provisional=False,
    join=0,
    single=0.0,
    ragged=False,
    fail=None,
):
    """One step; the states in front of it, by layer."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[999] * (width - len(row))] for row in rows])
    plan = replay.reserve(
        slots,
        lengths,
        [len(row) for row in rows],
        num_tokens=width,
        final=final,
        provisional=provisional,
        join=join,
        ragged=ragged,
    )
    inputs = embed(tokens)
    fronts = []
    for layer, kinds in enumerate(LAYERS):
        if fail == layer:
            raise ZeroDivisionError
        run = make_run(layer)
        given = (inputs,) * len(kinds.inputs)
        states = replay.append(plan, layer, given if layer == 0 or join else None, run, single=single)
        counts, taken = replay.counts(plan, CPU), given[0]
        assert ragged or counts is None
        if plan.lead:
            taken = replay.joined(plan, layer)[0]
            front = run((taken,), states, torch.tensor(plan.behind))
            outputs = replay.outputs(plan, taken)
            for row, count in enumerate(plan.counts):
                assert torch.equal(outputs[row, :count], inputs[row, :count])
        else:
            front = states
        fronts.append(tuple(state.clone() for state in front))
        replay.keep(plan, layer, given, run((taken,), states, counts), run)
    replay.commit(plan)
    return fronts


def check_fronts(fronts, texts):
    for layer, states in enumerate(fronts):
        for row, text in enumerate(texts):
            for ours, theirs in zip(states, expected(layer, text), strict=True):
                assert torch.equal(ours[row], theirs[0]), (layer, row, len(text))


@pytest.mark.parametrize("entries", [3, 6])
@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in (4, 5))]
)
def test_random_programs_against_token_lists(entries, seed):
    """Prompts in chunks, rounds with any accepted counts and none drafted, drafts of a model taken back, rows
    that sit out, failures half way, slots reused and forked.
    """
    choose = random.Random(seed)
    slots = 4
    replay = StateReplay(LAYERS, slots=slots, entries=entries)
    texts = [[] for _ in range(slots)]
    join, single, ragged = choose.choice([0, 12]), choose.choice([0.0, 2.3]), seed % 2 == 1
    drawn = lambda count: [choose.randrange(90) for _ in range(count)]  # noqa: E731
    for _ in range(90):
        rows = sorted(choose.sample(range(slots), choose.randrange(1, slots + 1)))
        kind = choose.choice(["prompt", "round", "round", "round", "drafts", "fork", "reuse"])
        if kind == "fork":
            source, target = choose.sample(range(slots), 2)
            replay.fork(source, target)
            texts[target] = list(texts[source])
            continue
        if kind == "reuse":
            texts[rows[0]] = []
            if choose.random() < 0.5:
                replay.free(rows[0])
            continue
        lengths = [len(texts[slot]) for slot in rows]
        fronts_of = [list(texts[slot]) for slot in rows]
        if kind == "prompt":
            chunks = [drawn(choose.randrange(1, 24)) for _ in rows]
            check_fronts(forward(replay, rows, lengths, chunks, final=True, ragged=ragged), fronts_of)
            for slot, chunk in zip(rows, chunks, strict=True):
                texts[slot] += chunk
            continue
        fed = [drawn(choose.choice([1, 1, 2, 5, 21] if kind == "round" else [1, 2])) for _ in rows]
        if choose.random() < 0.15:
            with pytest.raises(ZeroDivisionError):
                forward(replay, rows, lengths, fed, fail=choose.randrange(2))
            fed = [drawn(len(row)) for row in fed]
        options = {"join": join, "single": single, "ragged": ragged}
        check_fronts(forward(replay, rows, lengths, fed, **options), fronts_of)
        if kind == "round":
            for slot, row in zip(rows, fed, strict=True):
                texts[slot] += row[: choose.randrange(1, len(row) + 1)]
            continue
        for slot, row in zip(rows, fed, strict=True):
            texts[slot] += row
        tails = [[] for _ in rows]
        for _ in range(choose.randrange(6)):
            live = sorted(choose.sample(range(len(rows)), choose.randrange(1, len(rows) + 1)))
            fronts = forward(
                replay,
                [rows[i] for i in live],
                [len(texts[rows[i]]) + len(tails[i]) for i in live],
                new := [drawn(1) for _ in live],
                provisional=True,
                **options,
            )
            check_fronts(fronts, [texts[rows[i]] + tails[i] for i in live])
            for i, row in zip(live, new, strict=True):
                tails[i] += row
        for slot, tail in zip(rows, tails, strict=True):
            texts[slot] += tail[: choose.randrange(len(tail) + 1)]
    assert replay.nbytes < 40_000


def test_accepting_everything_and_drafting_nothing_runs_no_token_twice():
    replay = StateReplay(LAYERS[:1], slots=1)
    tokens = []

    def run(inputs, states):
        tokens.append(inputs[0].shape[1])
        return make_run(0)(inputs, states)

    length = 0
    for count, accepted in [(4, 4), (1, 1), (3, 3), (3, 1), (1, 1)]:
        plan = replay.reserve([0], [length], [count])
        inputs = (embed(torch.arange(count)[None]),)
        states = replay.append(plan, 0, inputs, run)
        replay.keep(plan, 0, inputs, make_run(0)(inputs, states), run)
        replay.commit(plan)
        length += accepted
    assert tokens == [1]


def test_rejected_rounds_run_accepted_tokens_in_front_of_the_next_ones():
    replay = StateReplay(LAYERS[:1], slots=1)
    alone, leads, text = [], [], []

    def run(inputs, states):
        alone.append(inputs[0].shape[1])
        return make_run(0)(inputs, states)

    for turn in range(9):
        plan = replay.reserve([0], [len(text)], [4], join=12)
        tokens = [10 * turn + i for i in range(4)]
        inputs = (embed(torch.tensor([tokens])),)
        states = replay.append(plan, 0, inputs, run)
        leads.append(plan.lead)
        front = states
        if plan.lead:
            joined = replay.joined(plan, 0)
            front = make_run(0)((joined[0][:, : plan.lead],), states)
            inputs = joined
        assert torch.equal(front[0], expected(0, text)[0])
        replay.keep(plan, 0, inputs, make_run(0)(inputs, states), run)
        replay.commit(plan)
        text += tokens[:3]
    assert leads == [0, 3, 6, 0, 3, 6, 0, 3, 6]
    assert alone == [9, 9]


def test_rows_that_stand_differently_far_behind_are_run_token_by_token_where_that_is_less():
    for single, calls in ((0.0, [(1, 1), (1, 3), (1, 2)]), (2.0, [(3, 1), (2, 1), (1, 1)])):
        replay = StateReplay(LAYERS[:1], slots=4)
        seen = []

        def run(inputs, states, seen=seen):
            seen.append(tuple(inputs[0].shape[:2]))
            return make_run(0)(inputs, states)

        for lengths in ([0] * 4, [4, 1, 3, 2]):
            texts = [[slot * 10 + i for i in range(length)] for slot, length in enumerate(lengths)]
            tokens = torch.tensor(
                [[slot * 10 + length + i for i in range(4)] for slot, length in enumerate(lengths)]
            )
            plan = replay.reserve(range(4), lengths, [4] * 4)
            inputs = (embed(tokens),)
            states = replay.append(plan, 0, inputs, run, single=single)
            for slot, text in enumerate(texts):
                assert torch.equal(states[0][slot], expected(0, text)[0][0])
            replay.keep(plan, 0, inputs, make_run(0)(inputs, states), run)
            replay.commit(plan)
        assert seen == calls


def test_rows_that_stand_differently_far_behind_share_a_call_where_layers_leave_columns_out():
    """Accepted counts of 1 to 4, by row and round: no call for each of them."""
    replay = StateReplay(LAYERS[:1], slots=4)
    texts = [[] for _ in range(4)]
    shapes = []

    def run(inputs, states, counts=None):
        shapes.append((*inputs[0].shape[:2], None if counts is None else counts.tolist()))
        return make_run(0)(inputs, states, counts)

    leads = []
    for turn in range(6):
        lengths = [len(text) for text in texts]
        tokens = torch.tensor([[slot * 100 + turn * 10 + i for i in range(4)] for slot in range(4)])
        plan = replay.reserve(range(4), lengths, [4] * 4, join=12, ragged=True)
        inputs = (embed(tokens),)
        states = replay.append(plan, 0, inputs, run)
        taken = replay.joined(plan, 0) if plan.lead else inputs
        counts = replay.counts(plan, CPU)
        front = make_run(0)(taken, states, torch.tensor(plan.behind)) if plan.lead else states
        for slot, text in enumerate(texts):
            assert torch.equal(front[0][slot], expected(0, text)[0][0])
        replay.keep(plan, 0, inputs, make_run(0)(taken, states, counts), run)
        replay.commit(plan)
        leads.append((plan.lead, plan.columns))
        for slot in range(4):
            texts[slot] += tokens[slot, : 1 + (slot + turn) % 4].tolist()
    # A row that kept all four stands at its end: rows 3, 2, 1, 0 do so in turn.
    assert leads == [(0, 4), (3, 7), (5, 9), (6, 10), (6, 10), (6, 10)]
    assert shapes == []
    plan = replay.reserve(range(4), [len(text) for text in texts], [1] * 4, ragged=True)
    replay.append(plan, 0, (embed(torch.zeros(4, 1, dtype=torch.int64)),), run)
    assert shapes == [(3, max(plan.behind), [count for count in plan.behind if count])]


def test_going_back_to_where_nothing_is_kept():
    replay = StateReplay(LAYERS, slots=2)
    forward(replay, [1], [0], [list(range(9))], final=True)
    for length in (9, 11, 13):
        forward(replay, [1], [length], [[1, 2]])
    with pytest.raises(ValueError, match=r"slot 1: cannot begin behind 10 tokens, a state is kept behind 0"):
        forward(replay, [1], [10], [[3]])
    with pytest.raises(ValueError, match=r"slot 0: cannot begin behind 4 tokens"):
        forward(replay, [0], [4], [[3]])


@pytest.mark.parametrize("bad", [{"slots": 0}, {"slots": 1, "entries": 2}])
def test_sizes_are_checked(bad):
    with pytest.raises(ValueError, match=r"expected slots >= 1 and entries >= 3"):
        StateReplay(LAYERS, **bad)


def test_a_layer_keeps_its_dtype_and_the_slot_tells_its_state():
    spec = TensorSpec((2,), torch.bfloat16, CPU)
    replay = StateReplay([ReplayLayer((spec,), (spec,))], slots=1)
    assert replay.state(0, 0) is None
    plan = replay.reserve([0], [0], [1])
    inputs = (torch.ones(1, 1, 2),)
    states = replay.append(plan, 0, inputs, lambda inputs, states: states)
    replay.keep(plan, 0, inputs, (states[0].float() + 0.3,), lambda inputs, states: states)
    replay.commit(plan)
    tokens, kept = replay.state(0, 0)
    assert tokens == 1
    assert kept[0].dtype == torch.bfloat16
