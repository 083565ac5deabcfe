"""sample: a token a row from logits, after temperature, min-p, top-k and top-p."""

from __future__ import annotations

from typing import Any

import torch

from ...core.backends import Backend
from ...core.declaration import Declaration, Part, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...core.tensors import check_tensor
from ...kernels.sampling import sample as triton
from ..linear.lowbit_linear import FLOATS
from . import sample_cpu as cpp
from .speculative_sample import MAX_VOCABULARY, _inverse_cdf

# The most likely token weighs this much and the others in proportion, cut off to integers, which sum to the
# same in any order. What weighs nothing is less likely than the most likely token by a factor of 2^40.
ONE = 2**40


def _check(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> None:
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(
            f"logits has shape {list(logits.shape)}, expected [rows, 1 to {MAX_VOCABULARY} tokens]"
        )
    check_tensor("logits", logits, FLOATS, tuple(logits.shape), logits.device)
    rows = logits.shape[:1]
    check_tensor("uniforms", uniforms, (torch.float32, torch.float64), rows, logits.device)
    for name, t in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        check_tensor(name, t, (torch.float64,), rows, logits.device)
    check_tensor("top_k", top_k, (torch.int64,), rows, logits.device)


def _weights(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """What each token weighs after the filters: int64 [rows, vocabulary]."""
    z = torch.where(logits.isnan(), -torch.inf, logits.double())
    top = z.amax(-1, keepdim=True)
    temperature = torch.where(temperature > 0, temperature, 0.0)
    weights = torch.exp(torch.where(z == top, 0.0, (z - top) / temperature.unsqueeze(1)))
    weights = torch.where(weights >= torch.where(min_p <= 1, min_p, 1.0).unsqueeze(1), weights, 0.0)
    fixed = (weights * ONE).to(torch.int64)
    # the most likely first, equals by their ids
    order = z.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(z.shape[1], dtype=torch.int64, device=z.device)
    k = torch.where(temperature == 0, 1, torch.where(top_k > 0, top_k, z.shape[1])).unsqueeze(1)
    sorted_weights = torch.where(places < k, fixed.gather(-1, order), 0)
    before = sorted_weights.cumsum(-1) - sorted_weights
    total = sorted_weights.sum(-1)
    needed = torch.where(top_p < 1, (top_p * total.double()).to(torch.int64).clamp(min=1), total)
    sorted_weights = torch.where(before < needed.unsqueeze(1), sorted_weights, 0)
    return torch.zeros_like(fixed).scatter(-1, order, sorted_weights)


def _reference(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    return _inverse_cdf(_weights(logits, temperature, top_k, top_p, min_p), uniforms)


def _fake(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


sample_op = Op(
    "sample(Tensor logits, Tensor uniforms, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p) "
    "-> Tensor",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
)


def _per_row(
    name: str, value: float | torch.Tensor, logits: torch.Tensor, dtype: torch.dtype, low: float, high: float
) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        if dtype == torch.int64 and value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}, expected whole numbers")
        if value.dim() == 0:
            value = value.expand(logits.shape[0])
        return value.to(dtype)
    if dtype == torch.int64 and not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}, expected an int or a tensor of them")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected {low} to {high}")
    return torch.full((logits.shape[0],), value, dtype=dtype, device=logits.device)


def _arguments(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
    min_p: float | torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits is a {type(logits).__name__}, expected a tensor")
    if logits.dim() != 2:
        raise ValueError(f"logits has shape {list(logits.shape)}, expected [rows, vocabulary]")
    return (
        logits,
        uniforms,
        _per_row("temperature", temperature, logits, torch.float64, 0.0, 1e30),
        _per_row("top_k", top_k, logits, torch.int64, 0, 2**62),
        _per_row("top_p", top_p, logits, torch.float64, 0.0, 1.0),
        _per_row("min_p", min_p, logits, torch.float64, 0.0, 1.0),
    )


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    *,
    return_probs: bool = False,
) -> Any:
    """One token a row. The filters come in vLLM's order, each over what the one before has left: temperature,
    min-p (Nguyen et al., 2024), top-k (Fan et al., 2018), top-p (Holtzman et al., 2020).

    Equal logits stand in the order of their ids, so exactly k tokens are kept. The token is the first, by id,
    at which the running sum of the weights, integers of 40 bits, exceeds uniform * total. A weight is an
    exponential in float64, cut off.

    Args:
        logits: [rows, vocabulary], float32, float16 or bfloat16. NaN counts as -inf; a row of -inf throughout
            is uniform.
        uniforms: float32 or float64 [rows], in [0, 1).
        temperature: divides the logits; 0 is the most likely token. This and what follows is a number, or a
            tensor [rows] of one a row, whose values are not looked at: one out of range counts as the
            nearest that is not, NaN as no temperature, all of top_p, and a min_p of 1.
        top_k: tokens that are kept; 0 is all.
        top_p: the fewest, most likely tokens whose probabilities sum to top_p or more; 1 is all.
        min_p: tokens with a probability of min_p times the largest, or more.
        return_probs: return the probabilities too, which takes a sort of each row.

    Returns:
        int64 [rows]; with return_probs also what the tokens were drawn from, filtered and summing to 1:
        float32 [rows, vocabulary]. That, not the softmax of the logits, is what `bitfuse.speculative_sample`
        wants as draft_probs and, of the target's logits with the target's filters, as target_probs.

    Raises:
        TypeError: a dtype or a type that is not listed.
        ValueError: sizes that do not fit, a number out of its range, tensors on two devices.
    """
    with torch.no_grad():
        arguments = _arguments(logits, uniforms, temperature, top_k, top_p, min_p)
        ids = sample_op(*arguments)
        if not return_probs:
            return ids
        weights = _weights(logits, *arguments[2:])
        return ids, (weights / weights.sum(-1, keepdim=True, dtype=torch.float64)).float()


def _explain(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    *,
    return_probs: bool = False,
) -> Explanation:
    return sample_op.explain(*_arguments(logits, uniforms, temperature, top_k, top_p, min_p))


declare(
    Declaration(
        sample,
        "a token a row, after temperature, top-k and top-p",
        place=1,
        explain=_explain,
        uses=("batch", "vocab", "dtype"),
        arguments=lambda s, make: (make(s.batch, s.vocab), make(s.batch, dtype=torch.float32)),
        parts=(Part(sample_op),),
        gradient=False,
    )
)
