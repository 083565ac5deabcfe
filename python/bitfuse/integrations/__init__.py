"""Layers of other packages, as bitfuse's and back."""

from . import transformers
from .fuse import BlockReport, fuse_, unfuse_
from .peft import FuseReport, fuse_peft_, unfuse_peft_, with_bitfuse_layers

__all__ = [
    "BlockReport",
    "FuseReport",
    "fuse_",
    "fuse_peft_",
    "transformers",
    "unfuse_",
    "unfuse_peft_",
    "with_bitfuse_layers",
]
