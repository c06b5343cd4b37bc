"""What the figures have to reach, and the two figures that no table row holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

import foretoken
from foretoken import _core
from foretoken.demo.compare import Comparison

CONTEXTS = (1024, 16384, 131072)


def ngram_microseconds(context: int, seed: int = 0) -> tuple[float, float]:
    """Microseconds of a proposal of 8 tokens, and of taking in one token, after `context` tokens."""
    generator = torch.Generator().manual_seed(seed)
    # Four words in five follow the last one in a fixed way, so that suffixes of every length occur again.
    text = torch.randint(0, 4096, (context + 4096,), generator=generator)
    follows = torch.rand(len(text), generator=generator) < 0.8
    ids = text.tolist()
    for i in range(1, len(ids)):
        if follows[i]:
            ids[i] = (ids[i - 1] * 31 + 7) % 4096
    index = _core.NgramIndex(max_ngram=4, max_bytes=64 << 20)
    index.reserve(len(ids))
    index.append(torch.tensor(ids[:context]))
    proposals, updates = [], []
    for start in range(context, len(ids), 4):
        fresh = torch.tensor(ids[start : start + 4])
        began = perf_counter()
        index.append(fresh)
        between = perf_counter()
        index.propose(8)
        proposals.append(perf_counter() - between)
        updates.append((between - began) / 4)
    return 1e6 * median(proposals), 1e6 * median(updates)


def import_milliseconds(times: int = 3) -> float:
    """Milliseconds that `import foretoken` adds to `import torch`, in processes of their own."""
    code = (
        "import time, torch; began = time.perf_counter(); import foretoken;print(time.perf_counter() - began)"
    )
    path = os.pathsep.join([str(Path(foretoken.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": path}
    runs = [
        float(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)
        for _ in range(times)
    ]
    return 1e3 * median(runs)


def check(result: Comparison, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each figure with its bound; figures of methods that did not run are left out."""
    by_key = {row["key"]: row for row in rows if row["temperature"] == 0.0}
    checks = []

    def add(name: str, value: float | None, bound: float, *, at_most: bool = False) -> None:
        if value is not None:
            reached = value <= bound if at_most else value >= bound
            checks.append(
                {"name": name, "value": value, "bound": bound, "at_most": at_most, "reached": reached}
            )

    def ratio(name: str, key: str, other: str, bound: float) -> None:
        add(name, result.ratio(0.0, key, other), bound)

    ratio("modules, draft model, over plain", "module_model", "module_plain", 2.2)
    ratio("modules, draft model, over Hugging Face assisted", "module_model", "hf_model", 1.08)
    ratio("modules, n-grams, over Hugging Face prompt lookup", "module_ngram", "hf_ngram", 1.0)
    ratio("lean forward over Hugging Face assisted", "lean_model", "hf_model", 2.5)
    ratio("lean forward over the hand-written loop", "lean_model", "byhand", 1.0)
    for key, bound in (("module_model", 0.05), ("lean_model", 0.08)):
        if key in by_key:
            add(
                f"{by_key[key]['method']}: outside the forwards",
                by_key[key]["outside_forwards"],
                bound,
                at_most=True,
            )
    for context in CONTEXTS:
        proposal, update = ngram_microseconds(context)
        add(f"n-gram proposal after {context} tokens, us", proposal, 1.5, at_most=True)
        add(f"n-gram update after {context} tokens, us a token", update, 0.5, at_most=True)
    add("import foretoken beyond torch, ms", import_milliseconds(), 50.0, at_most=True)
    return checks
