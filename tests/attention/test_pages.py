"""Pages of a KVCache: who holds which, what is copied before it is written, and what is refused."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import bitfuse
import pytest
import torch
from backends import Target, targets
from bitfuse.ops.attention.append_kv import append_kv_op
from bitfuse.ops.attention.decode_attention import decode_attention_op
from bitfuse.ops.attention.kv_cache import CACHE_FORMATS, DecodeArgs, Rotary


def cache(batch: int = 2, pages: int | None = 6, format: str = "none", **given: Any) -> bitfuse.KVCache:
    options: dict[str, Any] = dict(dtype=torch.float32, page_size=16, pages=pages, format=format)
    return bitfuse.KVCache(batch, 64, 2, 32, **options | given)


def rows(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, tokens, 2, 32), torch.randn(batch, tokens, 2, 32)


def table_of(c: bitfuse.KVCache) -> torch.Tensor:
    assert c.block_table is not None
    return c.block_table


def contents(c: bitfuse.KVCache) -> list[torch.Tensor]:
    return [t.clone() for b in range(len(c.seqlens)) for t in c.gather(b)]


@pytest.mark.parametrize("backend", ("cpp", "reference"))
def test_entries_without_a_page(backend: str) -> None:
    """They are -1, never a page of somebody else; what meets them is refused before anything is written."""
    c = cache(1, pages=2)
    k, v = rows(1, 48)
    assert table_of(c).tolist() == [[-1] * 4]
    with bitfuse.use_backend(backend):
        with pytest.raises(
            ValueError, match="sequence 0 needs 3 more pages for 48 tokens, and 2 of 2 are free"
        ):
            c.append(k, v)
        assert c.seqlens.tolist() == [0] and not c.tensors.k.any() and c.free_pages == 2
        # what the host did not prepare, as in a compiled step
        words = r"block_table\[0, 0\] is -1, expected 0 to 1: sequence 0 has no page there"
        with pytest.raises(ValueError, match=words):
            append_kv_op(k, v, c.tensors, c.seqlens, Rotary())
        c.append(k[:, :32], v[:, :32])
        assert torch.equal(c.gather(0)[0], k[0, :32])
        c.seqlens.fill_(40)
        with pytest.raises(ValueError, match=r"block_table\[0, 2\] is -1"):
            bitfuse.decode_attention(torch.randn(1, 1, 2, 32), c)
        with pytest.raises(ValueError, match=r"block_table\[0, 2\] is -1"):
            c.gather(0)


@pytest.mark.parametrize("pages", (6, 5, 3, 0))
def test_no_two_sequences_hold_one_page(pages: int) -> None:
    c = cache(2, pages=pages)
    k, v = rows(2, 40)
    if pages < 6:
        with pytest.raises(ValueError, match=r"sequence \d needs 3 more pages"):
            c.append(k, v)
        return
    c.append(k, v)
    for b in range(2):
        assert torch.equal(c.gather(b)[0], k[b]) and torch.equal(c.gather(b)[1], v[b])
    assert sorted(table_of(c)[:, :3].flatten().tolist()) == list(range(6))
    with pytest.raises(ValueError, match="sequence 0 needs 1 more pages for 49 tokens, and 0 of 6 are free"):
        c.append(*rows(2, 9))
    c.free(1)
    assert c.free_pages == 3 and c.seqlens.tolist() == [40, 0] and table_of(c)[1].tolist() == [-1] * 4


def test_without_pages_all_are_given_out_in_order() -> None:
    c = cache(2, pages=None)
    assert table_of(c).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for call in (lambda: c.allocate(4), lambda: c.fork(0, 1), lambda: c.free_pages):
        with pytest.raises(ValueError, match="the cache gives out no pages"):
            call()


def test_a_table_of_one_s_own_ends_the_giving_out() -> None:
    c = cache(2, pages=8)
    table_of(c).copy_(torch.arange(8).flip(0).view(2, 4))
    k, v = rows(2, 40)
    c.append(k, v)
    assert torch.equal(c.gather(1)[0], k[1]) and table_of(c)[0].tolist() == [7, 6, 5, 4]
    with pytest.raises(ValueError, match="block_table was written by hand"):
        c.allocate(64)
    c.reset()
    assert table_of(c)[0].tolist() == [7, 6, 5, 4]


@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_a_shared_prefix_is_copied_before_it_is_written(format: str) -> None:
    c, twin = (cache(3, pages=12, format=format) for _ in range(2))
    k, v = rows(3, 41)
    for one in (c, twin):
        one.append(k, v)
    c.free([1, 2])
    c.fork(0, [1, 2])
    twin.append(*rows(3, 0))
    assert c.seqlens.tolist() == [41] * 3
    assert table_of(c)[1, :2].tolist() == table_of(c)[0, :2].tolist()  # whole pages are shared
    assert len({int(p) for p in table_of(c)[:, 2]}) == 3  # the third is not full
    assert c.free_pages == 12 - 2 - 3
    wanted = twin.gather(0)
    for b in range(3):
        assert all(torch.equal(x, y) for x, y in zip(c.gather(b), wanted, strict=True))
    new = rows(3, 9)
    alone = cache(3, pages=12, format=format)
    alone.append(*(t[:1].expand(3, -1, -1, -1) for t in (k, v)))
    for one in (c, alone):
        one.append(*new)
    for got, fresh in zip(contents(c), contents(alone), strict=True):
        assert torch.equal(got, fresh)
    # taken back into the shared pages: who writes there copies, the others keep what they have
    before = contents(c)
    c.truncate(32, 1)
    c.append(*rows(3, 2))
    for b in (0, 2):
        for kept, was in zip(c.gather(b), before[2 * b : 2 * b + 2], strict=True):
            assert torch.equal(kept[:48], was[:48])
    if format not in ("int8", "int4"):
        c.truncate(20, 1)
        c.append(*rows(3, 1))
        assert int(table_of(c)[1, 1]) != int(table_of(c)[0, 1]) == int(table_of(c)[2, 1])
        for kept, was in zip(c.gather(0), before[:2], strict=True):
            assert torch.equal(kept[:48], was[:48])


@pytest.mark.parametrize("format", ("none", "int8"))
def test_beams_are_reordered(format: str) -> None:
    c = cache(3, pages=9, format=format)
    c.append(*rows(3, 37))
    before = contents(c)
    assert c.free_pages == 0
    c.reorder([1, 0, 2])  # nothing is shared, so nothing is copied, with no page free
    c.reorder(torch.tensor([1, 1, 2]))
    for b, source in enumerate([0, 0, 2]):
        for x, y in zip(c.gather(b), before[2 * source : 2 * source + 2], strict=True):
            assert torch.equal(x, y)
    assert c.free_pages == 2
    for order, words in (([0, 1], "has 2 indices, expected 3"), ([0, 1, 3], "holds 3, expected 0 to 2")):
        with pytest.raises(ValueError, match=words):
            c.reorder(order)


@pytest.mark.parametrize("page_size", (None, 16))
@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_a_path_of_a_tree_is_kept(format: str, page_size: int | None) -> None:
    """As if only the accepted nodes had been appended, and what comes after them."""
    given: dict[str, Any] = dict(format=format, page_size=page_size, pages=None, group_size=16)
    path = torch.tensor([[0, 3, 4, 6, -1, -1, -1], [2, -1, -1, -1, -1, -1, -1]])
    for length in (3, 12, 29):
        c, wanted = (cache(2, **given) for _ in range(2))
        (k, v), (new_k, new_v), (next_k, next_v) = rows(2, length), rows(2, 7), rows(2, 5)
        c.append(k, v)
        c.append(new_k, new_v)
        c.keep_path(path, torch.tensor([4, 1]))
        assert c.seqlens.tolist() == [length + 4, length + 1]
        c.append(next_k, next_v)
        for b, kept in enumerate(([0, 3, 4, 6], [2])):
            made = (
                torch.cat(parts)
                for parts in ((k[b], new_k[b, kept], next_k[b]), (v[b], new_v[b, kept], next_v[b]))
            )
            wanted.reset()
            wanted.append(*(t.expand(2, -1, -1, -1) for t in made))
            assert all(torch.equal(x, y) for x, y in zip(c.gather(b), wanted.gather(b), strict=True))
    with pytest.raises(ValueError, match="path has shape"):
        c.keep_path(path[0], torch.tensor([4, 1]))


def test_a_long_life() -> None:
    """Against plain lists of tokens: what is shared, freed, cut and written again is never mixed up."""
    draw = random.Random(0)
    c = cache(4, pages=11, format="none")
    held: list[list[torch.Tensor]] = [[] for _ in range(4)]
    refused = 0
    for _ in range(300):
        b, other, n = draw.randrange(4), draw.randrange(4), draw.randrange(1, 12)
        kind = draw.choice("aaaaftkrl")
        try:
            if kind == "a":
                k, v = rows(4, n)
                c.append(k, v)
                for sequence, own in zip(held, k, strict=True):
                    sequence.extend(own)
            elif kind == "f":
                c.free(b)
                held[b] = []
            elif kind == "t":
                c.truncate(n, [b])
                held[b] = held[b][:n]
            elif kind == "k":
                c.fork(b, [other])
                held[other] = list(held[b])
            elif kind == "r":
                order = [draw.randrange(4) for _ in range(4)]
                c.reorder(order)
                held = [list(held[i]) for i in order]
            else:
                c.seqlens[b] = max(0, len(held[b]) - 2)  # by hand
                held[b] = held[b][: max(0, len(held[b]) - 2)]
        except ValueError as error:
            assert "free" in str(error) or "full" in str(error)
            refused += 1
            c.free(draw.randrange(4))
            held = [own[: int(m)] for own, m in zip(held, c.seqlens, strict=True)]
        assert c.seqlens.tolist() == [len(own) for own in held]
        for i, own in enumerate(held):
            assert torch.equal(c.gather(i)[0], torch.stack(own) if own else torch.zeros(0, 2, 32))
    c.free()
    assert c.free_pages == 11 and refused and table_of(c).eq(-1).all()


def test_lengths_are_counted_on_the_host() -> None:
    """As on a GPU, where nothing may wait: seqlens are read only where somebody else wrote to them."""
    c = cache(2, pages=8)
    read: list[int] = []
    plain = c.refresh

    def refresh() -> None:
        read.append(1)
        plain()

    c.refresh = refresh  # type: ignore[method-assign]

    class NotHere(torch.Tensor):
        is_cpu = property(lambda self: False)

    c.seqlens = c.seqlens.as_subclass(NotHere)
    c.append(*rows(2, 3))
    read.clear()
    for _ in range(3):
        c.append(*rows(2, 5))
        bitfuse.decode_attention(torch.randn(2, 1, 2, 32), c, k=rows(2, 1)[0], v=rows(2, 1)[1])
    c.fork(0, 1)
    c.truncate(9)
    c.append(*rows(2, 30))
    assert not read and c._lengths == [39, 39] == c.seqlens.tolist()
    c.seqlens.sub_(4)
    c.append(*rows(2, 1))
    assert len(read) == 1 and c._lengths == [36, 36]


def test_copies_and_pickles_know_their_pages() -> None:
    c = cache(2, pages=6)
    k, v = rows(2, 20)
    c.append(k, v)
    for other in (copy.deepcopy(c), pickle.loads(pickle.dumps(c))):
        assert other.free_pages == 2
        other.append(*rows(2, 16))
        assert other.free_pages == 0 and c.free_pages == 2
        assert torch.equal(c.gather(1)[0], k[1]) and torch.equal(other.gather(1)[0][:20], k[1])


@pytest.mark.parametrize("inside", (False, True))
def test_inference_mode(inside: bool) -> None:
    with torch.inference_mode(not inside):
        c = cache(2, pages=6)
        c.append(*rows(2, 20))
    with torch.inference_mode(inside):
        c.append(*rows(2, 20))
        c.seqlens = c.seqlens - 10
        c.append(*rows(2, 5))
    assert c.seqlens.tolist() == [35, 35] and c.free_pages == 0


def test_a_compiled_step_takes_what_was_allocated() -> None:
    c = cache(2, pages=6)
    k, v = rows(2, 40)
    step = torch.compile(
        lambda q, k, v: bitfuse.decode_attention(q, c, k=k, v=v), fullgraph=True, backend="aot_eager"
    )
    q = torch.randn(2, 1, 2, 32)
    with pytest.raises(ValueError, match=r"block_table\[0, 0\] is -1.*KVCache.allocate"):
        step(q, k[:, :1], v[:, :1])
    c.seqlens.zero_()
    c.allocate(40)
    for i in range(3):
        step(q, k[:, i : i + 1], v[:, i : i + 1])
    assert torch.equal(c.gather(1)[0], k[1, :3])
    c.append(k[:, 3:], v[:, 3:])
    assert torch.equal(c.gather(0)[1], v[0]) and c.free_pages == 0


def test_refusals() -> None:
    c = cache(2, pages=6, format="int8")
    c.append(*rows(2, 40))
    calls: list[tuple[Any, str]] = [
        (
            lambda: c.allocate(65),
            "sequence 0 is to have 65 tokens, expected at most 64: the cache of sequence 0",
        ),
        (lambda: c.allocate(-1), "length is -1, expected 0 or more"),
        (lambda: c.allocate(10, 2), "sequences holds 2, expected 0 to 1"),
        (lambda: c.free(torch.ones(3, dtype=torch.bool)), r"a mask of shape \[3\], expected \[2\]"),
        (lambda: c.truncate(5), "length is 5, expected a multiple of 16, or 24 or more: sequence 0 has 40"),
        (lambda: c.truncate(-1), "length is -1"),
        (lambda: c.fork(0, 1, 41), "length is 41, expected 0 to 40, as sequence 0 has"),
        (lambda: c.fork(0, 1, 7), "length is 7, expected a multiple of 16"),
        (lambda: c.append(*rows(2, 30)), "sequence 0 is to have 70 tokens.*is full"),
    ]
    before = contents(c)
    for call, words in calls:
        with pytest.raises(ValueError, match=words):
            call()
        assert c.free_pages == 0 and c.seqlens.tolist() == [40, 40]
    with pytest.raises(TypeError):
        c.append(*(t.half() for t in rows(2, 1)))
    assert all(torch.equal(a, b) for a, b in zip(before, contents(c), strict=True))


@pytest.mark.parametrize("target", targets("triton", "cuda"), ids=str)
def test_a_gpu_leaves_out_what_has_no_page(target: Target) -> None:
    """Neither written nor read: the pages of others stay as they are."""
    c = cache(2, pages=4, dtype=torch.float16)
    k, v = (t.half() for t in rows(2, 32))
    c.append(k[:, :16], v[:, :16])  # pages 0 and 1
    c.allocate(32, 1)
    seqlens = torch.tensor([16, 16], dtype=torch.int32)
    table = table_of(c).clone()
    assert table[0].tolist() == [0, -1, -1, -1]
    tensors = c.tensors._replace(
        **dict(zip(("k", "v", "block_table"), target.place(c.tensors.k, c.tensors.v, table), strict=True))
    )
    before = tensors.k.clone()
    q, new_k, new_v, lengths = target.place(
        torch.randn(2, 1, 2, 32).half(), k[:, 16:17], v[:, 16:17], seqlens
    )
    a = DecodeArgs(32**-0.5)
    args = (q, new_k, new_v, tensors, lengths, Rotary(), a)
    if target.reason(decode_attention_op, *args) is not None:
        return
    out, _ = target.run(decode_attention_op, *args)
    untouched = torch.ones(4, 16, dtype=torch.bool)
    untouched[int(table[1, 1]), 0] = False
    assert torch.equal(tensors.k.cpu()[untouched], before.cpu()[untouched])
    for b, tokens in ((0, 16), (1, 17)):
        wanted = bitfuse.attention(q.cpu()[b : b + 1], k[b : b + 1, :tokens], v[b : b + 1, :tokens])
        torch.testing.assert_close(out.cpu()[b : b + 1], wanted, rtol=2e-3, atol=2e-3)
