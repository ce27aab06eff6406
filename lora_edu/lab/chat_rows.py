"""Rows of conversations, one JSON object a line: read them, and make token ids and labels. Used in my_adapter.ipynb.

A row is ``{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}``, the form that TRL
and the hub use. A system message may come first, and a conversation may go on for several turns. Copies among rows, and
the split, are in ``lab/splitting.py``.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lora_edu.lab.datasets import IGNORED, prompt_ids
from lora_edu.lab.distributed import count_targets
from lora_edu.lab.training import evaluate

ChatRow = dict[str, Any]  # messages, and line: its number in the file
SHOWN_ERRORS = 3
OTHER_FORMS = {
    "conversations": "a ShareGPT row; lesson 08 turns one into messages",
    "instruction": "an Alpaca row; lesson 08 turns one into messages",
    "prompt": 'a prompt; write it as {"messages": [{"role": "user", …}, {"role": "assistant", …}]}',
}


def read_rows(path: str | os.PathLike) -> list[ChatRow]:
    """Read a file with one JSON object a line, and check each line. Empty lines are passed over.

    Returns:
        the rows, each with ``messages`` and ``line``, the number of its line; other fields are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no text, holds no row, or some lines are no rows: the first of them are named.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 (byte {error.start}): save it as JSON Lines in UTF-8") from None
    if text.lstrip().startswith("["):
        raise ValueError(f"{path} is one JSON list: write one row a line, with no comma between them (JSON Lines)")
    rows: list[ChatRow] = []
    wrong = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append({"messages": checked_messages(json.loads(line)), "line": number})
        except json.JSONDecodeError as error:
            wrong.append(f"line {number} is no JSON ({error.msg}, column {error.colno})")
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN_ERRORS} lines more" if len(wrong) > SHOWN_ERRORS else ""
        raise ValueError(f"{path}: {'; '.join(wrong[:SHOWN_ERRORS])}{more}")
    if not rows:
        raise ValueError(f"{path} holds no row: expected one JSON object a line")
    return rows


def checked_messages(row: Any) -> list[dict[str, str]]:
    """The messages of one row, role and content of each, if they are a conversation that an answer ends.

    Raises:
        ValueError: saying what is wrong with which message.
    """
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        found = next((said for key, said in OTHER_FORMS.items() if isinstance(row, dict) and key in row), "")
        raise ValueError("expected an object with a list of messages" + (f", and this is {found}" if found else ""))
    messages: list[dict[str, str]] = []
    for place, message in enumerate(row["messages"], start=1):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        before = messages[-1]["role"] if messages else None
        expected = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}
        if role not in expected[before]:
            wanted = " or ".join(expected[before])
            raise ValueError(f"message {place} has the role {role!r}: expected {wanted} there")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {place} ({role}) has no text: its content must be a string that is not empty")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is the {messages[-1]['role']}'s: expected an answer of the assistant")
    return messages


def with_examples(row: ChatRow, examples: Sequence[ChatRow]) -> ChatRow:
    """The row with other rows' conversations before its own, as turns of the same conversation."""
    messages = row["messages"]
    start = 1 if messages[0]["role"] == "system" else 0
    shown = [message for each in examples for message in each["messages"] if message["role"] != "system"]
    return {**row, "messages": [*messages[:start], *shown, *messages[start:]]}


def encode_rows(
    rows: Sequence[ChatRow], tokenizer: Any, max_length: int = 256, last_only: bool = False
) -> list[dict[str, list[int]]]:
    """Token ids and labels of conversations, written with the tokenizer's chat template.

    Every answer and the mark that ends it have their ids as labels; template, system message and questions have -100.
    (In TRL: ``assistant_only_loss=True``.) A row that is longer than ``max_length`` is cut there, and its end is then
    never seen. One turn gives what :func:`lora_edu.lab.datasets.encode` gives with ``chat=True``.

    Args:
        last_only: labels for the last answer alone: those before it are examples.

    Raises:
        ValueError: if ``max_length`` leaves nothing of a row to learn, or the tokenizer has no chat template, or one
            that does not end an answer with the tokenizer's end mark.
    """
    return [encode_row(row, tokenizer, max_length, last_only) for row in rows]


def encode_row(row: ChatRow, tokenizer: Any, max_length: int, last_only: bool) -> dict[str, list[int]]:
    """One row of ``encode_rows``: question by question, what is given and what is wanted."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this tokenizer has no chat template: take a chat model, such as smollm2-135m")
    ids: list[int] = []
    labels: list[int] = []
    messages, written = row["messages"], ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:place], tokenize=False, add_generation_prompt=True)
        whole = prompt + message["content"] + tokenizer.eos_token
        template = tokenizer.apply_chat_template(messages[: place + 1], tokenize=False)
        if not prompt.startswith(written) or not template.startswith(whole):
            raise ValueError(
                f"the chat template does not write an answer as it is, followed by {tokenizer.eos_token!r}, so that it "
                "cannot be told which tokens to train; encode these rows by hand"
            )
        new = prompt[len(written) :]
        given = tokenizer(new, add_special_tokens=False)["input_ids"] if ids else prompt_ids(new, tokenizer)
        wanted = [*tokenizer(message["content"], add_special_tokens=False, verbose=False)["input_ids"]]
        wanted.append(tokenizer.eos_token_id)
        counts = not last_only or place == len(messages) - 1
        ids += given + wanted
        labels += [IGNORED] * len(given) + (wanted if counts else [IGNORED] * len(wanted))
        written = whole
    if all(label == IGNORED for label in labels[:max_length]):
        before = next(place for place, label in enumerate(labels) if label != IGNORED)
        raise ValueError(
            f"line {row.get('line', '?')}: max_length={max_length}, and {before} tokens come before the answer; raise "
            "max_length, or shorten the row"
        )
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def row_losses(model: nn.Module, rows: Sequence[dict[str, list[int]]]) -> np.ndarray:
    """Sum of the losses and number of tokens that count, of each encoded row: (rows, 2), for ``bootstrap_interval``."""
    counts = [count_targets([row]) for row in rows]
    return np.array([(evaluate(model, [row]) * count, count) for row, count in zip(rows, counts, strict=True)])


def loss_per_token(values: np.ndarray) -> float:
    """The mean loss per token of such rows."""
    total, tokens = values.sum(0)
    return total / tokens
