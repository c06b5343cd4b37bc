"""Mistakes that other projects made, replayed: a reader finds here which test would have caught each.

Rows are those of a catalogue of real bugs of speculative decoding, of which 1 to 44 are about laws, random
numbers, damaged inputs and lengths. A row has a test ``test_row_NN_...`` in this file, or stands in
``ELSEWHERE`` with the test that covers it. Statistical tests hold a control: the bug itself, planted, has to
be refused.
"""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import foretoken as ft
from batches import KINDS, ROW_FIELDS, assert_same_rows, make
from foretoken import _core
from foretoken.drafters import ModelDrafter
from goodness import assert_fits, assert_misfits, fit
from reference import Filters, philox, row_law
from toys import VOCAB, Ask, CountingDrafter, bench, counting_session, drain, rounds, table

HERE = Path(__file__)

# Row -> (where it was seen, the test). Rows 6 and 31-35 have twins on a GPU, row 36 one in attention kernels
# and row 44 one across ranks: those wait for the code they are about.
ELSEWHERE = {
    4: ("vllm-ascend 13730", "test_verify_replay.py::test_disjoint_laws_accept_nothing"),
    5: ("sglang 35771", "test_verify_replay.py::test_coin_of_zero_never_accepts_what_the_target_forbids"),
    6: ("sglang 39253", "test_cpu_paths.py::test_paths_agree_bit_by_bit"),
    12: ("EAGLE 329, 183, 221", "test_tree_law.py::test_every_shape_keeps_the_law"),
    14: (
        "jaymody/speculative-sampling 3",
        "test_verify_law.py::test_control_argmax_declared_with_its_softmax",
    ),
    15: (
        "openvino.genai 4190",
        "test_verify_replay.py::test_verdicts_are_the_replay_of_the_documented_numbers",
    ),
    16: ("MTPLX 82", "test_verify_faults.py::test_a_poisoned_target_row_is_flagged_where_it_closes"),
    17: ("vllm 6038", "test_verify_api.py::test_a_request_is_itself_in_any_batch"),
    19: ("TensorRT-LLM 17599", "test_session_rounds.py::test_ids_do_not_depend_on_what_ran_before"),
    21: ("vllm 14645", "test_verify_api.py::test_rows_of_a_ragged_batch_keep_their_own_targets"),
    24: (
        "vllm 53029, 45060, 50183",
        "test_verify_faults.py::test_a_poisoned_target_row_is_flagged_where_it_closes",
    ),
    25: ("flashinfer 2402, 2456, 1575", "test_verify_faults.py::test_rows_without_any_mass"),
    26: ("flashinfer 3470", "test_verify_replay.py::test_any_vocabulary_size"),
    28: ("vllm 22180", "test_verify_faults.py::test_masked_logits_are_no_fault"),
    29: ("vllm 20531", "test_verify_law.py::test_every_round_emits_at_least_one_token"),
    30: ("flashinfer 879", "test_verify_faults.py::test_ids_outside_the_vocabulary"),
    35: ("vllm 43682", "test_verify_faults.py::test_padded_rows_read_nothing"),
    36: ("sglang 23498", "test_boundary.py::test_views_are_read_where_they_lie"),
    37: ("vllm 9730", "test_session_rounds.py::test_both_caches_after_full_acceptance"),
    38: ("transformers 47912", "test_session.py::test_an_end_at_every_offset_of_an_accepted_run"),
    39: ("sglang 31599", "test_session.py::test_eos_at_the_length_limit_is_an_eos"),
    40: ("FastDeploy 7121", "test_generate.py::test_a_stop_string_may_span_rounds_and_begin_in_the_prompt"),
    41: (
        "vllm 57941, 24662, 22935",
        "test_session.py::test_a_drafter_with_a_shorter_context_stops_drafting_there",
    ),
    42: ("TensorRT-LLM 16826", "test_session.py::test_drafts_never_reach_past_the_limits"),
    44: ("vllm 29422, 6369", "test_session_rounds.py::test_rows_that_skip_rounds_catch_up"),
    45: (
        "sglang 15360, 26866",
        "test_hf_trees.py::test_bug_45_accepted_paths_become_the_rows_of_sequential_decoding",
    ),
    52: (
        "mlx 1914, 1427, transformers 48280",
        "test_hf_trees.py::test_bug_52_windows_that_fill_up_while_trees_are_rejected_at_every_depth",
    ),
}


def test_every_row_is_covered():
    here = {int(row) for row in re.findall(r"^def test_row_(\d\d)_", HERE.read_text(), re.MULTILINE)}
    assert here.isdisjoint(ELSEWHERE)
    assert sorted(here | ELSEWHERE.keys()) == [*range(1, 46), 52]
    for _, test in ELSEWHERE.values():
        file, name = test.split("::")
        assert f"def {name}(" in (HERE.parent / file).read_text(), test


# ------------------------------------------------------------------------------ rows 1-16: the law

MANY = 30_000
TARGET = np.array([0.30, 0.22, 0.16, 0.12, 0.08, 0.06, 0.04, 0.02])
DRAFT = TARGET[::-1].copy()  # likely where the target is not: what is shared between the two shows


def logits_of(law: np.ndarray, *shape: int) -> torch.Tensor:
    return torch.tensor(law, dtype=torch.float32).log().expand(*shape, len(law))


def rounds_of(many: int = MANY, **fields) -> dict:
    """Arguments of ``many`` rounds of one request, far apart."""
    return {
        "sampling": ft.Sampling(seed=3, **fields).prepare(1),
        "base": 1 + 8 * torch.arange(many),
        "slots": torch.zeros(many, dtype=torch.int32),
    }


def firsts(verdict, vocab: int = len(TARGET)) -> np.ndarray:
    return np.bincount(verdict.tokens[:, 0].numpy(), minlength=vocab)


@pytest.mark.parametrize(
    "filters",
    [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.4}, {"temperature": 0.5}],
    ids=lambda filters: next(iter(filters)),
)
def test_row_01_drafts_from_filtered_logits_declared_raw(filters):
    """transformers 47932: three drafters sampled from warped logits and handed over the raw ones."""
    drawn = ft.ops.sample(logits_of(DRAFT, MANY), purpose="draft", **rounds_of(**filters))
    fits = {}
    for declared in (filters, {}):
        verdict = ft.ops.verify(
            logits_of(TARGET, MANY, 2),
            drawn[:, None],
            draft_logits=logits_of(DRAFT, MANY, 1),
            draft_sampling=ft.Sampling(seed=0, **declared).prepare(1),
            **rounds_of(),
        )
        fits[bool(declared)] = fit(firsts(verdict), TARGET)
    assert_fits(fits[True])
    assert_misfits(fits[False], "raw logits declared")


def rejection_table(drawn: np.ndarray, kept: np.ndarray, closing: np.ndarray) -> np.ndarray:
    """Counts of (draft, closing token), with a last column for what was kept."""
    vocab = len(TARGET)
    column = np.where(kept, vocab, closing)
    return np.bincount(drawn * (vocab + 1) + column, minlength=vocab * (vocab + 1))


def rejection_law() -> np.ndarray:
    kept = np.minimum(TARGET, DRAFT)
    residual = np.maximum(TARGET - DRAFT, 0.0)
    return np.column_stack([np.outer(DRAFT - kept, residual / residual.sum()), kept]).ravel()


@pytest.mark.parametrize("method", ["inverse", "gumbel"])
def test_row_02_drafts_and_recoveries_share_no_noise(method):
    """vllm 54282: draft and recovery were drawn with the Gumbel noise of one seed and position."""
    drawn = ft.ops.sample(logits_of(DRAFT, MANY), purpose="draft", method=method, **rounds_of())
    verdict = ft.ops.verify(
        logits_of(TARGET, MANY, 2), drawn[:, None], draft_logits=logits_of(DRAFT, MANY, 1), **rounds_of()
    )
    kept = verdict.num_accepted.numpy() == 1
    counts = rejection_table(drawn.numpy(), kept, verdict.tokens[:, 0].numpy())
    assert_fits(fit(counts, rejection_law()))

    rng = np.random.default_rng(0)
    noise = rng.gumbel(size=(MANY, len(TARGET)))
    drawn = (np.log(DRAFT) + noise).argmax(-1)
    kept = rng.random(MANY) * DRAFT[drawn] < TARGET[drawn]
    with np.errstate(divide="ignore"):
        closing = (np.log(np.maximum(TARGET - DRAFT, 0.0)) + noise).argmax(-1)
    assert_misfits(fit(rejection_table(drawn, kept, closing), rejection_law()), "one noise for both")


def test_row_03_the_coin_that_rejects_does_not_choose_what_follows():
    """vllm-ascend 16370: the uniform number that rejected a draft was the one that drew the recovery."""
    many, vocab, parts = 15_000, len(TARGET), 6
    given = rounds_of(many)
    drawn = ft.ops.sample(logits_of(DRAFT, many), purpose="draft", **given)
    verdict = ft.ops.verify(
        logits_of(TARGET, many, 2), drawn[:, None], draft_logits=logits_of(DRAFT, many, 1), **given
    )
    rejected = np.flatnonzero(verdict.num_accepted.numpy() == 0)
    seed = given["sampling"].get(0)[-1]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    coins = np.array([philox([int(given["base"][b]), 0, 1 << 24 | 1, 0], key)[0] / 2**32 for b in rejected])
    keep = (TARGET / DRAFT)[drawn[rejected].numpy()]
    assert (coins >= keep - 1e-6).all()  # these are the coins that rejected
    where = np.clip(parts * (coins - keep) / (1.0 - keep), 0, parts - 1).astype(int)
    residual = np.maximum(TARGET - DRAFT, 0.0) / np.maximum(TARGET - DRAFT, 0.0).sum()
    law = np.outer(np.full(parts, 1.0 / parts), residual).ravel()

    def found(closing: np.ndarray):
        return fit(np.bincount(where * vocab + closing, minlength=parts * vocab), law)

    assert_fits(found(verdict.tokens[rejected, 0].numpy()))
    reused = np.searchsorted(np.cumsum(residual), np.minimum(coins, 1 - 1e-9), side="right")
    assert_misfits(found(np.minimum(reused, np.flatnonzero(residual).max())), "the coin drawn with again")


def test_row_07_every_position_has_the_law_and_not_only_the_last():
    """ATOM 2318: drafts were held against the argmax, and only the bonus token saw the temperature."""
    drafts, given = 3, rounds_of()
    target = torch.stack([logits_of(np.roll(TARGET, i)) for i in range(drafts + 1)])
    drawn = [ft.ops.sample(logits_of(DRAFT, MANY), step=i, purpose="draft", **given) for i in range(drafts)]

    def marginals(rows: torch.Tensor):
        verdict = ft.ops.verify(
            rows.expand(MANY, -1, -1),
            torch.stack(drawn, 1),
            draft_logits=logits_of(DRAFT, MANY, drafts),
            **given,
        )
        for i in range(drafts + 1):
            plain = ft.ops.sample(rows[i].expand(MANY, -1), **(given | {"base": given["base"] + i}))
            tokens = torch.where(verdict.num_emitted > i, verdict.tokens[:, i], plain)
            yield fit(np.bincount(tokens.numpy(), minlength=len(TARGET)), np.roll(TARGET, i))

    for found in marginals(target):
        assert_fits(found)
    sharp = target.clone()
    sharp[:drafts] *= 50.0
    *front, bonus = marginals(sharp)
    assert_fits(bonus)
    for found in front:
        assert_misfits(found, "argmax at the drafts")


@pytest.mark.parametrize("filters", [{"temperature": 1.6}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.7}])
def test_row_08_a_session_with_a_drafter_samples_as_asked(filters):
    """LiteRT-LM 3017: with speculation on, the verifier never heard of the request's temperature."""
    row = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0, -0.5]])

    def forward(step):
        return row.expand(*step.tokens.shape, -1)

    drafter = ModelDrafter(lambda step: 0.5 * forward(step), max_batch=16, vocab_size=6, max_length=400)
    session = ft.Session(max_batch=16, vocab_size=6, max_length=400, drafter=drafter, num_drafts=3)
    requests = [session.admit([0], ft.Sampling(seed=i, **filters), max_new_tokens=390) for i in range(16)]
    drain(session, forward)
    counts = np.bincount(np.concatenate([session.generated(r) for r in requests]), minlength=6)
    assert_fits(fit(counts, row_law(row[0].tolist(), Filters(**filters))))
    assert_misfits(fit(counts, row_law(row[0].tolist())), "temperature 1, no filters")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_row_09_the_law_drawn_from_is_the_law_verified(dtype):
    """DeepSpec 31: drafts drawn from bf16 logits, their probabilities taken from float32 ones."""
    batch = make(size=40, drafts=1, vocab=301, dtype=dtype, seed=9)
    records = torch.empty(batch.size, 4, dtype=torch.int64)

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        ft.ops.sample(logits, sampling=batch.sampling(), base=batch.base, purpose="draft", records=records)
        return records.clone()

    exact = drawn(batch.draft[:, 0])
    assert torch.equal(exact, drawn(batch.draft[:, 0].float()))
    for rule in ("token", "block"):
        plain = batch.verify(rule)
        assert_same_rows(
            batch.verify(rule, draft_records=exact[:, None]), slice(None), plain, slice(None), ROW_FIELDS
        )
    nudged = batch.draft[:, 0].float() * (1 + 2**-10)  # what a float32 path would have had before rounding
    sampled = torch.tensor([kind.temperature > 0.0 for kind in batch.kinds])
    assert (drawn(nudged) != exact).any(-1)[sampled].all()


def test_row_10_residuals_of_any_ratio():
    """vllm 46665: log(1 - draft / target) lost the digits of the residual."""
    plain = (1.0, 0, 1.0, 0.0)
    target = np.array([0.5, 0.5 - 2**-20, 2**-20])
    for ratio in [*(2.0**-e for e in range(1, 25)), *(1.0 - 2.0**-e for e in range(2, 11))]:
        draft = np.array([0.5 * ratio, 0.0, 1.0 - 0.5 * ratio])
        branches = _core.testing.verify_law(
            [np.log(target).tolist()] * 2,
            [draft.tolist(), None],
            [2],
            [0],
            _core.Rule.rrs,
            _core.Draw.iid,
            1,
            plain,
            plain,
            draft_is_probs=True,
            precision="float32",
        )
        (closing,) = [closing for _, node, closing in branches if node == 0]
        expected = target[0] * (1.0 - ratio) / target[1]
        assert closing[0] / closing[1] == pytest.approx(expected, rel=5e-7 / (1.0 - ratio))


def test_row_11_beams_are_no_samples():
    """ml-recurrent-drafter 6: the best candidates of a beam search, verified as if drawn from the softmax."""
    beams = torch.tensor(DRAFT).topk(2).indices.expand(MANY, 2)
    siblings = torch.zeros(MANY, 2, dtype=torch.int64)
    given = {"parents": siblings, **rounds_of()}
    honest = ft.ops.verify(logits_of(TARGET, MANY, 3), beams, **given)
    assert_fits(fit(firsts(honest), TARGET))
    declared = ft.ops.verify(
        logits_of(TARGET, MANY, 3), beams, draft_logits=logits_of(DRAFT, MANY, 2), draw="iid", **given
    )
    assert_misfits(fit(firsts(declared), TARGET), "beams declared as drawn")


@pytest.mark.parametrize("rule", ["target_only", "rrs", "traversal", "coupled"])
def test_row_13_branches_that_begin_alike_share_their_draw(rule):
    """fms-extras 12: each branch of a tree drew a target token of its own for the same prefix."""
    tokens = torch.zeros(MANY, 3, dtype=torch.int64)  # three branches, all of which begin with token 0
    verdict = ft.ops.verify(
        logits_of(TARGET, MANY, 4), tokens, parents=torch.zeros_like(tokens), rule=rule, **rounds_of()
    )
    assert_fits(fit(firsts(verdict), TARGET))
    assert verdict.path[:, 0].max() == 1  # the first of equals
    alone = np.random.default_rng(0).choice(len(TARGET), size=(MANY, 3), p=TARGET)
    first = np.where((alone == 0).any(-1), 0, alone[:, 0])
    assert_misfits(fit(np.bincount(first, minlength=len(TARGET)), TARGET), "a draw for each branch")


# ------------------------------------------------------------------------- rows 17-23: seeds, batches


def test_row_18_seeded_requests_beside_unseeded_ones():
    """vllm 9441: in batches of both, rows without a seed lost their tokens."""
    logits = table(VOCAB, seed=1)
    asks = [Ask([i + 1], 12, ft.Sampling(seed=i if i % 2 else None, temperature=0.9)) for i in range(8)]
    together = bench(logits, "model", max_batch=5).run(asks)
    for i in range(1, 8, 2):
        assert bench(logits, "model").run([asks[i]]) == [together[i]]
    unseeded = [tuple(text) for text in together[::2]]
    assert all(len(text) == 12 and set(text) <= set(range(VOCAB)) for text in unseeded)


def test_row_20_unseeded_requests_share_no_stream():
    """TensorRT-LLM 19487: independent requests without a seed returned the same sample."""
    requests = 1000
    seeds = [ft.Sampling().prepare(1).get(0)[-1] for _ in range(requests)]
    seeds += [table_.get(row)[-1] for table_ in [ft.Sampling().prepare(requests)] for row in range(requests)]
    assert len(set(seeds)) == 2 * requests
    tokens = ft.ops.sample(
        torch.zeros(2 * requests, 64), sampling=ft.Sampling(seed=seeds), base=torch.ones(2 * requests).long()
    )
    assert_fits(fit(np.bincount(tokens.numpy(), minlength=64), np.full(64, 1 / 64)))


def test_row_22_stored_draft_laws_belong_to_their_row_at_every_batch_size():
    """1Cat-vLLM 656: above two sequences, rows were verified against the draft law of another one."""
    whole = make(size=17, drafts=3, seed=22)
    alone = [whole.rows([b]).verify() for b in range(whole.size)]
    for size in range(1, 18):
        batch = whole.rows(list(range(size)))
        order = torch.tensor([2, 0, 1])
        stored = torch.empty_like(batch.draft)
        stored[:, order] = batch.draft
        rows = torch.cat([order, torch.tensor([-1])]).to(torch.int32).expand(size, 4)
        verdict = batch.verify(draft_logits=stored, draft_row=rows)
        for b in range(size):
            assert_same_rows(verdict, [b], alone[b], [0])
    shifted = whole.verify(draft_logits=whole.draft.roll(1, 0))
    assert not torch.equal(shifted.num_accepted, whole.verify().num_accepted)


@pytest.mark.parametrize("kind", ["ngram", "model"])
def test_row_23_acceptance_of_a_request_is_its_own(kind):
    """llama.cpp 27117: with eight or more slots the drafter's states got mixed, and drafts collapsed."""
    logits = table(VOCAB, seed=1)
    asks = [Ask([i % VOCAB, (3 * i) % VOCAB], 20, ft.Sampling(seed=i, temperature=0.5)) for i in range(16)]

    def emitted(some: list[Ask]) -> list[list[int]]:
        made = bench(logits, kind, max_batch=len(some))
        requests = [ask.admit(made.session) for ask in some]
        counts: dict[int, list[int]] = {request.id: [] for request in requests}
        for events in rounds(made.session, made.target):
            for event in events:
                counts[event.request.id].append(len(event.tokens))
        return [counts[request.id] for request in requests]

    together = emitted(asks)
    assert together == [emitted([ask])[0] for ask in asks]
    assert max(max(counts) for counts in together) > 1


# ------------------------------------------------------------- rows 24-36: damaged inputs, large offsets


@pytest.mark.parametrize("scale", [1.0, 1.0 - 1e-6, 1.0 + 1e-6])
def test_row_27_rows_that_do_not_quite_add_up(scale):
    """flashinfer 384: a cumulative sum that never exceeded the uniform number gave id 1061800448."""
    near = torch.full((64, 17), 1e-8).scatter(1, (torch.arange(64) % 17)[:, None], 1.0)
    base = torch.arange(1, 65)
    for rows in (near * scale, torch.full((64, 17), scale / 17), near.round() * scale):
        tokens = ft.ops.sample(rows.log(), sampling=ft.Sampling(seed=0), base=base)
        assert ((tokens >= 0) & (tokens < 17)).all()
        verdict = ft.ops.verify(
            near.log()[:, None].expand(-1, 2, -1),
            tokens[:, None],
            draft_probs=rows[:, None],
            sampling=ft.Sampling(seed=1),
            base=base,
        )
        assert not verdict.status.any()
        emitted = verdict.tokens[verdict.tokens != -1]
        assert ((emitted >= 0) & (emitted < 17)).all()


STRIDE = 2**31 + 8  # the second row begins past 2^31 elements, the third past 2^32


def far_apart(tensor: torch.Tensor, stride: int = STRIDE) -> torch.Tensor:
    """A copy whose rows lie ``stride`` elements apart, with address space and no memory between them."""
    inner = tensor[0].numel()
    size = ((len(tensor) - 1) * stride + inner) * tensor.element_size()
    reserve_nothing = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, which Python 3.11 cannot name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=tensor.dtype)
    copy = memory.as_strided(tensor.shape, (stride, *tensor[0].contiguous().stride()))
    return copy.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_31_target_rows_past_32_bits(dtype):
    """vllm 46560: row * vocabulary in 32 bits; here the third row begins at 2^32 + 16 elements."""
    batch = make(size=3, dtype=dtype, seed=31)
    plain = batch.verify()
    far = far_apart(batch.target)
    assert_same_rows(batch.verify(target_logits=far), slice(None), plain, slice(None))
    assert 2 * far.stride(0) > 2**32
    wrapped = batch.target.clone()  # to a 32-bit offset the third row lies 16 elements into the first
    wrapped[2].view(-1)[:-16] = batch.target[0].flatten()[16:]
    assert not torch.equal(batch.verify(target_logits=wrapped).logprobs[2], plain.logprobs[2])


@pytest.mark.parametrize(
    "name", ["draft_logits", "draft_probs", "draft_topk", "bitmask", "history", "draft_tokens", "draft_row"]
)
def test_row_32_every_other_argument_past_32_bits(name):
    """vllm 47383, 48055: the same overflow, missed in the kernels beside the one that was mended."""
    batch = make(size=6, seed=32, kinds=KINDS[:1])
    probs, ids = batch.draft.softmax(-1).sort(-1)
    sampling = ft.Sampling(seed=batch.seeds, presence_penalty=0.5)
    given = {
        "draft_logits": {"draft_logits": batch.draft},
        "draft_probs": {"draft_logits": None, "draft_probs": batch.draft.softmax(-1)},
        "draft_topk": {"draft_logits": None, "draft_topk": (ids.int(), probs)},
        "bitmask": {"bitmask": torch.randint(-(2**31), 2**31, (6, 5, 2), dtype=torch.int32)},
        "history": {
            "history": torch.randint(0, 37, (6, 40), dtype=torch.int32),
            "prompt_lengths": torch.full((6,), 4),
            "base": torch.tensor([40, 30, 20, 40, 30, 20]),
            "sampling": sampling,
            "draft_sampling": sampling,
        },
        "draft_tokens": {"draft_tokens": batch.tokens.int()},
        "draft_row": {"draft_row": torch.arange(5, dtype=torch.int32).repeat(6, 1)},
    }[name]
    value = given[name]
    far = tuple(map(far_apart, value)) if isinstance(value, tuple) else far_apart(value)
    plain = batch.verify(**given)
    assert_same_rows(batch.verify(**(given | {name: far})), slice(None), plain, slice(None))


def test_row_33_filters_past_32_bits():
    """sglang 35571: renormalising after top-k silently corrupted the rows past 2^31 elements."""
    batch = make(size=3, vocab=2500, seed=33)
    for kind in ({"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.05}, {"temperature": 0.0}):
        given = {"sampling": ft.Sampling(seed=batch.seeds, **kind), "base": batch.base, "logprobs": True}
        tokens, logprobs = ft.ops.sample(far_apart(batch.target[:, 0]), **given)
        plain_tokens, plain_logprobs = ft.ops.sample(batch.target[:, 0], **given)
        assert torch.equal(tokens, plain_tokens)
        assert torch.equal(logprobs, plain_logprobs)


@pytest.mark.parametrize("size", [2, 16])
def test_row_34_the_last_row_of_any_batch(size):
    """flash-linear-attention 1080: as many elements, but only larger batches were wrong in the last row."""
    batch = make(size=size, seed=34)
    far = far_apart(batch.target, stride=2 * STRIDE // (size - 1))
    verdict = batch.verify(target_logits=far)
    assert_same_rows(verdict, [size - 1], batch.verify(), [size - 1])


# ------------------------------------------------------------------- rows 37-44: lengths, empty drafts


def test_row_43_a_skipped_round_is_no_draft_of_token_0():
    """vllm 52762, 54054: a round without drafts was encoded as drafts of token 0, verified and counted."""
    batch = make(size=6, drafts=2, seed=43)
    counts = torch.tensor([0, 2, 0, 2, 0, 2], dtype=torch.int32)
    batch.tokens[counts == 0] = 0
    verdict = batch.verify(num_drafts=counts)
    assert verdict.num_accepted[counts == 0].eq(0).all()
    emptied = batch.verify(num_drafts=counts, draft_tokens=torch.where(counts[:, None] > 0, batch.tokens, -1))
    assert_same_rows(emptied, slice(None), verdict, slice(None))

    # Token 0 is a draft like any other where it is one, and nothing is counted where nothing was drafted.
    for num_drafts, checked in ((0, 0), (3, 3)):
        session = counting_session(drafter=CountingDrafter(), num_drafts=3)
        request = session.admit(
            [VOCAB - 2], ft.Sampling(temperature=0.0), max_new_tokens=4, num_drafts=num_drafts
        )
        events = drain(session)
        assert session.generated(request) == [VOCAB - 1, 0, 1, 2]
        assert sum(event.num_drafts for event in events) == checked
