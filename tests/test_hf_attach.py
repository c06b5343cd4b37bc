"""attach: whatever calls model.generate gets foretoken, and the model gets its own back."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, TextIteratorStreamer, pipeline

from foretoken.hf.attachment import attach, detach
from foretoken.sampling import Sampling
from hf_toys import VOCAB, disturbed, left_padded, llama, prompts, tokenizer

torch.set_num_threads(1)  # the toys are too small to share

PADDED = left_padded(3, 8)
INPUTS = {"input_ids": PADDED[0], "attention_mask": PADDED[1]}


@pytest.fixture
def model() -> Any:
    return llama()


@pytest.fixture
def draft(model: Any) -> Any:
    return disturbed(model, 0.035)


class Forwards:
    """Counts the forward passes of a model while it is attached."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.count += 1

    def since(self) -> int:
        count, self.count = self.count, 0
        return count


def test_generate_is_replaced_and_restored(model: Any, draft: Any) -> None:
    own = model.generate
    expected = model.generate(**INPUTS, max_new_tokens=20)
    forwards = Forwards(model)
    with attach(model, drafter=draft) as attachment:
        assert model.generate != own
        assert torch.equal(model.generate(**INPUTS, max_new_tokens=20), expected)
        assert forwards.since() > 0
        again = model.generate(**INPUTS, max_new_tokens=20, return_dict_in_generate=True)
        assert torch.equal(again.sequences, expected)
        assert forwards.since() == 1 + again.foretoken.rounds < 20  # the prefill; no second probe
    assert model.generate == own
    assert "generate" not in vars(model)
    attachment.detach()  # once more does nothing
    with pytest.raises(ValueError, match="not attached"):
        detach(model)


def test_attached_without_with(model: Any, draft: Any) -> None:
    attach(model, draft)
    with pytest.raises(ValueError, match="already"):
        attach(model, draft)
    detach(model)
    attach(model, "ngram").detach()
    with pytest.raises(ValueError, match="drafter"):
        attach(model, "lookup")
    with pytest.raises(ValueError, match="its vocabulary has"):
        attach(model, llama(vocab_size=VOCAB + 3))
    assert "generate" not in vars(model)


def test_an_exception_inside_with_detaches(model: Any) -> None:
    with pytest.raises(RuntimeError), attach(model, "ngram"):
        raise RuntimeError
    assert "generate" not in vars(model)


def test_a_generate_set_on_the_instance_comes_back(model: Any) -> None:
    def mine(*_: Any) -> str:
        return "mine"

    model.generate = mine
    with attach(model, "ngram"):
        assert model.generate(prompts(1, 4), max_new_tokens=2, attention_mask=torch.ones(1, 4)).shape == (
            1,
            6,
        )
    assert model.generate() == "mine"


def test_other_instances_are_not_touched(model: Any, draft: Any) -> None:
    twin = copy.deepcopy(model)
    with attach(model, draft):
        assert "generate" not in vars(twin)
        assert torch.equal(
            twin.generate(**INPUTS, max_new_tokens=5), model.generate(**INPUTS, max_new_tokens=5)
        )


def test_positional_arguments_and_names(model: Any, draft: Any) -> None:
    ids, config = prompts(1, 5), GenerationConfig(max_new_tokens=6)
    mask = torch.ones_like(ids)
    expected = model.generate(ids, config, attention_mask=mask)
    with attach(model, draft):
        assert torch.equal(model.generate(ids, config, attention_mask=mask), expected)
        assert torch.equal(model.generate(inputs=ids, max_new_tokens=6, attention_mask=mask), expected)
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, attention_mask=mask), expected)
        with pytest.raises(ValueError, match="inputs and input_ids"):
            model.generate(ids, input_ids=ids, max_new_tokens=2)
        with pytest.raises(ValueError, match="num_beams"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2, num_beams=2)
        with pytest.raises(ValueError, match="custom_generate"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2, custom_generate=lambda **_: 0)


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 12}, {"max_new_tokens": 9, "no_repeat_ngram_size": 2}]
)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipelines(model: Any, draft: Any, options: dict[str, Any], batch_size: int) -> None:
    words = tokenizer()
    texts = [words.decode(row) for row in prompts(3, 7).tolist()]
    generate = pipeline("text-generation", model=model, tokenizer=words)
    options = {"max_new_tokens": 9, **options, "do_sample": False, "batch_size": batch_size}
    expected = generate(texts, **options)
    with attach(model, draft, num_drafts=3):
        assert generate(texts, **options) == expected
        torch.manual_seed(0)
        sampled = generate(texts[0], do_sample=True, max_new_tokens=5, num_return_sequences=3)
        assert len({result["generated_text"] for result in sampled}) == 3


def test_a_pipeline_with_an_assistant(model: Any, draft: Any) -> None:
    """transformers' own assisted pipeline decodes one text at a time; the assistant drafts here, too."""
    words = tokenizer()
    text = words.decode(prompts(1, 7)[0].tolist())
    generate = pipeline("text-generation", model=model, tokenizer=words, assistant_model=draft)
    expected = generate(text, do_sample=False, max_new_tokens=15)
    drafted = Forwards(draft)
    with attach(model):
        assert generate(text, do_sample=False, max_new_tokens=15) == expected
    assert drafted.since() > 4


def test_streamers_and_stop_strings(model: Any, draft: Any) -> None:
    words, ids = tokenizer(), prompts(1, 7)
    mask = torch.ones_like(ids)
    text = words.decode(model.generate(ids, attention_mask=mask, max_new_tokens=20)[0, 7:])
    stop = text[8:11]
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, stop_strings=stop, tokenizer=words)
    assert expected.shape[1] < 27
    streamer = TextIteratorStreamer(words, skip_prompt=True)
    with attach(model, draft):
        got = model.generate(
            ids, attention_mask=mask, max_new_tokens=20, stop_strings=stop, tokenizer=words, streamer=streamer
        )
    assert torch.equal(got, expected)
    assert "".join(streamer) == words.decode(got[0, 7:])


def test_a_call_that_names_a_drafter_gets_it(model: Any, draft: Any) -> None:
    expected = model.generate(**INPUTS, max_new_tokens=12)
    attached, named = llama(5), Forwards(draft)
    idle = Forwards(attached)
    with attach(model, attached, num_drafts=2):
        assert torch.equal(model.generate(**INPUTS, max_new_tokens=12, assistant_model=draft), expected)
        assert (idle.since(), named.since() > 0) == (0, True)
        lookup = model.generate(
            **INPUTS,
            max_new_tokens=12,
            prompt_lookup_num_tokens=3,
            return_dict_in_generate=True,
        )
        assert torch.equal(lookup.sequences, expected)
        assert len(lookup.foretoken.counters.accepted_tokens_per_pos) == 3
        assert (idle.since(), named.since()) == (0, 0)
        own = model.generate(**INPUTS, max_new_tokens=12, return_dict_in_generate=True)
        assert len(own.foretoken.counters.accepted_tokens_per_pos) == 2
        assert idle.since() > 0
        more = model.generate(
            **INPUTS, max_new_tokens=12, num_assistant_tokens=5, return_dict_in_generate=True
        )
        assert len(more.foretoken.counters.accepted_tokens_per_pos) == 5


def test_defaults_of_the_attachment(model: Any, draft: Any) -> None:
    rounds: list[Any] = []
    with attach(model, draft, sampling=Sampling(temperature=0.7, seed=3), callback=rounds.append):
        first = model.generate(**INPUTS, max_new_tokens=10)
        assert torch.equal(model.generate(**INPUTS, max_new_tokens=10), first)
        with pytest.raises(ValueError, match="temperature"):
            model.generate(**INPUTS, max_new_tokens=10, temperature=0.3)
    assert rounds


def test_calls_from_several_threads(model: Any, draft: Any) -> None:
    """No cache is shared, and the model finds its own attention again when the last one is done."""
    jobs = [left_padded(1 + i % 3, 5 + i, i) for i in range(6)]
    expected = [model.generate(ids, attention_mask=mask, max_new_tokens=30) for ids, mask in jobs]
    implementation = model.config._attn_implementation
    with attach(model, draft), ThreadPoolExecutor(6) as pool:
        for _ in range(2):
            calls = [
                pool.submit(model.generate, ids, attention_mask=mask, max_new_tokens=30) for ids, mask in jobs
            ]
            for call, text in zip(calls, expected, strict=True):
                assert torch.equal(call.result(), text)
    assert model.config._attn_implementation == implementation


def test_caches_are_kept_while_they_are_large_enough(model: Any, draft: Any) -> None:
    """Calls of any size after each other give what a fresh model gives."""
    shapes = [(1, 5, 8), (3, 9, 20), (2, 4, 6), (3, 9, 21), (1, 2, 30), (3, 9, 20)]
    with attach(model, draft):
        for seed, (batch, length, new) in enumerate(shapes):
            ids, mask = left_padded(batch, length, seed)
            got: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=new)
            assert torch.equal(got, type(model).generate(model, ids, attention_mask=mask, max_new_tokens=new))
