"""The border: what it takes in, what it refuses and in which words, and that refusing leaves no trace."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foretoken import Sampling, Status, _core, ops
from malformed import (
    OPERATIONS,
    UNWRITTEN,
    B,
    Case,
    N,
    OlderTorch,
    Operation,
    Producer,
    Spec,
    V,
    call_verify,
    faults_of,
    once,
)

describe = _core.testing.describe


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of calls too small to share out
    yield
    torch.set_num_threads(before)


VERIFY = OPERATIONS[0]


def outputs(operation: Operation, arguments: dict[str, Any]) -> list[Tensor]:
    return [arguments[spec.name] for spec in operation.specs if spec.output]


def run(operation: Operation, arguments: dict[str, Any]) -> list[list[Any]]:
    operation.call(arguments)
    return [tensor.tolist() for tensor in outputs(operation, arguments)]


CANARY = {operation.name: run(operation, operation.arguments()) for operation in OPERATIONS}


def problem_with(case: Case) -> str | None:
    """What is wrong with the refusal of a malformed call; None: nothing."""
    operation, name = case.operation, case.spec.name
    arguments = operation.arguments()
    untouched = outputs(operation, {**arguments})
    arguments[name] = case.spoil(arguments[name])
    try:
        operation.call(arguments)
        return "accepted"
    except (TypeError, ValueError) as refused:
        error = refused
    message = str(error)
    # Flattened or not is decided by the rank, so a wrong rank of the one may be told by the other.
    told_by = {name} | ({"row_offsets"} if name == "target_logits" else set())
    told_by |= {"scores"} if operation.name.startswith("draft_topk") and name == "logits" else set()
    # Of two that come together, one is missed when the other is None.
    told_by |= {"draft_topk"} if name.startswith("draft_topk") else set()
    told_by |= {"history", "prompt_lengths"} if name in ("history", "prompt_lengths") else set()
    if not isinstance(error, case.error):
        return f"raised {type(error).__name__}: {message}"
    if message.partition(":")[0] not in told_by or ", got " not in message or case.words not in message:
        return f"said: {message}"
    if not all((tensor == UNWRITTEN).all() for tensor in untouched):
        return "wrote before it refused"
    if run(operation, operation.arguments()) != CANARY[operation.name]:
        return "left a trace in the next call"
    return None


@pytest.mark.parametrize(
    ("operation", "spec"),
    [pytest.param(operation, spec, id=f"{operation.name}-{spec.name}") for operation, spec in once()],
)
def test_malformed_calls_are_refused_in_words(operation: Operation, spec: Spec) -> None:
    cases = faults_of(operation, spec)
    assert {str(case): problem for case in cases if (problem := problem_with(case))} == {}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_shared_memory_is_refused(operation: Operation) -> None:
    for written in operation.specs:
        for other in operation.specs:
            if not written.output or other is written:
                continue
            arguments = operation.arguments()
            tensors = [arguments[written.name], arguments[other.name]]
            memory = torch.zeros(max(t.numel() * t.element_size() for t in tensors) + 8, dtype=torch.uint8)
            for spec, tensor in zip((written, other), tensors, strict=True):
                size = tensor.numel() * tensor.element_size()
                arguments[spec.name] = memory[:size].view(tensor.dtype).view(tensor.shape)
            with pytest.raises(
                ValueError, match="expected memory of its own, got memory shared with"
            ) as refused:
                operation.call(arguments)
            message = str(refused.value)
            assert written.name in message
            assert other.name in message
            assert not memory.any()
    assert run(operation, operation.arguments()) == CANARY[operation.name]


def test_two_thousand_calls_are_malformed() -> None:
    cases = [str(case) for operation, spec in once() for case in faults_of(operation, spec)]
    assert len(set(cases)) == len(cases) >= 2000


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("rule", {"rule": "blocky"}, ValueError),
        ("rule", {"rule": ["block"]}, TypeError),
        ("rule", {"rule": None}, ValueError),
        ("tolerance", {"tolerance": 0.5}, TypeError),
        ("draft_topk", {"draft_logits": None, "draft_topk": torch.zeros(2, B, N, V)}, TypeError),
        ("draft_topk", {"draft_logits": None, "draft_topk": (torch.zeros(B, N, V),)}, TypeError),
        ("draft_topk", {"draft_logits": None, "draft_topk": (torch.zeros(B, N, V), None)}, ValueError),
        ("draft_records", {"draft_logits": None, "draft_records": torch.zeros(B, N, 4)}, ValueError),
        ("prompt_lengths", {"history": torch.zeros(B, 9), "prompt_lengths": None}, ValueError),
        ("sampling", {"sampling": {"temperature": 1}}, TypeError),
        ("sampling", {"sampling": _core.SamplingTable(B - 1)}, ValueError),
        ("draft_sampling", {"draft_sampling": 0.5}, TypeError),
        ("draft_sampling", {"draft_sampling": _core.SamplingTable(B - 1)}, ValueError),
        ("out", {"out": torch.zeros(B, N + 1)}, TypeError),
        ("draft law", {"draft_probs": torch.zeros(B, N, V)}, ValueError),
    ],
)
def test_what_is_no_tensor_is_refused_by_name(name: str, arguments: dict[str, Any], error: type) -> None:
    good = {spec.name: spec.good() for spec in VERIFY.specs if not spec.output and spec.name != "slots"}
    with pytest.raises(error, match=rf"^{name}: expected .*got "):
        ops.verify(**{"sampling": Sampling(seed=3), **good, **arguments})


def test_a_message_reads_as_documented() -> None:
    arguments = VERIFY.arguments()
    arguments["base"] = torch.zeros(6, dtype=torch.int32)
    with pytest.raises(ValueError) as refused:
        call_verify(arguments)
    assert str(refused.value) == "base: expected int64 [4] on cpu, got int32 [6] on cpu"


# --- what only the data shows is flagged, and leaves the neighbours alone ---


def spoil(name: str, row: int, value: float) -> dict[str, Any]:
    arguments = VERIFY.arguments()
    arguments[name][row] = value
    return arguments


@pytest.mark.parametrize("row", range(B))
@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("draft_tokens", V, Status.BAD_DRAFT),
        ("draft_tokens", -1, Status.BAD_DRAFT),
        ("draft_tokens", 2**62, Status.BAD_DRAFT),
        ("draft_tokens", -(2**62), Status.BAD_DRAFT),
        ("num_drafts", N + 1, Status.BAD_DRAFT),
        ("num_drafts", -2, Status.BAD_DRAFT),
        ("num_drafts", 2**31 - 1, Status.BAD_DRAFT),
        ("draft_row", N, Status.BAD_DRAFT),
        ("draft_row", 2**31 - 1, Status.BAD_DRAFT),
        ("draft_logits", float("nan"), Status.BAD_DRAFT),
        ("draft_logits", -float("inf"), Status.BAD_DRAFT),
        ("draft_logits", float("inf"), Status.BAD_DRAFT),
        ("target_logits", float("nan"), Status.LAW_LOST),
        ("target_logits", float("inf"), Status.LAW_LOST),
        ("target_logits", -float("inf"), Status.LAW_LOST),
        ("slots", B, Status.BAD_ROW),
        ("slots", -1, Status.BAD_ROW),
        ("slots", -(2**31), Status.BAD_ROW),
    ],
)
def test_data_faults_are_flagged(name: str, row: int, value: float, status: Status) -> None:
    arguments = spoil(name, row, value)
    results = run(VERIFY, arguments)
    assert arguments["out.status"].tolist() == [int(status) if b == row else 0 for b in range(B)]
    for spoiled, canary in zip(results, CANARY["verify"], strict=True):
        assert [x for b, x in enumerate(spoiled) if b != row] == [x for b, x in enumerate(canary) if b != row]
    emitted = arguments["out.tokens"][row][: int(arguments["out.num_emitted"][row])]
    assert ((emitted >= 0) & (emitted < V)).all()


@pytest.mark.parametrize(
    "offsets", [[-1, 4, 8, 12, 16], [0, 4, 8, 12, 17], [0, 4, 3, 12, 16], [0, 2**40, 8, 12, 16]]
)
def test_row_offsets_outside_the_rows_are_flagged(offsets: list[int]) -> None:
    operation = OPERATIONS[1]
    arguments = operation.arguments()
    arguments["row_offsets"] = torch.tensor(offsets)
    operation.call(arguments)
    assert arguments["out.status"].any()
    assert run(operation, operation.arguments()) == CANARY[operation.name]


# --- what is taken in ---


def test_views_are_read_where_they_lie() -> None:
    x = torch.arange(60.0).view(3, 4, 5)[1:, ::2, 1:]
    address, shape, strides = describe(x)
    assert (address, shape, strides) == (x.data_ptr(), [2, 2, 4], [20, 10, 1])
    with pytest.raises(ValueError, match="without gaps"):
        describe(x, layout="contiguous")
    assert describe(x.transpose(1, 2), layout="any")[2] == [20, 1, 10]


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0,)])
def test_empty_tensors_are_tensors(shape: tuple[int, ...]) -> None:
    address, size, _ = describe(torch.empty(shape), layout="contiguous", write=True)
    assert address != 0
    assert size == list(shape)


def test_strides_of_single_elements_do_not_matter() -> None:
    x = torch.as_strided(torch.zeros(40), (1, 5, 1), (999, 1, 7))
    assert describe(x, layout="contiguous", write=True)[2] == [5, 1, 1]


def test_scalars_have_rank_zero() -> None:
    assert describe(torch.tensor(3.0))[1] == []


@pytest.mark.parametrize(
    "wrap", [torch.nn.Parameter, lambda t: t.requires_grad_(), lambda t: t.requires_grad_() * 2]
)
def test_reads_are_detached(wrap: Any) -> None:
    tensor = wrap(torch.ones(2, 3))
    assert describe(tensor)[0] == tensor.data_ptr()


def test_inference_tensors_and_harmless_subclasses_are_read() -> None:
    class Named(torch.Tensor):
        pass

    with torch.inference_mode():
        assert describe(torch.ones(2, 3))[1] == [2, 3]
    assert describe(torch.ones(2, 3).as_subclass(Named))[1] == [2, 3]


def test_older_torch_is_read_through_its_method() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert describe(x.as_subclass(OlderTorch))[0] == x.data_ptr()


def test_numpy_is_read_and_written() -> None:
    operation = VERIFY
    arguments = {name: tensor.numpy() for name, tensor in operation.arguments().items()}
    arguments["base"].flags.writeable = False  # what is only read may be read-only
    assert run(operation, arguments) == CANARY["verify"]


def test_conjugate_imaginary_parts_are_told_from_plain_strides() -> None:
    # conj().imag is how a negated view comes about without asking for one; in one column its strides hide it.
    x = torch.zeros(4, 1, dtype=torch.complex64)
    with pytest.raises(ValueError, match="negated"):
        describe(x.conj().imag)
    assert describe(x.imag)[1] == [4, 1]


def test_columns_of_one_buffer_do_not_overlap() -> None:
    arguments = VERIFY.arguments()
    packed = torch.full((B, 2 * (N + 1) + 1), UNWRITTEN)
    arguments["out.tokens"] = packed[:, : N + 1]
    arguments["out.next_token"] = packed[:, N + 1]
    assert run(VERIFY, arguments) == CANARY["verify"]
    assert (packed[:, N + 2 :] == UNWRITTEN).all()
    arguments["out.next_token"] = packed[:, N]
    with pytest.raises(ValueError, match="shared with"):
        call_verify(arguments)


def test_neighbours_in_memory_are_not_written() -> None:
    arguments = VERIFY.arguments()
    guarded = {}
    for spec in VERIFY.specs:
        if spec.output:
            good = arguments[spec.name]
            guarded[spec.name] = torch.full((good.numel() + 16,), UNWRITTEN, dtype=good.dtype)
            arguments[spec.name] = guarded[spec.name][8:-8].view(good.shape)
    assert run(VERIFY, arguments) == CANARY["verify"]
    for memory in guarded.values():
        assert (memory[:8] == UNWRITTEN).all()
        assert (memory[-8:] == UNWRITTEN).all()


def test_owners_live_through_the_call_and_no_longer() -> None:
    array = np.zeros((2, 3), np.float32)
    before = sys.getrefcount(array)
    for _ in range(100):
        describe(array)
    assert sys.getrefcount(array) == before
    with pytest.raises(ValueError, match="expected 1 dimensions"):
        _core.sizes(array, "array", 1)
    assert sys.getrefcount(array) == before


def test_a_foreign_export_is_returned_once() -> None:
    array = np.zeros((2, 3), np.float32)
    alive = weakref.ref(array)
    producer = Producer((1, 0), array.__dlpack__())
    del array
    gc.collect()
    assert alive() is not None
    assert _core.sizes(producer, "producer", 2) == (2, 3)
    gc.collect()
    assert alive() is None  # the capsule was consumed, and what it held has gone with the call
    with pytest.raises(ValueError, match="no DLPack capsule"):
        _core.sizes(producer, "producer", 2)


def test_pending_errors_do_not_leak_into_the_next_call() -> None:
    for _ in range(3):
        with pytest.raises(ValueError):
            describe(torch.zeros(2, 3).to("meta"))
        assert describe(torch.zeros(2, 3))[1] == [2, 3]


def test_tensors_of_a_function_transform_are_refused() -> None:
    refused = []

    def body(x: Tensor) -> Tensor:
        with pytest.raises(ValueError) as error:
            describe(x)
        refused.append(str(error.value))
        return x.sum()

    torch.vmap(body)(torch.zeros(2, 3))
    torch.func.grad(body)(torch.zeros(3))
    torch.func.functionalize(body)(torch.zeros(3))
    assert len(refused) == 3


@pytest.mark.cuda
def test_cuda_tensors_are_described_and_devices_may_not_be_mixed() -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert describe(x)[0] == x.data_ptr()
    arguments = VERIFY.arguments()
    arguments["base"] = arguments["base"].cuda()
    with pytest.raises(ValueError, match=r"base: expected int64 \[4\] on cpu, got int64 \[4\] on cuda:0"):
        call_verify(arguments)
