"""Where rounds stay on a device."""

from __future__ import annotations

import torch

from foretoken import _core

# Tests add the CPU.
AHEAD_ON = {"cuda"}


def runs_ahead(device: torch.device) -> bool:
    """Whether sessions on this device issue rounds ahead of their results."""
    return device.type in AHEAD_ON


def why_not_on(device: torch.device) -> str | None:
    """Why no session can run on this device; None: one can."""
    if device.type == "cuda":
        info = _core.cuda_info()
        return None if info["status"] == "ready" else str(info["detail"] or info["status"])
    return None if runs_ahead(device) or device.type == "cpu" else f"no kernels for {device.type}"
