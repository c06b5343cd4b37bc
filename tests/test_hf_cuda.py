"""Models on a CUDA device: the module's own logits and text, from calls and from captured forwards."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import foretoken as ft
import hf_toys
from foretoken.hf import ModuleRunner
from foretoken.hf.device_plan import DevicePlan
from foretoken.session import Step
from hf_models import FAMILIES, tiny_model
from test_hf_captured import step_of

pytestmark = pytest.mark.cuda

BY_ATTENTION = ["llama", "qwen3", "gemma2_window_softcap", "gemma3_window", "mistral_window", "gpt2"]


def on_gpu(step: Step) -> Step:
    for name in ("tokens", "positions", "num_tokens", "lengths", "slots"):
        setattr(step, name, getattr(step, name).to("cuda"))
    return step


class Walk:
    """Steps of changing rows, slots, columns and lengths, the same for everyone who takes them."""

    def __init__(self, slots: int, columns: int, vocab: int, longest: int, seed: int = 0) -> None:
        self.pick = random.Random(seed)
        self.lengths = [0] * slots
        self.columns, self.vocab, self.longest = columns, vocab, longest
        self.used: list[int] = []

    def step(self) -> Step:
        pick, lengths = self.pick, self.lengths
        slots = sorted(pick.sample(range(len(lengths)), pick.randint(1, len(lengths))))
        for slot in slots:
            if lengths[slot] + self.columns > self.longest:
                lengths[slot] = pick.randint(0, lengths[slot] // 2)
        tokens = [[pick.randrange(self.vocab) for _ in range(pick.randint(1, self.columns))] for _ in slots]
        step = on_gpu(step_of(tokens, [lengths[slot] for slot in slots], slots, self.columns))
        self.used = [len(row) for row in tokens]
        for slot, count in zip(slots, self.used, strict=True):
            lengths[slot] += count
        return step


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_text_is_the_models_own(batch: int) -> None:
    target = hf_toys.llama().to("cuda")
    draft = hf_toys.disturbed(hf_toys.llama(), 0.05).to("cuda")
    prompts = hf_toys.prompts(batch, 9).to("cuda")
    plain = target.generate(prompts, max_new_tokens=40, do_sample=False, pad_token_id=hf_toys.PAD)
    for drafter in (None, "ngram", draft):
        for kind in ("auto", "module"):
            ours = ft.generate(
                target, prompts, drafter=drafter, max_new_tokens=40, do_sample=False,
                pad_token_id=hf_toys.PAD, runner=kind, return_dict_in_generate=True,
            )  # fmt: skip
            assert ours.sequences.device == prompts.device
            assert torch.equal(ours.sequences, plain)
            assert ours.foretoken.runners["target"] == ("graph" if kind == "auto" else "module: asked for")


# ---- attention ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BY_ATTENTION)
def test_the_op_and_torch_agree(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    """In layers of every kind, for rows in any slots; and the op is what runs."""
    model = tiny_model(name).to("cuda", dtype)
    runners = [ModuleRunner(model, max_batch=5, max_length=90, runner="module") for _ in range(2)]
    op, calls = DevicePlan.native, []

    def counted(plan: DevicePlan, *arguments: Any) -> Any:
        output = op(plan, *arguments)
        calls.append(output is not None)
        return output

    walk = Walk(5, 6, 97, 90)
    for _ in range(12):
        step = walk.step()
        monkeypatch.setattr(DevicePlan, "native", counted)
        ours = runners[0](step)
        monkeypatch.setattr(DevicePlan, "native", lambda *_: None)
        torchs = runners[1](step)
        scale = float(torchs.float().abs().max())
        allowed = 2e-4 if dtype == torch.float32 else 6e-2
        for row, count in enumerate(walk.used):
            gap = (ours[row, :count].float() - torchs[row, :count].float()).abs().max()
            assert float(gap) <= allowed * scale
    assert calls
    assert all(calls)


# ---- captured forwards ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*BY_ATTENTION, "deepseek_v3", "gpt_oss_window_sinks"])
def test_replays_have_the_bits_of_calls(name: str, dtype: torch.dtype) -> None:
    """Over the same buffers, whatever they hold."""
    if name not in FAMILIES:
        pytest.skip(f"no tiny {name} here")
    model = tiny_model(name).to("cuda", dtype)
    runner = ModuleRunner(model, max_batch=4, max_length=90)
    if runner.runner != "graph":
        assert runner.why_module
        return
    captured: Any = runner._captured
    walk, compared = Walk(4, 3, 97, 90), 0
    for _ in range(30):
        step = walk.step()
        replayed = runner(step).clone()
        shape = captured._shapes[captured.key(step)]
        if shape.graph is None:
            continue
        with torch.inference_mode():  # the same rows are written again, with the same values
            called = captured._forward(shape.step)[: len(step.slots), : step.tokens.shape[1]]
        for row, count in enumerate(walk.used):
            assert torch.equal(replayed[row, :count], called[row, :count])
            compared += 1
    assert captured.why_not is None
    assert compared > 20


def test_bug_54_replays_write_to_the_slots_of_the_step_and_not_of_the_capture() -> None:
    model = hf_toys.llama().to("cuda")
    graphs = ModuleRunner(model, max_batch=6, max_length=40, runner="graph")
    plain = ModuleRunner(model, max_batch=6, max_length=40, runner="module")
    walk = Walk(6, 4, hf_toys.VOCAB, 40, seed=3)
    for _ in range(40):
        step = walk.step()
        mine, theirs = graphs(step), plain(step)
        for row, count in enumerate(walk.used):
            torch.testing.assert_close(mine[row, :count], theirs[row, :count], rtol=1e-3, atol=1e-4)
    assert graphs._captured is not None
    assert graphs._captured.graphs <= 4
    assert graphs._captured.replays > 30


def test_bug_55_texts_grow_across_every_threshold_with_the_addresses_of_the_capture() -> None:
    """One graph from the first page to the last, while its workspace is replaced under others."""
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    runner = ModuleRunner(model, max_batch=3, max_length=1400, runner="graph")
    plain = ModuleRunner(model, max_batch=3, max_length=1400, runner="module")
    pick = random.Random(1)
    text = [pick.randrange(97) for _ in range(1400)]
    length = 0
    for count in [1, 1, 62, 1, 1, 1, 190, 1, 1, 255, 1, 1, 255, 1, 1, 255, 1, 1, 255, 1, 1]:
        step = on_gpu(step_of([text[length : length + count]], [length], [1]))
        mine, theirs = runner(step)[:, -1].clone(), plain(step)[:, -1]
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert float(error) < 3e-2, length
        length += count
    captured: Any = runner._captured
    shape = captured._shapes[captured.key(on_gpu(step_of([[1]], [5], [1])))]
    assert shape.graph is not None


def test_bug_56_texts_do_not_depend_on_when_results_arrive() -> None:
    """The stream that copies records is kept busy for a while in every round."""
    target, draft = hf_toys.llama().to("cuda"), hf_toys.disturbed(hf_toys.llama(), 0.05).to("cuda")
    ids = hf_toys.prompts(3, 9).to("cuda")
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": hf_toys.PAD}
    expected = ft.generate(target, ids, drafter=draft, **options)
    pick = random.Random(5)

    def late(_: Any) -> None:
        torch.cuda._sleep(pick.choice([0, 100_000, 1_000_000]))

    assert torch.equal(ft.generate(target, ids, drafter=draft, callback=late, **options), expected)


def test_a_module_that_waits_or_is_watched_is_called() -> None:
    watched = hf_toys.llama().to("cuda")
    heard: list[int] = []
    handle = watched.model.layers[0].register_forward_hook(lambda *_: heard.append(1))
    runner = ModuleRunner(watched, max_batch=1, max_length=20)
    assert runner.runner == "module"
    assert "hook" in str(runner.why_module)
    handle.remove()
    waiting = hf_toys.llama().to("cuda")
    forward = waiting.lm_head.forward

    def looks(hidden: torch.Tensor) -> torch.Tensor:
        float(hidden[0, 0, 0])
        return forward(hidden)

    waiting.lm_head.forward = looks
    runner = ModuleRunner(waiting, max_batch=1, max_length=20)
    assert runner.why_module == "its forward waits for the device"
    with pytest.raises(ValueError, match='got "graph": its forward waits'):
        ModuleRunner(waiting, max_batch=1, max_length=20, runner="graph")


@pytest.mark.filterwarnings("ignore")  # of torch's own modules
def test_compiled_forwards_give_the_modules_text() -> None:
    target = hf_toys.llama().to("cuda")
    ids = hf_toys.prompts(2, 9).to("cuda")
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": hf_toys.PAD}
    expected = ft.generate(target, ids, **options)
    out = ft.generate(
        target, ids, drafter="ngram", runner="compiled", return_dict_in_generate=True, **options
    )
    assert out.foretoken.runners == {"target": "compiled"}
    assert torch.equal(out.sequences, expected)
