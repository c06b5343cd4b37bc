"""One random program over paged, sliding, quantised and recurrent caches, and lazy moves."""

from __future__ import annotations

import dataclasses

import pytest

from cache_machine import Combined
from hf_models import one_thread
from mirrored import TEST_DEVICE
from paged_machine import Setting

__all__ = ["one_thread"]

SETTINGS = [
    Setting(4, pages=18),
    Setting(4, pages=18, behind=True),
    Setting(1, pages=60),
    Setting(3, pages=22, behind=True),
    Setting(16, pages=8, max_length=60),
]


@pytest.mark.parametrize("setting", SETTINGS[:2], ids=str)
def test_one_program_over_all_caches(setting: Setting) -> None:
    machine = Combined(setting, seed=1)
    machine.run(700, check_every=2)
    assert machine.missing() == []


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_million_steps_over_all_caches(setting: Setting) -> None:
    """10^6 in all; kinds of quantised caches, page sizes and windows differ from part to part."""
    never: set[str] | None = None
    for part in range(20):
        machine = Combined(setting, seed=100 + part)
        machine.run(10_000, check_every=3)
        never = set(machine.missing()) & (set(machine.missing()) if never is None else never)
    assert not never


@pytest.mark.cuda
def test_one_program_over_all_caches_on_a_device() -> None:
    machine = Combined(dataclasses.replace(SETTINGS[0], device=TEST_DEVICE), seed=1)
    machine.run(700, check_every=5)
    assert machine.missing() == []


@pytest.mark.cuda
@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_steps_over_all_caches_on_a_device(part: int) -> None:
    """10^5 in all; parts may run side by side."""
    setting = SETTINGS[part % len(SETTINGS)]
    machine = Combined(dataclasses.replace(setting, device=TEST_DEVICE), seed=200 + part)
    machine.run(10_000, check_every=10)
