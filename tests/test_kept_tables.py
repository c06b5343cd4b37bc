"""Ops that are given a law and no table: where the law can say but one thing, its table is made once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from foretoken import Sampling, ops
from foretoken.ops import _choices
from mirrored import TEST_DEVICE


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    _choices._kept.clear()
    yield
    _choices._kept.clear()


def test_it_is_made_once_for_a_batch():
    law = Sampling(temperature=0.5, top_p=0.9, seed=7)
    first = _choices.table_of("sampling", law, 2)
    assert _choices.table_of("sampling", law, 2) is first
    assert _choices.table_of("sampling", law, 3).size == 3
    assert _choices.table_of("sampling", Sampling(temperature=0.5, top_p=0.9, seed=7), 2) is not first


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": None},
        {"seed": [1, 2]},
        {"temperature": [0.5, 0.7]},
        {"top_k": [1, 2]},
        {"top_p": [0.5, 0.7]},
        {"min_p": [0.5, 0.7]},
        {"repetition_penalty": 1.2},
        {"presence_penalty": [0.0, 0.0]},
        {"logit_bias": {3: 1.0}},
        {"bad_words": [[1]]},
        {"min_new_tokens": 2, "stop_ids": [1]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_may_change_is_asked_each_time(fields: dict[str, Any]):
    law = Sampling(**{"seed": 1, **fields})
    assert _choices.table_of("sampling", law, 2) is not _choices.table_of("sampling", law, 2)
    assert not _choices._kept


def test_a_bias_put_in_later_counts():
    law, logits, base = Sampling(temperature=0.0, seed=1), torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([4])
    more = {"history": torch.zeros(1, 9, dtype=torch.int64), "prompt_lengths": torch.tensor([1])}
    assert ops.sample(logits, sampling=law, base=base).tolist() == [1]
    law.logit_bias[2] = 5.0  # type: ignore[index]
    assert ops.sample(logits, sampling=law, base=base, **more).tolist() == [2]


def test_calls_give_what_a_prepared_table_gives():
    law, logits = Sampling(seed=11), torch.randn(4, 50)
    for base in (torch.arange(4), torch.arange(4, 8)):
        expected = ops.sample(logits, sampling=law.prepare(4), base=base)
        assert torch.equal(ops.sample(logits, sampling=law, base=base), expected)


def test_what_is_kept_has_a_bound():
    laws = [Sampling(seed=seed) for seed in range(5)]
    rows = _choices._MOST_SLOTS // 3
    for law in laws:
        _choices.table_of("sampling", law, rows)
    assert [seed for seed, law in enumerate(laws) if (id(law), rows) in _choices._kept] == [2, 3, 4]
    _choices.table_of("sampling", laws[0], _choices._MOST_SLOTS + 1)
    assert len(_choices._kept) == 3


def test_graphs_have_none(monkeypatch: pytest.MonkeyPatch):
    law = Sampling(seed=7)
    kept = _choices.table_of("sampling", law, 2)
    monkeypatch.setattr(_choices, "_is_capturing", lambda: True)
    assert _choices.table_of("sampling", law, 2) is not kept
    assert _choices.table_of("sampling", law, 3) is not _choices.table_of("sampling", law, 3)


@pytest.mark.cuda
@pytest.mark.skipif(TEST_DEVICE != "cuda", reason="streams and graphs are CUDA's")
def test_streams_share_it():
    logits, base = torch.randn(4, 50), torch.arange(4)
    placed, where = logits.cuda(), base.cuda()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for seed in range(20):
        law = Sampling(seed=seed)
        expected, found = ops.sample(logits, sampling=law, base=base), []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(ops.sample(placed, sampling=law, base=where))
        torch.cuda.synchronize()
        assert all(torch.equal(tokens.cpu(), expected) for tokens in found)
