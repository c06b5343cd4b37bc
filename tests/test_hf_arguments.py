"""Arguments of generate: what transformers prepares, what is refused, what drafter options mean."""

from __future__ import annotations

import inspect
import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    MaxLengthCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, StopStringCriteria

from foretoken.hf.arguments import Prepared, prepare
from foretoken.hf.families import UnsupportedModelError
from foretoken.sampling import Sampling
from hf_toys import EOS, VOCAB, gpt2, left_padded, llama, prompts, tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def ready(model: Any, ids: Any = None, **arguments: Any) -> Prepared:
    """`prepare` with everything but `arguments` left out."""
    named: dict[str, Any] = dict.fromkeys(
        ("drafter", "sampling", "num_drafts", "tree", "generation_config", "tokenizer", "streamer")
    )
    keywords = {k: v for k, v in arguments.items() if k not in named}
    if ids is None:
        ids = prompts(1, 5)
        keywords.setdefault("attention_mask", torch.ones_like(ids))
    named.update({k: v for k, v in arguments.items() if k in named})
    if named["generation_config"] is None and not {"max_new_tokens", "max_length", "any_length"} & set(
        keywords
    ):
        keywords["max_new_tokens"] = 2
    keywords.pop("any_length", None)
    return prepare(model, ids, **named, keywords=keywords)


def filled_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    return cache


class Shorter(MaxLengthCriteria):
    """Stands beside the criterion transformers makes, not in its place."""


LOOKUP = GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=2)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 4}, "num_beams"),
    ({"num_beams": 4, "num_beam_groups": 2}, "num_beam"),
    ({"constraints": [object()]}, "constraints"),
    ({"force_words_ids": [[3]]}, "force_words_ids"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
    ({"dola_layers": "high"}, "dola_layers"),
    ({"guidance_scale": 1.5}, "guidance_scale"),
    ({"token_healing": True}, "token_healing"),
    ({"use_mtp": True}, "use_mtp"),
    ({"assistant_early_exit": 1}, "assistant_early_exit"),
    ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
    ({"speculation_type": "dflash"}, "speculation_type"),
    ({"is_assistant": True}, "is_assistant"),
    ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ({"use_cache": False}, "use_cache"),
    ({"cache_implementation": "offloaded_static"}, "cache_implementation"),
    ({"cache_implementation": "quantized"}, "cache_implementation"),
    ({"cache_implementation": "paged"}, "cache_implementation"),
    ({"negative_prompt_ids": torch.ones(1, 2)}, "negative_prompt_ids"),
    ({"inputs_embeds": torch.zeros(1, 5, 32)}, "inputs_embeds"),
    ({"position_ids": torch.arange(5)[None] + 3}, "position_ids"),
    ({"past_key_values": filled_cache()}, "past_key_values"),
    ({"synced_gpus": True}, "synced_gpus"),
    ({"custom_generate": lambda **_: None}, "custom_generate"),
    ({"token_type_ids": torch.zeros(1, 5)}, "token_type_ids"),
    ({"pixel_values": torch.zeros(1, 3)}, "pixel_values: neither"),
    ({"labels": torch.zeros(1, 5)}, "labels"),
    ({"max_new_token": 5}, "max_new_token: neither"),
    ({"max_new_tokens": 3, "temprature": 0.5}, "temprature"),
    ({"drafter": "lookup"}, "drafter"),
    ({"drafter": 5}, "drafter"),
    ({"drafter": torch.nn.Linear(2, 2)}, "drafter"),
    ({"num_drafts": -1, "drafter": "ngram"}, "num_drafts"),
    ({"num_drafts": 2.5, "drafter": "ngram"}, "num_drafts"),
    ({"drafter": "ngram", "assistant_model": object()}, "assistant_model"),
    ({"num_drafts": 3, "num_assistant_tokens": 5}, "num_assistant_tokens"),
    ({"prompt_lookup_num_tokens": 3, "num_drafts": 5}, "prompt_lookup_num_tokens"),
    ({"num_assistant_tokens_schedule": "heuristic"}, "num_assistant_tokens_schedule"),
    ({"assistant_confidence_threshold": 0.4}, "assistant_confidence_threshold"),
    ({"assistant_lookbehind": 10}, "assistant_lookbehind"),
    ({"sampling": Sampling(), "temperature": 0.5}, "temperature"),
    ({"sampling": Sampling(), "do_sample": True, "top_k": 3}, "do_sample, top_k"),
    (
        {
            "sampling": Sampling(frequency_penalty=[0.0, 0.5]),
            "output_scores": True,
            "return_dict_in_generate": True,
        },
        "output_scores: not offered beside sampling.frequency_penalty",
    ),
    ({"stop_strings": "a"}, "stop strings"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_length": 5}, "max_length"),
]


@pytest.mark.parametrize(("arguments", "name"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_refused_by_name_before_any_forward(arguments: dict[str, Any], name: str) -> None:
    model = llama()
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=name):
        ready(model, **arguments)
    assert not ran


@pytest.mark.parametrize("name", ["num_beams", "cache_implementation", "stop_strings"])
@pytest.mark.parametrize("where", ["call", "model"])
def test_options_are_refused_wherever_they_come_from(name: str, where: str) -> None:
    model = llama()
    value = {"num_beams": 3, "cache_implementation": "quantized", "stop_strings": ["a"]}[name]
    config: Any = GenerationConfig(**{name: value}, max_new_tokens=3)
    if where == "model":
        model.generation_config, config = config, None
    with pytest.raises(ValueError, match=name.split("_")[0]):
        ready(model, generation_config=config)
    # A keyword outranks both, in its permission as in its refusal.
    plain = 1 if name == "num_beams" else None
    assert ready(model, **{name: plain}, max_new_tokens=2, generation_config=config).max_new_tokens == 2


def test_models_that_cannot_be_decoded_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Linear"):
        ready(torch.nn.Linear(2, 2))
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match=r"T5ForConditionalGeneration.*encoder-decoder"):
        ready(T5ForConditionalGeneration(config))


def test_a_generate_of_its_own_is_refused() -> None:
    class Own(type(llama())):  # type: ignore[misc]
        def generate(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

    with pytest.raises(UnsupportedModelError, match=r"Own.*generate"):
        ready(Own(llama().config))


@pytest.mark.parametrize(
    ("vocabulary", "message"), [(VOCAB + 1, "62 tokens and the target's 61"), (VOCAB - 1, "60 tokens")]
)
def test_a_drafter_with_another_vocabulary_is_refused(model: Any, vocabulary: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(model, drafter=llama(vocab_size=vocabulary))
    # Unless the tokenizers show that only the padding of the embedding differs.
    same = {"tokenizer": tokenizer(), "assistant_tokenizer": tokenizer()}
    assert ready(model, drafter=llama(vocab_size=vocabulary), **same).max_new_tokens == 2


def test_assistant_tokenizer_must_be_the_same(model: Any) -> None:
    ours, same, other = tokenizer(), tokenizer(), tokenizer()
    other.add_tokens(["new"])
    assert ready(model, tokenizer=ours, assistant_tokenizer=same, assistant_model=llama(1))
    with pytest.raises(ValueError, match="assistant_tokenizer"):
        ready(model, tokenizer=ours, assistant_tokenizer=other, assistant_model=llama(1))
    with pytest.raises(ValueError, match="assistant_tokenizer: needs tokenizer"):
        ready(model, assistant_tokenizer=other, assistant_model=llama(1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 7},
        {"max_length": 9},
        {"max_length": 9, "max_new_tokens": 2},
        {"generation_config": {"max_length": 12}},
        {"generation_config": {"max_new_tokens": 3}, "max_length": 30},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(8)]), "max_new_tokens": 9},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(3)]), "max_new_tokens": 9},
        {"stopping_criteria": StoppingCriteriaList([Shorter(8)]), "max_new_tokens": 9},
        {"model": {"max_length": 11}},
        {"model": {"max_length": 11}, "max_new_tokens": 4},
    ],
    ids=lambda options: re.sub(r"<[\w.]*?(\w+) object at \w+>", r"\1", str(options)),
)
def test_the_length_is_transformers_own(options: dict[str, Any]) -> None:
    model, options = llama(), dict(options)
    for name, value in options.pop("model", {}).items():
        setattr(model.generation_config, name, value)
    if "generation_config" in options:
        options["generation_config"] = GenerationConfig(**options["generation_config"])
    ids = prompts(1, 5)
    options["attention_mask"] = torch.ones_like(ids)
    with warnings.catch_warnings(record=True) as expected:
        warnings.simplefilter("always")
        reference = model.generate(ids, **options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        prepared = ready(model, ids, any_length=True, **options)
    assert prepared.max_new_tokens == reference.shape[1] - 5
    assert [str(w.message) for w in seen] == [str(w.message) for w in expected]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.0)])
def test_nothing_the_caller_owns_is_changed(model: Any, sampling: Any) -> None:
    config = GenerationConfig(max_new_tokens=4, stop_strings=["ab"], do_sample=True, temperature=0.5)
    before, own = config.to_dict(), model.generation_config.to_dict()
    keywords = {"attention_mask": torch.ones(1, 5)}
    prepare(
        model,
        prompts(1, 5),
        drafter=None,
        sampling=sampling,
        num_drafts=None,
        tree=None,
        generation_config=config,
        tokenizer=tokenizer(),
        streamer=None,
        keywords=keywords,
    )
    assert config.to_dict() == before
    assert model.generation_config.to_dict() == own
    assert list(keywords) == ["attention_mask"]
    assert "generate" not in vars(model)


def test_padding_is_stripped_on_the_left_only(model: Any) -> None:
    ids, mask = left_padded(3, 7)
    prepared = ready(model, ids, attention_mask=mask)
    assert [p.tolist() for p in prepared.prompts] == [
        [t for t, m in zip(row, keep, strict=True) if m]
        for row, keep in zip(ids.tolist(), mask.tolist(), strict=True)
    ]
    for broken, what in (
        (mask.flip(1), "row 1 has right padding"),
        (torch.tensor([[1] * 7, [1, 0] + [1] * 5, [1] * 7]), "row 1 has a hole"),
        (torch.tensor([[1] * 7, [1] * 7, [0] * 7]), "row 2 has no token"),
    ):
        with pytest.raises(ValueError, match=what):
            ready(model, ids, attention_mask=broken)
    with pytest.raises(ValueError, match="attention_mask"):
        ready(model, ids, attention_mask=mask[:, 1:])


def test_padding_is_guessed_where_transformers_guesses_it() -> None:
    model = llama()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, EOS
    ids, mask = left_padded(3, 7)
    prepared = ready(model, ids)
    assert [len(p) for p in prepared.prompts] == mask.sum(1).tolist()


def test_a_prompt_is_made_of_the_bos_token() -> None:
    model = llama()
    model.generation_config.eos_token_id = EOS
    prepared = prepare(
        model,
        None,
        drafter=None,
        sampling=None,
        num_drafts=None,
        tree=None,
        generation_config=None,
        tokenizer=None,
        streamer=None,
        keywords={"max_new_tokens": 2},
    )
    assert [p.tolist() for p in prepared.prompts] == [[1]]


@pytest.mark.parametrize("eos", [EOS, [EOS, 7, 9]])
def test_ends_of_sequence_and_padding(eos: Any) -> None:
    model = llama()
    model.generation_config.eos_token_id = eos
    ids, mask = left_padded(2, 5)
    prepared = ready(model, ids, attention_mask=mask)
    assert prepared.eos_ids == ((EOS,) if eos == EOS else (EOS, 7, 9))
    assert prepared.pad_id == EOS  # transformers pads with the first of them
    assert ready(model, ids, attention_mask=mask, max_new_tokens=2, pad_token_id=5).pad_id == 5
    assert ready(model, ids, attention_mask=mask, max_new_tokens=2, eos_token_id=None).pad_id is None
    own = StoppingCriteriaList([EosTokenCriteria(8)])
    replaced = ready(model, ids, attention_mask=mask, max_new_tokens=2, stopping_criteria=own)
    assert replaced.eos_ids == (8,)
    with pytest.raises(ValueError, match="pad_token_id"):
        ready(model, ids, attention_mask=mask, max_new_tokens=2, eos_token_id=None, stopping_criteria=own)


def test_stop_strings_become_a_criterion(model: Any) -> None:
    words = tokenizer()
    for options in (
        {"stop_strings": ["ab"]},
        {"generation_config": GenerationConfig(stop_strings=["ab"], max_new_tokens=3)},
    ):
        criteria = ready(model, tokenizer=words, **options).criteria
        assert [type(c).__name__ for c in criteria].count("StopStringCriteria") == 1
    own = StopStringCriteria(words, ["cd"])
    criteria = ready(
        model, tokenizer=words, stop_strings="ab", stopping_criteria=StoppingCriteriaList([own])
    ).criteria
    assert [c for c in criteria if isinstance(c, StopStringCriteria)] == [own]
    model_with = llama()
    model_with.generation_config.stop_strings = ["ab"]
    config = GenerationConfig(max_new_tokens=3)
    criteria = ready(model_with, tokenizer=words, generation_config=config).criteria
    assert any(isinstance(c, StopStringCriteria) for c in criteria)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (None, 4, None)),
        ({"drafter": "ngram"}, ("ngram", 4, None)),
        ({"drafter": "ngram", "num_drafts": 7}, ("ngram", 7, None)),
        ({"drafter": "ngram", "max_matching_ngram_size": 5}, ("ngram", 4, 5)),
        ({"prompt_lookup_num_tokens": 6}, ("ngram", 6, 2)),
        ({"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 3}, ("ngram", 6, 3)),
        ({"drafter": "ngram", "num_assistant_tokens": 3}, ("ngram", 3, None)),
        ({"num_drafts": 0, "drafter": "ngram"}, ("ngram", 0, None)),
        (
            {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=2)},
            ("ngram", 3, 2),
        ),
    ],
    ids=str,
)
def test_who_drafts_and_how_much(model: Any, arguments: dict[str, Any], expected: tuple[Any, ...]) -> None:
    spec = ready(model, **{**arguments}).speculation
    assert (spec.drafter, spec.num_drafts, spec.max_ngram) == expected


def test_drafters_by_other_names(model: Any) -> None:
    draft = llama(1)
    for name in ("drafter", "assistant_model"):
        assert ready(model, **{name: draft}).speculation.drafter is draft
    own = SimpleNamespace(propose=None, observe=None)
    assert ready(model, drafter=own).speculation.drafter is own
    lookup = llama()
    lookup.generation_config.prompt_lookup_num_tokens = 5
    assert ready(lookup).speculation.drafter == "ngram"
    assert ready(lookup, drafter=draft).speculation.drafter is draft


def test_sampling_replaces_the_sampling_options_of_every_config() -> None:
    model = llama()
    model.generation_config.update(do_sample=True, temperature=0.4, top_h=0.5, repetition_penalty=1.3)
    names = [type(p).__name__ for p in ready(model).processors]
    assert names[:2] == ["RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper"]
    for config in (None, GenerationConfig(max_new_tokens=2, do_sample=True, typical_p=0.4)):
        for sampling, several in ((Sampling(temperature=0.0), 1), (Sampling(top_p=0.5), 3)):
            prepared = ready(
                model,
                sampling=sampling,
                generation_config=config,
                **({"num_return_sequences": several} if config is None else {}),
            )
            assert prepared.sampling is sampling
            assert prepared.config.do_sample is (sampling.temperature != 0)


def test_an_empty_cache_is_no_content(model: Any) -> None:
    assert ready(model, past_key_values=DynamicCache()).max_new_tokens == 2


def test_the_streamer_gets_the_prompt_from_transformers(model: Any) -> None:
    class Recorder(TextStreamer):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def put(self, value: Any) -> None:
            self.seen.append(value)

    streamer, ids = Recorder(), prompts(1, 5)
    ready(model, ids, attention_mask=torch.ones_like(ids), streamer=streamer)
    assert [s.tolist() for s in streamer.seen] == [ids.tolist()]


def test_what_transformers_hands_a_decoding_loop() -> None:
    """The pin: no streamer and no tokenizer arrive, everything else that foretoken reads does."""
    model = gpt2()
    ids, mask = left_padded(2, 5)
    seen: dict[str, Any] = {}

    def loop(model: Any, input_ids: Any, mine: int = 0, **kwargs: Any) -> str:
        seen.update(kwargs, mine=mine)
        return "returned as it is"

    class Deaf(TextStreamer):
        def put(self, value: Any) -> None: ...

    result = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=2,
        custom_generate=loop,
        mine=3,
        streamer=Deaf(tokenizer()),
        tokenizer=tokenizer(),
    )
    assert result == "returned as it is"
    assert sorted(k for k, v in seen.items() if v is not None) == [
        "attention_mask",
        "generation_config",
        "logits_processor",
        "logits_to_keep",
        "mine",
        "past_key_values",
        "position_ids",
        "stopping_criteria",
        "use_cache",
    ]
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(ids, max_new_tokens=2, custom_generate=loop, stop_strings="a", tokenizer=tokenizer())


def test_the_positional_arguments_of_generate_have_not_moved() -> None:
    """`attach` stands in for this signature."""
    assert list(inspect.signature(GenerationMixin.generate).parameters) == [
        "self",
        "inputs",
        "generation_config",
        "logits_processor",
        "stopping_criteria",
        "prefix_allowed_tokens_fn",
        "synced_gpus",
        "assistant_model",
        "streamer",
        "negative_prompt_ids",
        "negative_prompt_attention_mask",
        "custom_generate",
        "kwargs",
    ]
