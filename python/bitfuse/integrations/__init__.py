"""Layers of other packages, as bitfuse's and back."""

from . import transformers
from .peft import FuseReport, fuse_peft_, unfuse_peft_, with_bitfuse_layers

__all__ = ["FuseReport", "fuse_peft_", "transformers", "unfuse_peft_", "with_bitfuse_layers"]
