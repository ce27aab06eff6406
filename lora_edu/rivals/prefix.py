"""Prefix tuning: trained keys and values that every attention layer finds before those of the row. Lesson 15.

PEFT's name: ``PREFIX_TUNING``. Source: Li and Liang 2021 (https://arxiv.org/abs/2101.00190), section 4.

Idea: Every attention layer finds a few trained keys and values before those of the text. They work as if the model had
read some words before, words that need not exist.
Formula: softmax(q [P_k; K]ᵀ / √d) [P_v; V], with P_k and P_v trained in every layer
Cost: 2 · layers · w numbers for each virtual token, with keys of width w in all their heads. In use each token costs
its place in every layer's cache and in the context that the model can read.
Merging: none; no weight does the same.
Papers: [Li and Liang 2021](https://arxiv.org/abs/2101.00190) report full fine-tuning's quality in generation with 0.1 %
of its numbers, and that training the prefix directly is unstable: they make it by a small network while it trains,
which is left out here. [Hu et al. 2021](https://arxiv.org/abs/2106.09685) see its quality fall on GPT-3 once it has
more than 32 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from lora_edu.core.entrants import register_entrant
from lora_edu.core.methods import register
from lora_edu.rivals.virtual import VirtualTokens, VirtualTokensConfig


class Prefix(VirtualTokens):
    """softmax(q [P_k; K]ᵀ / √d) [P_v; V] in every attention layer, with P_k and P_v trained.

    They enter as if the model had read these tokens before: as past keys and values. Keys are put there as they are,
    without rotation by their position.

    Shapes:
        embeddings: (tokens, layers · 2 · heads · head width): for each token, key and value of layer 0, of layer 1, …
    """

    place = "past keys and values"

    def __init__(self, backbone: Any, embeddings: Tensor, adapter_name: str, layers: int, heads: int):
        super().__init__(backbone, embeddings, adapter_name)
        self.layers, self.heads = layers, heads

    def add(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.backbone.training and getattr(self.backbone, "gradient_checkpointing", False):
            raise ValueError(
                "with gradient checkpointing the layers get no past keys and values, and so no prefix: switch it off "
                "with model.gradient_checkpointing_disable()"
            )
        cache = inputs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:  # while generating, later steps have it in their cache
            tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            inputs["past_key_values"] = cache = DynamicCache(config=self.backbone.config) if cache is None else cache
            for layer, (keys, values) in enumerate(self.keys_and_values(len(tokens))):
                cache.update(keys, values, layer)
        return inputs

    def keys_and_values(self, rows: int) -> Tensor:
        """The prefix for a batch: (layers, 2, rows, heads, tokens, head width)."""
        dtype = self.backbone.get_input_embeddings().weight.dtype
        one = self.embeddings.to(dtype).view(len(self.embeddings), self.layers, 2, self.heads, -1)
        return one.permute(1, 2, 3, 0, 4).unsqueeze(2).expand(-1, -1, rows, -1, -1, -1)


@dataclass
class PrefixTuningConfig(VirtualTokensConfig):
    """Settings of prefix tuning. Names, defaults and meaning are PEFT's (``num_virtual_tokens``, there None, is 20).

    Training starts away from the base model: even zeros (``init_weights="zero"``) take a share of the attention.

    Args:
        init_weights: None draws from N(0, 1), as PEFT; ``"zero"`` starts at zeros.
        prefix_projection: in the paper a small network makes the prefix while it trains. Here the prefix trains
            itself: True is refused. A file of PEFT's holds the prefix in any case, and is read.
        encoder_hidden_size: width of that network; only read and written.

    Raises:
        ValueError: for ``prefix_projection=True``, or another word for ``init_weights``.
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    init_weights: str | None = None
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_projection:
            raise ValueError(
                "prefix_projection=True: the network that makes the prefix is not supported here; train the prefix "
                "itself, or train with PEFT, whose file loads here"
            )
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights={self.init_weights!r}: expected None or 'zero'")

    def sizes(self, config: Any) -> dict[str, int]:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return super().sizes(config) | {"num_attention_heads": heads, "token_dim": heads * width}

    def start(self, words: Tensor) -> Tensor:
        assert self.num_layers is not None
        assert self.token_dim is not None
        shape = self.num_virtual_tokens, 2 * self.num_layers * self.token_dim
        start = torch.zeros(shape) if self.init_weights == "zero" else torch.randn(shape)
        return start.to(words.device)

    def tokens(self, backbone: Any, start: Tensor, adapter_name: str) -> Prefix:
        assert self.num_layers is not None
        assert self.num_attention_heads is not None
        return Prefix(backbone, start, adapter_name, self.num_layers, self.num_attention_heads)

    @classmethod
    def from_file(cls, fields: Mapping[str, Any]) -> Any:
        return super().from_file({**fields, "prefix_projection": False})


register("prefix tuning", PrefixTuningConfig, {})

register_entrant(
    "prefix-20",
    method="Prefix tuning",
    config=lambda place: PrefixTuningConfig(num_virtual_tokens=20),
    rates={
        "tiny": (5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1),
        "smollm2-135m": (5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1),
        "minilm": (5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
    },
    card=__doc__,
)
