"""Prefix-like: replaces no layer. A vector, trained, is added to what a module gets to read."""

from dataclasses import dataclass

import torch
from torch import nn

from lora_edu.core.config import AdapterConfig
from lora_edu.core.matching import named_places
from lora_edu.core.methods import register
from lora_edu.core.parts import Part


class InputVector(Part):
    """x → x + v on the way into one module. A plain model has no place for v."""

    unloadable = False

    def __init__(self, place, module, size, adapter_name):
        like = next(module.parameters())
        self.place, self.module, self.name = place, module, f"input_vector_{adapter_name}"
        self.vector = nn.Parameter(torch.zeros(size, device=like.device, dtype=like.dtype))
        self.handle = None

    def parameters(self):
        return [self.vector]

    def install(self):
        self.module.register_parameter(self.name, self.vector)  # so that it moves, counts and trains with the model

    def use(self, on):
        if self.handle is not None:
            self.handle.remove()
        self.handle = self.module.register_forward_pre_hook(self.add) if on else None

    def add(self, module, inputs):  # a method, not a closure: a copy of the model gets its own
        return (inputs[0] + self.vector, *inputs[1:])

    def to_file(self):
        return {"prompt_embeddings": self.vector}

    def unload(self):
        self.use(False)
        del self.module._parameters[self.name]


@dataclass
class PrefixLikeConfig(AdapterConfig):
    peft_type = "PREFIX_LIKE"
    replaces_layers = False
    lacks = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out")
    place: str = "mlp"
    size: int = 1

    def parts(self, model, names, context):
        found = [(name, module) for name, _, _, module in named_places(model) if name.endswith(self.place)]
        if not found:
            raise ValueError(f"place={self.place!r}: no module has such a name")
        name, module = found[0]
        return [*super().parts(model, names, context), InputVector(name, module, self.size, context.adapter_name)]


register("prefix-like", PrefixLikeConfig, {})
