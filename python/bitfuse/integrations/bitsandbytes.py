"""bitsandbytes' quantised layers as `bitfuse.nn.Linear`, in the same memory, and back.

bitsandbytes packs a 4-bit matrix flattened, the first code of a byte in its high bits; the canonical layout
has it in the low bits. Where its blocks divide the rows the two differ in nothing else, so a byte is turned
in place, and turned back. Its 8-bit codes are two's complement; ours count from 0: the top bit is flipped.
"""

from __future__ import annotations

from typing import Any

import torch

from ..core.limits import NESTED_BLOCK
from ..nn import Linear
from ..weights.bitsandbytes import format_of
from ..weights.formats import Format, nested_code
from ..weights.weight import CHUNK, LowBitWeight


def refusal(layer: torch.nn.Module) -> str | None:
    """Why a bitsandbytes layer can't become a `bitfuse.nn.Linear`; None when it can."""
    kind = type(layer).__name__
    weight: Any = layer._parameters.get("weight")
    if kind in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return _refusal_4bit(layer, weight)
    if kind == "Linear8bitLt":
        return _refusal_8bit(layer, weight)
    return f"a {type(layer).__module__}.{kind}, which bitfuse does not convert"


def _sizes(layer: torch.nn.Module) -> tuple[int, int]:
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def _refusal_sizes(layer: torch.nn.Module) -> str | None:
    _, k = _sizes(layer)
    if k % 8:
        return f"its in_features {k} is not a multiple of 8"
    return None


def _refusal_4bit(layer: torch.nn.Module, weight: Any) -> str | None:
    state = getattr(weight, "quant_state", None)
    if state is None:
        return "its weight is not quantised yet: move the layer to its device first"
    n, k = _sizes(layer)
    if reason := _refusal_sizes(layer):
        return reason
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has rounded its scales to bfloat16, as its first call in eval mode does on a CPU"
    if tuple(state.shape) != (n, k) or weight.numel() * weight.element_size() != n * k // 2:
        return f"its weight holds {tuple(state.shape)}, not {(n, k)}"
    if k % state.blocksize or state.blocksize % 8:
        return f"its blocksize {state.blocksize} does not divide in_features {k}"
    if not weight.is_contiguous():
        return "its weight is not contiguous"
    if isinstance(found := format_of(state.quant_type, tuple(state.code.tolist())), str):
        return found
    if state.nested:
        inner = state.state2
        if inner.blocksize != NESTED_BLOCK or not torch.equal(inner.code.cpu(), nested_code()):
            return f"its nested scales have blocks of {inner.blocksize} or a code table of their own"
    return None


def _refusal_8bit(layer: torch.nn.Module, weight: Any) -> str | None:
    state: Any = layer.state
    if state.has_fp16_weights:
        return "has_fp16_weights is True: its weight is not in 8 bits"
    codes = state.CB if state.CB is not None else weight.CB
    scales = state.SCB if state.SCB is not None else weight.SCB
    if codes is None or scales is None:
        return "its weight is not quantised yet: move the layer to its device first"
    if codes.shape != _sizes(layer) or codes.dtype != torch.int8 or not codes.is_contiguous():
        return f"its codes are {codes.dtype} {tuple(codes.shape)}, not int8 {_sizes(layer)}"
    return _refusal_sizes(layer)


def to_bitfuse(layer: torch.nn.Module) -> Linear:
    """The layer as a `bitfuse.nn.Linear` of equal values, in the layer's own memory: it must not be called
    until `to_bitsandbytes` has given it back.

    4-bit weights have bit-equal values. Of 8-bit ones the values are within a rounding of bitsandbytes'; its
    layer also rounds the activations to 8 bits, which a `bitfuse.nn.Linear` does not.

    Raises:
        ValueError: a layer that can't be converted; see `refusal`.
    """
    if reason := refusal(layer):
        raise ValueError(f"layer: {reason}")
    n, k = _sizes(layer)
    weight: Any = layer._parameters["weight"]
    bias = layer._parameters.get("bias")
    if type(layer).__name__ == "Linear8bitLt":
        state: Any = layer.state
        codes = state.CB if state.CB is not None else weight.CB
        scales = state.SCB if state.SCB is not None else weight.SCB
        qweight = codes.view(torch.uint8)
        _flip_signs(qweight)
        state.CB = weight.CB = None
        scales = (scales.float() / 127).view(n, 1)
        w = LowBitWeight(qweight, scales, Format("int8", 8), (n, k), dtype=torch.float16)
    else:
        quant: Any = weight.quant_state
        found = format_of(quant.quant_type, tuple(quant.code.tolist()))
        assert isinstance(found, Format)
        qweight = weight.data.view(torch.uint8).view(n, k // 2)
        _swap_nibbles(qweight)
        groups = k // quant.blocksize
        nested: Any = quant.state2 if quant.nested else None
        w = LowBitWeight(
            qweight,
            quant.absmax.view(n, groups),
            Format(found.name, 4, quant.blocksize, found.codebook, nested=quant.nested),
            (n, k),
            scale_scales=None if nested is None else nested.absmax,
            scale_offset=None if nested is None else quant.offset.view(1),
            dtype=quant.dtype,
        )
    weight.data = weight.data.new_empty(0)
    made = Linear.from_weight(w, bias)
    return made.train(layer.training)


def to_bitsandbytes(made: Linear, layer: torch.nn.Module) -> None:
    """Undo `to_bitfuse`: the layer has its bytes again, bit for bit, on the device where `made` is now."""
    w = made.weight
    weight: Any = layer._parameters["weight"]
    qweight = w.qweight.detach()
    if type(layer).__name__ == "Linear8bitLt":
        state: Any = layer.state
        _flip_signs(qweight)
        weight.data = state.CB = qweight.view(torch.int8)
        scales = state.SCB if state.SCB is not None else weight.SCB
        state.SCB, weight.SCB = scales.to(w.device), None
    else:
        _swap_nibbles(qweight)
        weight.data = qweight.view(-1).view(weight.dtype).view(-1, 1)
        quant: Any = weight.quant_state
        quant.absmax = w.scales.detach().view(-1)
        quant.code = quant.code.to(w.device)
        if quant.nested:
            assert w.scale_scales is not None and w.scale_offset is not None
            quant.state2.absmax, quant.offset = w.scale_scales.detach(), w.scale_offset.detach().view(())
            quant.state2.code = quant.state2.code.to(w.device)
    layer._parameters["bias"] = made._parameters["bias"]
    layer.train(made.training)


def _swap_nibbles(qweight: torch.Tensor) -> None:
    """Exchange the halves of each byte, in place, a bounded number at a time."""
    flat = qweight.view(-1)
    for at in range(0, flat.numel(), CHUNK):
        part = flat[at : at + CHUNK]
        part.copy_((part << 4) | (part >> 4))


def _flip_signs(codes: torch.Tensor) -> None:
    """Two's complement to offset binary, or back, in place."""
    codes.bitwise_xor_(0x80)
