"""What the starts from data share: to look at a model's layers over a few batches, and leave the model as it was.

EVA looks at what layers read (``input_moments``), LoRA-GA and GoRA at the gradients of their weights
(``weight_gradients``). Both hand out one result at a time, so that a method keeps of it only what its start needs; and
both go over the batches several times, with a part of the layers each, where the sums of all would take too much
memory. Cards in the book: lesson 16.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, at_least_float32
from lora_edu.core.config import LoraConfig
from lora_edu.core.layer import LoRALinear
from lora_edu.core.methods import Build, InjectionContext

ROOM = 2**31  # bytes of sums that one pass over the batches may hold
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Moments:
    """What is known of the rows x that a layer read: how many, their mean, and Σ (x − mean)(x − mean)ᵀ, (in, in)."""

    rows: int
    mean: Tensor
    scatter: Tensor


class _Sums:
    """Rows are added; their moments come out. In float64, so that it makes no difference how they were batched."""

    def __init__(self) -> None:
        self.rows = 0
        self.total = self.products = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        x = x.to(x.device if x.is_cuda else "cpu", torch.float64)  # some accelerators have no float64
        self.rows += len(x)
        self.total = self.total.to(x.device) + x.sum(0)
        self.products = self.products.to(x.device) + x.T @ x

    def moments(self) -> Moments:
        mean = self.total / self.rows
        return Moments(self.rows, mean, self.products - self.rows * torch.outer(mean, mean))


def input_moments(
    model: nn.Module, targets: Mapping[str, Any], batches: Iterable[Batch], ignored_label: int | None
) -> Iterator[tuple[list[str], Moments]]:
    """The moments of what layers read, in float64: (names of the layers that read the same, moments).

    The model is in eval mode. Padding does not count, and where a label is ``ignored_label``, its position does not.
    Memory: 8 · in² bytes for each group of layers that is summed at a time.

    Raises:
        ValueError: if there are no batches, or a layer is not called, or reads nothing that counts, or numbers that
            are not finite.
        TypeError: if a batch is no dictionary.
    """
    batches = checked(batches)
    groups = reading_together(model, targets, batches[0])
    sizes = {first: 8 * features(targets[first])[0] ** 2 for first in groups}
    for firsts, bar in passes(sizes, len(batches), "reading layer inputs"):
        sums = {first: _Sums() for first in firsts}
        layers = {first: targets[first] for first in firsts}
        for batch in batches:
            positions = counted_positions(batch, ignored_label)
            for first, inputs in inputs_of(model, layers, batch).items():
                for x in inputs:
                    sums[first].add(rows_that_count(x, positions))
            bar.update()
        for first in firsts:
            found = sums.pop(first)
            if not found.rows:
                raise ValueError(
                    f"layer {first!r} read no position that counts: in these batches every label is {ignored_label} "
                    "or padding; pass others, or use_label_mask=False"
                )
            if not torch.isfinite(found.products).all():
                raise ValueError(f"layer {first!r} reads numbers that are infinite or NaN: look for NaN in the model")
            yield groups[first], found.moments()


def weight_gradients(
    model: nn.Module, targets: Mapping[str, Any], batches: Iterable[Batch]
) -> Iterator[tuple[str, Tensor]]:
    """(name, mean over the batches of ∂loss/∂W), each (out, in) and at least float32.

    The model is in eval mode, without dropout, and the parameters' own ``grad`` is not touched. Memory: 4 bytes for
    each weight whose gradients are summed at a time.

    Raises:
        ValueError: if there are no batches, a batch gives no loss, a weight is stored in integers, or a layer's
            gradient is missing or not finite.
        TypeError: if a batch is no dictionary.
    """
    batches = checked(batches)
    for name, layer in targets.items():
        stored = layer._parameters.get("weight")
        if stored is None or not stored.is_floating_point():
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, which stores no weight that could have a gradient: use a "
                "base that is not quantised, or a start that needs no gradients, such as 'eva'"
            )
    sizes = {name: 4 * layer.weight.numel() for name, layer in targets.items()}
    for names, bar in passes(sizes, len(batches), "summing gradients"):
        weights = {name: targets[name].weight for name in names}
        sums: dict[str, Tensor] = {}
        with looking_at(model, weights.values()), torch.enable_grad():
            for number, batch in enumerate(batches):
                for name, gradient in zip(names, gradients_of(model, batch, number, weights), strict=True):
                    if gradient is not None:
                        gradient = at_least_float32(gradient)
                        sums[name] = sums[name].add_(gradient) if name in sums else gradient.clone()
                bar.update()
        for name in names:
            if name not in sums:
                raise ValueError(
                    f"layer {name!r} got no gradient from these batches, as the loss does not depend on it: pass "
                    "batches that use it, or leave it out with exclude_modules"
                )
            mean = sums.pop(name) / len(batches)
            if not torch.isfinite(mean).all():
                raise ValueError(
                    f"the gradient of layer {name!r} is infinite or NaN: look for NaN in the model, and for batches "
                    "in which every label is ignored"
                )
            yield name, mean.T if isinstance(targets[name], Conv1D) else mean


def gradients_of(model: nn.Module, batch: Batch, number: int, weights: Mapping[str, Tensor]) -> list[Tensor | None]:
    """The gradients of one batch's loss, None for a weight that it does not depend on."""
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"batch {number} gave no loss (it holds {', '.join(batch)}): this start needs gradients, so each batch "
            "needs labels"
        )
    if not loss.requires_grad:
        return [None] * len(weights)
    return list(torch.autograd.grad(loss, list(weights.values()), allow_unused=True))


def checked(batches: Iterable[Batch]) -> list[Batch]:
    """The batches as a list: token ids are small, and they are read more than once."""
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty: pass at least one, a dictionary with what the model is called with")
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"batch {number} is a {type(batch).__name__}; expected a dictionary with what the model is called "
                "with, for example {'input_ids': ..., 'labels': ...}"
            )
    return batches


@contextmanager
def looking_at(model: nn.Module, weights: Iterable[Tensor] = ()) -> Iterator[None]:
    """The model in eval mode, with gradients for these weights alone; afterwards all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def inputs_of(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> dict[str, list[Tensor]]:
    """What each of these layers is called with when the model is called with the batch, once for each call."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def note(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        found[name].append(inputs[0])

    handles = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        with looking_at(model), torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def reading_together(model: nn.Module, targets: Mapping[str, Any], batch: Batch) -> dict[str, list[str]]:
    """Layers that a batch shows to read the same tensors, such as query, key and value: {the first of them: all}."""
    groups: dict[tuple[int, ...], list[str]] = {}
    found = inputs_of(model, targets, batch)  # holds the tensors, so that no two have the same id
    for name, inputs in found.items():
        if not inputs:
            raise ValueError(
                f"layer {name!r} was not called in the first batch, so it has no inputs to start from: leave it out "
                "with exclude_modules"
            )
        groups.setdefault(tuple(map(id, inputs)), []).append(name)
    return {names[0]: names for names in groups.values()}


def counted_positions(batch: Batch, ignored_label: int | None) -> Tensor | None:
    """Which positions of a batch count, (rows, tokens); None where all do."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    counted = None if mask is None else mask.bool()
    if ignored_label is not None and labels is not None and labels.dim() == 2:
        with_label = labels != ignored_label
        if counted is None:
            return with_label
        if counted.shape == with_label.shape:  # a classifier's labels are one for each row, or for each class
            return counted & with_label
    return counted


def rows_that_count(x: Tensor, positions: Tensor | None) -> Tensor:
    """What a layer reads as rows (n, in), without the positions that do not count where x has such positions."""
    if positions is not None and x.shape[:-1] == positions.shape:
        return x[positions.to(x.device)]
    return x.reshape(-1, x.shape[-1])


def features(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, whatever it stores."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def passes(sizes: Mapping[str, int], batches: int, what: str) -> Iterator[tuple[list[str], tqdm]]:
    """The names in parts whose sizes together fit into ``ROOM`` (one at least), and a bar that counts their batches."""
    parts: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if size > left:
            parts.append([])
            left = ROOM
        parts[-1].append(name)
        left -= size
    quiet = os.environ.get("LORA_EDU_PROGRESS") == "0"
    with tqdm(total=len(parts) * batches, desc=what, unit="batch", delay=3, disable=quiet) as bar:
        for part in parts:
            yield part, bar


def started_builder(layer_class: type[LoRALinear]) -> Build:
    """A builder of plain LoRA layers that start at the A and B which ``prepare`` put into ``context.shared``."""

    def build(base: nn.Module, name: str, config: LoraConfig, context: InjectionContext) -> AdapterLayer:
        layer = layer_class(base, **config.settings_of(name), **context.settings)
        A, B = context.shared.pop(name)
        with torch.no_grad():
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
        return layer

    return build


def settings_in(config: LoraConfig, field: str, kind: type[Any]) -> Any:
    """The settings of a start that stand in this field of the config, or their defaults.

    Raises:
        TypeError: if it is something else.
    """
    settings = getattr(config, field)
    if settings is not None and not isinstance(settings, kind):
        raise TypeError(f"{field}={settings!r}: expected {kind.__name__}(...), or None for its defaults")
    return settings or kind()


def exactly(name: str) -> str:
    """The key of ``rank_pattern`` that fits the module of this name and no other."""
    return f"^{re.escape(name)}"
