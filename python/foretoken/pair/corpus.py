"""What the pair was trained on: the Python source that is installed, and the tokenizer made from it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

VOCAB, END = 4096, 0
SKIPPED_FOLDERS = {"__pycache__", "idlelib", "lib2to3"}
_log = logging.getLogger(__name__)


def python_files() -> Iterator[tuple[str, str, bool]]:
    """(path, text, whether it is held out) of every usable module, each text once."""
    library, packages = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    seen = set()
    for root in (library, packages):
        for folder, folders, files in os.walk(root):
            skipped = SKIPPED_FOLDERS | ({"site-packages", "dist-packages"} if root == library else set())
            folders[:] = sorted(set(folders) - skipped)
            for path in (Path(folder, name) for name in sorted(files) if name.endswith(".py")):
                if not 400 <= path.stat().st_size <= 400_000:
                    continue
                text = path.read_text(encoding="utf-8", errors="ignore")
                digest = hashlib.sha256(text.encode()).hexdigest()
                if digest in seen or max(map(len, text.splitlines() or [""])) > 400:
                    continue
                seen.add(digest)
                name = os.path.relpath(path, root)
                chosen = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < 3
                yield name, text, root == library and "test" not in name and chosen


def train_tokenizer(texts: list[str], path: Path) -> Any:
    """A byte-level BPE whose pieces are words, runs of punctuation, and a line break with its indentation."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?\w+|\n *| +(?= )|[^\w\s]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return tokenizer


def prepare_data(out: Path, limit_mb: float) -> None:
    """The data stage: tokenizer.json, ids.npy (texts joined by END), held.json."""
    train: list[str] = []
    held: list[tuple[str, str]] = []
    size = 0
    for name, text, held_out in python_files():
        if held_out:
            held.append((name, text))
        elif (size := size + len(text)) < limit_mb * 1e6:
            train.append(text)
    _log.info("%d files to train on, %d held out", len(train), len(held))
    tokenizer = train_tokenizer(train[:: max(1, len(train) // 6000)], out / "tokenizer.json")
    ids: list[int] = []
    for i in range(0, len(train), 512):
        for encoding in tokenizer.encode_batch(train[i : i + 512]):
            ids += [*encoding.ids, END]
    np.save(out / "ids.npy", np.array(ids, dtype=np.int16))
    (out / "held.json").write_text(json.dumps(held))
