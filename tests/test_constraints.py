"""Penalties, bias, bans and grammars in ``ops.sample`` and ``ops.verify``, node by node.

The oracle edits rows of logits by hand (``constrained.py``) and calls the same operation without constraints:
every integer has to be equal. "Bug row N" names a mistake made in some other project.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers.generation import logits_process as hf

import foretoken as ft
from batches import DTYPES, assert_same_rows
from constrained import KINDS, WILD, WORDS, Rules, Scene, bits
from foretoken.ops import Status, Verdict

VERDICT = [
    "tokens",
    "num_emitted",
    "num_accepted",
    "path",
    "next_token",
    "next_lengths",
    "status",
    "logprobs",
    "top_tokens",
    "top_logprobs",
]
DRAWS = ["deterministic", "iid", "without_replacement"]
RULES = ["auto", "token", "traversal", "target_only", "spectr", "coupled", "lossy_typical", "lossy_threshold"]


def both_ways(scene: Scene, rule: str = "auto", draw: str = "iid", **change) -> tuple[Verdict, Verdict]:
    """The library's constraints, and rows edited by hand."""
    bitmask = {} if scene.allowed is None else {"bitmask": scene.bitmask()}
    laws = {} if draw == "deterministic" else {"draft_logits": scene.draft}
    given = scene.arguments(rule=rule, draw=draw, **change)
    native = ft.ops.verify(
        scene.target, scene.tokens, sampling=scene.table(), **bitmask, **scene.history(), **given, **laws
    )
    if laws:
        laws = {"draft_logits": scene.by_hand(scene.draft, masked=False)}
    by_hand = ft.ops.verify(
        scene.by_hand(scene.target, masked=True),
        scene.tokens,
        sampling=scene.table(plain=True),
        **given,
        **laws,
    )
    return native, by_hand


def assert_equal(native: Verdict, by_hand: Verdict) -> None:
    assert_same_rows(native, slice(None), by_hand, slice(None), VERDICT)


# ---------------------------------------------------------------------------------------- ops.sample


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("purpose", ["plain", "draft"])
def test_samples_are_those_of_rows_edited_by_hand(purpose, dtype):
    """With a drafted path and without, with a grammar and without; filters, slots and text lengths mixed."""
    for seed in range(8):
        scene = Scene(seed, size=12, dtype=dtype)
        paths = [[scene.pick.randrange(12) for _ in range(scene.pick.randint(0, 4))] for _ in range(12)]
        packed = torch.tensor([path + [-1] * (4 - len(path)) for path in paths])
        allowed = [{v for v in range(45) if scene.pick.random() < 0.4} | {0} for _ in range(12)]
        rows, call = scene.target[:, 0], {"base": scene.base, "slots": scene.slots, "purpose": purpose}
        for path, grammar in itertools.product((packed, packed.int(), None), (allowed, None)):
            edited = torch.stack(
                [
                    scene.node_row(
                        rows[b], b, paths[b] if path is not None else [], grammar[b] if grammar else None
                    )
                    for b in range(12)
                ]
            )
            native = ft.ops.sample(
                rows,
                sampling=scene.table(),
                path=path,
                bitmask=None if grammar is None else bits(grammar, 45),
                step=seed,
                logprobs=True,
                **scene.history(torch.int64 if seed % 2 else torch.int32),
                **call,
            )
            by_hand = ft.ops.sample(
                edited, sampling=scene.table(plain=True), step=seed, logprobs=True, **call
            )
            assert torch.equal(native[0], by_hand[0])
            assert torch.equal(native[1], by_hand[1])


def test_holes_in_a_path_are_no_tokens():
    """-1 stands for no token wherever it is: not for an id, nor for a generated one."""
    scene = Scene(3, kinds=[KINDS[-1]])
    rows, history = scene.target[:, 0], scene.history()
    call = {"sampling": scene.table(), "base": scene.base, "slots": scene.slots, **history}
    packed = torch.tensor([[1, 2]] * scene.size)
    spread = torch.tensor([[-1, 1, -1, 2, -1]] * scene.size)
    one = ft.ops.sample(rows, path=packed, logprobs=True, **call)
    other = ft.ops.sample(rows, path=spread, logprobs=True, **call)
    assert torch.equal(one[1], other[1])
    nothing = ft.ops.sample(rows, path=torch.full((scene.size, 3), -1), logprobs=True, **call)
    assert torch.equal(nothing[1], ft.ops.sample(rows, logprobs=True, **call)[1])
    assert not torch.equal(nothing[1], one[1])


# ---------------------------------------------------------------------------------------- ops.verify


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("rule", RULES)
def test_verdicts_are_those_of_rows_edited_by_hand(rule, draw, tree):
    """Every node of a chain or tree has the penalties of its own path."""
    if rule == "spectr" and draw == "without_replacement":
        pytest.skip("refused by name")
    accepted = flagged = 0
    for seed in range(4):
        scene = Scene(seed, tree=tree, dtype=DTYPES[seed % 3])
        scene.draft_tokens(distinct=draw == "without_replacement")
        if seed % 2:
            scene.allow()
        native, by_hand = both_ways(scene, rule, draw)
        assert_equal(native, by_hand)
        accepted += int(native.num_accepted.sum())
        flagged += int((native.status != 0).sum())
    assert accepted > 20
    assert flagged <= 6


def test_words_cross_from_the_text_into_the_drafts():
    """A ban that counts committed tokens alone, or drafted ones alone, gives another text here."""
    text, vocab = [6, 4], 9
    target = torch.zeros(1, 3, vocab)
    target[0, 0, 5], target[0, 1, 6], target[0, 2, 7] = 9.0, 9.0, 9.0
    greedy = ft.Sampling(temperature=0.0, bad_words=[[4, 5, 6], [5, 6, 7]])
    verdict = ft.ops.verify(
        target,
        torch.tensor([[5, 6]]),
        sampling=greedy,
        base=torch.tensor([2]),
        history=torch.tensor([text]),
        prompt_lengths=torch.tensor([1]),
    )
    assert verdict.tokens.tolist() == [[5, 0, -1]]  # 4 5 | 6: the second draft is banned


def test_siblings_do_not_count_for_each_other():
    """Only what lies on the way to a node is text; a node beside it is not."""
    vocab = 6
    target = torch.zeros(1, 4, vocab)
    target[0, :, 3] = 1.0
    target[0, :, 4] = 0.5
    target[0, 0, 1] = 9.0
    greedy = ft.Sampling(temperature=0.0, presence_penalty=2.0)
    verdict = ft.ops.verify(
        target,
        torch.tensor([[3, 1, 3]]),  # children of the root: 3, 1; below 1: 3
        parents=torch.tensor([[0, 0, 2]]),
        sampling=greedy,
        base=torch.tensor([1]),
        history=torch.tensor([[0]]),
        prompt_lengths=torch.tensor([1]),
    )
    assert verdict.tokens.tolist() == [[1, 3, 4, -1]]
    assert verdict.path.tolist() == [[2, 3, -1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ragged_rows_in_any_layout(dtype):
    """Padded rows, no drafts, flattened logits and grammar, strided history: the same verdicts."""
    for seed in range(6):
        scene = Scene(seed, tree=seed % 2 == 0)
        scene.num_drafts = torch.tensor([scene.pick.randint(-1, scene.nodes) for _ in range(scene.size)])
        scene.num_drafts = scene.num_drafts.to(torch.int32)
        scene.draft_tokens()
        scene.allow()
        native, by_hand = both_ways(scene, "auto")
        assert_equal(native, by_hand)
        assert native.num_emitted[scene.num_drafts < 0].eq(0).all()

        counts = (scene.num_drafts + 1).tolist()
        offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=dtype)
        mask = scene.bitmask()
        history = {
            name: torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0].to(dtype)
            for name, tensor in scene.history().items()
        }
        wide = torch.zeros(*mask.shape, 3, dtype=torch.int32)
        wide[..., 1] = mask
        flat = ft.ops.verify(
            torch.cat([scene.target[b, :n] for b, n in enumerate(counts)]),
            scene.tokens,
            row_offsets=offsets,
            bitmask=torch.cat([wide[b, :n] for b, n in enumerate(counts)])[..., 1],
            draft_logits=scene.draft,
            sampling=scene.table(),
            **history,
            **scene.arguments(),
        )
        assert_equal(flat, native)


def test_a_row_is_itself_in_any_batch():
    scene = Scene(5)
    scene.draft_tokens()
    scene.allow()
    whole, _ = both_ways(scene)
    table, history, mask = scene.table(), scene.history(), scene.bitmask()
    for b in range(scene.size):
        one = slice(b, b + 1)
        alone = ft.ops.verify(
            scene.target[one],
            scene.tokens[one],
            parents=torch.tensor(scene.parents[one]),
            draft_logits=scene.draft[one],
            bitmask=mask[one],
            sampling=table,
            base=scene.base[one],
            slots=scene.slots[one],
            logprobs=True,
            num_top=3,
            **history,
        )
        assert_same_rows(alone, [0], whole, [b], VERDICT)


def test_another_law_for_the_drafter():
    """``draft_sampling`` with penalties of its own over a target without, and the other way round."""
    scene = Scene(7)
    scene.draft_tokens()
    edited = scene.by_hand(scene.draft, masked=False), scene.by_hand(scene.target, masked=True)
    plain, constrained, history = scene.table(plain=True), scene.table(), scene.history()
    given = scene.arguments()

    def verify(target, draft, **more):
        return ft.ops.verify(target, scene.tokens, draft_logits=draft, **given, **more)

    draft_alone = verify(scene.target, scene.draft, sampling=plain, draft_sampling=constrained, **history)
    assert_equal(draft_alone, verify(scene.target, edited[0], sampling=plain))
    target_alone = verify(scene.target, scene.draft, sampling=constrained, draft_sampling=plain, **history)
    assert_equal(target_alone, verify(edited[1], scene.draft, sampling=plain))


# --------------------------------------------------------------------------------- transformers


def by_transformers(processors: list, text: list[int], row: torch.Tensor) -> torch.Tensor:
    scores = row[None].float().clone()
    for processor in processors:
        scores = processor(torch.tensor([text]), scores)
    return scores[0]


def processors_of(rules: Rules, prompt: int) -> list:
    """In transformers' own order."""
    made = []
    if rules.bias:
        made.append(hf.SequenceBiasLogitsProcessor({(token,): bias for token, bias in rules.bias.items()}))
    if rules.repetition != 1.0:
        made.append(hf.RepetitionPenaltyLogitsProcessor(rules.repetition))
    if rules.bad_words:
        made.append(hf.NoBadWordsLogitsProcessor(rules.bad_words))
    if rules.min_new_tokens:
        made.append(hf.MinNewTokensLengthLogitsProcessor(prompt, rules.min_new_tokens, rules.stop_ids))
    return made


WITH_A_PROCESSOR = [
    Rules(repetition=1.4),
    Rules(repetition=0.6),
    Rules(bias={5: 2.5, 9: -1e9, 40: -3.0}),
    Rules(bad_words=WORDS[:4]),
    Rules(min_new_tokens=9, stop_ids=[10, 11]),
    Rules(repetition=1.2, bias={1: 1.5}, bad_words=WORDS[:4], min_new_tokens=6, stop_ids=[10, 11]),
]


@pytest.mark.parametrize("rules", WITH_A_PROCESSOR, ids=str)
def test_transformers_processors_agree(rules):
    """Node by node over chains and trees: the processors are shown the text that leads to the node.

    transformers does not look for a word that is longer than the text; our texts have four tokens or more.
    """
    for seed in range(3):
        scene = Scene(seed, tree=seed != 1, kinds=[rules])
        scene.texts = [[8, 8, 8, *text] for text in scene.texts]
        scene.prompts = [prompt + 3 for prompt in scene.prompts]
        scene.draft_tokens()
        edited = []
        for rows in (scene.target, scene.draft):
            edited.append(rows.clone())
            for b, node in itertools.product(range(scene.size), range(scene.nodes + 1)):
                text = scene.texts[b] + scene.path(b, node)
                edited[-1][b, node] = by_transformers(
                    processors_of(rules, scene.prompts[b]), text, rows[b, node]
                )
        native, _ = both_ways(scene)
        plain = ft.ops.verify(
            edited[0],
            scene.tokens,
            draft_logits=edited[1],
            sampling=scene.table(plain=True),
            **scene.arguments(),
        )
        assert_equal(native, plain)


# ------------------------------------------------------------------------- grammars (bug row 58)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 45, 1027])
def test_bitmasks_end_where_the_vocabulary_does(vocab):
    """Bits behind the vocabulary allow nothing, and bit 31 is a sign bit to int32."""
    logits = torch.zeros(vocab, vocab)
    masks = bits([{token} for token in range(vocab)], vocab)
    tokens = ft.ops.sample(
        logits, sampling=ft.Sampling(seed=1), base=torch.arange(vocab), bitmask=masks, logprobs=True
    )
    assert tokens[0].tolist() == list(range(vocab))
    assert tokens[1].eq(0.0).all()


def legal_after(text: list[int]) -> set[int]:
    """A toy grammar: brackets 0 and 1 in pairs, at most two open, 2 anywhere, 3 only outside brackets."""
    depth = text.count(0) - text.count(1)
    return {2} | ({0} if depth < 2 else set()) | ({1} if depth else {3})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["auto", "token", "block", "coupled", "lossy_synthetic", "lossy_typical"])
def test_every_emitted_token_is_legal(rule, temperature):
    """Bug row 58: accepted, recovered and bonus tokens alike, a draft made illegal at each offset in turn.

    The lossy rules too: what a lossy rule may keep is only ever a token with mass, but for the synthetic one.
    """
    drafts, vocab, rows = 3, 35, 300
    sampling = ft.Sampling(temperature=temperature, seed=5)
    tolerance = ft.ops.Tolerance(rates=(0.9,) * 3)
    generator = torch.Generator().manual_seed(0)
    bonus = 0
    for illegal in (None, 0, 1, 2):
        tokens, masks = [], []
        for b in range(rows):
            text = [0] if b % 2 else []
            chain = []
            for i in range(drafts):
                choices = sorted(legal_after(text + chain))
                chain.append(34 if i == illegal else choices[(b // 2 + i) % len(choices)])
            # Behind an illegal draft there is no text of the grammar: an engine leaves such rows closed.
            tokens.append(chain)
            masks.append(
                [
                    legal_after(text + chain[:i]) if illegal is None or i <= illegal else set()
                    for i in range(drafts + 1)
                ]
            )
        logits = torch.randn(rows, drafts + 1, vocab, generator=generator)
        logits[:, :drafts].scatter_add_(
            2, torch.tensor(tokens)[..., None], torch.full((rows, drafts, 1), 2.0)
        )
        logits[..., 4:] += 5.0  # the model would rather break the rules
        verdict = ft.ops.verify(
            logits,
            torch.tensor(tokens),
            bitmask=torch.stack([bits(row, vocab) for row in masks]),
            sampling=sampling,
            base=torch.arange(1, rows + 1),
            rule=rule,
            tolerance=tolerance,
        )
        for b, emitted in enumerate(verdict.num_emitted.tolist()):
            legal = [int(verdict.tokens[b, i]) in masks[b][i] for i in range(emitted)]
            if rule == "lossy_synthetic" and illegal is not None:
                continue  # keeps drafts whatever the models say
            assert all(legal), (b, emitted, verdict.tokens[b], masks[b])
            assert illegal is None or emitted <= illegal + 1
            bonus += emitted == drafts + 1
        if rule != "lossy_synthetic" or illegal is None:
            assert not verdict.status.any()
    assert bonus > 20


# ------------------------------------------------------------------------------ what is not there


def test_a_history_that_does_not_reach_the_base():
    """The row is refused before anything is read, its neighbours are what they were."""
    scene = Scene(9, kinds=KINDS[1:])
    scene.draft_tokens()
    plain, _ = both_ways(scene)
    table, history = scene.table(), scene.history()
    others = [b for b in range(scene.size) if b != 4]
    for name, value in [
        ("base", scene.length + 1),
        ("base", 2**62),
        ("base", -1),
        ("base", -(2**63)),
        ("prompt_lengths", len(scene.texts[4]) + 1),
        ("prompt_lengths", -1),
        ("prompt_lengths", 2**31 - 1),
    ]:
        if scene.rules[4].bias and not (scene.rules[4].repetition != 1.0 or scene.rules[4].bad_words):
            pytest.fail("row 4 has to ask for its history")
        given = scene.arguments()
        past = {key: tensor.clone() for key, tensor in history.items()}
        if name == "base":
            given["base"] = scene.base.index_fill(0, torch.tensor([4]), value)
        else:
            past[name][scene.slots[4]] = value
        verdict = ft.ops.verify(
            scene.target, scene.tokens, draft_logits=scene.draft, sampling=table, **past, **given
        )
        assert verdict.status.tolist() == [int(Status.BAD_ROW) * (b == 4) for b in range(scene.size)]
        assert verdict.num_emitted[4] == 0
        assert verdict.tokens[4].eq(-1).all()
        assert_same_rows(verdict, others, plain, others, VERDICT)
        status = torch.empty(scene.size, dtype=torch.int32)
        tokens = ft.ops.sample(
            scene.target[:, 0],
            sampling=table,
            base=given["base"],
            slots=scene.slots,
            status=status,
            **past,
        )
        assert status.tolist() == verdict.status.tolist()
        assert tokens[4] == -1
        assert (tokens[others] >= 0).all()


def test_rows_without_constraints_need_no_history_of_their_own():
    """Beside a constrained row; what the history says of their slots may be anything."""
    scene = Scene(11, kinds=[Rules(), Rules(repetition=1.3, frequency=0.5)])
    scene.draft_tokens()
    history = scene.history()
    for b in range(scene.size):
        if scene.rules[b] == Rules():
            history["prompt_lengths"][scene.slots[b]] = -5
    native, by_hand = both_ways(scene)
    assert_equal(native, by_hand)
    verdict = ft.ops.verify(
        scene.target,
        scene.tokens,
        draft_logits=scene.draft,
        sampling=scene.table(),
        **history,
        **scene.arguments(),
    )
    assert_equal(verdict, native)


def test_history_that_is_missing_is_refused_in_words():
    logits, base = torch.zeros(2, 5), torch.ones(2, dtype=torch.int64)
    history, prompts = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    penalty = ft.Sampling(repetition_penalty=1.2, seed=1)
    for sampling in (penalty, ft.Sampling(bad_words=[[1]], seed=1)):
        with pytest.raises(ValueError, match=r"^history: expected the committed tokens.*, got None"):
            ft.ops.sample(logits, sampling=sampling, base=base)
    with pytest.raises(ValueError, match=r"^prompt_lengths: expected with history"):
        ft.ops.sample(logits, sampling=penalty, base=base, history=history)
    with pytest.raises(ValueError, match=r"^history: expected .* \[>= 2, L\].*got .*\[1, 4\]"):
        ft.ops.sample(logits, sampling=penalty, base=base, history=history[:1], prompt_lengths=prompts[:1])
    with pytest.raises(ValueError, match=r"^history: expected the committed tokens"):
        ft.ops.verify(
            logits[:, None], torch.zeros(2, 0, dtype=torch.int64), draft_sampling=penalty, base=base
        )
    bias = ft.Sampling(logit_bias={1: 3.0}, seed=1)  # asks for no history
    assert ft.ops.sample(logits, sampling=bias, base=base).shape == (2,)


def test_ids_outside_the_vocabulary_are_passed_over():
    """Bias, bad words, stop ids, history: nothing is read or written for them (compare CVE-2026-105757)."""
    for seed in range(6):
        scene = Scene(seed, kinds=[WILD])
        scene.write_wild_ids()
        scene.draft_tokens()
        assert_equal(*both_ways(scene))
        path = torch.tensor([[5, 2**62, 45, -(2**63), 3]] * scene.size)
        native = ft.ops.sample(
            scene.target[:, 0],
            sampling=scene.table(),
            base=scene.base,
            slots=scene.slots,
            path=path,
            logprobs=True,
            **scene.history(torch.int64),
        )
        edited = [scene.node_row(scene.target[b, 0], b, [5, 2**62, 45, 3]) for b in range(scene.size)]
        by_hand = ft.ops.sample(
            torch.stack(edited),
            sampling=scene.table(plain=True),
            base=scene.base,
            slots=scene.slots,
            logprobs=True,
        )
        assert torch.equal(native[0], by_hand[0])
        assert torch.equal(native[1], by_hand[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", float("nan")),
        ("repetition_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", float("inf")),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {2**31: 1.0}),
        ("logit_bias", {3: float("nan")}),
        ("logit_bias", {3: float("inf")}),
        ("bad_words", [[]]),
        ("bad_words", [[1, -2]]),
        ("bad_words", [[2**40]]),
        ("min_new_tokens", -1),
        ("min_new_tokens", 2**31),
    ],
)
def test_unusable_constraints_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got "):
        ft.Sampling(**{field: value})
