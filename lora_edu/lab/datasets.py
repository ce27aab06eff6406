"""The course's data by name, and the one format in which an entry is shown to a model. Used from lesson 00 on."""

import gzip
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_edu.files import data_path

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


def format_chat(entry: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
    """The two halves of an entry for a chat model: the conversation up to the answer, and the answer.

    The user says ``Define: politician, noun``; the tokenizer's own chat template writes what stands around it (for
    SmolLM2 a system message and ``<|im_start|>``, ``<|im_end|>`` with the roles). Built in lesson 07.

    Raises:
        ValueError: if the tokenizer has no chat template, as that of a base model.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "this tokenizer has no chat template: encode with chat=False, or take a chat model such as smollm2-135m"
        )
    request = ", ".join(filter(None, [f"Define: {entry['word']}", entry.get("pos")]))
    messages = [{"role": "user", "content": request}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), entry["definition"]


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt as the model sees it: ``<bos>`` (where the tokenizer has one) and the text.

    A chat template usually writes ``<bos>`` itself; then no second one is put before it.
    """
    ids, bos = tokenizer(prompt, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def encode(
    entries: Sequence[dict[str, Any]], tokenizer: Any, max_length: int = 64, chat: bool = False
) -> list[dict[str, list[int]]]:
    """Turn entries into token ids and labels: bos + prompt + answer + eos.

    The labels are -100 on bos and prompt, so that the loss asks for the definition only, not for the headword.
    An entry longer than ``max_length`` tokens is cut there, and then has no eos: its end was never seen.
    ``chat`` writes the prompt with the tokenizer's chat template (:func:`format_chat`), about 35 tokens in SmolLM2's.

    Raises:
        ValueError: if an entry's prompt alone fills ``max_length`` (nothing would be left to learn), or ``chat`` is
            asked of a tokenizer without a template.
    """
    rows = []
    for entry in entries:
        prompt, answer = format_chat(entry, tokenizer) if chat else format_entry(entry)
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


def mask_labels(input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Sequence[int]) -> Tensor:
    """Labels of a padded batch: -100 on prompts and padding, the ids of the answers and of their ends elsewhere.

    Args:
        input_ids: (rows, length).
        attention_mask: (rows, length), 1 on tokens and 0 on padding. Padding is told by its place, not by its id: many
            tokenizers pad with their end token, and the end of an answer must count.
        prompt_lengths: how many tokens at the beginning of each row are its prompt.

    Returns:
        A new tensor (rows, length); :func:`encode` and :func:`collate` give the same. Built in lesson 07.
    """
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    starts = torch.tensor(prompt_lengths, device=input_ids.device)[:, None]
    return input_ids.masked_fill((places < starts) | (attention_mask == 0), IGNORED)


def encode_topics(entries: Sequence[dict[str, Any]], tokenizer: Any, max_length: int = 32) -> list[dict[str, Any]]:
    """Rows for a classifier, as ``wordnet_topics`` has them: the definition's tokens, and one label per row.

    For a decoder bos + definition, cut at ``max_length``. There is no eos: its classification head reads the last token
    that is no padding, and SmolLM2 pads with eos. For an encoder such as BERT, whose head reads the first token, what
    its tokenizer makes of a text: [CLS] + definition + [SEP], the definition cut so that all fit ``max_length``.

    Raises:
        ValueError: if an entry has no label, or ``max_length`` leaves no room for a word.
    """
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: bos and at least one token of the definition need 2; raise it")
    for entry in entries:
        if "label" not in entry:
            raise ValueError(f"the entry of {entry['word']!r} has no label: only wordnet_topics is for classification")
    if tokenizer.cls_token_id is not None:
        texts = [entry["definition"] for entry in entries]
        encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        return [{"input_ids": ids, "labels": entry["label"]} for ids, entry in zip(encoded, entries, strict=True)]
    return [
        {"input_ids": prompt_ids(entry["definition"], tokenizer)[:max_length], "labels": entry["label"]}
        for entry in entries
    ]


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest row: ``input_ids``, ``attention_mask``, ``labels``, each (rows, longest).

    Padding carries the label -100 and the mask 0, so it neither counts in the loss nor is attended to. Rows whose
    label is one number, a class, give ``labels`` of shape (rows,); for a decoder that classifies, ``pad_token_id`` must
    be the one of the model's config, by which it finds each row's last token.

    Raises:
        ValueError: if some rows have one label and others one for each token.
    """
    classes = [not isinstance(row["labels"], list) for row in rows]
    if len(set(classes)) > 1:
        raise ValueError("rows of encode (a list of labels each) and of encode_topics (one label) cannot share a batch")
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], pad_token_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor(
            [row["labels"] if one else padded(row["labels"], IGNORED) for row, one in zip(rows, classes, strict=True)]
        ),
    }


def shuffled_batches(rows: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Indices of one batch after another, without end; they depend on the seed and on nothing else."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += torch.randperm(rows, generator=generator).tolist()
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
