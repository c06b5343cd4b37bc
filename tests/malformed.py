"""A generator of malformed calls: every operation, every argument, every fault that fits it.

A fault turns a good tensor into something the border has to refuse. Which faults fit an argument follows from
its specification, so a new operation is covered by describing it once in `OPERATIONS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from foretoken import Sampling, _core, ops

B, N, V = 4, 3, 48
K = 5  # children of a node
BASE, TOP = 9, 2
UNWRITTEN = -7
INDEX = (torch.int32, torch.int64)
REAL = (torch.float32, torch.bfloat16, torch.float16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
ANY = (*REAL, *FLOAT8, *INDEX, torch.float64, torch.uint8, torch.bool)
SLOTS, HEADS, SIZE = 16, 2, 8


@dataclass(frozen=True)
class Spec:
    """One tensor argument: what makes a good one, and what of it is demanded."""

    name: str
    good: Callable[[], Tensor]
    dtypes: tuple[torch.dtype, ...]
    fixed: tuple[int, ...] = ()  # dimensions whose size is demanded, rather than taken as it comes
    rows: bool = False  # neighbours in the last dimension have to be side by side
    optional: bool = False
    output: bool = False
    least: tuple[int, ...] = ()  # dimensions that may be larger, but not smaller


@dataclass(frozen=True)
class Operation:
    name: str
    specs: tuple[Spec, ...]
    call: Callable[[dict[str, Any]], None]

    def arguments(self) -> dict[str, Any]:
        torch.manual_seed(5)
        return {spec.name: spec.good() for spec in self.specs}


def ids(*shape: int, dtype: torch.dtype = torch.int64) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, V, shape, dtype=dtype)


def reals(*shape: int, probs: bool = False) -> Callable[[], Tensor]:
    return lambda: torch.softmax(torch.randn(shape), -1) if probs else torch.randn(shape)


def whole(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Callable[[], Tensor]:
    return lambda: torch.full(shape, value, dtype=dtype)


def whole_share() -> Tensor:
    """A uniform law over all ids."""
    return torch.full((B, N, V), 1.0 / V)


def records() -> Tensor:
    """Laws of the rows that ``Operation.arguments`` makes first, as ``ops.sample`` notes them."""
    noted = torch.empty(B, N, 4, dtype=torch.int64)
    rows = reals(B * N, V // 2)()
    base = torch.ones(B * N, dtype=torch.int64)
    ops.sample(rows, sampling=Sampling(seed=3), base=base, records=noted.view(-1, 4))
    return noted


def output(
    name: str,
    *shape: int,
    dtype: torch.dtype,
    among: tuple[torch.dtype, ...] = (),
    optional: bool = False,
    free: tuple[int, ...] = (),
) -> Spec:
    good = whole(UNWRITTEN, *shape, dtype=dtype)
    fixed = tuple(dim for dim in range(len(shape)) if dim not in free)
    return Spec(name, good, among or (dtype,), fixed, optional=optional, output=True)


def outputs_of_verify(*, tree: bool = False) -> tuple[Spec, ...]:
    return (
        # How deep the paths of a tree may be is for the caller to say.
        output("out.tokens", B, N + 1, dtype=torch.int64, free=(1,) if tree else ()),
        output("out.num_emitted", B, dtype=torch.int32),
        output("out.num_accepted", B, dtype=torch.int32),
        output("out.path", B, N, dtype=torch.int32, optional=True),
        output("out.next_token", B, dtype=torch.int64),
        output("out.next_lengths", B, dtype=torch.int64),
        output("out.status", B, dtype=torch.int32),
        output("out.logprobs", B, N + 1, dtype=torch.float32, optional=True),
    )


def more_outputs() -> tuple[Spec, ...]:
    columns = (B, N + 1)
    return (
        output("out.path_rows", *columns, dtype=torch.int64, optional=True),
        output("out.top_tokens", *columns, TOP, dtype=torch.int64, optional=True, free=(2,)),
        output("out.top_logprobs", *columns, TOP, dtype=torch.float32, optional=True),
        output("out.raw_logprobs", *columns, dtype=torch.float32, optional=True),
        output("out.raw_top_tokens", *columns, TOP, dtype=torch.int64, optional=True, free=(2,)),
        output("out.raw_top_logprobs", *columns, TOP, dtype=torch.float32, optional=True),
    )


def outputs_of_index() -> tuple[Spec, ...]:
    return (
        output("out.depth", B, N + 1, dtype=torch.int32),
        output("out.first_child", B, N + 1, dtype=torch.int32),
        output("out.next_sibling", B, N + 1, dtype=torch.int32),
        output("out.ancestors", B, N + 1, 1, dtype=torch.int64),
        output("out.positions", B, N + 1, dtype=torch.int64, optional=True),
        output("out.status", B, dtype=torch.int32),
    )


def call_verify(arguments: dict[str, Any]) -> None:
    out = {name[4:]: value for name, value in arguments.items() if name.startswith("out.")}
    rest = {name: value for name, value in arguments.items() if not name.startswith("out.")}
    if "draft_topk ids" in rest:
        rest["draft_topk"] = rest.pop("draft_topk ids"), rest.pop("draft_topk probs")
    law = PENALISED if "history" in rest else Sampling(seed=3)
    ops.verify(**rest, sampling=law, logprobs=True, out=ops.Verdict(**out))


def call_sample(arguments: dict[str, Any]) -> None:
    mapped = {"vocab_size": V} if "vocab_map" in arguments else {}
    law = PENALISED if "history" in arguments else Sampling(seed=3)
    ops.sample(**arguments, **mapped, sampling=law)


def call_tree_index(arguments: dict[str, Any]) -> None:
    out = {name[4:]: value for name, value in arguments.items() if name.startswith("out.")}
    rest = {name: value for name, value in arguments.items() if not name.startswith("out.")}
    ops.tree_index(**rest, out=ops.TreeIndex(**out))


def cache(name: str, *dtypes: torch.dtype, fixed: tuple[int, ...]) -> Spec:
    good = whole(UNWRITTEN, B, SLOTS, HEADS, SIZE, dtype=torch.float32)
    return Spec(name, good, dtypes, fixed, rows=True, output=True)


def call_append(arguments: dict[str, Any]) -> None:
    ops.append(**arguments)


def call_compact(arguments: dict[str, Any]) -> None:
    caches = [torch.zeros(B, SLOTS, 1), arguments["caches[1]"]]
    ops.compact(caches, **{name: value for name, value in arguments.items() if "[" not in name})


def call_commit(arguments: dict[str, Any]) -> None:
    def part(prefix: str) -> dict[str, Any]:
        return {name[len(prefix) :]: value for name, value in arguments.items() if name.startswith(prefix)}

    none = torch.empty(0)
    if arguments["verdict.logprobs"] is None:
        arguments = {**arguments, "record": None}
    ops.commit(
        ops.Verdict(**{"next_token": none, "next_lengths": none, **part("verdict.")}),
        ops.RequestState(**part("state.")),
        counters=ops.RoundCounters(**part("counters.")),
        **{name: value for name, value in arguments.items() if "." not in name},
    )


def call_draft_topk(arguments: dict[str, Any]) -> None:
    out = {name[4:]: value for name, value in arguments.items() if name.startswith("out.")}
    rest = {name: value for name, value in arguments.items() if not name.startswith("out.")}
    ops.draft_topk(**rest, k=K, out=ops.DraftTopK(**out))


def call_finalize_tree(arguments: dict[str, Any]) -> None:
    out = {name[4:]: value for name, value in arguments.items() if name.startswith("out.")}
    rest = {name: value for name, value in arguments.items() if not name.startswith("out.")}
    own = {name: out.pop(name) for name in ("tokens", "parents", "num_drafts", "source")}
    ops.finalize_tree(**rest, num_nodes=N, out=ops.FinalTree(**own, index=ops.TreeIndex(**out)))


PENALISED = Sampling(repetition_penalty=1.3, bad_words=[[1, 2], [3]], logit_bias={5: 1.0}, seed=3)
WORDS = (V + 31) // 32
TEXT = (
    Spec("history", ids(B, 2 * BASE), INDEX, least=(0,)),
    Spec("prompt_lengths", whole(2, B, dtype=torch.int64), INDEX, fixed=(0,)),
)
VOCAB_MAP = Spec(
    "vocab_map",
    lambda: torch.arange(V // 2, dtype=torch.int32),
    (torch.int32,),
    fixed=(0,),
    optional=True,
)
VERIFY_INPUTS = (
    Spec("target_logits", reals(B, N + 1, V), REAL, fixed=(0, 1), rows=True),
    Spec("draft_tokens", ids(B, N), INDEX),
    Spec("num_drafts", whole(N, B), (torch.int32,), fixed=(0,), optional=True),
    Spec(
        "draft_row",
        lambda: torch.arange(N + 1, dtype=torch.int32).repeat(B, 1),
        (torch.int32,),
        (0, 1),
        optional=True,
    ),
    Spec("base", whole(BASE, B, dtype=torch.int64), (torch.int64,), fixed=(0,)),
    Spec("slots", lambda: torch.arange(B, dtype=torch.int32), (torch.int32,), fixed=(0,), optional=True),
)
OPERATIONS = (
    Operation(
        "verify",
        (
            *VERIFY_INPUTS,
            Spec("draft_logits", reals(B, N, V), REAL, fixed=(0,), rows=True, optional=True),
            *outputs_of_verify(),
        ),
        call_verify,
    ),
    Operation(
        "verify-flattened",
        (
            Spec("target_logits", reals(B * (N + 1), V), REAL, rows=True),
            Spec("row_offsets", lambda: torch.arange(0, B * (N + 1) + 1, N + 1), INDEX, fixed=(0,)),
            *VERIFY_INPUTS[1:],
            Spec("draft_probs", reals(B, N, V, probs=True), REAL, fixed=(0,), rows=True, optional=True),
            Spec("bitmask", whole(-1, B * (N + 1), WORDS), (torch.int32,), fixed=(0, 1), optional=True),
            *outputs_of_verify(),
        ),
        call_verify,
    ),
    Operation(
        "verify-tree",
        (
            *VERIFY_INPUTS[:2],
            Spec("parents", lambda: torch.tensor([[0, 0, 1]] * B), INDEX, fixed=(0, 1), optional=True),
            *VERIFY_INPUTS[2:],
            Spec("draft_topk ids", lambda: torch.arange(V).repeat(B, N, 1), INDEX, fixed=(0,)),
            Spec("draft_topk probs", whole_share, (torch.float32,), fixed=(0, 1, 2)),
            Spec("bitmask", whole(-1, B, N + 1, WORDS), (torch.int32,), fixed=(0, 1, 2), optional=True),
            *TEXT,
            Spec("rule", lambda: ops.rule_codes(["rrs", "traversal", "coupled", "auto"]), (torch.uint8,)),
            *outputs_of_verify(tree=True),
            *more_outputs(),
        ),
        call_verify,
    ),
    Operation(
        "verify-mapped",
        (
            *VERIFY_INPUTS,
            Spec("draft_logits", reals(B, N, V // 2), REAL, fixed=(0,), rows=True, optional=True),
            Spec("draft_records", records, (torch.int64,), fixed=(0, 1, 2), optional=True),
            VOCAB_MAP,
            *outputs_of_verify(),
        ),
        call_verify,
    ),
    Operation(
        "sample",
        (
            Spec("logits", reals(B, V), REAL, rows=True),
            Spec("base", whole(BASE, B, dtype=torch.int64), (torch.int64,), fixed=(0,)),
            Spec(
                "slots", lambda: torch.arange(B, dtype=torch.int32), (torch.int32,), fixed=(0,), optional=True
            ),
            Spec("bitmask", whole(-1, B, WORDS), (torch.int32,), fixed=(0, 1), optional=True),
            *TEXT,
            Spec("path", ids(B, 2), INDEX, fixed=(0,), optional=True),
            output("out", B, dtype=torch.int64, optional=True),
            output("status", B, dtype=torch.int32, optional=True),
            output("records", B, 4, dtype=torch.int64, optional=True),
        ),
        call_sample,
    ),
    Operation(
        "sample-mapped",
        (
            Spec("logits", reals(B, V // 2), REAL, rows=True),
            Spec("base", whole(BASE, B, dtype=torch.int64), (torch.int64,), fixed=(0,)),
            *TEXT,
            VOCAB_MAP,
            output("out", B, dtype=torch.int64, optional=True),
        ),
        call_sample,
    ),
    Operation(
        "tree_index",
        (
            Spec("parents", whole(0, B, N, dtype=torch.int64), INDEX),
            Spec("num_drafts", whole(N, B), (torch.int32,), fixed=(0,), optional=True),
            Spec("lengths", whole(9, B, dtype=torch.int64), (torch.int64,), fixed=(0,), optional=True),
            *outputs_of_index(),
        ),
        call_tree_index,
    ),
    Operation(
        "commit",
        (
            Spec("verdict.tokens", ids(B, N + 1), INDEX),
            Spec("verdict.num_emitted", whole(N + 1, B), (torch.int32,), fixed=(0,)),
            Spec("verdict.num_accepted", whole(N, B), (torch.int32,), fixed=(0,)),
            Spec("verdict.status", whole(0, B), (torch.int32,), fixed=(0,)),
            Spec("verdict.logprobs", reals(B, N + 1), (torch.float32,), fixed=(0, 1), optional=True),
            Spec("verdict.path", whole(1, B, N), (torch.int32,), fixed=(0,)),
            Spec("num_drafts", whole(N, B), (torch.int32,), fixed=(0,)),
            Spec("parents", whole(0, B, N, dtype=torch.int64), INDEX, fixed=(0,), optional=True),
            Spec(
                "slots", lambda: torch.arange(B, dtype=torch.int32), (torch.int32,), fixed=(0,), optional=True
            ),
            Spec("state.limits", whole(2 * BASE, B, dtype=torch.int64), (torch.int64,), fixed=(0,)),
            Spec("state.budgets", whole(N, B), (torch.int32,), fixed=(0,)),
            Spec("state.eos_ids", whole(-1, B, 2), (torch.int32,), fixed=(0,)),
            Spec("state.stop_ids", whole(-1, B, 1), (torch.int32,), fixed=(0,)),
            output("state.text", B, 2 * BASE, dtype=torch.int32, free=(0, 1)),
            output("state.base", B, dtype=torch.int64),
            output("state.next_drafts", B, dtype=torch.int32),
            output("state.ends", B, dtype=torch.int32),
            output("record", B, ops.record_width(N + 1, True), dtype=torch.int32, optional=True),
            output("counters.sums", B, 10, dtype=torch.int64),
            output("counters.accepted_per_pos", B, N, dtype=torch.int64, free=(1,)),
            output("counters.rounds_by_drafts", B, N + 1, dtype=torch.int64, free=(1,)),
        ),
        call_commit,
    ),
    Operation(
        "append",
        (
            Spec("k", reals(B, N, HEADS, SIZE), (*REAL, *FLOAT8), rows=True),
            Spec("v", reals(B, N, HEADS, SIZE), (*REAL, *FLOAT8), fixed=(0, 1, 2), rows=True),
            cache("k_cache", torch.float32, *FLOAT8, fixed=(2, 3)),
            cache("v_cache", torch.float32, *FLOAT8, fixed=(0, 1, 2, 3)),
            Spec("lengths", whole(2, B, dtype=torch.int64), INDEX, fixed=(0,)),
            Spec("num_nodes", whole(N, B), (torch.int32,), fixed=(0,), optional=True),
            Spec("block_table", lambda: torch.arange(B).view(B, 1), INDEX, fixed=(0,), optional=True),
            output("status", B, dtype=torch.int32, optional=True),
        ),
        call_append,
    ),
    Operation(
        "compact",
        (
            Spec("path", lambda: torch.tensor([[2, 3]] * B), INDEX),
            Spec("lengths", whole(2, B, dtype=torch.int64), INDEX, fixed=(0,)),
            Spec("num_accepted", whole(2, B), (torch.int32,), fixed=(0,)),
            Spec("block_table", lambda: torch.arange(B).view(B, 1), INDEX, fixed=(0,), optional=True),
            cache("caches[1]", *ANY, fixed=(0, 1)),
            output("status", B, dtype=torch.int32, optional=True),
        ),
        call_compact,
    ),
    Operation(
        "draft_topk",
        (
            Spec("logits", reals(B, N, V), REAL, rows=True),
            Spec("scores", reals(B, N), (torch.float32,), fixed=(0, 1), optional=True),
            Spec("entries", whole(2, B, N, dtype=torch.int64), INDEX, fixed=(0, 1)),
            output("out.tokens", B, N, K, dtype=torch.int32),
            output("out.scores", B, N, K, dtype=torch.float32),
            output("out.parents", B, N, K, dtype=torch.int32),
            output("out.status", B, N, dtype=torch.int32),
        ),
        call_draft_topk,
    ),
    Operation(
        "draft_topk-flat",
        (
            Spec("logits", reals(B, V), REAL, rows=True),
            Spec("scores", reals(B), (torch.float32,), fixed=(0,), optional=True),
            Spec("entries", whole(2, B, dtype=torch.int64), INDEX, fixed=(0,), optional=True),
            output("out.tokens", B, K, dtype=torch.int32),
            output("out.scores", B, K, dtype=torch.float32),
            output("out.parents", B, K, dtype=torch.int32),
            output("out.status", B, dtype=torch.int32),
        ),
        call_draft_topk,
    ),
    Operation(
        "finalize_tree",
        (
            Spec("tokens", ids(B, K), INDEX),
            Spec("scores", lambda: -torch.rand(B, K).cumsum(1), (torch.float32,), fixed=(0, 1)),
            Spec("parents", lambda: torch.tensor([[-1, -1, 0, 1, 2]] * B), INDEX, fixed=(0, 1)),
            Spec("budget", whole(2, B), (torch.int32,), fixed=(0,), optional=True),
            Spec("lengths", whole(9, B, dtype=torch.int64), (torch.int64,), fixed=(0,), optional=True),
            output("out.tokens", B, N, dtype=torch.int64),
            output("out.parents", B, N, dtype=torch.int32),
            output("out.num_drafts", B, dtype=torch.int32),
            output("out.source", B, N, dtype=torch.int32),
            *outputs_of_index(),
        ),
        call_finalize_tree,
    ),
    Operation(
        "intake8",
        (
            Spec("target_logits", reals(B, N + 1, V), REAL, rows=True),
            Spec("draft_tokens", ids(B, N), INDEX, fixed=(0, 1), rows=True),
            Spec("num_drafts", whole(N, B), (torch.int32,), fixed=(0,), rows=True, optional=True),
            Spec("draft_logits", reals(B, N, V), REAL, fixed=(0, 2), rows=True, optional=True),
            Spec(
                "base", whole(9, B, dtype=torch.int64), (torch.int64,), fixed=(0,), rows=True, optional=True
            ),
            output("tokens", B, N + 1, dtype=torch.int64, among=INDEX),
            output("num_emitted", B, dtype=torch.int32),
            output("logprobs", B, N + 1, dtype=torch.float32, optional=True),
        ),
        lambda arguments: _core.testing.intake8(**arguments),
    ),
)


def once() -> list[tuple[Operation, Spec]]:
    """Every argument with the first operation of its kind that takes it in this shape."""
    found: dict[tuple[str, ...], tuple[Operation, Spec]] = {}
    for operation in OPERATIONS:
        for spec in operation.specs:
            shape = spec.good().shape
            key = (operation.name.partition("-")[0], spec.name, str(shape), str(spec.fixed))
            found.setdefault(key, (operation, spec))
    return list(found.values())


@dataclass(frozen=True)
class Case:
    operation: Operation
    spec: Spec
    fault: str
    spoil: Callable[[Tensor], Any]
    error: type[Exception] | tuple[type[Exception], ...]
    words: str = ""  # what the message has to contain, besides the argument's name

    def __str__(self) -> str:
        return f"{self.operation.name}-{self.spec.name}-{self.fault}"


class Producer:
    """A foreign array whose half of the DLPack protocol misbehaves."""

    def __init__(self, device: Any, exported: Any) -> None:
        self.device = device
        self.exported = exported

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        if isinstance(self.exported, Exception):
            raise self.exported
        return self.exported


class OlderTorch(torch.Tensor):
    """A tensor as torch made them before there was an exchange table."""

    __dlpack_c_exchange_api__ = None


def quietly(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes of torch announce themselves
        return make()


def fake(tensor: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def freed(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def misaligned(tensor: Tensor) -> np.ndarray:
    array = tensor.numpy()
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    return memory.view(array.dtype).reshape(array.shape)


def read_only(tensor: Tensor) -> np.ndarray:
    array = tensor.numpy().copy()
    array.flags.writeable = False
    return array


def strided_rows(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def with_elements(wrap: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda tensor: quietly(lambda: wrap(tensor))


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda t: t.tolist(),
    "tuple": lambda t: (t,),
    "int": lambda t: 3,
    "float": lambda t: 0.5,
    "text": lambda t: "tensor",
    "bytes": lambda t: b"\0" * 64,
    "dtype": lambda t: t.dtype,
    "type": lambda t: type(t),
    "object": lambda t: object(),
}
UNREADABLE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "meta": (lambda t: t.to("meta"), "meta"),
    "sparse": (lambda t: t.to_sparse(), "sparse"),
    "quantized": (lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8), "quantized"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t]), "nested"),
    "jagged": (lambda t: torch.nested.nested_tensor([t[:1], t], layout=torch.jagged), "nested"),
    "fake": (fake, "FakeTensor"),
    "functional": (torch._to_functional_tensor, "without memory"),
    "zero": (lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype), "without memory"),
    "freed": (freed, "without memory"),
    "neg": (torch._neg_view, "negated"),
    "older-neg": (lambda t: torch._neg_view(t).as_subclass(OlderTorch), "negated"),
    "older-freed": (lambda t: freed(t).as_subclass(OlderTorch), "without memory"),
    "conj": (lambda t: t.to(torch.complex64).conj(), "complex64"),
    "cuda": (lambda t: Producer((2, 1), None), "cuda:1"),
    "metal": (lambda t: Producer((8, 0), None), "device type 8"),
    "device-none": (lambda t: Producer(None, None), "__dlpack_device__"),
    "capsule-none": (lambda t: Producer((1, 0), None), "capsule"),
    "capsule-used": (lambda t: Producer((1, 0), used_capsule(t)), "capsule"),
    "raises": (lambda t: Producer((1, 0), RuntimeError("out of luck")), "out of luck"),
    "raises-type": (lambda t: Producer((1, 0), TypeError("out of type")), "out of type"),
    "misaligned": (misaligned, "aligned"),
    "reversed": (lambda t: t.numpy()[::-1], "strides"),
    "endian": (lambda t: t.numpy().astype(t.numpy().dtype.newbyteorder(">")), "exported"),
    "objects": (lambda t: t.numpy().astype(object), "exported"),
}
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)


def used_capsule(tensor: Tensor) -> Any:
    capsule = tensor.__dlpack__()
    torch.from_dlpack(capsule)
    return capsule


def shape_faults(spec: Spec, good: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    yield "rank+1", lambda t: t.unsqueeze(0).clone()
    yield "rank-1", lambda t: t[0].clone()
    yield "rank-6", lambda t: t.reshape(1, 1, 1, 1, 1, -1)
    yield "scalar", lambda t: t.flatten()[0].clone()
    for dim in spec.fixed:
        yield f"longer-{dim}", lambda t, dim=dim: torch.cat([t, t.narrow(dim, 0, 1)], dim)
        yield f"shorter-{dim}", lambda t, dim=dim: t.narrow(dim, 0, t.shape[dim] - 1).clone()
        yield f"empty-{dim}", lambda t, dim=dim: t.narrow(dim, 0, 0).clone()
    for dim in spec.least:
        yield f"shorter-{dim}", lambda t, dim=dim: t.narrow(dim, 0, t.shape[dim] - 1).clone()
        yield f"empty-{dim}", lambda t, dim=dim: t.narrow(dim, 0, 0).clone()


def output_faults() -> Iterator[tuple[str, Callable[[Tensor], Any], str]]:
    yield "expanded", lambda t: t[:1].clone().expand(t.shape), "strides [0"
    yield "folded", lambda t: torch.as_strided(t.clone(), t.shape, (1,) * t.dim()), "overlap"
    yield "read-only", read_only, "read-only"


def faults_of(operation: Operation, spec: Spec) -> Iterator[Case]:
    good = spec.good()
    for name, spoil in KINDS.items():
        error = ValueError if (spec.name, name) == ("rule", "text") else TypeError
        yield Case(operation, spec, name, spoil, error, "expected")
    if not spec.optional:
        yield Case(operation, spec, "none", lambda t: None, (TypeError, ValueError), "got None")
    for name, (spoil, words) in UNREADABLE.items():
        if good.element_size() == 1 and name in ("misaligned", "endian"):
            continue  # single bytes are neither
        yield Case(operation, spec, name, with_elements(spoil), ValueError, words)
    for name, spoil in shape_faults(spec, good):
        yield Case(operation, spec, name, spoil, ValueError, "expected")
    for dtype in DTYPES:
        if dtype not in spec.dtypes:
            name = str(dtype).removeprefix("torch.")
            yield Case(operation, spec, name, lambda t, dtype=dtype: t.to(dtype), ValueError, f"got {name}")
    if spec.rows:
        yield Case(operation, spec, "columns", strided_rows, ValueError, "strides")
    if spec.output:
        for name, spoil, words in output_faults():
            if name == "folded" and good.dim() < 2:
                continue
            yield Case(operation, spec, name, spoil, ValueError, words)
