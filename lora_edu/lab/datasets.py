"""The course's data by name, and the one format in which an entry is shown to a model. Used from lesson 00 on."""

import gzip
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_edu.lab.bases import data_path

TEXTS = ("devils_dictionary", "jargon", "wordnet_glosses", "wordnet_topics")
DATASETS = (*TEXTS, "digits")
SPLITS = ("train", "validation", "test")
IGNORED = -100  # the label that cross-entropy leaves out


def load_dataset(name: str, split: str = "train") -> list[dict[str, Any]]:
    """Read one fixed split of one data set, in its fixed order.

    Args:
        name: ``"devils_dictionary"``, ``"jargon"`` and ``"wordnet_glosses"`` give rows with ``word``, ``pos`` and
            ``definition`` (the last one also ``topic``, WordNet's lexicographer file); ``"wordnet_topics"`` is the
            subset for classification, the same fields and an integer ``label``; ``"digits"`` gives ``image``
            (an 8×8 float tensor with values in [0, 1]) and ``label``.
        split: ``"train"``, ``"validation"`` or ``"test"``. No headword and no definition is in two of them.

    Raises:
        ValueError: for an unknown name or split.
        FileNotFoundError: if the data folder is incomplete.

    Source: data/README.md says where each text comes from and under which licence.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; there are: {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of {name!r}; there are: {', '.join(SPLITS)}")
    if name == "digits":
        return _digits(split)
    path = data_path("texts", f"{name}.jsonl.gz")
    if not path.exists():
        raise FileNotFoundError(
            f"{path.name} is missing in {path.parent}; it belongs to the repository (is LORA_EDU_DATA set wrongly?)"
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if key != "split"} for row in rows if row["split"] == split]


def _digits(split: str) -> list[dict[str, Any]]:
    """scikit-learn's 1,797 handwritten digits: of every ten, eight to train on, one to validate, one to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    place = {8: "validation", 9: "test"}
    return [
        {"image": torch.tensor(image / 16.0, dtype=torch.float32), "label": int(label)}
        for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True))
        if place.get(i % 10, "train") == split
    ]


def format_entry(entry: dict[str, Any]) -> tuple[str, str]:
    """The two halves of an entry as text: what the model is given, and what it should say.

    ``{"word": "politician", "pos": "noun", "definition": "a leader …"}`` → ``("politician (noun):", " a leader …")``.
    An entry without a part of speech leaves the brackets out: ``("politician:", " a leader …")``.
    """
    pos = entry.get("pos")
    prompt = f"{entry['word']} ({pos}):" if pos else f"{entry['word']}:"
    return prompt, f" {entry['definition']}"


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt as the model sees it: ``<bos>`` (where the tokenizer has one) and the text."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def encode(entries: Sequence[dict[str, Any]], tokenizer: Any, max_length: int = 64) -> list[dict[str, list[int]]]:
    """Turn entries into token ids and labels: bos + prompt + answer + eos.

    The labels are -100 on bos and prompt, so that the loss asks for the definition only, not for the headword.
    An entry longer than ``max_length`` tokens is cut there, and then has no eos: its end was never seen.

    Raises:
        ValueError: if an entry's prompt alone fills ``max_length`` (nothing would be left to learn).
    """
    rows = []
    for entry in entries:
        prompt, answer = format_entry(entry)
        given = prompt_ids(prompt, tokenizer)
        if len(given) >= max_length:
            raise ValueError(
                f"max_length={max_length}: the prompt {prompt!r} alone has {len(given)} tokens; raise max_length"
            )
        wanted = [*tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
        rows.append(
            {
                "input_ids": (given + wanted)[:max_length],
                "labels": ([IGNORED] * len(given) + wanted)[:max_length],
            }
        )
    return rows


def collate(rows: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest row: ``input_ids``, ``attention_mask``, ``labels``, each (rows, longest).

    Padding carries the label -100 and the mask 0, so it neither counts in the loss nor is attended to.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], pad_token_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], IGNORED) for row in rows]),
    }
