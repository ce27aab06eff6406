"""AdaLoRA-like: s · B (E ⊙ A), which loses rows of least importance while it trains; ``rank_pattern`` of booleans."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lora_edu.core.adapter import AdapterLayer, at_least_float32
from lora_edu.core.config import AdapterConfig
from lora_edu.core.methods import register


class SVDLayer(AdapterLayer):
    """y = W x + b + s · B (E ⊙ A) x. In training all rows stay and some of E are zero; a file holds the others."""

    additive = True

    def __init__(self, base, r, scaling, **settings):
        super().__init__(base, **settings)
        inside, out = self.features()
        self.scaling = scaling
        self.lora_A, self.lora_B = self.new_parameter(r, inside), self.new_parameter(out, r)
        self.lora_E = self.new_parameter(r, 1)
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool, device=self.weight.device))

    def forward(self, x):
        y = self.base(x)
        return (y + self.update(x)).to(y.dtype) if self.applies_in_forward() else y

    def update(self, x):
        A, B, scaling, _ = self.factors()
        return scaling * F.linear(F.linear(x.to(A.dtype), A), B)

    def factors(self):
        return self.lora_A * self.lora_E, self.lora_B, self.scaling, 0.0

    def adapted(self, weight, bias):
        A, B, scaling, _ = self.factors()
        return weight + self.oriented(scaling * at_least_float32(B) @ at_least_float32(A)), bias

    def prune(self):
        with torch.no_grad():
            self.lora_E[~self.kept] = 0

    def adapter_parameters(self):
        return [self.lora_A, self.lora_B, self.lora_E]

    def to_file(self):
        kept = self.kept
        return {"lora_A": self.lora_A[kept], "lora_B": self.lora_B[:, kept], "lora_E": self.lora_E[kept]}

    def from_file(self, tensors):  # to_file gives copies, which the default would fill in vain
        with torch.no_grad():
            kept = self.kept
            self.lora_A[kept] = tensors["lora_A"].to(self.lora_A)
            self.lora_B[:, kept] = tensors["lora_B"].to(self.lora_B)
            self.lora_E[kept] = tensors["lora_E"].to(self.lora_E)


@dataclass
class AdaLoraLikeConfig(AdapterConfig):
    peft_type = "ADALORA_LIKE"
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    init_lora_weights: bool = True
    target_r: int = 2
    init_r: int = 4
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 2
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int = 8
    rank_pattern: dict[str, list[bool]] | None = None

    def extra_loss(self):
        """Keep the rows of A and the columns of B orthogonal."""
        losses = []
        for layer in self.layers.values():
            for square in (layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B):
                losses.append(torch.linalg.matrix_norm(square - torch.eye(len(square)).to(square)))
        return self.orth_reg_weight * torch.stack(losses).mean()

    def after_step(self, step):
        """Every deltaT steps, keep the rows whose |E · gradient| is largest over all layers."""
        layers = list(self.layers.values())
        if step % self.deltaT == 0:
            scores = torch.stack([(layer.lora_E * layer.lora_E.grad).abs().flatten() for layer in layers])
            least = scores.flatten().topk(self.target_r * len(layers)).values[-1]
            for layer, score in zip(layers, scores, strict=True):
                layer.kept.copy_(score >= least)
        for layer in layers:
            layer.prune()

    def to_file(self):
        pattern = {f"{name}.lora_E": layer.kept.tolist() for name, layer in self.layers.items()}
        return super().to_file() | {"rank_pattern": pattern}


def build(base, name, config, context):
    pattern = config.rank_pattern or {}
    r = sum(pattern[f"{name}.lora_E"]) if pattern else config.init_r
    return SVDLayer(base, r, config.lora_alpha / (config.init_r + 1e-5), **context.settings)


register("AdaLoRA-like", AdaLoraLikeConfig, {nn.Linear: build})
