"""The ways to decode that the demo compares. All stop after as many tokens; none looks for an end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from foretoken import pair
from foretoken.demo import byhand
from foretoken.demo.clock import Clock
from foretoken.demo.models import Models
from foretoken.drafters import Drafter, ModelDrafter, NgramDrafter
from foretoken.sampling import Sampling
from foretoken.session import Session


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked of a method."""

    new: int
    temperature: float
    drafts: int
    seed: int


@dataclass(slots=True)
class Run:
    """One prompt decoded by one method."""

    tokens: list[int]
    seconds: float
    accepted: list[int]
    """Of each round, drafts accepted; for plain decoding a zero per token."""
    drafts: int
    """The most drafts of a round."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of all rounds by part. Those whose name ends in "forward" are models."""

    @property
    def rate(self) -> float:
        """Tokens per second, the prompt's pass included."""
        return len(self.tokens) / self.seconds

    @property
    def outside(self) -> float:
        """Share of the rounds' time outside the models' forward passes."""
        total = sum(self.parts.values())
        inside = sum(seconds for name, seconds in self.parts.items() if name.endswith("forward"))
        return 1.0 - inside / total

    @property
    def acceptance(self) -> list[float]:
        """Entry i: share of the rounds that accepted draft i."""
        return [sum(n > i for n in self.accepted) / len(self.accepted) for i in range(self.drafts)]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to decode: `group` ("module" or "lean") names the plain decoding that its tokens must equal and
    its speed is compared with, `drafter` is "plain", "model" or "ngram".
    """

    key: str
    title: str
    group: str
    drafter: str
    run: Callable[[list[int], Setting], Run]


class Stand:
    """All methods over one set of models; sessions and caches are made once and used again, as in real use.

    Parameters
    ----------
    models : Models
    max_length : int
        Cache rows: the longest prompt, the new tokens, and the drafts of a round.
    max_drafts : int
    """

    def __init__(self, models: Models, *, max_length: int, max_drafts: int) -> None:
        from foretoken.hf import ModuleRunner

        self._models, self._length, self._drafts = models, max_length, max_drafts
        self._target_clock, self._draft_clock = Clock(), Clock()
        self._sessions: dict[str, Session] = {}
        self._forwards: dict[str, Callable[[Any], Any]] = {}
        target, draft = models.target, models.draft
        for model in (target, draft):
            if model is not None:
                model.generation_config.eos_token_id = None
        runner = ModuleRunner(target, max_batch=1, max_length=max_length)
        helper = None if draft is None else ModuleRunner(draft, max_batch=1, max_length=max_length)
        self.vocab_size = runner.vocab_size
        self._add("module", runner, helper)
        if models.lean:
            self.lean_target = pair.load_lean("target", max_batch=1, max_length=max_length)
            self.lean_draft = pair.load_lean("draft", max_batch=1, max_length=max_length)
            lean = (self._target_clock, self.lean_target), (self._draft_clock, self.lean_draft)
            self._add("lean", *(clock.around(model, _columns) for clock, model in lean))
            self._bare = [clock.around(model.forward, len) for clock, model in lean]
        self.methods = list(self._list())

    def _add(self, group: str, target: Callable[[Any], Any], draft: Callable[[Any], Any] | None) -> None:
        size, length = self.vocab_size, self._length
        drafters: dict[str, Drafter | None] = {"plain": None, "ngram": NgramDrafter()}
        if draft is not None:
            drafters["model"] = ModelDrafter(draft, max_batch=1, vocab_size=size, max_length=length)
        for name, drafter in drafters.items():
            self._forwards[f"{group}_{name}"] = target
            self._sessions[f"{group}_{name}"] = Session(
                max_batch=1,
                vocab_size=size,
                max_length=length,
                num_drafts=0 if drafter is None else self._drafts,
                drafter=drafter,
            )

    def _list(self) -> Iterator[Method]:
        yield Method("hf_plain", "Hugging Face generate", "module", "plain", self._hf_plain)
        if self._models.draft is not None:
            yield Method("hf_model", "Hugging Face assisted", "module", "model", self._hf_assisted)
        yield Method("hf_ngram", "Hugging Face prompt lookup", "module", "ngram", self._hf_lookup)
        for group, way in (("module", "modules"), ("lean", "lean forward")):
            for kind, label in (("plain", "plain"), ("model", "draft model"), ("ngram", "n-grams")):
                if (key := f"{group}_{kind}") in self._sessions:
                    run = functools.partial(self._session_run, key)
                    yield Method(key, f"foretoken, {way}, {label}", group, kind, run)
        if self._models.lean:
            yield Method("byhand", "hand-written loop, lean forward", "lean", "model", self._byhand)

    # ---- foretoken ----

    def _session_run(self, key: str, prompt: list[int], setting: Setting) -> Run:
        session, forward = self._sessions[key], self._forwards[key]
        sampling = Sampling(temperature=setting.temperature, seed=setting.seed)
        accepted = []
        with self._watched(modules=key.startswith("module")):
            seconds = session.metrics.seconds
            before = seconds.draft, seconds.verify_commit
            began = perf_counter()
            request = session.admit(prompt, sampling, max_new_tokens=setting.new, num_drafts=setting.drafts)
            while (step := session.plan()) is not None:
                logits = forward(step)
                session.commit(None if step.kind == "prefill" else logits)
                for event in session.events():
                    accepted.append(event.kinds.count("accepted"))
            total = perf_counter() - began
        tokens = session.generated(request)
        session.release(request)
        drafting = seconds.draft - before[0] - self._draft_clock.seconds - self._draft_clock.prompt_seconds
        verifying = seconds.verify_commit - before[1]
        parts = self._parts(total)
        parts["drafting"], parts["verify and commit"] = drafting, verifying
        parts["rest"] -= drafting + verifying
        return Run(tokens, total, accepted, setting.drafts, parts)

    # ---- the others ----

    def _hf_plain(self, prompt: list[int], setting: Setting) -> Run:
        return self._hf(prompt, setting, {}, 0)

    def _hf_assisted(self, prompt: list[int], setting: Setting) -> Run:
        config = self._models.draft.generation_config  # type: ignore[union-attr]
        config.num_assistant_tokens = setting.drafts
        config.num_assistant_tokens_schedule = "constant"
        config.assistant_confidence_threshold = 0.0
        return self._hf(prompt, setting, {"assistant_model": self._models.draft}, setting.drafts)

    def _hf_lookup(self, prompt: list[int], setting: Setting) -> Run:
        return self._hf(prompt, setting, {"prompt_lookup_num_tokens": setting.drafts}, setting.drafts)

    def _hf(self, prompt: list[int], setting: Setting, more: dict[str, Any], drafts: int) -> Run:
        ids = torch.tensor([prompt])
        law: dict[str, Any] = {"do_sample": False}
        if setting.temperature > 0:
            law = {"do_sample": True, "temperature": setting.temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(setting.seed)
        with self._watched(modules=True, lengths=True):
            began = perf_counter()
            output = self._models.target.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=setting.new, **law, **more
            )
            total = perf_counter() - began
        tokens = output[0, len(prompt) :].tolist()
        # A pass starts where the text ended: what lies between two starts is what the first of them emitted.
        starts = [len(prompt) - 1, *(held for held, _ in self._target_clock.passes[1:])]
        emitted = [b - a for a, b in zip(starts, [*starts[1:], len(prompt) + len(tokens) - 1], strict=True)]
        return Run(tokens, total, [n - 1 for n in emitted], drafts, self._parts(total))

    def _byhand(self, prompt: list[int], setting: Setting) -> Run:
        torch.manual_seed(setting.seed)
        with self._watched(modules=False):
            began = perf_counter()
            target, draft = self._bare
            tokens, accepted = byhand.speculate(
                target, draft, prompt, setting.new, setting.drafts, setting.temperature
            )
            total = perf_counter() - began
        return Run(tokens, total, accepted, setting.drafts, self._parts(total))

    # ---- time ----

    @contextmanager
    def _watched(self, *, modules: bool, lengths: bool = False) -> Iterator[None]:
        self._target_clock.reset()
        self._draft_clock.reset()
        with ExitStack() as stack:
            if modules:
                stack.enter_context(self._target_clock.inside(self._models.target, lengths=lengths))
                if self._models.draft is not None:
                    stack.enter_context(self._draft_clock.inside(self._models.draft))
            yield

    def _parts(self, total: float) -> dict[str, float]:
        """The rounds' time: all but the passes that took in the prompt."""
        clocks = self._target_clock, self._draft_clock
        rest = total - sum(clock.seconds + clock.prompt_seconds for clock in clocks)
        return {"target forward": clocks[0].seconds, "draft forward": clocks[1].seconds, "rest": rest}


def _columns(step: Any) -> int:
    return int(step.tokens.shape[1])
