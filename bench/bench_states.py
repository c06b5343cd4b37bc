"""Recurrent states of a round: what a commit costs when it is an index, and what the alternatives cost.

    python bench/bench_states.py [--device cpu|cuda] [--layers 48] [--batch 1 8] [--nodes 5] [--models [NAME]]

Answers are asserted first: committed states are those of running the accepted tokens one by one, logits those
of the plain module. Without --models, times on a CUDA device are device times, by replays of a graph.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from foretoken.cache import StateRing, TensorSpec

HEADS, SIZE, STATE, WINDOW = 32, 64, 128, 4
REPEATS = 50
PROMPT = 16


def milliseconds(run: Callable[[], None], device: torch.device) -> float:
    """Of one call."""
    for _ in range(3):
        run()
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(REPEATS):
            run()
        return (time.perf_counter() - began) * 1e3 / REPEATS
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / REPEATS


def host_microseconds(run: Callable[[], None]) -> float:
    """Until the call returns, whatever the device does then."""
    for _ in range(10):
        run()
    began = time.perf_counter()
    for _ in range(200):
        run()
    spent = (time.perf_counter() - began) * 1e6 / 200
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return spent


def assert_answers(device: torch.device, batch: int, nodes: int) -> None:
    """Sums of powers: what was committed is what one token after the other gives, chains and trees."""
    ring = StateRing([TensorSpec((3,), torch.int64, device)], slots=batch, nodes=nodes)
    texts: list[list[int]] = [[] for _ in range(batch)]
    parents = torch.tensor([[max(0, node - 2) for node in range(1, nodes)]] * batch, device=device)
    for turn in range(6):
        tokens = torch.arange(batch * nodes, device=device).view(batch, nodes) * 7 + turn
        of_tree = turn % 2 == 1
        ring.reserve(batch, nodes, parents=parents if of_tree else None)
        for node in range(nodes):
            ring.append(0, (ring.take(0)[:, node] * 31 + tokens[:, node, None]) % 65537, node)
        paths = []
        for row in range(batch):
            node, path = 0, []
            while True:
                children = [c for c in range(1, nodes) if (max(0, c - 2) if of_tree else c - 1) == node]
                if not children or len(path) >= (row + turn) % nodes:
                    break
                node = children[-1]
                path.append(node)
            paths.append(path)
            texts[row] += [int(tokens[row, 0]), *(int(tokens[row, n]) for n in path)]
        wide = torch.tensor([[*path, *[-1] * (nodes - len(path))] for path in paths], device=device)
        ring.commit(path=wide, num_accepted=torch.tensor([len(path) for path in paths], device=device))
    for row, text in enumerate(texts):
        state = 0
        for token in text:
            state = (state * 31 + token) % 65537
        assert ring.committed(0)[row].tolist() == [state] * 3


def specs(device: torch.device, layers: int) -> list[TensorSpec]:
    """State and convolution window of each layer, as of a Mamba-2 of 2.7 billion weights, by two fifths."""
    pair = [
        TensorSpec((HEADS, SIZE, STATE), torch.float32, device),
        TensorSpec((HEADS * SIZE + 2 * STATE, WINDOW), torch.bfloat16, device),
    ]
    return pair * layers


def time_ring(device: torch.device, layers: int, batch: int, nodes: int) -> None:
    ring = StateRing(specs(device, 1), slots=batch, nodes=nodes)
    accepted = torch.arange(batch, device=device, dtype=torch.int32) % nodes
    path = torch.arange(1, nodes + 1, device=device, dtype=torch.int32).repeat(batch, 1)
    parents = torch.arange(nodes - 1, device=device, dtype=torch.int32).repeat(batch, 1)

    def rollback() -> None:
        ring.reserve(batch, nodes, parents=parents)
        ring.commit(path=path, num_accepted=accepted)

    def copies(kept: list[Tensor], states: list[Tensor], places: Tensor) -> None:
        for whole, state in zip(states, kept, strict=True):
            state.copy_(whole.flatten(0, 1).index_select(0, places))

    bytes_of_state = sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in specs(device, layers))
    print(
        f"{layers} layers, B = {batch}, {nodes} nodes, {bytes_of_state / 2**20:.0f} MiB of states a request"
    )
    print(f"  ring: reserve and commit for all layers  {milliseconds(rollback, device) * 1e3:8.2f} us")
    print(f"  ring: the host's part                    {host_microseconds(rollback):8.2f} us")
    states = [state for state in ring.states for _ in range(1)]
    kept = [state[:, 0].clone() for state in states]
    places = torch.arange(batch, device=device) * ring.entries + 2
    one = milliseconds(lambda: copies(kept, states, places), device)
    print(f"  copying accepted states out, all layers  {one * layers * 1e3:8.2f} us")


def model_of(kind: str, size: int) -> Any:
    """A random model of 16 layers; `size` 1024 makes about a quarter of a billion weights."""
    import transformers

    common = {
        "vocab_size": 32000,
        "hidden_size": size,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    heads = {"num_attention_heads": size // 64, "num_key_value_heads": 4, "intermediate_size": 3 * size}
    configs: dict[str, Callable[[], Any]] = {
        "Mamba-2": lambda: transformers.Mamba2Config(
            **common, num_hidden_layers=16, num_heads=size // 32, head_dim=64, n_groups=1, chunk_size=64
        ),
        "Bamba, 1 of 8 attends": lambda: transformers.BambaConfig(
            **common,
            **heads,
            num_hidden_layers=16,
            attn_layer_indices=[4, 12],
            mamba_n_heads=size // 32,
            mamba_chunk_size=64,
        ),
        "LFM2, 6 of 16 attend": lambda: transformers.Lfm2Config(
            **common, **heads, num_hidden_layers=16, full_attn_idxs=[2, 5, 8, 10, 12, 14]
        ),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[kind]()).eval()


def time_models(kind: str, device: torch.device, batch: int, nodes: int, size: int) -> None:
    """A round through `ModuleRunner`: a forward, and after rejected drafts the recurrent layers once more."""
    from foretoken.hf import ModuleRunner
    from foretoken.step import Step

    model = model_of(kind, size).to(device)
    runner = ModuleRunner(model, max_batch=batch, max_length=1024)
    texts = torch.randint(3, 32000, (batch, 1024), generator=torch.Generator().manual_seed(3))
    slots = torch.arange(batch, dtype=torch.int32)

    def step(lengths: list[int], columns: int, what: Literal["prefill", "decode"] = "decode") -> Tensor:
        starts = torch.tensor(lengths)
        positions = starts[:, None] + torch.arange(columns)
        counts = torch.full((batch,), columns, dtype=torch.int32)
        ends = max(lengths) + columns
        tokens = texts.gather(1, positions)
        return runner(Step(what, tokens, positions, counts, starts, slots, (), ends, True, (0, batch)))

    def rounds(kept: Callable[[int], int], columns: int) -> float:
        lengths = [PROMPT] * batch
        step([0] * batch, PROMPT, "prefill")
        spent = []
        for _ in range(16):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            logits = step(lengths, columns)
            logits.sum().item()
            spent.append(time.perf_counter() - began)
            lengths = [length + kept(row) for row, length in enumerate(lengths)]
        if model.dtype == torch.float32:
            ends = lengths[0] + columns
            with torch.inference_mode():
                plain = model(texts[:1, :ends].to(device), use_cache=False).logits[0, lengths[0] :]
            error = (step(lengths, columns)[0].to(device) - plain).norm() / plain.norm()
            assert error < 5e-3, (kind, float(error))
        return sorted(spent)[len(spent) // 2] * 1e3

    for kept in (lambda row: 2, lambda row: 1 + row % nodes):
        rounds(kept, nodes)
    if device.type == "cuda":  # its rounding alone moves logits of random weights
        model = model.to(torch.bfloat16)
        runner = ModuleRunner(model, max_batch=batch, max_length=1024)
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{kind}, {weights:.0f} M weights, B = {batch}, milliseconds a forward")
    print(f"  one token a row                 {rounds(lambda row: 1, 1):8.2f}")
    print(f"  {nodes} tokens, all accepted          {rounds(lambda row: nodes, nodes):8.2f}")
    print(f"  {nodes} tokens, two of each row stay  {rounds(lambda row: 2, nodes):8.2f}")
    print(f"  {nodes} tokens, 1 to {nodes} stay, by row   {rounds(lambda row: 1 + row % nodes, nodes):8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--models", nargs="*", metavar="NAME", help="all of them without names")
    parser.add_argument("--size", type=int, default=1024)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.models is not None:
        known = ("Mamba-2", "Bamba, 1 of 8 attends", "LFM2, 6 of 16 attend")
        wanted = options.models or [""]
        for kind in (kind for kind in known if any(kind.startswith(name) for name in wanted)):
            for batch in options.batch:
                time_models(kind, device, batch, options.nodes, options.size)
        return
    for batch in options.batch:
        assert_answers(device, batch, options.nodes)
        time_ring(device, options.layers, batch, options.nodes)


if __name__ == "__main__":
    main()
