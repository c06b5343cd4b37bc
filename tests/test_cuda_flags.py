"""For which devices CUDA sources are compiled, and out of which translation."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def flags(architectures: str, *, hopper: bool, folder: Path) -> list[str]:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    script = folder / "flags.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.24)\n"  # as the project asks for; policies go by it
        f"include({ROOT / 'cmake' / 'ForetokenCuda.cmake'})\n"
        f"set(CMAKE_CUDA_ARCHITECTURES {architectures})\n"
        f"_foretoken_code_flags({'TRUE' if hopper else 'FALSE'} found)\n"
        'message("${found}")\n'
    )
    done = subprocess.run([cmake, "-P", script], capture_output=True, text=True, check=True)
    return [flag.removeprefix("--generate-code=arch=") for flag in done.stderr.strip().split(";")]


@pytest.mark.parametrize(
    ("architectures", "hopper", "expected"),
    [
        (
            "80-real 90a-real 100-real 90-virtual",
            False,
            ["compute_80,code=[sm_80]", "compute_90,code=[sm_90a,sm_100,compute_90]"],
        ),
        (
            "80-real 90a-real 100-real 90-virtual",
            True,
            [
                "compute_80,code=[sm_80]",
                "compute_90a,code=[sm_90a]",
                "compute_90,code=[sm_100,compute_90]",
            ],
        ),
        ("90a-real", False, ["compute_90a,code=[sm_90a]"]),
        ("90a-real 90-virtual", True, ["compute_90a,code=[sm_90a]", "compute_90,code=[compute_90]"]),
        ("89", False, ["compute_89,code=[compute_89,sm_89]"]),
        ("90 120", False, ["compute_120,code=[compute_120,sm_120]", "compute_90,code=[compute_90,sm_90]"]),
    ],
)
def test_one_translation_serves_all_devices_it_can(
    architectures: str, hopper: bool, expected: list[str], tmp_path: Path
) -> None:
    assert flags(architectures, hopper=hopper, folder=tmp_path) == expected


def test_products_of_warpgroups_are_translated_for_the_devices_that_have_them() -> None:
    listed = re.search(r"set\(hopper_cuda_sources\n(.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.DOTALL)
    assert listed is not None
    asking = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        if re.search(r"\blaunch_kind<|__CUDA_ARCH_FEAT|__CUDA_ARCH_SPECIFIC", path.read_text())
    ]
    assert listed[1].split() == asking
    headers = [
        path.name
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in {".cuh", ".hpp"} and "__CUDA_ARCH_FEAT" in path.read_text()
    ]
    assert [name for name in headers if not name.startswith("tree_attention_")] == []
