"""The pair's files: int8 matrices with one float32 scale per output row, read without any extra package."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
_DTYPES = {"I8": torch.int8, "F32": torch.float32}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file: 8 bytes of header length, a JSON header, then the raw data.

    Raises
    ------
    ValueError
        If the file holds something else than int8 and float32 tensors, or is cut short.
    """
    data = bytearray(path.read_bytes())
    if len(data) < 8 or 8 + (size := struct.unpack_from("<Q", data)[0]) > len(data):
        raise ValueError(f"{path}: not a safetensors file")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name}: expected I8 or F32, got {entry['dtype']}")
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        if stop > len(data):
            raise ValueError(f"{path}: {name}: the file ends before the tensor does")
        dtype = _DTYPES[entry["dtype"]]
        flat = torch.frombuffer(data, dtype=dtype, offset=start, count=(stop - start) // dtype.itemsize)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def dequantize(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float32 weights: `NAME` times `NAME.scale` ([rows, 1]) where there is one, `NAME` itself where not."""
    weights = {}
    for name, tensor in stored.items():
        if name.endswith(".scale"):
            continue
        scale = stored.get(name + ".scale")
        weights[name] = tensor.clone() if scale is None else tensor.float().mul_(scale)
    return weights


def load_weights(
    role: str, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and configuration of one model of the pair.

    Parameters
    ----------
    role : str
        "target" or "draft".
    dtype : torch.dtype
        What the float32 weights are converted to.

    Returns
    -------
    (dict of str to Tensor, dict)
        The names and shapes of a LlamaForCausalLM state dict (without `lm_head.weight`, which is the
        embedding), and the fields of `config.json`.

    Raises
    ------
    ValueError
        If `role` is neither "target" nor "draft".
    """
    if role not in ("target", "draft"):
        raise ValueError(f'role: expected "target" or "draft", got {role!r}')
    folder = FOLDER / role
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = dequantize(read_safetensors(folder / "model.int8.safetensors"))
    return {name: tensor.to(dtype) for name, tensor in weights.items()}, config
