"""Scratch of verifications that bring no buffers: kept between calls, as one stream runs them one by one.

The kernels leave scratch fit for another call of as many rows. Nothing is kept on the CPU, and in a captured
graph, which outlives what it is captured among.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_BYTES = 64 << 20  # kept in all; what needs more is made anew for each call
Key = tuple[int, int, int]  # device, stream and rows, as the native side looks them up

KEPT: dict[Key, Tensor] = {}


def key_of(tensor: Tensor, batch: int) -> Key | None:
    """None where nothing may be kept."""
    if not tensor.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    index = tensor.get_device()
    if index != torch.cuda.current_device():  # whose stream may be capturing is not known of
        return None
    return index, torch._C._cuda_getCurrentRawStream(index), batch


def keep(key: Key | None, scratch: Tensor) -> None:
    """In place of what was kept for the key; the oldest makes room."""
    if key is None:
        return
    KEPT.pop(key, None)
    room = MOST_BYTES - scratch.nbytes
    if room < 0:
        return
    while sum(other.nbytes for other in KEPT.values()) > room:
        del KEPT[next(iter(KEPT))]
    KEPT[key] = scratch
