"""Drafts that are all accepted, beside transformers' assisted generation of the same models.

A bias on the head of both models makes one token the likeliest by far, whatever was computed for the others,
so every draft is right. Both sides decode greedily, batch 1, and have to give that token only; tokens of a
round are those of the target's forwards (transformers') and of the counters (ours). Figures are of a second
call, when everything that is made once is there; ``attached`` is `generate` of the same model with foretoken
attached, whose calls make the graph of a round anew, ``rounds`` and ``launch`` are a session that goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

import foretoken as ft
from foretoken.hf.runner import ModuleRunner
from loop_parts import PROMPT, told

TOKEN, BIAS = 7, 100.0
MANY = 20  # drafts that transformers begins with when it chooses
PEER_NEW = 64  # tokens of transformers' calls, which take 20 to 40 ms each


def prefer(model: Any) -> None:
    """From now on the model says one token."""
    weight = model.lm_head.weight
    bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    bias[TOKEN] = BIAS
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)


def seconds_of(call: Callable[[], Any]) -> float:
    """Of a second call."""
    call()
    torch.cuda.synchronize()
    began = perf_counter()
    call()
    torch.cuda.synchronize()
    return perf_counter() - began


def line_of(
    name: str, way: str, drafts: int | None, new: int, seconds: float, rounds: float
) -> dict[str, Any]:
    return told({
        "accepted": name, "way": way, "drafts": drafts or "its own choice",
        "tokens_per_second": new / seconds, "ms_a_token": 1e3 * seconds / new,
        "tokens_per_round": new / rounds,
    })  # fmt: skip


def assisted(name: str, target: Any, draft: Any, ids: Any, drafts: int | None) -> dict[str, Any]:
    """Transformers' own; ``drafts`` None: as many as it chooses."""
    config = draft.generation_config
    config.num_assistant_tokens = 20 if drafts is None else drafts
    config.num_assistant_tokens_schedule = "constant" if drafts is not None else "heuristic"
    config.assistant_confidence_threshold = 0.0 if drafts is not None else 0.4
    wide: list[int] = []

    def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        given = options.get("input_ids")
        wide.append(given.shape[1] if given is not None else options["inputs_embeds"].shape[1])

    def call() -> None:
        found = target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=PEER_NEW, do_sample=False,
            pad_token_id=0, eos_token_id=None, assistant_model=draft,
        )  # fmt: skip
        assert found[0, PROMPT:].tolist() == [TOKEN] * PEER_NEW

    hook = target.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    # Of a target that drafts for itself, steps of several tokens are verifications, but for a prompt.
    rounds = len(wide) if draft is not target else sum(width > 2 for width in wide) - 1
    return line_of(name, "transformers assisted", drafts, PEER_NEW, seconds_of(call), rounds)


class Ours:
    """Sessions and calls of one pair."""

    def __init__(
        self, name: str, models: tuple[Any, Any], ids: Any, drafts: int, new: int, kind: Any
    ) -> None:
        self.name, self.ids = name, ids
        self.target, self.draft = models
        self.drafts, self.new, self.kind = drafts, new, kind
        self.sizes = {"max_batch": 1, "max_length": -(-(PROMPT + new + 8) // 64) * 64}

    def attached(self) -> dict[str, Any]:
        rounds: list[int] = []

        def call() -> None:
            found = self.target.generate(
                self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=self.new, do_sample=False,
                pad_token_id=0, eos_token_id=None, return_dict_in_generate=True,
            )  # fmt: skip
            assert found.sequences[0, PROMPT:].tolist() == [TOKEN] * self.new
            rounds.append(found.foretoken.rounds)

        options: dict[str, Any] = {"drafter": self.draft, "num_drafts": self.drafts, "runner": self.kind}
        with ft.hf.attach(self.target, **options):
            seconds = seconds_of(call)
        return line_of(self.name, "foretoken attached", self.drafts, self.new, seconds, rounds[-1])

    def sessions(self) -> list[dict[str, Any]]:
        runner, draft_runner = (
            ModuleRunner(model, runner=self.kind, **self.sizes) for model in (self.target, self.draft)
        )
        lines = []
        for way, run in (("rounds", ft.decode), ("launch", ft.complete)):
            drafter = ft.ModelDrafter(draft_runner, vocab_size=runner.vocab_size, **self.sizes)
            session = ft.Session(
                vocab_size=runner.vocab_size, drafter=drafter, device="cuda", num_drafts=self.drafts,
                **self.sizes,
            )  # fmt: skip
            rounds: list[int] = []

            def call(session: ft.Session = session, run: Any = run, rounds: list[int] = rounds) -> None:
                before = session.metrics.counters.drafts
                law = ft.Sampling(temperature=0.0)
                request = session.admit(self.ids[0].tolist(), law, max_new_tokens=self.new)
                run(session, runner)
                assert session.generated(request) == [TOKEN] * self.new
                rounds.append(session.metrics.counters.drafts - before)

            call()
            seconds = seconds_of(call)
            lines.append(line_of(self.name, f"foretoken {way}", self.drafts, self.new, seconds, rounds[-1]))
        return lines


def accepted(lines: list[dict[str, Any]], target: Any, draft: Any, drafts: int, new: int, kind: Any) -> None:
    """Adds a line for each way of decoding, by a smaller model and by the target itself as the drafter."""
    for model in (target, draft):
        prefer(model)
    vocab = target.config.vocab_size
    ids = torch.randint(3, vocab, (1, PROMPT), generator=torch.Generator().manual_seed(5)).to(target.device)
    for name, other in (("smaller model", draft), ("target itself", target)):
        peers = [assisted(name, target, other, ids, drafts)]
        lengths = [drafts]
        if other is draft:
            peers.append(assisted(name, target, other, ids, None))
            lengths.append(MANY)
        mine = []
        for length in lengths:
            ours = Ours(name, (target, other), ids, length, new, kind)
            mine += [ours.attached(), *ours.sessions()]
        best = max(line["tokens_per_second"] for line in peers)
        lines += peers + mine
        for line in mine:
            rate = line["tokens_per_second"]
            told({
                "accepted": name, "way": line["way"], "drafts": line["drafts"],
                "over_same_drafts": rate / peers[line["drafts"] != drafts]["tokens_per_second"],
                "over_best_of_transformers": rate / best,
            })  # fmt: skip
