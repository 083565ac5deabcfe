"""FP8 with a scale a block of 128 x 128 (DeepSeek-V3), a row (fbgemm) or a tensor; and NVIDIA's ModelOpt."""

from __future__ import annotations

import torch

from .checkpoint import Loaded, Source
from .float_weights import fp8, nvfp4
from .folder import Described, Folder, Matrix


class FP8Block(Folder):
    """`weight` in e4m3 beside `weight_scale_inv`, which is a multiplier despite its name (fbgemm:
    `weight_scale`)."""

    kind = "fp8"
    markers = (".weight_scale_inv", ".weight_scale")
    parts = (".weight", *markers)
    dropped = (".activation_scale", ".input_scale", ".input_scale_ub")

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.method in ("fp8", "fbgemm_fp8")

    def matrix(self, m: Matrix) -> Described:
        n, k = m.shape(".weight", 2)
        part = next(p for p in self.markers if m.has(p))
        blocks = self.quantization.get("weight_block_size")
        return Described("fp8", (n, k), lambda: fp8(m, part, n, k, blocks))


class ModelOpt(Folder):
    """NVIDIA's TensorRT Model Optimizer: NVFP4 (codes in `weight`, `weight_scale` a group of 16,
    `weight_scale_2` of the tensor) and FP8."""

    kind = "modelopt"
    markers = (".weight_scale",)
    parts = (".weight", ".weight_scale", ".weight_scale_2")
    dropped = (".input_scale", ".k_scale", ".v_scale", ".pre_quant_scale")

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.method.startswith("modelopt")

    def matrix(self, m: Matrix) -> Described:
        n, width = m.shape(".weight", 2)
        if m.has(".pre_quant_scale"):
            raise m.refuse("it has a pre_quant_scale (AWQ), which would scale its input")
        if self.tensors[m.name + ".weight"].dtype != torch.uint8:
            return Described("modelopt fp8", (n, width), lambda: fp8(m, ".weight_scale", n, width, None))
        k = 2 * width

        def read() -> Loaded:
            scale = m.need(".weight_scale_2", torch.float32)
            if scale.numel() != 1:
                raise m.refuse(f"weight_scale_2 has shape {list(scale.shape)}, expected one number")
            return nvfp4(m, ".weight", ".weight_scale", n, k, scale.reshape(1).clone())

        return Described("modelopt nvfp4", (n, k), read)
