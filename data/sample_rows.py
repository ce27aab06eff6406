"""Writes the sample rows of my_adapter.ipynb: entries of the Jargon File as conversations, one JSON object a line.

    python data/sample_rows.py          # writes data/samples/jargon.jsonl
    python data/sample_rows.py --check  # compares what is committed with what the Jargon File gives

Nouns of the training split whose definition has 10 to 30 words, 120 headwords of them drawn with a fixed seed. The
question is one that a person might ask.
"""

import argparse
import json
import random
import sys

from lora_edu import load_dataset
from lora_edu.files import data_path, write_atomically

WORDS, SEED = 120, 0


def sample_rows() -> bytes:
    """The file's content."""
    entries = [
        entry
        for entry in load_dataset("jargon")
        if entry["pos"] == "noun" and 10 <= len(entry["definition"].split()) <= 30
    ]
    words = sorted({entry["word"] for entry in entries})
    drawn = set(random.Random(SEED).sample(words, WORDS))
    lines = []
    for entry in entries:
        if entry["word"] in drawn:
            question = {"role": "user", "content": f'What does "{entry["word"]}" mean?'}
            answer = {"role": "assistant", "content": entry["definition"]}
            lines.append(json.dumps({"messages": [question, answer]}, ensure_ascii=False))
    return "\n".join([*lines, ""]).encode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    path = data_path("samples", "jargon.jsonl")
    if not parser.parse_args().check:
        write_atomically(path, sample_rows())
        print(f"wrote {path.name}")
    elif path.read_bytes() != sample_rows():
        sys.exit(f"{path} is not what this script gives: run it without --check")
