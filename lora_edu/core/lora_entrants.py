"""LoRA in the referee's comparison: three ranks on all linear layers, and query and value only.

Idea: The pretrained weight stays frozen, and a product of two thin matrices is trained beside it. Few numbers train,
so optimizer states and files are small.
Formula: y = W x + s · B A x, with A (r, in), B (out, r) and s = lora_alpha / r
Cost: it trains r · (in + out) numbers in each adapted layer. Each forward pass computes two more small products, and
most activations are kept as in full fine-tuning.
Merging: exact up to one rounding: W + s · B A is a plain weight.
Papers: [Hu et al. 2021](https://arxiv.org/abs/2106.09685) report full fine-tuning's quality with query and value
adapted. [Biderman et al. 2024](https://arxiv.org/abs/2405.09673) find that LoRA learns less on code and mathematics,
and forgets less. [Schulman et al. 2025](https://thinkingmachines.ai/blog/lora/) find no gap on small data sets once all
layers are adapted and the rate, about ten times that of full fine-tuning, is tuned.
"""

from typing import Any

from lora_edu.core.config import LoraConfig
from lora_edu.core.entrants import Place, register_entrant

RATES: dict[str, tuple[float, ...]] = {
    "tiny": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    "smollm2-135m": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "minilm": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
}
# The fewer numbers train, the higher the best rate.
FEW_NUMBERS = RATES | {"minilm": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)}
MANY_NUMBERS = RATES | {"tiny": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)}


def _enter(name: str, rates: dict[str, tuple[float, ...]], **settings: Any) -> None:
    def config(place: Place) -> LoraConfig:
        return LoraConfig(**{"target_modules": place.targets} | settings)

    register_entrant(name, method="LoRA", config=config, rates=rates, card=__doc__)


for _r, _rates in ((2, FEW_NUMBERS), (8, RATES), (32, MANY_NUMBERS)):
    _enter(f"lora-r{_r}", _rates, r=_r, lora_alpha=2 * _r)
_qv = {"r": 8, "lora_alpha": 16, "target_modules": None}  # None: what PEFT adapts by default, query and value
_enter("lora-qv-r8", FEW_NUMBERS, **_qv)
