"""Where rounds stay on a device."""

from __future__ import annotations

import functools

import torch

from foretoken import _core, ops
from foretoken.sampling import Sampling

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


def why_no_edits_on(device: torch.device) -> str | None:
    """Why laws with penalties, bias or bans cannot be sampled on this device; None: they can."""
    return _reason(device, edits=True) if device.type == "cuda" else None


def place_of(device: torch.device | str) -> torch.device:
    """The device of a session, with its index.

    Raises
    ------
    ValueError
        No session can run there.
    """
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    if place.type == "cuda" and (reason := why_not_on(place)) is not None:
        raise ValueError(f"device: expected cpu, got {device}: {reason}")
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return place


@functools.cache
def _reason(device: torch.device, edits: bool = False) -> str | None:
    info = _core.cuda_info()
    if info["status"] != "ready":
        return str(info["detail"] or f"CUDA is {info['status']}")
    law = Sampling(logit_bias={0: 1.0} if edits else {}, seed=0)
    try:
        with torch.cuda.device(device):
            base = torch.ones(1, dtype=torch.int64, device=device)
            ops.verify(torch.zeros(1, 1, 2, device=device), base[:, None][:, :0], sampling=law, base=base)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None
