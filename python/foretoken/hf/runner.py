"""A Hugging Face causal language model as the forward of a session or of a model drafter."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel

from foretoken.device import is_unrolled, runs_ahead, why_not_on
from foretoken.hf.attention import NAME
from foretoken.hf.cache import APPENDED_DTYPES, SlotCache
from foretoken.hf.captured import CapturedForwards, RunnerKind, check_kind
from foretoken.hf.families import (
    UnsupportedModelError,
    cache_argument,
    input_device,
    layer_shapes,
    looks_local,
    position_limit,
    position_table,
    refuse_by_design,
    text_config,
)
from foretoken.hf.hybrid import HybridCache
from foretoken.hf.masks import TreeMasks
from foretoken.hf.paged import CacheKind, Pages, PooledCache, pages_of
from foretoken.hf.plan import Trace
from foretoken.hf.probe import (
    PROBE_TOKENS,
    disagreement,
    moved,
    plain_forward,
    tolerance,
    tree_disagreement,
    waits,
)
from foretoken.hf.recurrent import UnitFinder
from foretoken.session import Step

_SETTING = "_attn_implementation_internal"
_switching = threading.Lock()
# Of configurations that name foretoken's attention now, by id: how many runs need it, and what it was before.
_switched: dict[int, tuple[int, Any]] = {}


class ModuleRunner:
    """Calls `model` on the steps of a session, over a `SlotCache` of its own; for target and draft model.

    The model is run in one of three ways, found by a probe at construction:

    - ``"attention"``: through the attention function registered as ``"foretoken"``;
    - ``"masks"``: through the model's own attention with 4-D masks, for models that never call a custom one;
    - ``"rows"``: through the model's own attention and masks, rows of equal length together.

    Parameters
    ----------
    model
        A decoder-only ``PreTrainedModel`` with a language modelling head, on any device map. It is not
        changed: its attention implementation is switched inside a call and put back, exceptions included.
    max_batch, max_length
        Slots of the cache and rows per slot; prompt and new tokens of a request must fit one slot.
    runner
        How decode steps are issued on a CUDA device; prefill is run as it is. ``"module"``: the module is
        called. ``"graph"``: each shape of a step becomes a CUDA graph. ``"compiled"``: the same of the module
        under ``torch.compile``, which takes long. ``"auto"``: ``"graph"`` where that can be done.
    cache
        ``"slots"``: ``max_length`` rows for every slot. ``"paged"`` or a :class:`Pages`: a pool of pages that
        requests take as they grow; a step that finds too few raises ``OutOfPagesError`` before it writes
        anything, and stays planned.

    Attributes
    ----------
    cache : SlotCache or PooledCache
    mode : str
        One of the three ways above.
    runner : str
        ``"module"``, ``"graph"`` or ``"compiled"``: what became of the argument.
    why_module : str or None
        Why decode steps call the module, if they do.
    why_on_host : str or None
        Why lengths of this model's steps have to be known on the host, so that its rounds cannot run ahead of
        their results on a device; None: they need not.
    max_positions : int or None
        Positions the model was made for; no token should be drafted past them.
    position_table : int or None
        Positions the model has learned vectors for, if it has such a table: it cannot be run past them.
    vocab_size : int
        Width of the logits.

    Raises
    ------
    UnsupportedModelError
        The model cannot be run exactly; the message names model, layer and reason.
    ValueError
        ``runner`` asks for graphs that cannot be had, or ``cache`` for pages, and why.

    Examples
    --------
    >>> runner = ModuleRunner(model, max_batch=1, max_length=512)    # doctest: +SKIP
    >>> while (step := session.plan()) is not None:    # doctest: +SKIP
    ...     session.commit(None if step.kind == "prefill" else runner(step))
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_batch: int,
        max_length: int,
        runner: RunnerKind = "auto",
        cache: CacheKind = "slots",
    ) -> None:
        check_kind(runner)
        pages = pages_of(cache)
        refuse_by_design(model, max_length)
        self.model = model
        self.max_batch, self.max_length = max_batch, max_length
        self.max_positions = position_limit(text_config(model))
        self.position_table = position_table(model)
        self._configs = _configs(model)
        self._device = input_device(model)
        accepted = inspect.signature(type(model).forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_keep = "logits_to_keep" in accepted
        self._cache_argument = cache_argument(model)
        limit = max_length if self.max_positions is None else min(max_length, self.max_positions)
        self._last_position = limit
        finder = UnitFinder(model)
        tokens, logits, plain_cache = plain_forward(model, limit, finder.watching)
        self.vocab_size = int(logits.shape[-1])
        shapes = layer_shapes(model, plain_cache)
        self._attending, self._shapes = list(shapes), list(shapes.values())
        units = finder.units(plain_cache)
        sizes = {"max_batch": max_batch, "max_length": max_length}
        if pages is not None:  # until the probe is over
            sizes = {"max_batch": min(max_batch, 2), "max_length": min(max_length, PROBE_TOKENS)}
        self.cache: SlotCache | PooledCache = (
            HybridCache(shapes, units, plain_cache, **sizes) if units else SlotCache(self._shapes, **sizes)
        )
        if isinstance(self.cache, HybridCache):
            self.cache.states.try_out(model, self.cache, tolerance)
        self._mask_dtype = self._shapes[0].dtype if shapes else model.dtype
        self._layer_devices = {shape.device for shape in self._shapes}
        self.why_on_host: str | None = "its steps have not been tried on the device"
        self._captured: CapturedForwards | None = None
        self._bounded = True
        self._repeated: Any = model  # what graphs are of
        self.mode = self._find_mode(tokens, logits)
        self.why_on_host = why_not_ahead(self._device)
        if pages is not None:
            self._share_pages(pages, tokens, logits)
        elif self.why_on_host is None:
            self.why_on_host = self._find_why_on_host(tokens, logits)
        self._probe = tokens, logits
        self._why_no_trees: str | None = None
        self._trees_tried = False
        self._kind = "graph" if runner == "auto" else runner
        self._captured = self._capture(runner)
        self.reset()

    @property
    def runner(self) -> str:
        """How decode steps are issued."""
        return self._kind if self.why_module is None else "module"

    @property
    def why_module(self) -> str | None:
        """Why decode steps call the module; None: they do not."""
        return self._why_module if self._captured is None else self._captured.why_not

    @property
    def repeatable(self) -> bool:
        """Whether decode steps may become part of graphs of whole rounds, padded rows among them."""
        return self._captured is not None and self._captured.repeatable

    @property
    def why_not_repeated(self) -> str | None:
        """Why a device cannot repeat rounds of this model by itself; None: nothing here is in the way."""
        return "pages are found by the host" if isinstance(self.cache, PooledCache) else None

    def expect(self, columns: int) -> None:
        """Say how wide steps will be: narrower ones are then filled up, and need no graph of their own."""
        if self._captured is not None:
            self._captured.widest = columns

    def __call__(self, step: Step) -> Tensor:
        """Run one step.

        Parameters
        ----------
        step
            Column i of row b is written to cache row ``lengths[b] + i`` of slot ``slots[b]``.

        Returns
        -------
        Tensor
            Logits ``[B, T, V]`` on the device of ``step.tokens``; of a prefill step as few as can be had.

        Raises
        ------
        ValueError
            Tokens that do not fit their slot.
        """
        if step.tree is not None:
            self.check_trees()
        if isinstance(self.cache, PooledCache):
            rest = self.cache.hold(step)
            if rest is None:  # of a prompt whose beginning is there; nobody looks at its logits
                return step.tokens.new_zeros((len(step.slots), 1, 1), dtype=torch.float32)
            step = rest
        elif self.why_on_host is not None:
            return self._run(self.cache, step, None)
        if step.on_device:
            return self._run_on_device(step)
        self.cache.check_room(step.slots.tolist(), step.lengths.tolist(), step.num_tokens.tolist())
        return self._run_on_device(moved(step, self._device)).to(step.tokens.device)

    def compact(self, slots: Tensor, lengths: Tensor, path: Tensor, num_accepted: Tensor) -> None:
        """Move the cache rows of the accepted paths together, after the commit of a step of trees.

        Parameters
        ----------
        slots, lengths
            Of the step.
        path, num_accepted
            Of its verdict.
        """
        self.cache.compact(slots, lengths, path, num_accepted)

    def check_trees(self) -> None:
        """Find out whether the model can be run on draft trees; the first step of trees does it by itself.

        Raises
        ------
        UnsupportedModelError
            It cannot: it is run through its own masks, is told no positions, or its logits are not those of
            the plain module.
        """
        if not self._trees_tried:
            self._why_no_trees, self._trees_tried = self._find_why_no_trees(), True
        if self._why_no_trees is not None:
            raise UnsupportedModelError(self.model, f"cannot verify draft trees: {self._why_no_trees}")

    def reset(self) -> None:
        """Zero the cache. Not needed between requests: lengths live with the session."""
        self.cache.reset()

    def _run(self, cache: SlotCache, step: Step, trace: Trace | None) -> Tensor:
        slots, lengths, used = step.slots.tolist(), step.lengths.tolist(), step.num_tokens.tolist()
        tokens, positions = step.tokens, step.positions
        if max(lengths) + tokens.shape[1] > self._last_position:
            # Padding columns go on counting, but a table of learned positions ends somewhere. Tokens keep
            # theirs: rotary positions go on past what the model was made for, as in transformers.
            positions = positions.minimum((step.lengths + step.num_tokens - 1).unsqueeze(1))
        few = step.kind == "prefill"
        with torch.inference_mode():
            if self.mode == "rows":
                return self._run_rows(cache, step, tokens, positions, slots, lengths, used)
            plan = cache.plan(
                slots=slots, lengths=lengths, num_tokens=tokens.shape[1], used=used,
                stacked=self.mode == "masks", trace=trace,
                trees=None if step.tree is None else TreeMasks(step.tree, step.positions),
                final=few, provisional=step.provisional,
            )  # fmt: skip
            if self.mode == "attention":
                with self._switched():
                    return self._forward(few, tokens, positions, foretoken=plan)
            mask = plan.stacked_mask(self._mask_dtype, self._device)
            return self._forward(few, tokens, positions, attention_mask=mask)

    def _run_on_device(self, step: Step) -> Tensor:
        """Nothing of the step is read here: what its rows hold is known to the device alone."""
        if self._captured is not None and self._captured.takes(step):
            with torch.inference_mode():
                return self._captured(step)
        return self._call_on_device(step, self._repeated if is_unrolled() else self.model)

    def _call_on_device(self, step: Step, module: Any) -> Tensor:
        positions = step.positions
        if self.max_positions is not None and step.max_length_after > self.max_positions:
            positions = positions.minimum((step.lengths + step.num_tokens - 1).unsqueeze(1))
            if self.position_table is not None:  # a request that has ended is fed its last token
                positions = positions.clamp_max(self.position_table - 1)
        with torch.inference_mode():
            plan = self.cache.plan_on_device(step)
            with self._switched():
                few = step.kind == "prefill"
                logits = self._forward(few, step.tokens, positions, module=module, foretoken=plan)
            self._bounded = plan.bounded
            return logits

    def _run_rows(
        self,
        cache: SlotCache,
        step: Step,
        tokens: Tensor,
        positions: Tensor,
        slots: Sequence[int],
        lengths: Sequence[int],
        used: Sequence[int],
    ) -> Tensor:
        """Rows of equal length in neighbouring slots together, through the model's own masks."""
        few = step.kind == "prefill"
        outputs = []
        for first, last in _alike(slots, lengths, used):
            width = used[first]
            cache.plan(
                slots=slots[first:last],
                lengths=lengths[first:last],
                num_tokens=width,
                final=few,
                provisional=step.provisional,
            )
            part = self._forward(few, tokens[first:last, :width], positions[first:last, :width])
            missing = 0 if few else tokens.shape[1] - width
            outputs.append(pad(part, (0, 0, 0, missing)) if missing else part)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _forward(
        self, few: bool, tokens: Tensor, positions: Tensor, module: Any = None, **arguments: Any
    ) -> Tensor:
        if self._takes_positions:
            arguments["position_ids"] = positions.to(self._device)
        if few and self._takes_keep:
            arguments["logits_to_keep"] = 1
        arguments[self._cache_argument] = self.cache
        with self.cache.running():
            logits: Tensor = (self.model if module is None else module)(
                input_ids=tokens.to(self._device), use_cache=True, return_dict=True, **arguments
            ).logits
        return logits.to(tokens.device)

    @contextmanager
    def _switched(self) -> Iterator[None]:
        # Models may be shared between threads, and configurations between models: the last one out puts back
        # what the first one found. Into the instance dicts: a configuration's own attribute access costs
        # microseconds, per draft.
        tables = [vars(config) for config in self._configs]
        with _switching:
            for table in tables:
                users, before = _switched.get(id(table), (0, table.get(_SETTING)))
                _switched[id(table)] = users + 1, before
                table[_SETTING] = NAME
        try:
            yield
        finally:
            with _switching:
                for table in tables:
                    users, before = _switched.pop(id(table))
                    if users > 1:
                        _switched[id(table)] = users - 1, before
                    else:
                        table[_SETTING] = before

    def _share_pages(self, pages: Pages, tokens: Tensor, logits: Tensor) -> None:
        """Give the model a pool in place of slots; it has been found out how it is run."""
        reason: str | None = "it has no keys and values"
        odd = {shape.dtype for shape in self._shapes} - set(APPENDED_DTYPES)
        if odd:
            reason = f"its keys and values are {odd.pop()}"
        elif self._shapes and not isinstance(self.cache, HybridCache):
            pages = pages.for_rows([self.max_length] * self.max_batch)
            sizes = {"max_batch": self.max_batch, "max_length": self.max_length}
            self.cache = PooledCache(self._shapes, pages, **sizes)
            reason = self._find_why_on_host(tokens, logits)
        elif self._shapes:
            reason = "its recurrent layers keep states, which are not rows"
        if reason is not None:
            raise ValueError(f'cache: expected "slots" for {type(self.model).__name__}, got pages: {reason}')

    def _find_why_on_host(self, tokens: Tensor, logits: Tensor) -> str | None:
        """What of the model needs lengths on the host."""
        if self.mode != "attention":
            return f"it is run through its own attention ({self.mode})"
        if isinstance(self.cache, HybridCache):
            return "its recurrent states go back to lengths that the host knows"
        if not self._takes_positions:
            return "its forward takes no position_ids"
        places = self._layer_devices | {logits.device}
        if places != {self._device}:
            return f"it is spread over {', '.join(sorted(map(str, places | {self._device})))}"

        self.cache.reset()
        try:
            fault = disagreement(
                lambda step, _: self._run_moved(step), tokens, logits, self.max_batch, layers=None
            )
        except Exception as error:  # as in _find_mode
            return f"{type(error).__name__}: {error}"
        return None if fault is None else f"with lengths on the device its {fault[1]}"

    def _capture(self, wanted: RunnerKind) -> CapturedForwards | None:
        self._why_module = "asked for" if wanted == "module" else self._find_why_module()
        if self._why_module is not None:
            if wanted in ("graph", "compiled"):
                raise ValueError(f'runner: expected "auto" or "module", got "{wanted}": {self._why_module}')
            return None
        if wanted == "compiled":
            self._repeated = torch.compile(self.model, dynamic=False)
        return CapturedForwards(
            lambda step: self._call_on_device(step, self._repeated),
            max_batch=self.max_batch,
            max_length=self.max_length,
            bounded=self._bounded,
            device=self._device,
        )

    def _find_why_module(self) -> str | None:
        if self._device.type != "cuda":
            return f"graphs are captured on cuda, the model is on {self._device.type}"
        if self.why_on_host is not None:
            return self.why_on_host
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.model.modules()):
            return "a hook on one of its modules would not be called again"
        if waits(
            lambda step: self._call_on_device(step, self.model),
            self._probe[0],
            self.max_batch,
            self._device,
        ):
            return "its forward waits for the device"
        return None

    def _run_moved(self, step: Step) -> Tensor:
        if isinstance(self.cache, PooledCache):
            self.cache.hold(step)
        return self._call_on_device(moved(step, self._device), self.model).to(step.tokens.device)

    def _find_why_no_trees(self) -> str | None:
        if isinstance(self.cache, HybridCache):
            return "its recurrent layers follow one line of tokens"
        if self.mode == "rows":
            return "it is run through its own masks, which know no trees"
        if not self._takes_positions:
            return "its forward takes no position_ids"
        # Requests may be under way in the other one.
        cache, pages = self.cache, None
        small = {"max_batch": 1, "max_length": 2 * PROBE_TOKENS}
        if isinstance(cache, PooledCache):
            pages = Pages(cache.pages.page_size).for_rows([2 * PROBE_TOKENS])
            self.cache = PooledCache(self._shapes, pages, **small)
        else:
            self.cache = SlotCache(self._shapes, **small)

        def run(step: Step) -> Tensor:
            if isinstance(self.cache, PooledCache) or self.why_on_host is None:
                return self._run_moved(step)
            return self._run(self.cache, step, None)

        def compact(*tensors: Tensor) -> None:
            self.compact(*(tensor.to(self._device) for tensor in tensors))

        try:
            return tree_disagreement(run, compact, *self._probe)
        finally:
            self.cache = cache

    def _find_mode(self, tokens: Tensor, logits: Tensor) -> str:
        """The first way of running the model that gives its own logits."""
        faults: list[tuple[str, int | None, str]] = []
        cache = self.cache
        if isinstance(cache, PooledCache):
            raise RuntimeError("the probe is over slots")
        for mode in ("attention", "masks", "rows"):
            if mode == "masks" and looks_local(text_config(self.model)):
                faults.append((mode, None, "a 4-D mask would hide its local layers"))
                continue
            self.mode = mode
            self.cache.reset()
            attending = self._attending if mode == "attention" else None
            try:
                fault = disagreement(
                    functools.partial(self._run, cache), tokens, logits, self.max_batch, attending
                )
            except Exception as error:  # modelling code may fail in any way; the reason is kept and told
                fault = None, f"{type(error).__name__}: {error}"
            if fault is None:
                return mode
            faults.append((mode, *fault))
        hint = "; it is in training mode, call model.eval()" if self.model.training else ""
        told = "; ".join(
            f"{mode}: {reason}" if layer is None else f"{mode}: layer {layer}: {reason}"
            for mode, layer, reason in faults
        )
        raise UnsupportedModelError(self.model, told + hint, faults[0][1])


def why_not_ahead(device: torch.device) -> str | None:
    """Why rounds of a model on this device wait for their results; None: they need not."""
    if (reason := why_not_on(device)) is not None:
        return reason
    return None if runs_ahead(device) else f"rounds do not run ahead on {device.type}"


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every configuration object that a module of `model` may read its attention implementation from."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())


def _alike(slots: Sequence[int], lengths: Sequence[int], used: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of rows with neighbouring slots, equal lengths and equal numbers of tokens."""
    cuts = [0]
    for row in range(1, len(slots)):
        same = lengths[row] == lengths[row - 1] and used[row] == used[row - 1]
        if not same or slots[row] != slots[row - 1] + 1:
            cuts.append(row)
    return list(zip(cuts, [*cuts[1:], len(slots)], strict=True))
