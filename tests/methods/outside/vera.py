"""VeRA-like: two random matrices for all layers, stored once in the file; each layer trains two vectors."""

from dataclasses import dataclass

import torch
from torch import nn

from lora_edu.core.adapter import AdapterLayer, at_least_float32
from lora_edu.core.config import AdapterConfig
from lora_edu.core.methods import register

KEYS = "base_model.vera_A", "base_model.vera_B"


class Projections(nn.Module):
    """A (r, largest in) and B (largest out, r): in one module, which moves with the model and stays one."""

    def __init__(self, A, B):
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("B", B)


class VeraLayer(AdapterLayer):
    """y = W x + b + diag(λ_b) B diag(λ_d) A x, with slices of the shared A and B."""

    additive = True

    def __init__(self, base, shared, d_initial, **settings):
        super().__init__(base, **settings)
        self.shared = shared.to(self.weight.device)
        self.vera_lambda_b = self.new_parameter(self.features()[1])
        self.vera_lambda_d = self.new_parameter(len(shared.A))
        nn.init.constant_(self.vera_lambda_d, d_initial)

    def forward(self, x):
        y = self.base(x)
        return (y + self.update(x)).to(y.dtype) if self.applies_in_forward() else y

    def factors(self):
        inside, out = self.features()
        A = at_least_float32(self.vera_lambda_d)[:, None] * self.shared.A[:, :inside]
        return A, at_least_float32(self.vera_lambda_b)[:, None] * self.shared.B[:out], 1.0, 0.0

    def adapted(self, weight, bias):
        A, B, _, _ = self.factors()
        return weight + self.oriented(B @ A), bias

    def adapter_parameters(self):
        return [self.vera_lambda_b, self.vera_lambda_d]

    def to_file(self):
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}


@dataclass
class VeraLikeConfig(AdapterConfig):
    peft_type = "VERA_LIKE"
    lacks = ("exclude_modules",)
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    def shared_to_file(self, context):
        shared = context.shared["vera"]
        return dict(zip(KEYS, (shared.A, shared.B), strict=True)) if self.save_projection else {}

    def shared_from_file(self, tensors, context):
        if self.save_projection:
            context.shared["vera"] = Projections(*(tensors[key] for key in KEYS))


def build(base, name, config, context):
    if "vera" not in context.shared:
        shapes = [layer.weight.shape for layer in config.targets.values()]
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        A = torch.randn(config.r, max(inside for _, inside in shapes), generator=generator)
        B = torch.randn(max(out for out, _ in shapes), config.r, generator=generator)
        like = at_least_float32(base.weight)
        context.shared["vera"] = Projections(A.to(like), B.to(like))
    return VeraLayer(base, context.shared["vera"], config.d_initial, **context.settings)


register("VeRA-like", VeraLikeConfig, {nn.Linear: build})
