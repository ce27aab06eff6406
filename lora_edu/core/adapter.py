"""The one contract of every method: a frozen layer with one adapter around it, merged and unmerged in one way.

Lesson 03 builds the first layer that fulfils it, lesson 09 looks at merging.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Wrapper(nn.Module):
    """Stands where ``base`` stood in a model. Names of modules, in matching and in files, skip it."""

    base: nn.Module


@dataclass
class MergeState:
    """What one weight has had merged into it, shared by all adapters that stand around that weight."""

    pretrained: nn.Parameter | None = None  # the weight as it was before the first merge; None while nothing is merged
    layers: list[AdapterLayer] = field(default_factory=list)  # in the order of merging

    def pretrained_like(self, weight: Tensor) -> nn.Parameter:
        """The pretrained weight, on the device and in the dtype of the registered one.

        A model that was moved or cast while merged took only its registered weight along.
        """
        assert self.pretrained is not None
        self.pretrained.data = self.pretrained.data.to(weight)
        return self.pretrained


class AdapterLayer(Wrapper):
    """A frozen layer and one adapter around it: the contract of every method.

    A subclass gives ``forward(x)``, ``adapted_weight(weight)``, ``adapter_parameters()`` and ``saved_tensors()``.
    Adapters nest: ``base`` may itself be an adapted layer, and ``frozen`` is the pretrained layer at the bottom.

    Args:
        base: the layer to adapt, or one that is adapted already. The pretrained weight and bias are frozen.
        adapter_name: the adapter that this layer belongs to.
        autocast_adapter_dtype: keep the adapter in float32 where the base is in float16 or bfloat16.

    Raises:
        TypeError: if the pretrained weight is packed into integers by a quantisation library.
    """

    def __init__(self, base: nn.Module, adapter_name: str = "default", autocast_adapter_dtype: bool = True):
        super().__init__()
        pretrained = innermost(base)
        if not (pretrained.weight.is_floating_point() or pretrained.weight.is_complex()):
            raise TypeError(
                f"the {type(pretrained).__name__} keeps its weight packed as {pretrained.weight.dtype}, and the layers "
                "here read it as numbers: load the model unquantised, or adapt it with PEFT"
            )
        self.base = base
        self.adapter_name = adapter_name
        self.active = True
        self.merged = False
        self.merge_state: MergeState = base.merge_state if isinstance(base, AdapterLayer) else MergeState()
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)
        half = self.weight.dtype in (torch.float16, torch.bfloat16)
        self.adapter_dtype = torch.float32 if half and autocast_adapter_dtype else self.weight.dtype
        self.train(base.training)

    @property
    def frozen(self) -> Any:
        """The pretrained layer underneath all adapters."""
        return innermost(self.base)

    @property
    def weight(self) -> Tensor:
        """The frozen layer's weight, so that code which asks a linear layer for its weight still finds one."""
        return self.frozen.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's bias, or None."""
        return getattr(self.frozen, "bias", None)

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """A trainable parameter of zeros on the base's device and in the adapter's precision."""
        return nn.Parameter(torch.zeros(shape, device=self.weight.device, dtype=self.adapter_dtype))

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What trains."""
        raise NotImplementedError

    def saved_tensors(self) -> dict[str, Tensor]:
        """What a file holds of this layer: {PEFT's key after the module name: tensor}."""
        raise NotImplementedError

    def adapted_weight(self, weight: Tensor) -> Tensor:
        """The dense weight that this adapter alone turns ``weight`` into; same shape, at least float32."""
        raise NotImplementedError

    def effective_weight(self) -> Tensor:
        """The dense weight this layer acts as, in the base's own orientation, at least float32."""
        weight = self.base.effective_weight() if isinstance(self.base, AdapterLayer) else at_least_float32(self.weight)
        return self.adapted_weight(weight) if self.adds_to_output() else weight

    def adds_to_output(self) -> bool:
        """Whether ``forward`` has to apply the adapter: it is active, and not in the weight already."""
        if self.merged and self.active and self.training:
            warnings.warn(
                f"adapter {self.adapter_name!r} is merged, so nothing trains; call unmerge(model) before training",
                stacklevel=3,
            )
        return self.active and not self.merged

    def merge(self) -> None:
        """Fold the adapter into the frozen weight. Merging twice changes nothing.

        The sum is taken from the pretrained weight in float32 and rounded once. The pretrained weight is kept for
        ``unmerge``; a module tied to it keeps the pretrained values.

        Raises:
            ValueError: if the merged weight is not finite; the layer is then as before.
        """
        if not self.merged:
            self._put_merged([*self.merge_state.layers, self])

    def unmerge(self) -> None:
        """Take the adapter out of the frozen weight again, bit for bit."""
        if self.merged:
            self._put_merged([layer for layer in self.merge_state.layers if layer is not self])

    def _put_merged(self, layers: list[AdapterLayer]) -> None:
        state, frozen = self.merge_state, self.frozen
        pretrained = frozen.weight if state.pretrained is None else state.pretrained
        if not layers:
            if state.pretrained is not None:
                frozen.weight, state.pretrained = state.pretrained_like(frozen.weight), None
        else:
            with torch.no_grad():
                weight = at_least_float32(pretrained.to(frozen.weight.device))
                for layer in layers:
                    weight = layer.adapted_weight(weight)
                weight = weight.to(frozen.weight.dtype)
            if not torch.isfinite(weight).all():
                raise ValueError(
                    f"adapter {self.adapter_name!r} would put infinite or NaN values into the weight; nothing was "
                    "merged. Look for NaN in lora_A and lora_B: training may have diverged"
                )
            # A new parameter rather than an in-place sum: whatever is tied to the old one stays as it was.
            frozen.weight, state.pretrained = nn.Parameter(weight, requires_grad=False), pretrained
        for layer in state.layers:
            layer.merged = False
        for layer in layers:
            layer.merged = True
        state.layers = layers


def innermost(module: nn.Module) -> Any:
    """The module itself, or the pretrained layer underneath its adapters."""
    while isinstance(module, AdapterLayer):
        module = module.base
    return module


def named_places(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every place at which a module is registered: (its original name, parent, attribute, module).

    Original means without the segments that wrappers add. A module registered under two names is met twice.
    """
    for attribute, module in model._modules.items():  # named_children() would skip the second name of a shared module
        if module is None:
            continue
        name = f"{prefix}{attribute}"
        yield name, model, attribute, module
        inside = module
        while isinstance(inside, Wrapper):
            inside = inside.base
        yield from named_places(inside, f"{name}.")


def adapters_around(module: nn.Module) -> Iterator[AdapterLayer]:
    """The adapters that stand around one module, outermost first."""
    while isinstance(module, AdapterLayer):
        yield module
        module = module.base


def adapter_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, AdapterLayer]:
    """{original module name: layer} of one adapter, or the outermost adapter layers; a shared module once."""
    found: dict[str, AdapterLayer] = {}
    seen: set[int] = set()
    places = [("", model), *((name, module) for name, _, _, module in named_places(model))]
    for name, module in places:
        for layer in adapters_around(module):
            if adapter_name in (None, layer.adapter_name) and id(layer) not in seen:
                found[name] = layer
                seen.add(id(layer))
                break
    return found


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
