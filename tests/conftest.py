"""What every test file shares: which devices there are, and a clean start for torch's generator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from foretoken import _core
from mirrored import TEST_DEVICE, Mirror, mirroring


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--also-on", metavar="DEVICE", help="make every call of the kernels on this device too")


def cuda_is_usable() -> bool:
    return torch.cuda.is_available() and _core.cuda_info()["status"] == "ready"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _also_on(request: pytest.FixtureRequest) -> Iterator[None]:
    device = request.config.getoption("--also-on")
    with mirroring(device) if device else contextlib.nullcontext() as mirror:
        yield
    assert mirror is None or not mirror.unserved, mirror.unserved


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    """Of this test's calls, on the CUDA device."""
    with mirroring(TEST_DEVICE) as mirror:
        yield mirror
    assert not mirror.unserved, mirror.unserved


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and TEST_DEVICE == "cuda" and not cuda_is_usable():
        skip = pytest.mark.skip(reason="needs a CUDA build of foretoken and a CUDA device")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture
def figure(request: pytest.FixtureRequest):
    """Writes a figure into the report (``--junitxml``), where ``record_property`` would warn."""

    def write(name: str, value: float | str | torch.Tensor) -> None:
        # As Python's own number: a test may run in a process that sends its report to another.
        plain = value.item() if hasattr(value, "item") else value
        request.node.user_properties.append((name, plain))

    return write


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
