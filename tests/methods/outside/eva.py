"""EVA-like: A starts at the directions in which a layer's inputs vary most, which needs batches of data."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lora_edu import LoraConfig, LoRALinear
from lora_edu.core.adapter import at_least_float32
from lora_edu.core.methods import register


@dataclass
class EvaLikeConfig(LoraConfig):
    peft_type = "EVA_LIKE"

    def prepare(self, model, batches):
        """The right singular vectors of each layer's inputs, and a rank for each: no more than the inputs have."""
        seen = {name: [] for name in self.targets}

        def note(name, layer, inputs):
            seen[name].append(at_least_float32(inputs[0].detach().flatten(0, -2)))

        handles = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in self.targets.items()]
        try:
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        found = {name: torch.linalg.svd(torch.cat(inputs), full_matrices=False) for name, inputs in seen.items()}
        self.rank_pattern = {name: min(self.r, int((S / S[0] > 1e-9).sum())) for name, (_, S, _) in found.items()}
        return {name: V for name, (_, _, V) in found.items()}


def build(base, name, config, context):
    layer = LoRALinear(base, r=config.rank_of(name), lora_alpha=config.alpha_of(name), **context.settings)
    if name in context.shared:  # an adapter from a file has its values there
        with torch.no_grad():
            layer.lora_A.copy_(context.shared[name][: layer.r])
    return layer


register("EVA-like", EvaLikeConfig, {nn.Linear: build})
