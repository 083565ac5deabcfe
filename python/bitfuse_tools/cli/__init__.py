"""The command line, a file a command: `bitfuse` is `python -m bitfuse`.

A command imports what it needs inside: `--help` and a wrong option cost no more than `import bitfuse`.
"""

from __future__ import annotations

from bitfuse._interrupt import imported

from . import bench, compile, demo, explain, finetune, info, report, tune  # in the order of `bitfuse --help`
from .app import app

__all__ = ["app", "bench", "compile", "demo", "explain", "finetune", "info", "main", "report", "tune"]


def main() -> None:
    """The `bitfuse` script, and `python -m bitfuse`."""
    imported()
    app(prog_name="bitfuse")
