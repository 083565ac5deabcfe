"""`bitfuse explain`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .application import command, fail


@command
def explain(
    op: Annotated[str, typer.Argument(metavar="OP", help="lowbit_linear, attention, decode_attention, …")],
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="cpu, cuda (the GPU that is here), or any by name or architecture: h100, rtx4090, sm_80.",
        ),
    ] = "cpu",
    m: Annotated[int | None, typer.Option("--m", metavar="N", help="Rows of x (1).")] = None,
    n: Annotated[int | None, typer.Option("--n", metavar="N", help="out_features (4096).")] = None,
    k: Annotated[int | None, typer.Option("--k", metavar="N", help="in_features (4096).")] = None,
    format: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the weight: int4, nf4, fp8, dense, … (int4).")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="Columns that share a scale (the format's own).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="float32, float16 or bfloat16 (bfloat16).")
    ] = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="Of an adapter (16).")] = None,
    adapters: Annotated[int | None, typer.Option(metavar="N", help="How many there are (64).")] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences (1).")] = None,
    seqlen: Annotated[int | None, typer.Option(metavar="N", help="Queries of each (1024).")] = None,
    kv_len: Annotated[int | None, typer.Option(metavar="N", help="Keys in the cache (4096).")] = None,
    heads: Annotated[int | None, typer.Option(metavar="N", help="Query heads (32).")] = None,
    kv_heads: Annotated[int | None, typer.Option(metavar="N", help="Heads of K and V (8).")] = None,
    head_dim: Annotated[int | None, typer.Option(metavar="N", help="Channels of a head (128).")] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--full", help="Whether later keys hide.")] = None,
    cache: Annotated[
        str | None, typer.Option(metavar="NAME", help="The KV cache: none, fp8, int8 or int4 (none).")
    ] = None,
    page_size: Annotated[int | None, typer.Option(metavar="N", help="Tokens of a page (no pages).")] = None,
    vocab: Annotated[int | None, typer.Option(metavar="N", help="Tokens to choose from (128256).")] = None,
    drafted: Annotated[int | None, typer.Option(metavar="N", help="Draft tokens, or nodes (4).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Who would serve a call, why the others would not, its bound.

    Makes no tensor and runs nothing, so the GPU need not be here. Bytes are those of operands and results,
    moved once. The least time is theirs at the memory's rate, or that of the products at the tensor cores',
    by the data sheet. What is to be expected is of a call in a CUDA graph, its operands not in L2: launch,
    bytes at 85% of the rate, instructions as the kernel's machine code has them, partial sums.

    \b
        bitfuse explain lowbit_linear --m 1 --n 4096 --k 14336 --format nf4 --device h100
        bitfuse explain lora_linear --m 8192 --rank 64 --device sm_80
        bitfuse explain attention --seqlen 16384 --kv-heads 8 --device rtx4090
        bitfuse explain decode_attention --batch 16 --kv-len 16384 --cache int8 --page-size 64 --device a100
    """
    given = {name: value for name, value in locals().items() if name in _SIZES and value is not None}

    import torch
    from bitfuse.core.gpus import Gpu, find

    from .. import hypothetical

    try:
        call = hypothetical.EVERY.get(op)
        if call and (strange := [name for name in given if name not in call.uses]):
            options = ", ".join("--" + name.replace("_", "-") for name in call.uses)
            fail("explain", f"{op} has no --{strange[0].replace('_', '-')}; it has {options}")
        if dtype is not None:
            found = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(
                dtype
            )
            if found is None:
                fail("explain", f"no dtype {dtype!r}: there are float32, float16 and bfloat16")
            given["dtype"] = found
        gpu: Gpu | None = None
        if device == "cuda":
            if not torch.cuda.is_available():
                fail("explain", "torch sees no GPU here; name one, such as --device h100")
            gpu = find(torch.cuda.get_device_name())
        elif device != "cpu":
            gpu = find(device)
        answer = hypothetical.explain_sizes(op, hypothetical.Sizes(**given), gpu)
    except (ValueError, TypeError) as error:
        fail("explain", error)
    if not as_json:
        typer.echo(answer)
        return
    facts: dict[str, Any] = asdict(answer) | {"device": device}
    facts["cost"]["dtype"] = str(answer.cost.dtype)[6:]
    if answer.rates is not None:
        least, by = answer.cost.seconds(answer.rates)
        expected = answer.prediction or answer.cost.predicted(answer.rates)
        facts |= {"least_s": least, "bound": by, "predicted_s": expected.seconds}
    typer.echo(json.dumps(facts, indent=1))


_SIZES = (
    "m", "n", "k", "format", "group_size", "dtype", "rank", "adapters", "batch", "seqlen", "kv_len", "heads",
    "kv_heads", "head_dim", "causal", "cache", "page_size", "vocab", "drafted",
)  # fmt: skip
