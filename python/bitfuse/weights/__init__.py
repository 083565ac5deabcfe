"""Weights in few bits: formats, packing, `LowBitWeight`, quantisers."""
