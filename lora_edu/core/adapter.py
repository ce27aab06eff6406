"""The one contract of every method: a frozen layer with one adapter around it, merged and unmerged in one way.

Lesson 03 builds the first layer that fulfils it, lesson 09 looks at merging. The evening's second file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lora_edu.core.matching import Wrapper, named_places
from lora_edu.core.merge_state import MergeState, Pair, register_pair
from lora_edu.core.refusals import check_readable


class AdapterLayer(Wrapper):
    """A frozen layer and one adapter around it: the contract of every method.

    A subclass gives ``forward(x)``, ``adapted(weight, bias)``, ``adapter_parameters()`` and ``to_file()``; merging,
    effective weights, files and mixed batches are written once, here and in the core, from these. One that is
    W x + s · B (A · drop(x)) may say so by ``factors()``, as ``LoRALinear`` does. Adapters nest: ``base`` may itself
    be an adapted layer, and ``frozen`` is the pretrained layer at the bottom, from which all start.

    Attributes:
        additive: the adapted weight is W + ΔW with a ΔW that does not depend on W, so that the adapter can stand
            beside others. Others refuse what they cannot do: several at a time on one weight, rows of a mixed batch.
            A class with a ``forward`` of its own says it anew: what it derives from spoke of another forward.
        mergeable: there is a dense layer that does the same. Otherwise ``adapted`` is left out, and merging refuses.

    Args:
        base: the layer to adapt, or one that is adapted already. The pretrained weight and bias are frozen.
        adapter_name: the adapter that this layer belongs to.
        autocast_adapter_dtype: keep the adapter in float32 where the base is in float16 or bfloat16.

    Raises:
        TypeError: if the pretrained weight is packed into integers or float8 by a quantisation library.
    """

    additive: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "forward" in cls.__dict__:  # a DoRA that derives from LoRA must not pass for a sum, nor for s · B (A x)
            for promise, without in (("additive", False), ("factors", None)):
                if promise not in cls.__dict__:
                    setattr(cls, promise, without)

    def __init__(self, base: nn.Module, adapter_name: str = "default", autocast_adapter_dtype: bool = True):
        super().__init__()
        self.base = base
        check_readable(self.frozen, self.weight)
        self.adapter_name = adapter_name
        self.active = True
        self.merged = False
        self.injected = False  # rather than put in by hand: the model then has a state that knows it
        self.merge_state: MergeState = base.merge_state if isinstance(base, AdapterLayer) else MergeState()
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)
        half = self.weight.dtype in (torch.float16, torch.bfloat16)
        self.adapter_dtype = torch.float32 if half and autocast_adapter_dtype else self.weight.dtype
        self.train(base.training)

    # What a method says of itself

    def adapted(self, weight: Tensor, bias: Tensor | None) -> Pair:
        """What this adapter alone turns a dense weight and bias into: at least float32, in the base's orientation."""
        raise NotImplementedError(f"{type(self).__name__} has no dense form; its class says mergeable = False")

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What trains."""
        raise NotImplementedError

    def to_file(self) -> dict[str, Tensor]:
        """What a file holds of this layer: {PEFT's key after the module's name: tensor}."""
        raise NotImplementedError

    def from_file(self, tensors: dict[str, Tensor]) -> None:
        """Take the values over that a file holds of this layer; keys and shapes are those of ``to_file``.

        Raises:
            NotImplementedError: if ``to_file`` makes new tensors, into which there is no use in writing.
        """
        own = {id(tensor) for tensor in (*self.parameters(), *self.buffers())}
        with torch.no_grad():
            for key, tensor in self.to_file().items():
                if id(tensor) not in own:
                    raise NotImplementedError(f"{type(self).__name__} makes {key!r} for its file: write from_file too")
                tensor.copy_(tensors[key])

    def check_file(self, tensors: dict[str, Tensor]) -> None:
        """Raise ValueError if a file whose keys and shapes fit holds values that cannot be this layer's."""

    def reconfigure(self, config: Any, name: str) -> None:
        """Take over what another config of the same method says of the layer called ``name``: for ``hotswap_adapter``.

        Without it, only a file whose method settings are the same can be swapped in.
        """

    def update(self, x: Tensor) -> Tensor:
        """What an additive adapter adds to the output for x; methods with a faster way than through ΔW override it."""
        weight = at_least_float32(self.weight)
        delta, bias = self.adapted(torch.zeros_like(weight), None)
        if isinstance(self.frozen, nn.Embedding):
            return F.embedding(x, delta) * getattr(self.frozen, "embed_scale", 1)
        return F.linear(x.to(delta.dtype), self.oriented(delta), bias)

    # The frozen layer

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

    def features(self) -> tuple[int, int]:
        """(in, out) of the frozen layer; of an embedding, its number of rows and their width."""
        first, second = self.weight.shape
        return (first, second) if self.transposed else (second, first)

    def oriented(self, matrix: Tensor) -> Tensor:
        """An (out, in) matrix in the orientation of the frozen weight."""
        return matrix.T if self.transposed else matrix

    @property
    def transposed(self) -> bool:
        """Whether the frozen weight is stored as (in, out): GPT-2's ``Conv1D``, and embeddings."""
        return isinstance(self.frozen, Conv1D | nn.Embedding)

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """A trainable parameter of zeros on the base's device and in the adapter's precision."""
        return nn.Parameter(torch.zeros(shape, device=self.weight.device, dtype=self.adapter_dtype))

    # In use, and what the layer amounts to

    def adds_to_output(self) -> bool:
        """Whether the adapter comes on top of what the frozen weight does: it is active, and not merged into it."""
        return self.active and not self.merged

    def applies_in_forward(self) -> bool:
        """``adds_to_output``, for ``forward``: warns if a merged adapter is to be trained."""
        if self.merged and self.active and self.training:
            warnings.warn(
                f"adapter {self.adapter_name!r} is merged, so nothing trains; call unmerge(model) before training",
                stacklevel=3,
            )
        return self.adds_to_output()

    def effective_weight(self) -> Tensor:
        """The dense weight this layer acts as, in the base's own orientation, at least float32."""
        return self.effective_pair()[0]

    def effective_bias(self) -> Tensor | None:
        """The dense bias this layer acts with, at least float32, or None."""
        return self.effective_pair()[1]

    def effective_pair(self) -> Pair:
        """Effective weight and bias, from the innermost adapter outwards. ValueError if one has no dense form."""
        if isinstance(self.base, AdapterLayer):
            pair = self.base.effective_pair()
        else:
            pair = at_least_float32(self.weight), None if self.bias is None else at_least_float32(self.bias)
        if not self.adds_to_output():
            return pair
        self.check_dense()
        return self.adapted(*pair)

    # Merging

    def check_mergeable(self) -> None:
        """Raise unless there is a dense layer that does the same, and a stored weight that it could replace."""
        self.check_dense()
        if (stored := self.frozen._parameters.get("weight")) is None or not stored.is_floating_point():
            raise ValueError(
                f"adapter {self.adapter_name!r} is a {type(self).__name__}, and the {type(self.frozen).__name__} in it "
                "stores no weight that a sum could replace; call dequantize_base(model), then merge"
            )

    def check_dense(self) -> None:
        """Raise unless there is a dense layer that does the same."""
        if not self.mergeable:
            raise ValueError(
                f"adapter {self.adapter_name!r} is a {type(self).__name__}, which no single weight can stand for: it "
                "cannot be merged; keep it as it is, or switch it off with disable_adapter(model)"
            )
        if isinstance(self.frozen.weight, DTensor):
            raise ValueError("the weight is sharded over several processes (FSDP): merge in a model that is not")
        if self.frozen.weight.is_meta:
            raise ValueError("the weight is offloaded (on the meta device): merge in a model that was loaded without")

    def merge(self) -> None:
        """Fold the adapter into the frozen weight and bias. Merging twice changes nothing.

        The sum is taken from the pretrained pair in float32 and rounded once. The pair is kept for ``unmerge``; a
        module tied to the weight keeps the pretrained values.

        Raises:
            ValueError: if the merged values are not finite, if the adapter has no dense form, or if it and another
                around this weight are in use and one of them is not additive. The layer is then as before.
        """
        if not self.merged:
            self.check_mergeable()
            inside = [layer for layer in adapters_around(self.base) if layer.active and not layer.merged]
            check_combination([self, *inside, *self.merge_state.layers])
            self._put_merged([*self.merge_state.layers, self])

    def unmerge(self) -> None:
        """Take the adapter out of the frozen weight and bias again, bit for bit."""
        if self.merged:
            self._put_merged([layer for layer in self.merge_state.layers if layer is not self])

    def _put_merged(self, layers: list[AdapterLayer]) -> None:
        """Register what the kept pair becomes with these adapters in it, the innermost first."""
        state, frozen = self.merge_state, self.frozen
        weight, bias = kept = state.pair_like(frozen) or (frozen.weight, self.bias)
        if layers:
            with torch.no_grad():
                pair = start = at_least_float32(weight), None if bias is None else at_least_float32(bias)
                for layer in sorted(layers, key=lambda layer: sum(1 for _ in adapters_around(layer))):
                    pair = layer.adapted(*pair)
                weight = nn.Parameter(pair[0].to(frozen.weight.dtype), requires_grad=False)
                if pair[1] is not start[1]:
                    bias = None if pair[1] is None else nn.Parameter(pair[1].to(frozen.weight.dtype), False)
            if not all(torch.isfinite(tensor).all() for tensor in (weight, bias) if tensor is not None):
                raise ValueError(
                    f"adapter {self.adapter_name!r} would put infinite or NaN values into the weight; nothing was "
                    "merged. Look for NaN in its parameters: training may have diverged"
                )
        # New parameters rather than in-place sums: whatever is tied to the old ones stays as it was.
        register_pair(frozen, weight, bias)
        state.pair = kept if layers else None
        for layer in state.layers:
            layer.merged = False
        for layer in layers:
            layer.merged = True
        state.layers = layers


def check_combination(layers: list[AdapterLayer]) -> None:
    """Raise if these adapters cannot be in use around one weight at the same time."""
    names = dict.fromkeys(layer.adapter_name for layer in layers)
    other = next((layer for layer in layers if not layer.additive), None)
    if other is not None and len(set(map(id, layers))) > 1:
        raise ValueError(
            f"adapter {other.adapter_name!r} is a {type(other).__name__}, whose effect depends on the weight it finds: "
            f"it cannot be merged or in use beside another ({', '.join(names)}); use one of them at a time"
        )


def innermost(module: nn.Module) -> Any:
    """The module itself, or the pretrained layer underneath its adapters."""
    while isinstance(module, AdapterLayer):
        module = module.base
    return module


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
