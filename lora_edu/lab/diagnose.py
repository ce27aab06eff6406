"""Small tools that look inside a run which went wrong. Built in lesson 11.

Each answers one question: what trains, where did the gradient arrive, which weights changed, what is missing from the
file, which tokens count in the loss. They read and never change the model, and work with PEFT's models as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_edu.core.adapter import AdapterLayer, adapters_around
from lora_edu.core.matching import Wrapper, named_places
from lora_edu.core.parts import TrainedCopy
from lora_edu.core.state import unwrapped_model

IGNORED = -100  # the label that cross-entropy leaves out
GRADIENTS = ("arrived", "zero", "none", "not finite")


def what_trains(model: nn.Module) -> dict[str, int]:
    """How many numbers train in each kind of parameter: ``{"q_proj.lora_A": 4608, "score": 1920}``.

    A kind is the end of the name: layers with the same last names are added up. Empty if everything is frozen.
    """
    counts: Counter[str] = Counter()
    for name, parameter in training_parameters(model):
        counts[kind_of(name)] += parameter.numel()
    return dict(counts)


@dataclass(frozen=True)
class GradientReport:
    """Where the last backward pass arrived, among the parameters that should train.

    ``counts[kind]`` tells for each kind of parameter how many tensors have a gradient that "arrived", is "zero",
    is missing ("none"), or is "not finite".
    """

    counts: dict[str, dict[str, int]]

    def total(self, state: str) -> int:
        """The number of tensors in one of the four states."""
        return sum(count[state] for count in self.counts.values())

    def __str__(self) -> str:
        width = max([len(kind) for kind in self.counts] + [9])
        lines = [f"{'parameter':{width}}  " + "  ".join(f"{state:>10}" for state in GRADIENTS)]
        for kind, count in [*self.counts.items(), ("all", {state: self.total(state) for state in GRADIENTS})]:
            lines.append(f"{kind:{width}}  " + "  ".join(f"{count[state] or '.':>10}" for state in GRADIENTS))
        return "\n".join(lines)


def gradient_report(model: nn.Module) -> GradientReport:
    """Look at the gradients of everything that requires one; call it after ``loss.backward()``.

    In the very first step of a LoRA run the gradient of A is zero, because B is; from the second on it is not.

    Raises:
        ValueError: if nothing requires a gradient.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in training_parameters(model):
        counts.setdefault(kind_of(name), dict.fromkeys(GRADIENTS, 0))[state_of(parameter.grad)] += 1
    if not counts:
        raise ValueError("nothing in this model requires a gradient; inject an adapter, or unfreeze weights")
    return GradientReport(counts)


def state_of(gradient: Tensor | None) -> str:
    """One of the four words of a gradient report."""
    if gradient is None:
        return "none"
    if not torch.isfinite(gradient).all():
        return "not finite"
    return "arrived" if gradient.any() else "zero"


def not_finite(model: nn.Module) -> list[str]:
    """The parameters that hold NaN or infinity, by name."""
    return [name for name, parameter in original_parameters(model).items() if not torch.isfinite(parameter).all()]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter under its original name, to compare with later. A tied weight has both its names."""
    return {name: parameter.detach().clone() for name, parameter in original_parameters(model).items()}


def weights_changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """The names in both snapshots whose values differ, in the order of ``before``.

    Raises:
        ValueError: if the two have no name in common.
    """
    common = [name for name in before if name in after]
    if not common:
        raise ValueError(f"no name in common: before has {sorted(before)[:2]}, after has {sorted(after)[:2]}")
    return [name for name in common if not torch.equal(before[name], after[name].to(before[name]))]


def unsaved(model: nn.Module, directory: str | Path) -> list[str]:
    """Names of trainable parameters whose values are in no ``.safetensors`` file of ``directory``.

    Compared are values, not names, so that it does not matter who wrote the file. Call it before you close the model.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory}: no .safetensors file; save the adapter there first")
    stored = [tensor for path in files for tensor in load_file(path).values()]

    def is_stored(parameter: nn.Parameter) -> bool:
        same_shape = (tensor for tensor in stored if tensor.shape == parameter.shape)
        return any(torch.equal(tensor, parameter.detach().to("cpu", tensor.dtype)) for tensor in same_shape)

    return [name for name, parameter in training_parameters(model) if not is_stored(parameter)]


def counted_tokens(row: Mapping[str, Any], tokenizer: Any) -> str:
    """One encoded row as text, with each token that counts in the loss in square brackets.

    ``"<bos> politician (noun): [ One] [ who] [<eos>] <pad>"``. Labels that differ from their token are an error of
    the data, and shown as ``[token≠label]``.

    Args:
        row: ``input_ids`` and ``labels``, lists or one-dimensional tensors of the same length.
        tokenizer: the model's.

    Raises:
        ValueError: if the two differ in length.
    """
    ids, labels = [int(i) for i in row["input_ids"]], [int(i) for i in row["labels"]]
    if len(ids) != len(labels):
        raise ValueError(f"{len(ids)} input_ids and {len(labels)} labels: expected as many of each")
    text = ""
    for token, label in zip(ids, labels, strict=True):
        word = tokenizer.decode([token])
        if label == IGNORED:
            text += word
        else:
            text += f"[{word}]" if label == token else f"[{word}≠{tokenizer.decode([label])}]"
    return text


def without_gradient(model: nn.Module) -> list[str]:
    """Adapted layers whose parameters all train, and of which none has a gradient after ``loss.backward()``.

    The forward pass never called them, or its result did not enter the loss. Merged layers are left out.
    """
    parameters = [(name, layer.adapter_parameters()) for name, layer in adapters_in(model) if not layer.merged]
    holders = Counter(id(parameter) for _, each in parameters for parameter in each)
    silent = []
    for name, each in parameters:
        own = [parameter for parameter in each if holders[id(parameter)] == 1]  # a shared one has others' gradients
        if own and all(parameter.requires_grad and parameter.grad is None for parameter in own):
            silent.append(name)
    return list(dict.fromkeys(silent))


def check_called(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> list[str]:
    """The adapted layers in use that a forward pass on this batch does not reach, found by one backward pass.

    An empty list is good news. The model runs in the mode it is in: some layers are called in training only. What
    trains, and every gradient, is afterwards as it was.

    Args:
        batch: what the model is called with, as a dictionary, or as its only argument.

    Raises:
        ValueError: if no adapter of the model is in use, or all are merged.
    """
    model = unwrapped_model(model)
    in_use = [layer for _, layer in adapters_in(model) if layer.adds_to_output()]
    if not in_use:
        raise ValueError(f"no adapter is in use in this {type(model).__name__}: call inject, set_adapter or unmerge")
    before = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(False)
        for layer in in_use:
            for parameter in layer.adapter_parameters():
                parameter.requires_grad_(True)
        with torch.enable_grad():
            output = model(**batch) if isinstance(batch, Mapping) else model(batch)
            if reached := [tensor.sum() for tensor in tensors_in(output) if tensor.requires_grad]:
                torch.stack(reached).sum().backward()
        return without_gradient(model)
    finally:
        for parameter, gradient, requires_grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def adapters_in(model: nn.Module) -> list[tuple[str, AdapterLayer]]:
    """Every adapted layer of a model by its original name, each once."""
    places = [("", model), *((name, module) for name, _, _, module in named_places(unwrapped_model(model)))]
    found = {id(layer): (name, layer) for name, module in reversed(places) for layer in adapters_around(module)}
    return list(found.values())[::-1]


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, which may be one, or some in tuples, lists and dictionaries."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for each in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(each)


def training_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(original name, parameter) of everything that requires a gradient; a tied weight once, under its first name."""
    seen: set[int] = set()
    for name, parameter in original_parameters(model).items():
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def original_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by the name it has, or would have, in the plain model; A and B below the layer they adapt.

    The segments that our wrappers and PEFT's add are left out. A weight with two names, like a tied head, has two
    entries. Of a module that is trained as a copy, the copy in use has the plain name.
    """
    model = unwrapped_model(model)
    plain = getattr(model, "get_base_model", None)
    model = plain() if callable(plain) else model
    found: dict[str, nn.Parameter] = {}
    for prefix, module in [("", model), *((f"{name}.", module) for name, _, _, module in named_places(model))]:
        while isinstance(module, Wrapper):
            if isinstance(module, TrainedCopy):
                in_use = module.base if module.active is None else module.copies[module.active]
                found |= {f"{prefix}{name}": p for name, p in in_use.named_parameters()}
            elif isinstance(module, AdapterLayer):
                ending = "" if module.adapter_name == "default" else f".{module.adapter_name}"
                found |= {f"{prefix}{name}{ending}": p for name, p in module._parameters.items() if p is not None}
            module = module.base
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(prefix + name, parameter)
    return {plain_peft_name(name): parameter for name, parameter in found.items()}


def plain_peft_name(name: str) -> str:
    """A parameter's name without the segments that PEFT's wrappers add."""
    name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
    return re.sub(r"(\.lora_[^.]+)(\.default)?\.weight$|(\.lora_[^.]+\.[^.]+)\.weight$", r"\1\3", name)


def kind_of(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.lora_A`` → ``q_proj.lora_A``: what layers of the same kind have in common."""
    segments = [segment for segment in name.split(".") if segment not in ("weight", "bias")]
    place = next((i for i, segment in enumerate(segments) if segment.startswith("lora_")), len(segments))
    return ".".join(segments[max(place - 1, 0) :])
