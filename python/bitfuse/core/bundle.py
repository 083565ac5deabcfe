"""A folder of kernels compiled ahead of time: what `bitfuse compile` writes, and how it comes to be used.

    bitfuse-kernels.json    what is in it, and what it was made of
    _cuda.<ABI>.so          the CUDA extension
    triton/<key>/           cubin and metadata of a Triton kernel, by Triton's own key

Each part is used only where it fits: the extension where its C++ sources and Python's ABI are those of this
installation, the Triton kernels where their sources and Triton are. And only where it is whole: the manifest
holds the size and the hash of every file, because a shared object that was cut while it was copied ends the
process that maps it, and a cut cubin the driver's. What does not fit is told and left.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .._sources import source_folder
from .json_files import JsonError, brief, read_json

log = logging.getLogger("bitfuse")

MANIFEST = "bitfuse-kernels.json"
LAYOUT = 1
PACKAGE = Path(__file__).resolve().parents[1]
_swap: list[Callable[[ModuleType], None]] = []


def cuda_sources() -> list[Path]:
    """The files that the CUDA extension is made of."""
    csrc = source_folder("csrc")
    found = [*(csrc / "bind").glob("*.h"), *(csrc / "bind").glob("cuda*.cpp"), *(csrc / "common").glob("*")]
    return sorted([*found, *(f for f in (csrc / "cuda").rglob("*") if f.is_file())])


def triton_sources() -> list[Path]:
    """The files of the Triton kernels."""
    return sorted(source_folder("kernels").rglob("*.py"))


def source_hash(files: Iterable[Path]) -> str:
    """Of their names and what is in them."""
    total = hashlib.sha256()
    for file in files:
        body = file.read_bytes()
        total.update(f"{file.name} {len(body)}\n".encode())
        total.update(body)
    return total.hexdigest()[:16]


def file_facts(folder: Path, part: str) -> dict[str, list[Any]]:
    """Of a file, or of every file below a folder of a bundle, by its path from there: bytes and SHA-256, for
    the manifest."""
    files = sorted(path for path in ((folder / part), *(folder / part).rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): _facts(path) for path in files}


def _facts(file: Path) -> list[Any]:
    total, size = hashlib.sha256(), 0
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            total.update(part)
            size += len(part)
    return [size, total.hexdigest()]


def _damage(folder: Path, said: Any) -> str | None:
    """What is wrong with the files that a manifest names; None where all are as they were made."""
    if not isinstance(said, dict):
        return f"{MANIFEST} has no sizes and hashes of its files: compile again"
    for name, facts in said.items():
        file = folder / name
        name = name if name.isprintable() and len(name) <= 200 else brief(name)
        try:
            # the size first: it tells most copies that were cut, at once
            size = file.stat().st_size if file.is_file() else None
            whole = isinstance(facts, list) and len(facts) == 2 and size == facts[0] and _facts(file) == facts
        except (OSError, ValueError) as why:
            return f"{name} can't be read: {getattr(why, 'strerror', None) or why}"
        if size is None:
            return f"{name} is missing: copy the folder again"
        if not whole:
            return f"{name} is not the file that was compiled ({size} bytes): copy the folder again"
    return None


def abi() -> str:
    """What an extension's file name ends with: the interpreter and the machine."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def triton_version() -> str | None:
    """Of the Triton that is installed; None for none."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


@dataclass(frozen=True)
class Loaded:
    """What `load_kernels` took of a folder.

    Attributes:
        folder: the folder.
        archs: what it was compiled for, such as "sm_90a".
        used: "cuda", "triton", both or neither.
        refused: of the parts that are there and were not taken, why.
    """

    folder: Path
    archs: tuple[str, ...]
    used: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.folder} for {', '.join(self.archs)}: {' and '.join(self.used) or 'nothing'} used"]
        return "\n".join(lines + [f"  not {part}: {why}" for part, why in self.refused.items()])


LOADED: list[Loaded] = []  # by this process, the latest last


def read_manifest(folder: Path, name: str = "folder") -> dict[str, Any]:
    """The manifest of a bundle.

    Raises:
        ValueError: there is none, it is damaged, or of another layout.
    """
    file = folder / MANIFEST
    try:
        found = read_json(file)
    except FileNotFoundError:
        raise ValueError(
            f"{name} is {str(folder)!r}, which has no {MANIFEST}: make one with `bitfuse compile`"
        ) from None
    except JsonError as why:
        raise ValueError(f"{name}: {file} {why}: compile again") from None
    if not isinstance(found, dict) or found.get("layout") != LAYOUT:
        said = found.get("layout") if isinstance(found, dict) else None
        raise ValueError(f"{name}: {file} has layout {brief(said)}, expected {LAYOUT}: compile again")
    archs = found.get("archs")
    parts = [found.get("cuda"), found.get("triton")]
    if not isinstance(archs, list) or not all(p is None or isinstance(p, dict) for p in parts):
        raise ValueError(f"{name}: {file} is damaged: compile again")
    return found


def _word(said: dict[str, Any], name: str) -> str:
    """What a manifest says, as far as it is a word of ordinary length."""
    word = said.get(name)
    return word if isinstance(word, str) and len(word) <= 40 and word.isprintable() else brief(word)


def _cuda_mismatch(said: dict[str, Any]) -> str | None:
    sources = cuda_sources()
    if said.get("abi") != abi():
        return f"it was made for {_word(said, 'abi')}, this Python takes {abi()}"
    if not sources:
        return "the C++ sources are not here to compare it with"
    if said.get("sources") != (here := source_hash(sources)):
        return f"it was made of other C++ sources ({_word(said, 'sources')}, here {here}): compile again"
    return None


def _triton_mismatch(said: dict[str, Any]) -> str | None:
    version = triton_version()
    if version is None:
        return "Triton is not installed"
    if said.get("version") != version:
        return f"it was made by Triton {_word(said, 'version')}, here is {version}: compile again"
    if said.get("sources") != (here := source_hash(triton_sources())):
        return f"it was made of other Triton kernels ({_word(said, 'sources')}, here {here}): compile again"
    return None


def load_kernels(folder: str | os.PathLike[str]) -> Loaded:
    """Use kernels that `bitfuse compile` made, so that their first call compiles nothing.

    BITFUSE_KERNEL_PATH does the same at import for the folders that it names, between colons. A part that was
    made of other sources, by another Triton or for another Python is told in a warning and not used; the
    kernels of an earlier folder stay, behind this one's. Touches no GPU: whether the card is among the
    architectures is asked when a kernel is first called.

    Args:
        folder: with a bitfuse-kernels.json.

    Returns:
        What is used, and why the rest is not.

    Raises:
        TypeError: folder is no path.
        ValueError: there is no bundle in it, or it is damaged, or of another layout.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder is a {type(folder).__name__}, expected a path")
    try:
        path = Path(folder).resolve()
    except (OSError, RuntimeError, ValueError) as why:  # links in a circle, a zero byte
        said = getattr(why, "strerror", None) or str(why).splitlines()[0]
        raise ValueError(f"folder is {str(folder)!r}, which is no path: {said}") from None
    manifest = read_manifest(path)
    used: list[str] = []
    refused: dict[str, str] = {}
    for part, mismatch, take in (
        ("cuda", _cuda_mismatch, _take_extension), ("triton", _triton_mismatch, _take_triton),
    ):  # fmt: skip
        if (said := manifest.get(part)) is None:
            continue
        reason = mismatch(said) or _damage(path, said.get("files")) or take(path, said)
        if reason is None:
            used.append(part)
        else:
            refused[part] = reason
    loaded = Loaded(path, tuple(map(str, manifest["archs"])), tuple(used), refused)
    LOADED.append(loaded)
    for part, reason in refused.items():
        log.warning("bitfuse leaves the %s kernels of %s: %s", part, path.name, reason)
    return loaded


def load_from_environment() -> None:
    """BITFUSE_KERNEL_PATH, at import: what is wrong with it is a warning."""
    for folder in filter(None, reversed(os.environ.get("BITFUSE_KERNEL_PATH", "").split(os.pathsep))):
        try:
            load_kernels(folder)
        except ValueError as why:
            log.warning("BITFUSE_KERNEL_PATH: %s", why)


def on_extension(swap: Callable[[ModuleType], None]) -> None:
    """Call this with each CUDA extension that takes the place of an earlier one."""
    _swap.append(swap)


def _take_extension(folder: Path, said: dict[str, Any]) -> str | None:
    import torch  # noqa: F401  its wheel carries the CUDA runtime, which a shared link needs

    package: Any = sys.modules[PACKAGE.name]
    file = folder / f"_cuda{abi()}"
    if file.name not in said["files"]:
        return f"{MANIFEST} has no size and hash of {file.name}: compile again"
    # a name of its own: pybind11 answers a known one with the module that it made first
    name = f"{PACKAGE.name}.{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}._cuda"
    try:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as why:  # whatever an extension of another make raises: this one stays
        return f"{file.name} does not load: {(str(why) or type(why).__name__).splitlines()[0]}"
    sys.modules[f"{PACKAGE.name}._cuda"] = module
    package._cuda = module
    for swap in _swap:
        swap(module)
    return None


def _take_triton(folder: Path, said: dict[str, Any]) -> str | None:
    from .triton_cache import add

    add(folder / "triton")
    return None


def cudart_of(extension: str | os.PathLike[str]) -> str:
    """How CUDA's runtime is linked to an extension that loads: "static", hidden in it, or "shared"."""
    return "shared" if hasattr(ctypes.CDLL(os.fspath(extension)), "cudaGetErrorString") else "static"


# which machine code a card runs


def machine_code(architectures: str, capability: int) -> tuple[str | None, str | None]:
    """What a card of this capability runs of an extension, and what is wrong with that.

    Args:
        architectures: as the extension says: "sm_80 sm_90a compute_90".

    Returns:
        The one that it runs, None where there is none; and a line to tell, None where it is its own.
    """
    major = capability // 10
    codes: list[tuple[int, str]] = []
    texts: list[tuple[int, str]] = []
    for word in architectures.split():
        kind, _, rest = word.partition("_")
        number, letter = int(rest.rstrip("af")), rest[-1] if rest[-1] in "af" else ""
        within = number // 10 == major and number <= capability
        if letter == "a":
            runs = number == capability
        else:
            runs = within if kind == "sm" or letter == "f" else number <= capability
        if runs:
            (codes if kind == "sm" else texts).append((number, word))
    card = f"sm_{capability}"
    if codes:
        number, word = max(codes)
        told = f"bitfuse._cuda holds no machine code for {card}: the card runs that of {word}"
        return word, None if number == capability else told
    if texts:
        number, word = max(texts)
        told = f"bitfuse._cuda holds no machine code for {card}: the driver compiles the PTX of {word} for it"
        return word, told
    return None, f"bitfuse._cuda holds code for {architectures}, none that {card} runs"
