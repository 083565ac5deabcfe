"""AdamW8bit: torch.optim.AdamW with its state in 2 bytes a parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim._functional import adamw
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops.optim.adamw8bit import BLOCK_SIZES, FLOATS, op
from ..weights.blockwise import ZERO, blocks_of
from .states import MOMENTS, converted, is_dtensor, is_sharded_in_blocks, local, rename_codes, sharded_like

# what a group of an older checkpoint or of another optimiser may lack
_OPTIONS: dict[str, Any] = dict(
    maximize=False, block_size=256, min_8bit_size=4096, paged=False, amsgrad=False, foreach=None,
    capturable=False, differentiable=False, fused=None,
)  # fmt: skip


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) with both moments in 8 bits (Dettmers et al., "8-bit Optimizers via
    Block-wise Quantization", 2021): 2 bytes a parameter and 8 a block, where `torch.optim.AdamW` keeps 8
    bytes a parameter. Deterministic.

    A drop-in for `torch.optim.AdamW`: parameter groups, schedulers, hooks, `state_dict` and `load_state_dict`
    (which restores codes bit for bit) work as they do there. Options may differ between groups. The states of
    `torch.optim.AdamW` and of bitsandbytes' 8-bit and 32-bit AdamW load too, large moments to 8 bits;
    torch's AdamW refuses one with 8-bit codes, whose entries have other names (`step_8bit`, `exp_avg_8bit`).

    Parameters may be `DTensor`s (FSDP2). The state is sharded as they are, and in 8 bits where blocks end at
    the shards' ends: shards of rows, equally large, of a multiple of block_size elements. Moments of others
    are kept in float32.

    Moments and update are computed in float32 and the parameter is written at its own dtype, to nearest: in
    bfloat16 an update below 1/512 of a parameter is lost, as with `torch.optim.AdamW`, so keep parameters in
    float32 (LoRA's are small) where updates are that fine. A second moment that is not 0 is never rounded
    to 0.

    Args:
        params: parameters or groups, float32, float16 or bfloat16; dense gradients of any float dtype.
        lr: learning rate, a float or a tensor of one (read at each step: on a GPU that waits for the device).
        betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        amsgrad, capturable, differentiable: False, or left out.
        foreach, fused: taken as they come; the update is one fused kernel in any case.
        block_size: numbers that share a scale, a power of two from 64 to 4096.
        min_8bit_size: parameters of fewer elements keep moments in float32, as in bitsandbytes: their share
            of memory is small and biases and norms are touchy.
        paged: keep the codes of parameters on a GPU in pinned host memory. The update reads and writes them
            there, over the bus, as it runs over the parameter; device memory holds 8 bytes a block of state.
            On the CPU it changes nothing, and says so; nor with DTensors.

    Raises:
        TypeError, ValueError: an option out of range, a parameter of another dtype or a tensor subclass
            other than DTensor.
        RuntimeError: a sparse gradient, at `step`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        paged: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize,
            foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
            block_size=block_size, min_8bit_size=min_8bit_size, paged=paged,
        )  # fmt: skip
        super().__init__(params, defaults)
        self.register_state_dict_pre_hook(_wait_for_pages)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer` does; its options are checked first."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        wrong = next((p for p in group["params"] if p.dtype not in FLOATS), None)
        if wrong is not None:
            self.param_groups.pop()
            raise TypeError(f"params holds a {wrong.dtype}, expected {' or '.join(map(str, FLOATS))}")
        # a wrapper has no memory of its own that a kernel could write to
        odd = (p for p in group["params"] if not is_dtensor(p) and is_traceable_wrapper_subclass(p))
        if (wrapper := next(odd, None)) is not None:
            self.param_groups.pop()
            raise TypeError(f"params holds a {type(wrapper).__name__}, expected plain tensors or DTensors")
        if group["paged"] and not any(p.is_cuda for p in group["params"]):
            warnings.warn("paged=True changes nothing: no parameter of the group is on a GPU", stacklevel=3)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr = float(group["lr"])
            found = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in found):
                raise RuntimeError("AdamW8bit takes no sparse gradients: torch.optim.SparseAdam does")
            small = []
            for p in found:
                state = self.state[p]
                if not state:
                    state.update(_new_state(p, group))
                if "exp_avg_absmax" in state:
                    _update_8bit(p, state, group, lr)
                else:
                    small.append(p)
            if small:
                _update_float32(small, [self.state[p] for p in small], group, lr)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults = {**_OPTIONS, **self.defaults}
        for group in self.param_groups:
            for name, value in _OPTIONS.items():
                group.setdefault(name, value)
        for p, own in self.state.items():
            if isinstance(own, dict):
                self.state[p] = rename_codes(own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, here, in `torch.optim.AdamW` or in bitsandbytes' AdamW. A group
        keeps its own value of an option that the saved one lacks.

        Raises:
            ValueError: a state that is none of these, or of other shapes; the optimiser is then as it was.
        """
        # torch would cast codes to the parameter's dtype on the way: they pass it wrapped up
        before = self.register_load_state_dict_pre_hook(_take_in)
        after = self.register_load_state_dict_post_hook(_unwrap_state, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()


def _check(options: dict[str, Any]) -> None:
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has shape {list(lr.shape)}, expected a float or a tensor of one element")
    if not float(lr) >= 0:
        raise ValueError(f"lr is {float(lr)}, expected 0 or more")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas}, expected two numbers in [0, 1)")
    for name in ("eps", "weight_decay", "min_8bit_size"):
        if not options[name] >= 0:
            raise ValueError(f"{name} is {options[name]}, expected 0 or more")
    for name in ("amsgrad", "capturable", "differentiable"):
        if options[name]:
            raise ValueError(f"{name} is {options[name]}, expected False: AdamW8bit does not do it")
    if options["block_size"] not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"block_size is {options['block_size']}, expected one of {sizes}")


def _new_state(p: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
    step = torch.zeros((), dtype=torch.float32, device="cpu")
    if p.numel() < group["min_8bit_size"] or not is_sharded_in_blocks(p, group["block_size"]):
        return {"step": step, **{name: torch.zeros_like(p, dtype=torch.float32) for name in MOMENTS}}
    state = {"step_8bit": step}
    mine = local(p)
    blocks = blocks_of(mine.numel(), group["block_size"])
    paged = group["paged"] and p.is_cuda and mine is p
    for name, signed in zip(MOMENTS, (True, False), strict=True):
        codes = torch.full(
            mine.shape,
            ZERO[signed],
            dtype=torch.uint8,
            device="cpu" if paged else mine.device,
            pin_memory=paged,
        )
        state[f"{name}_8bit"] = sharded_like(codes, p)
        absmax = torch.zeros(blocks, dtype=torch.float32, device=mine.device)
        state[f"{name}_absmax"] = sharded_like(absmax, p)
    return state


def _update_8bit(p: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any], lr: float) -> None:
    grad = p.grad
    assert grad is not None
    step = state["step_8bit"]
    if is_dtensor(p):
        grad, state = local(grad, p), {name: local(t) for name, t in state.items()}
        p = local(p)
    if grad.dtype not in FLOATS:
        grad = grad.float()
    beta1, beta2 = group["betas"]
    step += 1
    # the op writes to a dense tensor; any other layout goes through a copy
    dense = p if p.is_contiguous() else p.contiguous()
    op(
        dense, grad, state["exp_avg_8bit"], state["exp_avg_absmax"], state["exp_avg_sq_8bit"],
        state["exp_avg_sq_absmax"], lr, beta1, beta2, group["eps"], group["weight_decay"], float(step),
        group["maximize"], group["block_size"],
    )  # fmt: skip
    if dense is not p:
        p.copy_(dense)


def _update_float32(
    parameters: list[torch.Tensor], states: list[dict[str, torch.Tensor]], group: dict[str, Any], lr: float
) -> None:
    """torch's own AdamW, all parameters in one call, on float32 copies of those of another dtype."""
    beta1, beta2 = group["betas"]
    grads = [local(p.grad, p).float() for p in parameters if p.grad is not None]
    narrow = [local(p) for p in parameters]
    wide = [p.float() for p in narrow]
    adamw(
        wide, grads, [local(s["exp_avg"]) for s in states], [local(s["exp_avg_sq"]) for s in states], [],
        [s["step"] for s in states], fused=all(p.is_cpu for p in wide) or None, amsgrad=False, beta1=beta1,
        beta2=beta2, lr=lr, weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
    )  # fmt: skip
    for p, w in zip(narrow, wide, strict=True):
        if w is not p:
            p.copy_(w)


class _Wrapped:
    """A tensor that torch passes on as it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _take_in(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state as this optimiser's, checked, its tensors wrapped."""
    saved_groups, saved = state_dict.get("param_groups"), state_dict.get("state")
    own_groups = optimizer.param_groups
    if saved_groups is None or saved is None or len(saved_groups) != len(own_groups):
        return state_dict  # torch refuses it
    states, groups = dict(saved), []
    for own, found in zip(own_groups, saved_groups, strict=True):
        group = {**{k: v for k, v in own.items() if k in optimizer.defaults}, **found}
        _check(group)
        groups.append(group)
        for i, p in zip(found["params"], own["params"], strict=False):
            if i in saved:
                try:
                    made = converted(saved[i], p, group["block_size"], group["min_8bit_size"])
                except ValueError as why:
                    raise ValueError(f"the state of parameter {i}: {why}") from None
                states[i] = {k: _Wrapped(v) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    return {**state_dict, "state": states, "param_groups": groups}


def _unwrap_state(optimizer: torch.optim.Optimizer) -> None:
    """Every tensor where its parameter's state lives, as a copy: two optimisers never share one."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state:
                continue
            paged = group["paged"] and p.is_cuda and not is_dtensor(p)
            for name, value in state.items():
                if not isinstance(value, _Wrapped):
                    continue
                if name in ("step", "step_8bit"):
                    state[name] = value.tensor.to("cpu", copy=True)
                elif paged and name.endswith("_8bit"):
                    state[name] = value.tensor.to("cpu", copy=True).pin_memory()
                else:
                    state[name] = value.tensor.to(p.device, copy=True)


def _wait_for_pages(optimizer: torch.optim.Optimizer) -> None:
    """Codes in host memory are written by the device: whoever reads them here waits for it."""
    for device in {p.device for group in optimizer.param_groups if group["paged"] for p in group["params"]}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
