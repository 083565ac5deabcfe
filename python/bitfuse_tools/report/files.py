"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..bench.results import ResultsError, shown


def read(path: Path) -> str:
    """A text in UTF-8, its line ends as they are.

    Raises:
        ResultsError: it is not there, or no such text.
    """
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(
            f"{shown(path)} can't be read: {getattr(error, 'strerror', None) or error}"
        ) from None


def write(texts: Mapping[Path, str]) -> None:
    """Write every text aside, then rename them all: what fails leaves the files as they were.

    Raises:
        ResultsError: no permission, no room, no such folder.
    """
    aside: dict[Path, Path] = {}
    path = Path()
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            target = path.resolve()  # a link stays one
            if target.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=target.parent)
            aside[target] = Path(name)
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode())
            os.chmod(name, target.stat().st_mode & 0o777 if target.exists() else 0o644)
        for target, part in aside.items():
            part.replace(target)
    except OSError as error:
        raise ResultsError(
            f"{shown(path)} can't be written: {error.strerror or error}; --out names another file"
        ) from None
    finally:
        for part in aside.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
