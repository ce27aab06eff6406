"""Bottleneck adapters: a small network after a layer, the first adapters for transformers. Built in lesson 15.

PEFT has none. Sources: Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751), section 2; Pfeiffer et al. 2020
(https://arxiv.org/abs/2005.00247).

Idea: A small network stands behind attention and behind the feed-forward network of every block, with a narrow layer
in its middle. It adds to what passes through, so that with its last layer at zero the model starts as it was.
Formula: h → h + U f(D h + d) + u, with D (m, out), U (out, m) and a non-linear f
Cost: 2 · m · out + m + out numbers for each. The network waits for its layer: two more small products one after the
other in every forward pass, in use as in training.
Merging: none. Because of f no single weight does the same.
Papers: [Houlsby et al. 2019](https://arxiv.org/abs/1902.00751) come within 0.4 % of full fine-tuning on GLUE with 3.6 %
of its numbers. [Hu et al. 2021](https://arxiv.org/abs/2106.09685) measure 20 to 30 % more latency for GPT-2 at batch 1,
and 2 to 3 % at large batches. [Pfeiffer et al. 2020](https://arxiv.org/abs/2005.00247) keep only the second of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer
from lora_edu.core.config import AdapterConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.layer import check_rank
from lora_edu.core.methods import InjectionContext, register

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}

# The last linear layer of attention and of the feed-forward network, by model type.
LAST_LAYERS: dict[str, tuple[str, str]] = {
    "bert": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
    "electra": ("attention.output.dense", "output.dense"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), ("o_proj", "down_proj")),
}


class BottleneckLayer(AdapterLayer):
    """A frozen layer and a small network behind it: h → h + U f(D h + d) + u, where h = W x + b.

    Args:
        base: the layer to adapt; its weight (out, in) and bias are frozen.
        bottleneck_size: m, the width of the small network.
        non_linearity: f: ``"relu"``, ``"gelu"`` or ``"silu"``.
        dropout: probability of zeroing an entry of f(…), in training only.

    Shapes:
        x: (..., in) → (..., out). ``down``: (m, out) with bias (m). ``up``: (out, m) with bias (out).
        So it trains 2·m·out + m + out numbers.

    ``up`` starts at zero, and training so at the base model; the paper draws it from N(0, 0.01²). Because of f no
    single weight can stand for the layer: it cannot be merged, and costs its time in every forward pass.
    """

    mergeable = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        if not self.applies_in_forward():
            return h
        inner = self.non_linearity(self.down(h.to(self.adapter_dtype)))
        return (h + self.up(self.dropout(inner))).to(h.dtype)

    def __init__(
        self,
        base: nn.Module,
        bottleneck_size: int = 16,
        non_linearity: str = "relu",
        dropout: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(base, **settings)
        out = self.features()[1]
        self.down = nn.Linear(out, bottleneck_size, device=self.weight.device, dtype=self.adapter_dtype)
        self.up = nn.Linear(bottleneck_size, out, device=self.weight.device, dtype=self.adapter_dtype)
        self.non_linearity = NON_LINEARITIES[non_linearity]
        self.dropout = nn.Dropout(dropout)
        nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)
        for start_at_zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start_at_zero)
        self.train(base.training)

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [*self.down.parameters(), *self.up.parameters()]

    def to_file(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": parameter
            for name in ("down", "up")
            for key, parameter in getattr(self, name).named_parameters()
        }


@dataclass
class BottleneckConfig(AdapterConfig):
    """Settings of bottleneck adapters.

    Args:
        target_modules: the layers behind which one stands; None means what ``placement`` says.
        bottleneck_size: width of the small network.
        non_linearity: ``"relu"``, ``"gelu"`` or ``"silu"``.
        dropout: probability of dropping an entry behind the non-linearity, in training.
        placement: with ``target_modules=None``: ``"houlsby"`` puts one behind attention and one behind the
            feed-forward network of every block, ``"pfeiffer"`` only the second.

    Raises:
        ValueError: for a size below 1 or not whole, an unknown non-linearity or placement.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"

    bottleneck_size: int = 16
    non_linearity: str = "relu"
    dropout: float = 0.0
    placement: str = "houlsby"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.bottleneck_size = check_rank(self.bottleneck_size)
        except ValueError:
            raise ValueError(
                f"bottleneck_size={self.bottleneck_size!r}: expected a whole number of at least 1, for example 16"
            ) from None
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout={self.dropout!r}: expected a probability between 0 and 1, for example 0.1")
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(
                f"non_linearity={self.non_linearity!r}: expected one of {', '.join(map(repr, NON_LINEARITIES))}"
            )
        if self.placement not in ("houlsby", "pfeiffer"):
            raise ValueError(f"placement={self.placement!r}: expected 'houlsby' or 'pfeiffer'")

    def default_targets(self, model: nn.Module, modules: dict[str, nn.Module]) -> Sequence[str]:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in LAST_LAYERS:
            raise ValueError(
                f"target_modules=None: there are no default places of bottleneck adapters for model type {kind!r}; "
                "name the last linear layers of attention and of the feed-forward network"
            )
        attention, feedforward = LAST_LAYERS[kind]
        behind_attention = [name for name in modules if name.endswith(f".{attention}")]
        behind_both = [*behind_attention, *(name for name in modules if name.endswith(f".{feedforward}"))]
        if self.placement == "houlsby":
            return list(dict.fromkeys(behind_both))
        return [name for name in behind_both if name not in behind_attention]


def build(base: nn.Module, name: str, config: BottleneckConfig, context: InjectionContext) -> AdapterLayer:
    """The layer with a small network behind it, for the module called ``name``."""
    settings = config.bottleneck_size, config.non_linearity, config.dropout
    return BottleneckLayer(base, *settings, **context.settings)


register("bottleneck", BottleneckConfig, {nn.Linear: build, Conv1D: build})

register_entrant(
    "bottleneck-m32",  # on each base between 0.89 and 0.96 of the numbers of LoRA at r=8 on all linear layers
    method="Bottleneck adapters",
    config=lambda place: BottleneckConfig(bottleneck_size=32),
    rates={
        "tiny": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
        "smollm2-135m": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        "minilm": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    },
    card=__doc__,
)
