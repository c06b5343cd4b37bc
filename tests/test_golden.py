"""Golden vectors: what every seed has ever meant, on every CPU path this machine has."""

from __future__ import annotations

import json

import numpy as np
import pytest

from foretoken import _core
from golden import regenerate
from reference import philox

PATHS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=PATHS)
def cpu_path(request):
    before = _core.testing.cpu_path()
    if not _core.testing.force_cpu_path(request.param):
        pytest.skip(f"no {request.param} path on this machine or in this build")
    yield request.param
    _core.testing.force_cpu_path(before)


@pytest.mark.parametrize("name", ["row_laws", "sampled", "coupled", "constrained", "verified"])
def test_every_path_gives_the_committed_integers(cpu_path, name):
    assert _core.testing.cpu_path() == cpu_path
    found = json.loads(json.dumps(regenerate.VECTORS[name]()))
    expected = regenerate.load(name)
    assert found.keys() == expected.keys()
    different = [key for key in expected if found[key] != expected[key]]
    assert not different


@pytest.mark.parametrize("name", ["philox", "exp_log"])
def test_arithmetic_gives_the_committed_bits(name):
    assert json.loads(json.dumps(regenerate.VECTORS[name]())) == regenerate.load(name)


def test_philox_agrees_with_the_oracle():
    for name, words in regenerate.load("philox")["words"].items():
        key, counter = name.split(" ", 1)
        expected = philox(list(eval(counter)), [int(key) & 0xFFFFFFFF, int(key) >> 32])
        assert words == expected


def test_exp2_is_as_accurate_as_documented():
    """9.2e-8 of the polynomial, half a unit of the result's last place, a quarter of the fraction's."""
    rng = np.random.default_rng(0)
    for scale in (1.0, 1.442695, 0.25, 50.0):
        scale = float(np.float32(scale))
        distances = (-125.0 / scale * rng.random(20_000) ** 2).astype(np.float32)
        found = np.asarray(_core.testing.exp2_scaled(distances.tolist(), scale)).astype(np.float64)
        exact = np.exp2(distances.astype(np.float64) * scale)
        assert np.abs(found / exact - 1.0).max() < 9.2e-8 + 2**-24 + 2**-26
        assert _core.testing.exp2_scaled([0.0], scale)[0] == 1.0


def test_log_is_as_accurate_as_documented():
    rng = np.random.default_rng(1)
    values = np.concatenate([np.exp2(rng.uniform(-300, 300, 20_000)), 1.0 + rng.uniform(-0.3, 0.4, 20_000)])
    found = np.asarray(_core.testing.log_positive(values.tolist()))
    exact = np.log(values)
    assert (np.abs(found - exact) <= 2.0**-52 * np.maximum(1.0, 2.0 * np.abs(exact))).all()
