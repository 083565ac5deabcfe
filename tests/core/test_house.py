"""The rules of the house: imports and includes go down only, in every rank; `import bitfuse` is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
# by dotted name; the sources of Triton's kernels are bitfuse.kernels
FOLDERS = {
    "bitfuse": ROOT / "python/bitfuse",
    "bitfuse_tools": ROOT / "python/bitfuse_tools",
    "bitfuse.kernels": ROOT / "kernels",
}
# rooms, the highest first; one knows those below it, and of its own rank itself alone
RANKS: tuple[tuple[str, ...], ...] = (
    ("bitfuse.__main__",),
    ("bitfuse_tools.cli",),
    ("bitfuse_tools",),
    ("bitfuse",),
    ("bitfuse.checkpoints", "bitfuse.integrations", "bitfuse.distributed"),
    ("bitfuse.models",),
    ("bitfuse.nn", "bitfuse.optim", "bitfuse.compat"),
    ("bitfuse.ops",),
    ("backends", "bitfuse.kernels"),
    ("problems",),
    ("bitfuse.weights",),
    ("bitfuse.core",),
    ("bitfuse._version", "bitfuse._sources", "bitfuse._interrupt", "bitfuse._cpu", "bitfuse._cuda"),
)
RANK = {room: -number for number, rooms in enumerate(RANKS) for room in rooms}
BACKEND = re.compile(r"bitfuse\.ops\.\w+\.\w+_(cpu|cuda)")
# what an op and its backends hand over
PROBLEM = re.compile(r"bitfuse\.ops\.\w+\.(\w+_args|kv_cache|pages|operands|example)")


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The longest of the names in `RANK` that it begins with."""
    if BACKEND.fullmatch(module):
        return "backends"
    if PROBLEM.fullmatch(module):
        return "problems"
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in RANK and (name != "bitfuse" or length == len(parts)):
            return name
    raise AssertionError(f"{module} has no place in the import rules: give it one")


def imports(module: str, later: bool) -> Iterator[str]:
    """The modules of ours that one imports; `later`: also inside of functions, and for type checkers."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if later else iter(tree.body)
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            # a name is a module, or of what is in one
            inner = [f"{start}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES or name in RANK else start for name in inner]
        yield from (name for name in names if name.split(".")[0] in ("bitfuse", "bitfuse_tools"))


def test_imports_go_down_only() -> None:
    wrong = []
    for module in MODULES:
        own = room(module)
        for target in imports(module, later=True):
            other = room(target)
            if other != own and RANK[other] >= RANK[own]:
                wrong.append(f"{module} ({own}) imports {target} ({other})")
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_circles() -> None:
    graph = {module: set(imports(module, later=False)) & MODULES.keys() - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


# of csrc: families are one rank, a file of a family includes those of its own and the ranks below
CSRC = ("bind", "family", "core", "isa", "common")
INTRINSIC = re.compile(r"\b_mm\d*_\w+|\bv(ld|st)1q?_\w+|\b__m(128|256|512)\w*\b|immintrin\.h|arm_neon\.h")


def csrc_files() -> list[Path]:
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))


def csrc_room(path: Path) -> str:
    """common, bind, or of a device: ptx is CUDA's isa."""
    parts = path.relative_to(ROOT / "csrc").parts
    if parts[0] in ("common", "bind"):
        return parts[0]
    return {"isa": "isa", "ptx": "isa", "core": "core"}.get(parts[1], "family")


def test_includes_go_down_only() -> None:
    by_name: dict[str, list[Path]] = {}
    for path in csrc_files():
        by_name.setdefault(path.name, []).append(path)
    wrong = []
    for path in csrc_files():
        own = CSRC.index(csrc_room(path))
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
            targets = [path.parent / name, ROOT / "csrc" / name, *(by_name.get(Path(name).name, ())[:1])]
            target = next((t.resolve() for t in targets if t.is_file()), None)
            if target is None or not target.is_relative_to(ROOT / "csrc"):
                continue
            other = CSRC.index(csrc_room(target))
            families = csrc_room(path) == csrc_room(target) == "family"
            if other < own or (families and target.parent.parent != path.parent.parent):
                wrong.append(f"{path.relative_to(ROOT)} includes {target.relative_to(ROOT)}")
    assert not wrong, "\n".join(wrong)


def test_instructions_are_named_in_isa_alone() -> None:
    """What an instruction set calls them, nobody else knows."""
    wrong = []
    for path in csrc_files():
        if csrc_room(path) != "isa" and (found := INTRINSIC.search(path.read_text())):
            wrong.append(f"{path.relative_to(ROOT)}: {found[0]}")
    assert not wrong, "\n".join(wrong)


def test_native_code_knows_no_torch() -> None:
    for path in csrc_files():
        assert "torch/" not in path.read_text() and "ATen" not in path.read_text(), path


def test_import_is_light() -> None:
    """import bitfuse brings in neither the demo's libraries nor a compiler."""
    heavy = ("transformers", "matplotlib", "typer", "rich.table", "bitsandbytes", "torch._dynamo")
    code = "import sys, torch; before = set(sys.modules); import bitfuse; "
    code += f"print([m for m in {heavy!r} if m in set(sys.modules) - before])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
