"""Decoder: a transformers language model whose step is one native call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..core.cpu import extension as _cpu
from ..core.cpu import missing
from ..nn.linear import Linear
from ..ops.attention.append_kv import KVCache
from ..ops.attention.kv_cache import Rotary
from ..ops.linear.lowbit_linear import FLOATS
from ..ops.linear.lowbit_linear_cpu import readable, reason
from .architectures import ARCHITECTURES, Architecture
from .decoder_args import DecoderArgs, LayerArgs, Projection, RmsNorm
from .rotary import rope_tables

# of config.hidden_act: names of the extension's enum
ACTIVATIONS = {
    "silu": "SILU",
    "swish": "SILU",
    "gelu": "GELU",
    "gelu_pytorch_tanh": "GELU_TANH",
    "relu": "RELU",
}
PARTS = ("linear", "attention", "norm", "head", "sampling")  # of `Decoder.seconds`
# whose tables depend on how long the sequence is, once it is longer than what was trained
GROWING_ROPES = ("dynamic", "longrope")


class Unserved(ValueError):
    """Why a model has no native step."""


class Decoder:
    """A language model of transformers whose step is one native call on the CPU: the embedding, all layers on
    one crew of threads, the norm, the head and sampling, with no Python and no allocation between them. It
    reads the model's own tensors, few-bit ones among them, as they are at the first step; of each sequence it
    keeps keys and values.

    What it gives is what the model's modules give, up to the order of sums: each kernel is that of the op
    (`bitfuse.lowbit_linear`, `rms_norm`, `decode_attention`, `gated_activation`, `sample`).

    Args:
        model: a `transformers` causal language model of `ARCHITECTURES` in evaluation, on the CPU.
        batch: sequences.
        max_len: tokens that each has room for; by default what the model was made for.
        cache: format of keys and values: "none" (the model's dtype), "fp8", "int8" or "int4".
        without_layers: numbers of layers that are left out: a draft of the model (Zhang et al., 2024) that
            shares its weights.

    Attributes:
        lengths: tokens of each sequence.
        seconds: float64 [len(PARTS)], to which each step adds what its parts took; None, at first, for no
            clock.

    Raises:
        Unserved: a model that has no native step; it says why.
        ValueError: a size out of range.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch: int = 1,
        max_len: int | None = None,
        cache: str = "none",
        without_layers: Collection[int] = (),
    ) -> None:
        if missing is not None:
            raise Unserved(missing)
        config = model.config
        if hasattr(config, "text_config"):
            config = config.text_config
        if max_len is None:
            max_len = int(config.max_position_embeddings)
        for name, value in (("batch", batch), ("max_len", max_len)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected 1 or more")
        self.max_len = max_len
        self.lengths = [0] * batch
        self.seconds: torch.Tensor | None = None
        with torch.no_grad():
            self._args = decoder_args(model, config, batch, max_len, cache, without_layers)
        self.dtype, self.vocabulary = self._args.dtype, self._args.vocabulary
        self._native = _cpu.Decoder(self._args)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def weight_bytes(self) -> int:
        """Of what each step reads of the weights: all but the embedding, of which a row is read a token."""
        args, matrices = self._args, []
        for layer in args.layers:
            matrices += [*layer.qkv, layer.out, *layer.gate_up, layer.down]
        parts: list[torch.Tensor | None] = []
        for of in (*matrices, args.head):
            parts += [of.weight] if isinstance(of.weight, torch.Tensor) else of.weight.tensors()
        return sum(t.nbytes for t in parts if t is not None)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, of all layers."""
        tensors = (t for layer in self._args.layers for t in layer.cache if isinstance(t, torch.Tensor))
        return sum(t.nbytes for t in tensors)

    def step(
        self,
        ids: torch.Tensor,
        *,
        first: int = 0,
        every: bool = False,
        sampling: Sequence[torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """New tokens of the sequences from `first` on, which grow by them.

        Args:
            ids: int64 [batch, tokens].
            every: logits after each token, not after the last alone.
            sampling: uniforms, temperature, top_k, top_p, min_p and ids, as `bitfuse.sample` has them,
                [batch] each; ids is written.
            out: where to write the logits.

        Returns:
            The logits, of the model's dtype: [batch, vocabulary], or [batch, tokens, vocabulary].

        Raises:
            ValueError: a token that is not in the vocabulary, a sequence that has no room; nothing has
                changed.
        """
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
            raise ValueError(f"ids is {ids!r}, expected an int64 tensor [batch, tokens]")
        batch, tokens = ids.shape
        lengths = self.lengths[first : first + batch]
        if out is None:
            shape = (batch, tokens, self.vocabulary) if every else (batch, self.vocabulary)
            out = torch.empty(shape, dtype=self.dtype, device="cpu")
        seqlens = torch.tensor(lengths, dtype=torch.int32, device="cpu")
        self._native.step(ids.contiguous(), seqlens, first, out, sampling, self.seconds)
        self.lengths[first : first + batch] = [length + tokens for length in lengths]
        return out

    def prefill(self, ids: torch.Tensor, *, first: int = 0, chunk: int = 512) -> torch.Tensor:
        """A long prompt [batch, tokens] in chunks; the logits after its last token."""
        out = torch.empty(ids.shape[0], self.vocabulary, dtype=self.dtype, device="cpu")
        for at in range(0, ids.shape[1], chunk):
            self.step(ids[:, at : at + chunk], first=first, out=out)
        return out

    def reset(self) -> None:
        """Forget all tokens."""
        self.lengths[:] = [0] * self.batch

    def truncate(self, length: int, sequence: int = 0) -> None:
        """Take back the tokens past the first `length` of a sequence; at most a group of them where the cache
        holds codes.

        Raises:
            ValueError: more than the sequence has, or than can be taken back.
        """
        have = self.lengths[sequence]
        if not 0 <= length <= have:
            raise ValueError(f"length is {length}, expected 0 to {have}")
        group = self._args.layers[0].cache.group_size
        if group and have - length > group and length % group:
            raise ValueError(f"length is {length}, expected {have - group} or more: older tokens are codes")
        self.lengths[sequence] = length


def decoder_args(
    model: Any, config: Any, batch: int, max_len: int, cache: str, without_layers: Collection[int] = ()
) -> DecoderArgs:
    """The model's tensors where the step wants them.

    Raises:
        Unserved: what has no place in a step.
        ValueError: a layer left out that is not there, or none left.
    """
    if config.model_type not in ARCHITECTURES:
        raise Unserved(
            f"model_type {config.model_type!r} has no native step: there are {', '.join(ARCHITECTURES)}"
        )
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    if wrong := [i for i in without_layers if not 0 <= i < len(body.layers)]:
        raise ValueError(f"layer {wrong[0]} is to be left out, expected 0 to {len(body.layers) - 1}")
    if len(set(without_layers)) == len(body.layers):
        raise ValueError("all layers are to be left out")
    reader = _Reader(body, config, batch, max_len, cache)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise Unserved(f"activation {activation!r} has no kernel")
    scale = getattr(body.embed_tokens, "embed_scale", None)
    if scale is None:
        scale = config.hidden_size**0.5 if config.model_type.startswith("gemma") else 1.0
    return DecoderArgs(
        dtype=reader.dtype,
        activation=getattr(_cpu.Activation, ACTIVATIONS[activation]),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=reader.head_dim,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        sequences=batch,
        layers=tuple(reader.layer(i) for i in range(len(body.layers)) if i not in without_layers),
        embedding=reader.projection(body.embed_tokens, "embed_tokens"),
        embedding_scale=float(torch.as_tensor(scale, dtype=reader.dtype, device="cpu")),
        norm=reader.norm(body.norm),
        head=reader.projection(model.get_output_embeddings(), "lm_head"),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


class _Reader:
    """Takes a model's modules apart.

    Args:
        body: what has the layers.
        others: as `Decoder`.
    """

    def __init__(self, body: Any, config: Any, batch: int, max_len: int, cache: str) -> None:
        self._body, self._config = body, config
        self._batch, self._max_len, self._cache = batch, max_len, cache
        self._names: Architecture = ARCHITECTURES[config.model_type]
        self.dtype: torch.dtype = body.norm.weight.dtype
        if self.dtype not in FLOATS:
            raise Unserved(f"the model's dtype is {self.dtype}, expected {' or '.join(map(str, FLOATS))}")
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self._ropes = self._rotations()

    def layer(self, i: int) -> LayerArgs:
        config, names, layer = self._config, self._names, self._body.layers[i]

        def projection(name: str) -> Projection:
            return self.projection(layer.get_submodule(name), f"layers.{i}.{name}")

        def norm(name: str) -> RmsNorm:
            return self.norm(layer.get_submodule(name))

        kinds = getattr(config, "layer_types", None)
        kind = None if kinds is None else kinds[i]
        window = getattr(config, "sliding_window", None) if kind in (None, "sliding_attention") else None
        cache = KVCache(
            self._batch, self._max_len, config.num_key_value_heads, self.head_dim,
            dtype=self.dtype, format=self._cache, device="cpu",
        )  # fmt: skip
        return LayerArgs(
            before_attention=norm(names.before_attention),
            of_queries=norm("self_attn.q_norm") if names.of_heads else None,
            of_keys=norm("self_attn.k_norm") if names.of_heads else None,
            after_attention=norm(names.after_attention) if names.after_attention else None,
            before_mlp=norm(names.before_mlp),
            after_mlp=norm(names.after_mlp) if names.after_mlp else None,
            qkv=tuple(map(projection, names.qkv)),
            out=projection(names.out),
            gate_up=tuple(map(projection, names.gate_up)),
            down=projection(names.down),
            cache=cache.tensors,
            rotary=self._ropes[kind if kind in self._ropes else None],
            softmax_scale=float(layer.self_attn.scaling),
            softcap=float(getattr(config, "attn_logit_softcapping", None) or 0.0),
            left=-1 if window is None else int(window) - 1,
        )

    def projection(self, module: Any, name: str) -> Projection:
        if type(module) not in (Linear, torch.nn.Linear) and not isinstance(module, torch.nn.Embedding):
            raise Unserved(f"{name} is a {type(module).__name__}, expected a linear layer without adapters")
        weight, bias = module.weight, getattr(module, "bias", None)
        if weight.device.type != "cpu" or len(weight.shape) != 2:
            raise Unserved(f"{name}: its weight is on {weight.device}, expected a matrix on the CPU")
        if bias is not None:
            bias = bias.detach().to(self.dtype).contiguous()
        if not isinstance(weight, torch.Tensor):
            if (why := reason(weight.op_args)) is not None:
                raise Unserved(f"{name}: {why}")
            if weight.g_idx is not None:
                raise Unserved(f"{name}: its columns are reordered (g_idx)")
            return Projection(readable(weight.op_args), bias)
        if weight.dtype not in FLOATS:
            raise Unserved(f"{name}: its weight is {weight.dtype}, expected {' or '.join(map(str, FLOATS))}")
        return Projection(weight.detach().contiguous(), bias)

    def norm(self, module: Any) -> RmsNorm:
        eps = getattr(module, "variance_epsilon", None)
        if eps is None:
            eps = module.eps
        return RmsNorm(module.weight.detach().contiguous(), float(eps), self._names.norm_offset)

    def _rotations(self) -> dict[str | None, Rotary]:
        """Of each kind of layer, cos and sin of all positions; one under None where all are the same."""
        types = self._body.rotary_emb.rope_type
        made: dict[str | None, Rotary] = {}
        for kind, rope in (types if isinstance(types, dict) else {None: types}).items():
            trained = getattr(self._config, "original_max_position_embeddings", None)
            trained = trained or self._config.max_position_embeddings
            if rope in GROWING_ROPES and self._max_len > trained:
                raise Unserved(
                    f"max_len is {self._max_len}, expected {trained} or less: beyond it the tables of "
                    f"rope_type {rope!r} change as a sequence grows"
                )
            made[kind] = Rotary(*rope_tables(self._config, self._max_len, layer_type=kind, device="cpu"))
        return made
