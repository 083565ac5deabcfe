"""The command line, a file a command: `bitfuse`, and `python -m bitfuse`.

Before a command runs, neither torch nor bitfuse is imported, so that help and a wrong option come at once.
Who asks for `app` gets typer; `main` says what to install where that is missing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands import app

__all__ = ["app", "main"]


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .commands import app

    return app


def main() -> None:
    """The `bitfuse` script, and `python -m bitfuse`."""
    try:
        from .commands import app
    except ModuleNotFoundError as missing:
        if missing.name != "typer":
            raise
        print("bitfuse: the command line needs typer: pip install 'bitfuse[cli]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("bitfuse: interrupted", file=sys.stderr)
        sys.exit(130)
    app(prog_name="bitfuse")
