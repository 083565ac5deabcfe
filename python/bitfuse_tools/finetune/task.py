"""The task: a message belongs to the intent whose sentence its embedding is nearest to.

No head is trained, so that all that is learnt is in the adapter, and the model can be asked before training
too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..demo.embedder import Embedder
from .messages import INTENTS, LANGUAGES, Message

TEMPERATURE = 0.05  # of the cosines, which become logits
# of the training loss (Szegedy et al., 2016): it ends at a floor that the messages set, and not at how well
# some hundred of them were learnt by heart
SMOOTHING = 0.1
_NAMES = tuple(INTENTS)


@dataclass(frozen=True)
class Score:
    """How a model does on messages.

    Attributes:
        objective: mean of what training minimises, nats: cross-entropy with smoothed labels.
        loss: mean cross-entropy, nats.
        accuracy: share of messages whose intent is named rightly.
        by_language: the same for each language.
    """

    objective: float
    loss: float
    accuracy: float
    by_language: dict[str, float]


def logits(model: torch.nn.Module, embedder: Embedder, messages: Sequence[Message]) -> torch.Tensor:
    """[messages, intents]: cosines over the temperature."""
    texts = [message.text for message in messages]
    vectors = embedder.vectors(model, embedder.tokens(texts))
    anchors = embedder.vectors(model, embedder.tokens(list(INTENTS.values())))
    return vectors @ anchors.T / TEMPERATURE


def labels(messages: Sequence[Message]) -> torch.Tensor:
    return torch.tensor(
        [_NAMES.index(message.intent) for message in messages], dtype=torch.int64, device="cpu"
    )


def loss(model: torch.nn.Module, embedder: Embedder, messages: Sequence[Message]) -> torch.Tensor:
    """What training minimises, of a batch."""
    return _objective(logits(model, embedder, messages), labels(messages))


def _objective(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)


@torch.no_grad()
def score(model: torch.nn.Module, embedder: Embedder, messages: Sequence[Message], batch_size: int) -> Score:
    """Loss and accuracy over all messages, without dropout."""
    training = model.training
    model.eval()
    try:
        batches = (messages[at : at + batch_size] for at in range(0, len(messages), batch_size))
        every = torch.cat([logits(model, embedder, batch) for batch in batches])
    finally:
        model.train(training)
    wanted = labels(messages)
    right = every.argmax(1) == wanted
    spoken = {
        language: torch.tensor(
            [message.language == language for message in messages], dtype=torch.bool, device="cpu"
        )
        for language in LANGUAGES
    }
    return Score(
        objective=float(_objective(every, wanted)),
        loss=float(torch.nn.functional.cross_entropy(every, wanted)),
        accuracy=float(right.float().mean()),
        by_language={language: float(right[mask].float().mean()) for language, mask in spoken.items()},
    )


def batches(
    messages: Sequence[Message], batch_size: int, steps: int, seed: int
) -> Iterator[tuple[Message, ...]]:
    """`steps` batches: the messages in a new order each epoch, the same for every model of a seed."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    done = 0
    while done < steps:
        order = torch.randperm(len(messages), generator=generator, dtype=torch.int64, device="cpu").tolist()
        for at in range(0, len(order), batch_size):
            if done == steps:
                return
            yield tuple(messages[i] for i in order[at : at + batch_size])
            done += 1
