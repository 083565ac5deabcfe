"""A few-bit model as a file: its state_dict is plain tensors, which torch and safetensors keep.

pip install bitfuse safetensors
python examples/save_and_load.py
"""

from __future__ import annotations

import bitfuse
import torch
from safetensors.torch import load_file, save_file


def build() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.SiLU(), torch.nn.Linear(1024, 512))


def main() -> None:
    torch.manual_seed(0)
    model = build()
    print(bitfuse.quantize_(model, "int4", group_size=64))
    save_file(model.state_dict(), "model.safetensors")

    again = build()  # the same layers, few-bit ones first: then the file fits
    bitfuse.quantize_(again, "int4", group_size=64, progress=False)
    again.load_state_dict(load_file("model.safetensors"))

    x = torch.randn(3, 512)
    print("same bits:", torch.equal(model(x), again(x)))


if __name__ == "__main__":
    main()
