"""Models without weights: read a model's config and build it on PyTorch's *meta* device. Built in lesson 05.

On the meta device a tensor has a shape and a type but no memory, so a 70-billion-parameter model takes about a second.
"""

from __future__ import annotations

import copy
import difflib
import json
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from lora_edu.files import data_folder

HEADS = {"lm": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification, "base": AutoModel}


def load_config(source: PretrainedConfig | str | Path) -> PretrainedConfig:
    """A transformers config from an object, a folder or JSON file, a shipped name or a hub id.

    Shipped are ``shipped_configs()`` and the base ``tiny``.

    Raises:
        ValueError: nothing with this name can be read.
    """
    if isinstance(source, PretrainedConfig):
        return source
    shipped = (data_folder() / "configs" / str(source), data_folder() / str(source))  # the second for "tiny"
    path = next((p for p in (*shipped, Path(source)) if (p / "config.json").exists() or p.is_file()), None)
    if path is None and "/" not in str(source):  # no hub id: do not wait for the network to say so
        near = difflib.get_close_matches(str(source), shipped_configs(), 3) or shipped_configs()
        raise ValueError(f"no model config named {str(source)!r}; near names: {near}; a folder or a hub id works too")
    try:
        return AutoConfig.from_pretrained(path or str(source))
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ValueError(
            f"no model config found for {str(source)!r}: expected a transformers config, a folder or file with one, "
            f"a hub id that can be reached, or one of {shipped_configs()}"
        ) from error


def shipped_configs() -> list[str]:
    """The names of the model configs in ``data/configs``."""
    return sorted(path.parent.name for path in data_folder().glob("configs/*/config.json"))


def meta_model(
    config: PretrainedConfig | str | Path, head: str | None = None, num_labels: int | None = None
) -> nn.Module:
    """Build a model without its weights: every parameter on the meta device has a shape and no memory. Lesson 05.

    Args:
        config: anything that ``load_config`` takes.
        head: "lm", "classification", "base" (no head), or None for what the config's
            ``architectures`` names, else a language-model head, else no head.
        num_labels: width of a classification head.
    """
    if head is not None and head not in HEADS:
        raise ValueError(f"head={head!r}: expected one of {sorted(HEADS)} or None")
    config = load_config(config)
    if num_labels is not None:
        config = copy.deepcopy(config)  # the caller's object stays as it is
        config.num_labels = num_labels
    named_class = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if head is None and named_class is not None:
            return named_class(config)
        if head is None:
            head = "lm" if type(config) in AutoModelForCausalLM._model_mapping else "base"
        return HEADS[head].from_config(config)
