"""QLoRA in a page: a causal language model in NF4, adapters over it, 8-bit AdamW, a file that PEFT loads.

    pip install 'bitfuse[peft]' transformers
    python examples/qlora.py path/to/model notes.txt     # any local causal language model, and a text
    python examples/qlora.py                             # a tiny one with random weights, on this page

`bitfuse finetune` is the same on a sentence model, with scores and measurements.
"""

from __future__ import annotations

import sys
from pathlib import Path

import bitfuse
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

LENGTH, BATCH_SIZE, STEPS = 64, 4, 30


def load(arguments: list[str]) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model, and the text as tokens."""
    if not arguments:
        config = LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        return LlamaForCausalLM(config), torch.tensor(list(Path(__file__).read_bytes()))
    folder, text = arguments
    tokens = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt").input_ids[0]
    return AutoModelForCausalLM.from_pretrained(folder), tokens


def main() -> None:
    torch.manual_seed(0)
    model, tokens = load(sys.argv[1:])
    chunks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    print(bitfuse.quantize_(model, "nf4", nested=True))  # the linear layers in 4 bits, their scales in 8
    bitfuse.add_lora_(model, "all-linear", r=8, alpha=16)  # and adapters, the only thing that trains
    optimizer = bitfuse.optim.AdamW8bit(bitfuse.lora_parameters(model), lr=1e-3, weight_decay=0.0)

    model.train()
    for step in range(STEPS):
        batch = chunks[torch.randint(len(chunks), (BATCH_SIZE,))]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    bitfuse.save_peft(model, "qlora-adapter")  # for bitfuse.load_peft_ and peft.PeftModel.from_pretrained


if __name__ == "__main__":
    main()
