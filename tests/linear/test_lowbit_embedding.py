"""lowbit_embedding: every backend, format and dtype; the layer, and a head that reads the same codes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from backends import Target, targets
from bitfuse.ops.linear.lowbit_embedding import lowbit_embedding_op
from torch.nn import functional as F

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TARGETS = targets("cpp", "triton", "reference")
OPTIONS: dict[str, dict[str, Any]] = {
    "int4": dict(format="int4", group_size=24),
    "int4-zeros": dict(format="int4", symmetric=False, scale_dtype=torch.bfloat16),
    "int4-row": dict(format="int4", group_size=-1, scale_dtype=torch.float16),
    "int8": dict(format="int8", group_size=8),
    "int8-zeros": dict(format="int8", symmetric=False),
    "nf4": dict(format="nf4"),
    "nf4-nested": dict(format="nf4", nested=True),
    "fp8": dict(format="fp8"),
    "mxfp4": dict(format="mxfp4"),
    "nvfp4": dict(format="nvfp4"),
    "int2": dict(format="int2", group_size=32),
    "int3": dict(format="int3", group_size=32),
    "offset": dict(format="int4", offset=True, group_size=32),
    "scale_rows": dict(format="fp8", group_size=32, scale_rows=16),
}
INDICES = torch.tensor([[3, 0, 40], [40, 17, 3]])


def drawn(name: str, k: int = 192) -> bitfuse.LowBitWeight:
    options = OPTIONS[name]
    k = 72 if options.get("group_size") == 24 else k
    return bitfuse.quantize(torch.randn(41, k), **options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_rows_are_those_of_the_matrix(target: Target, name: str) -> None:
    """Bit for bit, but for nested scales."""
    w = target.place_weight(drawn(name))
    (indices,) = target.place(INDICES)
    if (reason := target.reason(lowbit_embedding_op, indices, w.op_args, torch.float32)) is not None:
        assert name in ("int2", "int3", "offset", "scale_rows"), reason
        pytest.skip(reason)
    # the simulator takes seconds for each kernel
    for dtype in [torch.bfloat16 if "int" in name else torch.float32] if target.sm else DTYPES:
        wanted = w.cpu().dequantize(dtype)
        got = target.run(lowbit_embedding_op, indices, w.op_args, dtype).cpu()
        wanted = F.embedding(INDICES, wanted)
        if name == "nf4-nested":  # a scale of a scale and its offset: a compiler may round them once
            torch.testing.assert_close(got, wanted, rtol=torch.finfo(dtype).eps, atol=0)
        else:
            assert torch.equal(got, wanted), dtype
    if target.sm and name != "int4":
        return
    few = indices[:, ::2].int()
    got = target.run(lowbit_embedding_op, few, w.op_args, torch.float32).cpu()
    torch.testing.assert_close(got, w.cpu().dequantize()[INDICES[:, ::2]], rtol=2e-7, atol=0)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_sizes(target: Target) -> None:
    for rows, k, shape in ((5, 8, (3,)), (7, 1160, (2, 1, 9)), (1, 40, ()), (5, 24, (0, 2))):
        w = target.place_weight(bitfuse.quantize(torch.randn(rows, k), "int8", group_size=8))
        (indices,) = target.place(torch.randint(rows, shape))
        got = target.run(lowbit_embedding_op, indices, w.op_args, torch.bfloat16)
        assert torch.equal(got.cpu(), w.cpu().dequantize(torch.bfloat16)[indices.cpu()])


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_rows_that_there_are_not(target: Target) -> None:
    w = target.place_weight(drawn("int4"))
    for bad in (41, -1, 2**40):
        (indices,) = target.place(torch.tensor([1, bad, 2]))
        if target.backend == "triton":
            got = target.run(lowbit_embedding_op, indices, w.op_args, torch.float32).cpu()
            assert got[1].isnan().all() and not got[[0, 2]].isnan().any()
        else:
            with pytest.raises(IndexError, match=f"indices holds {bad}, expected 0 to 40"):
                target.run(lowbit_embedding_op, indices, w.op_args, torch.float32)


def test_columns_in_another_order() -> None:
    g_idx = torch.arange(64)[torch.randperm(64)] // 16
    w = bitfuse.quantize(torch.randn(9, 64), "int4", group_size=16, g_idx=g_idx)
    at = torch.tensor([8, 0])
    assert torch.equal(bitfuse.lowbit_embedding(at, w), w.dequantize()[at])


def test_opcheck_compile_and_vmap() -> None:
    w = drawn("int4-zeros")
    flat = (INDICES, *w.op_args[:5], torch.bfloat16, *w.op_args[5:])
    torch.library.opcheck(torch.ops.bitfuse.lowbit_embedding.default, flat)
    layer = bitfuse.nn.Embedding.from_weight(w)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(INDICES), layer(INDICES))
    mapped = torch.vmap(lambda i: bitfuse.lowbit_embedding(i, w))(INDICES)
    assert torch.equal(mapped, layer(INDICES))


def test_bits_do_not_depend_on_threads() -> None:
    w, indices = bitfuse.quantize(torch.randn(300, 2048), "nf4"), torch.randint(300, (700,))
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(bitfuse.lowbit_embedding(indices, w))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(indices=[1]), TypeError, "indices is a list, expected a tensor"),
        (dict(indices=torch.randn(3)), TypeError, r"indices has dtype torch\.float32, expected torch\.int64"),
        (dict(w=torch.randn(4, 8)), TypeError, "w is a Tensor, expected a LowBitWeight"),
        (
            dict(w=bitfuse.quantize(torch.randn(2, 4, 8), group_size=8)),
            ValueError,
            r"w has shape \[2, 4, 8\]",
        ),
        (dict(dtype=torch.float64), TypeError, r"dtype is torch\.float64, expected torch\.float32"),
    ],
)
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        given: dict[str, Any] = dict(indices=INDICES, w=drawn("int4")) | changes
        bitfuse.lowbit_embedding(**given)


# the layer


class Tied(torch.nn.Module):
    def __init__(self, embedding: bitfuse.nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.head = bitfuse.nn.Linear.tied_to(embedding)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embedding(indices))
        return out


def test_layer() -> None:
    dense = torch.nn.Embedding(41, 64, padding_idx=-1)
    layer = bitfuse.nn.Embedding.from_float(dense, "int8")
    assert isinstance(layer, torch.nn.Embedding) and layer.padding_idx == 40
    assert not layer(torch.tensor([40])).any() and not list(p for p in layer.parameters() if p.requires_grad)
    assert torch.equal(layer(INDICES), layer.weight.dequantize()[INDICES])
    assert layer.bfloat16()(INDICES).dtype == torch.bfloat16 and layer.scales.dtype == torch.float32
    assert repr(layer).startswith("Embedding(41, 64, padding_idx=40, format=int8")
    assert layer.explain(INDICES).op == "lowbit_embedding"
    empty = bitfuse.nn.Embedding(41, 64, 3, format="int8", dtype=torch.bfloat16)
    assert not empty(INDICES).any() and empty(INDICES).dtype == torch.bfloat16
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(INDICES), layer(INDICES))
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(INDICES), layer(INDICES))
    for bad, error, words in (
        (dense.weight, TypeError, "embedding is a Parameter"),
        (layer, TypeError, "of few bits already"),
        (torch.nn.Embedding(8, 8, max_norm=1.0), ValueError, "max_norm is 1.0"),
    ):
        with pytest.raises(error, match=words):
            bitfuse.nn.Embedding.from_float(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="padding_idx is 41, expected -41 to 40"):
        bitfuse.nn.Embedding(41, 64, 41)


def test_a_head_of_the_same_codes(tmp_path: Path) -> None:
    model = Tied(bitfuse.nn.Embedding.from_weight(drawn("nf4-nested")))
    w = model.embedding.weight
    state = model.state_dict()
    assert set(state) == {
        f"embedding.{n}" for n in ("qweight", "scales", "scale_scales", "scale_offset", "_extra_state")
    }
    assert len(list(model.parameters())) == 4
    torch.testing.assert_close(model(INDICES), F.linear(w.dequantize()[INDICES], w.dequantize()))
    other = Tied(bitfuse.nn.Embedding(41, 192, format=w.format))
    for assign in (False, True):
        other.load_state_dict({name: t.clone() for name, t in state.items()}, assign=assign)
        assert other.head.qweight is other.embedding.qweight
        assert torch.equal(other(INDICES), model(INDICES))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
    for each in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        other.to("meta").to_empty(device="cpu"),
    ):
        assert each.head.qweight is each.embedding.qweight is not model.embedding.qweight
    with pytest.raises(TypeError, match=r"other is a Linear, expected a bitfuse\.nn\.Embedding or Linear"):
        bitfuse.nn.Linear.tied_to(torch.nn.Linear(8, 8))  # type: ignore[arg-type]


def test_quantize_takes_embeddings_when_asked() -> None:
    def model() -> Any:
        embedding, head = torch.nn.Embedding(64, 32), torch.nn.Linear(32, 64, bias=False)
        head.weight = embedding.weight
        made = torch.nn.ModuleDict({"embedding": embedding, "body": torch.nn.Linear(32, 32), "head": head})
        return made

    kept = model()
    report = bitfuse.quantize_(kept, "int8", progress=False)
    assert report.skipped == {"head": "its weight is tied to embedding.weight"}
    assert type(kept["embedding"]) is torch.nn.Embedding
    taken = model()
    dense = taken["embedding"].weight.detach().clone()
    report = bitfuse.quantize_(taken, "int8", embeddings=True, progress=False)
    assert [r.name for r in report.layers] == ["embedding", "body"] and not report.skipped
    assert isinstance(taken["embedding"], bitfuse.nn.Embedding) and isinstance(
        taken["head"], bitfuse.nn.Linear
    )
    assert taken["head"].qweight is taken["embedding"].qweight
    assert not any(name.startswith("head.") for name in taken.state_dict())
    w = bitfuse.quantize(dense, "int8", group_size=32)
    assert torch.equal(taken["embedding"](INDICES), w.dequantize()[INDICES])
    skipped = model()
    report = bitfuse.quantize_(skipped, "int8", embeddings=True, skip="embedding", progress=False)
    assert report.skipped["embedding"] == "skip='embedding'" and "tied to embedding" in report.skipped["head"]
    assert skipped["head"].weight is skipped["embedding"].weight


def test_transformers_keeps_the_tie() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    bitfuse.quantize_(model, "int8", embeddings=True, progress=False)
    before = model(INDICES).logits
    model.tie_weights()
    assert model.lm_head.qweight is model.model.embed_tokens.qweight
    assert torch.equal(model(INDICES).logits, before)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert not any(name.startswith("lm_head") for name in model.state_dict())
