"""Models with recurrent layers: states that go back, with the text of ``model.generate``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")

import transformers as tf

import foretoken as ft
from foretoken.hf import ModuleRunner, UnsupportedModelError, carrier, gates
from hf_models import (
    RECURRENT,
    VOCAB,
    greedy,
    make_step,
    one_thread,
    plain_logits,
    poison,
    random_prompts,
    speculate,
    tiny_model,
)

__all__ = ["one_thread"]

NEW_TOKENS = (22, 7, 22)
REST = ("bamba", "falcon_h1", "olmo_hybrid", "qwen3_5")
# Their steps are never shorter than `time_step_min`: no column can be kept out of their states.
IN_GROUPS = ("nemotron_h", "zamba2")
ASKED = ("mamba2", "qwen3_next", "lfm2", "bamba", "falcon_h1")


@pytest.mark.parametrize("name", RECURRENT)
def test_family_decodes_as_generate(name):
    model = tiny_model(name)
    prompts = random_prompts(11, 5, 1)
    texts = [greedy(model, prompt, count) for prompt, count in zip(prompts, NEW_TOKENS, strict=True)]
    plain = [plain_logits(model, text) for text in texts]
    runner = ModuleRunner(model, max_batch=3, max_length=40)
    assert runner.mode == RECURRENT[name].mode
    assert runner.cache.states.ragged == (name not in IN_GROUPS) or carrier.SHUT != gates.SHUT

    def check(row, position, logits):
        torch.testing.assert_close(logits, plain[row][position], rtol=1e-3, atol=3e-4)
        assert int(logits.argmax()) == texts[row][position + 1]

    assert speculate(runner, texts, [len(prompt) for prompt in prompts], check) < max(NEW_TOKENS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def sequential_states(model, runner, text):
    """Each unit's states behind every prefix of `text`, one token after the other through transformers."""
    cache = tf.DynamicCache(config=model.config)
    arguments = {runner._cache_argument: cache, "use_cache": True}
    states = []
    with torch.inference_mode():
        for position, token in enumerate(text):
            if runner._takes_positions:
                arguments["position_ids"] = torch.tensor([[position]])
            model(input_ids=torch.tensor([[token]]), **arguments)
            states.append(
                [
                    [
                        *(cache.layers[unit.layer].conv_states[i][0].clone() for i in unit.convolutions),
                        *(cache.layers[unit.layer].recurrent_states[i][0].clone() for i in unit.recurrences),
                    ]
                    for unit in runner.cache.states.units
                ]
            )
    return states


def assert_states(runner, states, slot, most):
    for index, _ in enumerate(runner.cache.states.units):
        held, ours = runner.cache.states.replay.state(index, slot)
        assert held <= most
        for mine, theirs in zip(ours, states[held - 1][index], strict=True):
            assert float((mine - theirs).norm()) <= 5e-5 * float(theirs.norm()) + 1e-6
    return held


@pytest.mark.parametrize("name", [*ASKED, "mamba"])
def test_states_are_those_of_sequential_decoding(name):
    """Rounds alternate accepted counts with rounds without drafts, rows in different places of the cycle."""
    model = tiny_model(name)
    texts = random_prompts(40, 40)
    runner = ModuleRunner(model, max_batch=2, max_length=48)
    states = [sequential_states(model, runner, text) for text in texts]
    plain = [plain_logits(model, text) for text in texts]
    lengths = [6, 3]
    runner(make_step([texts[0][:6], texts[1][:3]], [0, 0], [0, 1], kind="prefill"))
    for slot in (0, 1):
        assert assert_states(runner, states[slot], slot, lengths[slot]) == lengths[slot]
    cycle = [(4, 4), (0, 0), (4, 0), (0, 0), (4, 2), (3, 1), (0, 0), (2, 2), (1, 0), (4, 3), (0, 0)]
    checked = 0
    for turn in range(len(cycle)):
        plans = [cycle[turn], cycle[(turn + 3) % len(cycle)]]
        tokens = [
            text[length : length + 1 + good] + [(text[0] + turn) % (VOCAB - 3) + 3] * (drafts - good)
            for text, length, (drafts, good) in zip(texts, lengths, plans, strict=True)
        ]
        logits = runner(make_step(tokens, lengths, [0, 1]))
        for slot, (drafts, good) in enumerate(plans):
            for column in range(good + 1):
                torch.testing.assert_close(
                    logits[slot, column], plain[slot][lengths[slot] + column], rtol=1e-3, atol=3e-4
                )
            if drafts == good:
                checked += 1
            else:
                continue
            if len(tokens[slot]) == max(map(len, tokens)):
                assert assert_states(runner, states[slot], slot, lengths[slot] + good + 1) > lengths[slot]
        for slot, (_, good) in enumerate(plans):
            lengths[slot] += good + 1
            poison(runner, slot, lengths[slot])
    assert checked > 8


@cache
def text_of(name):
    """A model, prompts, and what it says to them."""
    model = tiny_model(name)
    prompts = [(prompt * 3)[:size] for prompt, size in zip(random_prompts(4, 3, 1), (12, 7, 1), strict=True)]
    return model, prompts, [greedy(model, prompt, 20)[len(prompt) :] for prompt in prompts]


@cache
def drafter_of(kind, name):
    if kind == "ngram":
        return "ngram"
    if kind == "itself":
        return tiny_model(name)
    return tiny_model("llama") if kind == "attention" else tiny_model("mamba2", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        *((kind, 3) for kind in ("ngram", "attention", "recurrent", "itself")),
        *((kind, 1) for kind in ("ngram", "itself")),
        *(pytest.param(kind, 1, marks=pytest.mark.long) for kind in ("attention", "recurrent")),
    ],
)
@pytest.mark.parametrize("name", ASKED)
def test_generate_gives_the_text_of_transformers(name, kind, rows):
    model, prompts, expected = text_of(name)
    prompts, expected = prompts[:rows], expected[:rows]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    calls = []
    drafter = drafter_of(kind, name if kind == "itself" else None)
    if kind == "itself":  # the probe is over before forwards are counted
        ft.generate(model, ids[:, -1:], max_new_tokens=1)
    handle = model.register_forward_hook(lambda module, args, output: calls.append(1))
    output = ft.generate(
        model, ids, attention_mask=mask, max_new_tokens=20, drafter=drafter, num_drafts=4, do_sample=False
    )
    handle.remove()
    assert output[:, width:].tolist() == expected
    if kind == "itself":  # five tokens a round, each one forward; besides those of the probe and the prompt
        assert len(calls) <= 4 + 1 + 6


def test_sampling_with_one_token_in_reach_is_greedy_and_other_seeds_differ():
    model = tiny_model("bamba")
    ids = torch.tensor(random_prompts(9, 9))
    options = {"max_new_tokens": 16, "drafter": tiny_model("mamba2"), "num_drafts": 3}
    law = ft.Sampling(temperature=0.7, top_k=1, seed=3)
    expected = [greedy(model, prompt, 16) for prompt in ids.tolist()]
    assert ft.generate(model, ids, sampling=law, **options).tolist() == expected
    texts = [
        ft.generate(model, ids, sampling=ft.Sampling(temperature=1.0, seed=seed), **options).tolist()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_sampled_text_does_not_depend_on_how_it_was_drafted_under_the_coupled_rule():
    """Noise by position and token: whatever was drafted and taken back, the text is plain decoding's."""
    model = tiny_model("qwen3_next")
    prompt = random_prompts(8)[0]
    runner = ModuleRunner(model, max_batch=1, max_length=64)
    texts = []
    for drafts in (0, 3):
        draft = ModuleRunner(tiny_model("mamba2"), max_batch=1, max_length=64)
        drafter = ft.ModelDrafter(draft, max_batch=1, vocab_size=VOCAB, max_length=64)
        session = ft.Session(
            max_batch=1,
            vocab_size=VOCAB,
            max_length=64,
            drafter=drafter if drafts else None,
            num_drafts=drafts,
            rule="coupled",
        )
        request = session.admit(prompt, ft.Sampling(temperature=1.0, seed=11), max_new_tokens=24)
        while (step := session.plan()) is not None:
            logits = runner(step)
            session.commit(None if step.kind == "prefill" else logits)
        texts.append(session.generated(request))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["mamba2", "lfm2", "mamba"])
def test_a_prompt_in_ragged_chunks_is_the_prompt(name):
    model = tiny_model(name)
    texts = random_prompts(30, 30, 30)
    plain = [plain_logits(model, text) for text in texts]
    runner = ModuleRunner(model, max_batch=3, max_length=40)
    ends = [(7, 7, 2), (14, 9, 3), (15, 20, 11)]
    for before, after in pairwise([(0, 0, 0), *ends]):
        chunks = [text[a:b] for text, a, b in zip(texts, before, after, strict=True)]
        runner(make_step(chunks, before, [0, 1, 2], kind="prefill"))
    ahead = [text[first : first + 4] for text, first in zip(texts, ends[-1], strict=True)]
    logits = runner(make_step(ahead, ends[-1], [0, 1, 2]))
    for row, first in enumerate(ends[-1]):
        torch.testing.assert_close(logits[row], plain[row][first : first + 4], rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_a_forward_that_fails_half_way_has_done_nothing(name):
    model = tiny_model(name)
    text = random_prompts(30)[0]
    plain = plain_logits(model, text)
    runner = ModuleRunner(model, max_batch=1, max_length=40)
    runner(make_step([text[:9]], [0], [0], kind="prefill"))
    runner(make_step([[*text[9:11], 5, 5, 5]], [9], [0]))
    last = runner.cache.states.units[-1].module
    for _ in range(3):
        handle = last.register_forward_hook(lambda *call: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner(make_step([[*text[11:14], 7, 7]], [11], [0]))
        handle.remove()
    logits = runner(make_step([[*text[11:14], 7]], [11], [0]))
    torch.testing.assert_close(logits[0, :3], plain[11:14], rtol=1e-3, atol=3e-4)
    logits = runner(make_step([text[14:18]], [14], [0]))
    torch.testing.assert_close(logits[0], plain[14:18], rtol=1e-3, atol=3e-4)


def test_a_slot_is_empty_for_its_next_request():
    model = tiny_model("bamba")
    first, second = random_prompts(20, 20)
    runner = ModuleRunner(model, max_batch=1, max_length=40)
    runner(make_step([first[:12]], [0], [0], kind="prefill"))
    runner(make_step([first[12:15]], [12], [0]))
    logits = runner(make_step([second[:5]], [0], [0]))
    torch.testing.assert_close(logits[0], plain_logits(model, second)[:5], rtol=1e-3, atol=3e-4)


def test_going_back_further_than_states_are_kept_is_an_error():
    model = tiny_model("mamba2")
    text = random_prompts(30)[0]
    runner = ModuleRunner(model, max_batch=1, max_length=40)
    runner(make_step([text[:9]], [0], [0], kind="prefill"))
    for length in (9, 12, 15, 18):
        runner(make_step([text[length : length + 3]], [length], [0]))
    with pytest.raises(ValueError, match=r"slot 0: cannot begin behind 10 tokens"):
        runner(make_step([text[10:12]], [10], [0]))


def test_models_that_cannot_go_on_from_a_state_take_one_token_after_the_other():
    assert ModuleRunner(tiny_model("mamba"), max_batch=1, max_length=20).cache.states.stepwise
    assert not ModuleRunner(tiny_model("mamba2"), max_batch=1, max_length=20).cache.states.stepwise


@pytest.mark.parametrize(
    "name", ["mamba2", "qwen3_next", *(pytest.param(name, marks=pytest.mark.long) for name in REST)]
)
def test_rows_that_keep_different_counts_share_every_run(name):
    """A round is one call of each module, and in a few rounds a second one; never one for each count."""
    model, rows, rounds = tiny_model(name), 4, 9
    texts = random_prompts(*[40] * rows)
    plain = [plain_logits(model, text) for text in texts]
    runner = ModuleRunner(model, max_batch=rows, max_length=48)
    lengths = [3, 5, 2, 4]
    runner(
        make_step([text[:size] for text, size in zip(texts, lengths, strict=True)], [0] * rows, range(rows))
    )
    module = runner.cache.states.units[0].module
    real, calls = module.forward, []

    def counted(hidden_states, *args, **kwargs):
        calls.append(len(hidden_states))
        return real(hidden_states, *args, **kwargs)

    module.forward = counted
    for turn in range(rounds):
        kept = [1 + (row + turn) % 4 for row in range(rows)]
        tokens = [
            text[length : length + count] + [(text[0] + turn) % (VOCAB - 3) + 3] * (4 - count)
            for text, length, count in zip(texts, lengths, kept, strict=True)
        ]
        logits = runner(make_step(tokens, lengths, range(rows)))
        for row, count in enumerate(kept):
            span = slice(lengths[row], lengths[row] + count)
            torch.testing.assert_close(logits[row, :count], plain[row][span], rtol=1e-3, atol=3e-4)
            lengths[row] += count
            poison(runner, row, lengths[row])
    assert calls.count(rows) >= rounds
    assert len(calls) <= rounds + rounds // 3


@pytest.mark.parametrize("name", ["mamba2", pytest.param("qwen3_next", marks=pytest.mark.long)])
def test_gates_that_do_not_close_are_found_out(name, monkeypatch):
    """Rows are then run in groups of equal counts, and their texts are the same."""
    monkeypatch.setattr(carrier, "SHUT", -3.0)
    assert not ModuleRunner(tiny_model(name), max_batch=1, max_length=20).cache.states.ragged
    test_family_decodes_as_generate(name)


def test_what_stands_in_columns_that_do_not_count_is_not_read():
    """Not even NaN, which no gate keeps out."""
    model = tiny_model("mamba2")
    text, other = random_prompts(30, 30)
    runner = ModuleRunner(model, max_batch=2, max_length=40)
    runner(make_step([text[:9], other[:5]], [0, 0], [0, 1], kind="prefill"))
    module = runner.cache.states.units[0].module

    def spoil(module, args, kwargs):
        hidden_states = args[0].clone()
        hidden_states[1, 1:] = torch.nan
        return (hidden_states, *args[1:]), kwargs

    handle = module.register_forward_pre_hook(spoil, with_kwargs=True, prepend=True)
    runner(make_step([text[9:13], other[5:6]], [9, 5], [0, 1]))
    handle.remove()
    logits = runner(make_step([text[13:15], other[6:8]], [13, 6], [0, 1]))
    for row, (ids, first) in enumerate([(text, 13), (other, 6)]):
        torch.testing.assert_close(
            logits[row], plain_logits(model, ids)[first : first + 2], rtol=1e-3, atol=3e-4
        )


def test_a_unit_that_forgets_its_state_is_refused(monkeypatch):
    model = tiny_model("qwen3_next")
    mixer = type(model.model.layers[1].linear_attn)
    real = mixer.forward

    def forgetful(self, hidden_states, **keywords):
        output = real(self, hidden_states, **keywords)
        if self.layer_idx == 1 and "cache_params" in keywords:
            states = keywords["cache_params"].layers[1].recurrent_states
            states[0] = states[0] * 0.5
        return output

    monkeypatch.setattr(mixer, "forward", forgetful)
    with pytest.raises(UnsupportedModelError, match=r"layer 1: .*does not go on from a recurrent") as caught:
        ModuleRunner(model, max_batch=1, max_length=20)
    assert caught.value.layer == 1


def test_trees_over_recurrent_layers_are_refused_in_words():
    model = tiny_model("lfm2")
    runner = ModuleRunner(model, max_batch=1, max_length=20)
    with pytest.raises(UnsupportedModelError, match=r"cannot verify draft trees: its recurrent layers"):
        runner.check_trees()


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("RwkvConfig", {}),
        ("RecurrentGemmaConfig", {"num_attention_heads": 2, "lru_width": 32, "intermediate_size": 32}),
        ("xLSTMConfig", {"num_heads": 2}),
    ],
)
def test_recurrent_models_with_other_stores_are_refused(config, options):
    options = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, **options}
    model = tf.AutoModelForCausalLM.from_config(getattr(tf, config)(**options)).eval()
    with pytest.raises(UnsupportedModelError):
        ModuleRunner(model, max_batch=1, max_length=8)


def test_logits_that_a_module_widens_are_as_coarse_as_the_module():
    """Mamba gives float32 logits of bfloat16 weights; nothing finer can be asked of other sums."""
    model = tiny_model("mamba").to(torch.bfloat16)
    assert model(torch.tensor([[5, 7]])).logits.dtype == torch.float32
    ModuleRunner(model, max_batch=2, max_length=24)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECURRENT)
def test_family_on_a_device(name, dtype):
    model = tiny_model(name).to("cuda", dtype)
    texts = random_prompts(33, 12, 23)
    with torch.inference_mode():
        plain = [model(torch.tensor([text]).cuda(), use_cache=False).logits[0].cpu() for text in texts]
    runner = ModuleRunner(model, max_batch=3, max_length=40)
    errors = []

    def check(row, position, logits):
        expected = plain[row][position].double()
        errors.append(float((logits.double() - expected).norm() / expected.norm()))

    speculate(runner, texts, [11, 5, 1], check)
    errors.sort()
    assert errors[len(errors) // 2] <= (1e-3 if dtype == torch.float32 else 0.06)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ASKED)
def test_generate_on_a_device(name):
    model = tiny_model(name).to("cuda")
    ids = torch.tensor(random_prompts(9, 9)).cuda()
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    drafter = tiny_model("mamba2").to("cuda")
    output = ft.generate(model, ids, max_new_tokens=16, drafter=drafter, do_sample=False)
    assert output.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1", "lfm2"])
def test_more_requests_than_slots(name):
    """Slots change hands while other rows are under way, prompts come in chunks, one request is cancelled."""
    model, size = tiny_model(name), 80
    prompts = random_prompts(21, 1, 9, 14, 2, 6)
    texts = [greedy(model, prompt, 4 + 3 * number) for number, prompt in enumerate(prompts)]
    runner = ModuleRunner(model, max_batch=2, max_length=size)
    draft = ModuleRunner(tiny_model("mamba2", num_hidden_layers=1), max_batch=2, max_length=size)
    drafter = ft.ModelDrafter(draft, max_batch=2, vocab_size=VOCAB, max_length=size, prefill_chunk=5)
    session = ft.Session(
        max_batch=2, vocab_size=VOCAB, max_length=size, num_drafts=3, drafter=drafter, prefill_chunk=8
    )
    requests = [
        session.admit(prompt, ft.Sampling(temperature=0.0), max_new_tokens=4 + 3 * number)
        for number, prompt in enumerate(prompts)
    ]
    rounds = 0
    while (step := session.plan()) is not None:
        logits = runner(step)
        session.commit(None if step.kind == "prefill" else logits)
        rounds += 1
        if rounds == 9:
            session.cancel(requests[3])
    for number, (request, prompt, text) in enumerate(zip(requests, prompts, texts, strict=True)):
        generated = session.generated(request)
        assert generated == text[len(prompt) :][: len(generated)]
        assert number == 3 or len(generated) == 4 + 3 * number


def test_attached_models_and_streams():
    model = tiny_model("bamba")
    prompt = random_prompts(9)[0]
    text = greedy(model, prompt, 14)
    with ft.hf.attach(model, drafter=tiny_model("mamba2")):
        assert model.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False).tolist() == [text]
    pieces = ft.stream(model, torch.tensor([prompt]), drafter="ngram", max_new_tokens=14, do_sample=False)
    assert [token for piece in pieces for token in piece.tokens] == text[len(prompt) :]


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_threads_share_a_model_and_no_states(name):
    model = tiny_model(name)
    prompts = random_prompts(9, 12, 7, 11)
    expected = [greedy(model, prompt, 8) for prompt in prompts]

    def run(prompt):
        return ft.generate(model, torch.tensor([prompt]), max_new_tokens=8, drafter="ngram", do_sample=False)

    with ThreadPoolExecutor(4) as pool:
        outputs = [output.tolist()[0] for output in pool.map(run, prompts * 2)]
    assert outputs == expected * 2
    assert {getattr(module, "chunk_size", None) for module in model.modules()} <= {None, 8}
