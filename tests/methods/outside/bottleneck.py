"""Bottleneck-like: a small network after a layer. Not linear, so no weight can stand for it."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer
from lora_edu.core.config import AdapterConfig
from lora_edu.core.methods import register


class BottleneckLayer(AdapterLayer):
    """y → y + up relu(down y), where y = W x + b."""

    mergeable = False

    def __init__(self, base, size, **settings):
        super().__init__(base, **settings)
        out, like = self.features()[1], {"device": self.weight.device, "dtype": self.adapter_dtype}
        self.down, self.up = nn.Linear(out, size, **like), nn.Linear(size, out, **like)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        y = self.base(x)
        if not self.applies_in_forward():
            return y
        return (y + self.up(torch.relu(self.down(y.to(self.adapter_dtype))))).to(y.dtype)

    def adapter_parameters(self):
        return [*self.down.parameters(), *self.up.parameters()]

    def to_file(self):
        return {f"{name}.{key}": p for name in ("down", "up") for key, p in getattr(self, name).named_parameters()}


@dataclass
class BottleneckLikeConfig(AdapterConfig):
    peft_type = "BOTTLENECK_LIKE"
    size: int = 4


def build(base, name, config, context):
    return BottleneckLayer(base, config.size, **context.settings)


register("bottleneck-like", BottleneckLikeConfig, {nn.Linear: build, Conv1D: build})
