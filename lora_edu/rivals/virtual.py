"""What prefix and prompt tuning share: virtual tokens, which a transformers model meets before the real ones.

They replace no layer: a hook on the model without its head puts them there, and the mask and the positions grow with
them. Used in lesson 15.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_edu.core.config import AdapterConfig
from lora_edu.core.layer import check_rank
from lora_edu.core.methods import InjectionContext
from lora_edu.core.parts import PREFIX, ModuleCopy, Part


class VirtualTokens(Part):
    """Trained vectors that stand before a row's tokens; what they are to the model, a subclass says in ``add``.

    Args:
        backbone: the model without its head, which reads the tokens.
        embeddings: what trains, a row for each virtual token.
    """

    unloadable: ClassVar[bool] = False

    def __init__(self, backbone: Any, embeddings: Tensor, adapter_name: str):
        self.backbone, self.parameter_name = backbone, f"virtual_tokens_{adapter_name}"
        self.embeddings = nn.Parameter(embeddings)
        self.handles: list[Any] = []

    def parameters(self) -> list[nn.Parameter]:
        return [self.embeddings]

    def install(self) -> None:
        # Registered, so that they move, count and train with the model.
        self.backbone.register_parameter(self.parameter_name, self.embeddings)

    def use(self, on: bool) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = self.hooks() if on else []

    def hooks(self) -> list[Any]:
        """Put what the method needs around the backbone's forward."""
        return [self.backbone.register_forward_pre_hook(self.before, with_kwargs=True)]

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """The backbone's arguments, with the virtual tokens among them."""
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        inputs = dict(zip(names, args, strict=False)) | kwargs
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None:
            if getattr(mask, "ndim", None) != 2:
                raise ValueError(
                    "virtual tokens need an attention_mask of shape (rows, tokens), or none: generate with the default "
                    "cache"
                )
            inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), len(self.embeddings)), mask], dim=1)
        if positions is not None:
            inputs["position_ids"] = positions + len(self.embeddings)
        return (), self.add(inputs)

    def add(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with the virtual tokens themselves; mask and positions have room for them already."""
        raise NotImplementedError

    def to_file(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.embeddings}

    def unload(self) -> None:
        self.use(False)
        self.backbone._parameters.pop(self.parameter_name, None)


class CopyWithoutTuner(ModuleCopy):
    """A copy of ``modules_to_save`` under the key that PEFT gives it beside virtual tokens: one segment less."""

    def to_file(self) -> dict[str, Tensor]:
        return {key.replace(PREFIX, "base_model.", 1): tensor for key, tensor in super().to_file().items()}


@dataclass
class VirtualTokensConfig(AdapterConfig):
    """What prefix and prompt tuning have in common. Names, defaults and meaning are PEFT's.

    Args:
        num_virtual_tokens: how many stand before each row.
        token_dim, num_attention_heads, num_layers: the model's own where they are None.
        num_transformer_submodules: 1; encoder-decoder models, which have 2, are not supported.

    Raises:
        ValueError: for a number of tokens below 1 or not whole.
    """

    replaces_layers: ClassVar[bool] = False
    lacks: ClassVar[tuple[str, ...]] = (
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out"
    )  # fmt: skip

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.num_virtual_tokens = check_rank(self.num_virtual_tokens)
        except ValueError:
            raise ValueError(
                f"num_virtual_tokens={self.num_virtual_tokens!r}: expected a whole number of at least 1, for example 20"
            ) from None
        if self.num_transformer_submodules not in (None, 1):
            raise ValueError(
                f"num_transformer_submodules={self.num_transformer_submodules}: encoder-decoder models are not "
                "supported here; use PEFT for them"
            )

    def complete(self, model: nn.Module) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"a {type(model).__name__} is no transformers model, and virtual tokens need one that takes "
                "inputs_embeds and past_key_values"
            )
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"the {type(model).__name__} has an encoder and a decoder: virtual tokens are for models of one stack "
                "here; use PEFT"
            )
        for name, value in self.sizes(model.config.get_text_config()).items():
            if (given := getattr(self, name)) not in (None, value):
                raise ValueError(f"{name}={given}, but this model has {value}: leave it out, or take the right base")
            setattr(self, name, value)

    def sizes(self, config: Any) -> dict[str, int]:
        """The fields that follow from the model."""
        return {
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "token_dim": config.hidden_size,
            "num_transformer_submodules": 1,
        }

    def parts(self, model: Any, names: Sequence[str], context: InjectionContext) -> list[Part]:
        copies = [
            CopyWithoutTuner(**vars(part)) if isinstance(part, ModuleCopy) else part
            for part in super().parts(model, names, context)
        ]
        words = model.base_model.get_input_embeddings().weight
        half = words.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half and context.autocast_adapter_dtype else words.dtype
        start = self.start(words.detach()).to(dtype)
        return [*copies, self.tokens(model.base_model, start, context.adapter_name)]

    def start(self, words: Tensor) -> Tensor:
        """Where training starts, (num_virtual_tokens, ...), on the device of the word embeddings."""
        raise NotImplementedError

    def tokens(self, backbone: Any, start: Tensor, adapter_name: str) -> VirtualTokens:
        """The part that trains."""
        raise NotImplementedError

    @classmethod
    def from_file(cls, fields: Mapping[str, Any]) -> Any:
        saved = fields.get("modules_to_save")  # PEFT repeats the names of heads in it
        return super().from_file({**fields, "modules_to_save": list(dict.fromkeys(saved)) if saved else None})
