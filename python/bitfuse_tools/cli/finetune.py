"""`bitfuse finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import command, fail


@command
def finetune(
    format: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Format of the frozen linear layers; int4:32 is int4 with groups of 32 columns.",
        ),
    ] = "nf4",
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over the training messages.")] = 8,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Batches of 32 messages.", show_default="what --epochs makes"),
    ] = None,
    r: Annotated[int, typer.Option("--r", metavar="N", help="Rank of the adapters, 1 to 512.")] = 8,
    alpha: Annotated[
        float | None,
        typer.Option(metavar="X", help="Adapters count alpha / r times.", show_default="2 r"),
    ] = None,
    dropout: Annotated[float, typer.Option(metavar="P", help="Dropout on the adapters' input.")] = 0.0,
    lr: Annotated[
        float, typer.Option("--lr", metavar="X", help="Highest learning rate; it warms up, then falls.")
    ] = 1e-3,
    optimizer: Annotated[
        str,
        typer.Option(metavar="NAME", help="adamw8bit (2 bytes of state a parameter) or adamw (torch's, 8)."),
    ] = "adamw8bit",
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline",
            help="Train a float32 copy too, with torch.optim.AdamW and the same seed, and compare.",
        ),
    ] = True,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder of any local transformers model, instead of the packaged one.",
            show_default="all-MiniLM-L6-v2",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder for the adapter (PEFT's two files), finetune.json and loss.png; made when missing.",
        ),
    ] = Path("finetune"),
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads.", show_default="torch's own choice")
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of adapters, order and dropout; a run repeats bit for bit.")
    ] = 0,
) -> None:
    """QLoRA on a CPU: train adapters over a few-bit model.

    Quantises the linear layers of a sentence model (NF4, its scales quantised too), puts LoRA adapters around
    them and trains these with 8-bit AdamW to tell what the writer of a short message wants: to know, to have
    done, to complain or to praise (248 messages, English and Korean; 64 about other matters are held out).
    Prints the accuracy before and after, memory by kind, and how the loss compares with LoRA over float32.

    The adapter is saved as PEFT does. Files are written at the end: Ctrl-C before leaves what was there.

    Needs the extra: pip install 'bitfuse[demo]'. Uses no network. For example:

    \b
        bitfuse finetune
        bitfuse finetune --no-baseline --epochs 4 --out my-adapter
        bitfuse finetune --format int4:32 --r 16 --alpha 16 --dropout 0.05
        bitfuse finetune --optimizer adamw --lr 5e-4 --seed 1 --threads 4
    """
    try:
        from ..finetune import DemoError, Options, run

        try:
            run(
                Options(
                    format=format, epochs=epochs, steps=steps, r=r, alpha=alpha, dropout=dropout, lr=lr,
                    optimizer=optimizer, baseline=baseline, model=model, out=out, threads=threads, seed=seed,
                )
            )  # fmt: skip
        except DemoError as error:
            fail("finetune", error)
    except KeyboardInterrupt:
        typer.echo("bitfuse finetune: interrupted; no file is half-written", err=True)
        raise typer.Exit(130) from None
