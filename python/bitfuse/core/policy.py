"""The policy's cache: what `bitfuse tune` measured on a GPU, and what is chosen from it in place of a rule.

One JSON file, `policy.json` in BITFUSE_CACHE, else in bitfuse's folder of the user's cache:

    {"schema": 1, "devices": {"NVIDIA H100 80GB HBM3": {
        "versions": {"bitfuse": ..., "torch": ..., "triton": ...},
        "backends": {"lowbit_linear(16,4096,4096,int4,128,bfloat16)": {"triton": 1.1e-05, "cuda": 9.3e-06}},
        "configs": {"lowbit_linear(16,4096,4096,int4,128,bfloat16)": [16, 128, 128, ...]}}}}

A device's entries are used by the versions that measured them only.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from .._version import __version__
from .json_files import JsonError, read_json

log = logging.getLogger("bitfuse")
SCHEMA = 1


class PolicyError(Exception):
    """The cache can't be read or written; the message is one line and tells the way out."""


def bucket(m: int) -> int:
    """The power of two from m on: calls of as many rows share an entry."""
    return 1 << max(m - 1, 0).bit_length()


def key(name: str, *kind: Any) -> str:
    """An entry's."""
    return f"{name}({','.join(str(k).removeprefix('torch.') for k in kind)})"


def path() -> Path:
    """Of the file, which need not be there.

    Raises:
        PolicyError: nothing says where a cache may lie.
    """
    folder, cache = os.environ.get("BITFUSE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if folder:
        return Path(folder) / "policy.json"
    try:
        return Path(cache or Path.home() / ".cache") / "bitfuse" / "policy.json"
    except RuntimeError:
        raise PolicyError("there is no home folder: set BITFUSE_CACHE") from None


def versions() -> dict[str, str | None]:
    """Those that a measurement holds for."""
    found: dict[str, str | None] = {"bitfuse": __version__}
    for name in ("torch", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def read(file: Path) -> dict[str, Any]:
    """All devices' entries; empty where there is no file.

    Raises:
        PolicyError: it can't be read, or another release wrote it.
    """
    try:
        found = read_json(file)
    except FileNotFoundError:
        return {}
    except JsonError as error:
        raise PolicyError(f"{file} {error}: delete it, and run bitfuse tune again") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if isinstance(schema, int) and schema != SCHEMA:
        raise PolicyError(f"{file} has layout {schema}, expected {SCHEMA}: delete it, tune again")
    if schema is None or not _is_policy(found.get("devices")):
        raise PolicyError(f"{file} is truncated or no policy: delete it, and run bitfuse tune again")
    return dict(found["devices"])


def _is_policy(devices: Any) -> bool:
    """Whether these are the entries of devices, each with its parts of the right kind."""
    if not isinstance(devices, dict):
        return False
    for device in devices.values():
        if not isinstance(device, dict):
            return False
        backends, configs = device.get("backends", {}), device.get("configs", {})
        if not isinstance(backends, dict) or not isinstance(configs, dict):
            return False
        times = [s for by in backends.values() for s in (by.values() if isinstance(by, dict) else (None,))]
        if not all(isinstance(s, int | float) for s in times):
            return False
        if not all(
            isinstance(c, list) and all(isinstance(v, int | None) for v in c) for c in configs.values()
        ):
            return False
    return True


def write(file: Path, devices: dict[str, Any]) -> None:
    """Aside, then renamed: a reader never sees half a file.

    Raises:
        PolicyError: no permission, a full disk.
    """
    text = json.dumps({"schema": SCHEMA, "devices": devices}, indent=1) + "\n"
    aside = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as made:
            aside = Path(made.name)
            made.write(text)
        aside.replace(file)
    except OSError as error:
        if aside is not None:
            aside.unlink(missing_ok=True)
        raise PolicyError(f"{file} can't be written: {error.strerror}; set BITFUSE_CACHE") from None


@functools.cache
def of(device: str) -> dict[str, dict[str, Any]]:
    """What was measured on the GPU of this name by these versions: "backends" and "configs", maybe empty."""
    empty: dict[str, dict[str, Any]] = {"backends": {}, "configs": {}}
    try:
        found = read(path()).get(device)
    except PolicyError as error:
        log.warning("bitfuse uses its rules: %s", error)
        return empty
    if found is None:
        return empty
    if found.get("versions") != versions():
        log.warning(
            "bitfuse tune ran with other versions of bitfuse, torch or triton: its rules are used instead"
        )
        return empty
    return {name: found.get(name, {}) for name in empty}


def fastest(device: str, op: str, kind: tuple[Any, ...]) -> str | None:
    """The backend that was measured to be the fastest for such calls."""
    seconds = of(device)["backends"].get(key(op, *kind))
    return min(seconds, key=seconds.__getitem__) if seconds else None
