"""The layers that ``inject(..., fast=True)`` puts in: the same numbers, by ``fast.function``. Built in lesson 24.

Whatever layer says by ``factors()`` that it is base(x) + s · B (A · drop(x)) can have the fused forward pass. It keeps
its class's everything else. What ``lora_linear`` does not cover (a merged adapter, one around another, a base layer
with hooks or a forward of its own) goes through the class's plain forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_edu.core.adapter import AdapterLayer
from lora_edu.core.layer import PRODUCTS, is_plain_product
from lora_edu.core.methods import register_fast_form
from lora_edu.fast.function import lora_linears
from lora_edu.fast.siblings import Siblings, introduce


class FusedForward:
    """Put before a layer's class: its forward pass by ``lora_linears`` where that computes the same."""

    siblings: Siblings | None = None

    def forward(self: Any, x: Tensor) -> Tensor:
        """The class's own forward, faster where it can be."""
        if not self.is_covered():
            return super().forward(x)  # type: ignore[misc]
        if self.siblings is not None and torch.is_grad_enabled():
            return self.siblings.output(self, x)
        return together(x, [self])[0]

    def is_covered(self: Any) -> bool:
        """Whether ``lora_linears`` computes what the plain forward would."""
        return is_plain_product(self.base) and self.adds_to_output()

    def __reduce__(self) -> Any:
        """How to copy and pickle a layer whose class was made here and cannot be found by its name."""
        classes = type(self).__mro__
        return new_fused, (classes[classes.index(FusedForward) + 1],), self.__dict__


def together(x: Tensor, layers: list[Any]) -> tuple[Tensor, ...]:
    """The outputs of fused layers that read the same x."""
    tensors, scalings, dropouts = [], [], []
    for layer in layers:
        lora_A, lora_B, scaling, dropout_p = layer.factors()
        tensors.append((layer.oriented(layer.weight), layer.bias, lora_A, lora_B))  # (out, in), GPT-2's too
        scalings.append(scaling)
        dropouts.append(dropout_p)
    return lora_linears(x, tensors, scalings, dropouts)


@cache
def fused_class(layer_class: Any) -> type[AdapterLayer]:
    """The class with the fused forward pass in front: ``FastLoRALinear`` of ``LoRALinear``."""
    return type(f"Fast{layer_class.__name__}", (FusedForward, layer_class), {"__doc__": layer_class.__doc__})


def new_fused(layer_class: Any) -> AdapterLayer:
    """An empty layer of the fused class, for ``pickle``."""
    fused = fused_class(layer_class)
    return fused.__new__(fused)


def fuse_all(layers: Mapping[str, AdapterLayer]) -> int:
    """Give the layers of one injection the fused forward pass where it can be had; returns how many have it now."""
    fused = {name: layer for name, layer in layers.items() if fuse(layer)}
    introduce(fused, together)
    return len(fused)


def fuse(layer: AdapterLayer) -> bool:
    """Give a layer the fused forward pass, if it has factors around a plain linear layer; returns whether it did.

    The object stays and gets another class, as PyTorch's ``fully_shard`` does it: parameters, hooks and names are kept.
    """
    if not callable(getattr(layer, "factors", None)) or type(layer.frozen).forward not in PRODUCTS:
        return False
    own: Any = type(layer)
    layer.__class__ = fused_class(own)
    return True


register_fast_form(fuse_all)
