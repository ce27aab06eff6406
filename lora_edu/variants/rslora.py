"""rsLoRA: LoRA whose scale falls with √r instead of r. ``LoraConfig(use_rslora=True)``; seen in lesson 16.

Idea: With s = lora_alpha / r a larger rank takes smaller steps, so that its further directions may not show. rsLoRA
lets the scale fall only with √r.
Formula: y = W x + s · B A x, as LoRA's, with s = lora_alpha / √r
Cost: as LoRA's of the same rank. At one rank it is plain LoRA with √r times the alpha, so that only a rule for going
from rank to rank is new.
Merging: exact up to one rounding, as LoRA's.
Papers: [Kalajdzievski 2023](https://arxiv.org/abs/2312.03732) derives the scale, and reports that 1 / r slows the
learning of large ranks and that with 1 / √r they learn more. [Schulman et al.
2025](https://thinkingmachines.ai/blog/lora/) keep 1 / r, with which their best rate varied less than twofold from r = 4
to 512. [Chen et al. 2026](https://arxiv.org/abs/2602.06204) derive for which scales and starts the best rate stays.

The layer is ``LoRALinear``, in ``core/layer.py``; ``scale_of`` there is the whole difference.
"""

from lora_edu.core.config import LoraConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.lora_entrants import RATES

register_entrant(
    "rslora-r32",
    method="rsLoRA",
    config=lambda place: LoraConfig(r=32, lora_alpha=16, use_rslora=True, target_modules=place.targets),
    rates=RATES | {"tiny": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3), "smollm2-135m": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)},
    card=__doc__,
)
