"""``ops.verify`` and ``ops.sample`` on a CUDA device give the CPU's integers, whatever is asked of them.

The calls of the CPU's own tests are repeated on the device by ``pytest --also-on cuda tests/test_tree.py``
and so on; the last tests here do that for the files that are worth it, and for a million rounds (``-m "cuda
and long"``).
"""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foretoken as ft
import test_boundary_data
from covering import ROWS, configurations
from experiments import Experiment
from large_rounds import Large, Rounds, pairwise, random_row
from mirrored import TEST_DEVICE, Mirror, assert_same, assert_same_fields, results_of

pytestmark = pytest.mark.cuda
ON_CUDA = pytest.mark.skipif(TEST_DEVICE != "cuda", reason="graphs, streams and device memory are CUDA's")
PARTS = 16
MANY = int(os.environ.get("FORETOKEN_TEST_ROUNDS", 1_000_000))
REAL = Large(
    "auto", "logits", "iid", "chain5", "mixed", "bfloat16", 32_000, 33, "whole", "shuffled", "none", "all"
)
VARIETY = [
    REAL,
    dataclasses.replace(REAL, rule="rrs", dtype="float32", vocab=128_256, batch=6),
    dataclasses.replace(REAL, rule="traversal", shape="tree16", law="records", filters="none"),
    dataclasses.replace(REAL, rule="spectr", shape="uneven", law="topk", vocab=1000),
    dataclasses.replace(REAL, rule="gbv", shape="paths3", draw="iid_paths", law="probs", vocab=1000),
    dataclasses.replace(
        REAL, rule="target_only", law="point", draw="deterministic", shape="tree80", vocab=1000
    ),
    dataclasses.replace(REAL, rule="coupled", shape="tree16", dtype="float16"),
    dataclasses.replace(REAL, rule="by slot", law="map", vocab=151_936, batch=6),
    dataclasses.replace(REAL, rule="rrs", edits="both", shape="siblings", draw="without_replacement"),
    dataclasses.replace(REAL, rule="lossy_typical", edits="penalties", vocab=1000),
]
BY_ROW = (
    *("target_logits", "draft_tokens", "parents", "num_drafts", "draft_logits", "draft_probs", "draft_topk"),
    *("draft_row", "draft_records", "bitmask", "base", "slots"),
)
SHARED = ("history", "prompt_lengths", "vocab_map", "rule")


def over(rows: list[Large]) -> Any:
    return pytest.mark.parametrize(
        "row", rows, ids=lambda row: f"{row.rule}-{row.law}-{row.shape}-{row.vocab}"
    )


def on_device(value: Any) -> Any:
    """A copy; also of pairs and of dataclasses of tensors."""
    if isinstance(value, Tensor):
        return value.to(TEST_DEVICE, copy=True)
    if isinstance(value, tuple):
        return tuple(on_device(part) for part in value)
    if isinstance(value, ft.ops.Verdict):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: on_device(getattr(value, name)) for name in names})
    return value


def placed(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: on_device(value) for name, value in arguments.items()}


# ------------------------------------------------------------------------------- everything at once


@pytest.mark.parametrize("part", range(PARTS))
def test_real_vocabularies(mirror: Mirror, part: int, figure):
    """Every pair of settings that may meet: rule, law, draw, shape, filters, dtype, vocabulary, batch, ragged
    and flattened rows, slots, penalties and grammars, outputs.
    """
    usable = 0
    for row in pairwise()[part::PARTS]:
        try:
            verdict = ft.ops.verify(**Rounds(row).arguments())
        except AssertionError as error:
            raise AssertionError(f"{row}: {error}") from error
        usable += int((verdict.status == 0).sum())
    assert usable > 0.4 * mirror.requests
    figure("requests", mirror.requests)


@pytest.mark.parametrize("part", range(PARTS))
def test_small_vocabularies(mirror: Mirror, part: int, figure):
    """The covering array of the statistical tests."""
    for row in configurations()[part::PARTS]:
        try:
            Experiment(row, 40).round(0)
        except AssertionError as error:
            raise AssertionError(f"{row}: {error}") from error
    figure("requests", mirror.requests)


@pytest.mark.parametrize("layout", range(3), ids=["contiguous", "unaligned", "strided"])
@over(VARIETY)
def test_layouts(mirror: Mirror, row: Large, layout: int):
    arguments = Rounds(row).arguments()
    mirror.calls = layout
    ft.ops.verify(**arguments)


@pytest.mark.parametrize("filters", ["none", "top_p", "mixed", "greedy"])
@pytest.mark.parametrize("rule", ["auto", "rrs", "traversal", "target_only"])
def test_laws_handed_over_by_who_drew(mirror: Mirror, rule: str, filters: str):
    """Sound records; then one that is none, one with another mass, one of a point law between laws of logits,
    and one of another row; then beside statistics of the target's tiles.
    """
    for dtype, vocab in (("float32", 1000), ("bfloat16", 32_000), ("float16", 128_256)):
        row = dataclasses.replace(
            REAL, rule=rule, law="records", filters=filters, dtype=dtype, vocab=vocab, batch=6, outputs="few"
        )
        arguments = Rounds(row).arguments()
        sound = ft.ops.verify(**arguments)
        assert (sound.status == 0).all()
        records, tokens = arguments["draft_records"], arguments["draft_tokens"]
        records[0, 2] = 0
        records[1, 1, 2] //= 2
        records[2, 1] = torch.tensor([1 << 8, 0, 0, int(tokens[2, 1])])
        records[3, 2] = records[4, 1].clone()
        ft.ops.verify(**arguments)
        given = {name: arguments[name] for name in ("sampling", "slots") if name in arguments}
        stats = ft.ops.tile_stats(arguments["target_logits"], **given)
        ft.ops.verify(**arguments, target_stats=stats)


# ------------------------------------------------------------------------------------ damaged data


# Moves in caches are held against the CPU where they are tested.
MIRRORED = [one for one in test_boundary_data.KERNELS if one.name not in test_boundary_data.MOVES]


@pytest.mark.parametrize("operation", MIRRORED, ids=lambda operation: operation.name)
def test_damage_all_over_the_place(mirror: Mirror, operation):
    test_boundary_data.test_damage_all_over_the_place(operation)
    assert mirror.calls > 100


def test_codes_of_rules_that_are_not_there(mirror: Mirror):
    test_boundary_data.test_codes_of_rules_that_are_not_there()


ODD_ROWS = {
    "equal": lambda v: torch.zeros(v),
    "tied": lambda v: torch.randint(-3, 4, (v,)).float(),
    "peaked": lambda v: 20.0 * torch.randn(v),
    "flat": lambda v: 1e-3 * torch.randn(v),
    "mostly forbidden": lambda v: torch.where(torch.rand(v) < 0.999, -torch.inf, torch.randn(v)),
    "two tokens": lambda v: torch.full((v,), -torch.inf).index_fill(0, torch.tensor([1, v - 1]), 2.5),
    "huge": lambda v: 1e4 * torch.randn(v),
    "shifted": lambda v: torch.randn(v) - 3e4,
    "nan": lambda v: torch.randn(v).index_fill(0, torch.tensor([v // 2]), torch.nan),
    "infinite": lambda v: torch.randn(v).index_fill(0, torch.tensor([v - 1]), torch.inf),
    "nothing": lambda v: torch.full((v,), -torch.inf),
    "all nan": lambda v: torch.full((v,), torch.nan),
}


@pytest.mark.parametrize("rule", ["token", "block", "target_only", "coupled", "lossy_typical"])
@pytest.mark.parametrize("vocab", [1025, 40_001])
@pytest.mark.parametrize("filters", ["none", "mixed"])
def test_rows_of_every_shape(mirror: Mirror, rule: str, vocab: int, filters: str):
    """In each of the target's places and each of the drafter's, the rows beside them ordinary."""
    base = dataclasses.replace(REAL, filters=filters, vocab=1000, batch=1, dtype="float32")
    kinds = Rounds(dataclasses.replace(base, batch=33))._sampling()
    for name, make in ODD_ROWS.items():
        torch.manual_seed(7)
        size, drafts = 12, 2
        target = 2.0 * torch.randn(size, drafts + 1, vocab)
        draft = target[:, :drafts] + 0.7 * torch.randn(size, drafts, vocab)
        for b in range(size):
            rows = target if b % 2 else draft
            rows[b, b // 2 % rows.shape[1]] = make(vocab)
            if b >= 8:  # both, alike
                target[b, 0] = draft[b, 0] = make(vocab)
        tokens = draft.nan_to_num(0.0, 0.0, -99.0).argmax(-1)
        table = kinds.prepare(67)
        call = {
            "base": torch.arange(1, size + 1),
            "rule": rule,
            "sampling": table,
            "logprobs": True,
            "num_top": 4,
        }
        try:
            ft.ops.verify(target, tokens, draft_logits=draft, **call)
            ft.ops.verify(target, tokens, **call)
            ft.ops.sample(target[:, 0], sampling=table, base=call["base"], logprobs=True)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


# ------------------------------------------------------------------------------- a row is itself


def rows_of(arguments: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """The same requests in another order, or fewer of them; they keep their slots."""
    part = {}
    for name, value in arguments.items():
        if name in BY_ROW and value is not None:
            value = tuple(x[chosen] for x in value) if isinstance(value, tuple) else value[chosen]
        part[name] = value
    fields = [field.name for field in results_of(ft.ops.Verdict)]
    out = arguments["out"]
    chosen_out = {f: None if getattr(out, f) is None else getattr(out, f)[chosen] for f in fields}
    return part | {"out": ft.ops.Verdict(**chosen_out)}


@over(VARIETY)
def test_a_request_is_itself_in_any_batch(row: Large):
    rounds = Rounds(row)
    arguments = placed(rounds.arguments())
    whole = ft.ops.verify(**arguments)
    expected = on_device(whole)
    pick = random.Random(1)
    size = rounds.size
    orders = [[b] for b in range(min(size, 5))]
    orders += [[pick.randrange(size) for _ in range(count)] for count in (2, size, 3 * size)]
    for chosen in orders:
        found = ft.ops.verify(**rows_of(arguments, chosen))
        for field in results_of(found):
            ours, theirs = getattr(found, field.name), getattr(expected, field.name)
            if ours is not None and field.name != "path_rows":
                assert torch.equal(ours, theirs[chosen]), field.name  # the bits of floats too


@over(VARIETY)
def test_buffers_are_written_whole_each_time(row: Large):
    """What an earlier call left in ``out`` is gone, and repeating a call repeats its bits."""
    expected = None
    for garbage in (0, -7, 111):
        arguments = placed(Rounds(row).arguments())
        for field in results_of(arguments["out"]):
            if (buffer := getattr(arguments["out"], field.name)) is not None:
                buffer.fill_(garbage)
        found = ft.ops.verify(**arguments)
        assert found is arguments["out"]
        if expected is not None:
            for field in results_of(found):
                ours, theirs = getattr(found, field.name), getattr(expected, field.name)
                assert ours is None or torch.equal(ours, theirs), field.name
        expected = found


# ---------------------------------------------------------------------------- graphs and streams


@ON_CUDA
@over(VARIETY)
def test_a_captured_call_replays_on_changed_contents(row: Large):
    """Logits, tokens, laws, bases, slots, texts change in place; the answer is the CPU's each time."""
    first = Rounds(row)
    buffers = placed(first.arguments())
    ft.ops.verify(**buffers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ft.ops.verify(**buffers)
    for number in range(3):
        arguments = Rounds(row, number).arguments() | {"sampling": first.table}
        for name in (*BY_ROW, *SHARED):
            value = arguments.get(name)
            pairs = (
                zip(buffers[name], value, strict=True)
                if isinstance(value, tuple)
                else [(buffers.get(name), value)]
            )
            for buffer, part in pairs:
                if isinstance(part, Tensor):
                    buffer.copy_(part)
        graph.replay()
        assert_same_fields(buffers["out"], ft.ops.verify(**arguments), f"replay {number}")


@ON_CUDA
def test_counts_and_padding_change_between_replays():
    row = dataclasses.replace(REAL, rows="padded", shape="tree16")
    first = Rounds(row)
    buffers = placed(first.arguments())
    ft.ops.verify(**buffers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ft.ops.verify(**buffers)
    arguments = first.arguments()
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        counts = torch.randint(-1, 16, (first.size,), generator=generator, dtype=torch.int32)
        if number == 5:
            counts.fill_(-1)
        arguments["num_drafts"] = counts
        buffers["num_drafts"].copy_(counts)
        graph.replay()
        assert_same_fields(buffers["out"], ft.ops.verify(**arguments), f"replay {number}")


@ON_CUDA
def test_streams_do_not_disturb_each_other():
    """Eight different calls on eight streams, over and over; then the same captured and replayed together."""
    rounds = [Rounds(row) for row in VARIETY[:8]]
    given = [one.arguments() for one in rounds]
    expected = [on_device(ft.ops.verify(**one)) for one in given]
    buffers = [placed(one) for one in given]
    streams = [torch.cuda.Stream() for _ in buffers]
    for one in buffers:  # the tables reach the device
        ft.ops.verify(**one)
    torch.cuda.synchronize()
    graphs = []
    for one, stream in zip(buffers, streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            ft.ops.verify(**one)
        graphs.append(graph)
    for how in ("eager", "graphs"):
        for one in buffers:
            one["out"].tokens.fill_(-7)
        torch.cuda.synchronize()
        for _ in range(25):
            for one, stream, graph in zip(buffers, streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    ft.ops.verify(**one) if how == "eager" else graph.replay()
        torch.cuda.synchronize()
        for found, theirs in zip(buffers, expected, strict=True):
            for field in results_of(theirs):
                value = getattr(theirs, field.name)
                if value is not None:
                    assert_same(getattr(found["out"], field.name), value.cpu(), f"{how}: {field.name}")


@ON_CUDA
def test_with_out_nothing_is_allocated():
    arguments = placed(Rounds(REAL).arguments())
    logits, tokens = arguments["target_logits"][:, 0], arguments["draft_tokens"][:, 0].clone().long()
    call = {
        "sampling": arguments["sampling"],
        "base": arguments["base"],
        "slots": arguments["slots"],
        "out": tokens,
    }
    for _ in range(2):
        ft.ops.verify(**arguments)
        ft.ops.sample(logits, **call)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(20):
        ft.ops.verify(**arguments)
        ft.ops.sample(logits, **call)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_table_may_change_between_calls(mirror: Mirror):
    rounds = Rounds(REAL)
    arguments = rounds.arguments()
    for seed in range(4):
        for slot in range(rounds.spare):
            rounds.table.set(
                slot, 0.5 + 0.2 * seed, 0 if seed % 2 else 40, 0.9, 0.01 * seed, 1000 * seed + slot
            )
        ft.ops.verify(**arguments)


# --------------------------------------------------------------------------------- large memory


@pytest.fixture
def much_memory() -> Iterator[None]:
    if TEST_DEVICE != "cuda" or torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_beyond_32_bits(much_memory, dtype: torch.dtype):
    """Rows of the target and of the law 2^30 + 64 elements apart: the last begins beyond 2^32."""
    apart, drafts, vocab = 2**30 + 64, 4, 32_003
    torch.manual_seed(3)
    near = (2.0 * torch.randn(1, drafts + 1, vocab)).to(dtype)
    law = (near[:, :drafts].float() + 0.3 * torch.randn(1, drafts, vocab)).to(dtype)
    table = ft.Sampling(seed=5, top_p=0.95).prepare(1)
    base = torch.tensor([9])
    tokens = torch.stack(
        [ft.ops.sample(law[:, i], sampling=table, base=base, step=i, purpose="draft") for i in range(drafts)],
        1,
    )

    def far(rows: Tensor) -> Tensor:
        count = rows.shape[1]
        memory = torch.empty((count - 1) * apart + vocab, dtype=dtype, device=TEST_DEVICE)
        view = torch.as_strided(memory, (1, count, vocab), (apart * count, apart, 1))
        view.copy_(rows)
        return view

    # The law first, so that one large piece of memory is held at a time beside the other.
    for rule in ("token", "block", "target_only"):
        call = {"sampling": table, "rule": rule}
        expected = ft.ops.verify(near, tokens, draft_logits=law, base=base, **call)
        target = far(near)
        placed_call = {"base": base.to(TEST_DEVICE), **call}
        close = {"draft_logits": law.to(TEST_DEVICE)}
        found = ft.ops.verify(target, tokens.to(TEST_DEVICE), **close, **placed_call)
        assert_same_fields(found, expected, f"{rule}: target")
        flat = ft.ops.verify(
            target[0],
            tokens.to(TEST_DEVICE),
            row_offsets=torch.tensor([0, drafts + 1], device=TEST_DEVICE),
            **close,
            **placed_call,
        )
        assert_same_fields(flat, expected, f"{rule}: flattened")
        drawn = ft.ops.sample(target[0, -1:], sampling=table, base=placed_call["base"])
        assert_same(drawn, ft.ops.sample(near[0, -1:], sampling=table, base=base), "sample")
        del target
        found = ft.ops.verify(
            near.to(TEST_DEVICE), tokens.to(TEST_DEVICE), draft_logits=far(law), **placed_call
        )
        assert_same_fields(found, expected, f"{rule}: law")


def test_batches_of_more_than_two_to_the_32_logits(much_memory):
    """4300 requests of two rows of a million logits, of which a few are no padding."""
    size, vocab = 4300, 1_000_003
    row = torch.zeros(vocab)
    row[vocab - 2] = 30.0
    counts = torch.full((size,), -1, dtype=torch.int32)
    counts[[0, 1, 2147, 2148, 4298, 4299]] = 1
    memory = torch.empty(size, vocab, dtype=torch.bfloat16, device=TEST_DEVICE)
    memory[counts.to(TEST_DEVICE) > 0] = row.to(TEST_DEVICE, torch.bfloat16)
    call = {"sampling": ft.ops.SamplingTable(1), "num_drafts": counts.to(TEST_DEVICE)}
    verdict = ft.ops.verify(
        memory[:, None].expand(size, 2, vocab),
        torch.full((size, 1), vocab - 2, device=TEST_DEVICE),
        slots=torch.zeros(size, dtype=torch.int32, device=TEST_DEVICE),
        base=torch.ones(size, dtype=torch.int64, device=TEST_DEVICE),
        **call,
    )
    live = counts > 0
    assert verdict.tokens.cpu()[live].eq(vocab - 2).all()
    assert verdict.num_emitted.cpu()[~live].eq(0).all()


# ------------------------------------------------------------------------------------------ sample


@pytest.mark.parametrize("vocab", [37, 1000, 33_000, 151_936])
@pytest.mark.parametrize("method", ["inverse", "gumbel"])
@pytest.mark.parametrize("edits", ["none", "penalties", "bitmask", "both"])
def test_samples(mirror: Mirror, vocab: int, method: str, edits: str):
    row = dataclasses.replace(REAL, vocab=vocab, edits=edits, shape="chain1", dtype="float32")
    rounds = Rounds(row)
    given = rounds.arguments()
    call = {
        name: given[name]
        for name in ("sampling", "base", "slots", "history", "prompt_lengths")
        if name in given
    }
    if "bitmask" in given:
        call["bitmask"] = given["bitmask"][:, 0]
    for path in (None, torch.randint(-1, min(vocab, 12), (rounds.size, 3))):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ft.ops.sample(
                given["target_logits"][:, 0].to(dtype),
                method=method,
                path=path,
                status=torch.full((rounds.size,), -7, dtype=torch.int32),
                records=torch.full((rounds.size, 4), -7),
                logprobs=True,
                **call,
            )


# -------------------------------------------------------------------------------------------- long

FILES = [
    "test_verify_faults.py",
    "test_verify_api.py",
    "test_verify_replay.py",
    "test_draft_laws.py",
    "test_constraints.py",
    "test_coupled.py",
    "test_lossy.py",
    "test_logprobs.py",
    "test_draws.py",
    "test_filter_cuts.py",
    "test_bug_replay.py",
    "test_boundary_data.py",
    "test_tree_replay.py",
    "test_tree_index.py",
]


@pytest.mark.long
@pytest.mark.parametrize("file", FILES)
def test_the_cpus_tests_hold_on_the_device(file: str):
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--also-on", TEST_DEVICE]
    done = subprocess.run([*command, str(tests / file)], cwd=tests.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_a_million_rounds(mirror: Mirror, part: int, figure):
    """Over all configurations of small vocabularies, and random ones of real size. A million in all parts."""
    pick = random.Random(f"a million rounds, part {part}")
    batch = 1 + MANY // ROWS
    rows = configurations()[part::PARTS]
    for number, row in enumerate(rows):
        large = random_row(pick, {})
        try:
            Experiment(row, batch).round(1)
            if number % 2 == 0:
                ft.ops.verify(**Rounds(large, 9).arguments())
        except AssertionError as error:
            raise AssertionError(f"{row}, {large}: {error}") from error
    assert mirror.requests >= MANY * len(rows) // ROWS
    figure("requests", mirror.requests)
