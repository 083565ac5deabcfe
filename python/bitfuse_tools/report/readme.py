"""The tables of a README, from the files of results: what stands between two marks is made here alone.

    <!-- bitfuse:figures lowbit_linear on amd-epyc-family-26-2-cores -->
    ...
    <!-- /bitfuse:figures -->

The name is one of `TABLES`, which tell a story, or `OP:SIZE`, a plain table of an op's milliseconds over a
size ("lowbit_linear:m"). `on DEVICE` may be left out where there are results of one device.

What stands between <!-- bitfuse:ops --> and <!-- /bitfuse:ops --> says which backend serves which op.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from ..bench.results import ResultsError
from . import ops
from .figures import Device, OpFigures, Row, number, percent, said, short, three, times

BLOCK = re.compile(
    r"(?P<open><!-- bitfuse:figures (?P<name>\S+)(?: on (?P<device>\S+))? -->\n)(?P<body>.*?)"
    r"(?P<close><!-- /bitfuse:figures -->)",
    re.DOTALL,
)
OPS = re.compile(r"(<!-- bitfuse:ops -->\r?\n).*?(<!-- /bitfuse:ops -->)", re.DOTALL)
MARK = re.compile(r"<!-- /?bitfuse:figures")
OPS_MARK = re.compile(r"<!-- /?bitfuse:ops")


def rewrite(text: str, devices: Sequence[Device]) -> str:
    """A README's text with the tables between its marks made anew.

    Args:
        text: of the README, in UTF-8 Markdown.
        devices: what `load` found.

    Raises:
        ResultsError: no marks, marks that do not pair, a name that no table has, a device or a case that the
            files lack.
    """
    text, served = OPS.subn(lambda block: block[1] + ops_table() + block[2], text)
    if len(OPS_MARK.findall(text)) != 2 * served:
        raise ResultsError(
            "a mark in the README stands alone; each <!-- bitfuse:ops --> needs its <!-- /bitfuse:ops -->"
        )
    blocks = list(BLOCK.finditer(text))
    if not blocks and not served:
        raise ResultsError(
            "the README has no tables to rewrite; put <!-- bitfuse:figures NAME --> and "
            "<!-- /bitfuse:figures --> where one should stand, on lines of their own, NAME one of "
            f"{', '.join(TABLES)} or OP:SIZE"
        )
    if any(MARK.search(block["body"]) for block in blocks) or len(MARK.findall(text)) != 2 * len(blocks):
        raise ResultsError(
            "a mark in the README stands alone; each <!-- bitfuse:figures NAME --> needs its "
            "<!-- /bitfuse:figures -->"
        )
    return BLOCK.sub(lambda block: block["open"] + _made(block, devices) + block["close"], text)


def _made(block: re.Match[str], devices: Sequence[Device]) -> str:
    device = _device(block["name"], block["device"], devices)
    name = block["name"]
    try:
        if name in TABLES:
            return TABLES[name](device)
        op, colon, size = name.partition(":")
        if colon:
            return plain(_figures(device, op), size)
    except LookupError as error:
        raise ResultsError(
            f"the README's table {name} can't be made from {device.slug}'s results: {error.args[0]}"
        ) from None
    raise ResultsError(f"no table {name!r}; there are {', '.join(TABLES)} and OP:SIZE, as lowbit_linear:m")


def _device(name: str, slug: str | None, devices: Sequence[Device]) -> Device:
    found = [device for device in devices if slug in (None, device.slug)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ResultsError(
            f"the README's table {name} wants results of {slug}, which are not among those given"
        )
    raise ResultsError(
        f"the README's table {name} names no device and there are several; write "
        f"<!-- bitfuse:figures {name} on {found[0].slug} -->, or choose with --device"
    )


def _figures(device: Device, op: str) -> OpFigures:
    for figures in device.ops:
        if figures.op == op:
            return figures
    raise LookupError(f"they have no {op}")


def _row(figures: OpFigures, case: str, dtype: str | None = None, **place: Any) -> Row:
    """The row of a case at a place."""
    for row in figures.rows:
        here = all(row.place.get(key) == value for key, value in place.items())
        if here and row.case == case and row.dtype == (dtype or row.dtype):
            return row
    where = ", ".join([dtype or "any dtype", *(f"{key} {value}" for key, value in place.items())])
    raise LookupError(f"no row {case!r} with {where} in {figures.op}")


def _over(row: Row, peer: str) -> float:
    if peer not in row.ratio:
        raise LookupError(f"row {row.case!r} has no ratio to {peer}")
    return row.ratio[peer]


def _share(row: Row) -> str:
    if row.share is None:
        raise LookupError(f"row {row.case!r} has no share of the limit")
    return percent(row.share)


def _ceilings(device: Device) -> str:
    """What shares are of, in a sentence."""
    read, rates = device.limits.bytes_per_s, device.limits.flop_per_s
    if read is None or not rates:
        raise LookupError("no ceiling of the machine is known")
    said = [f"{three(rate.value / 1e12)} TFLOP/s with x in {short(dtype)}" for dtype, rate in rates.items()]
    return (
        f"Shares are of the most that anything reached on this machine, peers included: "
        f"{three(read.value / 1e9)} GB/s, {' and '.join(said)}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, *rows]
    made = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) + "\n" for line in lines]
    return made[0] + "|" + "---|" * len(head) + "\n" + "".join(made[1:])


def _prose(*parts: str) -> str:
    """A paragraph after a table."""
    words = re.sub(r"M = (\d)", "M\u00a0=\u00a0\\1", " ".join(parts))  # what belongs together stays on a line
    lines = textwrap.fill(words, 140, break_long_words=False, break_on_hyphens=False)
    return "\n" + lines.replace("\u00a0", " ") + "\n"


def _bold(words: str, strong: bool) -> str:
    return f"**{words}**" if strong else words


def ops_table() -> str:
    """Which backend serves which op."""
    return _table(ops.head(), ops.lines()) + _prose(ops.USUAL)


SIZES = (1, 16, 128)


Line = tuple[str, str, str, str]  # words, case, dtype, direction


def _by_m(figures: OpFigures, lines: Sequence[Line]) -> list[list[Row]]:
    """The rows of each line at each M."""
    return [
        [_row(figures, case, dtype, direction=way, m=m, n=4096, k=4096) for m in SIZES]
        for _, case, dtype, way in lines
    ]


def _measured(figures: OpFigures, lines: Sequence[Line]) -> list[Line]:
    """The lines less those of packages that were not there."""
    cases = {row.case for row in figures.rows}
    return [line for line in lines if line[1] in cases or line[1].startswith(("bitfuse", "torch"))]


def _fastest(rows: Sequence[Sequence[Row]]) -> list[Row]:
    """Of each column."""
    return [min(column, key=lambda row: row.median_ms) for column in zip(*rows, strict=True)]


def lowbit_linear(device: Device) -> str:
    """Few-bit products beside torch, bitsandbytes and onnxruntime."""
    figures = _figures(device, "lowbit_linear")
    f32, bf16, way = "float32", "bfloat16", "forward"
    lines = [
        ("torch fp32", "torch float32", f32, way),
        ("torch bf16", "torch bfloat16", bf16, way),
        ("bitsandbytes NF4, x bf16", "bitsandbytes NF4", bf16, way),
        ("onnxruntime int4, x fp32", "onnxruntime int4 (float32 activations)", f32, way),
        ("onnxruntime int4, x fp32 rounded to int8", "onnxruntime int4 (int8 activations)", f32, way),
        ("**bitfuse int4, x fp32**", "bitfuse int4 (cpp)", f32, way),
        ("**bitfuse int4, x bf16**", "bitfuse int4 (cpp)", bf16, way),
        ("bitfuse nf4, x bf16", "bitfuse nf4 (cpp)", bf16, way),
        ("bitfuse int8, x bf16", "bitfuse int8 (cpp)", bf16, way),
        ("bitfuse fp8, x bf16", "bitfuse fp8 (cpp)", bf16, way),
    ]
    lines = _measured(figures, lines)
    rows = _by_m(figures, lines)
    best = _fastest(rows)
    noted = {
        id(best[0]): lambda row: f" ({_share(row)} of the bandwidth)",
        id(best[2]): lambda row: f" ({_share(row)} of the best rate)",
    }

    def cell(row: Row) -> str:
        note = noted[id(row)](row) if id(row) in noted and row.own else ""
        return _bold(three(row.median_ms), any(row is b for b in best)) + note

    table = _table(
        ["", *(f"M = {m}" for m in SIZES)],
        [[line[0], *map(cell, at)] for line, at in zip(lines, rows, strict=True)],
    )
    x32, x16, nf4 = _by_m(figures, [line for line in lines if line[1] == "bitfuse int4 (cpp)"]) + _by_m(
        figures, [line for line in lines if line[1] == "bitfuse nf4 (cpp)"]
    )
    over = sorted(_over(row, "torch bf16") for row in (x32[0], x16[0]))
    calls = figures.setting.overhead_us
    compiled = "compiled function" if "compiled function" in calls else "backend module"  # before, and now
    for name in ("bitfuse.lowbit_linear", compiled, "torch.nn.functional.linear"):
        if name not in calls:
            raise LookupError(f"no overhead of {name!r}")
    python = calls["bitfuse.lowbit_linear"] - calls[compiled]

    def each(own: str, rows: Sequence[Row], peer: str, words: str) -> list[str]:
        """The ratios to a peer at every M, whichever way they go; nothing where it was not there."""
        if not all(peer in row.ratio for row in rows):
            return []
        *first, last = (times(row.ratio[peer]) for row in rows)
        return [f"{own} {', '.join(first)} and {last} times while {words}"]

    beside = [
        *each("nf4 (x bf16) runs", nf4, "bitsandbytes", "bitsandbytes' NF4 runs once"),
        *each("int4 (x fp32)", x32, "onnxruntime fp32", "onnxruntime's int4 does"),
        *each(
            "int4 (x fp32)", x32, "onnxruntime int8", "that with x rounded to int8 does, which is less exact"
        ),
    ]
    *sizes, largest = map(str, SIZES)
    peers = f"At M = {', '.join(sizes)} and {largest} {'; '.join(beside)}." if beside else ""
    return table + _prose(
        "The ratios are taken within a round of one process: int4 runs M = 1 at",
        f"{times(_over(x32[0], 'torch fp32'))} times torch fp32 (x fp32) and {times(over[0])} to",
        f"{times(over[1])} times torch bf16, M = 16 at {times(_over(x16[1], 'torch bf16'))} and M = 128 at",
        f"{times(_over(x16[2], 'torch bf16'))} times torch bf16.",
        peers,
        _ceilings(device),
        f"A call costs {python:.1f} µs of Python over",
        "the compiled function; `torch.nn.functional.linear` of the same tiny size takes",
        f"{calls['torch.nn.functional.linear']:.1f} in all.",
    )


def lora_linear(device: Device) -> str:
    """An adapter's price, forward and backward, beside PEFT; many adapters; the optimiser."""
    figures = _figures(device, "lora_linear")
    case, dtype = "bitfuse int4 (cpp)", "bfloat16"
    lines = [
        ("int4 alone, y", case, dtype, "forward"),
        ("with an adapter in bf16", f"{case} + LoRA bfloat16", dtype, "forward"),
        ("with an adapter in fp32", f"{case} + LoRA float32", dtype, "forward"),
        (
            "PEFT on bitsandbytes NF4, adapter in fp32",
            "PEFT, bitsandbytes NF4 + LoRA float32",
            dtype,
            "forward",
        ),
        ("**dX, dA, dB, adapter in fp32**", f"{case} + LoRA float32", dtype, "gradient"),
    ]
    lines = _measured(figures, lines)
    rows = _by_m(figures, lines)
    cells = [[three(row.median_ms) for row in line] for line in rows]
    for at in (0, 2):
        gain = rows[-1][at].ratio.get("PEFT")
        cells[-1][at] = f"**{cells[-1][at]}**" + (f" ({times(gain)} times PEFT)" if gain else "")
    table = _table(
        ["", *(f"M = {m}" for m in SIZES)],
        [[line[0], *at] for line, at in zip(lines, cells, strict=True)],
    )
    brain, single = (
        [percent(1 / _over(row, "no adapter") - 1) for row in (line[0], line[2])] for line in rows[1:3]
    )
    wide = sorted({brain[1], single[1]}, key=lambda share: float(share.rstrip("%")))
    return table + _prose(
        f"Within a round an adapter costs {brain[0]} (bf16) or {single[0]} (fp32) at M = 1, where its bytes",
        f"count, and {' to '.join(wide)} at M = 128.",
    )


def multi_lora_linear(device: Device) -> str:
    """Many adapters in a batch, in a sentence."""
    figures = _figures(device, "multi_lora_linear")
    row = _row(figures, "bitfuse int4 (cpp)", "bfloat16", m=64, n=4096, k=4096, mix="distinct")
    return _prose(
        f"{row.place['adapters']} adapters in a batch of {row.place['m']} rows, each row its own:",
        f"{1 / _over(row, 'no adapter'):.2f} times the product without any; a loop over adapters takes",
        f"{_over(row, 'a loop over adapters'):.2f} times as long (`multi_lora_linear.json`).",
    ).lstrip("\n")


def adamw8bit(device: Device) -> str:
    """What a step with 8-bit states costs, in a sentence."""
    figures = _figures(device, "adamw8bit")
    row = _row(figures, "bitfuse AdamW8bit (cpp)", "float32", parameters=1 << 24)
    theirs = row.ratio.get("bitsandbytes")
    return _prose(
        f"A step of `AdamW8bit` over {number(row.place['parameters'])} fp32 parameters takes",
        f"{_as_long(_over(row, 'torch fused'))} that of torch's fused AdamW,",
        f"{_as_long(_over(row, 'torch foreach'))} that of its foreach one"
        + (f" and {_as_long(theirs)} that of bitsandbytes'" if theirs else ""),
        "(`adamw8bit.json`): it is for memory.",
    ).lstrip("\n")


def _as_long(ratio: float) -> str:
    """How long it takes, beside a peer: 1.6 times, 1/3.4 of."""
    return f"1/{times(ratio)} of" if ratio > 1 else f"{times(1 / ratio)} times"


def attention(device: Device) -> str:
    """Prefill and training beside torch's SDPA, and decoding from a cache."""
    figures, decode = _figures(device, "attention"), _figures(device, "decode_attention")

    def pair(layer: str) -> tuple[Row, Row]:
        peer, own = (_row(figures, case, "bfloat16", layer=layer) for case in ("torch", "bitfuse (cpp)"))
        return peer, own

    def line(words: str, layer: str, note: Callable[[Row], str], strong: bool = False) -> list[str]:
        peer, own = pair(layer)
        gain = f"{times(_over(own, 'torch'))} times"
        return [words, three(peer.median_ms), _bold(three(own.median_ms), strong), gain + note(own)]

    cache: dict[str, Any] = {"batch": 1, "length": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128}

    def cached(form: str) -> Row:
        return _row(decode, f"bitfuse {form} (cpp)", **cache)

    plain, paged = cached("bfloat16, contiguous"), cached("bfloat16, pages of 16")
    peer = _row(decode, "torch sdpa, enable_gqa", **cache)
    few = " / ".join(three(cached(f"{form}, contiguous").median_ms) for form in ("int8", "fp8", "int4"))
    by_hand = times(_over(plain, "torch matmul"))
    gain = f"{times(_over(plain, 'torch sdpa'))} times; {by_hand} times a matmul, heads grouped by hand"
    return _table(
        ["", "torch's SDPA", "bitfuse", ""],
        [
            line(
                "prefill, 32 heads, 1024 tokens, causal",
                "prefill",
                lambda row: f"; {_share(row)} of the best rate",
                strong=True,
            ),
            line("the same, not causal", "full", lambda row: f"; {_share(row)}"),
            line("32/8 heads, 2048 tokens, window of 256", "window", lambda _: ""),
            line("forward and backward, causal", "training", lambda _: ""),
            [
                "decode, 32/8 heads, 4096 keys, from memory",
                three(peer.median_ms),
                _bold(three(plain.median_ms), True),
                gain,
            ],
            ["the same, pages of 16", "", three(paged.median_ms), ""],
            ["the same, cache in int8 / fp8 / int4", "", few, ""],
        ],
    )


def demo(device: Device) -> str:
    """What a real model gains and pays."""
    record = device.demo
    if record is None:
        raise LookupError("there is no demo.json beside them")

    def cosines(quality: dict[str, Any]) -> str:
        mean, worst = quality["cosine_mean"], quality["cosine_worst"]
        if worst > 1 - 1e-6:
            return "1"
        digits = 4 if mean > 0.99 else 3
        # what is not 1 must not read as 1
        return f"{min(mean, 0.9999):.{digits}f} ({min(worst, 0.9999):.{digits}f})"

    table = _table(
        [
            "",
            "linear layers, MB",
            f"batch of {record['batch_size']}, ms",
            "one sentence, ms",
            "cosine to fp32, English, mean (worst)",
        ],
        [
            [
                row["name"],
                f"{row['linear_bytes'] / 1e6:.1f}",
                three(row["batch_ms"]["median"]),
                three(row["sentence_ms"]["median"]),
                cosines(row["quality"]["English"]),
            ]
            for row in sorted(record["rows"], key=lambda row: -row["linear_bytes"])
        ],
    )
    return table + _prose(
        f"A batch of {record['batch_tokens']} tokens is bound by arithmetic, where few bits save no time; a",
        "sentence is bound by reading weights, where they do.",
    )


def plain(figures: OpFigures, size: str) -> str:
    """Milliseconds of every case over a size, the fastest of each place in bold.

    Raises:
        LookupError: the op does not vary in that size.
    """
    values = sorted({row.place[size] for row in figures.rows if isinstance(row.place.get(size), int | float)})
    if not values:
        raise LookupError(f"{figures.op} has no size {size!r}")
    lines: dict[tuple[str, str], dict[Any, Row]] = {}
    for row in figures.rows:
        where = figures.where(row, (size,))
        words = [short(row.case), short(row.dtype), where]
        if short(row.dtype) in words[0].split():
            words.pop(1)
        if size in row.place:
            lines.setdefault((", ".join(w for w in words if w), where), {})[row.place[size]] = row
    best = {
        (where, value): min(
            (at[value].median_ms for (_, other), at in lines.items() if other == where and value in at),
            default=0.0,
        )
        for _, where in lines
        for value in values
    }

    def cell(row: Row | None, where: str) -> str:
        if row is None:
            return ""
        return _bold(three(row.median_ms), row.median_ms == best[where, row.place[size]])

    return _table(
        ["milliseconds", *(said(size, value) for value in values)],
        [[words, *(cell(at.get(value), where) for value in values)] for (words, where), at in lines.items()],
    )


TABLES: dict[str, Callable[[Device], str]] = {
    "lowbit_linear": lowbit_linear,
    "lora_linear": lora_linear,
    "multi_lora_linear": multi_lora_linear,
    "adamw8bit": adamw8bit,
    "attention": attention,
    "demo": demo,
}
