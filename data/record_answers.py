"""Records what lesson 12 evaluates: the answers of SmolLM2 with and without its adapter, of its rivals, and losses.

    python data/record_answers.py                  # data/runs/answers.json; some ten minutes on two idle cores
    python data/record_answers.py --out FILE

Every finished system is in the file at once; started again, the script does what is missing. All text is greedy, on the
CPU in float32, in batches of 20, cut after 25 tokens.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lora_edu import disable_adapter, load_adapter, load_base, load_dataset
from lora_edu.files import data_path
from lora_edu.lab.chat_rows import ChatRow, encode_rows, row_losses, with_examples
from lora_edu.lab.datasets import encode, format_entry
from lora_edu.lab.recording.experiments import punctuated
from lora_edu.lab.recording.records import surroundings, write_record
from lora_edu.lab.training import evaluate, generate

TOKENS, BATCH, ROW = 25, 20, 96
WORDS, EXAMPLES, NEGATIVES = 60, 10, 120
ASKED = "Define the word in one witty, cynical sentence, as Ambrose Bierce did in The Devil's Dictionary: {word}"
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Germany": "Berlin", "Russia": "Moscow", "Egypt": "Cairo",
    "Greece": "Athens", "China": "Beijing", "England": "London", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest",
    "Sweden": "Stockholm", "Norway": "Oslo", "Denmark": "Copenhagen", "India": "New Delhi", "Cuba": "Havana",
}  # fmt: skip


def question(text: str, answer: str = "-") -> ChatRow:
    """A conversation of one question and its answer."""
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


def define(entry: dict[str, Any]) -> ChatRow:
    """An entry as lesson 07's ``format_chat`` writes it."""
    asked = ", ".join(filter(None, [f"Define: {entry['word']}", entry["pos"]]))
    return question(asked, entry["definition"])


class Models:
    """The two bases with their adapters, and how each system writes and is scored."""

    def __init__(self) -> None:
        self.smollm2, self.tokenizer = load_base("smollm2-135m")
        load_adapter(self.smollm2, data_path("adapters", "smollm2-devils-dictionary"))
        held_out = load_dataset("devils_dictionary", "test")
        self.entries = [held_out[place] for place in sorted(random.Random(0).sample(range(len(held_out)), WORDS))]
        training = load_dataset("devils_dictionary", "train")
        short = [entry for entry in training if 20 < len(entry["definition"]) < 80]
        self.examples = random.Random(0).sample(short, EXAMPLES)
        self.negatives = random.Random(1).sample(training, NEGATIVES)
        self.plain = load_dataset("wordnet_glosses", "validation")[:100]

    def write(self, rows: list[ChatRow]) -> list[str]:
        """The model's own answers to the last question of each conversation."""
        prompts = [
            self.tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
            for row in rows
        ]
        return batches(self.smollm2, self.tokenizer, prompts)

    def scored(self, asked: Callable[[dict[str, Any]], ChatRow], room: int = 0) -> dict[str, Any]:
        """Answers to the test words, and the loss and tokens of Bierce's own definitions, cut as in lesson 07."""
        rows, lengths = [], [len(row["input_ids"]) for row in encode(self.entries, self.tokenizer, ROW, chat=True)]
        full = [len(row["input_ids"]) for row in encode(self.entries, self.tokenizer, 10 * ROW, chat=True)]
        for entry, length, whole in zip(self.entries, lengths, full, strict=True):
            row = encode_rows([asked(entry)], self.tokenizer, room + 10 * ROW, last_only=True)[0]
            keep = len(row["input_ids"]) - (whole - length)
            rows.append({name: values[:keep] for name, values in row.items()})
        losses = [[round(float(total), 4), int(count)] for total, count in row_losses(self.smollm2, rows)]
        return {"answers": self.write([asked(entry) for entry in self.entries]), "losses": losses}

    def kept(self) -> dict[str, Any]:
        """What should not get worse: capitals, and the loss on plain definitions in two forms."""
        with_marks = list(map(punctuated, self.plain))
        asked = [question(f"What is the capital of {country}?") for country in CAPITALS]
        return {
            "capitals": self.write(asked),
            "plain": round(evaluate(self.smollm2, encode(self.plain, self.tokenizer, ROW, chat=True)), 4),
            "punctuated": round(evaluate(self.smollm2, encode(with_marks, self.tokenizer, ROW, chat=True)), 4),
        }

    def base(self) -> dict[str, Any]:
        with disable_adapter(self.smollm2):
            return self.scored(define) | self.kept() | {"negatives": self.write(list(map(define, self.negatives)))}

    def asked(self) -> dict[str, Any]:
        with disable_adapter(self.smollm2):
            return self.scored(lambda entry: question(ASKED.format(word=entry["word"]), entry["definition"]))

    def ten_examples(self) -> dict[str, Any]:
        shown = list(map(define, self.examples))
        with disable_adapter(self.smollm2):
            return self.scored(lambda entry: with_examples(define(entry), shown), room=1024)

    def adapter(self) -> dict[str, Any]:
        return self.scored(define) | self.kept()

    def tiny(self) -> dict[str, Any]:
        """tiny with its own adapter. Its tokens are others, so its loss cannot be compared and is left out."""
        model, tokenizer = load_base("tiny")
        load_adapter(model, data_path("adapters", "tiny-devils-dictionary"))
        return {"answers": batches(model, tokenizer, [format_entry(entry)[0] for entry in self.entries])}


def batches(model: nn.Module, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy continuations, a batch at a time."""
    parts = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    return [text for part in parts for text in generate(model, tokenizer, part, max_new_tokens=TOKENS)]


def main(out: Path, only: list[str] | None = None) -> None:
    """Do what is missing in the file, or of it only some systems."""
    models = Models()
    systems = {
        "base": models.base,
        "adapter": models.adapter,
        "tiny": models.tiny,
        "asked": models.asked,
        "ten examples": models.ten_examples,
    }
    record = {
        "command": "python data/record_answers.py",
        **surroundings("float32"),
        "settings": {"max_new_tokens": TOKENS, "batch_size": BATCH, "max_length": ROW, "do_sample": False},
        "prompt of asked": ASKED,
        "examples": [entry["word"] for entry in models.examples],
        "negatives": [entry["word"] for entry in models.negatives],
        "capitals": CAPITALS,
        "words": [entry["word"] for entry in models.entries],
        "systems": {},
    }
    if out.exists():
        record["systems"] = json.loads(out.read_text(encoding="utf-8"))["systems"]
    for name, recorded in systems.items():
        if name not in record["systems"] and (only is None or name in only):
            record["systems"][name] = recorded()
            write_record(record, out)
            print(f"{name}: recorded", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=data_path("runs", "answers.json"))
    parser.add_argument("--only", nargs="+", help="do these systems and leave out others")
    given = parser.parse_args()
    main(given.out, given.only)
