"""DoRA-like: not a sum. Derives from LoRA, and must not pass for it in mixed batches, fast layers or beside others."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lora_edu import LoraConfig, LoRALinear
from lora_edu.core.adapter import at_least_float32
from lora_edu.core.methods import register


class MagnitudeLinear(LoRALinear):
    """y = (m / ‖W + ΔW‖) ⊙ (W + ΔW) x + b, a norm and a trained magnitude for each row."""

    def __init__(self, base, **settings):
        super().__init__(base, **settings)
        norms = torch.linalg.vector_norm(at_least_float32(self.weight), dim=1)
        self.lora_magnitude_vector = nn.Parameter(norms.to(self.adapter_dtype))

    def forward(self, x):
        if not self.applies_in_forward():
            return self.base(x)
        weight, bias = self.effective_pair()
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    def adapted(self, weight, bias):
        direction = weight + self.delta_weight()
        norm = torch.linalg.vector_norm(direction, dim=1).detach()
        return (at_least_float32(self.lora_magnitude_vector) / norm)[:, None] * direction, bias

    def adapter_parameters(self):
        return [*super().adapter_parameters(), self.lora_magnitude_vector]

    def to_file(self):
        return super().to_file() | {"lora_magnitude_vector": self.lora_magnitude_vector}


@dataclass
class DoraLikeConfig(LoraConfig):
    peft_type = "DORA_LIKE"


def build(base, name, config, context):
    return MagnitudeLinear(base, r=config.rank_of(name), lora_alpha=config.alpha_of(name), **context.settings)


register("DoRA-like", DoraLikeConfig, {nn.Linear: build})
