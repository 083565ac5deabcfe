"""What a call costs where there is next to nothing to compute, beside plain PyTorch's, on the CPU.

python benchmarks/bench_call_overhead.py          # a table, and results/<device>/call_overhead.json
python benchmarks/bench_call_overhead.py --dry    # the table alone

Both calls of a pair alternate in one process, on one thread, with gradients off; a figure is the least of
many rounds, for everything else that a machine does only adds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import datetime, timezone

import bitfuse
import torch
from bitfuse_tools.bench import device_name, results

Call = Callable[[], object]
CALLS = 100  # a sample


def pairs() -> dict[str, tuple[Call, Call]]:
    """By name: the call of bitfuse, and that of torch."""
    functional = torch.nn.functional
    rows, k, n, rank = 1, 64, 32, 8
    x, weight, bias = torch.randn(rows, k), torch.randn(n, k), torch.randn(n)
    few_bits = bitfuse.quantize(weight, "int4", group_size=32)
    lora_A, lora_B = torch.randn(rank, k), torch.randn(n, rank)
    dense = torch.nn.Linear(k, n)
    layer = bitfuse.nn.Linear.from_float(dense, "int4", group_size=32)

    def plain_lora() -> torch.Tensor:
        h = functional.linear(x, lora_A)
        return functional.linear(x, weight, bias) + functional.linear(h, lora_B) * 0.5

    q, key, value = (torch.randn(1, 2, 4, 16) for _ in range(3))  # [batch, heads, rows, dim]
    our_q, our_k, our_v = (t.transpose(1, 2).contiguous() for t in (q, key, value))
    cache = bitfuse.KVCache(1, 16, 2, 16, dtype=torch.float32)
    bitfuse.append_kv(torch.randn(1, 4, 2, 16), torch.randn(1, 4, 2, 16), cache)
    one = torch.randn(1, 1, 2, 16)
    one_q = one.transpose(1, 2).contiguous()
    return {
        "lowbit_linear": (
            lambda: bitfuse.lowbit_linear(x, few_bits, bias),
            lambda: functional.linear(x, weight, bias),
        ),
        "nn.Linear": (lambda: layer(x), lambda: dense(x)),
        "lora_linear": (lambda: bitfuse.lora_linear(x, few_bits, lora_A, lora_B, 0.5, bias), plain_lora),
        "attention": (
            lambda: bitfuse.attention(our_q, our_k, our_v),
            lambda: functional.scaled_dot_product_attention(q, key, value),
        ),
        "decode_attention": (
            lambda: bitfuse.decode_attention(one, cache),
            lambda: functional.scaled_dot_product_attention(one_q, key, value),
        ),
    }


def microseconds(calls: tuple[Call, Call], rounds: int) -> tuple[float, float]:
    """Of one call of each."""
    best = [float("inf")] * 2
    for call in calls:
        for _ in range(CALLS):
            call()
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[i] = min(best[i], (time.perf_counter() - start) / CALLS)
    return best[0] * 1e6, best[1] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=300, help="of each pair")
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    print(f"{'':18}{'bitfuse, us':>12}{'torch, us':>12}{'ratio':>8}")
    with torch.no_grad():
        for name, calls in pairs().items():
            ours, theirs = microseconds(calls, options.rounds)
            rows.append({"call": name, "us": ours, "torch_us": theirs, "ratio": ours / theirs})
            print(f"{name:18}{ours:12.2f}{theirs:12.2f}{ours / theirs:8.2f}")
    device = device_name("cpu")
    record = {
        "device": device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"bitfuse": bitfuse.__version__, "torch": torch.__version__},
        "rounds": options.rounds,
        "rows": rows,
    }
    if not options.dry:
        path = results.folder(device) / "call_overhead.json"
        results.write(path, record)
        print(results.shown(path))


if __name__ == "__main__":
    main()
