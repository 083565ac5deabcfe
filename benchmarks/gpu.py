"""`make gpu`: builds for the GPU that is here, then looks whether every kernel is right, measures, runs the
tests, tunes, and runs compute-sanitizer over a short list: in under ten minutes and with no network.

    python benchmarks/gpu.py --out DIR             # everything that DIR has not had yet, of these sources
    python benchmarks/gpu.py --kernels BUNDLE      # with kernels that `bitfuse compile` made beforehand
    python benchmarks/gpu.py --stages smoke tests  # of it
    python benchmarks/gpu.py --minutes 25 --again  # longer, from the beginning
    python benchmarks/gpu.py --table DIR           # the table again, on any machine
    python benchmarks/gpu.py --rehearse            # on the simulator, small: does all of this work?

What it does is done in units, each in a process of its own with a limit of its own: a kernel family's smoke
test, an op's benchmark, a file of tests. What a unit gave is in DIR when it ends. A kernel that hangs,
crashes or is wrong is left out of all that follows, and named at the end.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def unit(module: str, arguments: list[str], rehearse: bool) -> int:
    """What a unit's process does."""
    if rehearse:
        sys.path.insert(0, str(ROOT / "tests"))
        import cusim

        cusim.load_if_no_gpu()  # before torch
        with cusim.device(sm=90):
            return run(module, arguments)
    return run(module, arguments)


def run(module: str, arguments: list[str]) -> int:
    found = importlib.import_module(module)
    if module == "bitfuse_tools.cli":
        sys.argv = ["bitfuse", *arguments]
        found.main()
        return 0
    return int(found.main(arguments))


def main() -> int:
    arguments = sys.argv[1:]
    sys.path.insert(0, str(ROOT / "python"))
    if "--unit" in arguments:
        at = arguments.index("--unit")
        return unit(arguments[at + 1], arguments[at + 2 :], "--rehearse" in arguments[:at])
    from bitfuse_tools.gpu.command import main as whole

    return whole(__doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
