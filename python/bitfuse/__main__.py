"""`python -m bitfuse`: the command line."""

from __future__ import annotations

from bitfuse_tools.cli import main

if __name__ == "__main__":
    main()
