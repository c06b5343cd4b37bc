"""The kernels for chains and trees on an emulated device: their sources, compiled for the host, and calls.

``tests/emulated`` stands for CUDA. What the host compiler cannot read is replaced where it stands: the edits
below, each of a line that has to be there once.
"""

from __future__ import annotations

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foretoken as ft
from foretoken import _core

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc"
MEMORY = (
    "extern __shared__ __align__(16) unsigned char memory[];",
    "char* const memory = emulated::current->block->shared;",
)
EDITS = {
    "verify_chain.cu": MEMORY,
    "verify_drawn.cu": MEMORY,
    "verify_tree.cu": MEMORY,
    "tile_stats.cuh": (
        'asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(a), "f"(b));',
        "max = a != a || b != b ? NAN : fmaxf(a, b);",
    ),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64]
DEVICES = 6  # kDevices of emulated/include/cuda_runtime.h


class _Tensor(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("dtype", c_int32),
        ("rank", c_int32),
        ("shape", c_int64 * 5),
        ("strides", c_int64 * 5),
    )


class _Law(Structure):
    _fields_ = (
        ("temperature", POINTER(c_float)),
        ("top_k", POINTER(c_int32)),
        ("top_p", POINTER(c_float)),
        ("min_p", POINTER(c_float)),
        ("seed", POINTER(c_uint64)),
        ("size", c_int64),
        ("weighs", c_int32),
        ("filters", c_int32),
    )


INPUTS = [
    "target_logits",
    "target_stats",
    "draft_tokens",
    "num_drafts",
    "draft_logits",
    "draft_records",
    "base",
    "slots",
    "parents",
    "draft_row",
    "row_offsets",
]
OUTPUTS = [
    "tokens",
    "num_emitted",
    "num_accepted",
    "path",
    "next_token",
    "next_lengths",
    "status",
    "path_rows",
]


class _Call(Structure):
    _fields_ = (
        *((name, _Tensor) for name in INPUTS + OUTPUTS),
        ("law", _Law),
        ("rule", c_int32),
        ("draw", c_int32),
        ("device", c_int32),
        ("impatience", c_uint32),
        ("schedule", c_uint64),
    )


class EmulationError(Exception):
    """Threads that wait for what never comes, or a word that was not left as it was."""


class NotEmulatedError(Exception):
    """A call that goes to the general kernel."""


def build(folder: Path) -> ctypes.CDLL:
    (folder / "cuda").mkdir()
    for name, (line, other) in EDITS.items():
        text = (SOURCES / "cuda" / name).read_text(encoding="utf-8")
        assert text.count(line) == 1, name
        (folder / "cuda" / name).write_text(text.replace(line, other), encoding="utf-8")
    emulated = TESTS / "emulated"
    paths = [f"-I{path}" for path in (folder, emulated / "include", emulated, SOURCES)]
    fused = ["-mfma"] if "fma" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else []  # else by libm
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", *fused, "-fPIC", "-w", *paths]
    sources = sorted(emulated.glob("*.cpp"))
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(
            lambda source, made: subprocess.run([*command, "-c", str(source), "-o", made], check=True),
            sources,
            objects,
        ):
            pass
    library = folder / "emulated.so"
    subprocess.run(["g++", "-shared", *objects, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_verify.restype = c_char_p
    return loaded


def verify(
    library: ctypes.CDLL,
    given: dict[str, Any],
    law: ft.Sampling,
    out: ft.ops.Verdict,
    *,
    device: int,
    impatience: int,
    schedule: int,
) -> None:
    """``ops.verify`` on the emulated device. ``law``: a column for each number, with seeds."""
    call = _Call()
    for name in INPUTS:
        setattr(call, name, _tensor(given.get(name)))
    for name in OUTPUTS:
        setattr(call, name, _tensor(getattr(out, name)))
    columns = {
        "temperature": torch.tensor(law.temperature, dtype=torch.float32),
        "top_k": torch.tensor(law.top_k, dtype=torch.int32),
        "top_p": torch.tensor(law.top_p, dtype=torch.float32),
        "min_p": torch.tensor(law.min_p, dtype=torch.float32),
    }
    for name, column in columns.items():
        kind = c_int32 if name == "top_k" else c_float
        setattr(call.law, name, ctypes.cast(column.data_ptr(), POINTER(kind)))
    seeds = (c_uint64 * len(law.seed))(*law.seed)  # type: ignore[arg-type]
    call.law.seed = ctypes.cast(seeds, POINTER(c_uint64))
    call.law.size = len(columns["top_k"])
    top_k, top_p, drawn = columns["top_k"] > 0, columns["top_p"] < 1, columns["temperature"] != 0
    call.law.weighs = int((drawn & top_p & ~top_k).any())
    call.law.filters = int((drawn & (top_k | top_p | (columns["min_p"] > 0))).any())
    call.rule = int(getattr(_core.Rule, given["rule"]))
    call.draw = int(getattr(_core.Draw, given["draw"]))
    call.device, call.impatience, call.schedule = device, impatience, schedule
    wrong = library.emulated_verify(ctypes.byref(call))
    if wrong == b"not emulated":
        raise NotEmulatedError
    if wrong is not None:
        raise EmulationError(wrong.decode())


def _tensor(value: Tensor | None) -> _Tensor:
    if value is None:
        return _Tensor()
    tensor = _Tensor(value.data_ptr(), DTYPES.index(value.dtype), value.dim())
    tensor.shape[: value.dim()] = value.shape
    tensor.strides[: value.dim()] = value.stride()
    return tensor


def last_launch(library: ctypes.CDLL) -> tuple[int, int]:
    """Blocks, and blocks of a cluster."""
    blocks, cluster = c_uint32(), c_uint32()
    library.emulated_launch(ctypes.byref(blocks), ctypes.byref(cluster))
    return blocks.value, cluster.value
