"""What gets to a user: a package that can be imported, with its kernels and their sources."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOP = ("python", "kernels", "csrc", "build_backend", "tests")


def python(*args: str, cwd: Path = ROOT, path: Path | str = ROOT / "python") -> str:
    """What a Python of its own prints."""
    env = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_no_links() -> None:
    """pip unpacks those of a ZIP as text files."""
    ours = [path for top in TOP for path in (ROOT / top).rglob("*") if "build" not in path.parts]
    assert len(ours) > 100 and [path for path in ours if path.is_symlink()] == []


def test_the_checkout_hides_no_other_kernels(tmp_path: Path) -> None:
    """From the top level, PyPI's package `kernels` is found, and ours under its own name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 1")
    code = "import kernels, bitfuse.kernels.rope as ours; "
    code += "print(kernels.get_kernel, kernels.__file__, ours.__file__)"
    path = f"{ROOT / 'python'}{os.pathsep}{tmp_path}"
    there, here = tmp_path / "kernels" / "__init__.py", ROOT / "kernels" / "rope.py"
    assert python("-c", code, path=path) == f"1 {there} {here}"


LOOK = """
import bitfuse
from bitfuse.arch import bundle
print(bitfuse.__file__)
print(*bundle.triton_sources(), *bundle.cuda_sources(), sep="\\n")
"""


def test_the_package_is_whole(tmp_path: Path) -> None:
    """As a wheel has it: Triton kernels and C++ sources lie beside the rest, wherever that is."""
    python("setup.py", "-q", "build_py", "--build-lib", str(tmp_path))
    package, *sources = python("-c", LOOK, cwd=tmp_path, path=tmp_path).splitlines()
    assert package == str(tmp_path / "bitfuse" / "__init__.py")
    own = {path.relative_to(ROOT) for top in ("kernels", "csrc") for path in (ROOT / top).rglob("*.[ch]*")}
    own |= {path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    assert own == {
        path.relative_to(tmp_path / "bitfuse")
        for top in ("kernels", "csrc")
        for path in (tmp_path / "bitfuse" / top).rglob("*.*")
    }
    assert len(sources) > 40 and all(Path(path).is_relative_to(tmp_path / "bitfuse") for path in sources)
