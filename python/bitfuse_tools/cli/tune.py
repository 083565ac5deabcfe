"""`bitfuse tune`."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import command, fail, refuse_asked_backend


@command
def tune(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Which ops.", show_default="all there are")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A model by name (llama3-8b, …) or a .json file, as for bitfuse bench.",
            show_default="4096 x 4096",
        ),
    ] = None,
    format: Annotated[str, typer.Option(metavar="NAMES", help="Of weights, separated by commas.")] = "int4",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float16 or bfloat16.")] = "bfloat16",
    minutes: Annotated[float, typer.Option(metavar="X", help="To spend at most.")] = 5.0,
    again: Annotated[bool, typer.Option("--again", help="Measure also what was measured before.")] = False,
) -> None:
    """Measure on this GPU which kernel and which tiles are fastest.

    The backends of an op have a fixed order, and the tiles of Triton a rule; here they are timed, for the
    calls of one model, and the fastest are chosen from then on in every process of this user. What is done is
    kept when the time is up or at Ctrl-C, and the next run goes on from there.

    \b
        bitfuse tune
        bitfuse tune lowbit_linear lora_linear --shapes llama3-8b --format int4,nf4 --minutes 20

    The cache is policy.json in BITFUSE_CACHE, else in bitfuse's folder of the user's cache. Measurements
    count only for the versions of bitfuse, torch and triton that made them.
    """
    import torch

    refuse_asked_backend("tune")
    if not torch.cuda.is_available():
        fail("tune", "torch sees no GPU here, and there is nothing to tune on a CPU")

    from bitfuse.core import policy
    from bitfuse.weights.formats import get_format
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .. import tuning
    from ..bench import shapes as models

    chosen = tuple(ops or tuning.OPS)
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    formats = tuple(name.strip() for name in format.split(",") if name.strip())
    try:
        if unknown := [op for op in chosen if op not in tuning.OPS]:
            raise ValueError(f"no op {unknown[0]!r} to tune: there are {', '.join(tuning.OPS)}")
        if dtype not in dtypes:
            raise ValueError(f"dtype is {dtype!r}, expected {' or '.join(dtypes)}")
        for name in formats:
            get_format(name)
        shape = models.find(shapes) if shapes else models.DEFAULT
        todo = tuning.cases(chosen, shape, formats, dtype=dtypes[dtype])
    except ValueError as error:
        fail("tune", error)
    console, done = Console(stderr=True), 0
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(str(todo[0]), total=len(todo))
            for case, found in tuning.tune(torch.cuda.get_device_name(), todo, minutes, again):
                done += 1
                following = str(todo[done]) if done < len(todo) else "done"
                bar.update(task, completed=done, description=following)
                if found is not None:
                    bar.console.print(f"{case}: {found}", highlight=False)
    except policy.PolicyError as error:
        fail("tune", error)
    except KeyboardInterrupt:
        typer.echo(f"bitfuse tune: interrupted; {done} of {len(todo)} cases are kept", err=True)
        raise typer.Exit(130) from None
    left = "" if done == len(todo) else "; run it again for the rest"
    typer.echo(f"{done} of {len(todo)} cases in {policy.path().name}{left}")
