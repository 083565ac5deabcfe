"""`bitfuse generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import command, fail


@command
def generate(
    model: Annotated[
        Path, typer.Option(metavar="PATH", help="A .gguf file, or a folder with a transformers model.")
    ],
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to continue.", show_default="standard input")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--plain", help="Put the prompt into the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message, with --chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", metavar="N")] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="0 takes the most likely token each time.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="N", help="Tokens that are kept; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(metavar="X", help="Fewest tokens of so much probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(metavar="X", help="Share of the largest probability.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of sampling.", show_default="another each time")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Quantise what the file holds in floats: int4, nf4, …; int4:32 is int4 with groups of 32.",
            show_default="as the file has it",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Of activations: float32, float16 or bfloat16.", show_default="the model's"
        ),
    ] = None,
    cache: Annotated[
        str, typer.Option(metavar="NAME", help="Keys and values: none (as activations), fp8, int8 or int4.")
    ] = "none",
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Speculate, without changing what comes out: lookup, layers:A-B, or a smaller model's path.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads.", show_default="torch's own choice")
    ] = None,
) -> None:
    """Text from a language model, on the CPU, as it comes; ends with tokens per second.

    A file that is in few bits already is run as it is. Each token is one native call. The text goes to
    standard output, everything else to standard error. Ctrl-C ends the text early.

    \b
        bitfuse generate --model SmolLM2-135M-Instruct.Q4_1.gguf --chat --prompt "What is a kernel?"
        bitfuse generate --model my-llama --format int4:32 --prompt "def fibonacci(n):" --draft lookup
        cat article.txt | bitfuse generate --model model.gguf --chat --cache int8 --temperature 0.7
    """
    from ..generation import GenerationError, Options, run

    try:
        run(
            Options(
                model=model, prompt=prompt, chat=chat, system=system, max_new_tokens=max_new_tokens,
                temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, format=format,
                dtype=dtype, cache=cache, draft=draft, threads=threads,
            )
        )  # fmt: skip
    except GenerationError as error:
        fail("generate", error)
