"""What a user would otherwise pick, built as its documentation says; each import is guarded by who calls."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bitfuse.weights.quantize import quantize

from .cases import Unavailable
from .results import ROOT
from .timing import DTYPES


@contextlib.contextmanager
def outside_the_repository() -> Iterator[None]:
    """bitsandbytes asks for a package `kernels`, which is not the folder of that name in our source tree."""
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if Path(entry or ".").resolve() != ROOT]
    try:
        yield
    finally:
        sys.path[:] = before


def bitsandbytes_linear(weight: torch.Tensor, dtype: str, device: str) -> Any:
    """Linear4bit in NF4 over a float32 weight; its blocks of 64 are ours, bit for bit."""
    with outside_the_repository():
        import bitsandbytes as bnb

        n, k = weight.shape
        layer = bnb.nn.Linear4bit(
            k, n, bias=False, compute_dtype=DTYPES[dtype], quant_type="nf4", compress_statistics=False
        )
        layer.load_state_dict({"weight": weight.cpu()})
        layer = layer.to(device).eval()  # it packs the weight for its CPU kernel in eval mode only
        layer(torch.zeros(1, k, dtype=DTYPES[dtype], device=device))
        return layer


def bitsandbytes_adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    with outside_the_repository():
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(parameters, lr=1e-3)


def onnxruntime_linear(
    weight: torch.Tensor, accuracy_level: int
) -> tuple[Callable[[torch.Tensor], Any], torch.Tensor, int]:
    """MatMulNBits over int4 in blocks of 128; accuracy level 4 rounds x to int8. The call, the weight that
    its codes stand for, and the bytes of it."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    n, k = weight.shape
    if k % 128:
        raise Unavailable(f"K is {k}, not a multiple of 128")
    w = quantize(weight.cpu(), "int4", group_size=128, scale_dtype=torch.float32)
    tensors = [
        numpy_helper.from_array(w.qweight.view(n, k // 128, 64).numpy(), "B"),
        numpy_helper.from_array(w.scales.numpy(), "S"),
    ]
    node = helper.make_node(
        "MatMulNBits", ["x", "B", "S"], ["y"], domain="com.microsoft",
        K=k, N=n, bits=4, block_size=128, accuracy_level=accuracy_level,
    )  # fmt: skip
    x_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])
    y_info = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "g", [x_info], [y_info], tensors), opset_imports=opsets, ir_version=9
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # a pool for each layer of the chain would spin against the others
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()}), w.dequantize(), w.nbytes


def peft_linear(
    weight: torch.Tensor,
    a: torch.nn.Parameter,
    b: torch.nn.Parameter,
    scaling: float,
    dtype: str,
    device: str,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """PEFT's LoRA layer over bitsandbytes' NF4."""
    with outside_the_repository():
        import bitsandbytes as bnb
        from peft import LoraConfig, get_peft_model

        n, k = weight.shape
        base = bnb.nn.Linear4bit(
            k, n, bias=False, compute_dtype=DTYPES[dtype], quant_type="nf4", compress_statistics=False
        )
        base.load_state_dict({"weight": weight.cpu()})
        rank = a.shape[0]
        config = LoraConfig(r=rank, lora_alpha=int(scaling * rank), target_modules=["0"])
        model: Any = get_peft_model(torch.nn.Sequential(base.to(device)), config)
        # bitsandbytes packs the weight for its CPU kernel in eval mode only
        model.train(torch.is_grad_enabled())
        layer = model.base_model.model[0]
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
        layer(torch.zeros(1, k, dtype=DTYPES[dtype], device=device))
    return lambda x: layer(x)


def flashinfer_decode(
    k: torch.Tensor, v: torch.Tensor, heads: int, page_size: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """FlashInfer's batch decode over pages in order, planned once as its documentation asks; takes [batch,
    heads, head_dim]."""
    import flashinfer

    batch, length, kv_heads, dim = k.shape
    if length % page_size:
        raise Unavailable(f"{length} keys, not a multiple of the {page_size} of a page")
    pages = length // page_size
    cache = torch.stack([t.view(batch * pages, page_size, kv_heads, dim) for t in (k, v)], 1)
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=k.device) * pages
    indices = torch.arange(batch * pages, dtype=torch.int32, device=k.device)
    last = torch.full((batch,), page_size, dtype=torch.int32, device=k.device)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=k.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=heads > kv_heads
    )
    wrapper.plan(
        indptr, indices, last, heads, kv_heads, dim, page_size, q_data_type=k.dtype, kv_data_type=k.dtype
    )
    return lambda q: wrapper.run(q, cache)
