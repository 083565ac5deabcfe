"""Optimisers whose state is in few bits."""

from __future__ import annotations

from .adamw8bit import AdamW8bit

__all__ = ["AdamW8bit"]
