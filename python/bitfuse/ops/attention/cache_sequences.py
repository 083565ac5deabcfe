"""CacheSequences: what the host knows of a cache's sequences, their lengths and their pages."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.compiler import is_compiling

from .kv_cache import BITS, CacheTensors, bytes_of
from .pages import Copies, Pages

State = tuple[torch.Tensor | None, int]  # a tensor, and how often it had been written to


def _state(t: torch.Tensor | None) -> State:
    return t, -1 if t is None or t.is_inference() else t._version


def _same(state: State, t: torch.Tensor | None) -> bool:
    """Whether it is the same tensor and nobody has written to it; not known of those of inference mode."""
    return state[0] is t and t is not None and not t.is_inference() and state[1] == t._version


Sequences = int | Iterable[int] | torch.Tensor | None


class CacheSequences:
    """The sequences of a cache: given pages, cut, shared and forgotten; `KVCache` says what is promised.

    Attributes:
        tensors, seqlens, block_table: of the cache.
        _pages: who gives out pages; None where nobody does.
        _lengths: seqlens on the host, when it was as _noted says.
        _written: block_table as it was last written to here.
    """

    tensors: CacheTensors
    seqlens: torch.Tensor
    block_table: torch.Tensor | None
    _pages: Pages | None
    _lengths: list[int]
    _noted: State
    _written: State

    def _begin(self) -> None:
        """Of a cache that has been made: no tokens."""
        self._lengths = [0] * len(self.seqlens)
        self._noted, self._written = _state(self.seqlens), _state(self.block_table)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds, of a cache with `pages`.

        Raises:
            ValueError: the cache gives out no pages.
        """
        return self._giving("free_pages").free

    def reset(self, sequences: Sequences = None) -> None:
        """Forget all tokens, or those of some sequences (indices, or a bool mask). The memory stays; pages
        that were given out are free again."""
        if self._pages is not None and not self._by_hand():
            self.free(sequences)
        elif sequences is None:
            self.seqlens.zero_()
        else:
            self.seqlens[sequences if isinstance(sequences, (int, torch.Tensor)) else list(sequences)] = 0

    def allocate(self, length: int, sequences: Sequences = None) -> None:
        """Pages for `length` tokens in all of each sequence, or of some (indices, or a bool mask), which none
        of them shares past the tokens that it has.

        Raises:
            ValueError: more tokens than a sequence has room for, or too few free pages; nothing has changed.
                The cache gives out no pages.
        """
        pages, lengths = self._giving("allocate"), self._host_lengths()
        if length < 0:
            raise ValueError(f"length is {length}, expected 0 or more")
        chosen = self._chosen(sequences)
        self._write_down(pages.prepare([(b, min(lengths[b], length), length) for b in chosen]))

    def free(self, sequences: Sequences = None) -> None:
        """Forget all tokens, or those of some sequences (indices, or a bool mask), and give back their
        pages."""
        pages, chosen = self._giving("free"), self._chosen(sequences)
        for b in chosen:
            pages.keep(b, 0)
        self._set_lengths(dict.fromkeys(chosen, 0))
        self._write_down([])

    def truncate(self, length: int, sequences: Sequences = None) -> None:
        """Take back tokens past the first `length` of each sequence, or of some (indices, or a bool mask),
        and the pages that hold none of the others. A sequence that is no longer stays as it is.

        Raises:
            ValueError: in a cache of codes the last tokens that stay are codes already: `length` is neither a
                multiple of group_size nor group_size or less below what the sequence has.
        """
        lengths = self._host_lengths()
        chosen = [b for b in self._chosen(sequences) if lengths[b] > length]
        for b in chosen:
            self._check_cut(lengths[b], length, b)
        self._set_lengths(dict.fromkeys(chosen, length))
        if self._pages is not None and not self._by_hand():
            for b in chosen:
                self._pages.keep(b, length)
            self._write_down([])

    def fork(self, source: int, targets: Sequences, length: int | None = None) -> None:
        """Make sequences begin with the first `length` tokens of another, by default all, in place of what
        they had. Whole pages are shared; one that is not full is copied.

        Raises:
            ValueError: too few free pages, or a `length` that the source has not, or can't be cut to (see
                `truncate`); nothing has changed. The cache gives out no pages.
        """
        lengths = self._host_lengths()
        (source,) = self._chosen(source)
        length = lengths[source] if length is None else length
        if not 0 <= length <= lengths[source]:
            raise ValueError(f"length is {length}, expected 0 to {lengths[source]}, as sequence {source} has")
        self._check_cut(lengths[source], length, source)
        chosen = [b for b in self._chosen(targets) if b != source]
        self._share({b: (source, length) for b in chosen})

    def reorder(self, sources: Iterable[int] | torch.Tensor) -> None:
        """Sequence b becomes what sequence sources[b] is, as beam search wants it: whole pages are shared,
        one that is not full is copied. Indices [batch] in a list; a tensor on a GPU is waited for.

        Raises:
            ValueError: too few free pages, an index that is not there; nothing has changed. The cache gives
                out no pages.
        """
        lengths = self._host_lengths()
        order = self._indices("sources", sources)
        if len(order) != len(lengths):
            raise ValueError(f"sources has {len(order)} indices, expected {len(lengths)}, one a sequence")
        self._share({b: (source, lengths[source]) for b, source in enumerate(order) if b != source})

    def refresh(self) -> None:
        """Read `seqlens` back, which waits for the device: after something moved them that the host can't
        see, such as replays of a CUDA graph."""
        self._lengths, self._noted = self.seqlens.tolist(), _state(self.seqlens)

    @property
    def gives_pages(self) -> bool:
        """Whether pages are found for new tokens: not in code that is compiled, where the host runs once."""
        return self._pages is not None and not is_compiling()

    def before_new(self, tokens: int, seqlens: torch.Tensor | None) -> None:
        """Find pages for new tokens, which are written next: at seqlens, where they are given, in place of
        the cache's own. Does nothing where the cache gives out no pages, or the host does not run each
        time."""
        if self._pages is None or is_compiling() or self._by_hand():
            return
        lengths = self._host_lengths() if seqlens is None else seqlens.tolist()
        spans = [(b, n, n + tokens) for b, n in enumerate(lengths) if n >= 0]
        if not self._pages.ready(spans):
            if self.seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    "a sequence lacks a page for its new tokens, or shares it, and a CUDA graph is captured: "
                    "KVCache.allocate gives pages out beforehand"
                )
            self._write_down(self._pages.prepare(spans))

    def after_new(self, tokens: int) -> None:
        """seqlens grow."""
        if self._pages is None or is_compiling():
            self.seqlens += tokens
            return
        known = _same(self._noted, self.seqlens)
        self.seqlens += tokens
        if known:
            self._lengths, self._noted = [n + tokens for n in self._lengths], _state(self.seqlens)

    def _host_lengths(self) -> list[int]:
        """seqlens on the host, without waiting where nobody else wrote to them."""
        if self.seqlens.is_cpu or not _same(self._noted, self.seqlens):
            self.refresh()
        return self._lengths

    def _by_hand(self) -> bool:
        """Whether somebody has written to the block table, or put another in its place."""
        return self.tensors.block_table is not self.block_table or not _same(self._written, self.block_table)

    def _giving(self, what: str) -> Pages:
        if self._pages is None:
            raise ValueError(
                f"{what}: the cache gives out no pages, expected one that was made with page_size and pages"
            )
        if self._by_hand():
            raise ValueError(f"{what}: block_table was written by hand, which ends the giving out of pages")
        return self._pages

    def _indices(self, name: str, given: Iterable[int] | torch.Tensor) -> list[int]:
        indices = [operator.index(i) for i in (given.tolist() if isinstance(given, torch.Tensor) else given)]
        for i in indices:
            if not 0 <= i < len(self.seqlens):
                raise ValueError(f"{name} holds {i}, expected 0 to {len(self.seqlens) - 1}")
        return indices

    def _chosen(self, sequences: Sequences) -> list[int]:
        """Indices of sequences, each once."""
        if sequences is None:
            return list(range(len(self.seqlens)))
        if isinstance(sequences, torch.Tensor):
            if sequences.dtype == torch.bool:
                if sequences.shape != self.seqlens.shape:
                    raise ValueError(
                        f"sequences is a mask of shape {list(sequences.shape)}, expected "
                        f"[{len(self.seqlens)}]"
                    )
                sequences = sequences.nonzero()
            sequences = sequences.flatten()
        elif not isinstance(sequences, Iterable):
            sequences = (sequences,)
        return list(dict.fromkeys(self._indices("sequences", sequences)))

    def _check_cut(self, has: int, length: int, sequence: int) -> None:
        if length < 0:
            raise ValueError(f"length is {length}, expected 0 or more")
        size = self.tensors.group_size
        if self.tensors.format in BITS and length % size and has - length > size:
            raise ValueError(
                f"length is {length}, expected a multiple of {size}, or {has - size} or more: sequence "
                f"{sequence} has {has} tokens, and those before its last {size} may be codes"
            )

    def _share(self, sources: dict[int, tuple[int, int]]) -> None:
        """{sequence: (which one's tokens it takes, how many)}"""
        self._write_down(self._giving("fork").share(sources))
        into, taken = self._on_device([list(sources), [source for source, _ in sources.values()]])
        for tail in (self.tensors.k_tail, self.tensors.v_tail):
            if tail is not None:
                tail.index_copy_(0, into, tail.index_select(0, taken))
        self._set_lengths({b: n for b, (_, n) in sources.items()})

    def _set_lengths(self, lengths: dict[int, int]) -> None:
        self._host_lengths()
        for b, n in lengths.items():
            self._lengths[b] = n
        into, values = self._on_device([list(lengths), list(lengths.values())])
        self.seqlens.index_copy_(0, into, values.to(torch.int32))
        self._noted = _state(self.seqlens)

    def _write_down(self, copies: Copies) -> None:
        """Copy pages, and write what has changed into the block table."""
        assert self._pages is not None and self.block_table is not None
        t = self.tensors
        if copies:
            source, target = self._on_device([list(side) for side in zip(*copies, strict=True)])
            of_pages = (t.k, t.v) if self.tensors.format not in BITS else t[:6]
            for tensor in of_pages:
                if tensor is not None:
                    whole = bytes_of(tensor)
                    whole.index_copy_(0, target, whole.index_select(0, source))
        if self._pages.changed:
            changed = self._pages.changed
            places, numbers = self._on_device([list(changed), list(changed.values())])
            self.block_table.view(-1).index_copy_(0, places, numbers.to(torch.int32))
            changed.clear()
            self._written = _state(self.block_table)

    def _on_device(self, numbers: list[list[int]]) -> torch.Tensor:
        """int64, moved without waiting."""
        on_gpu = self.seqlens.is_cuda
        made = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        return made.to(self.seqlens.device, non_blocking=True)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        own = self._pages is not None and not self._by_hand()
        state["_pages"] = self._pages if own else None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.refresh()
        self._written = _state(self.block_table)
