"""The forms in which a draft law may be declared: short lists, another vocabulary, records, rows shared out.

Each form says the same as a dense law written out by hand, and what says nothing usable is flagged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import foretoken as ft
from batches import assert_same_rows
from constrained import KINDS, WILD, Rules, Scene
from foretoken import _core
from foretoken.ops import Status, Verdict
from goodness import assert_fits, assert_misfits, fit
from guarded import guarded
from reference import Filters, row_law

VERDICT = ["tokens", "num_emitted", "num_accepted", "path", "next_token", "next_lengths", "status"]
WALKS = ["token", "block", "spectr"]
UNFILTERED = [Filters(), Filters(temperature=0.7), Filters(temperature=0.0)]


def plain_scene(seed: int, *, kinds=None, filters=UNFILTERED, **options) -> Scene:
    return Scene(seed, kinds=[Rules()] if kinds is None else kinds, filters=filters, **options)


def verify(scene: Scene, rule: str = "auto", **change) -> Verdict:
    arguments = scene.arguments(rule=rule, draw="iid", sampling=scene.table(), **scene.history())
    return ft.ops.verify(scene.target, scene.tokens, **(arguments | change))


def assert_same(one: Verdict, other: Verdict, rows=slice(None), fields=VERDICT) -> None:
    assert_same_rows(one, rows, other, rows, fields)


# --------------------------------------------------------------------------------------- short lists


def top_of(scene: Scene, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest of every node's law, ids and final probabilities; temperatures of the request."""
    temperature = torch.tensor([f.temperature or 1.0 for f in scene.filters])
    values, ids = (scene.draft.double() / temperature[:, None, None]).topk(k)
    return ids, values.softmax(-1).float()


def written_out(ids: Tensor, probs: Tensor, vocab: int) -> Tensor:
    """The same law as V probabilities."""
    dense = torch.zeros(*ids.shape[:2], vocab)
    return dense.scatter_add_(2, ids.clamp_min(0), torch.where(ids < 0, 0.0, probs))


def draft_from(scene: Scene, dense: Tensor) -> None:
    generator = torch.Generator().manual_seed(scene.pick.getrandbits(32))
    for b, node in itertools.product(range(scene.size), range(1, scene.nodes + 1)):
        row = dense[b, scene.parents[b][node - 1]]
        scene.tokens[b, node - 1] = torch.multinomial(row, 1, generator=generator)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rule", WALKS)
def test_a_short_list_is_a_dense_law(rule, dtype):
    """In any order, with gaps, with entries of no mass, as wide as it likes: the dense law's verdicts."""
    accepted = 0
    for seed in range(6):
        scene = plain_scene(seed, tree=seed % 3 > 0)
        ids, probs = top_of(scene, (1, 2, 7, 45)[seed % 4])
        draft_from(scene, written_out(ids, probs, 45))
        dense = verify(scene, rule, draft_probs=written_out(ids, probs, 45))
        assert not dense.status.any()
        accepted += int(dense.num_accepted.sum())
        gap = torch.full((*ids.shape[:2], 2), -1)
        order = torch.randperm(ids.shape[2] + 4)
        outside = torch.tensor([45, 2**31 - 1]).expand_as(gap)  # padding of a wider vocabulary, without mass
        for spare, mass in ((gap, 9.0), (outside, 0.0)):
            wider_ids = torch.cat([gap, ids, spare], 2)[..., order]
            wider_probs = torch.cat([torch.full_like(gap, 5.0), probs, torch.full_like(gap, mass)], 2)
            short = verify(scene, rule, draft_topk=(wider_ids.to(dtype), wider_probs[..., order]))
            assert_same(short, dense)
        assert_same(verify(scene, rule, draft_topk=(ids.to(dtype), probs)), dense)
    assert accepted > 30


SPOILED = {
    "twice": lambda ids, probs: (ids.index_copy(2, torch.tensor([1]), ids[..., :1]), probs),
    "outside": lambda ids, probs: (ids.index_fill(2, torch.tensor([2]), 45), probs),
    "far outside": lambda ids, probs: (ids.index_fill(2, torch.tensor([2]), 2**62), probs),
    "too little": lambda ids, probs: (ids, probs * 0.9),
    "too much": lambda ids, probs: (ids, probs * 1.1),
    "nan": lambda ids, probs: (ids, probs.index_fill(2, torch.tensor([3]), torch.nan)),
    "negative": lambda ids, probs: (ids, probs.index_fill(2, torch.tensor([3]), -0.001)),
    "infinite": lambda ids, probs: (ids, probs.index_fill(2, torch.tensor([3]), torch.inf)),
    "empty": lambda ids, probs: (torch.full_like(ids, -1), probs),
    "not the draft's": lambda ids, probs: ((ids + 20) % 45, probs),
}


@pytest.mark.parametrize("fault", SPOILED)
@pytest.mark.parametrize("rule", WALKS)
def test_an_unusable_list_costs_its_row_the_drafts(rule, fault):
    """Judged before any coin: the row is a plain draw, its neighbours are what they were."""
    scene = plain_scene(3, filters=[Filters()])
    ids, probs = top_of(scene, 5)
    draft_from(scene, written_out(ids, probs, 45))
    plain = verify(scene, rule, draft_topk=(ids, probs))
    drawn = verify(scene, rule, num_drafts=torch.zeros(scene.size, dtype=torch.int32))
    others = [b for b in range(scene.size) if b != 6]
    bad_ids, bad_probs = SPOILED[fault](ids[6:7], probs[6:7])
    spoiled = torch.cat([ids[:6], bad_ids, ids[7:]]), torch.cat([probs[:6], bad_probs, probs[7:]])
    verdict = verify(scene, rule, draft_topk=spoiled)
    assert verdict.status.tolist() == [int(Status.BAD_DRAFT) * (b == 6) for b in range(scene.size)]
    assert_same(verdict, plain, others)
    assert_same(verdict, drawn, [6], VERDICT[:-1])


# ------------------------------------------------------------------------------- another vocabulary


def a_map(seed: int, width: int = 30, vocab: int = 45) -> Tensor:
    """Injective, in no order, every seventh column masked."""
    ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))[:width].to(torch.int32)
    ids[::7] = -1
    return ids


def columns_of(scene: Scene, vocab_map: Tensor) -> Tensor:
    """Logits ``[B, T, Vd]`` of a drafter that agrees with the target but for some noise."""
    rows = scene.target[..., vocab_map.clamp_min(0).long()].float()
    return 0.8 * rows + 0.4 * torch.randn(rows.shape)


def scattered(rows: Tensor, vocab_map: Tensor, vocab: int, absent: float) -> Tensor:
    known = vocab_map >= 0
    dense = torch.full((*rows.shape[:-1], vocab), absent)
    dense[..., vocab_map[known].long()] = rows[..., known].float()
    return dense


@pytest.mark.parametrize("purpose", ["plain", "draft"])
def test_samples_through_a_map_are_target_ids(purpose):
    """The draws of the masked row, renamed; log-probabilities are theirs."""
    for seed in range(10):
        scene = plain_scene(seed, filters=[Filters(), Filters(temperature=0.0), Filters(top_k=4)])
        vocab_map = a_map(seed)
        rows = scene.draft[:, 0, :30]
        call = {"base": scene.base, "slots": scene.slots, "sampling": scene.table(), "purpose": purpose}
        tokens, logprobs = ft.ops.sample(rows, vocab_map=vocab_map, vocab_size=45, logprobs=True, **call)
        masked = rows.masked_fill(vocab_map < 0, -torch.inf)
        columns, expected = ft.ops.sample(masked, logprobs=True, **call)
        assert torch.equal(tokens, vocab_map.long()[columns])
        assert torch.equal(logprobs, expected)
        assert (tokens >= 0).all()


@pytest.mark.parametrize("kinds", [[Rules()], KINDS, [WILD]], ids=["plain", "constrained", "wild"])
@pytest.mark.parametrize("rule", WALKS)
def test_a_smaller_vocabulary_is_the_dense_law_scattered(rule, kinds):
    """Logits, probabilities and lists over the drafter's ids; its penalties speak of target ids."""
    accepted = 0
    for seed in range(6):
        scene = plain_scene(seed, kinds=kinds, tree=seed % 2 == 0, filters=[Filters(), Filters(top_k=6)])
        if kinds == [WILD]:
            scene.write_wild_ids()
        vocab_map = a_map(seed)
        small = columns_of(scene, vocab_map)
        scene.draft = scattered(small, vocab_map, 45, -torch.inf)
        scene.draft_tokens()
        by_hand = verify(scene, rule, draft_logits=scene.draft)
        mapped = verify(scene, rule, draft_logits=small, vocab_map=vocab_map)
        assert_same(mapped, by_hand)
        assert not mapped.status.any()
        accepted += int(mapped.num_accepted.sum())
        probs = torch.zeros_like(scene.draft)
        for b, node in itertools.product(range(scene.size), range(scene.nodes + 1)):
            law = row_law(
                scene.node_row(scene.draft[b, node], b, scene.path(b, node)).tolist(), scene.filters[b]
            )
            probs[b, node] = torch.tensor(law)
        dense = verify(scene, rule, draft_probs=probs)
        known = vocab_map >= 0
        small_probs = torch.zeros_like(small)
        small_probs[..., known] = probs[..., vocab_map[known].long()]
        assert_same(verify(scene, rule, draft_probs=small_probs, vocab_map=vocab_map), dense)
        columns = torch.arange(30).expand(small.shape)
        assert_same(verify(scene, rule, draft_topk=(columns, small_probs), vocab_map=vocab_map), dense)
    assert accepted > 30


def test_a_map_that_leaves_the_vocabulary():
    """Entries that are no target id are masked, in drawing and in verifying alike."""
    scene = plain_scene(1, filters=[Filters()])
    vocab_map = a_map(1)
    wild = vocab_map.clone()
    wild[::7] = torch.tensor([-2, 45, 2**31 - 1, -(2**31), 46], dtype=torch.int32)
    small = columns_of(scene, vocab_map)
    small[..., ::7] = 9.0  # what should not be drawn would be
    call = {"base": scene.base, "slots": scene.slots, "sampling": scene.table(), "vocab_size": 45}
    tokens = ft.ops.sample(small[:, 0], vocab_map=wild, **call)
    assert torch.equal(tokens, ft.ops.sample(small[:, 0], vocab_map=vocab_map, **call))
    scene.draft = scattered(small, vocab_map, 45, -torch.inf)
    scene.draft_tokens()
    plain = verify(scene, draft_logits=small, vocab_map=vocab_map)
    assert not plain.status.any()
    assert_same(verify(scene, draft_logits=small, vocab_map=wild), plain)
    columns = scene.draft.topk(4).indices
    inverse = torch.full((45,), -1)
    inverse[vocab_map[vocab_map >= 0].long()] = torch.nonzero(vocab_map >= 0).flatten()
    for bad in (30, 2**31 - 1, 2**62):
        lists = inverse[columns]
        lists[2, :, 1] = bad
        probs = torch.full(lists.shape, 0.25)
        verdict = verify(scene, draft_topk=(lists, probs), vocab_map=vocab_map)
        assert verdict.status[2] == Status.BAD_DRAFT


def test_two_columns_for_one_id_are_no_law():
    """A map has to be injective: declared would be half of what was drawn from."""
    scene = plain_scene(2, filters=[Filters()])
    twice = torch.arange(45, dtype=torch.int32)
    twice[7] = 8
    scene.draft_tokens()
    for law in ({"draft_logits": scene.draft}, {"draft_probs": scene.draft.softmax(-1)}):
        assert verify(scene, vocab_map=twice, **law).status.eq(Status.BAD_DRAFT).all()
    scene.draft[..., 7] = -torch.inf  # no mass on one of the two: it is the map without it
    masked = torch.arange(45, dtype=torch.int32)
    masked[7] = -1
    scene.draft_tokens()
    for law in ({"draft_logits": scene.draft}, {"draft_probs": scene.draft.softmax(-1)}):
        assert_same(verify(scene, vocab_map=twice, **law), verify(scene, vocab_map=masked, **law))


# ------------------------------------------------------------------------------------------ records


def drawn_with_records(scene: Scene, vocab_map: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Chains drawn by ``ops.sample``, with the laws they were drawn from: (rows [B, N, Vd], records)."""
    rows = (scene.draft if vocab_map is None else columns_of(scene, vocab_map))[:, : scene.nodes]
    records = torch.full((4, scene.nodes, scene.size), -1).permute(2, 1, 0)  # strided like nothing else
    more = {} if vocab_map is None else {"vocab_map": vocab_map, "vocab_size": 45}
    for i in range(scene.nodes):
        scene.tokens[:, i] = ft.ops.sample(
            rows[:, i],
            sampling=scene.table(),
            base=scene.base,
            slots=scene.slots,
            path=scene.tokens[:, :i],
            step=i,
            purpose="draft",
            records=records[:, i],
            **scene.history(),
            **more,
        )
    return rows, records


@pytest.mark.parametrize("mapped", [False, True], ids=["ids", "mapped"])
@pytest.mark.parametrize("rule", WALKS)
def test_records_stand_for_the_law_drawn_from(rule, mapped):
    """The same verdict with them and without, for every filter, penalties and greedy rows among them."""
    accepted = 0
    for seed in range(6):
        scene = Scene(seed, tree=False)
        vocab_map = a_map(seed) if mapped else None
        rows, records = drawn_with_records(scene, vocab_map)
        computed = verify(scene, rule, draft_logits=rows, vocab_map=vocab_map)
        recorded = verify(scene, rule, draft_logits=rows, vocab_map=vocab_map, draft_records=records)
        assert not computed.status.any()
        assert_same(recorded, computed)
        accepted += int(computed.num_accepted.sum())
    assert accepted > 30


def test_records_are_what_is_believed():
    """With them the rows' laws are not made again, so that no other temperature can be declared."""
    scene = plain_scene(4, tree=False, filters=[Filters()], size=100)
    rows, records = drawn_with_records(scene)
    plain = verify(scene, draft_logits=rows)
    hotter = {"draft_logits": rows, "draft_sampling": ft.Sampling(temperature=3.0).prepare(scene.slots_there)}
    assert_same(verify(scene, draft_records=records, **hotter), plain)
    assert not torch.equal(verify(scene, **hotter).num_accepted, plain.num_accepted)


def test_records_of_rows_without_a_law():
    """NaN, nothing finite, a slot outside the table: their records are unusable, and say so."""
    logits = torch.zeros(4, 9)
    logits[0, 3], logits[1] = torch.nan, -torch.inf
    slots = torch.tensor([0, 1, 99, 3], dtype=torch.int32)
    records = torch.full((4, 4), 77)
    table = ft.Sampling(seed=1).prepare(4)
    ft.ops.sample(logits, sampling=table, base=torch.ones(4, dtype=torch.int64), slots=slots, records=records)
    verdict = ft.ops.verify(
        torch.zeros(4, 2, 9),
        torch.zeros(4, 1, dtype=torch.int64),
        draft_logits=torch.zeros(4, 1, 9),
        draft_records=records[:, None],
        sampling=table,
        base=torch.ones(4, dtype=torch.int64),
    )
    assert verdict.status.tolist() == [Status.BAD_DRAFT] * 3 + [Status.OK]


PATHS = ["portable", "avx2", "avx512"]


@pytest.mark.parametrize("path", PATHS)
def test_garbage_records_are_flagged_and_touch_nothing(path):
    """Random words, words of a good record with bits turned over, ids far outside: never a fault, and a
    neighbour is never changed. Rows, records and map end where memory does.
    """
    before = _core.testing.cpu_path()
    if not _core.testing.force_cpu_path(path):
        pytest.skip(f"no {path} path on this machine or in this build")
    try:
        scene = plain_scene(5, tree=False, filters=[Filters(), Filters(temperature=0.0)], size=8)
        for vocab_map in (None, guarded(a_map(5)), guarded(a_map(5), front=True)):
            rows, good = drawn_with_records(scene, vocab_map)
            rows = guarded(rows)
            call = {"draft_logits": rows, "vocab_map": vocab_map}
            plain = verify(scene, draft_records=good, **call)
            generator = torch.Generator().manual_seed(0)
            flagged = 0
            for trial in range(150):
                row, word = trial % 8, trial // 8 % 4
                records = good.clone()
                if trial % 3 == 0:
                    records[row] = torch.randint(-(2**63), 2**63 - 1, (6, 4), generator=generator)
                elif trial % 3 == 1:
                    records[row, :, word] ^= 1 << (trial % 63)
                else:
                    records[row, :, 3] = (-(2**63), 2**63 - 1, 30, 45, -2, 2**40)[trial % 6]
                    records[row, :, 0] ^= (0, 1, 256)[trial // 6 % 3]
                verdict = verify(scene, draft_records=guarded(records), **call)
                others = [b for b in range(8) if b != row]
                assert_same(verdict, plain, others)
                assert int(verdict.status[row]) in (Status.OK, Status.BAD_DRAFT)
                emitted = verdict.tokens[row][: int(verdict.num_emitted[row])]
                assert ((emitted >= 0) & (emitted < 45)).all()
                flagged += int(verdict.status[row] == Status.BAD_DRAFT)
            assert flagged > 40
    finally:
        _core.testing.force_cpu_path(before)


# ------------------------------------------------------------------------------- shared and mixed rows


@pytest.mark.parametrize("rule", WALKS)
def test_law_rows_may_lie_anywhere(rule):
    """Fewer law rows than nodes, in another order, beside rows that are never read; logits, probs, lists."""
    for seed in range(4):
        scene = plain_scene(seed)
        stored = scene.draft[:, :3].contiguous()
        used = torch.randint(
            0, 3, (scene.size, scene.nodes + 1), generator=torch.Generator().manual_seed(seed)
        )
        rows = torch.arange(scene.size)[:, None]
        scene.draft = stored[rows, used]
        scene.draft_tokens()
        poisoned = torch.cat([torch.full_like(stored[:, :1], torch.nan), stored], 1)
        draft_row = (used + 1).to(torch.int32)
        expanded = verify(scene, rule, draft_logits=scene.draft)
        assert_same(verify(scene, rule, draft_logits=poisoned, draft_row=draft_row), expanded)
        probs, ids = stored.softmax(-1).topk(45)
        dense = verify(scene, rule, draft_probs=stored.softmax(-1)[rows, used])
        assert_same(verify(scene, rule, draft_topk=(ids, probs), draft_row=used.to(torch.int32)), dense)


@pytest.mark.parametrize("rule", WALKS)
def test_rows_of_another_width(rule):
    """Narrower: no mass behind the end. Wider: logits there do not count, probabilities have to be 0."""
    for seed in range(4):
        scene = plain_scene(seed)
        scene.draft[..., 20:] = -torch.inf
        scene.draft_tokens()
        plain = verify(scene, rule, draft_logits=scene.draft)
        assert not plain.status.any()
        narrow = scene.draft[..., :20]
        wide = torch.nn.functional.pad(scene.draft, (0, 1000), value=9.0)
        assert_same(verify(scene, rule, draft_logits=narrow), plain)
        assert_same(verify(scene, rule, draft_logits=wide), plain)
        dense = verify(scene, rule, draft_probs=scene.draft.softmax(-1))
        padded = torch.nn.functional.pad(scene.draft.softmax(-1), (0, 1000))
        assert_same(verify(scene, rule, draft_probs=narrow.softmax(-1)), dense)
        assert_same(verify(scene, rule, draft_probs=padded), dense)
        padded[3, 0, 999] = 1e-3
        others = [b for b in range(scene.size) if b != 3]
        spoiled = verify(scene, rule, draft_probs=padded)
        greedy = scene.filters[3].temperature == 0.0
        assert spoiled.status[3] == (Status.OK if greedy else Status.BAD_DRAFT)
        assert_same(spoiled, dense, others)


# Law of one round: many rows that differ in their bases, rows of logits that look at the depth alone.

VOCAB, ROWS = 9, 15_000
TREE = [0, 0, 1, 1, 2]
CHAIN = [0, 1, 2]


def depths(parents: list[int]) -> list[int]:
    found = [0]
    for parent in parents:
        found.append(found[parent] + 1)
    return found


def level(seed: int, depth: int) -> Tensor:
    common = torch.randn(VOCAB, generator=torch.Generator().manual_seed(900 + depth))
    return common + 0.8 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed + 31 * depth))


SAMPLING = ft.Sampling(temperature=0.9, seed=11).prepare(1)
WHERE = {"base": 1 + 16 * torch.arange(ROWS), "slots": torch.zeros(ROWS, dtype=torch.int32)}


def draw_by_level(parents: list[int], draw: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Drafts of every node by ``draw(logits of its parent's level, node)``."""
    depth = depths(parents)
    return torch.stack([draw(level(5, depth[parent]), n + 1) for n, parent in enumerate(parents)], 1)


def pair_fit(parents: list[int], tokens: Tensor, rule: str, **law):
    """Fit of the first two tokens of the round to the law of plain decoding."""
    rows = torch.stack([level(1, depth) for depth in depths(parents)])
    verdict = ft.ops.verify(
        rows.expand(ROWS, -1, -1),
        tokens,
        parents=torch.tensor(parents).expand(ROWS, -1),
        sampling=SAMPLING,
        rule=rule,
        **WHERE,
        **law,
    )
    assert not verdict.status.any()
    where = {"base": WHERE["base"] + 1, "slots": WHERE["slots"]}
    plain = ft.ops.sample(level(1, 1).expand(ROWS, -1), sampling=SAMPLING, **where)
    second = torch.where(verdict.num_emitted > 1, verdict.tokens[:, 1], plain)
    counts = torch.bincount(verdict.tokens[:, 0] * VOCAB + second, minlength=VOCAB**2).numpy()
    one, two = (np.array(row_law(level(1, d).tolist(), Filters(temperature=0.9))) for d in (0, 1))
    return fit(counts, np.outer(one, two).ravel())


def over_rows(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows).expand(ROWS, *([-1] * (rows[0].dim() + 1)))


def draft(logits: Tensor, node: int) -> Tensor:
    rows = logits.expand(ROWS, -1)
    return ft.ops.sample(rows, sampling=SAMPLING, step=node - 1, purpose="draft", **WHERE)


@pytest.mark.parametrize("rule", WALKS)
@pytest.mark.parametrize("parents", [CHAIN, TREE], ids=["chain", "tree"])
def test_drafts_of_the_k_likeliest(parents, rule):
    """``topk``, a draw among the k, the ids gathered: the list is the law, and the whole row is not."""
    kept = 3

    def from_the_top(logits: Tensor, node: int) -> Tensor:
        top = logits.topk(kept)
        return top.indices[draft(top.values, node)]

    tokens = draw_by_level(parents, from_the_top)
    tops = [level(5, depth).topk(kept) for depth in depths(parents)]
    ids = over_rows([top.indices for top in tops])
    probs = over_rows([(top.values / 0.9).softmax(-1) for top in tops])
    assert_fits(pair_fit(parents, tokens, rule, draft_topk=(ids, probs)), rule)
    whole = over_rows([level(5, depth) for depth in depths(parents)])
    assert_misfits(pair_fit(parents, tokens, rule, draft_logits=whole), "declared whole, drawn from the top")


@pytest.mark.parametrize("rule", ["token", "block"])
def test_drafts_of_a_smaller_vocabulary(rule):
    """A drafter of six columns, one of them masked, of ids in another order."""
    vocab_map = torch.tensor([4, 8, -1, 0, 3, 6], dtype=torch.int32)

    def of_the_map(logits: Tensor, node: int) -> Tensor:
        return ft.ops.sample(
            logits[:6].expand(ROWS, -1),
            sampling=SAMPLING,
            step=node - 1,
            purpose="draft",
            vocab_map=vocab_map,
            vocab_size=VOCAB,
            **WHERE,
        )

    tokens = draw_by_level(TREE, of_the_map)
    laws = over_rows([level(5, depth)[:6] for depth in depths(TREE)])
    assert_fits(pair_fit(TREE, tokens, rule, draft_logits=laws, vocab_map=vocab_map), rule)
    other = vocab_map.flip(0).contiguous()
    assert_misfits(pair_fit(TREE, tokens, rule, draft_logits=laws, vocab_map=other), "another map")


@pytest.mark.parametrize("rule", ["rrs", "traversal", "spectr"])
def test_points_beside_drawn_siblings(rule):
    """Some nodes' children were chosen, some drawn, in one tree; calling all of them drawn is no law."""
    chosen = (0, 2)  # the nodes whose children are points

    def drawn_or_chosen(logits: Tensor, node: int) -> Tensor:
        if TREE[node - 1] not in chosen:
            return draft(logits, node)
        elders = TREE[: node - 1].count(TREE[node - 1])
        return logits.topk(elders + 1).indices[-1].expand(ROWS)

    tokens = draw_by_level(TREE, drawn_or_chosen)
    laws = over_rows([level(5, depth) for depth in depths(TREE)])
    rows = torch.tensor([-1 if n in chosen else n for n in range(6)], dtype=torch.int32).expand(ROWS, -1)
    assert_fits(pair_fit(TREE, tokens, rule, draft_logits=laws, draft_row=rows), rule)
    assert_misfits(pair_fit(TREE, tokens, rule, draft_logits=laws), "points declared as drawn")
