"""One base layer in 4 bits, many adapters, a batch in which each row has its own.

python examples/serve_adapters.py
"""

from __future__ import annotations

import bitfuse
import torch

IN, OUT, ADAPTERS, ROWS = 512, 512, 16, 8


def main() -> None:
    torch.manual_seed(0)
    base = bitfuse.quantize(torch.randn(OUT, IN) / 20, "nf4")
    ranks = [4 + 4 * (i % 3) for i in range(ADAPTERS)]  # they need not be alike
    lora_A = [torch.randn(r, IN) / 20 for r in ranks]
    lora_B = [torch.randn(OUT, r) / 20 for r in ranks]
    scaling = [16 / r for r in ranks]
    x = torch.randn(ROWS, IN)
    ids = torch.tensor([3, 3, 0, -1, 15, 7, 7, 1])  # -1: no adapter

    y = bitfuse.multi_lora_linear(x, base, lora_A, lora_B, scaling, ids)

    dense = base.dequantize()
    for row, i in enumerate(ids.tolist()):
        wanted = dense @ x[row]
        if i >= 0:
            wanted = wanted + scaling[i] * (lora_B[i] @ (lora_A[i] @ x[row]))
        error = (y[row] - wanted).norm() / wanted.norm()
        print(f"row {row}: adapter {i}, relative difference to dense arithmetic {error:.1e}")


if __name__ == "__main__":
    main()
