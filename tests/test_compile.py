"""Inside ``torch.compile`` the operations are registered ops, and give what they give outside.

A graph is held together by guards: whatever changes between two calls (another table, another batch, another
rule) has to reach the kernels.
"""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import foretoken as ft
from attention_cases import make as attention_case
from batches import Batch, make
from foretoken.ops import RequestState, TreeIndex, Verdict
from large_rounds import Large, Rounds
from mirrored import TEST_DEVICE, assert_same, assert_same_fields

BACKENDS = ["eager", "aot_eager"]
ROW = Large(
    "auto", "logits", "iid", "chain5", "mixed", "float32", 1000, 6, "whole", "shuffled", "none", "all"
)
ROWS = [
    ROW,
    dataclasses.replace(ROW, rule="traversal", law="probs", shape="tree16", rows="padded"),
    dataclasses.replace(ROW, rule="gbv", law="topk", shape="paths3", draw="iid_paths", outputs="few"),
    dataclasses.replace(ROW, rule="target_only", law="point", draw="deterministic", rows="flattened"),
    dataclasses.replace(ROW, rule="by slot", law="map", dtype="bfloat16"),
    dataclasses.replace(ROW, rule="rrs", law="records", shape="uneven", edits="both"),
    dataclasses.replace(ROW, rule="lossy_synthetic", outputs="few"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Any, backend: Any, **options: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def verify(**given: Any) -> Verdict:
    return ft.ops.verify(**given)


def call_of(batch: Batch) -> dict[str, Any]:
    return {
        "target_logits": batch.target,
        "draft_tokens": batch.tokens,
        "draft_logits": batch.draft,
        "base": batch.base,
        "sampling": batch.sampling().prepare(batch.size),
        "logprobs": True,
    }


class Counting:
    """A backend that counts what it compiles."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


# ------------------------------------------------------------------------------------ the same results


@pytest.mark.parametrize(
    ("backend", "row"),
    [("eager", row) for row in ROWS]
    + [("aot_eager", row) for row in ROWS[:2]]
    + [pytest.param("aot_eager", row, marks=pytest.mark.long) for row in ROWS[2:]],
    ids=lambda value: f"{value.rule}-{value.law}-{value.shape}" if isinstance(value, Large) else value,
)
def test_verify(backend, row):
    """With ``out`` and without, with all that comes before and behind it in one graph."""
    arguments = Rounds(row).arguments()
    expected = ft.ops.verify(**arguments)
    kept = {name: value for name, value in arguments.items() if name != "out"}
    buffers = dataclasses.replace(
        expected,
        **{
            field.name: value.clone().fill_(-7)
            for field in dataclasses.fields(expected)
            if (value := getattr(expected, field.name)) is not None
        },
    )

    @torch.no_grad()
    def step(target_logits, out, **more):
        verdict = ft.ops.verify(target_logits * 1.0, out=out, **more)
        return verdict, verdict.num_accepted + 1

    run = compiled(step, backend)
    found, emitted = run(kept.pop("target_logits"), buffers, **kept)
    assert found is buffers
    assert_same_fields(found, expected, "out=")
    assert torch.equal(emitted, expected.num_accepted + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_verify_without_buffers(backend):
    batch = make(size=6)
    call = {"num_top": 2, "tolerance": ft.ops.Tolerance(rates=(0.5,)), **call_of(batch)}
    for rule in ("auto", "block", "lossy_synthetic"):
        expected = ft.ops.verify(**call, rule=rule)
        found = compiled(verify, backend)(**call, rule=rule)
        assert isinstance(found, Verdict)
        assert_same_fields(found, expected, rule)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample(backend):
    torch.manual_seed(2)
    logits, base = torch.randn(5, 300), torch.arange(1, 6)
    table = ft.Sampling(seed=3, temperature=[0.0, 0.5, 1.0, 1.5, 2.0], top_p=0.9).prepare(5)
    for options in (
        {"logprobs": True, "purpose": "draft", "step": 3},
        {"method": "gumbel", "logprobs": False},
        {"vocab_map": torch.randperm(900)[:300].int(), "vocab_size": 900, "logprobs": True},
    ):
        outputs = [
            {"status": torch.empty(5, dtype=torch.int32), "records": torch.empty(5, 4, dtype=torch.int64)}
            for _ in range(2)
        ]
        call = {"sampling": table, "base": base, **options}
        expected = ft.ops.sample(logits + 1.0, **call, **outputs[0])
        found = compiled(lambda x, **more: ft.ops.sample(x + 1.0, **more), backend)(
            logits, **call, **outputs[1]
        )
        for mine, theirs in zip(
            [*(found if isinstance(found, tuple) else [found]), *outputs[1].values()],
            [*(expected if isinstance(expected, tuple) else [expected]), *outputs[0].values()],
            strict=True,
        ):
            assert_same(mine, theirs, str(options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tree_index(backend):
    parents, lengths = torch.tensor([[0, 0, 1, 2], [0, 1, 9, 0]]), torch.tensor([5, 9])
    counts = torch.tensor([3, 4], dtype=torch.int32)
    run = compiled(lambda *given, **more: ft.ops.tree_index(*given, **more), backend)
    for more in ({}, {"num_drafts": counts}, {"num_drafts": counts, "lengths": lengths}):
        assert_same_fields(run(parents, **more), ft.ops.tree_index(parents, **more), "tree_index")
    out = TreeIndex.empty(2, 4)
    assert run(parents, out=out) is out
    assert_same_fields(out, ft.ops.tree_index(parents), "out=")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_round_in_one_graph(backend):
    """Drafting, verifying and indexing; what comes out of one op goes into the next."""
    torch.manual_seed(4)
    table = ft.Sampling(seed=8, top_k=20).prepare(3)
    target, draft = torch.randn(3, 4, 90), torch.randn(3, 3, 90)

    def round_of(target, draft, base):
        tokens = [
            ft.ops.sample(draft[:, i], sampling=table, base=base, step=i, purpose="draft") for i in range(3)
        ]
        drafted = torch.stack(tokens, 1)
        verdict = ft.ops.verify(target, drafted, draft_logits=draft, sampling=table, base=base, rule="token")
        index = ft.ops.tree_index(drafted * 0, lengths=verdict.next_lengths)
        return drafted, verdict, index

    run = compiled(round_of, backend)
    for start in (1, 500):
        base = torch.arange(start, start + 3)
        found, expected = run(target, draft, base), round_of(target, draft, base)
        assert torch.equal(found[0], expected[0])
        assert_same_fields(found[1], expected[1], "verify")
        assert_same_fields(found[2], expected[2], "tree_index")


def seated() -> RequestState:
    state = RequestState.empty(3, 40, num_eos=1)
    for slot in range(3):
        state.seat(slot, [5] * (slot + 3), max_new_tokens=30, num_drafts=4, eos_ids=[slot])
    return state


@pytest.mark.parametrize("backend", BACKENDS)
def test_commit(backend):
    """The state is written in place, and read by what follows in the graph."""
    batch = make(size=3)
    call = call_of(batch) | {"rule": "block"}
    counts = torch.full((3,), 4, dtype=torch.int32)

    def step(state, record, **given):
        verdict = ft.ops.verify(**(given | {"base": state.base * 1}))
        ft.ops.commit(verdict, state, num_drafts=counts, record=record)
        return state.base + 1

    found, expected = seated(), seated()
    records = [torch.empty(3, ft.ops.record_width(5, True), dtype=torch.int32) for _ in range(2)]
    run = compiled(step, backend)
    for _ in range(3):
        assert torch.equal(run(found, records[0], **call), step(expected, records[1], **call))
        assert torch.equal(records[0], records[1])
        assert_same_fields(found, expected, "state")
    assert (expected.base > torch.arange(3, 6)).all()


def grown(logits, lengths):
    """Two levels of a tree, cut to its best nodes."""
    first = ft.ops.draft_topk(logits[:, :1], 3)
    entries = torch.arange(3, dtype=torch.int32).expand(len(logits), 3)
    second = ft.ops.draft_topk(logits[:, 1:4], 2, scores=first.scores[:, 0], entries=entries)
    tokens = torch.cat([first.tokens.flatten(1), second.tokens.flatten(1)], 1)
    scores = torch.cat([first.scores.flatten(1), second.scores.flatten(1)], 1)
    parents = torch.cat([first.parents.flatten(1), second.parents.flatten(1)], 1)
    return first, ft.ops.finalize_tree(tokens, scores, parents, 5, lengths=lengths)


@pytest.mark.parametrize("backend", BACKENDS)
def test_trees_grown_in_one_graph(backend):
    logits, lengths = torch.randn(2, 4, 60), torch.tensor([8, 9])
    (level, found), (other, expected) = compiled(grown, backend)(logits, lengths), grown(logits, lengths)
    assert_same_fields(level, other, "draft_topk")
    assert_same_fields(found.index, expected.index, "index")
    for name in ("tokens", "parents", "num_drafts", "source"):
        assert_same(getattr(found, name), getattr(expected, name), name)
    assert not expected.index.status.any()


def moved(caches, target, k, v, lengths, path, num_accepted):
    """A round's rows into the first two caches, and the path's together in all that the target names."""
    written = ft.ops.append(k * 1.0, v, *caches[:2], lengths=lengths)
    kept = ft.ops.compact(target, lengths=lengths, path=path, num_accepted=num_accepted)
    return written, kept, caches[0][:, 3] + 1


def moving(layout: str = "NHD") -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    shape = (2, 12, 1, 4) if layout == "NHD" else (2, 1, 12, 4)
    caches = [torch.arange(96.0).view(shape) + 100 * i for i in range(3)]
    return caches, {
        "k": torch.randn(2, 4, 1, 4),
        "v": torch.randn(2, 4, 1, 4),
        "lengths": torch.tensor([2, 9]),
        "path": torch.tensor([[2, 3], [3, -1]]),
        "num_accepted": torch.tensor([2, 1], dtype=torch.int32),
    }


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_moves_in_caches(backend, planned):
    """Also where the compiler gives the op copies: what they become has to arrive in the plan's tensors."""
    (found, given), (expected, _) = moving(), moving()
    targets = [ft.ops.CachePlan(caches) if planned else caches for caches in (found, expected)]
    run = compiled(moved, backend)
    for _ in range(2):
        ours = run(found, targets[0], **given)
        theirs = moved(expected, targets[1], **given)
        for one, other in zip([*ours, *found], [*theirs, *expected], strict=True):
            assert torch.equal(one, other)
    assert theirs[0].tolist() == theirs[1].tolist() == [0, ft.Status.BAD_ROW]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_of_copies_keeps_its_layout(backend):
    (found, given), (expected, _) = moving("HND"), moving("HND")

    def step(caches, plan, lengths, path, num_accepted):
        caches[0].add_(1.0)
        status = ft.ops.compact(plan, lengths=lengths, path=path, num_accepted=num_accepted)
        return status, caches[1] * 2

    rest = {name: given[name] for name in ("lengths", "path", "num_accepted")}
    plans = [ft.ops.CachePlan(caches, layout="HND") for caches in (found, expected)]
    ours, theirs = compiled(step, backend)(found, plans[0], **rest), step(expected, plans[1], **rest)
    for one, other in zip([*ours, *found], [*theirs, *expected], strict=True):
        assert torch.equal(one, other)


# -------------------------------------------------------------------------------------- what may change


def test_other_tables_and_later_changes_reach_the_kernel():
    """The law is read when the graph runs; after the second table nothing is compiled for another."""
    logits, base = torch.randn(4, 50), torch.arange(1, 5)
    counting = Counting()
    run = compiled(lambda x, table: ft.ops.sample(x, sampling=table, base=base), counting)
    for seed in range(12):
        table = ft.Sampling(seed=seed, temperature=0.2 * seed).prepare(4)
        assert torch.equal(run(logits, table), ft.ops.sample(logits, sampling=table, base=base))
        table.set(2, 0.0, 0, 1.0, 0.0, 0)
        assert run(logits, table)[2] == logits[2].argmax()
    assert counting.graphs <= 2


def test_other_rules_draws_and_tolerances_are_other_graphs():
    batch = make(size=6)
    call = call_of(batch)
    run = compiled(verify, "eager")
    tolerances = [ft.ops.Tolerance(rates=rates) for rates in ((1.0,) * 4, (0.0,) * 4, (1.0,))]
    for change in (
        {"rule": "token"},
        {"rule": "block"},
        {"rule": "target_only"},
        {"rule": "token", "draw": "deterministic"},
        *({"rule": "lossy_synthetic", "tolerance": tolerance} for tolerance in tolerances),
        {"rule": ft.ops.rule_codes(["token", "block", "auto"] * 2)},
    ):
        assert_same_fields(run(**call, **change), ft.ops.verify(**call, **change), str(change))


def test_each_law_keeps_its_side():
    call = call_of(make(size=10, seed=2))
    other = ft.Sampling(seed=3, temperature=0.4).prepare(10)
    expected = ft.ops.verify(**call, draft_sampling=other, rule="token")
    assert not torch.equal(expected.tokens, ft.ops.verify(**call, rule="token").tokens)
    run = compiled(verify, "eager")
    assert_same_fields(run(**call, draft_sampling=other, rule="token"), expected, "draft_sampling")


def test_a_tolerance_arrives_as_it_was(monkeypatch):
    from foretoken.ops import _library

    tolerance = ft.ops.Tolerance(0.11, 0.22, 0.33, 0.44, 5, 0.66, 0.77, 0.88, (0.9, 0.8, 0.7))
    native, given = _library._core.Tolerance, []
    monkeypatch.setattr(
        _library._core, "Tolerance", lambda *numbers: given.append(numbers) or native(*numbers)
    )
    tolerance.prepare()
    compiled(verify, "eager")(**call_of(make(size=2)), tolerance=tolerance, rule="lossy_typical")
    assert len(given) > 1
    assert all(numbers == given[0] for numbers in given)


def test_batches_of_any_size():
    """Dynamic shapes: one graph after the second size."""
    counting = Counting()
    run = compiled(verify, counting, dynamic=True)
    for size in (2, 3, 7, 20):
        call = call_of(make(size=size))
        assert_same_fields(run(**call), ft.ops.verify(**call), str(size))
    assert counting.graphs <= 2


# ----------------------------------------------------------------------------------------- what is refused


def test_a_law_that_is_not_prepared_is_refused():
    """Without a seed of its own it would be drawn anew each time; a graph would draw it once."""
    logits, base = torch.randn(2, 9), torch.ones(2, dtype=torch.int64)
    for sampling in (None, ft.Sampling(seed=1)):
        run = compiled(lambda x, law=sampling: ft.ops.sample(x, sampling=law, base=base), "eager")
        with pytest.raises(Exception, match=r"expected a prepared table under torch\.compile"):
            run(logits)


def test_what_the_kernels_refuse_is_refused_by_name():
    """When the graph runs: the sentence is the one of an eager call."""
    table = ft.Sampling(seed=1).prepare(2)
    base = torch.ones(2, dtype=torch.int64)
    run = compiled(lambda x, **more: ft.ops.sample(x, sampling=table, base=base, **more), "eager")
    with pytest.raises(ValueError, match=r"^logits: expected float32, bfloat16 or float16"):
        run(torch.randn(2, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^purpose: expected one of plain, draft, got 'other'"):
        run(torch.randn(2, 9), purpose="other")


def test_a_table_that_was_freed_is_refused():
    from foretoken.ops import _library  # noqa: F401  (registers)

    table = ft.Sampling(seed=1).prepare(2)
    handle = table.handle
    del table
    gc.collect()
    logits, base, out = torch.randn(2, 9), torch.ones(2, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    nothing = [None] * 5
    with pytest.raises(ValueError, match="sampling: expected a table that still exists"):
        torch.ops.foretoken.sample(
            logits, handle, base, *nothing, None, 9, "plain", "inverse", 0, out, None, None, None
        )


# ------------------------------------------------------------------------------------------ opcheck


def registered_calls(run: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """The registered ops that a traced function calls, with their arguments."""
    calls = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        class Recording(torch.fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if "foretoken" in str(target):
                    calls.append((target, args))
                return super().call_function(target, args, kwargs)

        return lambda *given: Recording(graph).run(*given)

    run(backend)
    return calls


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.rule}-{row.law}-{row.shape}")
def test_opcheck_of_verify(row):
    arguments = Rounds(row).arguments()
    calls = registered_calls(lambda backend: compiled(verify, backend)(**arguments))
    check(calls, "verify")


def test_opcheck_of_the_others():
    logits, base = torch.randn(3, 40), torch.ones(3, dtype=torch.int64)
    table = ft.Sampling(seed=1, top_p=0.9).prepare(3)
    status, records = torch.empty(3, dtype=torch.int32), torch.empty(3, 4, dtype=torch.int64)

    def both(logits, parents, lengths):
        tokens = ft.ops.sample(
            logits, sampling=table, base=base, logprobs=True, status=status, records=records
        )
        stats = ft.ops.tile_stats(logits, sampling=table)
        return tokens, stats, ft.ops.tree_index(parents, lengths=lengths), ft.ops.tree_index(parents)

    parents, lengths = torch.tensor([[0, 1], [0, 0]]), torch.tensor([4, 5])
    calls = registered_calls(lambda backend: compiled(both, backend)(logits, parents, lengths))
    check(calls, "sample", "tile_stats", "tree_index", "tree_index")
    calls = registered_calls(lambda backend: compiled(grown, backend)(torch.randn(2, 4, 60), lengths))
    check(calls, "draft_topk", "draft_topk", "finalize_tree")
    caches, given = moving()
    plan = ft.ops.CachePlan(caches)
    calls = registered_calls(lambda backend: compiled(moved, backend)(caches, plan, **given))
    check(calls, "append", "compact")


def test_opcheck_of_attention():
    case = attention_case(sinks=torch.randn(4))
    lse = torch.empty(case.q.shape[:3])

    def step(q, lse):
        out = ft.ops.tree_attention(**{**case.arguments(), "q": q}, lse=lse)
        return ft.ops.merge(out + 0.0, lse, out * 2.0, lse)

    calls = registered_calls(lambda backend: compiled(step, backend)(case.q, lse))
    check(calls, "tree_attention", "merge")


INDEX = [field.name for field in dataclasses.fields(TreeIndex)]
WRITTEN = {
    "verify": [field.name for field in dataclasses.fields(Verdict)],
    "sample": ["out", "logprobs", "status", "records"],
    "tile_stats": ["out"],
    "tree_index": INDEX,
    "commit": ["text", "base", "next_drafts", "ends", "record", "sums", "by_position", "by_drafts"],
    "append": ["k_cache", "v_cache", "status"],
    "compact": ["caches", "status"],
    "draft_topk": ["out_tokens", "out_scores", "out_parents", "status"],
    "finalize_tree": ["out_tokens", "out_parents", "num_drafts", "source", *INDEX],
    "tree_attention": ["out", "lse", "workspace"],
    "merge": ["out", "lse"],
}


def test_opcheck_of_commit():
    batch = make(size=3)
    verdict, state = batch.verify("block"), seated()
    counts = torch.full((3,), 4, dtype=torch.int32)
    record = torch.empty(3, ft.ops.record_width(5, True), dtype=torch.int32)

    counters = ft.ops.RoundCounters.empty(3, 4)

    def step(verdict, state):
        ft.ops.commit(verdict, state, num_drafts=counts, record=record, counters=counters)

    calls = registered_calls(lambda backend: compiled(step, backend)(verdict, state))
    assert torch.library.opcheck(calls[0][0].default, calls[0][1]).keys() >= {
        "test_schema",
        "test_faketensor",
    }
    written = [a.name for a in calls[0][0].default._schema.arguments if a.alias_info is not None]
    assert written == ["text", "base", "next_drafts", "ends", "record", "sums", "by_position", "by_drafts"]


def check(calls: list[tuple[Any, tuple[Any, ...]]], *names: str) -> None:
    assert [str(target).rsplit(".", 1)[-1] for target, _ in calls] == list(names)
    for (target, args), name in zip(calls, names, strict=True):
        for declared, value in zip(target.default._schema.arguments, args, strict=True):
            if declared.name in WRITTEN[name] and value is not None:
                for one in value if isinstance(value, list) else [value]:
                    one.fill_(-7)  # else a second run would change nothing
        found = torch.library.opcheck(target.default, args)
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_an_op_writes_is_what_its_schema_says(name):
    from foretoken.ops import _library  # noqa: F401  (registers)

    arguments = getattr(torch.ops.foretoken, name).default._schema.arguments
    written = [one.name for one in arguments if one.alias_info is not None and one.alias_info.is_write]
    assert sorted(written) == sorted(WRITTEN[name])


def test_nothing_is_registered_until_something_is_traced():
    """Importing costs nothing, and brings no compiler."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import foretoken.ops\n"
        "new = set(sys.modules) - before\n"
        "print('foretoken.ops._library' in new, any(name.startswith('torch._dynamo') for name in new))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")  # the default backend's own
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.rule}-{row.law}-{row.shape}")
def test_verify_on_the_device(row):
    """By the default backend."""
    arguments = Rounds(row).arguments()
    expected = ft.ops.verify(**arguments)
    kept = {
        name: tuple(part.to(TEST_DEVICE) if isinstance(part, torch.Tensor) else part for part in value)
        if isinstance(value, tuple)
        else value.to(TEST_DEVICE)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
        if name != "out"
    }
    out = dataclasses.replace(
        expected,
        **{
            field.name: value.to(TEST_DEVICE).fill_(-7)
            for field in dataclasses.fields(expected)
            if (value := getattr(expected, field.name)) is not None
        },
    )
    run = torch.compile(verify, fullgraph=True)
    assert_same_fields(run(out=out, **kept), expected, "compiled")
