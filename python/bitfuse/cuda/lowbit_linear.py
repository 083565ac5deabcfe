"""lowbit_linear: not written yet."""

from __future__ import annotations

from typing import Any


def supports(*args: Any) -> str | None:
    return "not built"


def run(*args: Any) -> Any:
    raise AssertionError


supports_grad_x = supports
run_grad_x = run
