"""BitFit: the biases train, and nothing else. Built in lesson 15.

PEFT has it only as ``bias="all"`` beside another method. Source: Ben Zaken et al. 2021
(https://arxiv.org/abs/2106.10199).

Idea: Every bias of the model trains, those of its layer norms too, and every weight stays. It adds nothing to the
model: the same numbers get other values.
Formula: y = W x + b, with W frozen
Cost: about 0.1 % of BERT's numbers, and no time in use. Llama's layers have no biases, so there is nothing to train.
Merging: nothing to merge; the trained biases take the place of the pretrained ones.
Papers: [Ben Zaken et al. 2021](https://arxiv.org/abs/2106.10199) report full fine-tuning's quality for BERT on GLUE
where data are few or of middle size. [Hu et al. 2021](https://arxiv.org/abs/2106.09685) find it behind LoRA on GPT-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lora_edu.core.config import AdapterConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.methods import InjectionContext, register
from lora_edu.core.parts import Part, TrainedBias


@dataclass
class BitFitConfig(AdapterConfig):
    """Settings of BitFit: y = W x + b with b trained, in every module that has a bias, layer norms included.

    It replaces no layer, its trained biases stay in the model when it is unloaded, and it costs no time. Llama's
    layers have no biases: there is then nothing to train, and ``inject`` says so. As everywhere, one model holds one
    adapter that trains biases.

    Args:
        bias: ``"all"``, the only word that has a meaning here.
        modules_to_save: name endings of modules of which a full copy trains, such as a new head.

    Raises:
        ValueError: for another word for ``bias``.
    """

    peft_type: ClassVar[str] = "BITFIT"
    replaces_layers: ClassVar[bool] = False
    lacks: ClassVar[tuple[str, ...]] = (
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"
    )  # fmt: skip

    bias: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias != "all":
            raise ValueError(f"bias={self.bias!r}: BitFit trains all biases, bias='all'")

    def parts(self, model: nn.Module, names: Sequence[str], context: InjectionContext) -> list[Part]:
        parts = super().parts(model, names, context)
        if not any(isinstance(part, TrainedBias) for part in parts):
            raise ValueError(
                f"the {type(model).__name__} has no biases to train (Llama's layers have none): BitFit has nothing to "
                "do in it; use another method"
            )
        return parts


register("BitFit", BitFitConfig, {})

register_entrant(
    "bitfit",
    method="BitFit",
    config=lambda place: BitFitConfig(),
    rates={"minilm": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)},  # the other bases are Llamas
    card=__doc__,
)
