"""The build backend: setuptools', which asks for a CUDA compiler too where there is a GPU and none.

A machine with an NVIDIA driver and no toolkit gets the pinned compiler wheels as build requirements, so that
a plain `pip install` there makes the CUDA kernels. BITFUSE_CUDA=0 asks for none; BITFUSE_CUDA=1 asks without
a driver as well.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# bitfuse itself can't be imported: it wants torch
sys.path.insert(0, str(Path(__file__).parent.parent / "python"))
from bitfuse_tools.compile import toolchain

del sys.path[0]

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def compiler_wheels() -> list[str]:
    """The pinned wheels of nvcc, where the build is to make CUDA kernels and finds no nvcc."""
    wanted = toolchain.cuda_wanted()
    if wanted is False or (wanted is None and shutil.which("nvidia-smi") is None):
        return []
    try:
        toolchain.find_nvcc()
    except toolchain.CompilerMissing:
        # a CUDA_HOME that holds none is the user's mistake: wheels would not be looked at
        if not os.environ.get("CUDA_HOME"):
            return list(toolchain.NVCC_WHEELS)
        if wanted:
            raise
    return []


def needed() -> list[str]:
    """What a build needs here; what is wrong with the environment ends it before anything is fetched."""
    try:
        toolchain.check_settings()
        return compiler_wheels()
    except (ValueError, toolchain.CompilerMissing) as why:
        raise SystemExit(f"bitfuse: {why}") from None


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*needed(), *build_meta.get_requires_for_build_wheel(config_settings)]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*needed(), *build_meta.get_requires_for_build_editable(config_settings)]
