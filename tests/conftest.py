"""What every test file shares: which devices there are, and a clean start for torch's generator."""

from __future__ import annotations

import pytest
import torch

from foretoken import _core


def cuda_is_usable() -> bool:
    return torch.cuda.is_available() and _core.cuda_info()["status"] == "ready"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and not cuda_is_usable():
        skip = pytest.mark.skip(reason="needs a CUDA build of foretoken and a CUDA device")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture
def figure(request: pytest.FixtureRequest):
    """Writes a figure into the report (``--junitxml``), where ``record_property`` would warn."""
    return lambda name, value: request.node.user_properties.append((name, value))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
