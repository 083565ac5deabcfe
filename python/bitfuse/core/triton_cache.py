"""Triton's cache of compiled kernels with folders of kernels compiled ahead of time in front of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime.cache import CacheManager, FileCacheManager

from .json_files import read_json

_folders: list[Path] = []
_behind: type[CacheManager] = FileCacheManager


class AheadOfTime(CacheManager):
    """What Triton asks for one kernel, by the hash of its source, target, options and compiler: the files of
    the first folder that has it, else those of the cache behind, which also takes what is new."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._asked: tuple[Any, ...] = (key, override, dump)
        self._made: CacheManager | None = None
        # TRITON_KERNEL_OVERRIDE and TRITON_KERNEL_DUMP mean the user's own files
        usual = not (override or dump)
        self._folder = next((f / key for f in _folders if usual and (f / key).is_dir()), None)

    @property
    def _cache(self) -> CacheManager:
        """Made when first needed: it makes a folder, and not every home can be written to."""
        if self._made is None:
            self._made = _behind(*self._asked)
        return self._made

    def get_file(self, filename: str) -> str | None:
        if self._folder is not None and (file := self._folder / filename).is_file():
            return str(file)
        return self._cache.get_file(filename)

    def get_group(self, filename: str) -> dict[str, str] | None:
        if self._folder is not None:
            try:
                names = read_json(self._folder / f"__grp__{filename}")["child_paths"]
                files = {name: self._folder / Path(name).name for name in names}
                if all(file.is_file() for file in files.values()):
                    return {name: str(file) for name, file in files.items()}
            except (OSError, ValueError, KeyError, TypeError):  # damaged: as if it were not there
                pass
        return self._cache.get_group(filename)

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        return self._cache.put(data, filename, binary)

    def put_group(self, filename: str, group: dict[str, str]) -> Any:
        return self._cache.put_group(filename, group)


def add(folder: Path) -> None:
    """Look in this folder first, in this process from now on. Triton keeps what it holds compiled already."""
    global _behind
    if knobs.cache.manager_class is not AheadOfTime:
        _behind = knobs.cache.manager_class or FileCacheManager  # TRITON_CACHE_MANAGER's
        knobs.cache.manager_class = AheadOfTime
    if folder in _folders:
        _folders.remove(folder)
    _folders.insert(0, folder)
