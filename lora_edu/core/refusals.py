"""Layers that cannot be adapted, found before anything is changed: those that nobody calls, those that are elsewhere.

An adapter works in its layer's ``forward``. Some modules read a layer's weight and never call the layer: the adapter
would then have no effect and no gradient, until merging suddenly gave it one. Lesson 11 meets such a layer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

# Owners whose kernels read weights although their source also calls the layer: (part of a class's name, attributes).
FUSED_KERNELS = (("Mamba", ("out_proj", "dt_proj", "x_proj")),)
ENCODER_LINEARS = ("linear1", "linear2")


def check_is_called(name: str, places: Sequence[tuple[nn.Module, str]]) -> None:
    """Raise if all owners of a layer are known to read its weight instead of calling it.

    Args:
        name: the layer's name in the model, for the message.
        places: (owner, attribute) wherever the layer is registered.
    """
    if all(takes_fast_path(owner, attribute) for owner, attribute in places):
        raise ValueError(
            f"{name!r}: in eval mode nn.TransformerEncoderLayer takes a fast path that reads the weight and skips "
            "the adapter; call torch.backends.mha.set_fastpath_enabled(False) first, or use exclude_modules"
        )
    owners: list[tuple[Any, str]] = [(type(owner), attribute) for owner, attribute in places]
    if all(reads_only_the_weight(owner, attribute) for owner, attribute in owners):
        raise ValueError(
            f"{name!r}: {type(places[0][0]).__name__} reads this layer's weight and never calls the layer, so an "
            "adapter in it would have no effect until it was merged; leave it out with exclude_modules"
        )


def takes_fast_path(owner: nn.Module, attribute: str) -> bool:
    """Whether this is a linear layer of PyTorch's own encoder block, which in eval mode fuses it away."""
    inside = isinstance(owner, nn.TransformerEncoderLayer) and attribute in ENCODER_LINEARS
    return inside and torch.backends.mha.get_fastpath_enabled()


@cache
def reads_only_the_weight(owner: Any, attribute: str) -> bool:
    """Whether a class's source reads ``self.x.weight``, never calls ``self.x(…)``, and hands ``self.x`` to nobody.

    Where there is no source to read, as for classes typed into a console, nothing is known: False.
    """
    if any(part in owner.__name__ and attribute in names for part, names in FUSED_KERNELS):
        return True
    source = ""
    for each in owner.__mro__:
        if each is nn.Module:
            break
        try:
            source += inspect.getsource(each)
        except (OSError, TypeError):
            return False
    this = rf"\bself\.{re.escape(attribute)}\b"
    reads = re.search(rf"{this}\.weight\b", source)
    calls = re.search(rf"{this}\s*\(", source)
    hands_on = re.search(rf"{this}(?!\s*[.(=:\w\[])", source)
    return bool(reads) and not calls and not hands_on


def check_is_here(name: str, layer: Any, model: nn.Module) -> None:
    """Raise if a layer's weight is not in memory while the model computes: it was offloaded to CPU or disk.

    A model that is on the meta device as a whole computes nothing: adapters may be counted there.
    """
    hook = getattr(layer, "_hf_hook", None)
    offloaded = bool(getattr(hook, "offload", False)) or any(
        getattr(each, "offload", False) for each in getattr(hook, "hooks", ())
    )
    alone = layer.weight.is_meta and not all(parameter.is_meta for parameter in model.parameters())
    if offloaded or alone:
        raise ValueError(
            f"{name!r} has its weight offloaded (on the meta device), so an adapter could be neither placed nor "
            "trained beside it: load the model without offloading, or narrow target_modules to layers that are here"
        )
