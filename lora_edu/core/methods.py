"""The methods that are known: which one serves a config, and how it builds its layers. Lesson 04.

No code in ``core``, ``fast``, ``serving`` or ``lab`` knows a method by name. A method's file brings its config and its
layers together and calls ``register``; ``inject`` finds it here. ``core/entrants.py`` lets it join the comparison.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_edu.core.adapter import AdapterLayer


@dataclass
class InjectionContext:
    """What the layers of one injection share. It stays with the adapter.

    Attributes:
        shared: room for a method: tensors that all layers use, or what ``prepare`` learned from data. Tensors belong
            into one ``nn.Module`` that each layer holds: then they move with the model and stay one.
    """

    adapter_name: str = "default"
    autocast_adapter_dtype: bool = True
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What every ``AdapterLayer`` is told beside its base."""
        return {"adapter_name": self.adapter_name, "autocast_adapter_dtype": self.autocast_adapter_dtype}


Build = Callable[[nn.Module, str, Any, InjectionContext], AdapterLayer]
Prepare = Callable[[Any, nn.Module, Any], dict[str, Any]]
FileFields = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """One way to adapt: for which configs, and how to build its layer for each kind of base layer."""

    name: str
    config_type: type[Any]
    builders: Mapping[type[nn.Module], Build]
    applies: Callable[[Any], bool]
    prepare: Prepare | None
    file_fields: FileFields


_METHODS: list[Method] = []


def register(
    name: str,
    config_type: type[Any],
    builders: Mapping[type[nn.Module], Build],
    applies: Callable[[Any], bool] = lambda config: True,
    prepare: Prepare | None = None,
    file_fields: FileFields = lambda fields: fields,
) -> None:
    """Make a method known. Later registrations are asked first, so that a special case precedes the general one.

    A method that shares its config with others, switched on by a field, says here what a config of its own would say
    by its methods: when it ``applies``, how to ``prepare``, what its file is.

    Args:
        name: for messages, for example ``"DoRA"``.
        config_type: the config class that asks for this method: a subclass of ``AdapterConfig``. Files are read as
            the class that was registered last among those which state, not inherit, their ``peft_type``.
        builders: kind of base layer → function (base, module name, config, context) → AdapterLayer. Empty for a
            method that replaces no layer.
        applies: a further condition on the config, for example ``lambda config: config.use_dora``.
        prepare: function (config, model, batches) → what goes into ``context.shared``; see ``AdapterConfig``.
        file_fields: from the config's fields to those of the file, where it is another method's: PiSSA writes a plain
            LoRA of twice the rank.
    """
    _METHODS.insert(0, Method(name, config_type, builders, applies, prepare, file_fields))


def register_kind(name: str, kind: type[Any], build: Build) -> None:
    """Let a registered method adapt one more kind of base layer; it is asked for before the kinds that were known.

    Args:
        name: the method's, as it was registered.
        kind: a class, or an abstract one that recognises its instances by itself.
    """
    place, method = next((i, method) for i, method in enumerate(_METHODS) if method.name == name)
    _METHODS[place] = dataclasses.replace(method, builders={kind: build, **method.builders})


def registered_methods() -> list[Method]:
    """All methods, the latest registration first. The package's own register when this is first called."""
    importlib.import_module("lora_edu").register_methods()
    return _METHODS


def method_of(config: Any) -> Method:
    """The registered method that serves a config.

    Raises:
        ValueError: if there is none; it names the field that asks for something unknown.
    """
    own = [method for method in registered_methods() if type(config) is method.config_type]
    for method in own:
        if method.applies(config):
            return method
    for each in dataclasses.fields(config):
        if each.default is not dataclasses.MISSING and getattr(config, each.name) != each.default:
            plain = dataclasses.replace(config, **{each.name: each.default})
            if any(method.applies(plain) for method in own):
                raise ValueError(
                    f"{each.name}={getattr(config, each.name)!r}: no method here serves it; known are "
                    f"{', '.join(method.name for method in own)}"
                )
    raise ValueError(f"no method here serves a {type(config).__name__}; a method's file calls register(...)")


FastForm = Callable[[Mapping[str, AdapterLayer]], int]
_FAST_FORMS: list[FastForm] = []


def register_fast_form(turn: FastForm) -> None:
    """Make a way known to turn an injection's layers, by name, into faster forms; it returns how many it turned."""
    _FAST_FORMS.append(turn)


def make_fast(layers: Mapping[str, AdapterLayer]) -> int:
    """Turn layers into their fast forms where there are some; returns how many."""
    return sum(turn(layers) for turn in _FAST_FORMS)
