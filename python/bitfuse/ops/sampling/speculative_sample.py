"""speculative_sample: which tokens of a draft a target model keeps, and the token after them."""

from __future__ import annotations

import torch

from ...core.backends import Backend
from ...core.declaration import Declaration, Make, Part, Sizes, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...core.tensors import check_tensor
from ...kernels.sampling import speculative_sample as triton
from ..linear.lowbit_linear import FLOATS
from . import speculative_sample_cpu as cpp

# A probability becomes an integer of 42 bits, cut off: integers sum to the same in any order, which is what
# lets every backend pick the same token. What is cut off is below 2^-42 a token, 2^-24 a row of 2^18 tokens:
# as float32 rounds. MAX_VOCABULARY of them sum to 2^62 at most.
ONE = 2**42
MAX_VOCABULARY = 2**20


def _check(
    draft_probs: torch.Tensor, draft_ids: torch.Tensor, target_probs: torch.Tensor, uniforms: torch.Tensor
) -> None:
    if draft_probs.dim() != 3:
        raise ValueError(
            f"draft_probs has shape {list(draft_probs.shape)}, expected [batch, drafted, vocabulary]"
        )
    check_tensor("draft_probs", draft_probs, FLOATS, tuple(draft_probs.shape), draft_probs.device)
    batch, drafted, vocabulary = draft_probs.shape
    device = draft_probs.device
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"draft_probs has a vocabulary of {vocabulary}, expected 1 to {MAX_VOCABULARY}")
    check_tensor("draft_ids", draft_ids, (torch.int32, torch.int64), (batch, drafted), device)
    check_tensor("target_probs", target_probs, FLOATS, (batch, drafted + 1, vocabulary), device)
    check_tensor("uniforms", uniforms, (torch.float32, torch.float64), (batch, drafted + 1), device)


def _fixed(probabilities: torch.Tensor) -> torch.Tensor:
    """float32 as integers of 42 bits; what is not above 0 (NaN too) as 0."""
    seen = torch.where(probabilities > 0, probabilities, 0.0).clamp(max=1.0)
    return (seen * ONE).to(torch.int64)


def _clamped(uniforms: torch.Tensor) -> torch.Tensor:
    """float64 in [0, 1]; NaN as 0."""
    return torch.where(uniforms > 0, uniforms, 0.0).clamp(max=1.0).double()


def _inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token of each row at which the sum of the weights exceeds floor(uniform * total)."""
    prefix = weights.cumsum(-1)
    total = prefix[:, -1]
    at = (_clamped(uniforms) * total.double()).to(torch.int64)
    return (prefix <= torch.minimum(at, total - 1).unsqueeze(1)).sum(-1)


def _reference(
    draft_probs: torch.Tensor, draft_ids: torch.Tensor, target_probs: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, drafted, vocabulary = draft_probs.shape
    rows, ids = torch.arange(batch, dtype=torch.int64, device=draft_ids.device), draft_ids.long()
    drawn = (ids >= 0) & (ids < vocabulary)
    at = ids.clamp(0, vocabulary - 1).unsqueeze(-1)
    p = draft_probs.gather(-1, at).squeeze(-1).double()
    q = target_probs[:, :-1].gather(-1, at).squeeze(-1).double()
    kept = drawn & (_clamped(uniforms[:, :-1]) * p < q)
    accepted = kept.long().cumprod(-1).sum(-1)

    ended = torch.cat([~drawn, drawn.new_ones(batch, 1)], 1)[rows, accepted]
    last = target_probs[rows, accepted].float()
    stood = torch.cat([draft_probs, draft_probs.new_zeros(batch, 1, vocabulary)], 1)[rows, accepted].float()
    weights = _fixed(torch.where(ended.unsqueeze(1), last, last - stood))
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, _fixed(last))
    token = _inverse_cdf(weights, uniforms[:, -1])

    places = torch.arange(drafted + 1, dtype=torch.int64, device=ids.device)
    count = accepted.unsqueeze(1)
    ids = torch.cat([ids, ids.new_full((batch, 1), -1)], 1)
    ids = torch.where(places < count, ids, torch.where(places == count, token.unsqueeze(1), -1))
    return ids, accepted


def _fake(
    draft_probs: torch.Tensor, draft_ids: torch.Tensor, target_probs: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, drafted, _ = draft_probs.shape
    new = draft_probs.new_empty
    return new(batch, drafted + 1, dtype=torch.int64), new(batch, dtype=torch.int64)


speculative_sample_op = Op(
    "speculative_sample(Tensor draft_probs, Tensor draft_ids, Tensor target_probs, Tensor uniforms) "
    "-> (Tensor, Tensor)",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
)


def speculative_sample(
    draft_probs: torch.Tensor, draft_ids: torch.Tensor, target_probs: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chain rejection sampling: the tokens come out as if the target model had sampled each of them
    (Leviathan et al., 2023; Chen et al., 2023).

    Draft token i, drawn from p, is accepted when uniforms[i] * p < q, q being the target's probability; the
    first that is not is replaced by a token of relu(q - p), normalised. When all are accepted one more is
    drawn from the target's last row. That last token is always drawn by the row's last uniform, as the first
    token at which the running sum, in integers of 42 bits of each probability, exceeds uniform * total: every
    backend gives the same tokens, bit for bit.

    Args:
        draft_probs: [batch, drafted, vocabulary], float32, float16 or bfloat16: what each draft token was
            drawn from: after temperature, top-k and the like, which `bitfuse.sample` returns with
            return_probs; the plain softmax makes the tokens something other than the target's. Rows need not
            be normalised exactly.
        draft_ids: int32 or int64 [batch, drafted]. An id outside the vocabulary (-1) ends its draft early:
            the last token is then drawn from the target's row there.
        target_probs: [batch, drafted + 1, vocabulary]: the target's, at each draft token and after the last;
            filtered likewise where the target samples with filters.
        uniforms: float32 or float64 [batch, drafted + 1], in [0, 1), independent of one another. float32 can
            tell 2^24 cases apart. One outside counts as the nearest end, NaN as 0.

    Returns:
        ids: int64 [batch, drafted + 1]: the accepted tokens, the one after them, then -1.
        accepted: int64 [batch]: how many draft tokens were.

    Raises:
        TypeError: a dtype or a type that is not listed.
        ValueError: sizes that do not fit, tensors on two devices, a vocabulary above 2^20.
    """
    if not isinstance(draft_probs, torch.Tensor):
        raise TypeError(f"draft_probs is a {type(draft_probs).__name__}, expected a tensor")
    with torch.no_grad():
        return speculative_sample_op(draft_probs, draft_ids, target_probs, uniforms)


def _explain(
    draft_probs: torch.Tensor, draft_ids: torch.Tensor, target_probs: torch.Tensor, uniforms: torch.Tensor
) -> Explanation:
    return speculative_sample_op.explain(draft_probs, draft_ids, target_probs, uniforms)


def example_drafts(s: Sizes, make: Make) -> tuple[torch.Tensor, ...]:
    """Probabilities and ids of a draft; the target's, and uniforms."""
    ids = make(s.batch, s.drafted, dtype=torch.int64)
    target = make(s.batch, s.drafted + 1, s.vocab)
    return make(s.batch, s.drafted, s.vocab), ids, target, make(s.batch, s.drafted + 1, dtype=torch.float32)


declare(
    Declaration(
        speculative_sample,
        "which tokens of a draft a target model keeps",
        place=2,
        explain=_explain,
        uses=("batch", "drafted", "vocab", "dtype"),
        arguments=example_drafts,
        parts=(Part(speculative_sample_op),),
        gradient=False,
    )
)
