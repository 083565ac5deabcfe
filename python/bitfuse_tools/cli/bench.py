"""`bitfuse bench`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from .application import command, fail


@command
def bench(
    ops: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OP]...",
            help="Ops to measure; --list has them. Or `model`, with --model: a whole language model.",
            show_default="all",
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="PATH", help="With `model`: a .gguf file or a transformers folder.")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Whose sizes: llama3-8b, gemma2-9b, solar-10.7b, mixtral, a .json file of your own or a "
            "model's config.json.",
            show_default="4096 x 4096, llama3-8b's attention",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Of x: float32, float16, bfloat16.", show_default="the op's"),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Of weights and caches: int4, nf4, int4:32 (groups of 32 columns), dense, none, ...",
            show_default="the op's",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Of bitfuse: cpp, cuda, triton, reference.",
            show_default="all here but the reference",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Peers: torch, bitsandbytes, onnxruntime, peft, flash-attn, flashinfer, liger; or none.",
            show_default="all that are installed",
        ),
    ] = None,
    m: Annotated[
        str | None,
        typer.Option("--m", metavar="NUMBERS", help="Rows of x, or sequences.", show_default="the op's"),
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="forward, gradient (the backward alone) or training (both).",
            show_default="the op's",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Fewer sizes, two short rounds; printed only, unless --json or --results."
        ),
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", help="Samples of each case.", show_default="5; quick: 2")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads.", show_default="torch's own choice")
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write this run to a file instead; - is stdout, tables go to stderr."
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of results; <device>/<op>.json in it is appended to.",
            show_default="benchmarks/results",
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B", help="Measure nothing: compare two files, folders, or commits in the results."
        ),
    ] = None,
    fail_if_slower: Annotated[
        bool,
        typer.Option("--fail", help="With --compare: exit code 1 when bitfuse is slower beyond the noise."),
    ] = False,
    migrate: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Measure nothing: rewrite a file of the layout before schema 2."),
    ] = None,
    list_ops: Annotated[bool, typer.Option("--list", help="Print ops, shapes and peers, and end.")] = False,
) -> None:
    """Measure ops on this machine, against what else there is.

    Every backend of every op that runs here, and every peer that is installed, in interleaved rounds: median,
    p20, p80, GB/s, TFLOP/s, the share of what this machine was measured to do, the error against float64, the
    memory that a call takes, and the ratio to each peer. On a CPU weights stream from memory, threads stay on
    cores of their own, and samples wait for quiet; on a GPU a sample is a CUDA graph over rotating buffers,
    with a cold L2.

    Results append to benchmarks/results/<device>/<op>.json. Ctrl-C keeps what was measured and ends with 130.
    For example:

    \b
        bitfuse bench --quick lowbit_linear
        bitfuse bench lowbit_linear lora_linear --shapes llama3-8b --m 1,16 --format int4,nf4
        bitfuse bench attention --against torch --json - > attention.json
        bitfuse bench model --model SmolLM2-135M-Instruct.Q4_1.gguf --against llama.cpp,transformers
        bitfuse bench --compare 278913017a48 HEAD-OF-YOURS --fail
    """
    from ..bench import command
    from ..bench import results as files

    if ("model" in (ops or ())) != (model is not None) or (model is not None and ops != ["model"]):
        fail("bench", "a whole model is measured by `bitfuse bench model --model PATH`, and by itself")
    if model is not None:
        _whole_model(model, dtype, format, against, quick, rounds, threads, json, results)
        return
    options = command.Options(
        ops=tuple(dict.fromkeys(ops or ())), shapes=shapes, dtype=dtype, format=format, backend=backend,
        against=against, m=m, direction=direction, device=device, quick=quick, rounds=rounds, threads=threads,
        json=json, results=results,
    )  # fmt: skip
    try:
        if list_ops:
            typer.echo("\n".join(command.listed()))
        elif migrate:
            for path in migrate:
                done = files.migrate(path)
                typer.echo(f"{files.shown(path)}: {'rewritten' if done else 'of this layout already'}")
        elif compare:
            lines, found, slower = command.run_compare(options, *compare)
            if json not in (None, "-"):
                files.write(Path(str(json)), found)
            typer.echo(json_module.dumps(found, indent=1) if json == "-" else "\n".join(lines))
            if slower and fail_if_slower:
                raise typer.Exit(1)
        else:
            outcome = command.run(options)
            if outcome.interrupted:
                raise KeyboardInterrupt
            if outcome.failed:
                typer.echo(f"bitfuse bench: {outcome.failed} cases of bitfuse failed", err=True)
                raise typer.Exit(1)
    except (ValueError, files.ResultsError) as error:
        fail("bench", error)
    except KeyboardInterrupt:
        typer.echo("bitfuse bench: interrupted; what was measured is kept", err=True)
        raise typer.Exit(130) from None


def _whole_model(
    model: Path,
    dtype: str | None,
    caches: str | None,
    against: str | None,
    quick: bool,
    rounds: int | None,
    threads: int | None,
    json: str | None,
    folder: Path | None,
) -> None:
    """`--format` names the caches."""
    from ..bench import results as files
    from ..bench.model import FILE, ModelOptions, lines_of, measure
    from ..generation import GenerationError

    def words(text: str) -> tuple[str, ...]:
        return tuple(word.strip() for word in text.split(","))

    options = ModelOptions(
        model,
        tokens=32 if quick else 128,
        prompt=128 if quick else 512,
        dtypes=words(dtype) if dtype else ("float32", "bfloat16"),
        caches=words(caches) if caches else ("none",),
        rounds=rounds if rounds is not None else 2 if quick else 5,
        threads=threads,
        against=words(against) if against else None,
    )
    try:
        record = measure(options, lambda text: typer.echo(text, err=True))
    except (ValueError, GenerationError) as error:
        fail("bench", error)
    typer.echo("\n".join(lines_of(record)), err=json == "-")
    if json == "-":
        typer.echo(json_module.dumps(record, indent=1))
    elif json is not None:
        files.write(Path(json), record)
    elif not quick or folder is not None:
        into = files.folder(record["device"])
        path = (into if folder is None else folder / into.name) / FILE
        files.write(path, record)
        typer.echo(f"written: {files.shown(path)}")
