"""Rounds whose state stays on a device: issued one ahead of what the host knows, and read one late."""

from __future__ import annotations

from foretoken.device.clock import mark_of, seconds_between
from foretoken.device.completion import Job, by_host, completions_of, tiers_of
from foretoken.device.drafting import DeviceDrafter, drafter_on
from foretoken.device.loop import LoopGraph, LoopTier, is_unrolled
from foretoken.device.places import place_of, runs_ahead, why_no_edits_on, why_not_on
from foretoken.device.replay import replays_of
from foretoken.device.ring import RecordRing
from foretoken.device.rounds import DeviceRounds
from foretoken.step import numbers

__all__ = [
    "DeviceDrafter",
    "DeviceRounds",
    "Job",
    "LoopGraph",
    "LoopTier",
    "RecordRing",
    "by_host",
    "completions_of",
    "drafter_on",
    "is_unrolled",
    "mark_of",
    "numbers",
    "place_of",
    "replays_of",
    "runs_ahead",
    "seconds_between",
    "tiers_of",
    "why_no_edits_on",
    "why_not_on",
]
