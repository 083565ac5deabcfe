"""CUDA C++ kernels: tensors to addresses."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

from ..arch import bundle
from ..op import pretended_gpu

_machine_code = functools.cache(bundle.machine_code)
_told: set[str] = set()


def refuse(extension: ModuleType, capability: int) -> str | None:
    """Why the extension can't run on a card of this compute capability; None when it can.

    That it runs code of another architecture there, slower or compiled by the driver, is told once.
    """
    if capability < 80:
        return f"compute capability {capability / 10} is below 8.0"
    runs, told = _machine_code(extension.architectures(), capability)
    if runs is None:
        return told
    if told is not None and told not in _told and pretended_gpu() is None:
        _told.add(told)
        how = f"`bitfuse compile --arch sm_{capability}`, or BITFUSE_CUDA_ARCHS={capability} in a build"
        bundle.log.warning("%s. Better: %s", told, how)
    return None


def _swap(extension: ModuleType) -> None:
    """Put another build of the extension in the place of the one that is imported, with what was cached of
    its answers."""
    modules: dict[str, Any] = dict(sys.modules)
    for name, module in modules.items():
        if name.startswith(f"{__name__}.") and hasattr(module, "_cuda"):
            module._cuda = extension
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


bundle.load_from_environment()
bundle.on_extension(_swap)
