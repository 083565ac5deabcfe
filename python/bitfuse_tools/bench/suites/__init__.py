"""What is measured, an op a file of its name: its problems and who computes them."""

from __future__ import annotations

import importlib
import pkgutil

import bitfuse  # noqa: F401  the ops declare themselves
from bitfuse.core.declaration import declarations

from ..cases import Problem

__all__ = ["SUITES"]


def _suite(op: str) -> type[Problem]:
    """The problem that an op's file defines."""
    module = importlib.import_module(f"{__name__}.{op}")
    (found,) = (
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Problem) and getattr(kind, "op", None) == op
    )
    return found


_files = {module.name for module in pkgutil.iter_modules(__path__)}
# by op, in the order of the declarations
SUITES: dict[str, type[Problem]] = {
    each.name: _suite(each.name) for each in declarations() if each.name in _files
}
