"""PiSSA-like: starts away from zero, at the base's largest singular directions, and leaves the base as it came.

Its file is a plain LoRA of twice the rank, for the pristine base, and is read as such.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lora_edu import LoraConfig, LoRALinear
from lora_edu.core.adapter import at_least_float32
from lora_edu.core.methods import register


class ShiftedLinear(LoRALinear):
    """y = W x + b + s · [B, −B₀] [A; A₀] drop(x), where A₀ and B₀ are the start."""

    def __init__(self, base, **settings):
        super().__init__(base, **settings)
        U, S, V = torch.linalg.svd(at_least_float32(self.weight), full_matrices=False)
        root = (S[: self.r] / self.scaling).sqrt()
        with torch.no_grad():
            self.lora_A.copy_(root[:, None] * V[: self.r])
            self.lora_B.copy_(U[:, : self.r] * root)
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", -self.lora_B.detach().clone())

    def factors(self):
        A, B = torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, self.start_B], dim=1)
        return A, B, *super().factors()[2:]

    def update(self, x):
        A, B, scaling, _ = self.factors()
        return F.linear(F.linear(self.dropout(x.to(A.dtype)), A), B) * scaling

    def delta_weight(self):
        A, B, scaling, _ = self.factors()
        return scaling * (at_least_float32(B) @ at_least_float32(A))

    def to_file(self):
        A, B, _, _ = self.factors()
        return {"lora_A.weight": A, "lora_B.weight": B}


@dataclass
class PissaLikeConfig(LoraConfig):
    """It inherits its ``peft_type``: files are LoRA's."""

    def to_file(self):
        return as_plain_lora(super().to_file())


def as_plain_lora(fields):
    """Twice the rank at the same scale s = alpha / r, or alpha / √r."""
    alpha = 2**0.5 if fields["use_rslora"] else 2
    return fields | {
        "r": 2 * fields["r"],
        "lora_alpha": alpha * fields["lora_alpha"],
        "rank_pattern": {name: 2 * r for name, r in fields["rank_pattern"].items()},
        "alpha_pattern": {name: alpha * a for name, a in fields["alpha_pattern"].items()},
    }


def build(base, name, config, context):
    return ShiftedLinear(
        base,
        r=config.rank_of(name),
        lora_alpha=config.alpha_of(name),
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        **context.settings,
    )


register("PiSSA-like", PissaLikeConfig, {nn.Linear: build})
