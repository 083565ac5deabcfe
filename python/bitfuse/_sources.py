"""Where the Triton kernels and the C++ sources lie: beside this file once bitfuse is installed; in a checkout
at its top. Nothing is linked, so that a ZIP or a file system without links will do."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent


def source_folder(name: str) -> Path:
    """Of "kernels" or "csrc"."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parents[1] / name


def _find_kernels() -> None:
    """Make `bitfuse.kernels` the folder, which has no `__init__.py`: at the top of a checkout that would hide
    PyPI's package `kernels` from whoever runs Python there."""
    package: Any = sys.modules[PACKAGE.name]
    spec = ModuleSpec(f"{PACKAGE.name}.kernels", None, is_package=True)
    spec.submodule_search_locations = [str(source_folder("kernels"))]
    package.kernels = sys.modules[spec.name] = importlib.util.module_from_spec(spec)


_find_kernels()
