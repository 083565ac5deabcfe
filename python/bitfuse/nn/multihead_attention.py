"""MultiheadAttention: torch.nn.MultiheadAttention by bitfuse's attention."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..core.autograd import Function, once
from ..core.dropout import keep_rows, new_seed
from ..core.explain import Explanation
from ..ops.attention.attention import MAX_HEAD_DIM, apply_attention, attention_op
from ..ops.attention.attention_args import AttentionArgs

_linear = torch.nn.functional.linear


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with its scores never written: the same constructor, parameters, state
    dict and masks; self-attention is one projection, whose parts `bitfuse.attention` reads in place.

    What differs from torch:
    - a query that sees no key gives the bias of `out_proj`, and weights of 0, where torch may give NaN;
    - `is_causal` is taken at its word: attn_mask is then not looked at, and may be None;
    - the keys that `add_bias_kv` and `add_zero_attn` add are seen by every query, in the causal case too;
    - head dims go to 256, dtypes are float32, float16 and bfloat16, and no nested tensors.

    `need_weights=True` returns the weights, which are made by themselves, a head at a time in float32: a
    second q k^T, its softmax, and memory for the weights and for two heads' worth of them. Nothing of that is
    kept for the backward, which makes a head's weights anew if they have a gradient. Pass False where they
    are not used.

    `torch.nn.TransformerEncoderLayer` in eval mode without gradients has a fast path of its own that reads
    this layer's parameters and does not call it; `torch.backends.mha.set_fastpath_enabled(False)` ends that.

    Raises:
        ValueError: sizes that do not fit, or a head_dim above 512.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim is {embed_dim}, expected a multiple of num_heads, {num_heads}")
        if embed_dim // num_heads > MAX_HEAD_DIM:
            raise ValueError(
                f"embed_dim is {embed_dim} and num_heads {num_heads}, expected at most {MAX_HEAD_DIM} a head"
            )
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype,
        )  # fmt: skip

    @classmethod
    def from_torch(cls, module: torch.nn.MultiheadAttention) -> MultiheadAttention:
        """A layer of the same parameters, which both then share.

        Raises:
            TypeError: not a torch.nn.MultiheadAttention, or a subclass, whose meaning is its own.
            ValueError: a head_dim above 512.
        """
        if type(module) is not torch.nn.MultiheadAttention:
            raise TypeError(
                f"module is a {type(module).__name__}, expected a torch.nn.MultiheadAttention, no subclass"
            )
        layer = cls(
            module.embed_dim, module.num_heads, module.dropout, module.in_proj_bias is not None,
            module.bias_k is not None, module.add_zero_attn, module.kdim, module.vdim, module.batch_first,
            device="meta",
        )  # fmt: skip
        layer._parameters.update(module._parameters)
        layer.out_proj = module.out_proj
        return layer.train(module.training)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            query: [seqlen_q, batch, embed_dim], [batch, seqlen_q, embed_dim] if batch_first, or without a
                batch [seqlen_q, embed_dim].
            key, value: likewise, of kdim and vdim.
            key_padding_mask: [batch, seqlen_k] ([seqlen_k]): bool, True for a key that is not seen, or float,
                added to the scores.
            need_weights: return the weights too.
            attn_mask: [seqlen_q, seqlen_k] or [batch * heads, seqlen_q, seqlen_k]: bool, True for a pair that
                is not seen, or float, added.
            average_attn_weights: the mean of the heads' weights.
            is_causal: query i sees the keys up to i; in the place of attn_mask.

        Returns:
            [like query], and the weights: [batch, seqlen_q, seqlen_k], with a dimension of heads after the
            batch unless averaged, of query's dtype; None unless needed. Keys that the layer adds come last.

        Raises:
            TypeError: nested tensors, masks that are neither bool nor float, a dtype that is not listed.
            ValueError: sizes that do not fit.
        """
        self._check(query, key, value)
        batched = query.dim() == 3
        q, k, v = self._projected(query, key, value)
        a = self._arguments(q, k, key_padding_mask, attn_mask, is_causal, batched)
        out, lse = apply_attention(q, k, v, a, True)
        weights = None
        if need_weights:
            weights = _Weights.call(
                q, k, a.prefix_k, lse == -math.inf, a.bias, a.softmax_scale, is_causal, a.dropout_p, a.seed,
                average_attn_weights,
            )  # fmt: skip
        if batched and not self.batch_first:
            out = out.transpose(0, 1)
        out = self.out_proj(out.flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def explain(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Explanation:
        """Who would serve the attention of `forward`, and why the others would not."""
        self._check(query, key, value)
        batched = query.dim() == 3
        heads = (self.num_heads, self.head_dim)
        q, k = (self._batch_first(t.new_empty(*t.shape[:-1], *heads)) for t in (query, key))
        a = self._arguments(q, k, key_padding_mask, attn_mask, is_causal, batched)
        return attention_op.explain(q, k, k, a)

    def _check(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        for name, t in (("query", query), ("key", key), ("value", value)):
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor")
            if t.is_nested:
                raise TypeError(
                    f"{name} is a nested tensor, expected a dense one: pad it and pass key_padding_mask, or "
                    "pack the sequences for bitfuse.varlen_attention"
                )
        dims = query.dim()
        if dims not in (2, 3) or query.shape[-1] != self.embed_dim:
            raise ValueError(
                f"query has shape {list(query.shape)}, expected two or three dimensions, the last of "
                f"{self.embed_dim}"
            )
        for name, t, size in (("key", key, self.kdim), ("value", value, self.vdim)):
            wanted = [*key.shape[:-1], size]
            if dims == 3 and key.dim() == 3:
                at = 0 if self.batch_first else 1
                wanted[at] = query.shape[at]
            if t.dim() != dims or list(t.shape) != wanted:
                raise ValueError(f"{name} has shape {list(t.shape)}, expected {wanted}, as query and key are")

    def _batch_first(self, t: torch.Tensor) -> torch.Tensor:
        """[batch, seq, heads, head_dim] of heads that were split off any of the three layouts."""
        if t.dim() == 3:
            return t.unsqueeze(0)
        return t if self.batch_first else t.transpose(0, 1)

    def _projected(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """q, k and v, [batch, seq, heads, head_dim]; views of one product where the inputs are the same."""
        e, heads = self.embed_dim, (self.num_heads, self.head_dim)
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            parts = list(_linear(query, weight, bias).unflatten(-1, (3, *heads)).unbind(-3))
        elif weight is not None and key is value:
            of_q, of_kv = (None, None) if bias is None else (bias[:e], bias[e:])
            parts = [_linear(query, weight[:e], of_q).unflatten(-1, heads)]
            parts += _linear(key, weight[e:], of_kv).unflatten(-1, (2, *heads)).unbind(-3)
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if weight is None else weight.chunk(3)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            given = zip((query, key, value), weights, biases, strict=True)
            parts = [_linear(x, w, b).unflatten(-1, heads) for x, w, b in given]
        return [self._batch_first(t) for t in parts]

    def _arguments(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        batched: bool,
    ) -> AttentionArgs:
        """The masks as one bias, and the added keys as a prefix, which is what every query sees."""
        dropout_p = self.dropout if self.training else 0.0
        bias = _bias(key_padding_mask, None if is_causal else attn_mask, q, k.shape[1], batched)
        return AttentionArgs(
            1 / math.sqrt(self.head_dim),
            right=0 if is_causal else -1,
            top_left=is_causal,
            dropout_p=float(dropout_p),
            seed=new_seed(q) if dropout_p else None,
            bias=bias,
            prefix_k=self._added(self.bias_k, q),
            prefix_v=self._added(self.bias_v, q),
        )

    def _added(self, own: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
        """What stands beside the keys or the values: a learnt one, then zeros."""
        batch, _, heads, dim = q.shape
        found = []
        if own is not None:
            found.append(own.to(q.dtype).view(1, 1, heads, dim).expand(batch, -1, -1, -1))
        if self.add_zero_attn:
            found.append(q.new_zeros(batch, 1, heads, dim))
        return torch.cat(found, 1) if found else None


def _bias(
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    q: torch.Tensor,
    seqlen_k: int,
    batched: bool,
) -> torch.Tensor | None:
    """Both masks as `AttentionArgs.bias`: bool, True for what is seen, if both are bool; else floats."""
    batch, seqlen_q, heads, _ = q.shape
    masks = []
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is None:
            continue
        if not isinstance(mask, torch.Tensor):
            raise TypeError(f"{name} is a {type(mask).__name__}, expected a tensor or None")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{name} has dtype {mask.dtype}, expected torch.bool or floats")
        if name == "key_padding_mask":
            shapes = [[batch, seqlen_k] if batched else [seqlen_k]]
            view = mask.reshape(batch, 1, 1, -1) if list(mask.shape) == shapes[0] else None
        else:
            shapes = [[seqlen_q, seqlen_k], [batch * heads, seqlen_q, seqlen_k]]
            view = mask.view(1, 1, *shapes[0]) if list(mask.shape) == shapes[0] else None
            if list(mask.shape) == shapes[1]:
                view = mask.unflatten(0, (batch, heads))
        if view is None:
            raise ValueError(f"{name} has shape {list(mask.shape)}, expected {' or '.join(map(str, shapes))}")
        masks.append(view)
    if all(m.dtype == torch.bool for m in masks):
        hidden = None
        for m in masks:
            hidden = m if hidden is None else hidden | m
        return None if hidden is None else ~hidden
    total = None
    for m in masks:
        if m.dtype == torch.bool:
            m = torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -math.inf)
        total = m if total is None else total + m
    return total


class _Weights(Function):
    """softmax(scale q k^T + bias), the keys' columns and then the prefix's; 0 where `empty` says that a query
    sees nothing; dropped as the attention dropped them. Keeps its inputs."""

    op = "the weights of MultiheadAttention"

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        prefix_k: torch.Tensor | None,
        empty: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        causal: bool,
        dropout_p: float,
        seed: torch.Tensor | None,
        average: bool,
    ) -> torch.Tensor:
        batch, seqlen_q, heads, _ = q.shape
        columns = k.shape[1] + (0 if prefix_k is None else prefix_k.shape[1])
        if average:
            total = q.new_zeros(batch, seqlen_q, columns, dtype=torch.float32)
        else:
            found = q.new_empty(batch, heads, seqlen_q, columns)
        with _no_autocast(q):
            for h in range(heads):
                _, _, p = _head(h, q, k, prefix_k, empty, bias, scale, causal)
                p = (
                    p * factor
                    if (factor := _factor(h, p, heads, prefix_k, seed, dropout_p)) is not None
                    else p
                )
                if average:
                    total += p
                else:
                    found[:, h] = p
        return (total / heads).to(q.dtype) if average else found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        q, k, prefix_k, empty, bias, scale, causal, dropout_p, seed, average = inputs
        ctx.save_for_backward(q, k, prefix_k, empty, bias, seed)
        ctx.numbers = scale, causal, dropout_p, average

    @staticmethod
    @once("the weights of MultiheadAttention")
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, prefix_k, empty, bias, seed = ctx.saved_tensors
        scale, causal, dropout_p, average = ctx.numbers
        heads, seqlen_k = q.shape[2], k.shape[1]
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        dprefix = None if prefix_k is None else torch.empty_like(prefix_k)
        dbias = None
        if ctx.needs_input_grad[4]:
            dbias = q.new_zeros(bias.shape, dtype=torch.float32)
        with _no_autocast(q):
            for h in range(heads):
                rows, keys, p = _head(h, q, k, prefix_k, empty, bias, scale, causal)
                dp = grads[0].to(p.dtype) / heads if average else grads[0][:, h].to(p.dtype)
                factor = _factor(h, p, heads, prefix_k, seed, dropout_p)
                dz = p * (dp if factor is None else dp * factor)
                dz -= p * dz.sum(-1, keepdim=True)
                dq[:, :, h] = torch.bmm(dz, keys) * scale
                dkeys = torch.bmm(dz.transpose(1, 2), rows)  # rows have the scale in them
                dk[:, :, h] = dkeys[:, :seqlen_k]
                if dprefix is not None:
                    dprefix[:, :, h] = dkeys[:, seqlen_k:]
                if dbias is not None:
                    at = dbias[:, h if dbias.shape[1] > 1 else 0]
                    at += dz[..., :seqlen_k].sum_to_size(at.shape)
        made = None if dbias is None else dbias.to(bias.dtype)
        return dq, dk, dprefix, None, made, None, None, None, None, None


def _no_autocast(t: torch.Tensor) -> torch.autocast:
    return torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False)


def _head(
    h: int,
    q: torch.Tensor,
    k: torch.Tensor,
    prefix_k: torch.Tensor | None,
    empty: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one head, in float32: the scaled queries, all keys, and the probabilities."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    rows, keys = q[:, :, h].float() * scale, k[:, :, h]
    if prefix_k is not None:
        keys = torch.cat([keys, prefix_k[:, :, h]], 1)
    keys = keys.float()
    z = torch.bmm(rows, keys.transpose(1, 2))
    own = z[..., :seqlen_k]
    if bias is not None:
        part = bias[:, h if bias.shape[1] > 1 else 0]
        if part.dtype == torch.bool:
            own.masked_fill_(~part, -math.inf)
        else:
            own += part
    if causal:
        pairs = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
        own.masked_fill_(pairs.triu(1), -math.inf)
    return rows, keys, torch.softmax(z, -1).masked_fill_(empty[:, h].unsqueeze(-1), 0)


def _factor(
    h: int,
    p: torch.Tensor,
    heads: int,
    prefix_k: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor | None:
    """0 for what the attention dropped of a head's probabilities, 1 / (1 - dropout_p) for the others."""
    if seed is None:
        return None
    batch, seqlen_q, columns = p.shape
    first = (torch.arange(batch, dtype=torch.int64, device=p.device) * heads + h) * seqlen_q
    rows = (first.unsqueeze(1) + torch.arange(seqlen_q, dtype=torch.int64, device=p.device)).flatten()
    kept = keep_rows(seed, rows, columns, dropout_p).view(p.shape)
    if prefix_k is not None:  # its columns come first there
        kept = kept.roll(-prefix_k.shape[1], -1)
    return kept.to(p.dtype) / (1 - dropout_p)
