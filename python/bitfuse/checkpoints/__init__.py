"""Files of other packages, read and written."""

from .checkpoint import Checkpoint, Entry, Loaded
from .peft import load_peft_, save_peft
from .pretrained import from_pretrained, open_checkpoint
from .report import LoadedLayer, LoadReport

__all__ = [
    "Checkpoint",
    "Entry",
    "LoadReport",
    "Loaded",
    "LoadedLayer",
    "from_pretrained",
    "load_peft_",
    "open_checkpoint",
    "save_peft",
]
