"""Merge adapters into the weights, take them out again, switch them off for a while. Built in lesson 09."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_edu.core.adapter import AdapterLayer, adapter_layers, adapters_around, named_places
from lora_edu.core.parts import TrainedCopy, adapter_state, use_parts


def merge(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> None:
    """Fold adapters into the frozen weights, in place; the model then runs at the base's speed.

    The pretrained weights are kept, so that ``unmerge`` brings them back bit for bit. Merging again changes nothing;
    adapters that are not named stay as they are, in use and unmerged. Weights tied to a merged one keep their values.

    Args:
        adapter_names: one name or several; None means the active adapters.

    Raises:
        KeyError: if the model has no adapter of that name.
        ValueError: if a merged weight would not be finite; no weight is changed then.
    """
    merge_layers(layers_of(model, adapter_names))


def merge_layers(layers: Iterable[AdapterLayer]) -> None:
    """Merge all of them, or none if one cannot be merged."""
    done: list[AdapterLayer] = []
    try:
        for layer in layers:
            if not layer.merged:
                layer.merge()
                done.append(layer)
    except ValueError:
        for layer in reversed(done):
            layer.unmerge()
        raise


def unmerge(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> None:
    """Take merged adapters (all of them, or the named ones) out of the weights again, bit for bit."""
    names = list(adapter_state(model).configs) if adapter_names is None else adapter_names
    for layer in layers_of(model, names):
        layer.unmerge()


def layers_of(model: nn.Module, adapter_names: str | Sequence[str] | None) -> list[AdapterLayer]:
    """The layers of the named adapters, or of the active ones."""
    state = adapter_state(model)
    names = state.active if adapter_names is None else adapter_names
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in state.configs:
            raise KeyError(f"no adapter named {name!r}; this model has: {', '.join(state.configs)}")
    return [layer for name in names for layer in adapter_layers(model, name).values()]


def merge_and_unload(model: Any) -> nn.Module:
    """The plain model with the active adapters merged for good: no lora_edu module is left in it.

    Works in place and returns the model; for a single adapted layer it returns the plain layer. Trained biases and
    the active adapter's ``modules_to_save`` stay; adapters that are not active are dropped. Where an output head
    that was tied to the embedding got an update of its own, the model's config is set to untied.

    Raises:
        ValueError: if a merged weight would not be finite; the model is then as before.
    """
    if isinstance(model, AdapterLayer):
        merge_layers(layer for layer in adapters_around(model) if layer.active)
        return unwrapped(model)
    adapter_state(model)
    merge(model)
    for _, parent, attribute, module in list(named_places(model)):
        if isinstance(module, AdapterLayer):
            setattr(parent, attribute, unwrapped(module))
        elif isinstance(module, TrainedCopy):
            setattr(parent, attribute, module.module())
    model.__dict__.pop("adapter_state", None)
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False) and not tied_weight(model):
        model.config.tie_word_embeddings = False  # or loading the saved model would tie them again
        warnings.warn(
            "the output head was tied to the embedding and now has weights of its own: "
            "config.tie_word_embeddings is set to False",
            stacklevel=2,
        )
    return model


def unwrapped(layer: AdapterLayer) -> nn.Module:
    """The pretrained layer without its adapters, with whatever is merged into it."""
    layer.merge_state.pretrained = None
    return layer.frozen


def tied_weight(model: Any) -> bool:
    """Whether the output head uses the embedding's weight."""
    if not hasattr(model, "get_output_embeddings"):
        return False
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model is the pretrained one, merged or not; afterwards everything is as it was.

    >>> with disable_adapter(model):
    ...     reference = model(**batch)
    """
    adapter_state(model)  # says so where there is no adapter
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    # Usually the model itself; parts of it may have been injected on their own.
    injected = [module for module in model.modules() if "adapter_state" in module.__dict__]
    names = [adapter_state(module).active for module in injected]
    active = [layer.active for layer in layers]
    merged = [(layer.frozen, layer.frozen.weight, layer.merge_state) for layer in layers if layer.merged]
    for layer in layers:
        layer.active = False
    for frozen, weight, merge_state in merged:
        frozen.weight = merge_state.pretrained_like(weight)
    for module in injected:
        adapter_state(module).active = []  # so that an inner block, when it ends, does not switch anything on
        use_parts(module, [])
    try:
        yield model
    finally:
        for module, were_active in zip(injected, names, strict=True):
            adapter_state(module).active = were_active
            use_parts(module, were_active)
        for frozen, merged_weight, _ in merged:
            frozen.weight = merged_weight
        for layer, was_active in zip(layers, active, strict=True):
            layer.active = was_active
