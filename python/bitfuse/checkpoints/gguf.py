"""llama.cpp's GGUF files: any mix of block types in one file, read bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .checkpoint import Checkpoint, Entry, Loaded, Source
from .gguf_blocks import FLOATS, as_weight
from .gguf_file import GGUFFile, GGUFTensor
from .gguf_names import Architecture, architecture, config_fields, model_name

_ROPE = "rope_freqs.weight"


class GGUF(Checkpoint):
    """A `.gguf` file (llama, mistral, qwen2, qwen3, gemma2, gemma3).

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, MXFP4, NVFP4, F16, BF16 and F32 are read, in any mix.
    A head that is tied to the embedding reads the embedding's codes.
    """

    kind = "gguf"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.file = GGUFFile(source.path)

    @classmethod
    def recognises(cls, source: Source) -> bool:
        if source.path.is_dir():
            return False
        with open(source.path, "rb") as f:
            return f.read(4) == b"GGUF"

    def config(self) -> Any:
        from transformers import AutoConfig

        _, arch = architecture(self.file)
        fields = config_fields(self.file)
        return AutoConfig.for_model(arch.model_type, tie_word_embeddings=False, **fields)

    def entries(self) -> Iterator[Entry]:
        _, arch = architecture(self.file)
        fields = config_fields(self.file)
        for name, tensor in self.file.tensors.items():
            if name == _ROPE:
                continue
            found = model_name(arch, name)
            if found is None:
                raise ValueError(f"{tensor.where} has no place in a model of {arch.model_type}")
            yield self._entry(arch, fields, tensor, found)
        if "output.weight" not in self.file.tensors:
            head = self._entry(arch, fields, self.file.tensors["token_embd.weight"], "lm_head.weight")
            yield replace(head, tied_to="model.embed_tokens")

    def _entry(self, arch: Architecture, fields: dict[str, Any], tensor: GGUFTensor, name: str) -> Entry:
        module, _, part = name.rpartition(".")
        heads = 0
        if arch.rotated_pairs and module.endswith(("self_attn.q_proj", "self_attn.k_proj")):
            heads = fields["num_key_value_heads" if module.endswith("k_proj") else "num_attention_heads"]
        holds_one = arch.norms_hold_one and module.endswith("norm")
        few_bit = part == "weight" and tensor.type.name not in FLOATS

        def read() -> Loaded:
            loaded = as_weight(tensor, heads=heads)
            if holds_one and isinstance(loaded.weight, torch.Tensor):
                return loaded._replace(weight=loaded.weight.float() - 1)
            return loaded

        return Entry(
            module if few_bit else name, tensor.type.name, tensor.shape, tensor.nbytes, read, few_bit
        )

    def finish_(self, model: torch.nn.Module) -> None:
        """The frequencies of Llama 3's rotation, which the file has as factors."""
        if _ROPE not in self.file.tensors:
            return
        tensor = self.file.tensors[_ROPE]
        factors = as_weight(tensor).weight
        rotary: Any = model.get_submodule("model.rotary_emb")
        if not isinstance(factors, torch.Tensor) or factors.shape != rotary.inv_freq.shape:
            raise ValueError(
                f"{tensor.where} has shape {list(tensor.shape)}, expected {list(rotary.inv_freq.shape)}"
            )
        if not bool((factors >= 1).all()):
            raise ValueError(f"{tensor.where} holds {float(factors.min())}, expected factors of 1 and more")
        factors = factors.to(rotary.inv_freq)
        rotary.inv_freq.div_(factors)
        rotary.original_inv_freq.copy_(rotary.inv_freq)
