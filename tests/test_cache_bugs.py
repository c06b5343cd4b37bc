"""Mistakes that other projects made with caches, replayed: rows 45 to 53 of the catalogue.

Rows of keys are tagged with their token and position. Controls plant the bug and see the test fail.
"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("transformers")

import foretoken as ft
from foretoken.cache import PagedCache, ReplayLayer, StateReplay, StateRing, TensorSpec
from foretoken.hf import ModuleRunner
from foretoken.ops import Status, Verdict
from hf_models import (
    VOCAB,
    WINDOW,
    greedy,
    make_step,
    one_thread,
    plain_logits,
    random_prompts,
    speculate,
    tiny_model,
)
from toys import VOCAB as TOY_VOCAB
from toys import Counting, CountingDrafter, counting_session

__all__ = ["one_thread"]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
CPU = torch.device("cpu")


def tagged(rows, positions, device="cpu"):
    """Keys ``[B, T, 1, 2]``: token and position."""
    return torch.stack([torch.tensor(rows), torch.tensor(positions)], -1).float()[:, :, None].to(device)


def paged(device="cpu", **options):
    sizes = {"pages": 40, "page_size": 4, "max_slots": 4, "max_length": 120} | options
    return PagedCache.allocate(1, heads=1, head_size=2, device=device, **sizes)


def rows_of(cache, slot):
    """Tokens and positions that the slot's committed rows hold."""
    length = cache.length(slot)
    pages = cache.pages(slot)
    keys = cache.layer(0)[0]
    return [
        tuple(int(x) for x in keys[pages[row // cache.page_size], row % cache.page_size, 0].tolist())
        for row in range(length)
    ]


def verdict_of(paths, depth, device="cpu"):
    verdict = Verdict.empty(len(paths), depth)
    verdict.path[:] = torch.tensor([[*path, *[-1] * (depth - len(path))] for path in paths])
    verdict.num_accepted[:] = torch.tensor([len(path) for path in paths])
    verdict.num_emitted[:] = verdict.num_accepted + 1
    for name in ("path", "num_accepted", "num_emitted"):
        setattr(verdict, name, getattr(verdict, name).to(device))
    return verdict


def round_of_tree(cache, slot, text, parents, tokens, path, *, tree=True):
    """One round over a random tree; its accepted tokens go behind `text`."""
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    positions = [len(text) + depth for depth in depths]
    device = cache.device
    cache.reserve([slot], len(tokens))
    keys = tagged([tokens], [positions], device)
    cache.append(0, keys, keys)
    cache.commit(verdict_of([path], len(tokens), device), tree=tree)
    text += [(tokens[node], positions[node]) for node in [0, *path]]


def random_walk(choose, parents):
    path = []
    while children := [i + 1 for i, parent in enumerate(parents) if parent == (path[-1] if path else 0)]:
        if choose.random() < 0.25:
            break
        path.append(choose.choice(children))
    return path


def assert_pages_conserved(cache, slots):
    used = [page for slot in slots for page in cache.pages(slot) if page >= 0]
    assert len(set(used)) == len(used)
    assert cache.free_pages + len(used) == cache.num_pages


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_row_45_a_scattered_path_is_no_prefix(page_size, device):
    """sglang 15360, 26866: the accepted path of a tree lies apart, and was read as if it stood in front."""
    choose = random.Random(page_size)
    cache = paged(device, page_size=page_size, pages=4 + 160 // page_size, max_length=140)
    text = []
    while len(text) < 100:
        parents = [choose.randrange(node) for node in range(1, choose.randrange(2, 12))]
        tokens = [choose.randrange(1000) for _ in range(len(parents) + 1)]
        round_of_tree(cache, 0, text, parents, tokens, random_walk(choose, parents))
        assert rows_of(cache, 0) == text
    assert [position for _, position in text] == list(range(len(text)))
    before = list(text)
    round_of_tree(cache, 0, text, [0, 0, 2], [1, 2, 3, 4], [2, 3], tree=False)  # the bug
    assert rows_of(cache, 0) != text
    assert rows_of(cache, 0)[: len(before)] == before


@pytest.mark.parametrize("device", DEVICES)
def test_row_46_pages_taken_for_drafts_come_back(device):
    """sglang-jax 1147, sglang 13826: room for drafts was never recorded; two pages a request were lost."""
    choose = random.Random(46)
    cache = paged(device)
    for _ in range(60):
        slots = sorted(choose.sample(range(4), choose.randrange(1, 4)))
        counts = [choose.randrange(10) for _ in slots]
        cache.reserve(slots, counts)
        keys = torch.zeros(len(slots), max(1, *counts), 1, 2, device=device)
        cache.append(0, keys, keys)
        if choose.random() < 0.2:
            cache.cancel()
        else:
            kept = [choose.randrange(count + 1) if count else 0 for count in counts]
            cache.commit(torch.tensor(kept, dtype=torch.int32, device=device))
        for slot in range(4):
            cache.length(slot)
        assert_pages_conserved(cache, range(4))
        for slot in range(4):
            held = [page for page in cache.pages(slot) if page >= 0]
            assert len(held) == -(-cache.length(slot) // cache.page_size)
            if cache.length(slot) > 60 or choose.random() < 0.1:
                cache.free(slot)
    for slot in range(4):
        cache.free(slot)
    assert cache.free_pages == cache.num_pages


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", [3, 4, 5])
@pytest.mark.parametrize("kept", [1, 2, 5, 6, 9])
def test_row_47_a_page_that_was_given_back_stands_in_no_table(start, kept, device):
    """TensorRT-LLM 16448: a rewind freed a block whose id others went on using. Over 0, 1 and 2 edges."""
    cache = paged(device, pages=12)
    for count, keep in ((start, start), (9, kept)):
        cache.reserve([0], count)
        keys = torch.zeros(1, count, 1, 2, device=device)
        cache.append(0, keys, keys)
        cache.commit(torch.tensor([keep], dtype=torch.int32, device=device))
    assert cache.length(0) == start + kept
    cache.reserve([1, 2], [13, 5])
    table = cache.block_table.tolist()
    cache.commit()
    ids = [page for row in table for page in row if page >= 0]
    assert len(ids) == len(set(ids))
    assert [page for page in table[0] if page >= 0] == cache.pages(0)
    assert_pages_conserved(cache, range(3))


@pytest.mark.parametrize("device", DEVICES)
def test_row_48_target_and_drafter_keep_to_their_own_pools(device):
    """TensorRT-LLM 15251: the block table of the other model was used after a switch. Pools are poisoned."""
    pools = {"target": paged(device, page_size=4), "draft": paged(device, page_size=2, pages=80)}
    poison = {"target": 7e4, "draft": -7e4}
    for name, cache in pools.items():
        for tensor in cache.caches:
            tensor.fill_(poison[name])
    choose = random.Random(48)
    text = []
    for _ in range(20):
        drafts = [choose.randrange(1000) for _ in range(4)]
        accepted = choose.randrange(5)
        for cache in pools.values():
            copy = list(text)
            round_of_tree(cache, 1, copy, [0, 1, 2, 3], [5, *drafts], list(range(1, accepted + 1)))
        text = copy
        for cache in pools.values():
            assert rows_of(cache, 1) == text
    for name, cache in pools.items():
        other = poison["draft" if name == "target" else "target"]
        assert not any(bool((tensor == other).any()) for tensor in cache.caches)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen3_next"])
def test_row_49_rows_accept_different_counts(name):
    """mlx-vlm 1144, 1155: one advance for the whole batch put the others' rotations off. Counts 0 to 3."""
    model = tiny_model(name)
    prompts = random_prompts(9, 6, 2, 1)
    texts = [greedy(model, prompt, 18) for prompt in prompts]
    plain = [plain_logits(model, text) for text in texts]
    runner = ModuleRunner(model, max_batch=4, max_length=40)

    def check(row, position, logits):
        torch.testing.assert_close(logits, plain[row][position], rtol=1e-3, atol=3e-4)

    speculate(runner, texts, [len(prompt) for prompt in prompts], check)


def state_stores():
    """Both stores of a sum of powers: feeds rows of tokens, keeps some, and says what was committed."""
    number = TensorSpec((), torch.int64, CPU)

    def power(inputs, states):
        for i in range(inputs[0].shape[1]):
            states = ((states[0] * 31 + inputs[0][:, i]) % 65537,)
        return states

    def by_ring():
        ring = StateRing([number], slots=1, nodes=5)

        def turn(length, tokens, accepted):
            ring.reserve(1, len(tokens))
            front = int(ring.take(0)[0, 0])
            for node, token in enumerate(tokens):
                ring.append(0, (ring.take(0)[:, node] * 31 + token) % 65537, node)
            ring.commit(num_accepted=torch.tensor([accepted]))
            return front

        return turn

    def by_replay():
        replay = StateReplay([ReplayLayer((number,), (number,))], slots=1)

        def turn(length, tokens, accepted):
            plan = replay.reserve([0], [length], [len(tokens)])
            inputs = (torch.tensor([tokens]),)
            states = replay.append(plan, 0, inputs, power)
            front = int(states[0])
            replay.keep(plan, 0, inputs, power(inputs, states), power)
            replay.commit(plan)
            return front

        return turn

    return {"ring": by_ring(), "replay": by_replay()}


@pytest.mark.parametrize("store", ["ring", "replay"])
def test_row_50_a_round_without_drafts_reads_the_state_of_the_last_accepted(store):
    """vllm 39273, 40738, 52942: after a round that accepted drafts, one without read the state of node 0."""
    turn = state_stores()[store]
    text, fronts, stale = [], [], 0
    for drafts, accepted in [(4, 3), (0, 0), (2, 2), (0, 0), (0, 0), (4, 0), (0, 0), (4, 4), (1, 0), (0, 0)]:
        tokens = [len(text) + 1 + i for i in range(drafts + 1)]
        fronts.append(turn(len(text), tokens, accepted))
        expected = 0
        for token in text:
            expected = (expected * 31 + token) % 65537
        assert fronts[-1] == expected
        root_alone = expected * 31 + tokens[0]  # the state that the bug goes on from
        text += tokens[: accepted + 1]
        after = 0
        for token in text:
            after = (after * 31 + token) % 65537
        stale += root_alone % 65537 != after
    assert stale == sum(accepted > 0 for accepted in (3, 2, 4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [-(2**31), -1, 4, 5, 2**31 - 1])
def test_row_51_an_accepted_count_is_no_index_before_it_was_checked(count, device):
    """vllm 50021: an unbounded count was used as the number of a state; the kernel crashed."""
    ring = StateRing([TensorSpec((3,), torch.float32, torch.device(device))], slots=2, nodes=4)
    ring.reserve(2, 4)
    ring.append(0, torch.arange(24.0, device=device).view(2, 4, 3))
    ring.commit(num_accepted=torch.tensor([count, 2], dtype=torch.int32, device=device))
    assert ring.status.tolist() == [Status.BAD_ROW, 0]
    assert ring.current.tolist() == [0, 3]
    cache = paged(device)
    cache.reserve([0, 1], 4)
    keys = torch.zeros(2, 4, 1, 2, device=device)
    cache.append(0, keys, keys)
    status = cache.commit(torch.tensor([count if count != 4 else 5, 2], dtype=torch.int32, device=device))
    assert status.tolist() == [Status.BAD_ROW, 0]
    assert (cache.length(0), cache.length(1)) == (0, 2)


@pytest.mark.parametrize("context", range(WINDOW - 1, WINDOW + 7))
def test_row_52_a_full_window_goes_back(context):
    """mlx 1914, 1427, transformers 48280: in a full window, rejected drafts had driven live rows out."""
    model = tiny_model("mistral_window")
    text = random_prompts(context + 12)[0]
    plain = plain_logits(model, text)
    runner = ModuleRunner(model, max_batch=1, max_length=40)
    for kept in range(4):
        runner(make_step([text[:context]], [0], [0], kind="prefill"))
        wrong = [(token + 1) % (VOCAB - 3) + 3 for token in text[context + 1 + kept : context + 4]]
        runner(make_step([text[context : context + 1 + kept] + wrong], [context], [0]))
        at = context + 1 + kept
        logits = runner(make_step([text[at : at + 4]], [at], [0]))
        torch.testing.assert_close(logits[0], plain[at : at + 4], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_row_52_pages_of_a_window_are_there_after_every_rejection(device):
    window, drafts = 8, 4
    for context in range(window - 1, window + 2 * drafts + 1):
        for kept in range(1, drafts + 2):
            cache = paged(device, window=window)
            text = [(token, token) for token in range(context)]
            keys = tagged([list(range(context))], [list(range(context))], device)
            cache.reserve([0], context)
            cache.append(0, keys, keys)
            cache.commit()
            positions = list(range(context, context + drafts + 1))
            keys = tagged([positions], [positions], device)
            cache.reserve([0], drafts + 1)
            cache.append(0, keys, keys)
            cache.commit(torch.tensor([kept], dtype=torch.int32, device=device))
            assert cache.length(0) == context + kept
            text += [(position, position) for position in positions[:kept]]
            pages = cache.pages(0)
            # What the next query, at position length, sees beside itself.
            for row in range(max(0, len(text) + 1 - window), len(text)):
                page = pages[row // cache.page_size]
                assert page >= 0
                held = cache.layer(0)[0][page, row % cache.page_size, 0]
                assert tuple(int(x) for x in held.tolist()) == text[row]


@pytest.mark.parametrize("device", DEVICES)
def test_row_53_a_rejection_goes_back_and_does_not_start_over(device):
    """aprender 2014: "reset" where "roll back" was meant left the verifier a nearly empty context."""
    cache = paged(device)
    ring = StateRing([TensorSpec((), torch.int64, torch.device(device))], slots=1, nodes=4)
    for length in range(1, 7):
        cache.reserve([0], 4)
        keys = torch.zeros(1, 4, 1, 2, device=device)
        cache.append(0, keys, keys)
        cache.commit(torch.tensor([1], dtype=torch.int32, device=device))  # the root stays, no draft does
        ring.reserve(1, 4)
        for node in range(4):
            ring.append(0, ring.take(0)[:, node] + 1, node)
        ring.commit(num_accepted=torch.tensor([0], dtype=torch.int32, device=device))
        assert cache.length(0) == length
        assert ring.committed(0).tolist() == [length]


def test_row_53_the_session_keeps_its_length_after_rejected_rounds():
    session = counting_session(drafter=CountingDrafter(wrong_from=1), num_drafts=4)
    request = session.admit([3, 4, 5], ft.Sampling(temperature=0.0), max_new_tokens=24)
    forward = Counting()
    while (step := session.plan()) is not None:
        session.commit(None if step.kind == "prefill" else forward(step))
        if request.finish_reason is None:
            assert int(session.slot_lengths[0]) == len(session.tokens(request)) - 1
    counters = session.metrics.counters
    assert counters.draft_tokens > counters.accepted_tokens > 0
    assert session.generated(request) == [(6 + i) % TOY_VOCAB for i in range(24)]
