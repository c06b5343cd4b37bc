"""Streams wait for each other where they have to: torch's sanitizer over rounds that the host issues."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mirrored import TEST_DEVICE

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(TEST_DEVICE != "cuda", reason="streams are CUDA's"),
]
HERE = Path(__file__).parent


def sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "stream_sanitizer.py", *arguments]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)


def test_rounds_of_the_host_are_clean():
    done = sanitized()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert done.stdout.count(": clean") == 6, done.stdout


def test_a_wait_that_is_missing_is_found():
    done = sanitized("defect")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-1000:]
    assert "data race" in done.stdout
