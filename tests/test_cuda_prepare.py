"""Rows edited before their law is taken are the CPU's, bit for bit: constraints, bitmasks, vocabulary maps.

On the CPU the work of the kernels is done thread by thread, so that their logic is proven without a device.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from foretoken import _core
from guarded import guarded

testing = _core.testing
LOWEST, HIGHEST = -(2**31), 2**31 - 1
POISON = 0xA5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def prepared(device: torch.device, call, tensors: dict[str, Tensor], *arguments) -> dict:
    """The rows of a preparation as tensors on the CPU; ``call(tensors, *arguments, workspace, blocks)``."""
    blocks = arguments[-1]
    there = {name: tensor_on(tensor, device) for name, tensor in tensors.items()}
    size = call(there, *arguments[:-1], None, blocks)["bytes"]
    workspace = torch.full((size + 16,), POISON, dtype=torch.uint8, device=device)
    aligned = workspace[-workspace.data_ptr() % 16 :][:size]
    places = call(there, *arguments[:-1], aligned, blocks)
    return places | {"memory": aligned.cpu()}


def tensor_on(tensor: Tensor, device: torch.device) -> Tensor:
    """With its strides and its place in its storage, which decide how rows are read."""
    if device.type == "cpu":
        return tensor
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def part(result: dict, name: str, dtype: torch.dtype, *shape: int) -> Tensor | None:
    if result[name] is None:
        return None
    count = int(np.prod(shape)) * dtype.itemsize
    return result["memory"][result[name] : result[name] + count].view(dtype).view(*shape)


def assert_same_bits(mine: Tensor, cpus: np.ndarray, where: object) -> None:
    other = torch.from_numpy(cpus)
    assert torch.equal(mine.isnan(), other.isnan()), where
    assert torch.equal(mine.nan_to_num().view(torch.int32), other.nan_to_num().view(torch.int32)), where


def spread(pick: random.Random, tensor: Tensor) -> Tensor:
    """The same numbers in rows that are further apart, and not aligned."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 5, dtype=tensor.dtype)
    place = wide[..., pick.choice([0, 1, 4]) :][..., : tensor.shape[-1]]
    place.copy_(tensor)
    return place


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]


def constrain(pick: random.Random, table, slot: int, vocab: int, kind: str) -> None:
    def ids(count: int) -> list[int]:
        return [pick.choice([pick.randrange(vocab), pick.randrange(min(vocab, 9))]) for _ in range(count)]

    def some(wanted: str) -> bool:
        return kind == wanted or (kind == "all" and pick.random() < 0.8)

    biased = sorted({*ids(pick.randint(1, 30)), vocab, HIGHEST}) if some("bias") else []
    words = [ids(pick.choice([1, 1, 2, 2, 3, 7])) for _ in range(25)] if some("words") else []
    table.constrain(
        slot,
        repetition_penalty=pick.choice([1.3, 0.7, 1.3]) if some("repetition") else 1.0,
        frequency_penalty=pick.choice([0.37, -0.21]) if some("frequency") else 0.0,
        presence_penalty=pick.choice([0.61, -0.45]) if some("presence") else 0.0,
        bias_ids=biased,
        bias=[pick.choice([pick.gauss(0, 3), -np.inf, 0.0, -0.0]) for _ in biased],
        bad_words=[*words, [vocab], [HIGHEST, 1]] if words else [],
        min_new_tokens=pick.choice([1, 4, 9]) if some("length") else 0,
        stop_ids=[*ids(3), vocab + 1] if some("length") else [],
    )


CONSTRAINTS = ["none", "bias", "repetition", "frequency", "presence", "words", "length", "all", "all", "all"]


def make_table(pick: random.Random, slots: int, vocab: int, *, constrained: bool):
    table = _core.SamplingTable(slots)
    for slot in range(slots):
        table.set(slot, pick.choice([1.0, 0.7, 1.0, 0.0]), 0, 1.0, 0.0, slot)
        if constrained:
            constrain(pick, table, slot, vocab, pick.choice(CONSTRAINTS))
    return table


def random_logits(pick: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    rows = 3.0 * torch.randn(*shape)
    odd = torch.rand(*shape)
    for low, value in ((0.0, -torch.inf), (0.02, 0.0), (0.04, -0.0)):
        rows[(odd >= low) & (odd < low + 0.02)] = value
    if pick.random() < 0.3:
        rows[odd > 0.999] = torch.nan
        rows[(odd > 0.998) & (odd < 0.999)] = torch.inf
    return rows.to(dtype)


def random_map(pick: random.Random, size: int, vocab: int) -> Tensor:
    if size <= vocab:
        ids = sorted(pick.sample(range(vocab), size))
    else:
        ids = [pick.randrange(vocab) for _ in range(size)]
    if pick.random() < 0.4:
        for _ in range(1 + size // 8):
            ids[pick.randrange(size)] = pick.choice([-1, -1, vocab, LOWEST, HIGHEST])
    if pick.random() < 0.3 and size > 1:
        ids[pick.randrange(size)] = ids[pick.randrange(size)]
    mapped = torch.tensor(ids, dtype=torch.int32)
    return strided(mapped) if pick.random() < 0.3 else mapped


def random_history(pick: random.Random, slots: int, vocab: int) -> tuple[Tensor, Tensor]:
    dtype = pick.choice([torch.int32, torch.int64])
    length = pick.choice([3, 40, 700])
    few = torch.randint(0, min(vocab, 9), (slots, length))
    any_id = torch.randint(-2, vocab + 2, (slots, length))
    tokens = torch.where(torch.rand(slots, length) < 0.6, few, any_id).to(dtype)
    prompts = torch.randint(0, length // 2 + 1, (slots,)).to(dtype)
    return (strided(tokens), strided(prompts)) if pick.random() < 0.3 else (tokens, prompts)


def random_bitmask(pick: random.Random, vocab: int, *rows: int) -> Tensor:
    words = torch.randint(LOWEST, HIGHEST, (*rows, (vocab + 31) // 32), dtype=torch.int32)
    return strided(words) if pick.random() < 0.3 else words


def random_bases(pick: random.Random, prompts: Tensor, length: int, slots: list[int]) -> Tensor:
    bases = []
    for slot in slots:
        prompt = int(prompts[slot]) if 0 <= slot < len(prompts) else 0
        base = pick.randint(prompt, length)
        bases.append(pick.choice([base] * 8 + [prompt - 1, length + 1, -1, 2**62]))
    return torch.tensor(bases)


@dataclass
class Case:
    """One batch to verify, of every option and every kind of garbage."""

    seed: int
    vocab: int
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        pick = self.pick = random.Random(self.seed)
        self.batch, self.drafts = pick.randint(1, 5), pick.choice([0, 1, 3, 6, 6])
        self.slots_there = self.batch + pick.choice([0, 2])
        self.tables()
        self.requests()
        self.proposals()
        self.rows()
        self.laws()

    def chance(self, probability: float) -> bool:
        return self.pick.random() < probability

    def tables(self) -> None:
        pick = self.pick
        self.sampling = make_table(pick, self.slots_there, self.vocab, constrained=self.chance(0.8))
        self.draft_sampling = self.sampling
        if self.chance(0.5):
            there = self.slots_there + pick.choice([0, 3])
            self.draft_sampling = make_table(pick, there, self.vocab, constrained=self.chance(0.8))
        self.rule = pick.choice([_core.Rule.auto] * 5 + [_core.Rule.rrs, _core.Rule.target_only])
        self.draw = pick.choice([_core.Draw.iid] * 5 + [_core.Draw.without_replacement] * 2)
        if self.chance(0.1):
            self.draw = _core.Draw.deterministic
        self.codes: list[int] | None = None
        if self.chance(0.2):
            self.codes = [pick.choice([0, 1, 2, 3, 6, 200]) for _ in range(self.slots_there)]
            self.tensors["rules"] = torch.tensor(self.codes, dtype=torch.uint8)

    def requests(self) -> None:
        pick = self.pick
        self.slots = list(range(self.batch))
        if self.chance(0.5):
            self.slots = pick.sample(range(self.slots_there), self.batch)
            if self.chance(0.2):
                self.slots[pick.randrange(self.batch)] = pick.choice([-1, self.slots_there, HIGHEST])
            self.tensors["slots"] = torch.tensor(self.slots, dtype=torch.int32)
        history, prompts = random_history(pick, self.slots_there + 3, self.vocab)
        self.tensors |= {"history": history, "prompt_lengths": prompts}
        self.tensors["base"] = random_bases(pick, prompts, history.shape[1], self.slots)

    def proposals(self) -> None:
        pick, batch, drafts = self.pick, self.batch, self.drafts
        low, high = (0, self.vocab) if self.chance(0.8) else (-2, self.vocab + 2)
        tokens = torch.randint(low, high, (batch, drafts)).to(pick.choice([torch.int32, torch.int64]))
        tokens[torch.rand(batch, drafts) < 0.5] %= 9
        self.tensors["draft_tokens"] = tokens
        self.counts = [drafts] * batch
        if self.chance(0.6):
            self.counts = [
                pick.choice([pick.randint(0, drafts)] * 6 + [-1, -2, drafts + 1, HIGHEST])
                for _ in range(batch)
            ]
            self.tensors["num_drafts"] = torch.tensor(self.counts, dtype=torch.int32)
        self.parents = [list(range(drafts)) for _ in range(batch)]
        if self.chance(0.6):
            self.parents = [[pick.randint(max(0, i - 3), i) for i in range(drafts)] for _ in range(batch)]
            for row in self.parents:
                if drafts > 0 and self.chance(0.2):
                    row[pick.randrange(drafts)] = pick.choice([-1, drafts, HIGHEST, LOWEST])
            self.tensors["parents"] = torch.tensor(self.parents, dtype=torch.int64).view(batch, drafts)

    def rows(self) -> None:
        pick, nodes = self.pick, self.drafts + 1
        dtype = pick.choice(DTYPES)
        self.row_offsets: list[int] | None = None
        if self.chance(0.6):
            shape: tuple[int, ...] = (self.batch, nodes)
            self.rows_there = [nodes] * self.batch
        else:
            offsets = [0]
            for _ in range(self.batch):
                offsets.append(offsets[-1] + pick.choice([nodes, nodes, pick.randint(0, nodes)]))
            shape = (max(offsets[-1], 1) + 1,)
            if self.chance(0.3):
                offsets[pick.randrange(self.batch + 1)] = pick.choice([-1, shape[0] + 1, LOWEST, HIGHEST])
            self.row_offsets = offsets
            self.rows_there = [
                last - first if 0 <= first <= last <= shape[0] else 0
                for first, last in itertools.pairwise(offsets)
            ]
            self.tensors["row_offsets"] = torch.tensor(offsets, dtype=torch.int64)
        logits = random_logits(pick, dtype, *shape, self.vocab)
        self.tensors["target_logits"] = spread(pick, logits) if self.chance(0.4) else logits
        if self.chance(0.5):
            self.tensors["bitmask"] = random_bitmask(pick, self.vocab, *shape)

    def laws(self) -> None:
        pick, nodes = self.pick, self.drafts + 1
        kind = pick.choice(["none", "logits", "logits", "logits", "probs", "probs"])
        if kind == "none":
            return
        self.draft_row: Tensor | None = None
        laws = nodes + pick.choice([-1, 0, 0, 2])
        if self.chance(0.4):
            laws = pick.choice([1, 2, nodes])
            self.draft_row = torch.randint(-1, laws, (self.batch, nodes)).to(torch.int32)
            if self.chance(0.3):
                self.draft_row[0, pick.randrange(nodes)] = pick.choice([laws, -2, LOWEST, HIGHEST])
            self.tensors["draft_row"] = self.draft_row
        width = self.vocab + pick.choice([0, 0, -self.vocab // 3, 1, 37])
        if self.chance(0.4):
            self.tensors["vocab_map"] = random_map(pick, width, self.vocab)
        rows = random_logits(pick, torch.float32, self.batch, laws, width)
        if kind == "probs":
            rows = rows.nan_to_num(0, 0, -50).softmax(-1) * (torch.rand_like(rows) < 0.7)
            rows[..., self.vocab :] *= (torch.rand(self.batch, laws, 1) < 0.4).float()
        rows = rows.to(pick.choice(DTYPES))
        self.tensors["draft_" + kind] = spread(pick, rows) if self.chance(0.4) else rows

    # ---- which rows count, and what they are to be ----

    def way(self, b: int, node: int) -> list[int] | None:
        """Tokens drafted on the way to a node; None: there is no way."""
        path = []
        while node > 0:
            path.append(int(self.tensors["draft_tokens"][b, node - 1]))
            parent = self.parents[b][node - 1]
            if not 0 <= parent < node:
                return None
            node = parent
        return path[::-1]

    def drafted(self, b: int) -> int:
        """Drafts of a request, -1: it is passed over."""
        slot_there = 0 <= self.slots[b] < min(self.sampling.size, self.draft_sampling.size)
        if not slot_there or self.counts[b] == -1 or self.rows_there[b] < 1:
            return -1
        return self.counts[b] if 0 <= self.counts[b] < min(self.drafts + 1, self.rows_there[b]) else 0

    def history_suits(self, b: int, table) -> bool:
        if not testing.needs_history(table, self.slots[b]):
            return True
        base, prompt = int(self.tensors["base"][b]), int(self.tensors["prompt_lengths"][self.slots[b]])
        return 0 <= prompt <= base <= self.tensors["history"].shape[1]

    def reads_laws(self, b: int) -> bool:
        if self.draw == _core.Draw.deterministic or self.sampling.get(self.slots[b])[0] == 0.0:
            return False
        code = int(self.rule) if self.codes is None else self.codes[self.slots[b]]
        return code < 12 and code not in (int(_core.Rule.target_only), int(_core.Rule.coupled))

    def edited(self, kind: str, b: int, row: int, path: list[int]) -> np.ndarray:
        return testing.edited_row(self.tensors, self.sampling, self.draft_sampling, kind, b, row, path)[0]

    def sound(self, b: int, row: int, path: list[int]) -> bool:
        law = self.tensors.get("draft_probs")
        values = self.edited("draft", b, row, path) if law is None else law[b, row].float().numpy()
        ids = self.tensors["vocab_map"].numpy() if "vocab_map" in self.tensors else np.arange(len(values))
        known = (ids >= 0) & (ids < self.vocab)
        absent = -np.inf if law is None else 0.0
        taken = ids[known & (values != absent)]
        return len(set(taken.tolist())) == len(taken) and (law is None or bool((values[~known] == 0).all()))

    def check(self, device: torch.device) -> int:
        blocks = self.pick.choice([1, 7, 1000])
        result = prepared(
            device,
            testing.prepare_verify,
            self.tensors,
            self.sampling,
            self.draft_sampling,
            self.rule,
            self.draw,
            blocks,
        )
        return self.check_history(result) + self.check_target(result) + self.check_laws(result)

    def check_history(self, result: dict) -> int:
        flags = part(result, "history_unusable", torch.uint8, self.batch)
        for b in range(self.batch if flags is not None else 0):
            suits = self.drafted(b) < 0 or self.history_suits(b, self.sampling)
            if "draft_logits" in self.tensors:
                suits &= self.drafted(b) < 0 or self.history_suits(b, self.draft_sampling)
            assert bool(flags[b]) == (not suits)
        return 0

    def check_target(self, result: dict) -> int:
        target = part(result, "target", torch.float32, self.batch, self.drafts + 1, self.vocab)
        seen = 0
        for b in range(self.batch if target is not None else 0):
            for node in range(self.drafted(b) + 1):
                path = self.way(b, node)
                if path is None or not self.history_suits(b, self.sampling):
                    continue
                row = node if self.row_offsets is None else self.row_offsets[b] + node
                assert_same_bits(target[b, node], self.edited("target", b, row, path), (b, node))
                seen += 1
        return seen

    def check_laws(self, result: dict) -> int:
        rows, width = result["draft_rows"], result["draft_size"]
        draft = part(result, "draft", torch.float32, self.batch, rows, width)
        mapped = part(result, "mapped", torch.float32, self.batch, rows, self.vocab)
        unsound = part(result, "draft_unsound", torch.uint8, self.batch, rows)
        seen = 0
        if draft is None and mapped is None and unsound is None:
            return seen
        for b in range(self.batch):
            for node in range(self.drafted(b)):
                path = self.way(b, node)
                has_child = node in self.parents[b][: self.drafted(b)]
                law_row = node if self.draft_row is None else int(self.draft_row[b, node])
                laws = self.tensors.get("draft_logits", self.tensors.get("draft_probs"))
                if path is None or not has_child or not 0 <= law_row < laws.shape[1]:
                    continue
                suits = "draft_probs" in self.tensors or self.history_suits(b, self.draft_sampling)
                if not self.reads_laws(b) or not suits:
                    continue
                row = node if result["draft_by_node"] else law_row
                if draft is not None:
                    assert_same_bits(draft[b, row], self.edited("draft", b, law_row, path), (b, node))
                sound = self.sound(b, law_row, path)
                if unsound is not None:
                    assert bool(unsound[b, row]) == (not sound), (b, node)
                if mapped is not None and sound:
                    assert_same_bits(mapped[b, row], self.edited("mapped", b, law_row, path), (b, node))
                seen += 1
        return seen


@pytest.mark.parametrize("vocab", [5, 45, 301, 4096, 4099, 9000])
def test_every_option_and_every_kind_of_garbage(device, vocab):
    seen = sum(Case(seed, vocab).check(device) for seed in range(150 if vocab < 1000 else 12))
    assert seen > (500 if vocab < 1000 else 30)


def drawn_rows(device: torch.device, seed: int, vocab: int) -> int:
    torch.manual_seed(seed)
    pick = random.Random(seed)
    batch, slots_there = pick.randint(1, 5), 7
    width = vocab if pick.random() < 0.5 else max(1, vocab - pick.randint(0, vocab // 2))
    table = make_table(pick, slots_there, vocab, constrained=pick.random() < 0.8)
    history, prompts = random_history(pick, slots_there, vocab)
    slots = pick.sample(range(slots_there), batch)
    logits = random_logits(pick, pick.choice(DTYPES), batch, width)
    tensors = {"logits": spread(pick, logits) if pick.random() < 0.4 else logits}
    tensors |= {"history": history, "prompt_lengths": prompts}
    tensors |= {"slots": torch.tensor(slots, dtype=torch.int32)}
    tensors |= {"base": random_bases(pick, prompts, history.shape[1], slots)}
    if width < vocab or pick.random() < 0.2:
        tensors["vocab_map"] = random_map(pick, width, vocab)
    elif pick.random() < 0.5:
        tensors["bitmask"] = random_bitmask(pick, vocab, batch)
    if pick.random() < 0.7:
        path = torch.randint(-1, vocab + 1, (batch, pick.choice([1, 4, 256])))
        path[torch.rand(path.shape) < 0.3] = -1
        tensors["path"] = path.to(pick.choice([torch.int32, torch.int64]))
    result = prepared(device, testing.prepare_sample, tensors, table, vocab, pick.choice([1, 50]))
    target = part(result, "target", torch.float32, batch, width)
    flags = part(result, "history_unusable", torch.uint8, batch)
    seen = 0
    for b, slot in enumerate(slots):
        base, prompt = int(tensors["base"][b]), int(prompts[slot])
        suits = not testing.needs_history(table, slot) or 0 <= prompt <= base <= history.shape[1]
        if flags is not None:
            assert bool(flags[b]) == (not suits)
        if target is None or not suits:
            continue
        path = [token for token in tensors["path"][b].tolist() if token >= 0] if "path" in tensors else []
        assert_same_bits(target[b], testing.edited_sample_row(tensors, table, vocab, b, path), b)
        seen += 1
    return seen


@pytest.mark.parametrize("vocab", [5, 45, 301, 4099])
def test_rows_to_draw_from(device, vocab):
    assert sum(drawn_rows(device, seed, vocab) for seed in range(120 if vocab < 1000 else 20)) > 30


def test_a_path_that_is_too_long_is_refused(device):
    table = make_table(random.Random(0), 1, 5, constrained=False)
    constrain(random.Random(0), table, 0, 5, "repetition")
    tensors = {
        "logits": torch.zeros(1, 5),
        "base": torch.zeros(1, dtype=torch.int64),
        "path": torch.zeros(1, 257, dtype=torch.int64),
        "history": torch.zeros(1, 1, dtype=torch.int64),
        "prompt_lengths": torch.zeros(1, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match="path: expected at most 256 drafted tokens a row, got 257"):
        prepared(device, testing.prepare_sample, tensors, table, 5, 1)


@pytest.mark.parametrize("nodes", [63, 255])
def test_deep_chains_and_wide_trees(device, nodes):
    for seed in range(3):
        case = Case(seed, 45)
        pick = random.Random(seed)
        case.batch, case.drafts = 2, nodes
        case.sampling = case.draft_sampling = make_table(pick, 2, 45, constrained=True)
        case.rule, case.draw, case.codes = _core.Rule.auto, _core.Draw.iid, None
        case.tensors = {}
        case.slots_there, case.slots = 2, [0, 1]
        history, prompts = random_history(pick, 5, 45)
        case.tensors |= {"history": history, "prompt_lengths": prompts}
        case.tensors["base"] = torch.full((2,), history.shape[1])
        case.proposals()
        if seed == 2:
            case.parents = [[pick.randint(0, i) for i in range(nodes)] for _ in range(2)]
            case.tensors["parents"] = torch.tensor(case.parents)
        case.rows()
        case.laws()
        case.check(device)


@pytest.mark.parametrize("front", [False, True])
def test_nothing_lies_outside_the_tensors(front):
    """Every tensor and the workspace end, or begin, right where memory cannot be touched."""
    for seed in range(80):
        case = Case(1000 + seed, 301)
        case.tensors = {
            name: guarded(tensor, front=front) if tensor.numel() else tensor
            for name, tensor in case.tensors.items()
        }
        arguments = (case.tensors, case.sampling, case.draft_sampling, case.rule, case.draw)
        size = testing.prepare_verify(*arguments, None, 1)["bytes"]
        workspace = guarded(torch.full((size,), POISON, dtype=torch.uint8), front=front)
        places = testing.prepare_verify(*arguments, workspace, case.pick.choice([1, 50]))
        result = places | {"memory": workspace}
        case.check_history(result)
        case.check_target(result)
        case.check_laws(result)


@pytest.mark.cuda
def test_a_table_is_read_as_it_is_when_the_work_is_issued():
    """Lists that grow, shrink and vanish between calls."""
    device = torch.device("cuda")
    for seed in range(40, 60):
        case = Case(seed, 301)
        for _ in range(4):
            for slot in range(case.sampling.size):
                case.sampling.set(slot, 1.0, 0, 1.0, 0.0, 0)
                if case.chance(0.7):
                    constrain(case.pick, case.sampling, slot, 301, case.pick.choice(CONSTRAINTS))
            case.check(device)


@pytest.mark.cuda
def test_a_captured_preparation_sees_what_has_changed():
    case = next(c for c in (Case(seed, 301) for seed in range(100)) if is_plain(c))
    device = torch.device("cuda")
    tensors = {name: tensor_on(tensor, device) for name, tensor in case.tensors.items()}
    arguments = (tensors, case.sampling, case.draft_sampling, case.rule, case.draw)
    size = testing.prepare_verify(*arguments, None, 1)["bytes"]
    memory = torch.zeros(size, dtype=torch.uint8, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        testing.prepare_verify(*arguments, memory, 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        places = testing.prepare_verify(*arguments, memory, 1)
    for seed in range(3):
        torch.manual_seed(seed)
        case.tensors["target_logits"].copy_(torch.randn_like(case.tensors["target_logits"].float()))
        case.tensors["draft_tokens"].random_(0, 301)
        for name in ("target_logits", "draft_tokens"):
            tensors[name].copy_(case.tensors[name])
        graph.replay()
        torch.cuda.synchronize()
        result = places | {"memory": memory.cpu()}
        assert case.check_target(result) > 0
        case.check_laws(result)


def is_plain(case: Case) -> bool:
    return "draft_logits" in case.tensors and case.drafts > 2 and case.sampling.needs_history


@pytest.mark.cuda
def test_wide_vocabularies_and_long_texts():
    """As models have them: V of 128256, thousands of tokens of text, rows that no block holds whole."""
    pick = random.Random(1)
    device = torch.device("cuda")
    for seed in range(200):
        case = Case(seed, 301)
        if not is_plain(case) or "vocab_map" in case.tensors:
            continue
        case.vocab = 128256
        kept = {name: case.tensors[name] for name in ("slots", "rules") if name in case.tensors}
        case.tensors = kept
        case.sampling = case.draft_sampling = make_table(pick, case.slots_there, 128256, constrained=True)
        case.tensors["history"] = torch.randint(0, 128256, (case.slots_there, 20_000))
        case.tensors["prompt_lengths"] = torch.full((case.slots_there,), 9_000)
        case.tensors["base"] = torch.randint(9_000, 20_001, (case.batch,))
        case.proposals()
        case.rows()
        case.laws()
        case.check(device)
        if seed > 60:
            break
