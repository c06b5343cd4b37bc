"""`foretoken info`: what it says has to be true of this process, and it has to say it anywhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import foretoken
from foretoken import _core, info
from foretoken.cli import main

ROOT = Path(__file__).parent.parent


def run_python(program: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_json_and_text_carry_the_same_findings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert report["foretoken"] == foretoken.__version__
    assert report["packages"]["torch"] == torch.__version__
    for finding in (report["cpu"]["path"], report["build"]["cuda_reason"], report["packages"]["torch"]):
        assert finding in text


def test_threads_follow_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert _core.num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert _core.num_threads() == before


def test_one_openmp_runtime_is_loaded() -> None:
    program = "import foretoken.info as i; print(len(i.collect()['threads']['openmp_runtimes']))"
    assert int(run_python(program)) <= 1


def test_the_cpu_path_can_be_chosen_and_is_explained() -> None:
    program = "from foretoken import _core; c = _core.cpu_info(); print(c['path'], '|', c['reason'])"
    assert run_python(program, FORETOKEN_CPU="portable").startswith("portable | FORETOKEN_CPU asks for it")
    assert "sse9" in run_python(program, FORETOKEN_CPU="sse9")


def test_notes_name_what_is_in_the_way() -> None:
    report = info.collect()
    report["torch"]["cuda_available"] = True
    report["build"]["cuda"] = False
    report["threads"]["openmp_runtimes"] = ["libgomp.so.1", "libomp.so"]
    notes = " ".join(info._notes(report))
    assert "no CUDA code" in notes
    assert "two OpenMP runtimes" in notes


def test_a_device_this_build_cannot_serve_is_called_out() -> None:
    device = {
        "name": "GeForce 2",
        "compute_capability": "7.0",
        "multiprocessors": 4,
        "memory_bytes": 2**31,
        "runnable": False,
    }
    assert "NOT served" in info._device_line(device)


def test_build_and_report_agree_about_cuda() -> None:
    build, cuda = _core.build_info(), _core.cuda_info()
    assert build["cuda"] == bool(build["cuda_architectures"])
    assert (cuda["status"] == "not built") == (not build["cuda"])
    assert build["cuda_reason"]
    if build["cuda"] and cuda["status"] != "ready":
        assert cuda["detail"]


def test_importing_foretoken_does_not_import_transformers() -> None:
    program = "import sys, foretoken; print('transformers' in sys.modules)"
    assert run_python(program).strip() == "False"


def test_version_is_written_once() -> None:
    assert re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE) is None


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["nonsense"])
    assert stopped.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_self_check_covers_what_it_says() -> None:
    results = _core.testing.self_check(4096, seed=3, device="cpu")
    assert results.dtype == np.uint64
    distinct = [len(np.unique(column)) for column in results.T]
    assert min(distinct) >= 4  # accepts_* gives two bits, everything else varies freely
    assert np.array_equal(results, _core.testing.self_check(4096, seed=3, device="cpu"))


def test_self_check_on_a_cpu_build_is_refused_in_words() -> None:
    if _core.build_info()["cuda"]:
        pytest.skip("this build has CUDA code")
    with pytest.raises(
        ValueError, match="device: expected cpu, got cuda: this build of foretoken is CPU only"
    ):
        _core.testing.self_check(1, seed=0, device="cuda")


@pytest.mark.cuda
def test_device_arithmetic_equals_the_hosts_bit_for_bit() -> None:
    host = _core.testing.self_check(1 << 18, seed=11, device="cpu")
    device = _core.testing.self_check(1 << 18, seed=11, device="cuda")
    assert (host != device).sum(axis=0).tolist() == [0] * host.shape[1]
