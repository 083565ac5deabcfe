"""What every op owes beside its kernels, by its declaration; a test that fails names what one lacks."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from dataclasses import fields
from pathlib import Path

import bitfuse
import pytest
from bitfuse.core.declaration import FAMILIES, Declaration, Sizes, declarations, declared
from bitfuse.core.op import Op
from bitfuse_tools.bench import SUITES

ROOT = Path(__file__).parents[2]
every = pytest.mark.parametrize("op", declarations(), ids=lambda op: op.name)


@every
def test_an_op_lacks_nothing(op: Declaration) -> None:
    name, lacks = op.name, []
    folder = ROOT / "tests" / op.family
    # in a file of its name, or beside others
    files = (
        [folder / f"test_{name}.py"] if (folder / f"test_{name}.py").is_file() else folder.glob("test_*.py")
    )
    if not any(re.search(rf"\b{name}(_op)?\b", path.read_text()) for path in files):
        lacks.append(f"tests: {folder.relative_to(ROOT)}/test_{name}.py")
    if (op.like or name) not in SUITES:
        lacks.append(f"a benchmark: bitfuse_tools/bench/suites/{name}.py")
    said = inspect.getdoc(op.function) or ""
    for what, pattern in (
        ("the shapes of its arguments", r"Args:\n(.|\n)*\["),
        ("what it raises", r"Raises:\n(.|\n)*(ValueError|TypeError)"),
    ):
        if not re.search(pattern, said):
            lacks.append(f"{what} in its docstring")
    source = said if op.like is None else said + (inspect.getdoc(declared(op.like).function) or "")
    if not re.search(r"\b(19|20)\d\d\b|arXiv|`torch\.|as torch", source):
        lacks.append("where its method comes from, in its docstring")
    if not op.summary or len(op.summary) > 80:
        lacks.append("a summary of half a line")
    unknown = set(op.uses) - {field.name for field in fields(Sizes)}
    if unknown:
        lacks.append(f"sizes {unknown} in Sizes")
    assert not lacks, f"{name} lacks {'; '.join(lacks)}"


def test_every_op_is_declared() -> None:
    """Each Op of each family is a part of a declaration, and each declared one is exported."""
    parts = {id(part.op) for each in declarations() for part in each.parts}
    folder = ROOT / "python/bitfuse/ops"
    families = {family.name for family in pkgutil.iter_modules([str(folder)])}
    for family in families:
        for module in pkgutil.iter_modules([str(folder / family)]):
            found = importlib.import_module(f"bitfuse.ops.{family}.{module.name}")
            for name, value in vars(found).items():
                if isinstance(value, Op):
                    assert id(value) in parts, f"{found.__name__}.{name} is a part of no declaration"
    assert families == set(FAMILIES)
    exported = {name for each in declarations() for name in each.exports}
    assert exported <= set(bitfuse.__all__) and exported <= set(bitfuse.ops.__all__)
    for each in declarations():
        if each.public:
            assert getattr(bitfuse, each.name) is getattr(bitfuse.ops, each.name) is each.function
        for name, op in each.ops.items():
            assert getattr(bitfuse.ops, name) is op
        assert each.like is None or (not each.parts and declared(each.like).parts), each.name


def test_lists_are_in_one_order() -> None:
    order = [each.name for each in declarations()]
    assert order[:3] == ["lowbit_linear", "lora_linear", "multi_lora_linear"]
    assert list(SUITES) == [name for name in order if name in SUITES]
    places = [(each.family, each.place) for each in declarations()]
    assert len(set(places)) == len(places), "two ops of a family have one place"
    with pytest.raises(ValueError, match="no op 'lowbit': there are lowbit_linear, lora_linear"):
        declared("lowbit")
