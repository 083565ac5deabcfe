"""The instruction-set levels of the C++ kernels, as csrc lists them for this machine, the narrowest first."""

from __future__ import annotations

from pathlib import Path

from bitfuse_tools.compile.toolchain import levels

CSRC = Path(__file__).parents[1] / "csrc"
LEVELS = tuple(levels(CSRC))
