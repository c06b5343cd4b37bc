"""Log-probabilities of what was emitted: processed, raw, the likeliest beside it, against float64 torch.

"Bug row 57" (llama.cpp 27972) is a speculative path that reported 0.0 for every token.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import foretoken as ft
from batches import DTYPES, assert_same_rows
from constrained import FILTERS, KINDS, Rules, Scene
from foretoken.ops import Status, Verdict
from reference import Filters, row_law
from toys import GREEDY, VOCAB, Ask, bench, context_of, drain, table

DECISIONS = ["tokens", "num_emitted", "num_accepted", "path", "next_token", "next_lengths", "status"]
RULES = ["token", "traversal", "target_only", "coupled", "lossy_synthetic", "lossy_relaxed"]


def scene_of(seed: int, *, ties: bool = False, kinds=KINDS, filters=FILTERS) -> Scene:
    scene = Scene(seed, tree=seed % 2 == 0, dtype=DTYPES[seed % 3], kinds=kinds, filters=filters)
    if ties:
        scene.target = (scene.target / 2).round() * 2
    scene.draft_tokens()
    if seed % 3 == 1:
        scene.allow()
    return scene


def verify(scene: Scene, rule: str = "traversal", **change) -> Verdict:
    arguments = scene.arguments(
        sampling=scene.table(),
        draft_logits=scene.draft,
        bitmask=None if scene.allowed is None else scene.bitmask(),
        rule=rule,
        tolerance=ft.ops.Tolerance(rates=(0.7,) * 6, relaxed_top_k=5, relaxed_delta=3.0),
        raw_logprobs=True,
        num_top=5,
        **scene.history(),
    )
    return ft.ops.verify(scene.target, scene.tokens, **(arguments | change))


def nodes_of(verdict: Verdict, b: int) -> list[int]:
    """The node whose row each emitted token came from."""
    return [0, *verdict.path[b].tolist()][: int(verdict.num_emitted[b])]


def processed_law(scene: Scene, b: int, node: int) -> list[float]:
    allowed = None if scene.allowed is None else scene.allowed[b][node]
    row = scene.node_row(scene.target[b, node], b, scene.path(b, node), allowed)
    return row_law(row.tolist(), scene.filters[b])


def raw_law(scene: Scene, b: int, node: int) -> list[float]:
    return scene.target[b, node].double().softmax(-1).tolist()


def log_of(probability: float) -> float:
    return math.log(probability) if probability > 0.0 else -math.inf


def likeliest(law: list[float], n: int) -> list[int]:
    """Best first, the lowest id first on ties, nothing without mass."""
    order = sorted((token for token, p in enumerate(law) if p > 0.0), key=lambda token: (-law[token], token))
    return (order + [-1] * n)[:n]


def check(law: list[float], token: int, chosen: float, top: Tensor, top_logprobs: Tensor) -> None:
    assert chosen == pytest.approx(log_of(law[token]), abs=1e-5)
    ids = top.tolist()
    # Logits that differ by less than float32 shows in the law have no order there.
    assert ids == likeliest([float(f"{p:.9e}") for p in law], len(ids))
    expected = [log_of(law[i]) if i >= 0 else -math.inf for i in ids]
    assert top_logprobs.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_every_emitted_token_in_float64(rule):
    """Bug row 57: accepted, recovered and bonus tokens; filters, penalties, grammars; chains and trees."""
    reasons = set()
    for seed in range(6):
        scene = scene_of(seed, ties=seed >= 3)
        verdict = verify(scene, rule)
        for b in range(scene.size):
            nodes = nodes_of(verdict, b)
            reasons |= {"accepted"} if len(nodes) > 1 else set()
            reasons.add("recovery" if nodes[-1] in [0, *scene.parents[b]] else "bonus")
            for i, node in enumerate(nodes):
                token = int(verdict.tokens[b, i])
                processed = verdict.logprobs, verdict.top_tokens, verdict.top_logprobs
                raw = verdict.raw_logprobs, verdict.raw_top_tokens, verdict.raw_top_logprobs
                for law, (chosen, top, logprobs) in (
                    (processed_law(scene, b, node), processed),
                    (raw_law(scene, b, node), raw),
                ):
                    check(law, token, float(chosen[b, i]), top[b, i], logprobs[b, i])
    assert reasons == {"accepted", "recovery", "bonus"}


@pytest.mark.parametrize("n", [1, 2, 44, 45, 60])
def test_as_many_as_there_are(n):
    """More than the vocabulary has, or than the filters leave: -1 and -inf behind the last."""
    scene = scene_of(1, kinds=[Rules()])
    verdict = verify(scene, num_top=n)
    for b in range(scene.size):
        left = sum(p > 0.0 for p in processed_law(scene, b, 0))
        assert verdict.top_tokens[b, 0].ge(0).sum() == min(n, left)
        assert verdict.raw_top_tokens[b, 0].ge(0).sum() == min(n, 45)
        for top, logprobs in (
            (verdict.top_tokens, verdict.top_logprobs),
            (verdict.raw_top_tokens, verdict.raw_top_logprobs),
        ):
            assert torch.equal(top[b, 0] < 0, logprobs[b, 0] == -torch.inf)
            assert (logprobs[b, 0].diff() <= 0.0)[top[b, 0, 1:] >= 0].all()


def test_ties_go_to_the_lowest_id():
    """Across tiles of the row, in any dtype, negative zero among them."""
    for dtype in DTYPES:
        logits = torch.zeros(1, 1, 2600, dtype=dtype)
        logits[0, 0, ::2] = -0.0
        logits[0, 0, [2100, 1500, 700]] = 4.0
        verdict = ft.ops.verify(
            logits,
            torch.empty(1, 0, dtype=torch.int64),
            sampling=ft.Sampling(seed=1),
            base=torch.ones(1, dtype=torch.int64),
            logprobs=True,
            raw_logprobs=True,
            num_top=6,
        )
        for top in (verdict.top_tokens, verdict.raw_top_tokens):
            assert top.tolist() == [[[700, 1500, 2100, 0, 1, 2]]]


def test_greedy_rows():
    """A point law has one token; the raw softmax knows nothing of the temperature."""
    scene = scene_of(2, filters=[Filters(temperature=0.0)])
    verdict = verify(scene)
    for b in range(scene.size):
        for i, node in enumerate(nodes_of(verdict, b)):
            token = int(verdict.tokens[b, i])
            assert verdict.logprobs[b, i] == 0.0
            assert verdict.top_tokens[b, i].tolist() == [token, -1, -1, -1, -1]
            assert verdict.top_logprobs[b, i].tolist() == [0.0] + [-math.inf] * 4
            expected = log_of(raw_law(scene, b, node)[token])
            assert float(verdict.raw_logprobs[b, i]) == pytest.approx(expected, abs=1e-5)


def test_what_nothing_was_emitted_to_is_padding():
    """Behind the last token, and in padded rows."""
    scene = scene_of(3)
    scene.num_drafts[[0, 5]] = -1
    verdict = verify(scene)
    for b in range(scene.size):
        behind = int(verdict.num_emitted[b])
        assert behind == 0 or b not in (0, 5)
        for chosen in (verdict.logprobs, verdict.raw_logprobs):
            assert chosen[b, behind:].eq(0.0).all()
        for top in (verdict.top_tokens, verdict.raw_top_tokens):
            assert top[b, behind:].eq(-1).all()
        for logprobs in (verdict.top_logprobs, verdict.raw_top_logprobs):
            assert logprobs[b, behind:].eq(-torch.inf).all()


def test_rows_without_a_law():
    """A grammar that allows nothing leaves the raw softmax; NaN leaves nothing."""
    scene = scene_of(4, kinds=[Rules()])
    scene.allowed[2] = [set()] * (scene.nodes + 1)
    scene.target[3, 0, 7] = torch.nan
    verdict = verify(scene)
    assert verdict.status[2:4].tolist() == [Status.LAW_LOST] * 2
    for b in (2, 3):
        assert verdict.logprobs[b, 0] == -torch.inf
        assert verdict.top_tokens[b, 0].eq(-1).all()
    token = int(verdict.tokens[2, 0])
    assert float(verdict.raw_logprobs[2, 0]) == pytest.approx(log_of(raw_law(scene, 2, 0)[token]), abs=1e-5)
    assert verdict.raw_top_tokens[2, 0].ge(0).all()
    assert verdict.raw_logprobs[3, 0] == -torch.inf
    assert verdict.raw_top_tokens[3, 0].eq(-1).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_any_part_of_them_in_any_buffers(dtype):
    """Alone or together, strided, of either id dtype: the same numbers, and the same decisions without."""
    scene = scene_of(5)
    scene.tokens = scene.tokens.to(dtype)
    whole = verify(scene)
    names = ["logprobs", "top_tokens", "top_logprobs", "raw_logprobs", "raw_top_tokens", "raw_top_logprobs"]
    for kept in ([], ["logprobs"], ["raw_logprobs"], names[1:3], names[4:], names):
        out = Verdict.empty(
            scene.size, scene.nodes, dtype=dtype, logprobs=True, raw_logprobs=True, num_top=5, path_rows=True
        )
        for name in names:
            buffer = getattr(out, name)
            spread = torch.stack([buffer, buffer], -1)[..., 1] if name in kept else None
            setattr(out, name, spread)
        verify(scene, out=out)
        assert_same_rows(out, slice(None), whole, slice(None), [*DECISIONS, *kept])


@pytest.mark.parametrize("flattened", [False, True], ids=["padded", "flattened"])
def test_path_rows_gather_what_each_token_came_from(flattened):
    """Hidden states and logits, from ``[B, T]`` or from rows that lie one behind the other."""
    for seed in range(4):
        scene = scene_of(seed, kinds=[Rules()], filters=[Filters(temperature=0.0)])
        scene.num_drafts = torch.tensor([scene.pick.randint(-1, scene.nodes) for _ in range(scene.size)])
        scene.num_drafts = scene.num_drafts.to(torch.int32)
        scene.allowed = None
        # Every other row's drafts are right all the way down.
        for b, node in itertools.product(range(0, scene.size, 2), range(scene.nodes)):
            scene.tokens[b, node] = scene.target[b, scene.parents[b][node]].argmax()
        counts = [n + 1 for n in scene.num_drafts.tolist()] if flattened else [scene.nodes + 1] * scene.size
        rows = torch.cat([scene.target[b, :n] for b, n in enumerate(counts)])
        hidden = torch.cat(
            [torch.stack([torch.full((n,), b), torch.arange(n)], 1) for b, n in enumerate(counts)]
        )
        out = Verdict.empty(scene.size, scene.nodes, path_rows=True)
        arguments = scene.arguments(draw="iid", sampling=scene.table(), out=out)
        if flattened:
            arguments["row_offsets"] = torch.tensor([0, *itertools.accumulate(counts)])
        ft.ops.verify(rows if flattened else scene.target, scene.tokens, **arguments)
        used = out.path_rows >= 0
        assert torch.equal(used.sum(1), out.num_emitted.long())
        assert torch.equal(out.path_rows < 0, out.tokens < 0)
        assert torch.equal(rows[out.path_rows[used]].argmax(-1), out.tokens[used])
        for b in range(scene.size):
            gathered = hidden[out.path_rows[b, : int(out.num_emitted[b])]].tolist()
            assert gathered == [[b, node] for node in nodes_of(out, b)]
        assert (out.num_accepted > 0).sum() > 1


# ----------------------------------------------------------------------------- through a session


@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_sessions_report_those_of_the_plain_loop(kind):
    """Bug row 57 at the other end: every event, whatever the kind of its tokens, under penalties too."""
    logits = table(VOCAB, seed=1)
    laws = [
        ft.Sampling(temperature=0.8, seed=1),
        ft.Sampling(top_k=4, seed=2),
        GREEDY,
        ft.Sampling(repetition_penalty=1.4, seed=3),
    ]
    filters = [Filters(temperature=0.8), Filters(top_k=4), Filters(temperature=0.0), Filters()]
    made = bench(logits, kind, max_batch=4, logprobs=True)
    asks = [Ask([1, 2, 1], 30, law) for law in laws]
    requests = {ask.admit(made.session): i for i, ask in enumerate(asks)}
    told: list[list[tuple[int, float, str]]] = [[] for _ in asks]
    for event in drain(made.session, made.target):
        told[requests[event.request]] += zip(event.tokens, event.logprobs, event.kinds, strict=True)
    kinds = set()
    for request, i in requests.items():
        text = made.session.tokens(request)
        assert [token for token, _, _ in told[i]] == text[3:]
        for n, (token, logprob, reason) in enumerate(told[i]):
            row = logits[context_of(text[: 3 + n])].clone()
            if i == 3:
                seen = sorted(set(text[: 3 + n]))
                row[seen] = torch.where(row[seen] > 0, row[seen] / 1.4, row[seen] * 1.4)
            assert logprob == pytest.approx(log_of(row_law(row.tolist(), filters[i])[token]), abs=1e-5)
            kinds.add(reason)
    assert kinds == ({"bonus"} if kind == "none" else {"accepted", "recovery", "bonus"})
