"""A merged model as a folder that plain transformers loads, and the proof that it answers as before. Lesson 13."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from lora_edu.core.merging import merge_and_unload
from lora_edu.core.state import injected_model
from lora_edu.lab.datasets import prompt_ids
from lora_edu.lab.training import generate
from lora_edu.lab.wheels import quiet


def save_merged(model: nn.Module, tokenizer: Any, folder: str | os.PathLike, **generation: Any) -> Path:
    """Merge the active adapters into a copy of the model and save what a stranger needs to use it.

    The folder holds the weights, the config, the tokenizer with its chat template, and the generation settings, and
    loads with ``AutoModelForCausalLM.from_pretrained(folder)``. The model itself keeps its adapters beside its
    weights, so that the two can be compared; there must be room for it twice.

    Args:
        folder: a new one, or an empty one. It appears whole, or not at all.
        generation: settings that answers should be generated with, such as ``max_new_tokens=64``; others stay the
            model's own. The end token is the tokenizer's.

    Returns:
        The folder.

    Raises:
        FileExistsError: if there is something in the folder.
        ValueError: as for ``merge_and_unload``.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: name a new folder, so that no old file stays among the new ones")
    merged: Any = merge_and_unload(copy.deepcopy(injected_model(model)))
    settings = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **generation}
    merged.generation_config.update(**settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        ready = Path(temporary) / "ready"
        with quiet():
            merged.save_pretrained(ready)
            tokenizer.save_pretrained(ready)
        if folder.exists():
            folder.rmdir()
        shutil.move(ready, folder)
    return folder


@dataclass(frozen=True)
class Agreement:
    """How far two models agree.

    Attributes:
        same: how many of the greedy answers are the same text.
        prompts: how many there were.
        largest: the largest difference of one logit, over all tokens of all prompts.
        scale: the largest logit of the first model, by absolute value, beside which ``largest`` is to be seen.
    """

    same: int
    prompts: int
    largest: float
    scale: float

    def __str__(self) -> str:
        return (
            f"{self.same} of {self.prompts} greedy answers are the same text; no logit differs by more than "
            f"{self.largest / self.scale:.0e} of the largest"
        )


@torch.no_grad()
def same_answers(
    model: nn.Module, other: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 24
) -> Agreement:
    """Compare two language models on some prompts: their logits, and the texts that they continue with."""
    largest, scale = 0.0, 0.0
    for prompt in prompts:
        ids = torch.tensor([prompt_ids(prompt, tokenizer)])
        here, there = (each.eval()(input_ids=ids).logits.float() for each in (model, other))
        largest = max(largest, (here - there).abs().max().item())
        scale = max(scale, here.abs().max().item())
    answers = [generate(each, tokenizer, prompts, max_new_tokens) for each in (model, other)]
    same = sum(one == two for one, two in zip(*answers, strict=True))
    return Agreement(same, len(prompts), largest, scale)
