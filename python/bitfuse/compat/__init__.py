"""Functions of other packages, with their signatures, on bitfuse's ops."""

from . import flash_attn

__all__ = ["flash_attn"]
