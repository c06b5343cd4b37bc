"""Tensors that end, or begin, where readable memory does: an element read beyond them ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

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
