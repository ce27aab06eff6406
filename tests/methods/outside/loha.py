"""LoHa-like: an entrywise product of two low-rank matrices. PEFT's names, none of LoRA's; no ``update``, no factors."""

import math
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, at_least_float32
from lora_edu.core.config import AdapterConfig
from lora_edu.core.methods import register

KEYS = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"


class LoHaLayer(AdapterLayer):
    """y = W x + b + s · ((w1_a w1_b) ⊙ (w2_a w2_b)) x."""

    additive = True

    def __init__(self, base, r, alpha, **settings):
        super().__init__(base, **settings)
        inside, out = self.features()
        self.scaling = alpha / r
        self.hada_w1_a, self.hada_w2_a = self.new_parameter(out, r), self.new_parameter(out, r)
        self.hada_w1_b, self.hada_w2_b = self.new_parameter(r, inside), self.new_parameter(r, inside)
        for key in KEYS[:3]:  # the last stays at zero
            nn.init.kaiming_uniform_(getattr(self, key), a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)
        return (y + self.update(x)).to(y.dtype) if self.applies_in_forward() else y

    def adapted(self, weight, bias):
        w1_a, w1_b, w2_a, w2_b = map(at_least_float32, self.adapter_parameters())
        return weight + self.oriented(self.scaling * (w1_a @ w1_b) * (w2_a @ w2_b)), bias

    def adapter_parameters(self):
        return [getattr(self, key) for key in KEYS]

    def to_file(self):
        return {key: getattr(self, key) for key in KEYS}


@dataclass
class LoHaLikeConfig(AdapterConfig):
    peft_type = "LOHA_LIKE"
    lacks = ("bias", "fan_in_fan_out")
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True


def build(base, name, config, context):
    return LoHaLayer(base, config.r, config.alpha, **context.settings)


register("LoHa-like", LoHaLikeConfig, {nn.Linear: build, Conv1D: build})
