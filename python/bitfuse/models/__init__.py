"""What works on a whole model: `quantize_`, adapters; `generate`."""
