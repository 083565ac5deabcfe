"""Text from a causal language model of transformers: its weights in 4 bits, its attention by bitfuse.

pip install bitfuse transformers
python examples/generate.py path/to/model "The capital of France is"
python examples/generate.py                          # a tiny one with random weights, on this page
"""

from __future__ import annotations

import sys

import bitfuse
import torch
from bitfuse.integrations.transformers import register
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    torch.manual_seed(0)
    if len(sys.argv) > 1:
        folder, prompt = sys.argv[1:]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        config = LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        tokenizer, model = None, LlamaForCausalLM(config).to(torch.bfloat16)
        tokens = torch.tensor([list(b"The capital of France is")])

    register()  # makes "bitfuse" a name of an attention
    model.set_attn_implementation("bitfuse")
    print(bitfuse.quantize_(model.eval(), "int4"))  # in place; a layer that it can't have is in the table
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False, pad_token_id=0
    )
    print(tokenizer.decode(made[0]) if tokenizer else bytes(made[0].tolist()))


if __name__ == "__main__":
    main()
