"""foretoken.generate against model.generate: the same tensor, whatever is accepted, however it ends."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, SynthIDTextWatermarkingConfig
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from foretoken.drafters import NgramDrafter
from foretoken.hf.attachment import attach
from foretoken.hf.generation import custom_generate, generate, stream
from foretoken.hf.processors import pure
from foretoken.sampling import Sampling
from hf_toys import EOS, VOCAB, disturbed, gpt2, left_padded, llama, prompts, tokenizer

torch.set_num_threads(1)  # the toys are too small to share


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def draft(model: Any) -> Any:
    """Agrees with the model about two times in three."""
    return disturbed(model, 0.035)


def padded(batch: int, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    ids, mask = left_padded(batch, length, seed)
    return {"input_ids": ids, "attention_mask": mask}


def same(model: Any, drafter: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Assert equality with model.generate and return foretoken's figures."""
    theirs = {name: value for name, value in options.items() if name != "num_drafts"}
    expected = model.generate(**inputs, **theirs)
    options["return_dict_in_generate"] = True
    got = generate(model, **inputs, drafter=drafter, **options)
    assert isinstance(got, GenerateDecoderOnlyOutput)
    assert got.sequences.dtype == expected.dtype
    assert torch.equal(got.sequences, expected)
    return got.foretoken


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("num_drafts", [1, 3, 7])
def test_greedy_text_is_that_of_the_model(model: Any, draft: Any, batch: int, num_drafts: int) -> None:
    figures = same(model, draft, padded(batch), max_new_tokens=40, num_drafts=num_drafts)
    accepted = figures.counters.accepted_tokens_per_pos
    assert len(accepted) == num_drafts
    assert accepted[-1] > 0  # runs of every length occur
    assert figures.counters.accepted_tokens < figures.counters.draft_tokens
    assert figures.counters.emitted_tokens == 40 * batch


@pytest.mark.parametrize(("batch", "calls"), [(1, 12), (7, 12)])
def test_a_hundred_sequences(model: Any, draft: Any, batch: int, calls: int) -> None:
    """Ragged prompts down to one token, ends that come early for some rows and never for others."""
    accepted = 0
    with attach(model, draft) as attached:
        for seed in range(calls):
            inputs = padded(batch, 1 + seed % 9, seed)
            options = {"max_new_tokens": 14, "eos_token_id": [3 + seed % 50, 19], "pad_token_id": 0}
            output = attached.model.generate(
                **inputs, **options, num_assistant_tokens=1 + seed % 6, return_dict_in_generate=True
            )
            assert torch.equal(output.sequences, type(model).generate(model, **inputs, **options))
            accepted += output.foretoken.counters.accepted_tokens
    assert accepted > 2 * batch * calls


@pytest.mark.parametrize("drafter", [None, "ngram", "same", "other", "own"])
def test_any_drafter_gives_the_same_text(model: Any, drafter: Any) -> None:
    chosen = {"same": model, "other": llama(9), "own": NgramDrafter(max_ngram=2)}.get(drafter, drafter)
    figures = same(model, chosen, padded(3), max_new_tokens=30)
    if drafter == "same":
        # 30 tokens in rounds of five, every draft accepted
        assert (figures.rounds, figures.counters.acceptance_rate) == (6, 1.0)
    if drafter is None:
        assert (figures.rounds, figures.counters.draft_tokens) == (30, 0)


def test_a_model_with_learned_positions_and_prompts_of_one_token() -> None:
    model = gpt2()
    draft = disturbed(model, 0.02)
    for length in (1, 2, 9):
        inputs = {"input_ids": prompts(3, length), "attention_mask": torch.ones(3, length, dtype=torch.long)}
        assert same(model, draft, inputs, max_new_tokens=25).counters.accepted_tokens > 5


def test_the_end_of_a_position_table() -> None:
    """The last token needs no position; past it transformers fails, too, and EOS may come before."""
    model = gpt2(n_positions=20)
    draft = disturbed(model, 0.02)
    inputs = padded(1, 8)
    same(model, draft, inputs, max_new_tokens=13)
    for drafter in (None, draft):
        with pytest.raises(IndexError, match="20 positions"):
            generate(model, **inputs, drafter=drafter, max_new_tokens=14)
    last = int(model.generate(**inputs, max_new_tokens=11)[0, -1])
    same(model, draft, inputs, max_new_tokens=50, eos_token_id=last, pad_token_id=0)


def test_rotary_positions_go_on_past_what_the_model_was_made_for() -> None:
    model = llama(max_position_embeddings=16)
    for drafter in (None, disturbed(model, 0.03)):
        same(model, drafter, padded(2, 8), max_new_tokens=30)


@pytest.mark.parametrize("num_drafts", [2, 5])
def test_every_token_in_turn_is_the_end(model: Any, draft: Any, num_drafts: int) -> None:
    """EOS at every offset of an accepted run, as accepted, recovery and bonus token."""
    inputs = padded(1)
    text = model.generate(**inputs, max_new_tokens=24)[0, 8:].tolist()
    for eos in dict.fromkeys(text):
        same(model, draft, inputs, max_new_tokens=24, num_drafts=num_drafts, eos_token_id=eos, pad_token_id=0)


@pytest.mark.parametrize("pad", [0, 5, None])
def test_rows_end_on_their_own_and_are_padded(model: Any, draft: Any, pad: int | None) -> None:
    inputs = padded(4)
    text = model.generate(**inputs, max_new_tokens=24)[:, 8:]
    for ends in ([int(text[0, 3])], [int(text[1, 2]), int(text[2, 7])], text[:, 5].tolist()):
        eos: Any = ends if len(ends) > 1 else ends[0]
        same(model, draft, inputs, max_new_tokens=24, eos_token_id=eos, pad_token_id=pad)


PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"min_new_tokens": 9},
    {"min_length": 15},
    {"bad_words_ids": [[19], [12, 57], [3, 57, 18]]},
    {"sequence_bias": [[[19], -3.0], [[12, 19], 2.0]]},
    {"suppress_tokens": [19, 3], "begin_suppress_tokens": [44]},
    {"forced_eos_token_id": EOS},
    {"exponential_decay_length_penalty": (3, 1.4)},
    {"encoder_repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 2},
    {"renormalize_logits": True, "remove_invalid_values": True},
]


@pytest.mark.parametrize("options", PENALTIES, ids=lambda o: "+".join(o))
@pytest.mark.parametrize("batch", [1, 3])
def test_processors_are_called_for_every_node(
    model: Any, draft: Any, options: dict[str, Any], batch: int
) -> None:
    figures = same(model, draft, padded(batch), max_new_tokens=20, eos_token_id=12, pad_token_id=0, **options)
    assert figures.counters.draft_tokens > 0


@pytest.mark.parametrize("options", [PENALTIES[1], PENALTIES[5]], ids=lambda o: "+".join(o))
def test_a_draft_model_sees_processed_logits(model: Any, options: dict[str, Any]) -> None:
    """The model drafting for itself is right every time, also under processors that change the text."""
    inputs = padded(3)
    figures = same(model, model, inputs, max_new_tokens=25, num_drafts=4, **options)
    assert figures.counters.acceptance_rate == 1.0
    plain = model.generate(**inputs, max_new_tokens=25)
    assert not torch.equal(plain, model.generate(**inputs, max_new_tokens=25, **options))
    torch.manual_seed(0)
    flags = {"do_sample": True, "return_dict_in_generate": True}
    sampled = generate(model, **inputs, drafter=model, max_new_tokens=25, **flags, **options)
    assert sampled.foretoken.counters.acceptance_rate == 1.0


def test_allowed_tokens_know_their_row(model: Any, draft: Any) -> None:
    def allowed(row: int, ids: Tensor) -> list[int]:
        return [t for t in range(VOCAB) if t % 4 != (row + int(ids[-1])) % 4]

    same(model, draft, padded(3), max_new_tokens=20, prefix_allowed_tokens_fn=allowed)


class Counting(LogitsProcessor):
    """Remembers its calls, and changes its mind with them."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append(input_ids.clone())
        return scores + (torch.arange(VOCAB) % (1 + len(self.calls) % 3) == 0) * 2.0


@pytest.mark.parametrize("eos", [None, 12])
def test_a_processor_with_a_memory_gets_the_calls_of_transformers(model: Any, draft: Any, eos: Any) -> None:
    inputs, ours, theirs = padded(3), Counting(), Counting()
    options = {"max_new_tokens": 18, "repetition_penalty": 1.1, "eos_token_id": eos, "pad_token_id": 0}
    expected = model.generate(**inputs, logits_processor=LogitsProcessorList([theirs]), **options)
    with pytest.warns(UserWarning, match="Counting: may remember its calls") as caught:
        got = generate(
            model, **inputs, drafter=draft, logits_processor=LogitsProcessorList([ours]), **options
        )
    assert len(caught) == 1
    assert torch.equal(got, expected)
    assert [c.tolist() for c in ours.calls] == [c.tolist() for c in theirs.calls]


def test_a_watermark_with_a_history(model: Any, draft: Any) -> None:
    config = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 7, 11])
    inputs, options = padded(2), {"max_new_tokens": 16, "watermarking_config": config}
    expected = model.generate(**inputs, **options)
    with pytest.warns(UserWarning, match="SynthIDTextWatermarkLogitsProcessor"):
        assert torch.equal(generate(model, **inputs, drafter=draft, **options), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, **inputs, **options)  # without a drafter nothing is lost


def test_a_processor_declared_pure_is_called_for_drafts(model: Any, draft: Any) -> None:
    class Parity(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores + 2.0 * ((torch.arange(VOCAB) + input_ids[:, -1:]) % 2)

    processors = LogitsProcessorList([pure(Parity())])
    figures = same(model, draft, padded(3), max_new_tokens=20, logits_processor=processors)
    assert figures.counters.accepted_tokens > 0


# ---- stopping ----


class Recording(StoppingCriteria):
    """Stops rows by a rule about the whole batch, and writes down what it was shown."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.calls: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.calls.append(input_ids.tolist())
        return self.rule(input_ids, len(self.calls))


RULES: dict[str, Any] = {
    "per row": lambda ids, call: ids[:, -1] % 5 == 0,
    "first row": lambda ids, call: torch.full((len(ids),), bool(ids[0, -1] % 7 == 1)),
    "a bool": lambda ids, call: call == 11,
    "by its calls": lambda ids, call: torch.arange(len(ids)) < call - 4,
    "never": lambda ids, call: False,
}


@pytest.mark.parametrize("eos", [None, 12])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_criteria_are_asked_as_transformers_asks(
    model: Any, draft: Any, rule: str, batch: int, eos: Any
) -> None:
    """Once per emitted token, about the same batch; a stop inside an accepted run cuts the rest."""
    inputs, ours, theirs = padded(batch), Recording(RULES[rule]), Recording(RULES[rule])
    options = {"max_new_tokens": 20, "eos_token_id": eos, "pad_token_id": 0}
    expected = model.generate(**inputs, stopping_criteria=StoppingCriteriaList([theirs]), **options)
    output = generate(
        model,
        **inputs,
        drafter=draft,
        num_drafts=6,
        stopping_criteria=StoppingCriteriaList([ours]),
        return_dict_in_generate=True,
        **options,
    )
    assert torch.equal(output.sequences, expected)
    assert ours.calls == theirs.calls
    if eos is None:
        assert output.foretoken.counters.emitted_tokens == batch * (expected.shape[1] - 8)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("eos", [None, 12])
def test_stop_strings(model: Any, draft: Any, batch: int, eos: Any) -> None:
    """Strings inside a token, across tokens and reaching back into the prompt."""
    words, inputs = tokenizer(), padded(batch)
    text = [words.decode([t]) for t in model.generate(**inputs, max_new_tokens=20)[0, 7:].tolist()]
    stops = [
        [text[5] + text[6]],
        [text[0][-1:] + text[1][:1]],
        [(text[8] + text[9])[:-1] or text[9], "never"],
        ["".join(text[1:9])],  # longer than many of the contexts it is looked for in
        ["zzz"],
    ]
    for strings in stops:
        options = {"max_new_tokens": 20, "stop_strings": strings, "tokenizer": words, "eos_token_id": eos}
        same(model, draft, inputs, **options, pad_token_id=0)


def test_max_time_ends_the_call(model: Any, draft: Any) -> None:
    inputs = padded(2)
    got = generate(model, **inputs, drafter=draft, max_new_tokens=200, max_time=1e-9)
    assert got.shape[1] == 9  # asked after the first token, as in transformers
    assert torch.equal(got, model.generate(**inputs, max_new_tokens=200, max_time=1e-9))
    same(model, draft, inputs, max_new_tokens=10, max_time=600.0)


# ---- what comes back ----


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.2}, {"do_sample": True, "top_k": 1}, {"stopping_criteria": "per row"}],
)
def test_scores_and_logits(model: Any, draft: Any, batch: int, options: dict[str, Any]) -> None:
    inputs = padded(batch)
    rule = RULES["per row"] if "stopping_criteria" in options else RULES["never"]
    options = {**options, "stopping_criteria": StoppingCriteriaList([Recording(rule)])}
    flags = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options = {**options, **flags, "max_new_tokens": 15, "eos_token_id": 12, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    got = generate(model, **inputs, drafter=draft, **options)
    assert type(got) is type(expected)
    assert torch.equal(got.sequences, expected.sequences)
    assert set(got.keys()) == {"sequences", "scores", "logits"}
    living = torch.ones(batch, dtype=torch.bool)
    for name in ("scores", "logits"):
        assert len(got[name]) == len(expected[name])
    for step, token in enumerate(expected.sequences[:, 8:].unbind(1)):
        for name in ("scores", "logits"):
            ours, theirs = got[name][step], expected[name][step]
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert torch.allclose(ours[living], theirs[living], atol=1e-3)
            assert not ours[~living].any()
        living &= (token != 12) & ~torch.as_tensor(rule(token[:, None], step))
    assert living.sum() < batch or batch == 1


def test_criteria_see_the_scores_if_they_are_kept(model: Any, draft: Any) -> None:
    seen: list[tuple[int, ...]] = []

    class Looking(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            seen.append((len(scores), *scores[-1].shape))
            return scores[-1].amax(1) < -100

    flags = {"return_dict_in_generate": True, "output_scores": True}
    generate(
        model,
        **padded(2),
        drafter=draft,
        max_new_tokens=6,
        stopping_criteria=StoppingCriteriaList([Looking()]),
        **flags,
    )
    assert seen == [(n, 2, VOCAB) for n in range(1, 7)]


def test_the_config_may_ask_for_the_dictionary(model: Any) -> None:
    config = GenerationConfig(return_dict_in_generate=True, max_new_tokens=3)
    inputs = padded(1)
    assert isinstance(generate(model, **inputs, generation_config=config), GenerateDecoderOnlyOutput)
    got = generate(model, **inputs, generation_config=config, return_dict_in_generate=False)
    assert isinstance(got, Tensor)


class Listening(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.heard.append((tuple(value.shape), value.tolist()))

    def end(self) -> None:
        self.heard.append("end")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("eos", [None, 12])
def test_a_streamer_hears_what_transformers_tells_it(model: Any, draft: Any, batch: int, eos: Any) -> None:
    inputs, ours, theirs = padded(batch), Listening(), Listening()
    options = {"max_new_tokens": 20, "eos_token_id": eos, "pad_token_id": 0}
    model.generate(**inputs, streamer=theirs, **options)
    generate(model, **inputs, drafter=draft, streamer=ours, **options)
    assert ours.heard == theirs.heard


def test_a_text_streamer_refuses_batches_as_ever(model: Any) -> None:
    from transformers import TextIteratorStreamer

    with pytest.raises(ValueError, match="batch size 1"):
        generate(model, **padded(2), streamer=TextIteratorStreamer(tokenizer()), max_new_tokens=3)
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True)
    got = generate(model, **padded(1), drafter="ngram", streamer=streamer, max_new_tokens=9)
    assert "".join(streamer) == tokenizer().decode(got[0, 8:])


def test_the_callback_sees_every_round(model: Any, draft: Any) -> None:
    rounds = []
    inputs = padded(2)
    output = generate(
        model,
        **inputs,
        drafter=draft,
        callback=rounds.append,
        max_new_tokens=20,
        return_dict_in_generate=True,
    )
    assert [r.index for r in rounds] == list(range(1, output.foretoken.rounds + 1))
    for row in range(2):
        mine = [e for r in rounds for e in r.emissions if e.row == row]
        assert [t for e in mine for t in e.tokens] == output.sequences[row, 8:].tolist()
        assert [e.finish_reason for e in mine] == [None] * (len(mine) - 1) + ["length"]
        kinds = [k for e in mine for k in e.kinds]
        assert kinds.count("accepted") == output.foretoken.rows[row].accepted_tokens


def test_stream_hands_out_tokens_that_stand(model: Any, draft: Any) -> None:
    inputs = padded(3)
    rule = {"stopping_criteria": StoppingCriteriaList([Recording(RULES["first row"])])}
    for options in ({}, {"eos_token_id": 12, "pad_token_id": 0}, rule):
        rows: list[list[int]] = [[], [], []]
        ends: list[Any] = [None] * 3
        for emission in stream(model, **inputs, drafter=draft, max_new_tokens=20, **options):
            assert ends[emission.row] is None
            assert len(emission.tokens) == len(emission.kinds)
            rows[emission.row] += emission.tokens
            ends[emission.row] = emission.finish_reason
        if "stopping_criteria" in options:
            options = {"stopping_criteria": StoppingCriteriaList([Recording(RULES["first row"])])}
        expected = model.generate(**inputs, max_new_tokens=20, **options)[:, 8:].tolist()
        width = len(expected[0])
        assert [row + [0] * (width - len(row)) for row in rows] == expected
        assert None not in ends
    first = next(stream(model, **inputs, max_new_tokens=5))  # and then nobody asks for more
    assert len(first.tokens) == 1


# ---- sampling and seeds ----


def test_manual_seed_makes_sampled_text_repeatable(model: Any, draft: Any) -> None:
    options = {"drafter": draft, "do_sample": True, "temperature": 0.9, "max_new_tokens": 25}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate(model, **padded(2), **options))
        texts.append(generate(model, **padded(2), **options))
    assert torch.equal(texts[0], texts[2])
    assert torch.equal(texts[1], texts[3])
    assert not torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[4])


def test_greedy_decoding_leaves_the_generator_alone(model: Any) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    generate(model, **padded(2), drafter="ngram", max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_return_sequences_differ_and_seeds_follow_the_rule(model: Any, draft: Any) -> None:
    from foretoken.sampling import derive_seed

    options = {"drafter": draft, "max_new_tokens": 12, "num_return_sequences": 3}
    inputs = padded(2)
    output = generate(model, **inputs, sampling=Sampling(seed=11), return_dict_in_generate=True, **options)
    assert output.foretoken.seeds == tuple(derive_seed(11, row, n) for row in range(2) for n in range(3))
    assert output.foretoken.seeds[0] == 11
    assert len({tuple(row) for row in output.sequences.tolist()}) == 6
    assert torch.equal(output.sequences[:, :8], inputs["input_ids"].repeat_interleave(3, 0))
    # The seeds repeat the rows, in any batch.
    again = generate(
        model,
        **{k: v.repeat_interleave(3, 0)[[4, 1]] for k, v in inputs.items()},
        sampling=Sampling(seed=[output.foretoken.seeds[4], output.foretoken.seeds[1]]),
        drafter=draft,
        max_new_tokens=12,
    )
    assert torch.equal(again, output.sequences[[4, 1]])
    torch.manual_seed(0)
    drawn = generate(model, **inputs, do_sample=True, return_dict_in_generate=True, **options)
    assert len(set(drawn.foretoken.seeds)) == 6


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_filters_that_leave_one_token_are_greedy(model: Any, draft: Any, options: dict[str, Any]) -> None:
    expected = model.generate(**padded(2), max_new_tokens=20)
    got = generate(model, **padded(2), drafter=draft, max_new_tokens=20, do_sample=True, **options)
    assert torch.equal(got, expected)
    named = {k: v for k, v in options.items() if (k, v) != ("min_p", 1.0)}
    if named:
        sampled = generate(model, **padded(2), drafter=draft, max_new_tokens=20, sampling=Sampling(**named))
        assert torch.equal(sampled, expected)


def test_sampling_may_differ_by_row(model: Any, draft: Any) -> None:
    inputs = padded(3)
    greedy = model.generate(**inputs, max_new_tokens=20)
    for sampling in (
        Sampling(temperature=[0.0, 1.5, 0.0], seed=4),
        Sampling(temperature=[0.0, 1.5, 0.0], seed=[4, 5, 6]),
    ):
        got = generate(model, **inputs, drafter=draft, max_new_tokens=20, sampling=sampling)
        assert [torch.equal(a, b) for a, b in zip(got, greedy, strict=True)] == [True, False, True]
    with pytest.raises(ValueError, match=r"sampling\.temperature: expected one value, 3"):
        generate(model, **inputs, max_new_tokens=2, sampling=Sampling(temperature=[0.5, 1.0]))


def test_scores_of_sampling(model: Any) -> None:
    """What `sampling=` filters out stands at minus infinity, as the warpers of a config leave it."""
    flags = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 6}
    law = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.01}
    output = generate(model, **padded(2), sampling=Sampling(seed=1, **law), **flags)
    torch.manual_seed(0)
    by_config = generate(model, **padded(2), do_sample=True, **law, **flags)
    for result in (output, by_config):
        kept = torch.stack(result.scores).isfinite().sum(-1)
        assert int(kept.min()) >= 1
        assert int(kept.max()) <= 9
        picked = torch.stack(result.scores, 1).gather(2, result.sequences[:, 8:, None])
        assert picked.isfinite().all()
    assert torch.allclose(output.scores[0], by_config.scores[0])


# ---- model.generate(custom_generate=...) ----


def test_as_a_custom_generate(model: Any, draft: Any) -> None:
    inputs = padded(3)
    rounds: list[Any] = []
    options = {"max_new_tokens": 20, "eos_token_id": 12, "pad_token_id": 0, "repetition_penalty": 1.1}
    expected = model.generate(**inputs, **options)
    got = model.generate(
        **inputs,
        **options,
        custom_generate=custom_generate,
        drafter=draft,
        num_drafts=3,
        callback=rounds.append,
        return_dict_in_generate=True,
    )
    assert torch.equal(got.sequences, expected)
    assert got.foretoken.rounds == len(rounds) < 20
    sampled = model.generate(
        **inputs,
        max_new_tokens=9,
        custom_generate=custom_generate,
        drafter="ngram",
        sampling=Sampling(temperature=[0.0, 1.0, 0.0], seed=1),
    )
    assert torch.equal(sampled[0], model.generate(**inputs, max_new_tokens=9)[0])
    # sampling= replaces the warpers of the config here, too.
    law = {"custom_generate": custom_generate, "sampling": Sampling(temperature=2.0, seed=1)}
    drawn = model.generate(**inputs, max_new_tokens=9, do_sample=True, top_k=1, **law)
    assert not torch.equal(drawn, model.generate(**inputs, max_new_tokens=9))


def test_a_custom_generate_keeps_its_refusals(model: Any) -> None:
    for options, name in (
        ({"num_beams": 2}, "num_beams"),
        ({"use_cache": False}, "use_cache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"drafter": "lookup"}, "drafter"),
        ({"position_ids": torch.arange(8)[None] + 1}, "position_ids"),
    ):
        with pytest.raises(ValueError, match=name):
            model.generate(**padded(1), max_new_tokens=2, custom_generate=custom_generate, **options)
    streamer = Listening()
    model.generate(**padded(1), max_new_tokens=2, custom_generate=custom_generate, streamer=streamer)
    assert len(streamer.heard) == 1  # the prompt and no more: transformers keeps the streamer to itself


def test_an_exception_of_the_callers_leaves_the_model_as_it_was(model: Any, draft: Any) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("mine")

    implementation = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="mine"):
        generate(model, **padded(2), drafter=draft, callback=fail, max_new_tokens=5)
    assert model.config._attn_implementation == implementation
    same(model, draft, padded(2), max_new_tokens=5)
