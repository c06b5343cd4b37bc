"""Numbers that only the data shows: extremes in every integer, rows beyond 32 bits, memory with sharp edges.

Inputs lie beside memory that cannot be read, so that one element too far ends the process. What is damaged
costs its own row and no other.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken import Sampling, ops
from guarded import FAR, guarded, spread, virtual
from malformed import OPERATIONS, UNWRITTEN, B, N, Operation, Spec, V

KERNELS = [operation for operation in OPERATIONS if operation.name not in ("intake8", "commit")]
EXTREMES = [-(2**63), -(2**32) - 1, -(2**31), -2, -1, V - 1, V, 255, 2**31 - 1, 2**32, 2**32 + 1, 2**63 - 1]
FLOATS = [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45]
TOKENS = ("draft_tokens", "tokens")  # whose dtype is that of an output
MOVES = ("append", "compact")  # whose outputs are caches, of the dtype of what is written there
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reserves memory as Linux does")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def results_of(operation: Operation, arguments: dict[str, Any]) -> dict[str, Tensor]:
    operation.call(arguments)
    return {spec.name: arguments[spec.name] for spec in operation.specs if spec.output}


CANARY = {operation.name: results_of(operation, operation.arguments()) for operation in KERNELS}


def fitting(dtype: torch.dtype) -> list[int]:
    limits = torch.iinfo(dtype)
    return [value for value in EXTREMES if limits.min <= value <= limits.max]


def check_results(operation: Operation, results: dict[str, Tensor]) -> None:
    """Whatever came in: known flags, ids of the vocabulary, counts of what was there."""
    if operation.name in ("tree_index", "finalize_tree"):
        assert results["out.status"].ge(0).all()
        return
    status = results["status"] if "status" in results else results.get("out.status")
    if status is not None:
        assert ((status >= 0) & (status <= 7)).all()
    if operation.name in MOVES:
        return
    emitted = results["out.tokens"] if "out.tokens" in results else results["out"]
    assert ((emitted >= -1) & (emitted < V)).all()
    if "out.num_emitted" in results:
        counts = results["out.num_emitted"]
        assert ((counts >= 0) & (counts <= N + 1)).all()
        assert torch.equal(emitted.ge(0).sum(1).int(), counts)
        assert ((results["out.path"] >= -1) & (results["out.path"] <= N)).all()


def rows_of(operation: Operation, spec: Spec, element: int, tensor: Tensor) -> set[int]:
    """The rows of the batch that an element of an input has to do with."""
    if spec.name == "vocab_map":
        return set(range(B))
    first = element // max(1, tensor[0].numel())
    if spec.name == "row_offsets":
        return {first - 1, first}
    return {first // (len(tensor) // B)}


def assert_others_are_untouched(operation: Operation, results: dict[str, Tensor], damaged: set[int]) -> None:
    others = [b for b in range(B) if b not in damaged]
    for name, result in results.items():
        assert torch.equal(result[others], CANARY[operation.name][name][others]), name


INTEGERS = [
    pytest.param(operation, spec, id=f"{operation.name}-{spec.name}")
    for operation in KERNELS
    for spec in operation.specs
    if not spec.output and not spec.good().is_floating_point()
]


@pytest.mark.parametrize(("operation", "spec"), INTEGERS)
@pytest.mark.parametrize("front", [False, True], ids=["behind", "in front"])
def test_an_extreme_number_costs_one_row(operation: Operation, spec: Spec, front: bool) -> None:
    """Every integer argument in turn, in every dtype it may have, at its first and last element."""
    for dtype in spec.dtypes:
        count = spec.good().numel()
        for value in fitting(dtype):
            for element in {0, count // 2, count - 1}:
                arguments = operation.arguments()
                spoiled = arguments[spec.name].to(dtype)
                spoiled.view(-1)[element] = value
                arguments[spec.name] = spoiled
                if spec.name in TOKENS and dtype != torch.int64:
                    ends = ("tokens", "next_token")
                    for name in [n for n in arguments if n.endswith(ends) and n.startswith("out.")]:
                        arguments[name] = arguments[name].to(dtype)
                for other in operation.specs:
                    if not other.output:
                        arguments[other.name] = guarded(arguments[other.name], front=front)
                results = results_of(operation, arguments)
                check_results(operation, results)
                if dtype == torch.int64 or spec.name not in TOKENS:
                    rows = rows_of(operation, spec, element, spoiled)
                    assert_others_are_untouched(operation, results, rows)


@pytest.mark.parametrize("operation", KERNELS, ids=lambda operation: operation.name)
def test_damage_all_over_the_place(operation: Operation) -> None:
    """Several arguments at once, several elements each, floats too; then the call as it was."""
    pick = random.Random(operation.name)
    inputs = [spec for spec in operation.specs if not spec.output]
    for trial in range(150):
        arguments = operation.arguments()
        for spec in pick.sample(inputs, pick.randint(1, min(4, len(inputs)))):
            spoiled = arguments[spec.name].to(pick.choice(spec.dtypes)).contiguous()
            if spec.name in TOKENS or (operation.name in MOVES and spoiled.is_floating_point()):
                spoiled = arguments[spec.name]
            flat = spoiled.view(-1)
            values = fitting(spoiled.dtype) if not spoiled.is_floating_point() else FLOATS
            if spoiled.dtype == torch.float16:
                values = FLOATS[:3]
            for _ in range(pick.randint(1, 4)):
                flat[pick.randrange(len(flat))] = pick.choice(values)
            if pick.random() < 0.1:
                flat.fill_(pick.choice(values))
            arguments[spec.name] = spoiled
        for spec in inputs:
            arguments[spec.name] = guarded(arguments[spec.name], front=trial % 2 == 0)
        check_results(operation, results_of(operation, arguments))
    results = results_of(operation, operation.arguments())
    assert_others_are_untouched(operation, results, set())


def test_codes_of_rules_that_are_not_there() -> None:
    """A slot beyond the codes, and a code that is none, are a row that cannot be read."""
    slots = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    call = {"sampling": Sampling(seed=1).prepare(4), "base": torch.ones(4, dtype=torch.int64), "slots": slots}
    logits, drafts = torch.zeros(4, 2, 9), torch.zeros(4, 1, dtype=torch.int64)
    for codes, expected in (([0, 1, 12], [0, 0, 4, 4]), ([255], [4, 4, 4, 4]), ([], [4, 4, 4, 4])):
        rules = guarded(torch.tensor(codes, dtype=torch.uint8))
        assert ops.verify(logits, drafts, rule=rules, **call).status.tolist() == expected


# --------------------------------------------------------------------------- rows beyond 32 bits


@LINUX
@pytest.mark.parametrize(
    ("operation", "spec"),
    [
        pytest.param(operation, spec, id=f"{operation.name}-{spec.name}")
        for operation in KERNELS
        for spec in operation.specs
    ],
)
def test_rows_may_lie_two_to_the_31_elements_apart(operation: Operation, spec: Spec) -> None:
    """Inputs and outputs: the second row begins beyond 2^31 elements, the third beyond 2^32."""
    arguments = operation.arguments()
    far = arguments[spec.name] = spread(arguments[spec.name])
    assert far.stride(0) == FAR
    results = results_of(operation, arguments)
    assert_others_are_untouched(operation, results, set())
    if spec.output and operation.name != "compact":  # which moves what is there: one value, everywhere
        assert not torch.equal(far, torch.full_like(far, UNWRITTEN))


LARGE = 1_000_003


@LINUX
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_large_vocabulary_beyond_32_bits(dtype: torch.dtype) -> None:
    """4400 rows of 1000003 logits, 4.4e9 elements: flattened, of which three rows are asked for."""
    rows = 4400
    logits = virtual(rows * LARGE, dtype).view(rows, LARGE)
    wanted = [0, 2148, 4398]  # offsets 0, just beyond 2^31, and beyond 2^32
    for at, row in enumerate(wanted):
        logits[row, LARGE - 1 - at] = 30.0
        logits[row + 1, 7 + at] = 30.0
    drafts = torch.tensor([[LARGE - 1 - at] for at in range(3)])
    # Rows of the batch in between are padded: they read nothing.
    offsets = torch.tensor([0, 2, 2148, 2150, 4398, 4400])
    counts = torch.tensor([1, -1, 1, -1, 1], dtype=torch.int32)
    verdict = ops.verify(
        logits,
        drafts[[0, 0, 1, 1, 2]],
        row_offsets=offsets,
        num_drafts=counts,
        sampling=Sampling(temperature=0.0),
        base=torch.ones(5, dtype=torch.int64),
        out=ops.Verdict.empty(5, 1, path_rows=True),
    )
    assert not verdict.status.any()
    for at, b in enumerate((0, 2, 4)):
        assert verdict.tokens[b].tolist() == [LARGE - 1 - at, 7 + at]
        assert verdict.path_rows[b].tolist() == [wanted[at], wanted[at] + 1]


@LINUX
def test_batches_of_more_than_two_to_the_32_logits() -> None:
    """One row of logits for all, 4300 times over; of the batch, the last row alone is not padding."""
    size = 4300
    row = torch.zeros(LARGE)
    row[LARGE - 2] = 30.0
    counts = torch.full((size,), -1, dtype=torch.int32)
    counts[-1] = 1
    verdict = ops.verify(
        row.expand(size, 2, LARGE),
        torch.full((1, 1), LARGE - 2).expand(size, 1),
        num_drafts=counts,
        sampling=ops.SamplingTable(1),
        slots=torch.zeros(1, dtype=torch.int32).expand(size),
        base=torch.ones(1, dtype=torch.int64).expand(size),
    )
    assert verdict.tokens[-1].tolist() == [LARGE - 2] * 2
    assert verdict.num_emitted[:-1].eq(0).all()


@LINUX
def test_a_vocabulary_of_one_in_rows_beyond_32_bits() -> None:
    """Every stride is the row's: the only token there is comes out of each."""
    target = spread(torch.zeros(3, 2, 1))
    nodes = torch.as_strided(virtual(2 * FAR + 1, torch.float32), (1, 3, 1), (1, FAR, 1))
    table = Sampling(seed=1).prepare(3)
    verdict = ops.verify(
        target,
        spread(torch.zeros(3, 1, dtype=torch.int64)),
        draft_probs=spread(torch.ones(3, 1, 1)),
        sampling=table,
        base=torch.ones(3, dtype=torch.int64),
    )
    assert verdict.tokens.tolist() == [[0, 0]] * 3
    verdict = ops.verify(
        nodes,
        torch.zeros(1, 2, dtype=torch.int64),
        sampling=table,
        base=torch.ones(1, dtype=torch.int64),
        logprobs=True,
    )
    assert verdict.tokens.tolist() == [[0, 0, 0]]
    assert verdict.logprobs.eq(0.0).all()
