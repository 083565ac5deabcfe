"""JSON that anybody may have written, or cut: it is read, or refused in a line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

DEEPEST = 64  # levels; our own files have six


class JsonError(ValueError):
    """What is wrong with a file, behind its name: "is not JSON (line 3)"."""


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        FileNotFoundError: it is not there.
        JsonError: it can't be read, is no UTF-8, is not whole, is nested deeper than `DEEPEST`, or holds a
            number or a text that can't be written again.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise JsonError(f"can't be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_json(text)


def parse_json(text: str) -> Any:
    """What a text of JSON holds.

    Raises:
        JsonError: as of `read_json`.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise JsonError(f"is not JSON (line {error.lineno}: {error.msg})") from None
    except RecursionError:
        raise JsonError(f"is nested deeper than {DEEPEST} levels") from None
    except ValueError:
        raise JsonError("holds a number of thousands of digits") from None
    if reason := _fault(found):
        raise JsonError(reason)
    return found


def _fault(found: Any) -> str | None:
    level = [found]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                    return "holds half a surrogate pair, which is no text"
            elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 63:
                return f"holds the number {str(value)[:12]}…, of more than 64 bits"
        if not below:
            return None
        level = below
    return f"is nested deeper than {DEEPEST} levels"


def finite(name: str, value: Any, least: float = 0.0, most: float = 1e15) -> float:
    """A number that figures can be made of.

    Raises:
        ValueError: it is none, no finite one, or not from least to most; the message says so.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise ValueError(f"{name} is {brief(value)}, expected a number")
    if not least <= value <= most:
        raise ValueError(f"{name} is {brief(value)}, expected {least:g} to {most:g}")
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more digits than a float has
        return False


def brief(value: Any) -> str:
    """A value in an error's words, not longer than a part of a line."""
    said = repr(value)
    return said if len(said) <= 40 else said[:39] + "…"
