"""What a seed means, written down: ``python tests/golden/regenerate.py`` rewrites the vectors beside it.

They pin the contract of docs/numerics.md. A change that needs them rewritten changes the text of every seed
ever published, and belongs to a new major version.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch

import foretoken as ft
from foretoken import _core

HERE = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VOCABS = [17, 1000, 5000, 40000]  # the last is cut up for threads
DRAFTS = 4
KINDS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.0, 9, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.05),
    (0.9, 12, 0.95, 0.01),
    (0.0, 0, 1.0, 0.0),
]
SEEDS = [0, 1, 2**63, 0x0123456789ABCDEF, 7, 2**64 - 1, 42]
BASES = [1, 2, 4097, 2**32 - 1, 2**32, 2**40 + 5, 3]


def noise(salt: int, *shape: int) -> np.ndarray:
    """Fixed numbers in [0, 1), the same on every machine: splitmix64, 24 bits each."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        x = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(salt << 32)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)).astype(np.float64).reshape(shape) / 2**24


def logits(salt: int, *shape: int) -> np.ndarray:
    """Between -9 and 9; every eighth is a whole number, so that rows have ties."""
    values = 18.0 * noise(salt, *shape) - 9.0
    return np.where(noise(salt + 1, *shape) < 0.125, np.round(values), values)


def tensor(values: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(values).to(dtype)


def sampling() -> ft.Sampling:
    temperature, top_k, top_p, min_p = (list(column) for column in zip(*KINDS, strict=True))
    return ft.Sampling(temperature, top_k, top_p, min_p, seed=SEEDS)


def philox() -> dict:
    words = {}
    for key, counter in itertools.product(SEEDS, [(0, 0, 0, 0), (1, 0, 1 << 24 | 1, 0), (2**32 - 1,) * 4]):
        words[f"{key} {counter}"] = list(_core.testing.philox4x32(key, *counter))
    seeds = {
        f"{seed} {row}": ft.sampling.derive_seed(seed, row, row % 2) for seed in SEEDS for row in range(3)
    }
    return {"words": words, "derived_seeds": seeds}


def exp_log() -> dict:
    """Bit patterns; distances reach from 0 to where weights end."""
    powers = {}
    for scale in (1.0, 1.442695, 0.3, 20.0):
        distances = (-120.0 / scale * noise(1, 400) ** 3).astype(np.float32)
        found = np.asarray(_core.testing.exp2_scaled(distances.tolist(), scale))
        powers[str(scale)] = found.view(np.uint32).tolist()
    values = np.exp2(160.0 * noise(2, 400) - 80.0)
    values = (values.view(np.uint64) & ~np.uint64(0xFFFFFFF)).view(
        np.float64
    )  # whatever exp2 made of the rest
    logs = np.asarray(_core.testing.log_positive(values.tolist()))
    return {"exp2": powers, "log": [f"{bits:016x}" for bits in logs.view(np.uint64).tolist()]}


def row_laws() -> dict:
    """max, scale, cut and mass of processed rows."""
    laws = {}
    for vocab, kind in itertools.product(VOCABS, KINDS):
        row = logits(vocab, vocab).astype(np.float32)
        law = _core.testing.row_law(row.tolist(), kind)
        greedy = kind[0] == 0.0  # a greedy row's law is its largest token and nothing else
        laws[f"{vocab} {kind}"] = law[4] if greedy else [*(float(x).hex() for x in law[:3]), law[3]]
    return laws


def sampled() -> dict:
    tokens = {}
    table = sampling().prepare(len(KINDS))
    for (name, dtype), vocab in itertools.product(DTYPES.items(), VOCABS):
        rows = tensor(logits(vocab, len(KINDS), vocab), dtype)
        for purpose, step in itertools.product(("plain", "draft"), range(3)):
            drawn = ft.ops.sample(rows, sampling=table, base=torch.tensor(BASES), step=step, purpose=purpose)
            tokens[f"{name} {vocab} {purpose} {step}"] = drawn.tolist()
    return tokens


def coupled() -> dict:
    """Draws by Gumbel noise, which a drafter with a map shares: columns in another order, the same ids."""
    tokens = {}
    table = sampling().prepare(len(KINDS))
    for (name, dtype), vocab in itertools.product(DTYPES.items(), VOCABS):
        rows = tensor(logits(vocab, len(KINDS), vocab), dtype)
        reverse = torch.arange(vocab - 1, -1, -1, dtype=torch.int32)
        for step in range(3):
            call = {"sampling": table, "base": torch.tensor(BASES), "step": step, "method": "gumbel"}
            tokens[f"{name} {vocab} {step}"] = ft.ops.sample(rows, **call).tolist()
            tokens[f"{name} {vocab} {step} mapped"] = ft.ops.sample(
                rows, vocab_map=reverse, vocab_size=vocab, **call
            ).tolist()
    return tokens


def constrained() -> dict:
    """Penalties, bias and bans over a text of a dozen tokens and a drafted path."""
    tokens = {}
    temperature, top_k, top_p, min_p = (list(column) for column in zip(*KINDS, strict=True))
    table = ft.Sampling(
        temperature,
        top_k,
        top_p,
        min_p,
        seed=SEEDS,
        repetition_penalty=[1.0, 1.3, 0.8, 1.1, 1.7, 1.0, 1.3],
        frequency_penalty=[0.0, 0.3, 0.0, 1.5, -0.2, 0.1, 0.7],
        presence_penalty=[0.4, 0.0, 0.2, 0.0, 0.1, -0.3, 0.5],
        logit_bias={3: 1.25, 7: -2.5, 11: -float("inf")},
        bad_words=[[5], [2, 4]],
        min_new_tokens=8,
        stop_ids=[0, 1],
    ).prepare(len(KINDS))
    history = torch.from_numpy((noise(6, len(KINDS), 12) * 17).astype(np.int32))
    path = torch.from_numpy((noise(7, len(KINDS), 3) * 17).astype(np.int64))
    for (name, dtype), vocab in itertools.product(DTYPES.items(), VOCABS):
        rows = tensor(logits(vocab, len(KINDS), vocab), dtype)
        for drafted in range(4):
            drawn = ft.ops.sample(
                rows,
                sampling=table,
                base=torch.full((len(KINDS),), 12),
                step=drafted,
                purpose="draft",
                history=history,
                prompt_lengths=torch.full((len(KINDS),), 5),
                path=path[:, :drafted],
            )
            tokens[f"{name} {vocab} {drafted}"] = drawn.tolist()
    return tokens


def draft_laws(target: np.ndarray, dtype: torch.dtype) -> dict[str, dict]:
    """The forms in which a law may be declared, by the arguments of ``verify``."""
    rows, nodes, vocab = target.shape
    mixed = 0.6 * target[:, :-1] + 0.4 * logits(3, rows, nodes - 1, vocab)
    weights = noise(4, rows, nodes - 1, vocab) ** 4 + 2.0**-20
    probs = tensor(weights / weights.sum(-1, keepdims=True))
    order = torch.tensor([2, 0, -1, 1, -1], dtype=torch.int32).expand(rows, nodes)
    return {
        "logits": {"draft_logits": tensor(mixed, dtype)},
        "probs": {"draft_probs": probs},
        "point": {},
        "rows": {"draft_logits": tensor(mixed, dtype), "draft_row": order},
    }


def draft(law: dict, rows: int, table: ft.sampling.SamplingTable) -> torch.Tensor:
    """Chains drawn from the law where it has logits, fixed ones where it has not."""
    tokens = torch.from_numpy((noise(5, rows, DRAFTS) * 17).astype(np.int64))
    stored = law.get("draft_logits")
    for i in range(DRAFTS if stored is not None else 0):
        row = int(law["draft_row"][0, i]) if "draft_row" in law else i
        if row >= 0:
            tokens[:, i] = ft.ops.sample(
                stored[:, row], sampling=table, base=torch.tensor(BASES), step=i, purpose="draft"
            )
    return tokens


def verified() -> dict:
    emitted = {}
    table = sampling().prepare(len(KINDS))
    for (name, dtype), vocab in itertools.product(DTYPES.items(), VOCABS):
        target = logits(vocab + 10, len(KINDS), DRAFTS + 1, vocab)
        for law_name, law in draft_laws(target, dtype).items():
            drafts = draft(law, len(KINDS), table)
            if law_name == "point":
                drafts[:, :2] = tensor(target, dtype)[:, :2].argmax(-1)
            for rule in ("token", "block"):
                verdict = ft.ops.verify(
                    tensor(target, dtype), drafts, sampling=table, base=torch.tensor(BASES), rule=rule, **law
                )
                kept = [
                    row[: int(n)] for row, n in zip(verdict.tokens.tolist(), verdict.num_emitted, strict=True)
                ]
                emitted[f"{name} {vocab} {law_name} {rule}"] = [verdict.num_accepted.tolist(), kept]
    return emitted


VECTORS = {
    "philox": philox,
    "exp_log": exp_log,
    "row_laws": row_laws,
    "sampled": sampled,
    "coupled": coupled,
    "constrained": constrained,
    "verified": verified,
}


def load(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text())


def main() -> None:
    for name, compute in VECTORS.items():
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in compute().items())
        (HERE / f"{name}.json").write_text("{\n" + lines + "\n}\n")
        sys.stdout.write(f"{name}.json\n")


if __name__ == "__main__":
    main()
