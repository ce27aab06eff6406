"""(IA)³-like: scales a layer's outputs, its bias included. Not additive."""

from dataclasses import dataclass, field

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, at_least_float32
from lora_edu.core.config import AdapterConfig
from lora_edu.core.methods import register


class ScaledLayer(AdapterLayer):
    """y = l ⊙ (W x + b), with l (out, 1) trained."""

    def __init__(self, base, **settings):
        super().__init__(base, **settings)
        self.ia3_l = self.new_parameter(self.features()[1], 1)
        nn.init.ones_(self.ia3_l)

    def forward(self, x):
        y = self.base(x)
        return (y * self.ia3_l.flatten()).to(y.dtype) if self.applies_in_forward() else y

    def adapted(self, weight, bias):
        scale = at_least_float32(self.ia3_l)
        return weight * self.oriented(scale), None if bias is None else bias * scale.flatten()

    def adapter_parameters(self):
        return [self.ia3_l]

    def to_file(self):
        return {"ia3_l": self.ia3_l}


@dataclass
class IA3LikeConfig(AdapterConfig):
    peft_type = "IA3_LIKE"
    lacks = ("bias", "layers_to_transform", "layers_pattern")
    feedforward_modules: list[str] = field(default_factory=list)  # PEFT scales the inputs of these
    init_ia3_weights: bool = True


def build(base, name, config, context):
    return ScaledLayer(base, **context.settings)


register("(IA)³-like", IA3LikeConfig, {nn.Linear: build, Conv1D: build})
