"""Ctrl-C while the command line imports torch, which takes seconds: it ends in a line, as later on.

`import bitfuse` in anybody else's program changes nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any


def _end(number: int, frame: Any) -> None:
    if "--multiprocessing-fork" not in sys.orig_argv:  # a worker leaves the word to who waits for it
        os.write(2, b"bitfuse: interrupted\n")
    os._exit(130)  # nothing has been begun; a half-imported torch is not torn down


def _is_command() -> bool:
    """Whether this process is `bitfuse` or `python -m bitfuse`, whose name is "-m" until it is found."""
    name = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
    if name == "-m":
        given = sys.orig_argv
        return given[given.index("-m") + 1 : given.index("-m") + 2] == ["bitfuse"] if "-m" in given else False
    return name in ("bitfuse", "bitfuse.exe")


def imported() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again, which commands answer."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where it is ignored
):
    signal.signal(signal.SIGINT, _end)
