"""`bitfuse compile`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .application import command, fail, refuse_asked_backend


@command
def compile(
    arch: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="sm_80 86 87 89 90a 100a 120a, a card such as a100, h100, rtx4090, l4, b200, or native: "
            "the GPUs here. Again for more.",
        ),
    ],
    op: Annotated[
        list[str] | None,
        typer.Option(metavar="OP", help="lowbit_linear, attention, … Again for more.", show_default="all"),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder; one of an earlier run is replaced at the end.")
    ] = Path("bitfuse-kernels"),
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="cuda or triton.", show_default="both"),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Models whose calls the Triton kernels are for: llama3-8b, gemma2-9b, solar-10.7b, mixtral, "
            "or a .json file of sizes.",
            show_default="all four",
        ),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Formats of the weights, or dense.", show_default="int4, nf4, int8, fp8"
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="float32, float16, bfloat16.", show_default="bfloat16 and float16"),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward/--no-backward", help="Whether gradients are taken too.")
    ] = True,
    variants: Annotated[
        bool,
        typer.Option(
            "--variants/--no-variants",
            help="Also zero points, groups of 32, 64 and 128, nested scales, dropout, lists of adapters.",
        ),
    ] = True,
    cubins: Annotated[
        bool, typer.Option("--cubins", help="Write the CUDA extension's machine code beside it, to look at.")
    ] = False,
    each: Annotated[bool, typer.Option("--each", help="A line for each variant of a kernel.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit code 1 when a kernel uses local memory (spills) or does not fit."
        ),
    ] = False,
) -> None:
    """Compile kernels for GPUs that need not be here.

    Makes a folder with the CUDA extension for these architectures and the Triton kernels that the calls of
    these models need there, and prints what each kernel takes of a multiprocessor. On the GPU's machine set
    BITFUSE_KERNEL_PATH to the folder, or call bitfuse.load_kernels(folder): the first call compiles nothing.
    The versions of bitfuse, Triton and Python must be the same there; what is not is told and left.

    Triton's kernels are those of calls with contiguous tensors in the models' sizes, rows of x and lengths of
    all kinds, forward and backward. Compiled at their first call are others: biases, masks, ALiBi, sinks,
    softcap, windows and prefixes of attention, act-order, offsets, a rank that is none of 8, 16 and 64.

    Needs no GPU and no CUDA toolkit: nvcc is that of CUDA_HOME, of PATH or of its PyPI wheels. What has not
    changed is not made again; it is kept under BITFUSE_CACHE. Ctrl-C leaves the folder as it was.

    \b
        bitfuse compile --arch h100
        bitfuse compile --arch sm_80 --arch rtx4090 --op lowbit_linear --op attention --out kernels
        bitfuse compile --arch native --shapes llama3-8b --format nf4 --dtype bfloat16
        bitfuse compile --arch b200 --backend triton --each --strict
    """
    refuse_asked_backend("compile")
    try:
        import torch
        from bitfuse.weights.formats import get_format

        from ..bench import shapes as models
        from ..compile import build, table, toolchain
        from ..hypothetical import DENSE, EVERY

        dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        ops = _known("op", op or list(EVERY), EVERY)
        backends = _known("backend", backend or build.BACKENDS, build.BACKENDS)
        chosen = _known("dtype", dtype or ("bfloat16", "float16"), dtypes)
        formats = tuple(dict.fromkeys(format or ("int4", "nf4", "int8", "fp8")))
        try:
            for name in formats:
                if name != DENSE:
                    get_format(name)
            gpus = build.resolve(arch)
            options = build.Options(
                gpus=gpus, ops=ops, backends=backends,
                shapes=tuple(models.find(name) for name in shapes or models.SHAPES),
                formats=formats, dtypes=tuple(dtypes[name] for name in chosen), backward=backward, out=out,
                cubins=cubins, variants=variants,
            )  # fmt: skip
            if "cuda" in backends:
                typer.echo(f"compiler: {toolchain.find_nvcc()}{_cached(toolchain.ccache())}", err=True)
            for line in build.notes(gpus, ops):
                typer.echo(line, err=True)
            made = build.build(options, _bar)
        except (ValueError, toolchain.CompilerMissing, build.BuildError) as error:
            fail("compile", error)
        except toolchain.CompileError as error:
            typer.echo(f"bitfuse compile: {error}", err=True)
            raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"bitfuse compile: interrupted; {out} is as it was", err=True)
        raise typer.Exit(130) from None
    for name, why in (made.manifest["triton"] or {}).get("refused", {}).items():
        typer.echo(f"some calls of {name} were left out, such as {why}", err=True)
    bad = [kernel for kernel in made.kernels if kernel.spills or not kernel.fits]
    if as_json:
        typer.echo(json.dumps(made.manifest, indent=1))
    else:
        table.show(made.kernels, each)
        typer.echo(f"{len(made.kernels)} kernels for {', '.join(made.manifest['archs'])} in {out}")
        if bad:
            typer.echo(f"{len(bad)} of them use local memory or do not fit a multiprocessor")
    if bad and strict:
        raise typer.Exit(1)


def _known(option: str, given: Iterable[str], there_are: Iterable[str]) -> tuple[str, ...]:
    for name in given:
        if name not in there_are:
            fail("compile", f"--{option} is {name!r}, expected one of {', '.join(there_are)}")
    return tuple(dict.fromkeys(given))


def _cached(ccache: list[str]) -> str:
    return " behind ccache" if ccache else ""


def _bar(what: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(items, total=total, desc=what, unit="", leave=False, disable=None))
