"""Trees through Hugging Face models: nodes have the logits of their path, caches are what a chain leaves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import foretoken as ft
import hf_toys
from foretoken import ops
from foretoken.device import places
from foretoken.hf import ModuleRunner, UnsupportedModelError, generate
from foretoken.hf.probe import moved
from foretoken.session import Step
from foretoken.step import StepTree
from foretoken.tree import TreePlan
from hf_models import (
    FAMILIES,
    VOCAB,
    WINDOW,
    make_step,
    one_thread,
    plain_logits,
    poison,
    random_prompts,
    tiny_model,
)

__all__ = ["one_thread"]

CLOSE = {"rtol": 1e-3, "atol": 2e-4}
RANDOM_WEIGHTS = (
    "llama",
    "qwen3",
    "gemma",
    "mistral_window",
    "gemma3_window",
    "gpt_oss_window_sinks",
    "gpt2",
    "falcon",
)


class Grown:
    """A tree with a path in it whose nodes stand anywhere, among other tokens."""

    def __init__(self, pick: random.Random, path: Sequence[int], nodes: int) -> None:
        self.path = sorted(pick.sample(range(1, nodes + 1), len(path)))
        self.tokens: list[int] = []
        self.parents: list[int] = []
        others = [token for token in range(3, VOCAB) if token not in path]
        for node in range(1, nodes + 1):
            if node in self.path:
                at = self.path.index(node)
                self.tokens.append(path[at])
                self.parents.append(self.path[at - 1] if at else 0)
            else:
                self.tokens.append(others[(17 * node + pick.randrange(3)) % len(others)])
                self.parents.append(pick.randrange(node))

    def text_to(self, node: int) -> list[int]:
        found: list[int] = []
        while node > 0:
            found.insert(0, self.tokens[node - 1])
            node = self.parents[node - 1]
        return found


def tree_step(
    roots: Sequence[int], trees: Sequence[Grown], lengths: Sequence[int], slots: Sequence[int]
) -> Step:
    """A step as a session hands it out; its words come from `ops.tree_index`."""
    step = make_step([[root, *tree.tokens] for root, tree in zip(roots, trees, strict=True)], lengths, slots)
    counts = [len(tree.tokens) for tree in trees]
    parents = [[*tree.parents, *[0] * (max(counts) - len(tree.parents))] for tree in trees]
    index = ops.tree_index(
        torch.tensor(parents), num_drafts=torch.tensor(counts, dtype=torch.int32), lengths=step.lengths
    )
    for row, count in enumerate(counts):
        for node in range(count + 1, max(counts) + 1):
            index.ancestors[row, node, node // 64] = 1 << node % 64
        index.positions[row, count + 1 :] = lengths[row]
    step.positions = index.positions
    step.tree = StepTree(step.lengths, index.ancestors)
    return step


def move(runner: ModuleRunner, step: Step, trees: Sequence[Grown], accepted: Sequence[int]) -> None:
    paths = torch.full((len(trees), step.tokens.shape[1] - 1), -1, dtype=torch.int32)
    for row, tree in enumerate(trees):
        paths[row, : len(tree.path)] = torch.tensor(tree.path)
    runner.compact(step.slots, step.lengths, paths, torch.tensor(accepted, dtype=torch.int32))


@pytest.fixture
def as_on(monkeypatch):
    """Runs steps as on the host, or as on a device: with lengths and trees that nobody reads."""

    def run(place: str, runner: ModuleRunner) -> Any:
        return (lambda step: runner(moved(step, torch.device("cpu")))) if place == "device" else runner

    monkeypatch.setattr(places, "AHEAD_ON", {"cpu", "cuda"})
    return run


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("name", RANDOM_WEIGHTS)
def test_nodes_have_the_logits_of_their_path(as_on, name, place):
    """Teacher-forced: ragged trees in holes of the batch, compacted, poisoned behind, and gone on from."""
    model = tiny_model(name)
    texts = random_prompts(34, 31, 28)
    runner = ModuleRunner(model, max_batch=4, max_length=60)
    forward = as_on(place, runner)
    slots, lengths, pick = [0, 1, 3], [9, 0, 14], random.Random(0)
    runner(make_step([texts[0][:9], texts[2][:14]], [0, 0], [0, 3], kind="prefill"))
    for _ in range(3):
        trees = [
            Grown(pick, text[length + 1 : length + 1 + pick.randint(0, 4)], pick.randint(5, 9))
            for text, length in zip(texts, lengths, strict=True)
        ]
        step = tree_step([t[n] for t, n in zip(texts, lengths, strict=True)], trees, lengths, slots)
        logits = forward(step)
        for row, (text, length, tree) in enumerate(zip(texts, lengths, trees, strict=True)):
            for node in range(len(tree.tokens) + 1):
                plain = plain_logits(model, text[: length + 1] + tree.text_to(node))[-1]
                torch.testing.assert_close(logits[row, node], plain, **CLOSE)
        move(runner, step, trees, [len(tree.path) for tree in trees])
        lengths = [length + 1 + len(tree.path) for length, tree in zip(lengths, trees, strict=True)]
        for slot, length in zip(slots, lengths, strict=True):
            poison(runner, slot, length)


def test_bug_45_accepted_paths_become_the_rows_of_sequential_decoding():
    """sglang 15360, 26866: the path lay scattered, and what read the cache took it for a dense prefix."""
    model, pick = tiny_model("llama"), random.Random(5)
    text = random_prompts(40)[0]
    for nodes in (1, 5, 12, 40, 63, 64, 80):
        length, count = pick.choice([0, 1, 15, 17]), pick.randint(0, min(nodes, 6))
        tree = Grown(pick, text[length + 1 : length + 1 + count], nodes)
        rows = length + 1 + count
        wide = ModuleRunner(model, max_batch=1, max_length=60 + nodes)
        wide(make_step([text[:rows]], [0], [0]))
        expected = [part[0, :, :rows] for layer in wide.cache.layers for part in (layer.keys, layer.values)]
        runner = ModuleRunner(model, max_batch=1, max_length=60 + nodes)
        if length:
            runner(make_step([text[:length]], [0], [0], kind="prefill"))
        step = tree_step([text[length]], [tree], [length], [0])
        runner(step)
        move(runner, step, [tree], [count])
        found = [part[0, :, :rows] for layer in runner.cache.layers for part in (layer.keys, layer.values)]
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain, **CLOSE)


def test_rows_that_are_in_place_are_not_touched():
    model = tiny_model("llama")
    runner = ModuleRunner(model, max_batch=2, max_length=40)
    before = [layer.keys.clone().normal_() for layer in runner.cache.layers]
    with torch.inference_mode():
        for layer, keys in zip(runner.cache.layers, before, strict=True):
            layer.keys.copy_(keys)
    path = torch.tensor([[1, 2, 5, 7], [1, 2, 3, -1]])
    runner.compact(torch.tensor([0, 1]), torch.tensor([10, 3]), path, torch.tensor([4, 3]))
    for layer, keys in zip(runner.cache.layers, before, strict=True):
        keys[0, :, 13], keys[0, :, 14] = keys[0, :, 15].clone(), keys[0, :, 17].clone()
        assert torch.equal(layer.keys, keys)


@pytest.mark.parametrize("name", ["mistral_window", "gemma3_window", "gpt_oss_window_sinks"])
def test_bug_52_windows_that_fill_up_while_trees_are_rejected_at_every_depth(name):
    """mlx 1914, 1427; hf 48280: full windows could not be rewound, masks were narrower than the keys."""
    model, depth = tiny_model(name), 3
    text = random_prompts(WINDOW + 5 * depth)[0]
    plain = plain_logits(model, text)
    runner = ModuleRunner(model, max_batch=1, max_length=60)
    pick = random.Random(3)
    for length in range(WINDOW - 1, WINDOW + 2 * depth + 1):
        for accepted in range(depth + 1):
            runner.reset()
            runner(make_step([text[:length]], [0], [0], kind="prefill"))
            tree = Grown(pick, text[length + 1 : length + 1 + depth], 2 * depth + 3)
            step = tree_step([text[length]], [tree], [length], [0])
            logits = runner(step)[0]
            for at, node in enumerate([0, *tree.path]):
                torch.testing.assert_close(logits[node], plain[length + at], **CLOSE)
            move(runner, step, [tree], [accepted])
            left = length + 1 + accepted
            poison(runner, 0, left)
            again = runner(make_step([text[left : left + 2]], [left], [0]))[0]
            torch.testing.assert_close(again, plain[left : left + 2], **CLOSE)


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("name", ["mistral_window", "gemma3_window"])
def test_windows_count_positions_along_a_path_and_not_slots(as_on, name, place):
    """Trees deeper than the window: nodes between those of a path take no room in it."""
    model = tiny_model(name)
    text = random_prompts(WINDOW + 8)[0]
    plain = plain_logits(model, text)
    for length in (0, 2):
        runner = ModuleRunner(model, max_batch=1, max_length=60)
        runner(make_step([text[:2]], [0], [0], kind="prefill"))
        tree = Grown(random.Random(1), text[length + 1 : length + 5 + WINDOW], 2 * WINDOW + 4)
        logits = as_on(place, runner)(tree_step([text[length]], [tree], [length], [0]))[0]
        for at, node in enumerate([0, *tree.path]):
            torch.testing.assert_close(logits[node], plain[length + at], **CLOSE)


@pytest.mark.parametrize("name", ["mpt", "bloom", "falcon_alibi", "llama4_chunks"])
def test_models_that_cannot_be_run_on_trees_say_so(name):
    runner = ModuleRunner(tiny_model(name), max_batch=1, max_length=40)
    with pytest.raises(
        UnsupportedModelError, match=r"cannot verify draft trees: (its forward|it is run through)"
    ):
        runner.check_trees()


def test_positions_that_a_model_makes_up_itself_are_found_out():
    """A forward that counts slots in place of the positions it is told."""
    model = tiny_model("llama")
    inner = model.model.forward

    def counting(*args, position_ids=None, past_key_values=None, **kwargs):
        start = past_key_values.get_seq_length()
        position_ids = torch.arange(position_ids.shape[1])[None] + start
        return inner(*args, position_ids=position_ids, past_key_values=past_key_values, **kwargs)

    runner = ModuleRunner(model, max_batch=1, max_length=40)
    model.model.forward = counting
    with pytest.raises(UnsupportedModelError, match="cannot verify draft trees: logits differ"):
        runner.check_trees()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.mode != "rows"])
def test_families_can_verify_trees(name):
    if name != "mpt":
        ModuleRunner(tiny_model(name), max_batch=2, max_length=40).check_trees()


# ---- generate ----


@pytest.fixture(scope="module")
def toy():
    return hf_toys.llama()


@pytest.fixture(scope="module")
def repeating():
    """Ragged prompts that say everything twice, so that n-grams find something, with other continuations."""
    ids = hf_toys.prompts(3, 6)
    other = ids.clone()
    other[:, 3::3] = other[:, 3::3] % 50 + 5
    whole = torch.cat([ids, other, ids[:, :4], other], 1)
    mask = torch.ones_like(whole)
    for row in (1, 2):
        whole[row, : 3 * row], mask[row, : 3 * row] = hf_toys.PAD, 0
    return {"input_ids": whole, "attention_mask": mask}


def same(model: Any, inputs: dict[str, Any], drafter: Any = "ngram", **options: Any) -> Any:
    plan = options.pop("tree", TreePlan(nodes=12, branches=3, depth=4))
    expected = model.generate(**inputs, **options)
    options["return_dict_in_generate"] = True
    found = generate(model, **inputs, drafter=drafter, tree=plan, **options)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found.sequences, expected)
    return found


def test_greedy_text_with_ngram_trees_is_that_of_the_model(toy, repeating):
    figures = same(toy, repeating, max_new_tokens=60).foretoken
    assert figures.why_on_host is not None
    assert figures.counters.accepted_tokens > 10
    assert len(figures.counters.accepted_tokens_per_pos) == 4


def test_greedy_text_with_model_trees_is_that_of_the_model(toy, repeating):
    draft = hf_toys.disturbed(toy, 0.05)
    for plan in (TreePlan(12, 3, 4), TreePlan(16, 4, 5)):
        counters = same(toy, repeating, draft, max_new_tokens=40, tree=plan).foretoken.counters
        assert counters.accepted_tokens > 40
    same(toy, repeating, draft, max_new_tokens=20, repetition_penalty=1.3)
    chain = generate(
        toy, **repeating, drafter=draft, num_drafts=5, max_new_tokens=40, return_dict_in_generate=True
    )
    assert counters.rounds < chain.foretoken.counters.rounds


def test_drafters_with_windows_and_tables_of_positions():
    """Their levels are fed behind each other, some rows with less room than others."""
    target = tiny_model("mistral_window")
    ids = torch.tensor(random_prompts(20, 20))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("mistral_window", "gemma3_window", "gpt2"):
        draft = tiny_model(name, num_hidden_layers=1) if name != "gpt2" else tiny_model(name)
        same(target, inputs, draft, max_new_tokens=40)
    twin = generate(
        target,
        **inputs,
        drafter=target,
        tree=TreePlan(9, 3, 3),
        max_new_tokens=40,
        return_dict_in_generate=True,
    )
    # The likeliest child of the root is in every tree.
    counters = twin.foretoken.counters
    assert counters.accepted_tokens_per_pos[0] == counters.drafts


def test_greedy_text_of_the_pair_with_trees_is_that_without(record_property):
    """Up to near ties, where the two likeliest tokens are as close as two forwards are to each other."""
    target, draft, tokenizer = ft.pair.load_target(), ft.pair.load_draft(), ft.pair.load_tokenizer()
    near_ties = 0
    for prompt in ft.pair.prompts()[2:4]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        plain = generate(target, ids, max_new_tokens=16, do_sample=False)[0]
        for drafter, plan in (
            ("ngram", TreePlan()),
            (draft, TreePlan()),
            (draft, TreePlan(nodes=12, branches=3, depth=4, draw="without_replacement")),
        ):
            found = generate(target, ids, drafter=drafter, tree=plan, max_new_tokens=16, do_sample=False)[0]
            parted = (found != plain).nonzero()
            if len(parted):
                near_ties += 1
                best = target(plain[None, : int(parted[0])]).logits[0, -1].topk(2).values
                assert float(best[0] - best[1]) < 1e-3
    record_property("near_ties", near_ties)


def test_processors_see_the_path_of_every_node(toy, repeating):
    for options in (
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 3},
        {"repetition_penalty": 1.1, "bad_words_ids": [[7], [9, 11]], "min_new_tokens": 9},
    ):
        same(toy, repeating, max_new_tokens=30, **options)


def test_scores_and_logits_are_those_of_the_emitted_path(toy, repeating):
    options = {"max_new_tokens": 30, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    expected = toy.generate(**repeating, return_dict_in_generate=True, **options)
    found = same(toy, repeating, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(
        (*found.scores, *found.logits), (*expected.scores, *expected.logits), strict=True
    ):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-3)


def test_texts_that_fill_their_slot_have_room_for_trees(toy, repeating):
    """The last rounds, too, draft whole trees: slots are wider than the text."""
    one = {name: value[:1] for name, value in repeating.items()}
    same(toy, one, max_new_tokens=20, tree=TreePlan(nodes=40, branches=4, depth=3))


def test_a_table_of_positions_ends_where_it_does():
    model = hf_toys.gpt2(n_positions=40)
    ids = hf_toys.prompts(1, 6).repeat(1, 3)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    same(model, inputs, max_new_tokens=23)


def test_attached_models_take_trees(toy, repeating):
    expected = toy.generate(**repeating, max_new_tokens=20)
    with ft.hf.attach(toy, drafter="ngram", tree=TreePlan(nodes=8, branches=2, depth=4)):
        found = toy.generate(**repeating, max_new_tokens=20)
    assert torch.equal(found, expected)


def test_what_is_no_plan_is_refused(toy, repeating):
    with pytest.raises(TypeError, match=r"tree: expected a TreePlan, .* or None, got 16"):
        generate(toy, **repeating, drafter="ngram", tree=16, max_new_tokens=5)


def test_auto_is_the_same_text_and_chains_where_there_are_no_trees(toy, repeating):
    draft = hf_toys.disturbed(toy, 0.05)
    for drafter in ("ngram", draft):
        counters = same(toy, repeating, drafter, max_new_tokens=40, tree="auto").foretoken.counters
        assert len(counters.accepted_tokens_per_pos) == 5
    model = tiny_model("bloom")
    figures = same(model, repeating, max_new_tokens=20, tree="auto").foretoken
    assert figures.counters.draft_tokens <= 5 * figures.counters.drafts


def test_models_without_trees_are_refused_before_the_first_round(repeating):
    model = tiny_model("bloom")
    with pytest.raises(UnsupportedModelError, match="cannot verify draft trees"):
        generate(model, **repeating, drafter="ngram", tree=TreePlan(), max_new_tokens=5)
