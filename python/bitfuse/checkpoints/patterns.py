"""Regular expressions of a file from anywhere, matched in polynomial time.

Python's `re` may try exponentially many ways ("(a+)+#") and can't be stopped. Whether a pattern matches a
whole name needs none of them: here each item takes the set of places that it may begin at to the set of those
that it may end at (Thompson, "Regular Expression Search Algorithm", 1968), on the tree that `re` parses.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

_parser: Any = importlib.import_module("re._parser" if hasattr(re, "_parser") else "sre_parse")
_STEPS = 20_000  # at most, for one name: what people write takes some hundreds
# what lets `re` try more than one way at a place; without it, it is as fast as it is safe
_CHOICES = re.compile(r"[*+?{(]")
_ESCAPED = re.compile(r"\\.", re.DOTALL)

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda c: not c.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda c: not c.isspace(),
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
    "CATEGORY_NOT_WORD": lambda c: not (c.isalnum() or c == "_"),
}


def fullmatch(pattern: str, name: str) -> bool:
    """`re.fullmatch(pattern, name) is not None`, in a time that is polynomial in both lengths.

    Raises:
        ValueError: no regular expression, or one that needs more: back references, atomic groups, possessive
            repeats, flags other than "i"; or one of thousands of items.
    """
    return _matcher(pattern, "")(name)


def ends(pattern: str, name: str) -> bool:
    """Whether a name, or what follows a dot in it, matches as a whole: PEFT's rule for ranks and alphas.

    Raises:
        ValueError: as `fullmatch`.
    """
    return _matcher(pattern, r"(.*\.)?")(name)


@functools.lru_cache(4096)
def _matcher(pattern: str, before: str) -> Callable[[str], bool]:
    tree, ignore_case = _parsed(f"{before}({pattern})" if before else pattern)
    if not _CHOICES.search(_ESCAPED.sub("", pattern)):
        compiled = re.compile(f"{before}({pattern})" if before else pattern)
        return lambda name: compiled.fullmatch(name) is not None
    return lambda name: len(name) in _Match(name, ignore_case).ends(tree, {0})


def _parsed(pattern: str) -> tuple[Any, bool]:
    try:
        tree = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as why:
        raise ValueError(f"pattern {_short(pattern)} can't be read: {why}") from None
    if tree.state.flags & ~(re.UNICODE | re.IGNORECASE):
        raise ValueError(f"pattern {_short(pattern)} sets flags, expected none but 'i'")
    return tree, bool(tree.state.flags & re.IGNORECASE)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) < 60 else pattern[:57] + "...")


class _Match:
    """One name; `ends` of a sequence of items, from a set of places to begin at."""

    def __init__(self, name: str, ignore_case: bool) -> None:
        self.name = name
        self.ignore_case = ignore_case
        self.left = _STEPS

    def ends(self, items: Iterable[tuple[Any, Any]], starts: set[int]) -> set[int]:
        for op, value in items:
            if not starts:
                break
            starts = self._step(str(op), value, starts)
        return starts

    def _step(self, op: str, value: Any, starts: set[int]) -> set[int]:
        name, size = self.name, len(self.name)
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"a pattern takes more than {_STEPS} steps for the name {_short(name)}")
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return {at + 1 for at in starts if at < size and self._fits(op, value, name[at])}
        if op == "BRANCH":
            return set().union(*(self.ends(branch, starts) for branch in value[1]))
        if op == "SUBPATTERN" and not value[1] and not value[2]:
            return self.ends(value[3], starts)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, items = value
            return self._repeat(least, most, items, starts)
        if op == "AT":
            return {at for at in starts if self._at(str(value), at)}
        if op in ("ASSERT", "ASSERT_NOT"):
            direction, items = value
            return {at for at in starts if self._sees(direction, items, at) == (op == "ASSERT")}
        raise ValueError(f"a pattern uses {op.lower()}, which is not looked for in names of layers")

    def _repeat(self, least: int, most: int, items: Any, starts: set[int]) -> set[int]:
        for _ in range(least):
            once = self.ends(items, starts)
            if once == starts or not once:  # what follows is the same again
                starts = once
                break
            starts = once
        found, new = set(starts), starts
        for _ in range(min(most - least, len(self.name) + 1)):
            new = self.ends(items, new) - found
            if not new:
                break
            found |= new
        return found

    def _fits(self, op: str, value: Any, char: str) -> bool:
        chars = {char, char.lower(), char.upper()} if self.ignore_case else {char}
        return any(self._is(op, value, c) for c in chars)

    def _is(self, op: str, value: Any, char: str) -> bool:
        if op == "LITERAL":
            return ord(char) == value if len(char) == 1 else False
        if op == "NOT_LITERAL":
            return ord(char) != value if len(char) == 1 else True
        if op == "ANY":
            return char != "\n"
        negated = bool(value) and str(value[0][0]) == "NEGATE"
        return negated != any(self._in(str(kind), what, char) for kind, what in value[negated:])

    @staticmethod
    def _in(kind: str, what: Any, char: str) -> bool:
        if kind == "CATEGORY":
            return _CATEGORIES[str(what)](char)
        low, high = what if kind == "RANGE" else (what, what)
        return len(char) == 1 and low <= ord(char) <= high

    def _at(self, where: str, at: int) -> bool:
        name = self.name
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return at == 0
        if where == "AT_END_STRING":
            return at == len(name)
        if where == "AT_END":
            return at == len(name) or (at == len(name) - 1 and name[at] == "\n")
        word = _CATEGORIES["CATEGORY_WORD"]
        before, after = at > 0 and word(name[at - 1]), at < len(name) and word(name[at])
        return (before != after) == (where == "AT_BOUNDARY")

    def _sees(self, direction: int, items: Any, at: int) -> bool:
        if direction > 0:
            return bool(self.ends(items, {at}))
        width = items.getwidth()[0]  # of one width, as the parser has seen to
        return at >= width and at in self.ends(items, {at - width})
