"""ModuleCopies: a module of a model, and adapters' own copies of it (PEFT's modules_to_save)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .adapters import HOOKS

_COPIES = "modules_to_save"


class ModuleCopies(torch.nn.Module):
    """In a module's place: the copy that the active adapter has of it, or the module itself.

    Attributes and hooks are the module's: `model.head.weight` is the weight in use. The state dict holds
    `original_module.*` and `modules_to_save.<adapter>.*`; one of version 0.1, which knew one module only, is
    loaded into the copy in use.

    Args:
        module: held, and its parameters frozen.
    """

    # transformers asks each module: what may be tied to an embedding, and is then saved once
    _tied_weights_keys: ClassVar[dict[str, str]] = {"original_module": "original_module"}

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.original_module = module.requires_grad_(False)
        self.modules_to_save = torch.nn.ModuleDict()
        self.active_adapters: tuple[str, ...] = ()
        self.merged_adapters: tuple[str, ...] | None = None
        self.enabled = True
        self.training = module.training
        for name in HOOKS:
            self.__dict__[name] = module.__dict__[name]
        self.register_load_state_dict_pre_hook(_from_0_1)

    @property
    def copies(self) -> dict[str, torch.nn.Module]:
        """The copies by adapter."""
        return self._modules[_COPIES]._modules  # type: ignore[union-attr,return-value]

    def in_use(self) -> torch.nn.Module:
        """The module that a call runs."""
        names = self.active_adapters if self.merged_adapters is None else self.merged_adapters
        original: torch.nn.Module = self._modules["original_module"]  # type: ignore[assignment]
        return self.copies[names[0]] if self.enabled and names else original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.in_use().forward(*args, **kwargs)

    def hold(self, adapter_name: str, copy: torch.nn.Module, active: bool, trainable: bool) -> None:
        """Take in an adapter's copy."""
        self.modules_to_save[adapter_name] = copy.train(self.training).requires_grad_(active and trainable)
        if active:
            self.active_adapters = (adapter_name,)

    def check_adapters(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the adapters that have a copy.

        Raises:
            ValueError: several have one.
        """
        own = tuple(name for name in names if name in self.copies)
        if len(own) > 1:
            raise ValueError(f"adapters {list(own)} each bring this module, of which one can be in use")
        return own

    def set_adapter(self, names: tuple[str, ...], trainable: bool) -> None:
        """Put the copy of one of the adapters in use, or the module itself where none has one."""
        self.active_adapters = self.check_adapters(names)
        for name, copy in self.copies.items():
            copy.requires_grad_(trainable and name in self.active_adapters)

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter's copy."""
        del self.modules_to_save[name]
        self.active_adapters = tuple(n for n in self.active_adapters if n != name)

    def unwrap(self) -> torch.nn.Module:
        """What to put in this one's place: a merged adapter's copy, else the module itself."""
        module: torch.nn.Module = self.original_module
        if self.merged_adapters:
            module = self.copies[self.merged_adapters[0]]
        for name in HOOKS:
            module.__dict__[name] = self.__dict__[name]
        return module.train(self.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if _COPIES not in self.__dict__.get("_modules", ()):  # not built yet
                raise
            return getattr(self.in_use(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        inside = isinstance(value, (torch.Tensor, torch.nn.Module)) and _COPIES in self.__dict__.get(
            "_modules", ()
        )
        if inside and name not in self._modules and hasattr(self.in_use(), name):
            setattr(self.in_use(), name, value)  # a weight that is tied anew
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"active={list(self.active_adapters)}" + ("" if self.enabled else ", disabled")


def _from_0_1(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    assert isinstance(module, ModuleCopies)
    own = module.original_module.state_dict(keep_vars=True)
    if not own or any(key.startswith(f"{prefix}original_module.") for key in state_dict):
        return
    if not all(prefix + key in state_dict for key in own):
        return
    names = [*module.active_adapters, *module.copies][:1]
    for key, t in own.items():
        state_dict[f"{prefix}original_module.{key}"] = t
        for name, copy in module.copies.items():
            state_dict[f"{prefix}{_COPIES}.{name}.{key}"] = copy.state_dict(keep_vars=True)[key]
        for name in names:
            state_dict[f"{prefix}{_COPIES}.{name}.{key}"] = state_dict[prefix + key]
        del state_dict[prefix + key]
