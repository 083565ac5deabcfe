"""AWQ (Lin et al., 2024) as AutoAWQ and llm-awq save it: three orders of the same 4-bit codes."""

from __future__ import annotations

import torch

from ..weights.formats import SCALE_DTYPES, get_format
from ..weights.packing import pack, unpack
from ..weights.weight import CHUNK, LowBitWeight
from .checkpoint import Loaded, Source
from .folder import Described, Folder, Matrix, as_bytes, codes_of, groups_of, regrouped, sized

# code j of eight columns is in this nibble of their word
_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)


class AWQ(Folder):
    """Versions "gemm" (words along out_features, in an order of their own), "gemv" (words along in_features)
    and "gemv_fast" (llm-awq's int16, four rows interleaved, float offsets)."""

    kind = "awq"
    markers = (".qweight",)
    parts = (".qweight", ".qzeros", ".scales")

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.method == "awq"

    def matrix(self, m: Matrix) -> Described:
        if self.quantization.get("w_bit", self.quantization.get("bits", 4)) != 4:
            raise m.refuse(f"bits is {self.quantization.get('bits')}, expected 4")
        rows, columns = m.shape(".qweight", 2)
        version = str(self.quantization.get("version", "gemm")).lower()
        scales = m.shape(".scales", 2)
        if self.tensors[m.name + ".qweight"].dtype == torch.int16:
            version = "gemv_fast"
        if version not in ("gemm", "gemv", "gemv_fast"):
            raise m.refuse(f"version is {version!r}, expected 'gemm', 'gemv' or 'gemv_fast'")
        n, k = {"gemm": (columns * 8, rows), "gemv": (rows, columns * 8), "gemv_fast": (rows * 4, columns)}[
            version
        ]
        said = self.quantization.get("q_group_size", self.quantization.get("group_size", 128))
        said = said if type(said) is int else 128
        count = scales[0] if version == "gemm" else -(-k // (said if said > 0 else k))
        group = groups_of(k, count, said)
        read = {"gemm": self._gemm, "gemv": self._gemv, "gemv_fast": self._fast}[version]
        return Described(f"awq {version} g{group}", (n, k), lambda: read(m, n, k, group, count))

    def _gemm(self, m: Matrix, n: int, k: int, group: int, count: int) -> Loaded:
        scales = m.need(".scales", *SCALE_DTYPES, shape=(count, n)).t().contiguous()
        zeros = _columns(m.need(".qzeros", torch.int32, shape=(count, n // 8))).t().contiguous()
        words, qweight = (
            m.need(".qweight", torch.int32),
            torch.empty(n, k // 2, dtype=torch.uint8, device="cpu"),
        )
        step = max(1, CHUNK // (8 * k))
        for at in range(0, n // 8, step):
            codes = _columns(words[:, at : at + step])
            qweight[8 * at : 8 * (at + step)] = pack(codes.t().contiguous(), 4)
        return self._made(qweight, scales, zeros, n, k, group)

    def _gemv(self, m: Matrix, n: int, k: int, group: int, count: int) -> Loaded:
        qweight = as_bytes(m.need(".qweight", torch.int32), k, 4)
        zeros = codes_of(m.need(".qzeros", torch.int32), 4)
        scales = m.need(".scales", *SCALE_DTYPES)
        for name, t in (("qzeros", zeros), ("scales", scales)):
            if t.shape[0] != n or t.shape[1] < count:
                raise m.refuse(f"{name} holds {list(t.shape)} numbers, expected {[n, count]} or more a row")
        return self._made(qweight, scales[:, :count].contiguous(), zeros[:, :count].contiguous(), n, k, group)

    def _fast(self, m: Matrix, n: int, k: int, group: int, count: int) -> Loaded:
        if k % 64:
            raise m.refuse(f"qweight has {k} columns, expected a multiple of 64")
        stored = m.need(".qweight", torch.int16)
        parts = []
        for rows in stored.split(max(1, CHUNK // (4 * k))):
            codes = unpack(rows.contiguous().view(torch.uint8), 4).view(-1, k // 64, 64, 4)
            codes = codes.permute(0, 3, 1, 2).reshape(-1, k // 8, 2, 4).transpose(2, 3)
            codes = codes.reshape(-1, k // 32, 4, 4, 2).transpose(2, 3).reshape(-1, k)
            parts.append(pack(codes, 4))
        numbers = []
        for name in (".scales", ".qzeros"):
            t = m.need(name, *SCALE_DTYPES)
            if t.dim() != 2 or t.shape[0] < count or t.shape[1] != n:
                raise m.refuse(f"{name[1:]} has shape {list(t.shape)}, expected [{count} or more, {n}]")
            numbers.append(t[:count].t().contiguous())
        scales, offsets = numbers[0], -numbers[1]
        group, (scales, offsets) = regrouped(k, group, scales, offsets)
        format = sized(get_format("int4", offset=True, scale_dtype=scales.dtype), k, group)
        return Loaded(
            LowBitWeight(torch.cat(parts), scales, format, (n, k), offsets=offsets, dtype=scales.dtype)
        )

    def _made(
        self, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, n: int, k: int, group: int
    ) -> Loaded:
        group, (scales, zeros) = regrouped(k, group, scales, zeros)
        format = sized(get_format("int4", symmetric=False, scale_dtype=scales.dtype), k, group)
        return Loaded(LowBitWeight(qweight, scales, format, (n, k), zeros=zeros, dtype=scales.dtype))


def _columns(words: torch.Tensor) -> torch.Tensor:
    """The codes uint8 [rows, 8 * words] of words in gemm's order."""
    codes = codes_of(words, 4).view(words.shape[0], -1, 8)
    return codes[..., list(_NIBBLE)].reshape(words.shape[0], -1)
