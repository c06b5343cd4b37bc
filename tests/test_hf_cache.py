"""SlotCache against a plain Python list, and the few things transformers asks of a cache."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Cache

from foretoken.hf import LayerShape, SlotCache
from hf_models import one_thread

__all__ = ["one_thread"]

CPU = torch.device("cpu")
SHAPE = LayerShape(heads=2, key_size=4, value_size=4, dtype=torch.float32, device=CPU)
LATENT = LayerShape(heads=1, key_size=6, value_size=2, dtype=torch.float64, device=CPU)


def states(shape, rows, num_tokens, start):
    """Keys and values ``[B, G, T, D]`` in the layout of modelling code, all different."""
    result = []
    for size, sign in ((shape.key_size, 1), (shape.value_size, -1)):
        count = rows * num_tokens * shape.heads * size
        numbers = torch.arange(start, start + count, dtype=shape.dtype) * sign
        result.append(numbers.view(rows, num_tokens, shape.heads, size).transpose(1, 2))
    return result


def seen_rows(plan, keys, row, count):
    """The first `count` cache rows of a step's row, out of what `update` returned."""
    if len(plan.spans) == 1:
        return keys[row, :, :count]
    span = next(span for span in plan.spans if span.rows.start <= row < span.rows.stop)
    return keys[span.slots][row - span.rows.start, :, :count]


STEP = st.tuples(
    st.sets(st.integers(0, 3), min_size=1), st.integers(1, 3), st.lists(st.integers(0, 9), min_size=4)
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEP, min_size=1, max_size=8), slack=st.sampled_from([0.0, 3.0, float("inf")]))
def test_any_walk_of_appends_and_rollbacks_is_a_list_per_slot(steps, slack):
    shapes = [SHAPE, LATENT, SHAPE]
    cache = SlotCache(shapes, max_batch=4, max_length=12)
    cache._slack = slack
    model = [[[] for _ in range(4)] for _ in shapes]
    for number, (chosen, num_tokens, cuts) in enumerate(steps):
        slots = sorted(chosen)
        lengths = [min(cuts[slot], len(model[0][slot]), 12 - num_tokens) for slot in slots]
        plan = cache.plan(slots=slots, lengths=lengths, num_tokens=num_tokens)
        for layer, shape in enumerate(shapes):
            keys, values = states(shape, len(slots), num_tokens, 1000 * number)
            got_keys, got_values = cache.update(keys, values, layer)
            for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
                kept = model[layer][slot]
                del kept[length:]
                kept.extend((keys[row, :, i], values[row, :, i]) for i in range(num_tokens))
                expected = torch.stack([key for key, _ in kept], 1)
                torch.testing.assert_close(seen_rows(plan, got_keys, row, len(kept)), expected)
                expected = torch.stack([value for _, value in kept], 1)
                torch.testing.assert_close(seen_rows(plan, got_values, row, len(kept)), expected)
        assert cache.get_seq_length() == max(span.end for span in plan.spans) - num_tokens


@pytest.mark.parametrize("slots", [[2], [1, 2], [0, 1, 2, 3]])
def test_neighbouring_slots_are_read_without_a_copy(slots):
    cache = SlotCache([SHAPE] * 2, max_batch=4, max_length=12)
    cache.plan(slots=slots, lengths=[5] * len(slots), num_tokens=2)
    keys, values = cache.update(*states(SHAPE, len(slots), 2, 1), 1)
    assert keys.shape == (len(slots), 2, 7, 4)
    assert keys.data_ptr() == cache.layers[1].keys[slots[0]].data_ptr()
    assert values.data_ptr() == cache.layers[1].values[slots[0]].data_ptr()


def test_slots_with_a_hole_are_read_without_a_copy():
    cache = SlotCache([SHAPE], max_batch=4, max_length=12)
    plan = cache.plan(slots=[0, 3], lengths=[5, 6], num_tokens=1)
    keys, _ = cache.update(*states(SHAPE, 2, 1, 1), 0)
    assert keys.data_ptr() == cache.layers[0].keys.data_ptr()
    assert [(span.slots, span.end) for span in plan.spans] == [(slice(0, 1), 6), (slice(3, 4), 7)]


def test_stacked_rows_for_attention_that_is_not_ours():
    cache = SlotCache([SHAPE], max_batch=4, max_length=12)
    plan = cache.plan(slots=[0, 3], lengths=[5, 6], num_tokens=1, stacked=True)
    keys, values = states(SHAPE, 2, 1, 1)
    got_keys, _ = cache.update(keys, values, 0)
    assert got_keys.shape == (2, 2, 7, 4)
    torch.testing.assert_close(got_keys[0, :, 5], keys[0, :, 0])
    torch.testing.assert_close(got_keys[1, :, 6], keys[1, :, 0])
    mask = plan.stacked_mask(torch.float32, CPU)
    assert (mask[:, 0, 0] == 0).tolist() == [[True] * 6 + [False], [True] * 7]


def test_padding_past_the_end_of_a_slot_touches_no_other_slot():
    cache = SlotCache([SHAPE], max_batch=3, max_length=6)
    cache.plan(slots=[0, 1, 2], lengths=[0, 0, 0], num_tokens=6)
    first = states(SHAPE, 3, 6, 1)
    cache.update(*first, 0)
    cache.plan(slots=[1], lengths=[5], num_tokens=4, used=[1])
    cache.update(*states(SHAPE, 1, 4, 500), 0)
    torch.testing.assert_close(cache.layers[0].keys[0, :, :6], first[0][0])
    torch.testing.assert_close(cache.layers[0].keys[2, :, :6], first[0][2])
    torch.testing.assert_close(cache.layers[0].keys[1, :, :5], first[0][1, :, :5])
    assert cache.layers[0].keys[1, 0, 5, 0] == 500


def test_tokens_past_the_end_are_refused_before_anything_is_written():
    cache = SlotCache([SHAPE], max_batch=2, max_length=6)
    with pytest.raises(ValueError, match=r"slot 1: expected at most max_length = 6 rows, got 5 and 2 more"):
        cache.plan(slots=[0, 1], lengths=[0, 5], num_tokens=2)
    assert not cache.layers[0].keys.any()


@pytest.mark.parametrize(("max_batch", "max_length"), [(0, 8), (1, 0)])
def test_sizes_are_checked(max_batch, max_length):
    with pytest.raises(ValueError, match=f"at least 1, got {max_batch} and {max_length}"):
        SlotCache([SHAPE], max_batch=max_batch, max_length=max_length)


PATHS = st.lists(st.sets(st.integers(1, 7)).map(sorted), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    paths=PATHS, lengths=st.lists(st.integers(0, 4), min_size=4, max_size=4), order=st.permutations(range(4))
)
def test_an_accepted_path_is_a_list_too(paths, lengths, order):
    """Layers of two shapes, slots in any order, one of them not in the round; nothing else changes."""
    cache = SlotCache([SHAPE, LATENT, SHAPE], max_batch=4, max_length=12)
    for layer in cache.layers:
        for rows in (layer.keys, layer.values):
            rows.copy_(torch.randn(rows.shape, dtype=rows.dtype))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    slots = order[:3]
    path = torch.full((3, 7), -1, dtype=torch.int32)
    for row, slot in zip(path, slots, strict=True):
        row[: len(paths[slot])] = torch.tensor(paths[slot], dtype=torch.int32)
    counts = torch.tensor([len(paths[slot]) for slot in slots])
    for _ in range(2):
        cache.compact(torch.tensor(slots), torch.tensor([lengths[slot] for slot in slots]), path, counts)
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            for rows, old in ((layer.keys, keys), (layer.values, values)):
                new = old.clone()
                for slot in slots:
                    for place, node in enumerate(paths[slot], start=lengths[slot] + 1):
                        new[slot, :, place] = old[slot, :, lengths[slot] + node]
                assert torch.equal(rows, new)
                old.copy_(new)


def test_buffers_are_zero_so_that_what_is_masked_stays_finite():
    cache = SlotCache([SHAPE], max_batch=2, max_length=6)
    assert not cache.layers[0].keys.any()
    assert not cache.layers[0].values.any()
    cache.plan(slots=[0], lengths=[0], num_tokens=2)
    cache.update(*states(SHAPE, 1, 2, 1), 0)
    cache.reset()
    assert not cache.layers[0].keys.any()


def test_what_transformers_asks():
    cache = SlotCache([SHAPE, LATENT], max_batch=2, max_length=6)
    cache.plan(slots=[0, 1], lengths=[1, 3], num_tokens=2)
    assert isinstance(cache, Cache)
    assert len(cache) == 2
    assert cache.get_seq_length() == 3
    assert cache.get_query_offset() == 3
    assert cache.get_mask_sizes(2, 0) == (5, 0)
    assert cache.get_max_length() == 6
    assert cache.is_compileable is False
    assert cache.is_sliding == cache.is_linear == cache.is_dummy == [False, False]
