"""adamw8bit: one step of AdamW on one tensor, its two moments in 8 bits."""

from __future__ import annotations

import torch

from ...core.backends import Backend
from ...core.cost import Cost, Prediction, Rates, moved
from ...core.declaration import Declaration, Make, Part, Sizes, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...core.tensors import check_tensor
from ...kernels.optim import adamw8bit as triton
from ...weights.blockwise import blocks_of, dequantize_blocks, quantize_blocks
from . import adamw8bit_cpu as cpp

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


def _check(
    p: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_absmax: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_absmax: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: float,
    maximize: bool,
    block_size: int,
) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size}, expected one of {', '.join(map(str, BLOCK_SIZES))}")
    if step < 1:
        raise ValueError(f"step is {step}, expected 1 or more")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} is {beta}, expected 0 <= {name} < 1")
    shape, device, blocks = p.shape, p.device, blocks_of(p.numel(), block_size)
    if (
        p.dtype in FLOATS
        and grad.dtype in FLOATS
        and exp_avg.dtype is exp_avg_sq.dtype is torch.uint8
        and exp_avg_absmax.dtype is exp_avg_sq_absmax.dtype is torch.float32
        and shape == grad.shape == exp_avg.shape == exp_avg_sq.shape
        and exp_avg_absmax.shape == exp_avg_sq_absmax.shape == (blocks,)
        and device == grad.device == exp_avg.device == exp_avg_sq.device
        and device == exp_avg_absmax.device == exp_avg_sq_absmax.device
        and p.is_contiguous()
        and exp_avg.is_contiguous()
        and exp_avg_sq.is_contiguous()
        and not grad.is_neg()
    ):
        return  # the usual case, at a third of the cost
    check_tensor("p", p, FLOATS, tuple(p.shape), p.device)
    check_tensor("grad", grad, FLOATS, tuple(p.shape), p.device)
    for name, codes, scales in (
        ("exp_avg", exp_avg, exp_avg_absmax),
        ("exp_avg_sq", exp_avg_sq, exp_avg_sq_absmax),
    ):
        # paged: the codes are in host memory that the device reaches
        paged = p.device.type == "cuda" and codes.device.type == "cpu" and codes.is_pinned()
        check_tensor(name, codes, (torch.uint8,), tuple(p.shape), codes.device if paged else p.device)
        check_tensor(f"{name}_absmax", scales, (torch.float32,), (blocks,), p.device)
    for name, t in (("p", p), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not t.is_contiguous():
            raise ValueError(
                f"{name} has strides {t.stride()}, expected a contiguous tensor: it is written to"
            )


def _reference(
    p: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_absmax: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_absmax: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: float,
    maximize: bool,
    block_size: int,
) -> None:
    g = -grad.float() if maximize else grad.float()
    m = dequantize_blocks(exp_avg.to(p.device), exp_avg_absmax, True, block_size)
    v = dequantize_blocks(exp_avg_sq.to(p.device), exp_avg_sq_absmax, False, block_size)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    p.copy_((1 - lr * weight_decay) * p.float() - lr / (1 - beta1**step) * m / denominator)
    for state, absmax, moment, signed in (
        (exp_avg, exp_avg_absmax, m, True),
        (exp_avg_sq, exp_avg_sq_absmax, v, False),
    ):
        codes, scales = quantize_blocks(moment, signed, block_size)
        state.copy_(codes)
        absmax.copy_(scales)


def _fake(p: torch.Tensor, *rest: object) -> None:
    return None


def _predicted(cost: Cost, rates: Rates, *args: object) -> Prediction:
    """The time to expect in Triton: half of the bytes are written, in blocks that wait for their largest."""
    return Prediction(rates.call_s, 1.2 * cost.memory_seconds(rates))


op = Op(
    "adamw8bit(Tensor(a!) p, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_absmax, "
    "Tensor(d!) exp_avg_sq, Tensor(e!) exp_avg_sq_absmax, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, float step, bool maximize, int block_size) -> ()",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("triton", ("cuda",), triton.supports, triton.run, predicted=_predicted),
    ),
    # all but the gradient is read and written; torch's float32 beside the memory's rate costs nothing
    writes=lambda p, grad, *rest: (p, *rest[:4]),
    cost=lambda p, grad, *rest: Cost(moved(grad) + 2 * moved(p, *rest), 0, p.dtype),
)


def adamw8bit(
    p: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_absmax: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_absmax: torch.Tensor,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: float,
    maximize: bool = False,
    block_size: int = 256,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019) in place, the moments in 8 bits (Dettmers et al.,
    "8-bit Optimizers via Block-wise Quantization", 2021).

    Dequantises the moments, updates them and p in float32, writes p in its own dtype and the moments at the
    codes of `bitfuse.weights.blockwise.quantize_blocks`. The parameter is updated with the moments as they
    are before they are rounded. A NaN or Inf of the gradient reaches the whole block at the next step.

    Args:
        p: float32, float16 or bfloat16, any shape, contiguous; written to.
        grad: p's shape, float32, float16 or bfloat16.
        exp_avg, exp_avg_sq: uint8 codes of p's shape (signed and unsigned map), contiguous; written to. With
            p on a GPU they may be in pinned host memory.
        exp_avg_absmax, exp_avg_sq_absmax: float32 [ceil(p.numel() / block_size)]; written to.
        lr, beta1, beta2, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        step: which update this is, from 1.
        block_size: numbers that share a scale, a power of two from 64 to 4096.

    Raises:
        TypeError, ValueError: a dtype, shape, device or number that is not as above.
    """
    op(
        p, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, lr, beta1, beta2, eps, weight_decay,
        step, maximize, block_size,
    )  # fmt: skip


def _explain(
    p: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_absmax: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_absmax: torch.Tensor,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: float,
    maximize: bool = False,
    block_size: int = 256,
) -> Explanation:
    return op.explain(
        p, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, lr, beta1, beta2, eps, weight_decay,
        step, maximize, block_size,
    )  # fmt: skip


def _example(s: Sizes, make: Make) -> tuple[torch.Tensor, ...]:
    blocks = -(-s.n * s.k // 256)
    moments = [(make(s.n, s.k, dtype=torch.uint8), make(blocks, dtype=torch.float32)) for _ in range(2)]
    return make(s.n, s.k), make(s.n, s.k), *moments[0], *moments[1]


declare(
    Declaration(
        adamw8bit,
        "a step of AdamW, its moments in 8 bits",
        place=1,
        explain=_explain,
        uses=("n", "k", "dtype"),
        arguments=_example,
        options=lambda s: {"lr": 1e-3, "step": 1.0},
        parts=(Part(op),),
        public=False,
        called="AdamW8bit",
        gradient=False,
    )
)
