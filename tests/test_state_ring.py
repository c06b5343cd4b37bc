"""The ring of recurrent states against plain token lists: chains and trees, any counts, bad rows."""

from __future__ import annotations

import random

import pytest
import torch

import foretoken as ft
from foretoken.cache import StateRing, TensorSpec

CPU = torch.device("cpu")
MODULUS = 1_000_003


def specs(device=CPU):
    return [
        TensorSpec((2, 3), torch.int64, device),
        TensorSpec((), torch.int64, device),
        TensorSpec((4,), torch.int64, device),
    ]


def step(number, states, tokens):
    """A layer whose state depends on the order of tokens; both ``[b, ...]``."""
    if number == 0:
        return (states * 31 + tokens[:, None, None] + torch.arange(3, device=tokens.device)) % MODULUS
    if number == 1:
        return (states * 17 + tokens) % MODULUS
    return torch.cat([states[:, 1:], tokens[:, None]], 1)


def expected(number, text):
    shape = specs()[number].shape
    states = torch.zeros((1, *shape), dtype=torch.int64)
    for token in text:
        states = step(number, states, torch.tensor([token]))
    return states[0]


def random_tree(choose, nodes):
    return [choose.randrange(node) for node in range(1, nodes)]


def random_path(choose, parents, nodes):
    """Nodes from a child of the root downwards, ending anywhere."""
    path, node = [], 0
    while choose.random() < 0.8:
        children = [i + 1 for i, parent in enumerate(parents[: nodes - 1]) if parent == node]
        if not children:
            break
        node = choose.choice(children)
        path.append(node)
    return path


def walk(ring, tokens):
    """Run the layer over all nodes, parents before children."""
    for number in range(3):
        for node in range(tokens.shape[1]):
            ring.append(number, step(number, ring.take(number)[:, node], tokens[:, node]), node)


def pad(rows, width, value=0):
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64).view(
        len(rows), width
    )


def check(ring, texts):
    for number in range(3):
        committed = ring.committed(number).cpu()
        for slot, text in enumerate(texts):
            assert torch.equal(committed[slot], expected(number, text)), (number, slot)


def random_rounds(device, seed, rounds, slots=5, most=9, trees=True):
    choose = random.Random(seed)
    ring = StateRing(
        specs(device), slots=slots, nodes=most, index_dtype=choose.choice([torch.int32, torch.int64])
    )
    texts = [[] for _ in range(slots)]
    for turn in range(rounds):
        rows = choose.sample(range(slots), choose.randrange(1, slots + 1))
        places = torch.tensor(rows, dtype=torch.int32, device=device)
        if choose.random() < 0.1:
            ring.free(places)
            for slot in rows:
                texts[slot] = []
            continue
        if choose.random() < 0.1 and len(rows) > 1:
            ring.fork(places[:1], places[1:2])
            texts[rows[1]] = list(texts[rows[0]])
            continue
        counts = [choose.choice([0, 1, 1, choose.randrange(1, most + 1)]) for _ in rows]
        width = max(1, *counts)
        of_trees = trees and choose.random() < 0.6
        parents = [random_tree(choose, width) if of_trees else list(range(width - 1)) for _ in rows]
        tokens = [[choose.randrange(90) for _ in range(width)] for _ in rows]
        paths = [random_path(choose, p, n) if n else [] for p, n in zip(parents, counts, strict=True)]
        ring.reserve(
            len(rows),
            width,
            slots=places,
            parents=pad(parents, width - 1).to(device) if of_trees else None,
            num_nodes=torch.tensor(counts, device=device),
        )
        assert ring.status.tolist() == [0] * len(rows)
        walk(ring, torch.tensor(tokens, device=device))
        if choose.random() < 0.1:
            continue  # given up between drafting and verification
        accepted = torch.tensor([len(path) for path in paths], dtype=torch.int32, device=device)
        path = pad(paths, width, -1).to(device, torch.int32) if of_trees or turn % 2 else None
        ring.commit(path=path, num_accepted=accepted)
        assert ring.status.tolist() == [0] * len(rows)
        for slot, count, row, nodes in zip(rows, counts, tokens, paths, strict=True):
            if count:
                texts[slot] += [row[0], *(row[node] for node in nodes)]
        check(ring, texts)


@pytest.mark.parametrize("seed", range(6))
def test_random_rounds_against_token_lists(seed):
    random_rounds(CPU, seed, 120)


@pytest.mark.long
def test_many_random_rounds():
    random_rounds(CPU, 99, 20_000)


def test_a_commit_moves_no_state_and_reads_no_device():
    ring = StateRing(specs(), slots=3, nodes=5)
    ring.reserve(3, 5)
    walk(ring, torch.arange(15).view(3, 5))
    before = [state.clone() for state in ring.states]
    pointers = [state.data_ptr() for state in ring.states]
    ring.commit(num_accepted=torch.tensor([4, 0, 2]))
    assert [state.data_ptr() for state in ring.states] == pointers
    assert all(torch.equal(state, old) for state, old in zip(ring.states, before, strict=True))
    assert ring.current.tolist() == [5, 1, 3]


def test_a_round_wraps_around_the_ring_and_spares_the_committed_entry():
    ring = StateRing(specs(), slots=1, nodes=3)
    for _ in range(9):
        ring.reserve(1, 3)
        committed = int(ring.current[0])
        assert committed not in ring.write.flatten().tolist()
        assert sorted([committed, *ring.write.flatten().tolist()]) == list(range(4))
        ring.commit(num_accepted=torch.tensor([1]))
        assert int(ring.current[0]) == (committed + 2) % 4


def test_a_verdict_commits():
    ring = StateRing(specs(), slots=1, nodes=4)
    logits = torch.full((1, 4, 10), -10.0)
    for row, token in enumerate([5, 6, 9, 1]):
        logits[0, row, token] = 10.0
    verdict = ft.ops.verify(logits, torch.tensor([[5, 6, 7]]), base=torch.tensor([1]))
    ring.reserve(1, 4)
    walk(ring, torch.tensor([[3, 5, 6, 7]]))
    ring.commit(verdict)
    check(ring, [[3, 5, 6]])


@pytest.mark.parametrize(
    ("path", "accepted"),
    [
        (None, 3),  # more than there are nodes
        (None, -1),
        (None, 2**40),
        ([[1, 3, -1]], 2),  # no node of the round
        ([[1, -1, -1]], 2),
        ([[2, 1, -1]], 2),  # the path does not ascend
        ([[1, 2, 2]], 4),
    ],
)
def test_counts_and_nodes_out_of_range_change_nothing_but_their_own_status(path, accepted):
    ring = StateRing(specs(), slots=2, nodes=5)
    ring.reserve(2, 4, num_nodes=torch.tensor([3, 4]))
    walk(ring, torch.arange(8).view(2, 4))
    both = None if path is None else torch.tensor([*path, [1, 2, 3]])
    ring.commit(path=both, num_accepted=torch.tensor([accepted, 3]))
    assert ring.status.tolist() == [ft.ops.Status.BAD_ROW, 0]
    assert ring.current.tolist() == [0, 4]
    ring.commit(path=both, num_accepted=torch.tensor([0, 0]))  # the first row's round is still open
    assert ring.status.tolist() == [0, 0]
    assert ring.current.tolist() == [1, 4]


@pytest.mark.parametrize(
    ("slots", "parents", "nodes"),
    [
        ([7, 0], [[0, 1], [0, 1]], [3, 3]),
        ([-1, 0], [[0, 1], [0, 1]], [3, 3]),
        ([1, 0], [[0, 2], [0, 1]], [3, 3]),
        ([1, 0], [[-1, 0], [0, 1]], [3, 3]),
        ([1, 0], [[0, 1], [0, 1]], [4, 3]),
    ],
)
def test_rows_that_cannot_be_reserved_have_no_places(slots, parents, nodes):
    ring = StateRing(specs(), slots=2, nodes=3)
    ring.reserve(
        2, 3, slots=torch.tensor(slots), parents=torch.tensor(parents), num_nodes=torch.tensor(nodes)
    )
    assert ring.status.tolist() == [ft.ops.Status.BAD_ROW, 0]
    assert ring.read[0].tolist() == ring.write[0].tolist() == [-1] * 3
    assert ring.write[1].tolist() == [1, 2, 3]
    ring.commit(num_accepted=torch.tensor([1, 1]))
    assert ring.status.tolist() == [ft.ops.Status.BAD_ROW, 0]
    assert ring.current.tolist() == [2, 0]


def test_sizes_are_checked():
    with pytest.raises(ValueError, match=r"nodes from 1 to 256, got 1 and 257"):
        StateRing(specs(), slots=1, nodes=257)
    ring = StateRing(specs(), slots=2, nodes=3)
    with pytest.raises(
        ValueError, match=r"write: expected at most 3 nodes, as the ring has 4 entries, got 4"
    ):
        ring.reserve(1, 4)
    with pytest.raises(ValueError, match=r"slots: needed for 3 rows of a ring of 2 slots"):
        ring.reserve(3, 1)
    ring.reserve(2, 2)
    with pytest.raises(ValueError, match=r"num_accepted: expected int32 or int64"):
        ring.commit(num_accepted=torch.tensor([0.0, 1.0]))
    with pytest.raises(TypeError, match=r"expected a verdict or num_accepted"):
        ring.commit()


def test_states_keep_shapes_and_dtypes():
    shapes = [((64, 64, 16), torch.float32), ((8, 16, 16), torch.bfloat16), ((96, 3), torch.float16)]
    ring = StateRing([TensorSpec(shape, dtype, CPU) for shape, dtype in shapes], slots=2, nodes=4)
    for state, (shape, dtype) in zip(ring.states, shapes, strict=True):
        assert state.shape == (2, 5, *shape)
        assert state.dtype == dtype
    assert ring.nbytes == sum(11 * torch.Size(s).numel() * d.itemsize for s, d in shapes)


@pytest.mark.cuda
@pytest.mark.parametrize("seed", range(3))
def test_random_rounds_on_a_device(seed):
    random_rounds(torch.device("cuda"), seed, 60)


@pytest.mark.cuda
def test_the_device_computes_the_integers_of_the_cpu():
    choose = random.Random(5)
    for _ in range(60):
        slots, most, width = choose.randrange(1, 200), choose.choice([3, 40, 256]), 0
        width = choose.randrange(1, most + 1)
        rows = choose.randrange(1, slots + 1)
        places = torch.tensor(choose.sample(range(slots), rows), dtype=torch.int32)
        places[choose.randrange(rows)] = choose.choice([-1, slots, int(places[0])])
        places = places.unique()[torch.randperm(len(places.unique()))]
        rows = len(places)
        parents = pad([random_tree(choose, width) for _ in range(rows)], width - 1)
        if width > 2:
            parents[choose.randrange(rows), choose.randrange(width - 1)] = choose.choice([-1, width, 0])
        nodes = torch.tensor([choose.randrange(-1, width + 2) for _ in range(rows)])
        accepted = torch.tensor([choose.randrange(-1, width + 2) for _ in range(rows)])
        path = torch.sort(torch.randint(-1, width + 1, (rows, width)), 1).values
        results = []
        for device in ("cpu", "cuda"):
            ring = StateRing([TensorSpec((), torch.float32, torch.device(device))], slots=slots, nodes=most)
            ring.current.copy_(torch.arange(slots) % (most + 2))
            ring.reserve(
                rows, width, slots=places.to(device), parents=parents.to(device), num_nodes=nodes.to(device)
            )
            ours = [ring.read.clone(), ring.write.clone(), ring.status.clone()]
            ring.commit(path=path.to(device), num_accepted=accepted.to(device))
            results.append([t.cpu() for t in (*ours, ring.current, ring.status, ring._reserved)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.cuda
def test_a_round_is_captured_and_replayed_with_other_counts():
    device = torch.device("cuda")
    ring = StateRing(specs(device), slots=3, nodes=4)
    accepted = torch.zeros(3, dtype=torch.int32, device=device)
    tokens = torch.zeros(3, 4, dtype=torch.int64, device=device)

    def turn():
        ring.reserve(3, 4)
        walk(ring, tokens)
        ring.commit(num_accepted=accepted)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        turn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn()
    texts = [[0], [0], [0]]
    choose = random.Random(1)
    for _ in range(20):
        rows = [[choose.randrange(90) for _ in range(4)] for _ in range(3)]
        counts = [choose.randrange(4) for _ in range(3)]
        tokens.copy_(torch.tensor(rows))
        accepted.copy_(torch.tensor(counts))
        graph.replay()
        for text, row, count in zip(texts, rows, counts, strict=True):
            text += row[: count + 1]
        check(ring, texts)
