"""The states of AdamW by several optimisers, as `AdamW8bit` keeps them; and their parts on one rank.

`AdamW8bit` keeps two kinds, either of which torch takes for what it is: float32 moments under the names of
`torch.optim.AdamW` (step, exp_avg, exp_avg_sq), and codes under names that AdamW misses at once (step_8bit,
exp_avg_8bit, exp_avg_absmax, exp_avg_sq_8bit, exp_avg_sq_absmax). Version 0.1 called its codes exp_avg and
exp_avg_sq, and torch's AdamW took them for moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.optim.adamw8bit import BLOCK_SIZES
from ..weights.blockwise import blocks_of, dequantize_blocks, dynamic_map, quantize_blocks

MOMENTS = ("exp_avg", "exp_avg_sq")
PLAIN = (torch.nn.Parameter, torch.Tensor)
_BITSANDBYTES = "__bnb_optimizer_quant_state__"  # where it hides codes from FSDP


# tensors that are spread over ranks


def is_dtensor(t: torch.Tensor) -> bool:
    """Whether a tensor is a `torch.distributed.tensor.DTensor`, without importing that."""
    return type(t) not in PLAIN and hasattr(t, "to_local") and hasattr(t, "placements")


def local(t: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """What this rank has of a tensor, placed as `like` is; a plain tensor itself."""
    if not is_dtensor(t):
        return t
    spread: Any = t
    if like is not None and spread.placements != like.placements:  # type: ignore[attr-defined]
        spread = spread.redistribute(like.device_mesh, like.placements)  # type: ignore[attr-defined]
    mine: torch.Tensor = spread.to_local()
    return mine


def sharded_like(mine: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A rank's part of a tensor whose first dimension is spread as p's; plain if p is."""
    if not is_dtensor(p):
        return mine
    from torch.distributed.tensor import DTensor

    spread: Any = p
    return DTensor.from_local(mine, spread.device_mesh, spread.placements, run_check=False)


def _spread(t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every rank has, placed as p; one that is spread already itself."""
    if not is_dtensor(p) or is_dtensor(t):
        return t
    from torch.distributed.tensor import distribute_tensor

    spread: Any = p
    t = t.to(local(p).device)
    return distribute_tensor(t, spread.device_mesh, spread.placements, src_data_rank=None)


def is_sharded_in_blocks(p: torch.Tensor, block_size: int) -> bool:
    """Whether every rank has whole blocks of p, in order, so that scales can be spread as it is."""
    if not is_dtensor(p):
        return True
    from torch.distributed.tensor import Replicate, Shard

    spread: Any = p
    ranks = 1
    for placement, size in zip(spread.placements, spread.device_mesh.shape, strict=True):
        if type(placement) is Shard and placement.dim == 0 and ranks == 1:
            ranks = size
        elif type(placement) is not Replicate:
            return False
    return p.shape[0] % ranks == 0 and p.numel() // ranks % block_size == 0


# states


def rename_codes(state: dict[str, Any]) -> dict[str, Any]:
    """A state with the names of version 0.1 under today's; another as it is."""
    if "exp_avg_absmax" not in state or "exp_avg_8bit" in state:
        return state
    names = {"step": "step_8bit", **{name: f"{name}_8bit" for name in MOMENTS}}
    return {names.get(name, name): value for name, value in state.items()}


def converted(
    state: Mapping[str, Any], p: torch.Tensor, block_size: int, min_8bit_size: int
) -> dict[str, Any]:
    """A parameter's state by AdamW8bit, torch's AdamW or bitsandbytes' as `AdamW8bit` keeps it.

    Codes stay what they are, bitsandbytes' in blocks of the same size too. Other moments are rounded to codes
    if the parameter has min_8bit_size elements. Whole codes whose blocks are not the shards' become floats.

    Raises:
        ValueError: another optimiser's state, or one that does not fit the parameter.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"a {type(state).__name__}, expected a dict")
    flat = dict(state)
    if isinstance(hidden := flat.pop(_BITSANDBYTES, None), Mapping):
        flat |= hidden
    if not flat:
        return flat
    flat = rename_codes(flat)
    if "max_exp_avg_sq" in flat:
        raise ValueError("holds max_exp_avg_sq, which only amsgrad has: AdamW8bit does not do it")
    if "exp_avg_8bit" in flat:
        return _checked_codes(flat, p, block_size)
    names = ("state1", "state2") if "state1" in flat else MOMENTS
    missing = [name for name in ("step", *names) if name not in flat]
    if missing:
        raise ValueError(f"holds {sorted(map(str, flat))}, without {missing[0]}: it is not of an AdamW")
    step = _step(flat["step"])
    in_codes = p.numel() >= min_8bit_size and is_sharded_in_blocks(p, block_size)
    made: dict[str, Any] = {"step_8bit": step} if in_codes else {"step": step}
    for name, theirs, signed in zip(MOMENTS, names, (True, False), strict=True):
        t = _checked(flat, theirs, p.shape)
        table = None if t.is_floating_point() else _Table.of(flat, theirs, t)
        if in_codes and table is not None and table.is_ours(signed, block_size):
            made[f"{name}_8bit"], made[f"{name}_absmax"] = _spread(t, p), _spread(table.absmax, p)
            continue
        if table is not None:
            t = table.dequantize(t)
        moment = _spread(t, p).to(p.device, torch.float32)
        mine = local(moment)
        if not signed and mine.numel() and float(mine.amin()) < 0:
            raise ValueError(f"{theirs} holds a negative number, expected second moments")
        if in_codes:
            codes, absmax = quantize_blocks(mine, signed, block_size)
            made[f"{name}_8bit"], made[f"{name}_absmax"] = sharded_like(codes, p), sharded_like(absmax, p)
        else:
            made[name] = moment
    return made


@dataclass(frozen=True)
class _Table:
    """What bitsandbytes' codes of one moment mean: values [256], absmax [blocks], float32."""

    values: torch.Tensor
    absmax: torch.Tensor
    block_size: int

    @staticmethod
    def of(state: Mapping[str, Any], name: str, codes: torch.Tensor) -> _Table:
        if codes.dtype != torch.uint8 or not name.startswith("state") or is_dtensor(codes):
            raise ValueError(f"{name} has dtype {codes.dtype}, expected floats")
        values, absmax = _checked(state, f"qmap{name[-1]}", (256,)), state.get(f"absmax{name[-1]}")
        sizes = {blocks_of(codes.numel(), size): size for size in reversed(BLOCK_SIZES)}
        if not isinstance(absmax, torch.Tensor) or absmax.dim() != 1 or absmax.shape[0] not in sizes:
            raise ValueError(f"absmax{name[-1]} is missing or of no block size: expected block-wise codes")
        return _Table(values.float(), absmax.float(), sizes[absmax.shape[0]])

    def is_ours(self, signed: bool, block_size: int) -> bool:
        ours = dynamic_map(signed, self.values.device)
        return block_size == self.block_size and bool((self.values - ours).abs().max() < 1e-6)

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        scales = self.absmax.repeat_interleave(self.block_size)[: codes.numel()]
        return (self.values[codes.flatten().int()] * scales).view(codes.shape)


def _step(value: Any) -> torch.Tensor:
    number = isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    step = float(value) if number else -1.0
    if not 0 <= step < float("inf"):
        raise ValueError(f"step is {value!r}, expected a number of updates")
    return torch.tensor(step, dtype=torch.float32, device="cpu")


def _checked(state: Mapping[str, Any], name: str, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    t = state.get(name)
    if not isinstance(t, torch.Tensor) or t.shape != tuple(shape):
        found = f"has shape {list(t.shape)}" if isinstance(t, torch.Tensor) else f"is a {type(t).__name__}"
        raise ValueError(f"{name} {found}, expected a tensor {list(shape)}")
    return t


def _checked_codes(state: Mapping[str, Any], p: torch.Tensor, block_size: int) -> dict[str, Any]:
    made: dict[str, Any] = {"step_8bit": _step(state.get("step_8bit"))}
    blocks = blocks_of(p.numel(), block_size)
    for name in MOMENTS:
        for key, shape, dtype in (
            (f"{name}_8bit", p.shape, torch.uint8),
            (f"{name}_absmax", (blocks,), torch.float32),
        ):
            t = _checked(state, key, shape)
            if t.dtype != dtype:
                raise ValueError(f"{key} has dtype {t.dtype}, expected {dtype}")
            made[key] = t
    if is_sharded_in_blocks(p, block_size):
        return {key: _spread(t, p) if key != "step_8bit" else t for key, t in made.items()}
    moments = {"step": made["step_8bit"]}
    for name, signed in zip(MOMENTS, (True, False), strict=True):  # this rank takes its part of them
        codes, absmax = made[f"{name}_8bit"], made[f"{name}_absmax"]
        if is_dtensor(codes):
            raise ValueError(f"its blocks of {block_size} do not end where the shards of the parameter do")
        moments[name] = _spread(dequantize_blocks(codes, absmax, signed, block_size), p)
    return moments
