"""The embedded pair: files, loaders, prompts, and the lean forward against the transformers module."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from foretoken import pair
from foretoken.pair.weights import FOLDER, dequantize, read_safetensors

pytest.importorskip("transformers")

SHAPES = {"target": (12, 9.9e6), "draft": (2, 2.5e6)}


def make_step(rows, lengths, slots, kind="decode"):
    """A session's step over ragged rows of token ids, padded with 0."""
    width = max(map(len, rows))
    starts, counts = torch.tensor(lengths), torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return SimpleNamespace(
        kind=kind,
        tokens=torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]),
        positions=starts[:, None] + torch.arange(width),
        num_tokens=counts,
        lengths=starts,
        slots=torch.tensor(slots, dtype=torch.int32),
        uniform=min(map(len, rows)) == width,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return pair.load_tokenizer()


@pytest.fixture(scope="module")
def texts(tokenizer):
    return [tokenizer(text).input_ids for text in pair.prompts()]


@pytest.fixture(scope="module", params=["target", "draft"])
def both(request):
    """(role, module): the two models through transformers."""
    return request.param, {"target": pair.load_target, "draft": pair.load_draft}[request.param]()


def test_loaders_give_the_models_that_the_report_speaks_of(both):
    role, module = both
    depth, parameters = SHAPES[role]
    assert module.config.num_hidden_layers == depth
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(parameters, rel=0.02)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert module.generation_config.eos_token_id == 0


def test_loaders_convert_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    module = pair.load_draft(torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert pair.load_weights("draft", torch.float64)[0]["model.norm.weight"].dtype == torch.float64


def test_reader_agrees_with_safetensors():
    load_file = pytest.importorskip("safetensors.torch").load_file
    path = FOLDER / "draft" / "model.int8.safetensors"
    expected, got = load_file(path), read_safetensors(path)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def test_reader_refuses_what_it_does_not_know(tmp_path):
    data = (FOLDER / "draft" / "model.int8.safetensors").read_bytes()
    cases = {
        "not a safetensors file": b"short",
        "the file ends before": data[:-1],
        "expected I8 or F32, got F16": data.replace(b'"F32"', b'"F16"', 1),
    }
    for message, content in cases.items():
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_safetensors(tmp_path / "x")
    with pytest.raises(ValueError, match="role: expected"):
        pair.load_weights("both")


def test_dequantize_scales_rows():
    stored = {"w": torch.tensor([[2, -1], [4, 0]], dtype=torch.int8), "w.scale": torch.tensor([[0.5], [2.0]])}
    assert dequantize(stored)["w"].tolist() == [[1.0, -0.5], [8.0, 0.0]]


def test_prompts_are_ten_held_out_pieces_with_their_notice(tokenizer, texts):
    prompts, notice = pair.prompts(), (FOLDER / "prompts" / "NOTICE").read_text(encoding="utf-8")
    report = json.loads((FOLDER / "report.json").read_text())
    assert len(set(prompts)) == 10
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in notice
    for path in (FOLDER / "prompts").glob("*.txt"):
        (line,) = [line for line in notice.splitlines() if path.name in line]
        module = line.split()[1].rstrip(",")
        assert module in report["held_out"]
        assert not module.startswith("encodings/")
    for prompt, ids in zip(prompts, texts, strict=True):
        assert tokenizer.decode(ids) == prompt
        assert len(prompt.encode()) >= 300
        assert len(ids) <= 160


def test_the_two_models_agree_as_the_report_says(texts):
    target, draft = pair.load_target(), pair.load_draft()
    same = torch.cat(
        [
            target(torch.tensor([ids])).logits.argmax(-1) == draft(torch.tensor([ids])).logits.argmax(-1)
            for ids in texts
        ],
        1,
    )
    assert 0.68 < same.float().mean() < 0.85  # 0.786 over all held-out files, 0.73 over these few tokens


@pytest.mark.parametrize("width", [1, 2, 5, 9])
def test_lean_gives_the_logits_of_the_module(both, texts, width):
    role, module = both
    model = pair.load_lean(role, max_batch=2, max_length=192)
    for ids in texts[:3]:
        expected = module(torch.tensor([ids])).logits
        start = len(ids) - 3 * width
        hidden = model(make_step([ids[:start]], [0], [1], kind="prefill"))
        assert hidden.shape == (1, start, 256)
        for at in range(start, len(ids), width):
            logits = model(make_step([ids[at : at + width]], [at], [1]))
            assert (logits - expected[:, at : at + width]).abs().max() < 1e-4


def test_lean_rows_are_ragged_and_slots_arbitrary(texts):
    """Unequal rows in a shuffled batch give what each gives alone, also after a step was rolled back."""
    model = pair.load_lean("draft", max_batch=5, max_length=192, dtype=torch.float64)
    alone = pair.load_lean("draft", max_batch=1, max_length=192, dtype=torch.float64)
    slots, sizes = [3, 0, 4], [5, 1, 2]
    starts = [40, 0, 77]
    for slot, start, ids in zip(slots, starts, texts, strict=False):
        if start:
            model(make_step([ids[:start]], [0], [slot], kind="prefill"))
    rejected = [ids[-size:] for ids, size in zip(texts, sizes, strict=False)]
    model(make_step(rejected, starts, slots))  # a step that is rolled back: its rows are written over below
    rows = [ids[start : start + size] for ids, start, size in zip(texts, starts, sizes, strict=False)]
    logits = model(make_step(rows, starts, slots))
    assert logits.shape == (3, 5, 4096)
    for b, (ids, start, size) in enumerate(zip(texts, starts, sizes, strict=False)):
        expected = alone(make_step([ids[: start + size]], [0], [0]))[0, start:]
        assert (logits[b, :size] - expected).abs().max() < 1e-9
        assert not logits[b, size:].any()


def test_lean_keeps_few_buffers(texts):
    model = pair.load_lean("draft", max_batch=2, max_length=192)
    for width in (*range(1, 70), 120):
        model(make_step([texts[0][:width]], [0], [0]))
    assert len(model.buffers) == 64
    assert max(map(sum, model.buffers)) <= 64


def test_training_script_runs_through_all_its_stages(tmp_path, monkeypatch):
    """At toy sizes: a real run needs a GPU and twelve minutes."""
    from foretoken.pair import corpus, train

    prompts = pair.prompts()
    files = [(f"file{i}.py", "\n".join(prompts[i:] + prompts[:i]), i > 6) for i in range(10)]
    monkeypatch.setattr(corpus, "python_files", lambda: iter(files))
    monkeypatch.setattr(corpus, "VOCAB", 300)
    monkeypatch.setattr(train, "LENGTH", 80)
    monkeypatch.setattr(train, "FOLDER", tmp_path)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for role, depth in (("target", 2), ("draft", 1)):
        config = json.loads((FOLDER / role / "config.json").read_text())
        small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text(
            json.dumps({**config, **small, "num_hidden_layers": depth})
        )
    out = tmp_path / "out"
    seconds = {"target": 0.2, "draft": 0.2, "policy": 0.1}
    monkeypatch.setattr(train, "target_writes", lambda target, data, seconds: data.view(1, -1))
    monkeypatch.setattr(train, "greedy_accepted", lambda *arguments: 0.0)
    train.run_stages(out, list(train.STAGES), seconds, batch=2, limit_mb=1)
    report = json.loads((out / "report.json").read_text())
    assert report["held_out"] == ["file7.py", "file8.py", "file9.py"]
    assert report["int8"]["target_nats_per_token"] == pytest.approx(
        report["full"]["target_nats_per_token"], abs=0.05
    )
    assert read_safetensors(out / "draft" / "model.int8.safetensors")["model.norm.weight"].shape == (32,)


def test_greedy_acceptance_of_the_report_is_found_again(texts, tokenizer):
    from foretoken.pair import train

    class Slice:  # a "tokenizer" that yields one prompt of exactly 160 tokens
        def encode(self, text):
            ids = texts[2]
            return SimpleNamespace(ids=[0] * 200 + ids) if len(ids) == 160 else None

    accepted = train.greedy_accepted(pair.load_target(), pair.load_draft(), ["x"], Slice(), "cpu", new=24)
    assert 2.0 < accepted <= 4.0


def test_pair_runs_without_transformers():
    code = (
        "import sys; from foretoken import pair; pair.load_lean('draft', max_batch=1, max_length=8);"
        "assert len(pair.prompts()) == 10;"
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
