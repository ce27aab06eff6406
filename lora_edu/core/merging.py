"""Merge adapters into the weights, take them out again, switch them off for a while. Built in lesson 09."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_edu.core.adapter import AdapterLayer, adapter_layers, adapters_around, check_combination
from lora_edu.core.matching import named_places
from lora_edu.core.merge_state import register_pair
from lora_edu.core.parts import TrainedCopy
from lora_edu.core.state import adapter_state, injected_model, injected_models


def merge(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> None:
    """Fold adapters into the frozen weights, in place; the model then runs at the base's speed.

    The pretrained weights are kept, so that ``unmerge`` brings them back bit for bit. Merging again changes nothing;
    adapters that are not named stay as they are, in use and unmerged. Weights tied to a merged one keep their values.

    Args:
        adapter_names: one name or several; None means the active adapters.

    Raises:
        KeyError: if the model has no adapter of that name.
        ValueError: if a method has no dense form or brings something that no weight can hold, if several cannot be
            merged together, or if a merged weight would not be finite; no weight is changed then.
    """
    model = injected_model(model)
    names = names_of(model, adapter_names)
    layers = [layer for name in names for layer in adapter_layers(model, name).values()]
    check_merge(model, layers)
    for name in names:
        if not adapter_layers(model, name):
            check_unloadable(model, name)
    merge_layers(layers)


def check_merge(model: nn.Module, layers: Sequence[AdapterLayer]) -> None:
    """Raise if these layers cannot all be merged, given what else is merged or in use around their weights."""
    chosen = set(map(id, layers))
    for outermost in adapter_layers(model).values():
        around = list(adapters_around(outermost))
        if any(id(layer) in chosen for layer in around):
            check_combination([layer for layer in around if id(layer) in chosen or layer.active or layer.merged])
    for layer in layers:
        layer.check_mergeable()


def merge_layers(layers: Iterable[AdapterLayer]) -> None:
    """Merge all of them, or none if one cannot be merged."""
    done: list[AdapterLayer] = []
    try:
        for layer in layers:
            if not layer.merged:
                layer.merge()
                done.append(layer)
    except BaseException:
        for layer in reversed(done):
            layer.unmerge()
        raise


def unmerge(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> None:
    """Take merged adapters (all of them, or the named ones) out of the weights again, bit for bit."""
    model = injected_model(model)
    names = list(adapter_state(model).configs) if adapter_names is None else adapter_names
    for name in names_of(model, names):
        for layer in adapter_layers(model, name).values():
            layer.unmerge()


def names_of(model: nn.Module, adapter_names: str | Sequence[str] | None) -> list[str]:
    """The named adapters, each once, or the active ones. Raises KeyError for one that the model lacks."""
    state = adapter_state(model)
    names = state.active if adapter_names is None else adapter_names
    names = [names] if isinstance(names, str) else names
    for name in names:
        state.check_name(name)
    return list(dict.fromkeys(names))


def check_unloadable(model: nn.Module, adapter_name: str) -> None:
    """Raise if an adapter brings something that a plain model has no place for."""
    for part in adapter_state(model).parts.get(adapter_name, []):
        if not part.unloadable:
            raise ValueError(
                f"adapter {adapter_name!r} brings a {type(part).__name__} ({part.place}), which no weight of the plain "
                "model can hold: it cannot be merged; keep it, or name other adapters"
            )


def merge_and_unload(model: Any) -> nn.Module:
    """The plain model with the active adapters merged for good: no lora_edu module is left in it.

    Works in place and returns the model that was injected; for a single adapted layer it returns the plain layer.
    Trained biases and the active adapter's ``modules_to_save`` stay; adapters that are not active are dropped. Where
    an output head that was tied to the embedding got an update of its own, the model's config is set to untied.

    Raises:
        ValueError: as for ``merge``, or if a part of an active adapter has no place in a plain model. The model is
            then as before.
    """
    if isinstance(model, AdapterLayer):
        merge_layers(layer for layer in adapters_around(model) if layer.active)
        return unwrapped(model)
    model = injected_model(model)
    state = adapter_state(model)
    for name in state.active:
        check_unloadable(model, name)
    merge(model)
    for parts in state.parts.values():
        for part in parts:
            part.unload()
    for _, parent, attribute, module in list(named_places(model)):
        if isinstance(module, AdapterLayer):
            setattr(parent, attribute, unwrapped(module))
        elif isinstance(module, TrainedCopy):
            setattr(parent, attribute, module.module())
    model.__dict__.pop("adapter_state", None)
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False) and own_head(model):
        model.config.tie_word_embeddings = False  # or loading the saved model would tie them again
        warnings.warn(
            "the output head was tied to the embedding and now has weights of its own: "
            "config.tie_word_embeddings is set to False",
            stacklevel=2,
        )
    return model


def unwrapped(layer: AdapterLayer) -> nn.Module:
    """The pretrained layer without its adapters, with whatever is merged into it."""
    layer.merge_state.pair = None
    return layer.frozen


def own_head(model: Any) -> bool:
    """Whether there is an output head over the vocabulary that does not use the embedding's weight."""
    if not hasattr(model, "get_output_embeddings"):
        return False
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is not embedding.weight


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model is the pretrained one, merged or not; afterwards everything is as it was.

    >>> with disable_adapter(model):
    ...     reference = model(**batch)
    """
    if not isinstance(model, AdapterLayer) and not injected_models(model):
        injected_model(model)  # says so where there is no adapter
    # Usually one model; parts of it may have been injected on their own.
    states = [adapter_state(each) for each in injected_models(model).values()]
    names = [state.active for state in states]
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    active = [layer.active for layer in layers]
    merged = [(layer.frozen, layer.weight, layer.bias, layer.merge_state) for layer in layers if layer.merged]
    for layer in layers:
        layer.active = False
    for frozen, _, _, merge_state in merged:
        if (pair := merge_state.pair_like(frozen)) is not None:
            register_pair(frozen, *pair)
    for state in states:
        state.active = []  # so that an inner block, when it ends, does not switch anything on
        state.use_parts([])
    try:
        yield model
    finally:
        for state, were_active in zip(states, names, strict=True):
            state.active = were_active
            state.use_parts(were_active)
        for frozen, weight, bias, _ in merged:
            register_pair(frozen, weight, bias)
        for layer, was_active in zip(layers, active, strict=True):
            layer.active = was_active
