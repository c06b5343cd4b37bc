"""The rounds of one prepared call: session and forwards on one side, transformers' view of the batch on
the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from foretoken.device import why_no_edits_on
from foretoken.device.ngram import MOST_DEPTH
from foretoken.drafters import Forward, ModelDrafter, NgramDrafter
from foretoken.generate import advance
from foretoken.hf.arguments import Prepared
from foretoken.hf.families import UnsupportedModelError
from foretoken.hf.forwards import ProcessedForward, Runners
from foretoken.hf.processors import Law, NodeProcessors, divide, warpers_of, without_warpers
from foretoken.hf.runner import ModuleRunner
from foretoken.hf.stopping import Replay, shared_criteria
from foretoken.metrics import Counters, Metrics
from foretoken.sampling import Sampling, derive_seed, fresh_seed
from foretoken.session import Event, Request, Session, Step
from foretoken.tree import TreePlan
from foretoken.tree.plan import settle_plan


@dataclass(frozen=True, slots=True)
class Emission:
    """Tokens of one row that stand for good.

    `kinds` says of each token how it came about: "accepted" (drafted), "recovery" or "bonus" (the closing
    token of a round). `finish_reason` is "eos", "length" or "stop" with the last tokens of a row, else None.
    """

    row: int
    tokens: tuple[int, ...]
    kinds: tuple[str, ...]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Round:
    """What a callback gets after each round: its number from 1, what it emitted, the session's metrics."""

    index: int
    emissions: tuple[Emission, ...]
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Figures:
    """What the rounds of a call did."""

    rounds: int
    """Target forwards that verified; a round moves every row that has not ended."""
    counters: Counters
    """Sums over rounds and rows: drafts checked, accepted by position, tokens emitted."""
    rows: tuple[Counters, ...]
    """The same of each row."""
    seconds: dict[str, float]
    """Host time in "prefill", "target", "draft", "processors", "verify" and "rest"."""
    seeds: tuple[int, ...]
    """Of each row; `Sampling(seed=...)` repeats the call with them."""
    why_on_host: str | None
    """None: rounds stayed on the model's device, each issued before the last was known. Else what kept them
    on the host, where only the forward passes ran on the device.
    """
    runners: dict[str, str]
    """Of "target" and "draft": "graph", "compiled", or "module" with why its steps were no graphs."""


class _HostSession(Session):
    """Waits for every round, wherever its logits come from."""

    _may_run_ahead = False


class Decoding:
    """One call, round by round.

    The session decides what is drafted and accepted; `Replay` decides where rows end, as transformers would.
    """

    def __init__(self, prepared: Prepared, runners: Runners) -> None:
        self._prepared = prepared
        self.law = _law(prepared)
        self._samplings = row_samplings(prepared, self.law)
        spec = prepared.speculation
        self._num_drafts = spec.num_drafts if spec.drafter is not None and self.law.may_draft else 0
        self._tree = settle_plan(spec.tree, self._num_drafts, 0)[0] if self._num_drafts > 0 else None
        # A round looks past the end of its row by less than it drafts, but a tree is wider than it is deep.
        # And a draft model feeds candidates that do not become nodes.
        wide = 0
        if self._tree is not None:
            wide = max(self._tree.nodes, self._tree.depth * self._tree.branches)
        lengths = [len(prompt) + prepared.max_new_tokens + wide for prompt in prepared.prompts]
        self._max_length = max(lengths)
        self._pages, self._seats = prepared.pages, prepared.batch
        if self._pages is not None:
            # Where a device is ahead of the host, pages are found for rows of drafts past a text's end, too.
            most = [min(length + self._num_drafts, self._max_length) for length in lengths]
            self._seats = self._pages.seats(most)
            self._pages = self._pages.for_rows(most)
        self._runners = runners
        self._taken: dict[str, ModuleRunner] = {}
        self._runner = self._take_runner("target", prepared.model)
        self._vocab_size: int = self._runner.vocab_size
        config = prepared.config
        recorded = bool(config.return_dict_in_generate) and bool(config.output_scores or config.output_logits)
        draft_model = spec.drafter if isinstance(spec.drafter, torch.nn.Module) else None
        wanted = draft_model is not None and self._num_drafts > 0
        self._draft_runner = self._take_runner("draft", draft_model) if wanted else None
        self.why_on_host = self._find_why_on_host(recorded)
        self._settle_trees(spec.tree == "auto")
        self._runner.expect(1 if self._tree is not None else self._num_drafts + 1)
        self._ran = dict(self._taken)
        place = torch.device("cpu") if self.why_on_host is not None else prepared.model.device
        self._replay = Replay(
            prepared.input_ids if self.why_on_host is not None else prepared.input_ids.cpu(),
            prepared.criteria,
            max_new_tokens=prepared.max_new_tokens,
            eos_ids=prepared.eos_ids,
            pad_id=prepared.pad_id,
            lookahead=self._num_drafts,
            streamer=prepared.streamer,
            keep_scores=recorded and bool(config.output_scores),
            keep_logits=recorded and bool(config.output_logits),
        )
        self._processors = NodeProcessors(self.law.nodes, self._replay.ids, self._replay.filler)
        self._requests: list[Request] = []
        self._row: dict[Request, int] = {}
        kind = Session if self.why_on_host is None else _HostSession
        self._session = kind(
            max_batch=self._seats,
            vocab_size=self._vocab_size,
            max_length=self._max_length,
            num_drafts=self._num_drafts,
            drafter=self._drafter(),
            tree="auto" if self._tree is not None and spec.tree == "auto" else self._tree,
            prefill_chunk=prepared.config.prefill_chunk_size or 512,
            device=place,
        )
        self._processing = 0.0
        self._kinds: list[list[str]] = [[] for _ in range(prepared.batch)]
        self._told = [0] * prepared.batch
        self._last = [False] * prepared.batch
        self._closed = [False] * prepared.batch

    def rounds(self) -> Iterator[Round]:
        """Run the call. Leaving early loses nothing but the rounds still to come."""
        index = 0
        while self._advance():
            index += 1
            yield Round(index, tuple(self._emissions()), self._session.metrics)

    def run(self) -> None:
        """Run the call to its end, telling nobody."""
        while self._advance():
            pass

    @torch.no_grad()
    def _advance(self) -> bool:
        """Prefill if there is something to fill in, then one round; False when there was none left."""
        if not self._requests:
            self._admit()
        while not self._replay.done:
            if self.why_on_host is None:
                requests = advance(self._session, self._runner)
                place = {request: i for i, request in enumerate(requests or ())}
                if (requests is None or place) and self._take_events(place, None, None):
                    return True
                if requests is None:
                    break
                continue
            step = self._session.plan()
            if step is None:
                if self._take_events({}, None, None):
                    return True
                break
            if self._forward(step):
                return True
        if not self._replay.done:
            table = self._runner.position_table
            raise IndexError(f"a row has used all {table} positions of the model; lower max_new_tokens")
        if self._prepared.streamer is not None:
            self._prepared.streamer.end()
        return False

    def sequences(self) -> Tensor:
        """int64 [B, L + new]: prompts as they came, what was generated, padding."""
        return self._replay.sequences().to(self._prepared.input_ids.device)

    def scores(self) -> tuple[Tensor, ...] | None:
        """Processed scores, float32 [B, V] per generated column; zeros where a row had ended."""
        return None if self._replay.scores is None else tuple(self._replay.scores)

    def logits(self) -> tuple[Tensor, ...] | None:
        """Logits as the model gave them, float32 [B, V] per generated column; zeros where a row had ended."""
        return None if self._replay.logits is None else tuple(self._replay.logits)

    def figures(self) -> Figures:
        metrics = self._session.metrics
        spent = metrics.seconds
        return Figures(
            rounds=metrics.steps,
            counters=metrics.counters,
            rows=tuple(request.metrics for request in self._requests),
            seconds={
                "prefill": spent.prefill_forward,
                "target": spent.target_forward - self._processing,
                "draft": spent.draft,
                "processors": self._processing,
                "verify": spent.verify_commit,
                "rest": spent.rest,
            },
            why_on_host=self.why_on_host,
            runners={role: _told(runner) for role, runner in self._ran.items()},
            seeds=tuple(int(s.seed) for s in self._samplings if isinstance(s.seed, int)),
        )

    def release(self) -> None:
        """Hand the caches on to a later call; this one is over."""
        while self._taken:
            self._runners.put_back(*self._taken.popitem(), self._prepared.runner)

    def _take_runner(self, role: str, model: Any) -> ModuleRunner:
        sizes = self._seats, self._max_length
        runner = self._runners.take(role, model, *sizes, self._prepared.runner, self._pages)
        self._taken[role] = runner
        return runner

    def _find_why_on_host(self, recorded: bool) -> str | None:
        """What of this call needs the host to know each round before the next is issued."""
        spec = self._prepared.speculation
        if self._runner.why_on_host is not None:
            return f"target: {self._runner.why_on_host}"
        if self._draft_runner is not None and self._draft_runner.why_on_host is not None:
            return f"drafter: {self._draft_runner.why_on_host}"
        if self._num_drafts > 0 and self._draft_runner is None and spec.drafter != "ngram":
            return f"drafter: {type(spec.drafter).__name__} reads texts on the host"
        if any(sampling.edits() for sampling in self._samplings):
            reason = why_no_edits_on(self._prepared.model.device)
            if reason is not None:
                return f"sampling: {reason}"
        if self.law.nodes:
            return f"logits processors: {_names(self.law.nodes)} are called from Python"
        if shared := shared_criteria(self._prepared.criteria):
            return f"stopping criteria: {_names(shared)} are asked before every token"
        return "output_scores and output_logits are taken from every round" if recorded else None

    def _settle_trees(self, auto: bool) -> None:
        """Whether models and rounds can do with trees; if not, a plan is refused, "auto" drafts chains."""
        if self._tree is None:
            return
        try:
            for runner in self._taken.values():
                runner.check_trees()
        except UnsupportedModelError:
            if not auto:
                raise
            self._tree = None
        if self._tree is None or self.why_on_host is not None:
            return
        reason = self._why_trees_on_host(self._tree)
        if reason is not None and auto:
            self._tree = None
        else:
            self.why_on_host = reason

    def _why_trees_on_host(self, tree: TreePlan) -> str | None:
        depth = min(self._num_drafts, tree.depth)
        if self._draft_runner is None and tree.depth > MOST_DEPTH:
            return f"tree: n-gram drafts are at most {MOST_DEPTH} deep on a device"
        return None if tree.nodes > depth else f"tree: {tree.nodes} nodes are no more than a chain of {depth}"

    def _drafter(self) -> Any:
        spec = self._prepared.speculation
        if self._num_drafts == 0:
            return None
        if spec.drafter == "ngram":
            return NgramDrafter() if spec.max_ngram is None else NgramDrafter(max_ngram=spec.max_ngram)
        runner = self._draft_runner
        if runner is None:
            return spec.drafter
        # A drafter made for fewer positions than the target stops drafting there.
        limit = min(self._max_length, runner.max_positions or self._max_length)
        forward: Forward = runner
        if self._processors:
            forward = ProcessedForward(runner, self._processors, self._row, self._vocab_size, self._prepared)
        return ModelDrafter(forward, max_batch=self._seats, vocab_size=self._vocab_size, max_length=limit)

    def _admit(self) -> None:
        prepared = self._prepared
        for row, (prompt, sampling) in enumerate(zip(prepared.prompts, self._samplings, strict=True)):
            request = self._session.admit(
                prompt,
                sampling,
                max_new_tokens=min(prepared.max_new_tokens, self._room(prompt)),
                eos_ids=prepared.eos_ids,
            )
            self._requests.append(request)
            self._row[request] = row

    def _room(self, prompt: Tensor) -> int:
        """New tokens that a table of learned positions has room for; the last one is never fed."""
        table: int | None = self._runner.position_table
        if table is None:
            return self._prepared.max_new_tokens
        if len(prompt) > table:
            raise ValueError(f"input_ids: {len(prompt)} tokens, but the model has only {table} positions")
        return table - len(prompt) + 1

    def _forward(self, step: Step) -> bool:
        """One step, to its end; whether it was a round."""
        logits = raw = self._runner(step)
        if step.kind == "prefill":
            self._session.commit(None)
            return False
        place = {request: i for i, request in enumerate(step.requests)}
        if self._processors:
            began = time.perf_counter()
            rows = [self._row[request] for request in step.requests]
            lengths = [self._replay.length(row) for row in rows]
            trees = None if step.tree is None else self._session.parents(step)
            logits = self._processors(raw, step.tokens, step.num_tokens.tolist(), rows, lengths, trees)
            self._processing += time.perf_counter() - began
        verdict = self._session.commit(logits)
        if step.tree is not None and verdict is not None:
            self._runner.compact(step.slots, step.lengths, verdict.path, verdict.num_accepted)
            if self._replay.logits is not None or self._replay.scores is not None:
                nodes = pad(verdict.path.clamp_min(0).to(torch.int64), (1, 0))[:, :, None]
                raw = raw.gather(1, nodes.to(raw.device).expand_as(raw))
                logits = logits.gather(1, nodes.to(logits.device).expand_as(logits))
        return self._take_events(place, raw, logits)

    def _take_events(self, place: dict[Request, int], raw: Tensor | None, logits: Tensor | None) -> bool:
        """What has become known of rounds, `place` being the rows of the last one; whether anything has."""
        known = False
        for event in self._session.events():
            known = True
            row = self._row[event.request]
            if not self._replay.ended(row):
                at = place.get(event.request)
                self._take(row, event, at, raw, logits)
        self._replay.advance()
        self._close()
        return known

    def _take(
        self, row: int, event: Event, at: int | None, raw: Tensor | None, processed: Tensor | None
    ) -> None:
        count = len(event.tokens)
        self._kinds[row] += event.kinds
        scores = logits = None
        if self._replay.logits is not None and raw is not None:
            logits = raw[at, :count].to(torch.float32, copy=True)
        if self._replay.scores is not None and processed is not None:
            scores = processed[at, :count].to(torch.float32, copy=True)
            for warper in self._warpers(row):
                scores = warper(self._replay.ids, scores)  # none of these looks at the ids
        self._replay.append(row, event.tokens, scores, logits)

    def _warpers(self, row: int) -> Sequence[Any]:
        if self._prepared.sampling is None:
            return self.law.tail
        return warpers_of(self._samplings[row], 0)

    def _close(self) -> None:
        """Tell the session of rows that end earlier than it knows."""
        for row, request in enumerate(self._requests):
            if self._replay.ended(row) and not self._closed[row]:
                self._closed[row] = True
                keep = self._replay.generated(row)
                if request.finish_reason is None or keep < request.num_generated:
                    self._session.truncate(request, keep)

    def _emissions(self) -> Iterator[Emission]:
        for row in range(self._prepared.batch):
            told, certain = self._told[row], self._replay.certain(row)
            ended = self._replay.ended(row) and certain == self._replay.generated(row) and not self._last[row]
            if certain == told and not ended:
                continue
            start = self._replay.prompt_length
            tokens = self._replay.ids[row, start + told : start + certain].tolist()
            self._told[row], self._last[row] = certain, ended
            yield Emission(
                row,
                tuple(tokens),
                tuple(self._kinds[row][told:certain]),
                self._replay.reason(row) if ended else None,
            )


def _told(runner: ModuleRunner) -> str:
    return runner.runner if runner.why_module is None else f"module: {runner.why_module}"


def _names(things: Sequence[Any]) -> str:
    return ", ".join(sorted({type(thing).__name__ for thing in things}))


def _law(prepared: Prepared) -> Law:
    if prepared.sampling is None:
        return divide(prepared.processors, do_sample=bool(prepared.config.do_sample))
    law = divide(without_warpers(prepared.processors, prepared.user_processors), do_sample=False)
    return replace(law, sampling={})


def row_samplings(prepared: Prepared, law: Law) -> list[Sampling]:
    """One `Sampling` per row; seed s gives return sequence n of prompt r ``derive_seed(s, r, n)``."""
    per_prompt = prepared.return_sequences
    rows, prompts = prepared.batch, prepared.batch // per_prompt
    options: dict[str, Any] = law.sampling
    given = Sampling(**options) if prepared.sampling is None else prepared.sampling

    def pick(name: str, row: int) -> Any:
        value = getattr(given, name)
        if isinstance(value, (int, float, Mapping)):
            return value
        if len(value) not in (rows, prompts):
            raise ValueError(
                f"sampling.{name}: expected one value, {prompts} (one per prompt) or {rows} (one per row), "
                f"got {len(value)}"
            )
        return value[row if len(value) == rows else row // per_prompt]

    def seed(row: int) -> int:
        prompt, sequence = divmod(row, per_prompt)
        if isinstance(base, int):
            return derive_seed(base % 2**64, prompt, sequence)
        own = int(pick("seed", row)) % 2**64
        return own if len(base) == rows else derive_seed(own, 0, sequence)

    drawn = [pick("temperature", row) > 0 for row in range(rows)]
    # Greedy decoding takes nothing from torch's generator, as in transformers.
    base = given.seed if given.seed is not None else (fresh_seed() if any(drawn) else 0)
    return [
        Sampling(
            temperature=pick("temperature", row),
            top_k=pick("top_k", row),
            top_p=pick("top_p", row),
            min_p=pick("min_p", row),
            seed=seed(row),
            repetition_penalty=pick("repetition_penalty", row),
            frequency_penalty=pick("frequency_penalty", row),
            presence_penalty=pick("presence_penalty", row),
            logit_bias=pick("logit_bias", row),
            bad_words=given.bad_words,
            min_new_tokens=pick("min_new_tokens", row),
            stop_ids=given.stop_ids,
        )
        for row in range(rows)
    ]
