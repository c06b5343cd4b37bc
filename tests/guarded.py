"""Tensors in memory of our own making: right beside what cannot be read, or far more than there is.

An element read beyond a guarded tensor ends the process. A spread one has its rows so far apart that offsets
leave 32 bits; only pages that are touched take memory.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

FAR = 2**31 + 3  # elements between two rows
_RESERVE_NOTHING = 0x4000  # MAP_NORESERVE of Linux
_LIBC = ctypes.CDLL(None, use_errno=True)
_NOTHING = 0  # PROT_NONE


def guarded(tensor: Tensor, *, front: bool = False) -> Tensor:
    """A copy of ``tensor`` with unreadable memory right behind it, or right in front of it."""
    contiguous = tensor.contiguous()
    size = contiguous.numel() * contiguous.element_size()
    inner = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, inner + 2 * mmap.PAGESIZE)
    start = mmap.PAGESIZE if front else mmap.PAGESIZE + inner - size
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory alive
    copy = whole[start : start + size].view(contiguous.dtype).view(contiguous.shape)
    copy.copy_(contiguous)
    for page in (0, mmap.PAGESIZE + inner):
        address = ctypes.c_void_p(whole.data_ptr() + page)
        if _LIBC.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), _NOTHING) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return copy


def virtual(elements: int, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros that may be larger than the machine's memory."""
    size = elements * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _RESERVE_NOTHING
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)


def spread(tensor: Tensor, *, apart: int = FAR) -> Tensor:
    """A copy whose first dimension has a stride of ``apart`` elements."""
    rows = tensor.shape[0]
    inner = tensor[0].numel() if rows else 0
    if rows < 2 or inner == 0:
        return tensor.clone()
    memory = virtual((rows - 1) * apart + inner, tensor.dtype)
    strides = (apart, *tensor[0].contiguous().stride())
    copy = torch.as_strided(memory, tensor.shape, strides)
    copy.copy_(tensor)
    return copy
