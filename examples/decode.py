"""Attention over a cache in 8 bits, token by token: prefill, append, decode, sample.

python examples/decode.py
"""

from __future__ import annotations

import bitfuse
import torch

BATCH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2, 8, 2, 64, 1000


def main() -> None:
    torch.manual_seed(0)
    embed = torch.randn(VOCABULARY, HEADS * HEAD_DIM)
    project = bitfuse.quantize(torch.randn((HEADS + 2 * KV_HEADS) * HEAD_DIM, HEADS * HEAD_DIM) / 20, "int4")
    head = bitfuse.quantize(torch.randn(VOCABULARY, HEADS * HEAD_DIM) / 20, "int8")
    cache = bitfuse.KVCache(BATCH, 256, KV_HEADS, HEAD_DIM, dtype=torch.float32, format="int8", page_size=64)

    def qkv(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[batch, tokens] to [batch, tokens, heads, head_dim]; a model rotates q and k here."""
        made = bitfuse.lowbit_linear(embed[tokens], project)
        return made.unflatten(-1, (-1, HEAD_DIM)).split((HEADS, KV_HEADS, KV_HEADS), 2)

    prompt = torch.randint(VOCABULARY, (BATCH, 100))
    q, k, v = qkv(prompt)
    out = bitfuse.attention(q, k, v, causal=True)  # the prompt sees itself in full precision
    cache.append(k, v)  # and is kept in 8 bits
    tokens = []
    for _ in range(10):
        logits = bitfuse.lowbit_linear(out[:, -1].flatten(1), head)
        tokens.append(bitfuse.sample(logits, torch.rand(BATCH), temperature=0.8, top_p=0.9))
        q, k, v = qkv(tokens[-1].view(BATCH, 1))
        cache.append(k, v)
        out = bitfuse.decode_attention(q, cache)
    print(torch.stack(tokens, 1).tolist(), f"{cache.seqlens.tolist()} tokens in the cache")


if __name__ == "__main__":
    main()
