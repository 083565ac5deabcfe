"""Weights in few bits: formats, packing, `LowBitWeight`, quantisers."""

import sys

from . import formats, weight

# where version 0.1 had them: a pickle of its weights names these modules
sys.modules["bitfuse.formats"] = formats
sys.modules["bitfuse.weight"] = weight
