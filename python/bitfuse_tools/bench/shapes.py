"""Sizes of models by name, from their published configurations, and from a file of one's own."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from bitfuse.core.json_files import JsonError, brief, read_json


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes.

    Attributes:
        name: of the model.
        hidden, intermediate: width of the stream between layers, and of the MLP's middle.
        heads, kv_heads, head_dim: of attention.
        vocab: tokens.
        activation: of the gated MLP: "silu", "gelu", "gelu_tanh" or "relu".
        square: only one linear layer, hidden x hidden, instead of the model's four.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    activation: str = "silu"
    square: bool = False

    @property
    def linears(self) -> dict[str | None, tuple[int, int]]:
        """(out_features, in_features) of the linear layers as they are run, fused where one input feeds
        several."""
        if self.square:
            return {None: (self.hidden, self.hidden)}
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    def matrices(self, which: str) -> list[tuple[int, int]]:
        """The n and k of an op, by the `matrices` of its declaration."""
        if which == "linears":
            return list(self.linears.values())
        return [({"mlp": self.intermediate, "hidden": self.hidden}[which], self.hidden)]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama3-8b", 4096, 14336, 32, 8, 128, 128256),
        Shape("gemma2-9b", 3584, 14336, 16, 8, 256, 256000, "gelu_tanh"),
        Shape("solar-10.7b", 4096, 14336, 32, 8, 128, 32000),
        Shape("mixtral", 4096, 14336, 32, 8, 128, 32000),
    )
}
# what runs unless a model is named: one layer of 4096 x 4096, the attention and MLP of llama3-8b
DEFAULT = Shape("default", 4096, 14336, 32, 8, 128, 128256, square=True)


def find(name: str) -> Shape:
    """The shape of a name, or of a JSON file such as

        {"name": "mine", "hidden": 2048, "intermediate": 5632, "heads": 32, "kv_heads": 4, "head_dim": 64,
         "vocab": 32000}

    with "activation" too, or a model's own config.json (hidden_size, num_attention_heads, ...).

    Raises:
        ValueError: no such name or file, a size that is missing or wrong; the message is one line.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    if not name.endswith(".json") and not path.is_file():
        known = ", ".join(SHAPES)
        raise ValueError(f"shapes is {name!r}, expected one of {known}, or the path of a .json file")
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"shapes: {name} is not there") from None
    except JsonError as error:
        raise ValueError(f"shapes: {name} {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"shapes: {name} holds a {type(found).__name__}, expected an object of sizes")
    return _checked(name, found)


_OF_CONFIG = {
    "hidden_size": "hidden", "intermediate_size": "intermediate", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "vocab_size": "vocab", "head_dim": "head_dim",
}  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def _checked(file: str, found: dict[str, object]) -> Shape:
    if "hidden_size" in found:  # a model's own
        sizes: dict[str, object] = {own: found[name] for name, own in _OF_CONFIG.items() if name in found}
        sizes.setdefault("kv_heads", sizes.get("heads"))
        hidden, heads = sizes.get("hidden"), sizes.get("heads")
        if sizes.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
            sizes["head_dim"] = hidden // heads
        said = found.get("hidden_activation") or found.get("hidden_act") or "silu"
        sizes["activation"] = _ACTIVATIONS.get(str(said), said)
        path = Path(file).resolve()
        found = {"name": path.parent.name if path.stem == "config" else path.stem, **sizes}
    known = {f.name: f for f in fields(Shape) if f.name != "square"}
    if unknown := [name for name in found if name not in known]:
        raise ValueError(f"shapes: {file} has {brief(unknown[0])}, expected {', '.join(known)}")
    found = {"name": Path(file).stem, **found}
    for name, f in known.items():
        value = found.get(name)
        if name == "name":
            right, wanted = isinstance(value, str) and bool(value), "a word"
        elif name == "activation":
            right, wanted = value is None or value in _ACTIVATIONS.values(), "silu, gelu, gelu_tanh or relu"
        else:
            right = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24
            wanted = "a number from 1 to 2^24"
        if not right:
            said = "is missing" if value is None and f.default is MISSING else f"is {brief(value)}"
            raise ValueError(f"shapes: {file}: {name} {said}, expected {wanted}")
    shape = Shape(**{k: v for k, v in found.items() if v is not None})  # type: ignore[arg-type]
    if shape.heads % shape.kv_heads:
        raise ValueError(
            f"shapes: {file}: heads is {shape.heads}, expected a multiple of kv_heads, {shape.kv_heads}"
        )
    for name in ("hidden", "intermediate", "head_dim"):
        if getattr(shape, name) % 8:
            raise ValueError(f"shapes: {file}: {name} is {getattr(shape, name)}, expected a multiple of 8")
    return shape
