"""LoRA on a model: adapters, optimizer and the loop."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from bitfuse.models.lora import ALL_LINEAR, add_lora_, lora_parameters
from bitfuse.models.quantization import quantize_
from bitfuse.nn import Linear
from bitfuse.optim import AdamW8bit
from tqdm import tqdm

from ..demo.embedder import DemoError, Embedder
from ..demo.measure import group_size_of, parse_format, unfit
from . import task
from .memory import Memory, measure
from .messages import HELD_OUT, TRAINING, Message

OPTIMIZERS = {"adamw8bit": AdamW8bit, "adamw": torch.optim.AdamW}
BATCH_SIZE = 32
WARM_UP = 0.1  # of the steps


@dataclass(frozen=True)
class Recipe:
    """How to train; what two runs that are compared have in common.

    Attributes:
        steps: batches of 32.
        r, alpha, dropout: of `bitfuse.add_lora_`.
        lr: the highest learning rate: it rises over the first tenth of the steps and falls as a cosine.
        seed: of the adapters, the order of the messages and the dropout.
    """

    steps: int
    r: int
    alpha: float
    lr: float
    dropout: float
    seed: int


@dataclass
class Run:
    """One fine-tuning and what came of it.

    Attributes:
        name: of the variant.
        format: of the linear layers, None for float32.
        optimizer: a key of OPTIMIZERS.
        model: with the trained adapters.
        trainable: parameters that were trained.
        losses: of each step's batch.
        before, after: scores on the held-out messages.
        final: score on the training messages, at the end and without dropout.
        memory: of a step.
        seconds: of the steps alone.
    """

    name: str
    format: str | None
    optimizer: str
    model: torch.nn.Module
    trainable: int
    losses: list[float]
    before: task.Score
    after: task.Score
    final: task.Score
    memory: Memory
    seconds: float


def few_bit(base: torch.nn.Module, format: str) -> tuple[torch.nn.Module, str]:
    """A copy with its linear layers in few bits, and what the format is in full.

    Float32 scales of groups are quantised too: QLoRA's double quantisation (Dettmers et al., 2023).
    """
    fmt = parse_format(format)
    if fmt.scale_dtype is torch.float32 and fmt.group_size != -1:
        fmt = replace(fmt, nested=True)
    model = copy.deepcopy(base)
    group_size = group_size_of(format, fmt)
    skip, reason = unfit(base, fmt, group_size)
    try:
        quantize_(model, fmt, skip=skip, progress=False, group_size=group_size)
    except (TypeError, ValueError) as error:
        raise DemoError(f"--format {format}: {str(error).splitlines()[0]}") from error
    if not any(isinstance(module, Linear) for module in model.modules()):
        raise DemoError(f"--format {format}: none of the linear layers can be quantised: {reason}")
    return model, str(fmt)


def train(
    name: str, format: str | None, model: torch.nn.Module, embedder: Embedder, optimizer: str, recipe: Recipe
) -> Run:
    """Put adapters into the model and train them. The same recipe gives the same run, bit for bit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return _train(name, format, model, embedder, optimizer, recipe)


def _train(
    name: str, format: str | None, model: torch.nn.Module, embedder: Embedder, optimizer: str, recipe: Recipe
) -> Run:
    before = task.score(model, embedder, HELD_OUT, BATCH_SIZE)
    # the embeddings are pooled from the last layer: a pooler of the model's own gets no gradient
    skip = ["pooler"] if any("pooler" in module.split(".") for module, _ in model.named_modules()) else []
    report = add_lora_(model, ALL_LINEAR, recipe.r, recipe.alpha, recipe.dropout, skip=skip)
    adapters = lora_parameters(model)
    made = OPTIMIZERS[optimizer](adapters, lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: _rate(step, recipe.steps))
    losses: list[float] = []
    model.train()
    start = time.perf_counter()
    told = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=recipe.steps, desc=f"{name:<24}", unit="step", mininterval=told) as bar:
        for batch in task.batches(TRAINING, BATCH_SIZE, recipe.steps, recipe.seed):
            loss = task.loss(model, embedder, batch)
            made.zero_grad()
            loss.backward()
            made.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise DemoError(f"the loss is {losses[-1]} after {len(losses)} steps: try a lower --lr")
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    seconds = time.perf_counter() - start
    longest = _longest(TRAINING)
    memory = measure(model, adapters, made, lambda: task.loss(model, embedder, longest))
    model.eval()
    return Run(
        name=name,
        format=format,
        optimizer=optimizer,
        model=model,
        trainable=report.trainable,
        losses=losses,
        before=before,
        after=task.score(model, embedder, HELD_OUT, BATCH_SIZE),
        final=task.score(model, embedder, TRAINING, BATCH_SIZE),
        memory=memory,
        seconds=seconds,
    )


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _longest(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The batch that takes most memory."""
    return tuple(sorted(messages, key=lambda message: len(message.text))[-BATCH_SIZE:])
