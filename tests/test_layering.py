"""The direction of the house: a file may use what stands to its right, never to its left.

csrc     bindings -> dispatch -> {cpu, cuda, loop, drafters} -> ops, math
python   cli -> {demo, hf, pair, info}
         hf -> generate -> session -> {device, controller} -> {drafters, request, metrics}
         {hf, session} -> cache -> {device, step}
         drafters -> {tree, proposal} -> step -> ops -> sampling -> _core
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Which floors a floor of csrc may include, besides itself.
NATIVE = {
    "math": set(),
    "ops": {"math"},
    "cpu": {"ops", "math"},
    "cuda": {"ops", "math"},
    "drafters": set(),
    "loop": {"drafters", "ops", "math"},
    "dispatch": {"cpu", "cuda", "loop", "drafters", "ops", "math"},
    "bindings": {"dispatch", "cpu", "loop", "drafters", "ops", "math", "third_party"},
}
PYTHON_HEADERS = re.compile(r"^(pybind11/|Python\.h|torch/|ATen/|c10/)")
CUDA_HEADERS = re.compile(r"^(cuda|cub/|cooperative_groups|thrust/)")
X86_HEADERS = re.compile(r"^(\w*mmintrin\.h|immintrin\.h|x86intrin\.h)$")
FORBIDDEN_CALLS = re.compile(
    r"(?<![\w.>])(printf|fprintf|puts|assert|abort|exit|_exit|terminate)\s*\(|std::c(out|err|log)\b"
)
X86_INTRINSICS = re.compile(r"\b(_mm\d*_\w+|__m\d+\w*)\b")
# Sizes and offsets that reach 2^31 in a batch of logits; a name is enough to catch the habit.
NARROW_INDEX = re.compile(
    r"\b(?:int|unsigned|u?int32_t)\s+(?:\w*_)?(?:offset|stride|element|elements|vocab|vocabulary|total)\b\s*[=;,)]"
)
NEVER = re.compile(r"(?!)")
NARROW_GRID = re.compile(r"(?<!static_cast<int64_t>\()blockIdx\.[xyz]\)?\s*\*")

# Which modules of the package a module may import, besides itself. `foretoken` itself: its lazy attributes.
BASE = {"_core", "sampling", "ops"}
LOOP = BASE | {"step", "tree", "metrics", "request", "drafters", "controller", "device", "session"}
PYTHON = {
    "_core": set(),
    "sampling": {"_core"},
    "ops": {"_core", "sampling"},
    "metrics": BASE,
    "request": BASE | {"metrics"},
    "step": BASE,
    "controller": set(),
    "tree": BASE | {"step"},
    "proposal": BASE,
    "drafters": BASE | {"step", "tree", "proposal"},
    "device": BASE | {"step", "tree", "metrics", "request", "drafters"},
    "cache": BASE | {"device", "step"},
    "session": LOOP,
    "generate": LOOP,
    "hf": LOOP | {"generate", "cache"},
    "pair": LOOP | {"generate", "hf"},
    "demo": LOOP | {"generate", "hf", "pair", "info", "foretoken"},
    "info": {"_core", "foretoken"},
    "plot": set(),
    "cli": {"hf", "pair", "info", "demo", "plot", "foretoken"},
    "__main__": {"cli"},
    "__init__": LOOP | {"cache", "generate", "hf", "pair"},
}
MAY_IMPORT_TRANSFORMERS = {"hf"}


def strip_comments_and_strings(text: str) -> str:
    pattern = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'", re.DOTALL)
    return pattern.sub(lambda match: '""' if match[0].startswith('"') else " ", text)


def native_files(root: Path) -> Iterator[Path]:
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in {".hpp", ".cpp", ".inl", ".cu", ".cuh", ".in"} and "third_party" not in path.parts:
            yield path


def check_include(relative: Path, floor: str, quoted: bool, header: str) -> str | None:
    if not quoted:
        if PYTHON_HEADERS.match(header) and floor != "bindings":
            return f"includes <{header}> below the bindings"
        if CUDA_HEADERS.match(header) and floor != "cuda":
            return f"includes <{header}> outside csrc/cuda"
        if X86_HEADERS.match(header) and relative.parts[:2] != ("cpu", "x86"):
            return f"includes <{header}> outside csrc/cpu/x86"
        return None
    target = header.split("/")[0].removesuffix(".hpp")
    if target == "build_info":
        return None if floor == "bindings" else "includes build_info.hpp below the bindings"
    if target == "third_party" and not relative.name.startswith("boundary"):
        return f"includes {header}: only the boundary knows DLPack"
    if target != floor and target not in NATIVE[floor]:
        return f"includes {header}: {floor} may not use {target}"
    return None


def native_violations(root: Path) -> list[str]:
    found = []
    for path in native_files(root):
        relative = path.relative_to(root / "csrc")
        floor = "dispatch" if relative.name == "dispatch.hpp" else relative.parts[0]
        text = path.read_text()
        code = strip_comments_and_strings(text)
        for opening, header in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text, re.MULTILINE):
            problem = check_include(relative, floor, opening == '"', header)
            if problem:
                found.append(f"{relative}: {problem}")
        for pattern, complaint in (
            (FORBIDDEN_CALLS, "prints, asserts or ends the process"),
            (NARROW_INDEX if floor != "bindings" else NEVER, "keeps a size or an offset in 32 bits"),
            (NARROW_GRID, "multiplies a block index in 32 bits"),
        ):
            found += [f"{relative}: {match[0].strip()} {complaint}" for match in pattern.finditer(code)]
        if relative.parts[:2] != ("cpu", "x86") and X86_INTRINSICS.search(code):
            found.append(f"{relative}: x86 intrinsics outside csrc/cpu/x86")
    return found


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, which never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from runtime_nodes(node)


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Full names of everything imported anywhere in a module, lazily or not, also by import_module("...")."""
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "foretoken" if node.level else (node.module or "")
            if node.level and node.module:
                base = f"foretoken.{node.module}"
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.args[0].value


def python_violations(root: Path) -> list[str]:
    package = root / "python" / "foretoken"
    floors = {path.stem if path.is_file() else path.name for path in package.iterdir()} | PYTHON.keys()
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        floor = relative.parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text())
        for name in imported_modules(tree):
            parts = name.split(".")
            if parts[0] == "transformers" and floor not in MAY_IMPORT_TRANSFORMERS:
                found.append(f"{relative}: imports transformers; only foretoken.hf may")
            if parts[0] != "foretoken":
                continue
            target = parts[1] if len(parts) > 1 and parts[1] in floors else "foretoken"
            if target != floor and target not in PYTHON.get(floor, set()):
                found.append(f"{relative}: imports {name}: {floor} may not use {target}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                found.append(f"{relative}:{node.lineno}: assert in shipped code")
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in {"print", "exit"}
            ):
                found.append(f"{relative}:{node.lineno}: {node.func.id} in shipped code")
    return found


def test_native_floors() -> None:
    assert native_violations(ROOT) == []


def test_python_floors() -> None:
    assert python_violations(ROOT) == []


def test_the_module_file_only_registers() -> None:
    assert len((ROOT / "csrc/bindings/module.cpp").read_text().splitlines()) <= 40


def test_files_stay_readable() -> None:
    files = [*native_files(ROOT), *(ROOT / "python/foretoken").rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 520}
    assert long == {}


def test_every_source_is_built() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    sources = [p.relative_to(ROOT).as_posix() for p in native_files(ROOT) if p.suffix in {".cpp", ".cu"}]
    assert [source for source in sources if source not in listed] == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("csrc/math/a.hpp", '#include "ops/tensor_view.hpp"\n', "math may not use ops"),
        ("csrc/cpu/a.cpp", '#include "cuda/a.hpp"\n', "cpu may not use cuda"),
        ("csrc/ops/a.hpp", '#include "dispatch.hpp"\n', "ops may not use dispatch"),
        ("csrc/bindings/a.cpp", '#include "third_party/dlpack/dlpack.h"\n', "only the boundary"),
        ("csrc/loop/a.cpp", "#include <pybind11/pybind11.h>\n", "below the bindings"),
        ("csrc/cpu/a.cpp", "#include <immintrin.h>\n", "outside csrc/cpu/x86"),
        ("csrc/cpu/a.cpp", "__m256 a;\n", "x86 intrinsics outside"),
        ("csrc/cpu/a.cpp", "void f() { assert(1); }\n", "ends the process"),
        ("csrc/cpu/a.cpp", "void f() { std::abort(); }\n", "ends the process"),
        ("csrc/cpu/a.cpp", "void f() { std::cout << 1; }\n", "ends the process"),
        ("csrc/cpu/a.cpp", "int row_offset = 0;\n", "32 bits"),
        ("csrc/cuda/a.cu", "int64_t i = blockIdx.x * blockDim.x;\n", "32 bits"),
        ("python/foretoken/ops.py", "from foretoken import session\n", "ops may not use session"),
        ("python/foretoken/ops.py", "def f():\n    import foretoken.hf.cache\n", "ops may not use hf"),
        ("python/foretoken/session.py", "def f():\n    import transformers\n", "imports transformers"),
        (
            "python/foretoken/session.py",
            "import_module('transformers.cache_utils')\n",
            "imports transformers",
        ),
        ("python/foretoken/hf/cache.py", "from ..pair import weights\n", "hf may not use pair"),
        ("python/foretoken/pair/a.py", "if True:\n    import transformers\n", "imports transformers"),
        ("python/foretoken/ops.py", "assert True\n", "assert in shipped code"),
        ("python/foretoken/ops.py", "print(1)\n", "print in shipped code"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    for folder in ("csrc", "python/foretoken/hf", "python/foretoken/pair"):
        (tmp_path / folder).mkdir(parents=True)
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    found = native_violations(tmp_path) + python_violations(tmp_path)
    assert len(found) == 1
    assert complaint in found[0]


def test_imports_for_type_checkers_alone_are_no_violations(tmp_path: Path) -> None:
    for folder in ("csrc", "python/foretoken/pair"):
        (tmp_path / folder).mkdir(parents=True)
    text = "if TYPE_CHECKING:\n    import transformers\n"
    (tmp_path / "python/foretoken/pair/a.py").write_text(text)
    assert python_violations(tmp_path) == []


def test_comments_and_strings_are_no_violations(tmp_path: Path) -> None:
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "python/foretoken").mkdir(parents=True)
    text = '// assert(x)\n/* printf("") */\nconst char* a = "abort()";\nstatic_assert(sizeof(int) == 4);\n'
    (tmp_path / "csrc/cpu/a.cpp").write_text(text)
    assert native_violations(tmp_path) == []
