"""Files of other packages, read and written."""

from .peft import load_peft_, save_peft

__all__ = ["load_peft_", "save_peft"]
