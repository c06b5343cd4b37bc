"""Hugging Face models over a pool of pages: ids are those of slots, no page is lost, and refusals."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import foretoken as ft
import hf_toys
from foretoken.cache import OutOfPagesError, SessionPages
from foretoken.device import places
from foretoken.generate import complete, decode, stream
from foretoken.hf import ModuleRunner, Pages, paged
from foretoken.hf.runner import PooledCache
from foretoken.session import Session
from hf_models import one_thread, tiny_model  # noqa: F401
from hf_toys import EOS, PAD, VOCAB
from rounds_ahead import no_waiting
from test_hf_captured import step_of, with_graphs

TREE = ft.TreePlan(nodes=8, branches=2, depth=3)
DRAWN = {"sampling": ft.Sampling(temperature=0.9, top_p=0.95, seed=5)}
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def target() -> Any:
    return hf_toys.llama()


@pytest.fixture(scope="module")
def draft(target: Any) -> Any:
    return hf_toys.disturbed(target, 0.05)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How rounds are issued; the last two as on a CUDA device, on CPU tensors."""
    if request.param != "on the host":
        monkeypatch.setattr(places, "AHEAD_ON", {"cpu", "cuda"})
    if request.param == "captured":
        monkeypatch.setattr(ModuleRunner, "_capture", lambda runner, _: with_graphs(runner)._captured)
    return request.param


WAYS = ["on the host", "ahead", "captured"]
KINDS = ["plain", "ngram", "model", "tree", "ngram tree"]
FEW = {
    ("on the host", "tree", "drawn"), ("on the host", "ngram tree", "greedy"), ("ahead", "plain", "drawn"),
    ("ahead", "model", "drawn"), ("ahead", "tree", "greedy"), ("captured", "ngram", "greedy"),
    ("captured", "tree", "drawn"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("way", "kind", "law"),
    [
        pytest.param(way, kind, law, marks=() if (way, kind, law) in FEW else pytest.mark.long)
        for way in WAYS
        for kind in KINDS
        for law in ("greedy", "drawn")
    ],
    indirect=["way"],
)
def test_ids_are_those_of_slots(way: str, target: Any, draft: Any, kind: str, law: str) -> None:
    ids, mask = hf_toys.left_padded(4, 11)
    options = {"attention_mask": mask, "max_new_tokens": 18, "pad_token_id": PAD, "eos_token_id": [EOS, 7]}
    options |= DRAWN if law == "drawn" else GREEDY
    if kind != "plain":
        options["drafter"] = "ngram" if "ngram" in kind else draft
    if "tree" in kind:
        options["tree"] = TREE
    expected = ft.generate(target, ids, **options)
    # The last pool has room for two of the four rows at a time, the others wait.
    for pages in (Pages(5), Pages(4, 22)):
        assert torch.equal(ft.generate(target, ids, cache=pages, **options), expected)


@pytest.mark.parametrize("way", WAYS[:2], indirect=True)
def test_texts_that_end_at_a_page_s_end(way: str, target: Any) -> None:
    """Rounds issued ahead find pages for drafts behind the shorter text, which the pool has to have."""
    ids = hf_toys.prompts(2, 8)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = PAD, 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": PAD, "drafter": "ngram"} | GREEDY
    expected = ft.generate(target, ids, **options)
    assert torch.equal(ft.generate(target, ids, cache=Pages(4), **options), expected)


@pytest.mark.parametrize("way", WAYS[:2], indirect=True)
def test_long_prompts_and_other_heads(way: str) -> None:
    """Chunks that go to torch's attention, and keys of another width than values."""
    for model in (hf_toys.llama(max_position_embeddings=600), tiny_model("deepseek_v3")):
        ids = hf_toys.prompts(2, 300 if model.config.max_position_embeddings >= 600 else 40)
        options = {"max_new_tokens": 12, "pad_token_id": PAD, "do_sample": False, "drafter": "ngram"}
        expected = ft.generate(model, ids, **options)
        assert torch.equal(ft.generate(model, ids, cache=Pages(7), **options), expected)


@pytest.mark.parametrize("way", [WAYS[1]], indirect=True)
@pytest.mark.parametrize("name", ["gemma2_window_softcap", "gemma3_window", "mistral_window", "gpt2"])
def test_windows_caps_and_learned_positions(way: str, name: str) -> None:
    model = tiny_model(name)
    ids = torch.randint(5, 40, (2, 14))
    options = {"max_new_tokens": 14, "pad_token_id": PAD, "do_sample": False, "drafter": "ngram"}
    expected = ft.generate(model, ids, **options)
    assert torch.equal(ft.generate(model, ids, cache=Pages(5), **options), expected)


# ---- pages ----


class Watched:
    """A forward that looks after every step whose pages are whose, and counts those in use."""

    def __init__(self, runner: ModuleRunner) -> None:
        self.runner = runner
        self.most = 0

    def compact(self, *tensors: torch.Tensor) -> None:
        self.runner.compact(*tensors)

    def __call__(self, step: Any) -> torch.Tensor:
        logits = self.runner(step)
        pages = pages_of(self.runner)
        held = [page for slot in range(self.runner.max_batch) for page in pages.pages(slot)]
        assert len(set(held)) == len(held)
        assert len(held) + pages.free_pages == pages.num_pages
        table = pages.block_table.tolist()
        for slot, row in enumerate(table):
            mine = pages.pages(slot)
            assert row == mine + [-1] * (len(row) - len(mine))
        for slot, length, count in zip(
            *(part.tolist() for part in (step.slots, step.lengths, step.num_tokens)), strict=True
        ):
            needed = -(-(length + count) // pages.page_size)
            assert len(pages.pages(slot)) >= needed
            if not step.on_device:
                assert len(pages.pages(slot)) == needed  # what earlier drafts took is back
        self.most = max(self.most, len(held))
        return logits


def pages_of(runner: ModuleRunner) -> SessionPages:
    assert isinstance(runner.cache, PooledCache)
    return runner.cache.pages


@pytest.mark.parametrize(
    ("way", "trees"),
    [(WAYS[0], True), (WAYS[1], False), pytest.param(WAYS[2], True, marks=pytest.mark.long)],
    indirect=["way"],
)
def test_no_page_is_lost(way: str, target: Any, draft: Any, trees: bool) -> None:
    """Requests come, wait, end and are cancelled; slots change hands."""
    dice = random.Random(4)
    runner = ModuleRunner(target, max_batch=3, max_length=60, cache=Pages(4, 45))
    drafting = ModuleRunner(draft, max_batch=3, max_length=60, cache=Pages(3))
    forwards = Watched(runner), Watched(drafting)
    session = Session(
        max_batch=3, vocab_size=VOCAB, max_length=60, prefill_chunk=6, tree=TREE if trees else None,
        drafter=ft.ModelDrafter(forwards[1], max_batch=3, vocab_size=VOCAB, max_length=60),
    )  # fmt: skip
    prompts = [[dice.randrange(3, VOCAB) for _ in range(dice.randint(1, 25))] for _ in range(9)]
    requests = [
        session.admit(prompt, ft.Sampling(temperature=0.0), max_new_tokens=dice.randint(1, 20), eos_ids=[EOS])
        for prompt in prompts
    ]
    for _ in stream(session, forwards[0]):
        if dice.random() < 0.1:
            session.cancel(dice.choice(requests))
    plain = ModuleRunner(target, max_batch=1, max_length=60)
    for request, prompt in zip(requests, prompts, strict=True):
        alone = Session(max_batch=1, vocab_size=VOCAB, max_length=60)
        text = alone.admit(prompt, ft.Sampling(temperature=0.0), max_new_tokens=20, eos_ids=[EOS])
        decode(alone, plain)
        mine = session.generated(request)
        assert mine == alone.generated(text)[: len(mine)]
    assert all(watched.most > 0 for watched in forwards)
    assert forwards[0].most <= 45
    for watched in forwards:
        pages = pages_of(watched.runner)
        last = session.admit([5], ft.Sampling(temperature=0.0), max_new_tokens=5)
        decode(session, forwards[0])
        assert last.finish_reason == "length"
        assert pages.num_pages - pages.free_pages <= -(-(5 + TREE.nodes) // pages.page_size)


def test_a_step_that_finds_no_pages_writes_nothing_and_stays_planned(target: Any) -> None:
    runner = ModuleRunner(target, max_batch=2, max_length=40, cache=Pages(4, 7))
    session = Session(max_batch=2, vocab_size=VOCAB, max_length=40)
    texts = [
        session.admit(range(first, last), ft.Sampling(temperature=0.0), max_new_tokens=16)
        for first, last in ((5, 14), (6, 18))
    ]
    pages, step = pages_of(runner), session.plan()
    while sum(-(-len(session.tokens(text)) // 4) for text in texts) <= 7:
        logits = runner(step)
        session.commit(None if step.kind == "prefill" else logits)
        step = session.plan()
    before = [part.clone() for part in pages.caches], pages.block_table.clone()
    with pytest.raises(OutOfPagesError, match=r"the 0 free of 7 pages are enough, got 1 pages' worth"):
        runner(step)
    assert all(torch.equal(one, other) for one, other in zip(pages.caches, before[0], strict=True))
    assert torch.equal(pages.block_table, before[1])
    assert texts[0].finish_reason is None
    session.cancel(texts[1])
    decode(session, runner)
    alone = ft.generate(
        target, torch.arange(5, 14)[None], max_new_tokens=16, do_sample=False, pad_token_id=PAD
    )
    assert session.generated(texts[0]) == alone[0, 9:].tolist()
    assert texts[0].finish_reason == "length"


def test_pools_are_as_large_as_the_texts(target: Any) -> None:
    """And are kept between the calls of an attached model while they are large enough."""
    ids, mask = hf_toys.left_padded(3, 12)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        init = PooledCache.__init__

        def noting(cache: Any, shapes: Any, pages: Any, **sizes: Any) -> None:
            made.append((pages.count, sizes))
            init(cache, shapes, pages, **sizes)

        patch.setattr(paged.PooledCache, "__init__", noting)
        options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
        with ft.hf.attach(target, cache=Pages(4)):
            first = target.generate(ids, **options)
            second = target.generate(ids[:2], **options | {"attention_mask": mask[:2]})
    assert made == [(4 + 4 + 3, {"max_batch": 3, "max_length": 16})]
    assert torch.equal(first[:2], second)


def test_a_call_that_breaks_off_leaves_no_pages_taken(target: Any) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    ids = hf_toys.prompts(3, 9)
    with ft.hf.attach(target, cache=Pages(4, 13)) as attached:
        attached._callback = stop
        with pytest.raises(KeyboardInterrupt):
            target.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=PAD)
        attached._callback = None
        runner = attached._runners._idle["target"][1]
        assert pages_of(runner).free_pages < 13
        target.generate(ids[:1], max_new_tokens=5, do_sample=False, pad_token_id=PAD)
        assert attached._runners._idle["target"][1] is runner
        assert pages_of(runner).free_pages == 13 - 4


@pytest.mark.parametrize("way", WAYS[:2], indirect=True)
@pytest.mark.parametrize(("size", "chunk"), [(4, None), (5, 7), pytest.param(16, 9, marks=pytest.mark.long)])
def test_samples_of_a_prompt_compute_and_keep_it_once(
    way: str, target: Any, draft: Any, size: int, chunk: int | None
) -> None:
    """Drawn texts are those of slots; the prompt is run through both models once, and there once."""
    ids, samples = hf_toys.prompts(1, 42), 5
    options = {"max_new_tokens": 8, "pad_token_id": PAD, "drafter": draft, "num_return_sequences": samples}
    options |= DRAWN | {"prefill_chunk_size": chunk}
    expected = ft.generate(target, ids, **options)
    most, fed = [], []
    prepare = SessionPages.prepare

    def noting(pages: SessionPages, step: Any) -> Any:
        rest = prepare(pages, step)
        most.append(pages.num_pages - pages.free_pages)
        if step.kind == "prefill" and rest is not None and step.requests:
            fed.append(int(rest.num_tokens.sum()))
        return rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SessionPages, "prepare", noting)
        assert torch.equal(ft.generate(target, ids, cache=Pages(size), **options), expected)
    alone = -(-50 // size)
    shared = (42 - 2) // size
    assert max(most) <= samples * (alone + 1 - shared) + shared
    assert 2 * 40 <= sum(fed) <= 2 * (41 + (samples - 1) * (41 - shared * size))


@pytest.mark.cuda
def test_samples_share_pages_on_a_device() -> None:
    """Rounds are issued ahead and captured; target and draft model find their pages."""
    target = hf_toys.llama().to("cuda")
    draft = hf_toys.disturbed(hf_toys.llama(), 0.05).to("cuda")
    ids = hf_toys.prompts(1, 42).to("cuda")
    options = {"max_new_tokens": 12, "pad_token_id": PAD, "drafter": draft, "num_return_sequences": 4} | DRAWN
    expected = ft.generate(target, ids, **options)
    with ft.hf.attach(target, drafter=draft, cache=Pages(4)) as attached:
        options.pop("drafter")
        options.pop("sampling")
        alike = target.generate(ids.repeat(3, 1), max_new_tokens=12, pad_token_id=PAD, do_sample=False)
        pages = pages_of(attached._runners._idle["target"][1])
        assert pages.num_pages - pages.free_pages <= 10 + 3 * 6
    assert torch.equal(alike[0], alike[1])
    assert torch.equal(
        alike[:1], ft.generate(target, ids, max_new_tokens=12, pad_token_id=PAD, do_sample=False)
    )
    found = ft.generate(target, ids, cache=Pages(4), drafter=draft, **options, **DRAWN)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("way", WAYS[:2], indirect=True)
def test_prompts_that_begin_alike(way: str, target: Any, draft: Any) -> None:
    """Rows of a batch, and in a loop of one's own requests that come later, when the first has ended."""
    ids = hf_toys.prompts(1, 30).repeat(3, 1)
    ids[1, 20:], ids[2, 9:] = ids[1, 20:].flip(0), ids[2, 9:].flip(0)
    options = {"max_new_tokens": 10, "pad_token_id": PAD, "drafter": draft, "prefill_chunk_size": 8} | GREEDY
    expected = ft.generate(target, ids, **options)
    assert torch.equal(ft.generate(target, ids, cache=Pages(4), **options), expected)
    if way != WAYS[0]:
        return
    runner = ModuleRunner(target, max_batch=1, max_length=48, cache=Pages(4))
    session = Session(max_batch=1, vocab_size=VOCAB, max_length=48)
    fed = []
    for row in range(3):
        request = session.admit(ids[row].tolist(), ft.Sampling(temperature=0.0), max_new_tokens=10)
        columns = []
        handle = target.register_forward_pre_hook(
            lambda module, args, given, seen=columns: seen.append(given["input_ids"].shape[1]),
            with_kwargs=True,
        )
        decode(session, runner)
        handle.remove()
        fed.append(sum(columns) - 10)  # one for each token of the text
        assert session.generated(request) == expected[row, 30:].tolist()
    assert fed == [29, 29 - 20, 29 - 8]


@pytest.mark.long
def test_compiled_forwards_take_pages(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph without a break, as `torch.compile` traces it."""
    monkeypatch.setattr(places, "AHEAD_ON", {"cpu", "cuda"})
    runner = ModuleRunner(target, max_batch=3, max_length=40, cache=Pages(5))
    torch._dynamo.reset()
    compiled = torch.compile(target, dynamic=False, backend="aot_eager", fullgraph=True)
    for lengths in ([0, 0], [3, 2], [6, 4]):
        step = step_of([[5, 6, 7], [8, 9]], lengths, [0, 2])
        runner.cache.hold(step)
        plain = runner._call_on_device(step, target).clone()
        assert torch.equal(runner._call_on_device(step, compiled), plain)


def test_rows_wait_for_pages_and_criteria_still_hold(target: Any, draft: Any) -> None:
    """Also where a row that waits is ended before it begins."""
    from transformers import StoppingCriteriaList

    ids = hf_toys.prompts(3, 6)
    for stop in (7, 9):
        calls: dict[Any, list[int]] = {}
        outputs = []
        for pages in ("slots", Pages(4, 5)):
            seen = calls[pages] = []

            def criterion(
                ids: torch.Tensor, scores: Any, seen: list[int] = seen, stop: int = stop
            ) -> torch.Tensor:
                seen.append(ids.shape[1])
                return torch.full((len(ids),), ids.shape[1] >= stop)

            outputs.append(
                ft.generate(
                    target, ids, drafter=draft, cache=pages, max_new_tokens=8, do_sample=False,
                    pad_token_id=PAD, stopping_criteria=StoppingCriteriaList([criterion]),
                )
            )  # fmt: skip
        assert torch.equal(*outputs)
        assert calls["slots"] == calls[Pages(4, 5)]


# ---- refusals ----


def test_a_pool_too_small_for_one_row_is_refused_before_any_forward(target: Any) -> None:
    with pytest.raises(
        OutOfPagesError, match="expected at least 7 pages of 4 for a row of up to 25 tokens, got 6"
    ):
        ft.generate(target, hf_toys.prompts(2, 5), max_new_tokens=20, pad_token_id=PAD, cache=Pages(4, 6))


@pytest.mark.parametrize("cache", ["pages", None, 16])
def test_kinds_are_checked_by_name(target: Any, cache: Any) -> None:
    ids = hf_toys.prompts(1, 4)
    for call in (
        lambda: ft.generate(target, ids, cache=cache),
        lambda: ft.stream(target, ids, cache=cache),
        lambda: ft.hf.attach(target, cache=cache),
        lambda: target.generate(
            ids, custom_generate=ft.hf.custom_generate, cache=cache, pad_token_id=PAD, max_new_tokens=2
        ),
        lambda: ModuleRunner(target, max_batch=1, max_length=8, cache=cache),
    ):
        with pytest.raises(ValueError, match=r'cache: expected "slots", "paged" or foretoken\.hf\.Pages'):
            call()


@pytest.mark.parametrize(
    ("size", "count", "message"),
    [(0, None, "a size of 1 to 256, got 0"), (257, None, "got 257"), (4, 0, "a count of at least 1, got 0")],
)
def test_sizes_are_checked(size: int, count: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pages(size, count)


def test_models_that_cannot_are_refused_in_words(target: Any) -> None:
    for model, reason in (
        (tiny_model("bamba"), "its recurrent layers keep states, which are not rows"),
        (tiny_model("mamba2"), "it has no keys and values"),
        (hf_toys.llama().double(), "its keys and values are torch.float64"),
        (tiny_model("bloom"), "it is run through its own attention"),
    ):
        with pytest.raises(
            ValueError, match=f'cache: expected "slots" for {type(model).__name__}, got pages: {reason}'
        ):
            ModuleRunner(model, max_batch=1, max_length=20, cache="paged")


def test_a_device_does_not_repeat_rounds_over_pages(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the session can go on."""
    monkeypatch.setattr(places, "AHEAD_ON", {"cpu", "cuda"})
    sizes = {"max_batch": 1, "max_length": 30}
    for role, caches in (("target", ("paged", "slots")), ("drafter", ("slots", "paged"))):
        runner, drafting = (ModuleRunner(target, cache=cache, **sizes) for cache in caches)
        drafter = ft.ModelDrafter(drafting, vocab_size=VOCAB, **sizes)
        session = Session(vocab_size=VOCAB, drafter=drafter, **sizes)
        text = session.admit([5, 6, 7], ft.Sampling(temperature=0.0), max_new_tokens=6)
        with pytest.raises(ValueError, match=f"{role}: its rounds cannot be repeated .* found by the host"):
            complete(session, runner)
        decode(session, runner)
        assert text.finish_reason == "length"


# ---- on a device ----


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["plain", "ngram", "model", "tree"])
@pytest.mark.parametrize("law", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_ids_on_a_device(kind: str, law: dict[str, Any]) -> None:
    target = hf_toys.llama().to("cuda")
    ids, mask = (part.to("cuda") for part in hf_toys.left_padded(4, 11))
    options = {
        "attention_mask": mask,
        "max_new_tokens": 40,
        "pad_token_id": PAD,
        "eos_token_id": [EOS, 7],
    } | law
    options["return_dict_in_generate"] = True
    if kind != "plain":
        options["drafter"] = (
            "ngram" if kind == "ngram" else hf_toys.disturbed(hf_toys.llama(), 0.05).to("cuda")
        )
    if kind == "tree":
        options["tree"] = TREE
    expected = ft.generate(target, ids, **options)
    for pages in ("paged", Pages(5), Pages(64), Pages(8, 21)):
        for runner in ("auto", "module"):
            found = ft.generate(target, ids, cache=pages, runner=runner, **options)
            assert torch.equal(found.sequences, expected.sequences)
            assert found.foretoken.why_on_host is None
            assert found.foretoken.runners["target"] == ("graph" if runner == "auto" else "module: asked for")


@pytest.mark.cuda
def test_rounds_on_a_device_wait_for_nothing() -> None:
    """And give surplus pages back, graphs reading the table where it is."""
    target = hf_toys.llama().to("cuda")
    runner = ModuleRunner(target, max_batch=2, max_length=200, cache=Pages(4, 100))
    session = Session(max_batch=2, vocab_size=VOCAB, max_length=200, drafter=ft.NgramDrafter(), device="cuda")
    texts = [
        session.admit([5, 6, 7, 8, 5, 6], ft.Sampling(temperature=0.0), max_new_tokens=150) for _ in range(2)
    ]
    pages, place = pages_of(runner), pages_of(runner).block_table.data_ptr()
    for number in range(40):
        step = session.plan()
        if step is None:
            break
        if number < 20:
            logits = runner(step)
        else:
            with no_waiting():
                logits = runner(step)
        session.commit(None if step.kind == "prefill" else logits)
        list(session.events())
        known = sum(-(-len(session.tokens(text)) // 4) for text in texts)
        assert pages.num_pages - pages.free_pages <= known + 2 * 4
        assert pages.block_table.data_ptr() == place
    assert runner._captured.replays > 10
