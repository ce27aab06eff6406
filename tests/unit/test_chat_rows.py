"""Rows of conversations: what is read and refused, which copies are found, what stays together, which tokens count."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lora_edu import load_base
from lora_edu.files import data_path
from lora_edu.lab.chat_rows import encode_rows, loss_per_token, read_rows, row_losses, with_examples
from lora_edu.lab.datasets import IGNORED, encode
from lora_edu.lab.splitting import answer_key, leaks, near_duplicates, prompt_key, same, split_rows, without_copies

TEMPLATE = (  # SmolLM2's, with a shorter system message
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def row(*texts, system=None):
    """A conversation whose texts take turns, the user's first."""
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts, strict=False)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


def written(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    """The tiny model's, with a chat template and an end mark of its own."""
    _, tokenizer = load_base("tiny")
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


# Reading


def test_rows_keep_their_messages_and_the_number_of_their_line(tmp_path):
    path = written(
        tmp_path / "a.jsonl", row("Why?", "Because.") | {"source": "me"}, "", row("a", "b", "c", "d", system="s")
    )
    first, second = read_rows(path)
    assert first == row("Why?", "Because.") | {"line": 1}
    assert second == row("a", "b", "c", "d", system="s") | {"line": 3}
    assert read_rows(written(tmp_path / "b.jsonl", "\ufeff" + json.dumps(row("a", "b\u2028c"))))[0]["line"] == 1


@pytest.mark.errors
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{'messages': []}", r"line 2 is no JSON \(Expecting property name.*column 2\)"),
        ({"messages": []}, "line 2: expected an object with a list of messages$"),
        (["a"], "line 2: expected an object with a list of messages"),
        ({"conversations": []}, "this is a ShareGPT row; lesson 08"),
        ({"instruction": "a", "output": "b"}, "this is an Alpaca row"),
        ({"prompt": "a", "completion": "b"}, "this is a prompt; write it as"),
        (row("a"), "line 2: the last message is the user's: expected an answer"),
        ({"messages": [{"role": "human", "content": "a"}]}, "message 1 has the role 'human': expected system or user"),
        (
            {"messages": [{"role": "user", "content": "a"}] * 2},
            "message 2 has the role 'user': expected assistant there",
        ),
        ({"messages": ["a"]}, "message 1 has the role None"),
        (row("a", " "), r"message 2 \(assistant\) has no text"),
        (row("a", None), r"message 2 \(assistant\) has no text"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, says):
    path = written(tmp_path / "mine.jsonl", row("a", "b"), line)
    with pytest.raises(ValueError, match=rf"mine\.jsonl: .*{says}"):
        read_rows(path)


@pytest.mark.errors
def test_a_file_that_holds_no_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"line 3 is no JSON .*; and 2 lines more"):
        read_rows(written(tmp_path / "many.jsonl", *["{"] * 5))
    with pytest.raises(ValueError, match="holds no row"):
        read_rows(written(tmp_path / "none.jsonl", "", " "))
    with pytest.raises(ValueError, match="one JSON list: write one row a line"):
        read_rows(written(tmp_path / "list.json", [row("a", "b")]))
    (tmp_path / "latin.jsonl").write_bytes('{"messages": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"not text in UTF-8 \(byte 14\)"):
        read_rows(tmp_path / "latin.jsonl")
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "nowhere.jsonl")


# Copies and the split


def test_copies_are_found_whatever_their_capitals_and_punctuation():
    rows = [row("Who is it?", "Me."), row("who  is it", "You."), row("WHO IS IT", "me!"), row("?!", "Me.")]
    assert same(rows, prompt_key) == [[0, 1, 2]]
    assert same(rows, answer_key) == [[0, 2, 3]]
    assert without_copies(rows) == [rows[0], rows[1], rows[3]]


def test_near_duplicates_share_half_of_their_runs_and_not_the_form_of_the_question():
    text = "the quick brown fox jumps over the lazy dog and runs away from all of us"
    rows = [
        row(f"Please tell me what is meant by {i}", f"answer {i} is like no other {i * i} at all {i}")
        for i in range(30)
    ]
    assert near_duplicates(rows) == []
    rows += [row("fox", text), row("dog", text.replace("lazy", "very lazy"))]
    ((first, other, share),) = near_duplicates(rows)
    assert (first, other) == (30, 31)
    assert 0.5 <= share < 1
    assert near_duplicates(rows, share=0.9) == []
    rows += [row("hen", f"a hen lays one egg a day, and {' '.join(f'then{i}' for i in range(40))}")]
    rows += [row("egg", "a hen lays one egg a day")]  # whole in the longer one: the share is of the shorter
    assert near_duplicates(rows)[0] == (32, 33, 1.0)


def numbered(count):
    return [row(f"question {i}", f"{i}, in {i * 7} other words, is {i + 3} and {i % 11}") for i in range(count)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_of_one_question_and_near_duplicates_stay_on_one_side(seed):
    text = "the quick brown fox jumps over the lazy dog and runs away from all of us"
    rows = [
        *numbered(60),
        *(row(f"Question {i}!", "another answer") for i in range(20)),
        row("fox", text),
        row("dog", text),
    ]
    split = split_rows(rows, seed=seed)
    assert sorted(map(str, itertools.chain(*split.values()))) == sorted(map(str, rows))
    assert leaks(split, prompt_key) == {"validation": 0, "test": 0}
    assert [sum(row["messages"][1]["content"] == text for row in part) for part in split.values()].count(2) == 1
    assert [len(split[name]) for name in ("validation", "test")] == [12, 12]
    assert split == split_rows(rows, seed=seed)
    assert split != split_rows(rows, seed=seed + 1)
    assert [len(part) for part in split_rows(rows, most=5, seed=seed).values()] == [72, 5, 5]


def test_a_question_with_very_many_rows_is_trained_on():
    rows = [*numbered(40), *(row("hello", f"answer {i}") for i in range(60))]
    split = split_rows(rows)
    assert sum(prompt_key(each) == "hello" for each in split["train"]) == 60
    assert len(split["test"]) == 15


def test_leaks_by_answer_are_counted():
    split = {
        "train": [row("a", "Yes."), row("b", "No.")],
        "validation": [row("c", "yes")],
        "test": [row("d", "Maybe.")],
    }
    assert leaks(split, answer_key) == {"validation": 1, "test": 0}


@pytest.mark.errors
def test_too_few_questions_are_refused():
    with pytest.raises(ValueError, match="50 rows with 1 different questions: too few"):
        split_rows([row("hello", f"answer {i}") for i in range(50)])
    with pytest.raises(ValueError, match="8 rows with 8 different questions"):
        split_rows(numbered(8))


# Token ids and labels


def counted(encoded, tokenizer):
    return tokenizer.decode([i for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label >= 0])


def test_one_turn_is_encoded_as_the_lessons_do(tokenizer):
    entry = {"word": "duty", "pos": "noun", "definition": "That which sternly impels us."}
    (ours,) = encode_rows([row("Define: duty, noun", entry["definition"])], tokenizer)
    assert [ours] == encode([entry], tokenizer, max_length=256, chat=True)


def test_every_answer_and_its_end_count_and_nothing_else(tokenizer):
    talk = row("Who?", "I.", "Why?", "For fun.", system="Be short")
    (encoded,) = encode_rows([talk], tokenizer)
    assert counted(encoded, tokenizer) == "I.<|im_end|>For fun.<|im_end|>"
    assert all(label in (IGNORED, i) for i, label in zip(*encoded.values(), strict=True))
    whole = tokenizer.apply_chat_template(talk["messages"], tokenize=False).removesuffix("\n")
    assert tokenizer.decode(encoded["input_ids"]).removeprefix(tokenizer.bos_token) == whole
    (last,) = encode_rows([talk], tokenizer, last_only=True)
    assert last["input_ids"] == encoded["input_ids"]
    assert counted(last, tokenizer) == "For fun.<|im_end|>"
    (cut,) = encode_rows([talk], tokenizer, max_length=len(encoded["labels"]) - 2)
    assert cut["labels"] == encoded["labels"][:-2]


def test_examples_stand_between_the_system_message_and_the_question():
    shown = with_examples(row("c", "d", system="mine"), [row("a", "b", system="theirs")])
    assert shown == row("a", "b", "c", "d", system="mine")
    assert with_examples(row("c", "d"), []) == row("c", "d")


@pytest.mark.errors
def test_what_cannot_be_encoded_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"line 7: max_length=4, and \d+ tokens come before the answer"):
        encode_rows([row("Who?", "I.") | {"line": 7}], tokenizer, max_length=4)
    with pytest.raises(ValueError, match="no chat template"):
        encode_rows([row("Who?", "I.")], SimpleNamespace(chat_template=None))
    strips = load_base("tiny")[1]
    strips.chat_template = TEMPLATE.replace("m['content']", "m['content'] | upper")
    with pytest.raises(ValueError, match="does not write an answer as it is"):
        encode_rows([row("Who?", "I.")], strips)


def test_losses_of_rows_add_up_to_the_loss_of_all(tokenizer):
    model, _ = load_base("tiny")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = encode_rows([row("Who?", "I."), row("Why is it so?", "For fun, and for no other reason.")], tokenizer)
    values = row_losses(model, rows)
    assert values[:, 1].tolist() == [sum(label != IGNORED for label in each["labels"]) for each in rows]
    first = torch.tensor([rows[0]["input_ids"]]), torch.tensor(rows[0]["labels"])
    logits = model(first[0]).logits[0, :-1]
    assert values[0, 0] == pytest.approx(
        nn.functional.cross_entropy(logits, first[1][1:], reduction="sum").item(), rel=1e-5
    )
    assert loss_per_token(values) == pytest.approx(np.sum(values[:, 0]) / np.sum(values[:, 1]))


def test_the_sample_rows_are_rows():
    rows = read_rows(data_path("samples", "jargon.jsonl"))
    assert 60 <= len(rows) <= 120
    assert leaks(split_rows(rows), prompt_key) == {"validation": 0, "test": 0}
