"""AdamW8bit: torch.optim.AdamW with its state in 2 bytes a parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim._functional import adamw

from ..blockwise import ZERO, blocks_of
from ..ops.adamw8bit import BLOCK_SIZES, FLOATS, op

_CODES = ("exp_avg", "exp_avg_sq")


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) with both moments in 8 bits (Dettmers et al., "8-bit Optimizers via
    Block-wise Quantization", 2021): 2 bytes a parameter and 8 a block, where `torch.optim.AdamW` keeps 8
    bytes a parameter. Deterministic.

    A drop-in for `torch.optim.AdamW`: parameter groups, schedulers, hooks, `state_dict` and `load_state_dict`
    (which restores codes bit for bit) work as they do there. Options may differ between groups.

    Moments and update are computed in float32 and the parameter is written at its own dtype, to nearest: in
    bfloat16 an update below 1/512 of a parameter is lost, as with `torch.optim.AdamW`, so keep parameters in
    float32 (LoRA's are small) where updates are that fine. A second moment that is not 0 is never rounded
    to 0.

    Args:
        params: parameters or groups, float32, float16 or bfloat16; dense gradients of any float dtype.
        lr: learning rate, a float or a tensor of one (read at each step: on a GPU that waits for the device).
        betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        block_size: numbers that share a scale, a power of two from 64 to 4096.
        min_8bit_size: parameters of fewer elements keep moments in float32, as in bitsandbytes: their share
            of memory is small and biases and norms are touchy.
        paged: keep the codes of parameters on a GPU in pinned host memory. The update reads and writes them
            there, over the bus, as it runs over the parameter; device memory holds 8 bytes a block of state.
            On the CPU it changes nothing, and says so.

    Raises:
        TypeError, ValueError: an option out of range, a parameter of another dtype.
        RuntimeError: a sparse gradient, at `step`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        paged: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, block_size=block_size,
            min_8bit_size=min_8bit_size, paged=paged,
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. torch would cast codes to the parameter's dtype on the way: they
        pass it wrapped up."""
        before = self.register_load_state_dict_pre_hook(_wrap_state)
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
    if options["block_size"] not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"block_size is {options['block_size']}, expected one of {sizes}")


def _new_state(p: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
    step = torch.zeros((), dtype=torch.float32)
    if p.numel() < group["min_8bit_size"]:
        moments = {name: torch.zeros_like(p, dtype=torch.float32) for name in _CODES}
        return {"step": step, **moments}
    state = {"step": step}
    blocks = blocks_of(p.numel(), group["block_size"])
    paged = group["paged"] and p.is_cuda
    for name, signed in zip(_CODES, (True, False), strict=True):
        state[name] = torch.full(
            p.shape, ZERO[signed], dtype=torch.uint8, device="cpu" if paged else p.device, pin_memory=paged
        )
        state[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
    return state


def _update_8bit(p: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any], lr: float) -> None:
    grad = p.grad
    assert grad is not None
    if grad.dtype not in FLOATS:
        grad = grad.float()
    beta1, beta2 = group["betas"]
    state["step"] += 1
    # the op writes to a dense tensor; any other layout goes through a copy
    dense = p if p.is_contiguous() else p.contiguous()
    op(
        dense, grad, state["exp_avg"], state["exp_avg_absmax"], state["exp_avg_sq"],
        state["exp_avg_sq_absmax"], lr, beta1, beta2, group["eps"], group["weight_decay"],
        float(state["step"]), group["maximize"], group["block_size"],
    )  # fmt: skip
    if dense is not p:
        p.copy_(dense)
    else:
        torch.autograd.graph.increment_version(p)


def _update_float32(
    parameters: list[torch.Tensor], states: list[dict[str, torch.Tensor]], group: dict[str, Any], lr: float
) -> None:
    """torch's own AdamW, all parameters in one call, on float32 copies of those of another dtype."""
    beta1, beta2 = group["betas"]
    wide = [p.float() for p in parameters]
    adamw(
        wide, [p.grad.float() for p in parameters if p.grad is not None], [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
        fused=all(p.is_cpu for p in wide) or None, amsgrad=False, beta1=beta1, beta2=beta2, lr=lr,
        weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
    )  # fmt: skip
    for p, w in zip(parameters, wide, strict=True):
        if w is not p:
            p.copy_(w)


class _Wrapped:
    """A tensor that torch passes on as it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _wrap_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    def wrap(value: Any) -> Any:
        return _Wrapped(value) if isinstance(value, torch.Tensor) else value

    states = {i: {k: wrap(v) for k, v in state.items()} for i, state in state_dict["state"].items()}
    return {**state_dict, "state": states}


def _unwrap_state(optimizer: torch.optim.Optimizer) -> None:
    """Every tensor where its parameter's state lives, as a copy: two optimisers never share one."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state:
                continue
            paged = group["paged"] and p.is_cuda and "exp_avg_absmax" in state
            for name, value in state.items():
                if not isinstance(value, _Wrapped):
                    continue
                if name == "step":
                    state[name] = value.tensor.to("cpu", copy=True)
                elif paged and name in _CODES:
                    state[name] = value.tensor.to("cpu", copy=True).pin_memory()
                else:
                    state[name] = value.tensor.to(p.device, copy=True)


def _wait_for_pages(optimizer: torch.optim.Optimizer) -> None:
    """Codes in host memory are written by the device: whoever reads them here waits for it."""
    for device in {p.device for group in optimizer.param_groups if group["paged"] for p in group["params"]}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
