"""Who holds which page of a paged cache: a free list and reference counts, on the host alone, as vLLM's block
manager has them (Kwon et al., 2023). `KVCache` moves the bytes and writes the block table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

Copies = list[tuple[int, int]]


class Pages:
    """The pages of a batch of sequences.

    A page belongs to every sequence that lists it, and is free when none does. What is asked for is done as a
    whole or, with a ValueError, not at all.

    Args:
        count: of pages.
        size: tokens of a page.
        sequences: how many.
        most: pages that a sequence has room for in the block table.

    Attributes:
        owned: of each sequence its pages in order.
        changed: page, or -1 for none, by place in the block table [sequences * most]: what was not written
            there yet.
    """

    def __init__(self, count: int, size: int, sequences: int, most: int) -> None:
        self.size, self.most = size, most
        self.owned: list[list[int]] = [[] for _ in range(sequences)]
        self.changed: dict[int, int] = {}
        self._holders = [0] * count
        self._free = list(range(count - 1, -1, -1))  # the last is given out first

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def prepare(self, spans: Iterable[tuple[int, int, int]]) -> Copies:
        """Make (sequence, begin, end) writable, for all of them: a page for each token up to end, and none of
        begin to end's shared with another sequence.

        Returns:
            (from, to): pages to be copied before anything is written.

        Raises:
            ValueError: a sequence has no room for so many tokens, or there are too few free pages.
        """
        places: list[
            tuple[int, int]
        ] = []  # (sequence, i): where a page is lacking, or shared and about to be written
        left: Counter[int] = Counter()  # who leaves a page to the others
        for sequence, begin, end in spans:
            own, needed = self.owned[sequence], self._pages(end)
            if needed > self.most:
                raise ValueError(
                    f"sequence {sequence} is to have {end} tokens, expected at most {self.most * self.size}: "
                    f"the cache of sequence {sequence} is full"
                )
            before = len(places)
            for i in range(begin // self.size if begin < end else needed, min(needed, len(own))):
                if self._holders[own[i]] - left[own[i]] > 1:
                    left[own[i]] += 1
                    places.append((sequence, i))
            places += [(sequence, i) for i in range(len(own), needed)]
            if len(places) > len(self._free):
                raise ValueError(
                    f"sequence {sequence} needs {len(places) - before} more pages for {end} tokens, and "
                    f"{len(self._free) - before} of {len(self._holders)} are free"
                )
        copies: Copies = []
        for sequence, i in places:
            own, page = self.owned[sequence], self._free.pop()
            self._holders[page] = 1
            if i < len(own):
                copies.append((own[i], page))
                self._holders[own[i]] -= 1
                own[i] = page
            else:
                own.append(page)
            self._changed(sequence, i, page)
        return copies

    def ready(self, spans: Iterable[tuple[int, int, int]]) -> bool:
        """Whether `prepare` would find nothing to do."""
        for sequence, begin, end in spans:
            own, needed = self.owned[sequence], self._pages(end)
            if needed > len(own) or any(self._holders[p] > 1 for p in own[begin // self.size : needed]):
                return False
        return True

    def keep(self, sequence: int, tokens: int) -> None:
        """Give back a sequence's pages past its first `tokens`."""
        own, kept = self.owned[sequence], self._pages(tokens)
        for i in range(kept, len(own)):
            self._changed(sequence, i, -1)
        self._release(own[kept:])
        del own[kept:]

    def share(self, sources: dict[int, tuple[int, int]]) -> Copies:
        """Sequences take the pages of the first tokens of others, {sequence: (source, tokens)}, in place of
        their own. The last page, where it is not full, ends as nobody else's.

        Returns:
            (from, to): pages to be copied before anything is written.

        Raises:
            ValueError: too few free pages.
        """
        lists = dict(enumerate(self.owned))
        lists |= {b: self.owned[source][: self._pages(n)] for b, (source, n) in sources.items()}
        holders = Counter(page for own in lists.values() for page in own)
        free = len(self._holders) - len(holders)
        lacking = 0
        for sequence, (_, tokens) in sources.items():
            if tokens % self.size and holders[last := lists[sequence][-1]] > 1:
                holders[last] -= 1
                lacking += 1
        if lacking > free:
            raise ValueError(
                f"{lacking} pages are to be copied, and {free} of {len(self._holders)} would be free"
            )
        for sequence in sources:
            for page in lists[sequence]:
                self._holders[page] += 1
        for sequence in sources:
            old, new = self.owned[sequence], lists[sequence]
            self._release(old)
            self.owned[sequence] = new
            for i in range(max(len(old), len(new))):
                self._changed(sequence, i, new[i] if i < len(new) else -1)
        return self.prepare([(b, n, n + 1) for b, (_, n) in sources.items() if n % self.size])

    def _changed(self, sequence: int, i: int, page: int) -> None:
        self.changed[sequence * self.most + i] = page

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def _release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
