"""The import rules: cli, integrations, checkpoints -> nn -> ops -> cpu, cuda, kernels -> op, formats,
packing, weight."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "bitfuse"
FILES = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
FILES |= {path.relative_to(ROOT): path for path in (ROOT / "kernels").rglob("*.py")}  # bitfuse.kernels
RANK = {
    **dict.fromkeys(
        (
            "_sources",
            "_version",
            "_interrupt",
            "_cpu",
            "_cuda",
            "autograd",
            "op",
            "formats",
            "packing",
            "stand_in",
            "weight",
            "codebook",
            "cost",
            "pages",
            "arch",
            "policy",
            "tensors",
            "json_files",
        ),
        0,
    ),
    **dict.fromkeys(
        (
            "activations",
            "attention_args",
            "autocast",
            "blockwise",
            "dropout",
            "kv_cache",
            "lora_args",
            "multi_lora_args",
        ),
        0,
    ),
    **dict.fromkeys(("cpu", "cuda", "kernels"), 1),
    "ops": 2,
    **dict.fromkeys(("nn", "optim", "compat"), 3),
    **dict.fromkeys(("quantization", "lora"), 4),
    **dict.fromkeys(
        (
            "checkpoints",
            "integrations",
            "hypothetical",
            "info",
            "tuning",
            "demo",
            "finetune",
            "bench",
            "ahead",
            "report",
            "cli",
            "__main__",
            "__init__",
        ),
        5,
    ),
}
# the order inside the lowest room
PEERS = {
    "tensors": -1,
    "json_files": -1,
    "autograd": 0,
    "formats": 0,
    "blockwise": 1,
    "packing": 0,
    "stand_in": 0,
    "dropout": 0,
    "arch": 0,
    "_sources": 0,
    "_version": 0,
    "_interrupt": 0,
    "policy": 1,
    "cost": 1,
    "op": 2,
    "weight": 3,
    "lora_args": 4,
    "multi_lora_args": 4,
    "kv_cache": 4,
    "attention_args": 0,
    "autocast": 1,
    "pages": 0,
}


def room(parts: tuple[str, ...]) -> str:
    return parts[0] if parts else "__init__"


def imports(place: Path) -> list[tuple[str, ...]]:
    """The bitfuse modules that a file imports, as paths below the package."""
    here = place.with_suffix("").parts
    found: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(FILES[place].read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = here[: len(here) - node.level]
                target = (*base, *(node.module.split(".") if node.module else ()))
                found += [(*target, a.name) for a in node.names] if not node.module else [target]
            elif node.module and node.module.split(".")[0] == "bitfuse":
                target = tuple(node.module.split(".")[1:])
                found += [target] if target else [(a.name,) for a in node.names if a.name in RANK]
        elif isinstance(node, ast.Import):
            found += [tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "bitfuse"]
    return found


def test_imports_go_down_only() -> None:
    wrong = []
    for path in sorted(FILES):
        own = room(path.with_suffix("").parts)
        assert own in RANK, f"{own} has no place in the import rules: give it one"
        for target in imports(path):
            other = room(target)
            assert other in RANK, f"{path.name} imports {other}, which has no place in the import rules"
            down = RANK[other] < RANK[own] or other == own or RANK[own] == 5
            if RANK[own] == RANK[other] == 0 and own in PEERS and other in PEERS:
                down = PEERS[other] <= PEERS[own]
            if not down:
                wrong.append(f"{path} imports {'.'.join(target)}")
    assert not wrong, "\n".join(wrong)


def test_native_code_knows_no_torch() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert "torch/" not in path.read_text() and "ATen" not in path.read_text(), path


def test_import_is_light() -> None:
    """import bitfuse brings in neither the demo's libraries nor a compiler."""
    heavy = ("transformers", "matplotlib", "typer", "rich.table", "bitsandbytes", "torch._dynamo")
    code = "import sys, torch; before = set(sys.modules); import bitfuse; "
    code += f"print([m for m in {heavy!r} if m in set(sys.modules) - before])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
