"""`bitfuse demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import command, fail


@command
def demo(
    formats: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Formats to compare, separated by commas; int4:32 is int4 with groups of 32 columns.",
        ),
    ] = "int8,int4,nf4,fp8",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda or cuda:N.")] = "cpu",
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder of any local transformers model, instead of the packaged one. "
            "Memory holds it once in fp32, once in bf16 and once a format.",
            show_default="all-MiniLM-L6-v2",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for results.json and chart.png; made when missing.")
    ] = Path("demo"),
    batch_size: Annotated[int, typer.Option(metavar="N", help="Sentences in a batch.")] = 32,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads.", show_default="torch's own choice")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Activations of the few-bit models: float32, bfloat16, float16, or auto: "
            "what the float model runs faster in.",
        ),
    ] = "auto",
    seconds: Annotated[
        float, typer.Option(metavar="S", help="Time to spend on timing; at least 5 rounds are done.")
    ] = 40.0,
) -> None:
    """A real sentence model in few bits: gain and price.

    Embeds sixty pairs of sentences, English and Korean, with the model as it is (fp32, bf16) and with its
    linear layers in each format, then prints megabytes, milliseconds, the cosine to the fp32 embeddings and
    which backend ran.

    Needs the extra: pip install 'bitfuse[demo]'. Uses no network. For example:

    \b
        bitfuse demo
        bitfuse demo --formats int4,int4:32,nf4 --threads 4 --out results
        bitfuse demo --device cuda --batch-size 256
        bitfuse demo --model ./my-model --dtype bfloat16
    """
    from ..demo import DemoError, Options, run

    names = tuple(dict.fromkeys(name.strip() for name in formats.split(",") if name.strip()))
    try:
        run(Options(names, device, model, out, batch_size, threads, dtype, seconds))
    except DemoError as error:
        fail("demo", error)
