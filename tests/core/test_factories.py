"""No tensor is made in torch's ambient default dtype or device, and none that is kept was made under a mode.

A lint over the syntax tree of the package, the Triton kernels and the simulator's Python.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for folder in ("python/bitfuse", "python/bitfuse_tools", "kernels", "tests/cusim")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.name.startswith("test_")
]
# what each factory must be told; others that torch gives a default device are told both
NEEDS = {
    **{f.__name__: {"dtype", "device"} for f in _device_constructors()},
    "Generator": {"device"},
    "frombuffer": {"dtype"},  # in the host's memory
    "from_numpy": set(),  # of the array's
}
OLD = {n for n in dir(torch) if n.endswith("Tensor") and n != "Tensor"}  # FloatTensor and the like


class Factories(ast.NodeVisitor):
    """What a file does with torch's factories."""

    def __init__(self) -> None:
        self.modules = {"torch"}  # names that torch goes by
        self.names: dict[str, str] = {}  # factories by the names that they were imported as
        self.wrong: list[tuple[int, str]] = []
        self._called: set[int] = set()

    def visit_Import(self, node: ast.Import) -> None:
        self.modules |= {a.asname for a in node.names if a.name == "torch" and a.asname}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "torch" and not node.level:
            self.names |= {a.asname or a.name: a.name for a in node.names if a.name in NEEDS or a.name in OLD}

    def _factory(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            known = node.attr in NEEDS or node.attr in OLD
            return node.attr if known and node.value.id in self.modules else None
        return None

    def visit_Call(self, node: ast.Call) -> None:
        name = self._factory(node.func)
        if name is None and ast.unparse(node.func) in {f"{m}.Tensor" for m in self.modules}:
            self.wrong.append((node.lineno, "torch.Tensor(...) has the default dtype"))
        elif name in OLD:
            self.wrong.append((node.lineno, f"{name} has no device"))
        elif name is not None:
            self._called.add(id(node.func))
            missing = NEEDS[name] - {k.arg for k in node.keywords}
            if missing:
                self.wrong.append((node.lineno, f"{name} without {' and '.join(sorted(missing))}"))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._passed_on(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._passed_on(node)
        self.generic_visit(node)

    def _passed_on(self, node: ast.expr) -> None:
        name = self._factory(node)
        # a Generator is, as an annotation
        if name is not None and NEEDS.get(name) and name != "Generator" and id(node) not in self._called:
            self.wrong.append((node.lineno, f"{name} is passed on, so what it is told can't be seen"))


def factories(source: str) -> list[tuple[int, str]]:
    found = Factories()
    found.visit(ast.parse(source))
    return found.wrong


def test_factories_are_told_dtype_and_device() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in FILES
        for line, what in factories(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.empty(3)",
        "import torch\ntorch.zeros(3, dtype=torch.float32)",
        "import torch\ntorch.arange(3, device=x.device)",
        "import torch as t\nt.full((2,), 1.0)",
        "from torch import linspace as spaced\nspaced(0, 1, 5)",
        "import torch\nmake = torch.empty if a else torch.zeros",
        "import torch\nfunctools.partial(torch.randn, 3)",
        "import torch\ntorch.tensor(x, **options)",
        "import torch\ntorch.Tensor(3)",
        "import torch\ntorch.FloatTensor(3)",
        "import torch\ntorch.Generator()",
        "import torch\ntorch.frombuffer(b)",
        "import torch\nf(lambda: [torch.eye(n)])",
    ],
)
def test_the_lint_finds(source: str) -> None:
    assert factories(source)


def test_the_lint_lets_pass() -> None:
    assert not factories(
        "import torch\ntorch.empty(3, dtype=d, device=e)\nx.new_empty(3)\ntorch.zeros_like(x)\n"
        "torch.from_numpy(a)\ng: torch.Generator = torch.Generator(device='cpu')\nempty(3)"
    )


# what is kept


def _called(name: ast.expr) -> str:
    return name.attr if isinstance(name, ast.Attribute) else name.id if isinstance(name, ast.Name) else ""


def _decorators(node: ast.FunctionDef) -> set[str]:
    return {_called(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list}


def _functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def makers() -> set[str]:
    """Functions of the package's lowest room that give tensors."""
    return {
        f.name
        for path in (ROOT / "python/bitfuse").glob("*.py")
        for f in ast.parse(path.read_text()).body
        if isinstance(f, ast.FunctionDef) and f.returns is not None and "Tensor" in ast.unparse(f.returns)
    }


def kept_under_modes(source: str, known: set[str]) -> list[tuple[int, str]]:
    """Cached functions that make tensors, and are not made `aside` or kept by `table`; and tensors made when
    a module is imported."""
    tree = ast.parse(source)
    wrong = []
    for f in _functions(tree):
        calls = {_called(node.func) for node in ast.walk(f) if isinstance(node, ast.Call)}
        cached = _decorators(f) & {"cache", "lru_cache", "cached_property"}
        if not cached or "aside" in _decorators(f) | calls:
            continue
        for node in ast.walk(f):
            if isinstance(node, ast.Call):
                of_torch = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch"
                if of_torch or _called(node.func) in known:
                    wrong.append((f.lineno, f"{f.name} keeps what {ast.unparse(node.func)} makes"))
        if f.returns is not None and "Tensor" in ast.unparse(f.returns):
            wrong.append((f.lineno, f"{f.name} keeps a tensor"))
    # code that runs when the module is imported
    at_import: list[ast.AST] = [tree]
    while at_import:
        node = at_import.pop()
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{n}" for n in NEEDS}:
            wrong.append((node.lineno, "a tensor is made at import"))
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            at_import += ast.iter_child_nodes(node)
    return wrong


def test_what_is_kept_is_made_aside() -> None:
    known = makers()
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in FILES
        if "bench" not in path.parts  # what a benchmark keeps are the inputs of its one run
        for line, what in kept_under_modes(path.read_text(), known)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "@functools.cache\ndef f(): return torch.tensor([1], dtype=d, device='cpu')",
        "@lru_cache(maxsize=3)\ndef f() -> torch.Tensor: return g()",
        "@functools.lru_cache\ndef f(): return nested_code().data_ptr()",
        "import torch\nTABLE = torch.zeros(3, dtype=d, device='cpu')",
        "class A:\n    x = torch.eye(3, dtype=d, device='cpu')",
    ],
)
def test_the_lint_finds_what_is_kept(source: str) -> None:
    assert kept_under_modes(source, {"nested_code"})


def test_the_lint_lets_tables_pass() -> None:
    source = "@table\ndef f() -> torch.Tensor: return torch.eye(3)\n"
    source += "@functools.cache\n@aside()\ndef g(): return f()"
    assert not kept_under_modes(source, {"f"})
