"""How many labels does a task take? A linear probe against LoRA on two tasks, and examples in the prompt. Lesson 15.

    python -m lora_edu.lab.recording.labels            # on two cores, ten minutes

Every finished run is in ``data/runs/labels.json`` at once; the same command does what is missing.
"""

import json
import random
import time
from functools import cache
from typing import Any

import torch

from lora_edu.core.config import LoraConfig
from lora_edu.core.inject import inject
from lora_edu.files import data_path
from lora_edu.lab.bases import load_base
from lora_edu.lab.datasets import encode_topics, load_dataset
from lora_edu.lab.probing import embed, nearest, probe
from lora_edu.lab.prompting import answer, topic_prompt
from lora_edu.lab.recording.pool import Job, here, missing, settle, write
from lora_edu.lab.training import accuracy, train
from lora_edu.lab.word_order import word_order

NAME = "labels"
DRAWS = {"topics": (0,), "order": (0, 1)}
LABELS = {"topics": (100, 500, 3000), "order": (500, 2000, 6000)}
STEPS = {"topics": 80, "order": 300}
EXAMPLES, ASKED = 8, 60
RATES = {"topics": 3e-3, "order": 1e-3}
SCHEDULES = {"topics": "linear", "order": "constant"}
TESTED = 300
RANK, BATCH, WARMUP = 8, 16, 10


def jobs() -> list[Job]:
    """All runs, the long ones last."""
    prompts = [{"part": "prompt", "examples": way} for way in ("none", "random", "retrieved")]
    curve = [
        {"part": "labels", "task": task, "labels": labels, "draw": draw}
        for task in LABELS
        for draw in DRAWS[task]
        for labels in LABELS[task]
    ]
    return [*prompts, *curve]


def do(job: Job) -> dict[str, Any]:
    """A point of the curve, or one way to prompt."""
    return prompted(job["examples"]) if job["part"] == "prompt" else point(job["task"], job["labels"], job["draw"])


@cache
def entries(task: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of a task by split."""
    read = word_order if task == "order" else lambda split: load_dataset("wordnet_topics", split)
    return {"train": read("train"), "test": read("test")[:TESTED]}


def point(task: str, labels: int, draw: int) -> dict[str, Any]:
    """Test accuracy of probe and LoRA after so many labels, drawn with this seed."""
    chosen = random.Random(draw).sample(entries(task)["train"], labels)
    encoder, tokenizer = load_base("minilm")
    rows, test = encode_topics(chosen, tokenizer), encode_topics(entries(task)["test"], tokenizer)
    fitted = probe(embed(encoder, rows), [row["labels"] for row in rows])
    probed = fitted.score(embed(encoder, test).numpy(), [row["labels"] for row in test])
    classes = 1 + max(row["label"] for row in entries(task)["test"])
    model, _ = load_base("minilm", head="classification", num_labels=classes)
    torch.manual_seed(draw)
    inject(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="SEQ_CLS"))
    train(
        model,
        rows,
        steps=STEPS[task],
        learning_rate=RATES[task],
        batch_size=BATCH,
        warmup_steps=WARMUP,
        schedule=SCHEDULES[task],
        seed=draw,
    )
    return {"probe": round(probed, 4), "lora": round(accuracy(model, test), 4)}


def prompted(way: str) -> dict[str, Any]:
    """Accuracy of SmolLM2 with so chosen examples in the prompt, tokens of a prompt, and seconds for an answer."""
    model, tokenizer = load_base("smollm2-135m")
    encoder, its_tokenizer = load_base("minilm")
    shelf, asked = entries("topics")["train"], entries("topics")["test"][:ASKED]
    names = sorted({row["topic"] for row in shelf})
    vectors, queries = (embed(encoder, encode_topics(rows, its_tokenizer)) for rows in (shelf, asked))
    draw, right, tokens, seconds = random.Random(0), 0, 0, 0.0
    for row, query in zip(asked, queries, strict=True):
        shown: list[dict[str, Any]] = []
        if way == "random":
            shown = draw.sample(shelf, EXAMPLES)
        elif way == "retrieved":
            shown = [shelf[place] for place in nearest(vectors, query, EXAMPLES)]
        prompt = topic_prompt(row["definition"], shown, names)
        start = time.process_time()
        right += answer(model, tokenizer, prompt, names) == row["topic"]
        seconds += time.process_time() - start
        tokens += len(tokenizer(prompt)["input_ids"])
    means = {"accuracy": right / ASKED, "tokens": tokens / ASKED, "seconds": seconds / ASKED}
    return {name: round(value, 4) for name, value in means.items()}


def main() -> None:
    """Command line."""
    path = data_path("runs", f"{NAME}.json")
    settings = {"r": RANK, "batch": BATCH, "rates": RATES, "steps": STEPS, "examples": EXAMPLES, "asked": ASKED}
    settings |= {"schedules": SCHEDULES, "tested": TESTED}
    record: dict[str, Any] = {"command": f"python -m lora_edu.lab.recording.{NAME}", "settings": settings}
    record |= {"machines": [], "runs": []}
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
    settle()
    for job in missing(jobs(), record):
        record["runs"].append({"job": job, "machine": here(record)} | do(job))
        write(path, record)


if __name__ == "__main__":
    main()
