"""from_pretrained: a model in few bits, from the file that somebody else wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..core.text import progress_bar
from ..models.quantization import _refuse_save_pretrained
from ..nn import Embedding, Linear
from ..weights.formats import SCALE_DTYPES
from ..weights.weight import LowBitWeight
from .awq import AWQ
from .bitsandbytes import BitsAndBytes
from .checkpoint import Checkpoint, Entry, Source
from .compressed_tensors import CompressedTensors
from .experts import PackedExperts, is_dense_experts
from .fp8_block import FP8Block, ModelOpt
from .gguf import GGUF
from .gptq import GPTQ
from .hqq import HQQ
from .mxfp4 import MXFP4
from .report import LoadReport

FORMATS: tuple[type[Checkpoint], ...] = (
    GGUF, GPTQ, AWQ, CompressedTensors, BitsAndBytes, HQQ, MXFP4, FP8Block, ModelOpt,
)  # fmt: skip
_MOST_BUFFERS = 1 << 30  # what a config may make us allocate


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A checkpoint whose matrices can be read one by one, as `LowBitWeight`: see `Checkpoint.layers`.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: no format that is known; a file that is truncated or contradicts itself.
    """
    source = Source(path)
    for kind in FORMATS:
        if kind.recognises(source):
            return kind(source)
    known = ", ".join(kind.kind for kind in FORMATS)
    method = f"quant_method {source.method!r}" if source.method else "no quantization_config"
    raise ValueError(f"{source.path} has {method}, expected a checkpoint of {known}")


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Any:
    """A transformers model from a checkpoint that is in few bits already, read as it is: its linear layers
    are `bitfuse.nn.Linear` and its embeddings `bitfuse.nn.Embedding` of the file's own codes, and no matrix
    is dense on the way.

    What was read how, and whether anything was lost, is in the model's `load_report` (a `LoadReport`; `print`
    it). A tokenizer: `transformers.AutoTokenizer.from_pretrained(folder)`, for a GGUF file with
    ``gguf_file=name``, which asks for the package gguf.

    Args:
        path: a `.gguf` file, or a folder with config.json and safetensors.
        dtype: of what is not in few bits (norms, biases), and of the activations; by default what
            the config says, for GGUF float32.
        device: where the model goes, a layer at a time.
        progress: shows a bar, where tqdm is installed.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ImportError: transformers is not installed.
        TypeError: a dtype that is none of float32, float16 and bfloat16.
        ValueError: no format that is known; a file that is truncated or contradicts itself or its config:
            file, tensor and what was expected are named.
    """
    if dtype is not None and dtype not in SCALE_DTYPES:
        raise TypeError(f"dtype is {dtype!r}, expected {' or '.join(map(str, SCALE_DTYPES))}")
    checkpoint = open_checkpoint(path)
    entries = list(checkpoint.entries())
    model, dtype = _skeleton(checkpoint, dtype)
    device = torch.device(device)
    _compute_buffers_(model, device, checkpoint.path)
    report = LoadReport(str(checkpoint.path), checkpoint.kind)
    bar = progress_bar(f"read {checkpoint.path.name}", len(entries), "tensor", progress)
    try:
        for entry in entries:
            _place_(model, entry, dtype, device, checkpoint, report)
            bar.update()
    finally:
        bar.close()
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    missing += [name for name, b in model.named_buffers() if b.is_meta]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{checkpoint.path} lacks {', '.join(missing[:5])}{more}, which a {type(model).__name__} has"
        )
    checkpoint.finish_(model)
    _generation_(model, checkpoint.source)
    if any(entry.few_bit for entry in entries):
        _refuse_save_pretrained(model)
    model.load_report = report
    return model.eval()


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None) -> tuple[Any, torch.dtype]:
    """The model without memory, and the dtype of its numbers."""
    import transformers

    try:
        config = checkpoint.config()
        if dtype is None:
            said = getattr(config, "dtype", None)
            dtype = said if said in SCALE_DTYPES else torch.float32
        make: Any = transformers.AutoModelForCausalLM.from_config
        for name in getattr(config, "architectures", None) or ():
            kind = getattr(transformers, str(name), None)
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
                known: Any = kind
                make = known._from_config
                break
        with torch.device("meta"):
            return make(config, dtype=dtype), dtype
    except (ImportError, MemoryError):
        raise
    except Exception as why:  # transformers has errors of its own for what a config says
        raise ValueError(f"{checkpoint.path}: no model can be made of its config: {why}") from why


def _compute_buffers_(model: Any, device: torch.device, path: Path) -> None:
    """Buffers that no file holds (frequencies, scales of embeddings), which the model's own rule computes."""
    size = sum(b.nbytes for b in model.buffers() if b.is_meta)
    if size > _MOST_BUFFERS:
        raise ValueError(
            f"{path}: its config asks for tables of {size} bytes, expected at most {_MOST_BUFFERS}"
        )
    for module in model.modules():
        computed = [
            name
            for name, b in module._buffers.items()
            if b is not None and b.is_meta and name in module._non_persistent_buffers_set
        ]
        for name in computed:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if computed:
            model._init_weights(module)  # its weights are on meta: nothing is drawn


def _place_(
    model: torch.nn.Module,
    entry: Entry,
    dtype: torch.dtype,
    device: torch.device,
    checkpoint: Checkpoint,
    report: LoadReport,
) -> None:
    """Put a weight where it belongs, in place."""
    where = f"{checkpoint.path}: {entry.name}"
    if entry.few_bit and (experts := _experts_(model, entry.name)) is not None:
        loaded = entry.read()
        assert isinstance(loaded.weight, LowBitWeight)
        few_bit = _read_as(loaded.weight, dtype).to(device)
        try:
            experts.fill(entry.name.rpartition(".")[2], few_bit)
        except ValueError as why:
            raise ValueError(f"{where}: {why}") from None
        report.add(entry, loaded, few_bit)
        return
    module_name, _, key = (f"{entry.name}.weight" if entry.few_bit else entry.name).rpartition(".")
    try:
        module: Any = model.get_submodule(module_name)
    except AttributeError:
        module = torch.nn.Module()
    held: Any = module._parameters.get(key)
    if held is None:
        held = module._buffers.get(key)
    if held is None:
        raise ValueError(f"{where} ({entry.stored}) has no place in a {type(model).__name__}")
    if entry.tied_to and isinstance(first := model.get_submodule(entry.tied_to), Embedding):
        _replace_(model, module_name, Linear.tied_to(first, module.bias))
        report.tied[entry.name] = entry.tied_to
        return
    loaded = entry.read()
    w = loaded.weight
    if tuple(held.shape) != tuple(w.shape):
        raise ValueError(
            f"{where} has shape {list(w.shape)}, and a {type(model).__name__} {list(held.shape)}"
        )
    if isinstance(w, LowBitWeight) and type(module) in (torch.nn.Linear, torch.nn.Embedding):
        few_bit = _read_as(w, dtype).to(device)
        if isinstance(module, torch.nn.Embedding):
            _replace_(model, module_name, Embedding.from_weight(few_bit, module.padding_idx))
        else:
            _replace_(model, module_name, Linear.from_weight(few_bit, module.bias))
        report.add(entry, loaded, few_bit)
        return
    if isinstance(w, LowBitWeight):
        numbers = w.dequantize(dtype).to(device)
    elif w.is_floating_point():
        numbers = w.to(device, dtype if held.is_floating_point() else held.dtype, copy=True)
    else:
        numbers = w.to(device, held.dtype, copy=True)
    if key in module._buffers:
        module._buffers[key] = numbers
    else:
        module._parameters[key] = torch.nn.Parameter(numbers, requires_grad=numbers.is_floating_point())
    report.add(entry, loaded, numbers)


def _experts_(model: Any, name: str) -> PackedExperts | None:
    """The few-bit experts that have a parameter of this name, made of dense ones where they are not yet."""
    module_name, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        return None
    if is_dense_experts(module):
        module = PackedExperts(module)
        _replace_(model, module_name, module)
    return module if isinstance(module, PackedExperts) and key in module._parameters else None


def _replace_(model: Any, name: str, made: torch.nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    there = model.get_submodule(parent)
    there._modules[own] = made.train(there.training)


def _read_as(w: LowBitWeight, dtype: torch.dtype) -> LowBitWeight:
    object.__setattr__(w, "dtype", dtype)  # just made, and nobody else's
    return w


def _generation_(model: Any, source: Source) -> None:
    """How the model likes to generate, where a file says so."""
    from transformers import GenerationConfig

    if (source.folder / "generation_config.json").is_file() and source.path.suffix != ".gguf":
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
