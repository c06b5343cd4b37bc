"""What runs here: a report to paste into an issue."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import foretoken
from foretoken import _core

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "rich")


def collect() -> dict[str, Any]:
    """Gather versions, platform, processor, threads, build and devices.

    Looks at installed packages through their metadata, so it imports none that was not imported.

    Returns
    -------
    dict
        JSON-ready. ``notes`` lists, in words, what is likely to be in the way.

    Examples
    --------
    >>> collect()["cpu"]["path"] in {"portable", "avx2", "avx512"}
    True
    """
    report: dict[str, Any] = {
        "foretoken": foretoken.__version__,
        "location": str(Path(foretoken.__file__).parent),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {"model": _cpu_model(), **_core.cpu_info()},
        "threads": _threads(),
        "build": _core.build_info(),
        "cuda": _core.cuda_info(),
        "torch": {
            "cuda": torch.version.cuda,
            "cuda_available": torch.cuda.is_available(),
            "dlpack_exchange_table": hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
        },
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("FORETOKEN_")},
    }
    report["notes"] = _notes(report)
    return report


def render(report: dict[str, Any]) -> str:
    """Lay a report of :func:`collect` out as lines of text."""
    build, cuda, cpu, threads = report["build"], report["cuda"], report["cpu"], report["threads"]
    kind = f"{build['compiler']}, {build['build_type']}"
    if build["sanitize"]:
        kind += f", sanitizers {build['sanitize']}"
    if build["cuda"]:
        compiled = f"yes, toolkit {build['cuda_toolkit']} for {', '.join(build['cuda_architectures'])}"
    else:
        compiled = "no"
    rows = [
        ("foretoken", f"{report['foretoken']} at {report['location']}"),
        ("python", report["python"]),
        ("platform", report["platform"]),
        *((name, version or "not installed") for name, version in report["packages"].items()),
        ("cpu", cpu["model"]),
        ("cpu features", ", ".join(cpu["features"]) or "none that matter here"),
        ("row loops", f"{cpu['path']}: {cpu['reason']}"),
        ("matrix units", f"{cpu['matrix']}, for attention of bfloat16"),
        ("threads", f"{threads['foretoken']} (torch {threads['torch']}, usable cores {threads['cores']})"),
        ("openmp", ", ".join(threads["openmp_runtimes"]) or "none loaded"),
        ("build", kind),
        ("built with CUDA", f"{compiled}: {build['cuda_reason']}"),
        ("CUDA", cuda["detail"] or cuda["status"]),
        *((f"cuda:{i}", _device_line(device)) for i, device in enumerate(cuda["devices"])),
        ("torch CUDA", report["torch"]["cuda"] or "a build without"),
        *report["environment"].items(),
        *(("note", note) for note in report["notes"]),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``foretoken info``."""
    parser = commands.add_parser("info", help="what runs here: a report to paste into an issue")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    report = collect()
    sys.stdout.write((json.dumps(report, indent=2) if arguments.json else render(report)) + "\n")
    return 0


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # names the build (+cpu, +cu130), which the metadata may not
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _threads() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return {
        "foretoken": _core.num_threads(),
        "torch": torch.get_num_threads(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "openmp_runtimes": _openmp_runtimes(),
    }


def _openmp_runtimes() -> list[str]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


def _device_line(device: dict[str, Any]) -> str:
    gib = device["memory_bytes"] / 2**30
    usable = "" if device["runnable"] else ", NOT served by this build's architectures"
    return (
        f"{device['name']}, compute capability {device['compute_capability']}, "
        f"{device['multiprocessors']} multiprocessors, {gib:.0f} GiB{usable}"
    )


def _notes(report: dict[str, Any]) -> list[str]:
    notes = []
    if report["torch"]["cuda_available"] and not report["build"]["cuda"]:
        notes.append("torch sees a GPU, but this build of foretoken has no CUDA code")
    if not report["torch"]["dlpack_exchange_table"]:
        notes.append("this torch has no DLPack exchange table: every call takes some microseconds more")
    if len(report["threads"]["openmp_runtimes"]) > 1:
        notes.append("two OpenMP runtimes are loaded: threads may be oversubscribed; import torch first")
    if report["build"]["sanitize"] or report["build"]["build_type"] != "Release":
        notes.append("this is no release build: do not judge its speed")
    return notes
