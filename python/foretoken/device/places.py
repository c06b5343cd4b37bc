"""Where rounds stay on a device."""

from __future__ import annotations

import functools

import torch

from foretoken import _core, ops

# Tests add the CPU.
AHEAD_ON = {"cuda"}


def runs_ahead(device: torch.device) -> bool:
    """Whether sessions on this device issue rounds ahead of their results."""
    return device.type in AHEAD_ON


def why_not_on(device: torch.device) -> str | None:
    """Why no session can run on this device; None: one can."""
    if device.type == "cpu":
        return None
    return _reason(device) if device.type == "cuda" else f"there are no kernels for {device.type}"


@functools.cache
def _reason(device: torch.device) -> str | None:
    info = _core.cuda_info()
    if info["status"] != "ready":
        return str(info["detail"] or f"CUDA is {info['status']}")
    base = torch.ones(1, dtype=torch.int64, device=device)
    try:
        ops.verify(torch.zeros(1, 1, 2, device=device), base[:, None][:, :0], base=base)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None
