"""Laws that drafts were drawn from, handed on as records: the texts of rounds that compute them anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import foretoken as ft
import hf_toys
from foretoken import ops
from foretoken.drafters import Proposal
from foretoken.sampling import Sampling
from foretoken.session import Session
from mirrored import TEST_DEVICE
from rounds_ahead import GatherModel, asks, drafter_of, pair, sessions_ahead, told
from toys import VOCAB, Ask, table

Texts = list[tuple[Any, ...]]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    return sessions_ahead(monkeypatch)


class Watched:
    """`ops.verify` that counts what it is given, and may be kept from records."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hides, self.rows = False, 0
        self._verify = ops.verify
        monkeypatch.setattr(ops, "verify", self)

    def __call__(self, *arguments: Any, **options: Any) -> ops.Verdict:
        records = options.get("draft_records")
        if records is not None:
            assert records.shape == (*options["draft_logits"].shape[:2], 4)
            self.rows += records.shape[0]
            if self.hides:
                options["draft_records"] = None
        return self._verify(*arguments, **options)

    def both(self, run: Callable[[], Texts]) -> tuple[Texts, Texts]:
        """Without records, and with them."""
        self.hides = True
        without = run()
        self.hides, self.rows = False, 0
        return without, run()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
@pytest.mark.parametrize("side", [0, 1], ids=["host", "ahead"])
def test_texts_do_not_depend_on_records(ahead, watched: Watched, side: int, rule: ops.Rule) -> None:
    """Rows that stop drafting before others, laws of all kinds, rules that differ within a round."""
    wanted = asks(40 + side, True, 4, count=9)
    wanted[3].sampling = Sampling(temperature=0.6, repetition_penalty=1.3, bad_words=[[2, 3]], seed=8)
    wanted[4].options["rule"] = "coupled"
    wanted[5].options["rule"] = "token"
    options: dict[str, Any] = {"num_drafts": 4, "rule": rule, "logprobs": True}
    without, with_them = watched.both(lambda: told(*pair(ahead, "model", **options)[side], wanted))
    assert watched.rows > 5
    assert with_them == without


@pytest.mark.parametrize("side", [0, 1], ids=["host", "ahead"])
def test_greedy_rounds_have_none(ahead, watched: Watched, side: int) -> None:
    wanted = [Ask([row, 3], 20) for row in range(4)]
    without, with_them = watched.both(lambda: told(*pair(ahead, "model", num_drafts=3)[side], wanted))
    assert with_them == without
    assert watched.rows == 0


def test_generated_texts_do_not_depend_on_records(watched: Watched) -> None:
    target, draft = hf_toys.llama(), hf_toys.disturbed(hf_toys.llama(), 0.05)
    ids = hf_toys.prompts(2, 6)
    options: dict[str, Any] = {"drafter": draft, "max_new_tokens": 20}

    def run() -> Texts:
        found: Texts = ft.generate(target, ids, sampling=Sampling(seed=4, top_p=0.9), **options).tolist()
        return found

    without, with_them = watched.both(run)
    assert watched.rows > 5
    assert with_them == without


def test_records_follow_their_rows() -> None:
    rows = torch.arange(6).view(3, 2, 1).expand(3, 2, 4)
    proposal = Proposal(rows[..., 0], rows[:, 0, 0], draft_records=rows)
    assert torch.equal(proposal.select(torch.tensor([2, 0])).draft_records, rows[[2, 0]])


@pytest.mark.cuda
@pytest.mark.skipif(TEST_DEVICE != "cuda", reason="the other side is a device")
@pytest.mark.parametrize("rule", ["token", "block"])
def test_texts_on_a_device_do_not_depend_on_records(watched: Watched, rule: ops.Rule) -> None:
    def run() -> Texts:
        logits = table(VOCAB, 3)
        drafter = drafter_of("model", logits, lambda *a: GatherModel(*a, device="cuda"), 3)
        session = Session(
            max_batch=3, vocab_size=VOCAB, max_length=96, drafter=drafter, device="cuda", num_drafts=4,
            rule=rule,
        )  # fmt: skip
        return told(session, GatherModel(logits, 3, 96, "cuda"), asks(41, True, 4, count=9))

    without, with_them = watched.both(run)
    assert watched.rows > 5
    assert with_them == without
