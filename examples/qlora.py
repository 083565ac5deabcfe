"""QLoRA in a page: a model in NF4, adapters over it, 8-bit AdamW, and an adapter that PEFT loads.

    pip install 'bitfuse[demo]' && python examples/qlora.py

`bitfuse finetune` is the same with a progress bar, scores and measurements.
"""

from __future__ import annotations

import bitfuse
import torch
from bitfuse.checkpoints import save_peft
from bitfuse.demo.embedder import find_model
from bitfuse.finetune.messages import HELD_OUT, INTENTS, TRAINING, Message
from bitfuse.lora import add_lora_, lora_parameters
from bitfuse.optim import AdamW8bit
from transformers import AutoModel, AutoTokenizer

EPOCHS, BATCH_SIZE = 8, 32


def embed(model: torch.nn.Module, tokenizer, texts: list[str]) -> torch.Tensor:
    """Unit vectors: the mean over the tokens."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def logits(model: torch.nn.Module, tokenizer, messages: list[Message]) -> tuple[torch.Tensor, torch.Tensor]:
    """How near each message is to the sentence of each intent, and which is right."""
    vectors = embed(model, tokenizer, [message.text for message in messages])
    anchors = embed(model, tokenizer, list(INTENTS.values()))
    return vectors @ anchors.T / 0.05, torch.tensor([list(INTENTS).index(m.intent) for m in messages])


def accuracy(model: torch.nn.Module, tokenizer) -> float:
    with torch.no_grad():
        scores, right = logits(model, tokenizer, list(HELD_OUT))
    return float((scores.argmax(1) == right).float().mean())


def main() -> None:
    torch.manual_seed(0)
    folder = find_model()
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    bitfuse.quantize_(model, "nf4", nested=True)  # the linear layers in 4 bits, their scales in 8
    add_lora_(model, "all-linear", r=8, alpha=16, skip=["pooler"])  # and adapters, the only thing that trains
    optimizer = AdamW8bit(lora_parameters(model), lr=1e-3, weight_decay=0.0)

    print(f"held-out accuracy before: {accuracy(model, tokenizer):.0%}")
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(TRAINING)).split(BATCH_SIZE):
            scores, right = logits(model, tokenizer, [TRAINING[i] for i in batch])
            loss = torch.nn.functional.cross_entropy(scores, right, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy(model, tokenizer):.0%}")

    save_peft(model, "qlora-adapter")  # for bitfuse.checkpoints.load_peft_ and peft.PeftModel.from_pretrained


if __name__ == "__main__":
    main()
