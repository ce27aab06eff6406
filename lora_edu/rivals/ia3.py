"""(IA)³: scale what some layers put out, or what they read, by a trained vector. Built in lesson 15.

PEFT's name: ``IA3``. Source: Liu et al. 2022 (https://arxiv.org/abs/2205.05638), section 3.3.

Idea: Nothing is added to a weight. Keys, values and what the feed-forward network's last layer reads are multiplied by
trained vectors, one number for each of their entries.
Formula: y = l ⊙ (W x + b), and in the feed-forward network y = W (l ⊙ x) + b
Cost: one number for each output, or input, of a scaled layer, the fewest of all here that change every layer. Each
forward pass multiplies once more for each of them.
Merging: exact up to one rounding: the rows or columns of W, and its bias, are multiplied by l.
Papers: [Liu et al. 2022](https://arxiv.org/abs/2205.05638) propose it as part of T-Few, which with a few examples
beats prompting a much larger model; their recipe has pretraining and two further losses besides. [He et al.
2021](https://arxiv.org/abs/2110.04366) put such methods into one scheme, and find that where the change is made
matters more than what it is called.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, Pair, at_least_float32
from lora_edu.core.config import AdapterConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.matching import check_regex
from lora_edu.core.methods import InjectionContext, register

# What PEFT scales when nothing is said, by model type: the layers, and those among them whose inputs are scaled.
DEFAULTS: dict[str, tuple[list[str], list[str]]] = {
    "t5": (["k", "v", "wo"], ["wo"]),
    "mt5": (["k", "v", "wi_1"], []),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bloom": (["query_key_value", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]),
    "roberta": (["key", "value", "output.dense"], ["output.dense"]),
    "opt": (["q_proj", "k_proj", "fc2"], ["fc2"]),
    "gptj": (["q_proj", "v_proj", "fc_out"], ["fc_out"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "gpt_neo": (["q_proj", "v_proj", "c_proj"], ["c_proj"]),
    "bart": (["q_proj", "v_proj", "fc2"], ["fc2"]),
    "gpt_bigcode": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "llama4": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "mistral": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "mixtral": (["k_proj", "v_proj", "w2"], ["w2"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "deberta-v2": (["key_proj", "value_proj", "output.dense"], ["output.dense"]),
    "deberta": (["in_proj", "output.dense"], ["output.dense"]),
    "RefinedWebModel": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "RefinedWeb": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "falcon": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "phi": (["q_proj", "v_proj", "fc2"], ["fc2"]),
    "gemma": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gemma2": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gemma3_text": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen2": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen3": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
}


class IA3Layer(AdapterLayer):
    """A frozen layer with a trained scale: y = l ⊙ (W x + b), or y = W (l ⊙ x) + b in a feed-forward layer.

    Args:
        base: the layer to adapt; its weight (out, in) and bias are frozen.
        feedforward: scale the inputs instead of the outputs.
        init_ia3_weights: start at ones, and so at the base model; otherwise at random, for tests.

    Shapes:
        x: (..., in) → (..., out). ``ia3_l``: (out, 1), or (1, in) in a feed-forward layer.

    A scale is no sum: the layer merges into a dense one, and stands beside no other adapter of the same weight.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.applies_in_forward():
            return self.base(x)
        scale = self.ia3_l.flatten()
        if self.feedforward:
            return self.base((x.to(scale.dtype) * scale).to(x.dtype))
        y = self.base(x)
        return (y * scale).to(y.dtype)

    def adapted(self, weight: Tensor, bias: Tensor | None) -> Pair:
        # l as a column (out, 1) scales the rows of W and the bias; as a row (1, in) it scales the columns of W alone.
        scale = at_least_float32(self.ia3_l)
        scaled = weight * self.oriented(scale)
        return scaled, bias if self.feedforward or bias is None else bias * scale.flatten()

    def __init__(
        self, base: nn.Module, feedforward: bool = False, init_ia3_weights: bool = True, **settings: Any
    ) -> None:
        super().__init__(base, **settings)
        self.feedforward = feedforward
        inside, outside = self.features()
        self.ia3_l = self.new_parameter(1, inside) if feedforward else self.new_parameter(outside, 1)
        if init_ia3_weights:
            nn.init.ones_(self.ia3_l)
        else:
            nn.init.normal_(self.ia3_l)

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [self.ia3_l]

    def to_file(self) -> dict[str, Tensor]:
        return {"ia3_l": self.ia3_l}


@dataclass
class IA3Config(AdapterConfig):
    """Settings of (IA)³. Names, defaults and meaning are PEFT's.

    Args:
        target_modules: as in ``LoraConfig``; None means the family's default: keys, values, the feed-forward's last.
        feedforward_modules: those among them whose inputs are scaled: a list of name endings, or a regular expression.
            None means the family's default, an empty list none.
        init_ia3_weights: start at ones.

    Raises:
        ValueError: if ``feedforward_modules`` names what ``target_modules`` does not.
    """

    peft_type: ClassVar[str] = "IA3"
    lacks: ClassVar[tuple[str, ...]] = ("bias", "layers_to_transform", "layers_pattern")

    feedforward_modules: str | Sequence[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, str):
            check_regex("feedforward_modules", self.feedforward_modules)
            return
        if self.feedforward_modules is not None:
            self.feedforward_modules = sorted(set(self.feedforward_modules))
            if isinstance(self.target_modules, list) and (
                more := [name for name in self.feedforward_modules if name not in self.target_modules]
            ):
                raise ValueError(f"feedforward_modules={more} are not among target_modules={self.target_modules}")

    def default_targets(self, model: nn.Module, modules: dict[str, nn.Module]) -> Sequence[str]:
        return self.family(model, "target_modules")[0]

    def complete(self, model: nn.Module) -> None:
        if self.feedforward_modules is None:
            self.feedforward_modules = self.family(model, "feedforward_modules")[1]

    def family(self, model: nn.Module, field: str) -> tuple[list[str], list[str]]:
        """The defaults for this kind of model."""
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in DEFAULTS:
            raise ValueError(
                f"{field}=None: there are no defaults of (IA)³ for model type {kind!r}; name the layers to scale in "
                "target_modules, and those whose inputs are scaled in feedforward_modules ([] for none)"
            )
        targets, feedforward = DEFAULTS[kind]
        return list(targets), list(feedforward)

    def is_feedforward(self, name: str) -> bool:
        """Whether the layer called ``name`` is scaled where it reads."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(self.feedforward_modules, name) is not None
        return any(name.endswith(ending) for ending in self.feedforward_modules or ())


def build(base: nn.Module, name: str, config: IA3Config, context: InjectionContext) -> AdapterLayer:
    """The scaled layer for the module called ``name``."""
    return IA3Layer(base, config.is_feedforward(name), config.init_ia3_weights, **context.settings)


register("(IA)³", IA3Config, {nn.Linear: build, Conv1D: build})

register_entrant(
    "ia3",
    method="(IA)³",
    config=lambda place: IA3Config(),
    rates={
        "tiny": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1),
        "smollm2-135m": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
        "minilm": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
    },
    card=__doc__,
)
