"""quantize_: in place, every Linear, ties and hooks kept, nothing changed by an error, memory bounded."""

from __future__ import annotations

import gc
import weakref

import bitfuse
import pytest
import torch
from bitfuse.nn import Linear


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(128, 256)
        self.down = torch.nn.Linear(256, 128, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 128)
        first, second = Block(), Block()
        self.blocks = torch.nn.ModuleList([first, second])
        self.shared = torch.nn.Linear(128, 256, bias=False)
        self.head = torch.nn.Linear(128, 64, bias=False)
        self.again = first  # the same module under a second name
        self.shared.weight = second.up.weight  # one weight, two layers
        self.head.weight = self.embed.weight  # tied to what is no Linear

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.again(x)) + self.shared(x).mean()


@torch.no_grad()
def test_replaces_every_linear() -> None:
    model, ids = Model(), torch.randint(0, 64, (2, 7))
    expected = model(ids)
    before = bitfuse.quantization.model_bytes(model)
    report = bitfuse.quantize_(model, "int8", progress=False)
    assert [r.name for r in report.layers] == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert report.skipped == {"head": "its weight is tied to embed.weight"}
    assert isinstance(model.shared, Linear)
    assert model.shared.qweight is model.get_parameter("blocks.1.up.qweight")
    assert model.again is model.blocks[0] and isinstance(model.again.up, Linear)
    assert model.head.weight is model.embed.weight
    assert (
        report.bytes_before == before
        and report.bytes_after == bitfuse.quantization.model_bytes(model) < before / 2
    )
    assert 0 < report.worst_relative_error < 0.02
    assert float((model(ids) - expected).norm() / expected.norm()) < 0.01
    assert "blocks.1.down" in str(report) and "tied to embed.weight" in str(report)


def test_hooks_flags_and_biases_are_kept() -> None:
    model = Block().eval()
    model.up.requires_grad_(False)
    seen: list[str] = []
    model.up.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    model.up.register_forward_hook(lambda m, a, o: seen.append("post"))
    model.up.note = "mine"  # type: ignore[assignment]
    bias = model.up.bias
    bitfuse.quantize_(model, "int4", progress=False)
    model(torch.randn(2, 128))
    assert seen == ["pre", "post"] and not model.up.training and model.up.note == "mine"
    assert model.up.bias is bias and not bias.requires_grad


def test_skip() -> None:
    for skip, left in ((["down"], 2), (["blocks.0.*", "shared"], 3), ("blocks.1.up", 1)):
        model = Model()
        report = bitfuse.quantize_(model, "int4", skip=skip, progress=False)
        assert len(report.skipped) == left + 1, report.skipped
    with pytest.warns(UserWarning, match="skip='lm_haed' matches no linear layer"):
        bitfuse.quantize_(Model(), "int4", skip=["lm_haed"], progress=False)


def test_an_error_changes_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 24), torch.nn.Linear(24, 8))
    with pytest.raises(
        ValueError, match=r"1, 2: group_size 128 does not divide in_features 64.*skip=\['1', '2'\]"
    ):
        bitfuse.quantize_(model, "int4", group_size=128, progress=False)
    with torch.no_grad():
        model.get_parameter("2.weight")[3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"2\.weight holds a NaN or Inf"):
        bitfuse.quantize_(model, "int8", progress=False)
    with pytest.raises(ValueError, match="format is 'int9'"):
        bitfuse.quantize_(model, "int9", progress=False)
    with pytest.raises(TypeError, match="from_float"):
        bitfuse.quantize_(model[0], "int8", progress=False)
    assert all(type(m) is torch.nn.Linear for m in model)
    with torch.device("meta"), pytest.raises(ValueError, match=r"up\.weight is on the meta device"):
        bitfuse.quantize_(Block(), "int8", progress=False)


def test_a_subclass_is_left_alone() -> None:
    attention = torch.nn.MultiheadAttention(64, 2)
    report = bitfuse.quantize_(torch.nn.ModuleList([attention]), "int8", progress=False)
    assert not report.layers and "NonDynamicallyQuantizableLinear" in report.skipped["0.out_proj"]


def test_each_weight_is_freed_before_the_next_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
    alive = [weakref.ref(m.weight) for m in model]
    most = []
    original = Linear.from_float.__func__  # type: ignore[attr-defined]

    def counting(cls: type[Linear], linear: torch.nn.Linear, *args: object, **kwargs: object) -> Linear:
        gc.collect()
        done = sum(isinstance(m, Linear) for m in model)
        most.append(sum(r() is not None for r in alive) + done)
        return original(cls, linear, *args, **kwargs)

    monkeypatch.setattr(Linear, "from_float", classmethod(counting))
    bitfuse.quantize_(model, "int8", progress=False)
    assert max(most) <= 6, "a replaced weight was still alive"
