"""Logits processors: which become Sampling, what the others are shown, and which forbid drafting."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from foretoken import ops
from foretoken.hf.processors import NodeProcessors, divide, is_pure, pure, warpers_of, without_warpers
from foretoken.sampling import Sampling
from hf_toys import VOCAB

TEMPERATURE = hf.TemperatureLogitsWarper(0.7)
TOP_K = hf.TopKLogitsWarper(5)
TOP_P = hf.TopPLogitsWarper(0.8)
MIN_P = hf.MinPLogitsWarper(0.1)
NORMALISE = hf.LogitNormalization()
PENALTY = hf.RepetitionPenaltyLogitsProcessor(1.3)


class Subclass(hf.TopKLogitsWarper):
    """May do anything, so it is neither translated nor called twice."""


class Mine(hf.LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


@pytest.mark.parametrize(
    ("processors", "nodes", "sampling"),
    [
        ([], 0, {"temperature": 1.0}),
        ([TEMPERATURE], 0, {"temperature": 0.7}),
        ([TEMPERATURE, TOP_K, TOP_P, MIN_P], 0, {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1}),
        ([TOP_K, MIN_P, NORMALISE], 0, {"temperature": 1.0, "top_k": 5, "min_p": 0.1}),
        ([PENALTY, TEMPERATURE, TOP_P], 1, {"temperature": 0.7, "top_p": 0.8}),
        # The order counts: what stands before a filter of a higher or the same rank stays where it is.
        ([TOP_P, TOP_K], 1, {"temperature": 1.0, "top_k": 5}),
        ([TOP_K, TEMPERATURE], 1, {"temperature": 0.7}),
        ([TOP_K, hf.TopKLogitsWarper(3)], 1, {"temperature": 1.0, "top_k": 3}),
        ([TEMPERATURE, hf.TypicalLogitsWarper(0.9)], 2, {"temperature": 1.0}),
        ([TEMPERATURE, hf.TypicalLogitsWarper(0.9), TOP_K], 2, {"temperature": 1.0, "top_k": 5}),
        ([NORMALISE, TOP_K], 1, {"temperature": 1.0, "top_k": 5}),
        # Edges that Sampling does not have.
        ([hf.TopKLogitsWarper(5, filter_value=-9.0)], 1, {"temperature": 1.0}),
        ([hf.TopPLogitsWarper(0.8, min_tokens_to_keep=2)], 1, {"temperature": 1.0}),
        ([hf.MinPLogitsWarper(0.1, min_tokens_to_keep=2)], 1, {"temperature": 1.0}),
        ([hf.MinPLogitsWarper(0.1, filter_value=-9.0)], 1, {"temperature": 1.0}),
        # Edges that it has under another name.
        ([hf.TopKLogitsWarper(2, min_tokens_to_keep=4)], 0, {"temperature": 1.0, "top_k": 4}),
        ([hf.TopPLogitsWarper(0.0)], 0, {"temperature": 1.0, "top_k": 1}),
        ([hf.MinPLogitsWarper(1.0)], 0, {"temperature": 1.0, "top_k": 1}),
        ([TOP_K, hf.MinPLogitsWarper(1.0)], 0, {"temperature": 1.0, "top_k": 1}),
        ([hf.MinPLogitsWarper(0.0)], 0, {"temperature": 1.0, "min_p": 0.0}),
        ([Subclass(5)], 1, {"temperature": 1.0}),
    ],
)
def test_the_end_of_the_list_becomes_sampling(
    processors: list[Any], nodes: int, sampling: dict[str, float]
) -> None:
    law = divide(processors, do_sample=True)
    assert list(law.nodes) == processors[:nodes]
    assert list(law.tail) == processors[nodes:]
    assert law.sampling == sampling


def test_greedy_rows_keep_the_whole_list() -> None:
    processors = [PENALTY, TEMPERATURE, TOP_K, NORMALISE]
    law = divide(processors, do_sample=False)
    assert list(law.nodes) == processors
    assert law.sampling == {"temperature": 0.0}


@pytest.mark.parametrize(
    "processors",
    [
        [hf.TemperatureLogitsWarper(0.3)],
        [hf.TemperatureLogitsWarper(3.0), TOP_K],
        [hf.TopKLogitsWarper(1)],
        [hf.TopKLogitsWarper(1000)],
        [TOP_P],
        [hf.TopPLogitsWarper(0.0)],
        [hf.TopPLogitsWarper(0.999)],
        [MIN_P],
        [hf.MinPLogitsWarper(1.0)],
        [TEMPERATURE, hf.TopKLogitsWarper(9), hf.TopPLogitsWarper(0.6), hf.MinPLogitsWarper(0.3)],
    ],
    ids=lambda ps: "+".join(type(p).__name__ for p in ps),
)
def test_the_translated_law_is_the_law_of_transformers(processors: list[Any]) -> None:
    """Log-probabilities of what is drawn, and every kept token is drawn in the end."""
    rows = 3000
    logits = torch.randn(1, 23, generator=torch.Generator().manual_seed(5)) * 2
    logits[0, 4] = logits[0, 7] = logits.max()  # two likeliest, tied
    if any(isinstance(p, hf.TopPLogitsWarper) for p in processors):
        # Of tokens tied at the threshold transformers drops those its sort leaves last.
        logits[0, [4, 7]] -= torch.tensor([1.0, 1.5])
    expected = logits
    for processor in processors:
        expected = processor(torch.zeros(1, 1, dtype=torch.long), expected)
    expected = expected.log_softmax(-1)[0]
    law = divide(processors, do_sample=True)
    assert not law.nodes
    tokens, logprobs = ops.sample(
        logits.expand(rows, -1).contiguous(),
        sampling=Sampling(**law.sampling, seed=1).prepare(rows),
        base=torch.arange(rows),
        logprobs=True,
    )
    assert torch.allclose(logprobs, expected[tokens], atol=1e-5)
    likely = {i for i, lp in enumerate(expected.tolist()) if lp > math.log(20 / rows)}
    assert likely <= set(tokens.tolist()) <= {i for i, lp in enumerate(expected.tolist()) if lp > -math.inf}


def test_warpers_of_say_what_sampling_says() -> None:
    sampling = Sampling(temperature=[0.5, 0.0], top_k=7, top_p=0.9, min_p=[0.05, 0.1])
    law = divide(warpers_of(sampling, 0), do_sample=True)
    assert (law.nodes, law.sampling) == ((), {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.05})
    assert warpers_of(sampling, 1) == []


def test_sampling_drops_the_warpers_of_a_config_only() -> None:
    mine = hf.TopKLogitsWarper(9)
    assert without_warpers([PENALTY, mine, TEMPERATURE, TOP_K, NORMALISE], [mine]) == [
        PENALTY,
        mine,
        NORMALISE,
    ]


def test_every_processor_of_transformers_is_judged() -> None:
    """A processor that a later transformers brings must be read before it may be called for drafts."""
    others = {
        "LogitsProcessor",
        "SynthIDTextWatermarkLogitsProcessor",  # keeps a history
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",  # runs the model; refused
        "ClassifierFreeGuidanceLogitsProcessor",  # pairs rows of the batch
        "DiaClassifierFreeGuidanceLogitsProcessor",
        "DiaEOSChannelFilterLogitsProcessor",
        "DiaEOSDelayPatternLogitsProcessor",
        "AlternatingCodebooksLogitsProcessor",
        "BarkEosPrioritizerLogitsProcessor",
        "WhisperNoSpeechDetection",
        "WhisperTimeStampLogitsProcessor",
    }
    found = {
        name
        for name, kind in inspect.getmembers(hf, inspect.isclass)
        if issubclass(kind, hf.LogitsProcessor) and not is_pure(kind.__new__(kind))
    }
    assert found == others


def test_what_may_remember_its_calls_forbids_drafting() -> None:
    for processor in (Mine(), Subclass(5), lambda ids, scores: scores):
        law = divide([processor, TOP_K], do_sample=True)
        assert (law.may_draft, law.stateful) == (False, (processor,))
        assert pure(processor) is processor
        assert divide([processor, TOP_K], do_sample=True).may_draft


def test_a_processor_that_wants_more_is_refused() -> None:
    class Wants(hf.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor, images: Tensor) -> Tensor:
            return scores

    with pytest.raises(ValueError, match="Wants takes input_ids, scores, images"):
        NodeProcessors([Wants()], torch.zeros(1, 4, dtype=torch.long), 0)


# ---- what the processors are shown ----

BATCH, PROMPT, WIDTH, NODES = 3, 6, 24, 4
EOS = torch.tensor([2, 5])
WATERMARKS = [
    hf.WatermarkLogitsProcessor(VOCAB, "cpu", seeding_scheme="lefthash"),
    hf.WatermarkLogitsProcessor(VOCAB, "cpu", seeding_scheme="selfhash", context_width=3),
]


def allowed(batch_id: int, ids: Tensor) -> list[int]:
    return [batch_id, int(ids[-1]) % VOCAB, (int(ids.sum()) + 3 * batch_id) % VOCAB]


def penalties(padding: Tensor) -> list[Any]:
    try:
        return [PENALTY, hf.RepetitionPenaltyLogitsProcessor(0.7, prompt_ignore_length=padding)]
    except ValueError:  # older releases know one length for all rows
        return [PENALTY, hf.RepetitionPenaltyLogitsProcessor(0.7, prompt_ignore_length=3)]


def every_known_processor(prompts: Tensor, padding: Tensor) -> list[Any]:
    return [
        hf.MinLengthLogitsProcessor(PROMPT + 5, EOS),
        hf.MinNewTokensLengthLogitsProcessor(PROMPT, 6, EOS),
        *penalties(padding),
        hf.EncoderRepetitionPenaltyLogitsProcessor(1.4, prompts),
        hf.NoRepeatNGramLogitsProcessor(2),
        hf.EncoderNoRepeatNGramLogitsProcessor(2, prompts),
        hf.SequenceBiasLogitsProcessor([[[3], -2.0], [[4, 6], 1.5], [[8, 9, 3], 9.0]]),
        hf.NoBadWordsLogitsProcessor([[7], [4, 5], [1, 2, 3]], EOS),
        hf.PrefixConstrainedLogitsProcessor(allowed, 1),
        hf.ForcedBOSTokenLogitsProcessor(4),
        hf.ForcedEOSTokenLogitsProcessor(PROMPT + 7, EOS),
        hf.InfNanRemoveLogitsProcessor(),
        hf.ExponentialDecayLengthPenalty((2, 1.3), EOS, PROMPT),
        hf.SuppressTokensAtBeginLogitsProcessor([5, 6], PROMPT),
        hf.SuppressTokensLogitsProcessor([11, 12]),
        TEMPERATURE,
        hf.TopHLogitsWarper(0.6),
        TOP_K,
        TOP_P,
        MIN_P,
        hf.TypicalLogitsWarper(0.7),
        hf.EpsilonLogitsWarper(0.01),
        hf.EtaLogitsWarper(0.01),
        *WATERMARKS,
        NORMALISE,
    ]


class ByRow(hf.LogitsProcessor):
    """Pure, but it reads the number of a row in the batch: it must be shown whole batches."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.shape[0] == BATCH
        row = torch.arange(BATCH)[:, None]
        return scores + row * (input_ids.sum(1, keepdim=True) % 7)


@pytest.mark.parametrize("lengths", [(9, 9, 9), (7, 9, 10), (6, 13, 8)])
@pytest.mark.parametrize("rows", [(0, 1, 2), (1,), (0, 2)])
def test_nodes_see_what_transformers_would_hold(lengths: tuple[int, ...], rows: tuple[int, ...]) -> None:
    """Row by row and node by node against the list called on the whole batch at that very length."""
    generator = torch.Generator().manual_seed(sum(lengths))
    text = torch.randint(0, 9, (BATCH, WIDTH), generator=generator)
    text[1, :3] = 0
    padding = torch.tensor([0, 3, 0])
    ids = torch.zeros(BATCH, WIDTH, dtype=torch.long)
    for row in range(BATCH):
        ids[row, : lengths[row]] = text[row, : lengths[row]]
    before = ids.clone()
    used = [[4, 1, 3][row] for row in rows]
    tokens = torch.stack([text[row, lengths[row] - 1 : lengths[row] - 1 + NODES] for row in rows])
    logits = torch.randn(len(rows), NODES, VOCAB, generator=generator).to(torch.bfloat16)

    known = every_known_processor(text[:, :PROMPT].contiguous(), padding)
    for processors in [*([p] for p in known), known[:5], [pure(ByRow())], [PENALTY, pure(ByRow())]]:
        called = NodeProcessors(processors, ids, 0)(
            logits, tokens, used, list(rows), [lengths[row] for row in rows]
        )
        assert torch.equal(ids, before)
        assert called.dtype == torch.float32
        for i, row in enumerate(rows):
            for node in range(used[i]):
                shown = text[row, : lengths[row] + node].expand(BATCH, -1).contiguous()
                scores = logits[i, node].float().expand(BATCH, -1).contiguous()
                for processor in processors:
                    scores = processor(shown, scores)
                names = [type(p).__name__ for p in processors]
                assert torch.equal(called[i, node], scores[row]), (names, row, node)
            assert torch.equal(called[i, used[i] :], logits[i, used[i] :].float())


def test_several_return_sequences_share_the_encoded_prompt() -> None:
    """transformers hands these two the prompts before they are repeated."""
    text = torch.randint(0, 9, (4, 12), generator=torch.Generator().manual_seed(0))
    text[:2, :PROMPT], text[2:, :PROMPT] = text[0, :PROMPT].clone(), text[2, :PROMPT].clone()
    prompts = text[[0, 2], :PROMPT].contiguous()
    for kind, value in (
        (hf.EncoderRepetitionPenaltyLogitsProcessor, 1.4),
        (hf.EncoderNoRepeatNGramLogitsProcessor, 2),
    ):
        processor = kind(value, prompts)
        logits = torch.randn(1, 1, VOCAB)
        # Older releases forget to repeat the prompts here; what is meant is what repeated prompts give.
        repeated = kind(value, prompts.repeat_interleave(2, 0))
        expected = repeated(text[:, :8], logits[:, 0].expand(4, -1).contiguous())
        for row in range(4):
            ids = torch.zeros(4, 12, dtype=torch.long)
            ids[:, :8] = text[:, :8]
            got = NodeProcessors([processor], ids, 0)(logits, text[row : row + 1, 7:8], [1], [row], [8])
            assert torch.equal(got[0, 0], expected[row])
        every = NodeProcessors([processor], ids, 0)(
            logits.expand(4, -1, -1).contiguous(), text[:, 7:8], [1] * 4, [0, 1, 2, 3], [8] * 4
        )
        assert torch.equal(every[:, 0], expected)


def test_whole_batches_are_filled_up_as_transformers_fills_them() -> None:
    """Rows behind the length asked for stand padded, rows ahead of it as they were; the ids are a copy."""
    seen: list[Tensor] = []

    class Recorder(hf.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(input_ids)
            return scores

    ids = torch.full((3, 10), 9)
    ids[0, :6], ids[1, :4], ids[2, :5] = 1, 2, 3
    NodeProcessors([Recorder()], ids, 9)(torch.zeros(1, 1, 5), torch.tensor([[3]]), [1], [2], [5])
    ids[:] = 0
    assert [s.tolist() for s in seen] == [[[1] * 5, [2, 2, 2, 2, 9], [3] * 5]]
