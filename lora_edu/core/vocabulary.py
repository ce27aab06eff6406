"""Tokens added after pretraining: the embedding's new rows travel in the adapter's file. Lesson 08.

``model.resize_token_embeddings(n)`` draws new rows at random. An adapter that was trained beside them means nothing
without them, so PEFT writes the whole embedding into the file, and so do we.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lora_edu.core.adapter import AdapterLayer
from lora_edu.core.matching import Wrapper, named_places, warn_caller
from lora_edu.core.parts import PREFIX, ModuleCopy, Part

# Of what a file may hold of an embedding or a head: along which dimension the tokens lie.
WITH_ROWS = {"weight": 0, "base_layer.weight": 0, "lora_embedding_A": 1, "lora_B.weight": 0}


@dataclass
class EmbeddingRows(Part):
    """The embedding that an adapter was trained beside: in the place of the model's own while the adapter is in use."""

    place: str
    keys: list[str]  # more than one where the output head is tied to it
    modules: list[Any]
    own: nn.Parameter
    loaded: nn.Parameter

    def parameters(self) -> list[nn.Parameter]:
        return []

    def use(self, on: bool) -> None:
        parameter = self.loaded if on else self.own
        parameter.data = parameter.data.to(self.modules[0].weight)
        for module in self.modules:
            module.weight = parameter

    def to_file(self) -> dict[str, Tensor]:
        return dict.fromkeys(self.keys, self.loaded)


def pretrained(module: Any) -> Any:
    """The layer that the model came with at this place, without adapters and trained copies."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def own_weight(model: nn.Module, module: Any) -> Any:
    """The weight that the model came with at this place, whatever is in use or merged; None if it has none."""
    state, layer = model.__dict__.get("adapter_state"), pretrained(module)
    for part in (part for parts in (state.parts.values() if state else ()) for part in parts):
        if isinstance(part, EmbeddingRows) and any(layer is each for each in part.modules):
            return part.own
    merged = module.merge_state.pair if isinstance(module, AdapterLayer) else None
    return layer._parameters.get("weight") if merged is None else merged[0]


def embeddings_of(model: Any) -> dict[str, Any]:
    """{original name: what stands there} of the input embedding and the output head."""
    getters = ("get_input_embeddings", "get_output_embeddings")
    wanted = [pretrained(getattr(model, getter)()) for getter in getters if hasattr(model, getter)]
    found = {name: m for name, _, _, m in named_places(model) if any(pretrained(m) is each for each in wanted)}
    return {name: module for name, module in found.items() if getattr(own_weight(model, module), "ndim", 0) == 2}


def tied_embeddings(model: Any) -> list[str]:
    """The names of embedding and head if they share one weight; else none."""
    found = {name: id(own_weight(model, module)) for name, module in embeddings_of(model).items()}
    return list(found) if len(found) > 1 and len(set(found.values())) == 1 else []


def tie_copies(parts: list[Part], tied: list[str]) -> list[Part]:
    """The parts, in which the trained copies of these modules now share one weight."""
    copies = [part.copy for part in parts if isinstance(part, ModuleCopy) and part.place in tied]
    for copy in copies[1:]:
        copy.weight = copies[0].weight
    return parts


def grown_rows(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The embedding's weights, if the vocabulary differs from the base's and no other tensor of the file holds them.

    Warns where it cannot be known how many rows the base has.
    """
    if not (found := embeddings_of(model)) or not (known := rows_of_base(model)):
        return {}
    rows = {}
    for name, module in found.items():
        weight, place = own_weight(model, module), f"{PREFIX}{name}"
        stored = any(f"{place}.{key}" in tensors for key in ("weight", "base_layer.weight"))
        if weight.shape[0] != known and not stored:
            adapted = f"{place}.lora_embedding_A" in tensors or f"{place}.lora_A.weight" in tensors
            rows[f"{place}.base_layer.weight" if adapted else f"{place}.weight"] = weight
    return rows


def rows_of_base(model: Any) -> int | None:
    """The size of the vocabulary that the base was saved with: noted by ``load_base``, else read from its config."""
    if noted := model.__dict__.get("pretrained_rows"):
        return noted
    if not (source := getattr(getattr(model, "config", None), "_name_or_path", None)):
        return None  # made from a config: there is no base to go back to
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        warn_caller(
            f"the config of the base {source!r} is not on this machine, so nobody knows here whether the vocabulary "
            "has grown: if you called resize_token_embeddings, the new rows are missing in the file"
        )
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def check_rows(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise if a file was made for this model with another number of tokens.

    Raises:
        ValueError: if so. What does not fit in other ways is not looked at here.
    """
    for name, module in embeddings_of(model).items():
        rows, width = own_weight(model, module).shape
        held = {key: tensors[f"{PREFIX}{name}.{key}"].shape for key in WITH_ROWS if f"{PREFIX}{name}.{key}" in tensors}
        sizes = [shape[WITH_ROWS[key]] for key, shape in held.items() if len(shape) == 2]
        fits = all(held[key][1:] == (width,) for key in ("weight", "base_layer.weight") if key in held)
        if fits and (other := [size for size in sizes if size != rows]):
            raise ValueError(
                f"the file was made for {other[0]:,} rows of {name!r}, and this model has {rows:,}: the adapter was "
                f"trained with another vocabulary; call model.resize_token_embeddings({other[0]}) first"
            )


def grown_embeddings(tensors: Mapping[str, Tensor], model: nn.Module) -> list[EmbeddingRows]:
    """Parts for the embedding's weights among a file's tensors, where they are not the model's own.

    Args:
        tensors: those of the file that nothing else accounts for; ``check_rows`` has seen the file.

    Raises:
        ValueError: if the file has different rows for what is one weight in this model.
    """
    found: dict[int, EmbeddingRows] = {}
    for name, module in embeddings_of(model).items():
        own = own_weight(model, module)
        for key in (f"{PREFIX}{name}.weight", f"{PREFIX}{name}.base_layer.weight"):
            if key in tensors and tensors[key].shape == own.shape:
                loaded = nn.Parameter(tensors[key].to(own), requires_grad=False)
                rows = found.setdefault(id(own), EmbeddingRows(f"{name}.weight", [], [], own, loaded))
                rows.keys.append(key)
                if not torch.equal(rows.loaded, loaded):
                    raise ValueError(
                        f"{rows.keys} differ in the file, and are one tied weight in this model: the adapter was "
                        "trained in a model with config.tie_word_embeddings=False; load it into one like that"
                    )
    parts = [rows for rows in found.values() if not torch.equal(rows.loaded, rows.own)]
    for rows in parts:  # whatever is tied to the weight follows, whether or not the file names it
        places = [module for _, _, _, module in named_places(model) if own_weight(model, module) is rows.own]
        rows.modules = list({id(layer): layer for layer in map(pretrained, places)}.values())
    return parts
