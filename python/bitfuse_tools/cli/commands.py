"""All commands, in the order of `bitfuse --help`."""

from __future__ import annotations

from . import bench, compile, demo, explain, finetune, generate, info, report, tune
from .application import app

__all__ = ["app", "bench", "compile", "demo", "explain", "finetune", "generate", "info", "report", "tune"]
