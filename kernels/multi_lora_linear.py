"""multi_lora_linear in Triton."""

from __future__ import annotations

from typing import Any


def supports(*args: Any) -> str | None:
    return "it has no kernel for this op"


def run(*args: Any) -> Any:
    raise NotImplementedError
