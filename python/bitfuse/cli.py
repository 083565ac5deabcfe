"""The command line: `bitfuse demo`, `bitfuse finetune`, `bitfuse info`.

A sub-command imports what it needs inside, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ._version import __version__

app = typer.Typer(
    name="bitfuse",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in the help are brackets, and a wrong option is told in a line
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _fail(command: str, message: object) -> NoReturn:
    """End with one line on stderr and exit code 2."""
    typer.echo(f"bitfuse {command}: {message}", err=True)
    raise typer.Exit(2)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _bitfuse(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Few-bit weights for torch: see what they save on a real model, train adapters over them, and see what
    works on this machine.

    Start with `bitfuse demo`; `bitfuse finetune` trains LoRA over few-bit weights.
    If something is wrong or slow, `bitfuse info` says which kernels are alive here
    and why the others are not; paste it into a bug report. In Python, `bitfuse.quantize_(model, "int4")`
    replaces the linear layers of a model.
    """


@app.command()
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
    from .demo import DemoError, Options, run

    names = tuple(dict.fromkeys(name.strip() for name in formats.split(",") if name.strip()))
    try:
        run(Options(names, device, model, out, batch_size, threads, dtype, seconds))
    except DemoError as error:
        _fail("demo", error)


@app.command()
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
        from .finetune import DemoError, Options, run

        try:
            run(
                Options(
                    format=format, epochs=epochs, steps=steps, r=r, alpha=alpha, dropout=dropout, lr=lr,
                    optimizer=optimizer, baseline=baseline, model=model, out=out, threads=threads, seed=seed,
                )
            )  # fmt: skip
        except DemoError as error:
            _fail("finetune", error)
    except KeyboardInterrupt:
        typer.echo("bitfuse finetune: interrupted; no file is half-written", err=True)
        raise typer.Exit(130) from None


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """What is installed and which backends work, to paste.

    Runs one small real lowbit_linear a format on every backend and compares it with float64. The exit code is
    1 when a backend that serves a call gives wrong numbers.
    """
    from .info import as_text, collect

    facts = collect()
    typer.echo(json.dumps(facts, indent=1) if as_json else as_text(facts))
    if not all(backend["right"] for backend in facts["backends"]):
        raise typer.Exit(1)


def main() -> None:
    """The `bitfuse` script, and `python -m bitfuse`."""
    app(prog_name="bitfuse")
