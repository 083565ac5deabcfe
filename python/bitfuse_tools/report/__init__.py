"""What `bitfuse bench` measured, to look at: one HTML page, and the tables of the README.

A page is `render(load([Path("benchmarks/results")]))`; `rewrite` makes a README's tables anew.
"""

from __future__ import annotations

from ..bench.results import ResultsError
from .page import render
from .readme import rewrite
from .sources import default_folder, load

__all__ = ["ResultsError", "default_folder", "load", "render", "rewrite"]
