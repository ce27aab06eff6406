"""Examples in the prompt instead of training: a language model classifies by what it would say next. Lesson 15."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def topic_prompt(definition: str, examples: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """A prompt that ends where the topic of ``definition`` has to come.

    Args:
        examples: rows with ``definition`` and ``topic``, in the order in which they are shown; there may be none.
        names: all topics, listed at the beginning.
    """
    shown = [f"Definition: {row['definition']}\nTopic: {row['topic']}\n" for row in examples]
    return "\n".join([f"Topics: {', '.join(names)}\n", *shown, f"Definition: {definition}\nTopic:"])


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, names: Sequence[str]) -> str:
    """The name whose first token the model finds most probable after the prompt.

    Raises:
        ValueError: if two names begin with the same token, and cannot be told apart by it.
    """
    first = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0] for name in names]
    if len(set(first)) < len(first):
        raise ValueError(f"two of {', '.join(names)} begin with the same token: choose names that do not")
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    return names[int(model(input_ids=ids, logits_to_keep=1).logits[0, -1, first].argmax())]
