"""Tokens added after pretraining: the embedding's new rows travel in the adapter's file. Lesson 08.

``model.resize_token_embeddings(n)`` draws new rows at random. An adapter that was trained beside them means nothing
without them, so PEFT writes the whole embedding into the file, and so do we.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lora_edu.core.adapter import AdapterLayer, innermost
from lora_edu.core.matching import named_places
from lora_edu.core.parts import PREFIX, Part


@dataclass
class EmbeddingRows(Part):
    """The embedding that an adapter was trained beside: in the place of the model's own while the adapter is in use."""

    place: str
    keys: list[str]  # more than one where the output head is tied to it
    modules: list[Any]
    own: nn.Parameter
    loaded: nn.Parameter

    def parameters(self) -> Iterable[nn.Parameter]:
        return []

    def use(self, on: bool) -> None:
        parameter = self.loaded if on else self.own
        parameter.data = parameter.data.to(self.modules[0].weight)
        for module in self.modules:
            module.weight = parameter

    def to_file(self) -> dict[str, Tensor]:
        return dict.fromkeys(self.keys, self.loaded)


def embeddings_of(model: Any) -> dict[str, Any]:
    """{original name: layer} of the input embedding and the output head, without their adapters."""
    getters = ("get_input_embeddings", "get_output_embeddings")
    wanted = [innermost(getattr(model, getter)()) for getter in getters if hasattr(model, getter)]
    places = {name: innermost(module) for name, _, _, module in named_places(model)}
    return {name: module for name, module in places.items() if any(module is each for each in wanted)}


def grown_rows(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The embedding's weights, if the vocabulary differs from the base's and no other tensor of the file holds them.

    The base's size is read from its config, where ``config.name_or_path`` leads to one on this machine.
    """
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not source or not (found := embeddings_of(model)):
        return {}
    try:
        known = AutoConfig.from_pretrained(source, local_files_only=True).vocab_size
    except (OSError, ValueError, AttributeError):
        return {}
    rows = {}
    for name, module in found.items():
        stored = any(f"{PREFIX}{name}.{key}" in tensors for key in ("weight", "base_layer.weight"))
        if module.weight.shape[0] != known and not stored:
            adapted = f"{PREFIX}{name}.lora_embedding_A" in tensors or f"{PREFIX}{name}.lora_A.weight" in tensors
            rows[f"{PREFIX}{name}.base_layer.weight" if adapted else f"{PREFIX}{name}.weight"] = module.weight
    return rows


def grown_embeddings(
    tensors: Mapping[str, Tensor], model: nn.Module, layers: Mapping[str, AdapterLayer]
) -> list[EmbeddingRows]:
    """Parts for the embedding's weights among a file's tensors, where they are not the model's own.

    Args:
        tensors: those of the file that nothing else accounts for.
        layers: the adapter's new layers, which are not in the model yet.

    Raises:
        ValueError: if the model has another number of rows.
    """
    found: dict[int, EmbeddingRows] = {}
    for name, module in embeddings_of(model).items():
        for key in (f"{PREFIX}{name}.weight", f"{PREFIX}{name}.base_layer.weight"):
            if (tensor := tensors.get(key)) is None:
                continue
            own = module.weight
            if tensor.shape != own.shape:
                raise ValueError(
                    f"the file holds {tensor.shape[0]:,} rows of {name!r}, the model has {own.shape[0]:,}: the adapter "
                    f"was trained with added tokens; call model.resize_token_embeddings({tensor.shape[0]}) first"
                )
            if id(own) in found:
                found[id(own)].keys.append(key)
                found[id(own)].modules.append(module)
            elif not torch.equal(tensor.to(own), own):
                loaded = nn.Parameter(torch.empty_like(own), requires_grad=False)
                found[id(own)] = EmbeddingRows(f"{name}.weight", [key], [module], own, loaded)
    for rows in found.values():  # a tied head follows, whether or not the file names it
        for module in embeddings_of(model).values():
            if module.weight is rows.own and not any(module is each for each in rows.modules):
                rows.modules.append(module)
    return list(found.values())
