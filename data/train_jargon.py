"""Trains the second adapter that ships with the course: `tiny` learns to speak like the Jargon File.

    python data/train_jargon.py          # data/adapters/tiny-jargon/ and data/runs/tiny_jargon.json, half a minute
    python data/train_jargon.py --show   # definitions by the base and by the adapter

Lesson 09 serves it beside the first one. Its layers and rank are those of `tiny-devils-dictionary`, so that one can be
swapped for the other in place; its lora_alpha is another one on purpose: whoever swaps the tensors alone gets a wrong
scale. CPU, float32, fixed seed.
"""

import argparse
import hashlib
import json
import platform
from datetime import date

import torch
import transformers

from lora_edu import LoraConfig, inject, load_adapter, load_base, load_dataset, save_adapter
from lora_edu.core.peft_io import WEIGHTS_FILE
from lora_edu.files import data_path
from lora_edu.lab.datasets import encode
from lora_edu.lab.training import evaluate, generate, set_seed, train

NAME = "tiny-jargon"
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
TRAINING = {"steps": 600, "learning_rate": 1e-3, "batch_size": 8, "eval_every": 50, "seed": 0}
WORDS = [
    "politician",
    "computer",
    "hacker",
    "program",
    "bug",
    "lawyer",
    "love",
    "kernel",
    "bit",
    "user",
    "manager",
    "wizard",
]


def main() -> None:
    """Train, save, and write down how it went."""
    torch.set_num_threads(1)
    base, tokenizer = load_base("tiny")
    rows = {split: encode(load_dataset("jargon", split), tokenizer) for split in ("train", "validation", "test")}
    set_seed(TRAINING["seed"])
    model, _ = load_base("tiny")
    report = inject(model, LoraConfig(**LORA))
    history = train(model, rows["train"], eval_data=rows["validation"], **TRAINING)
    folder = save_adapter(model, data_path("adapters", NAME))
    models = {"base": base, "adapted": model}
    log = {
        "command": "python data/train_jargon.py",
        "date": date.today().isoformat(),
        "hardware": f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        },
        "base_sha256": hashlib.sha256(data_path("tiny", "model.safetensors").read_bytes()).hexdigest(),
        "settings": LORA | TRAINING,
        "trainable": report.trainable,
        "eval_steps": history.eval_steps,
        "validation": [round(loss, 4) for loss in history.eval_loss["held-out"]],
        "lowest_validation_at_step": history.best_step,
        "test": {name: round(evaluate(each, rows["test"]), 4) for name, each in models.items()},
        "sha256": hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
    }
    data_path("runs", "tiny_jargon.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(log, indent=1))
    show()


def show() -> None:
    """Print definitions by the base and by the shipped adapter, greedily."""
    model, tokenizer = load_base("tiny")
    prompts = [f"{word} (noun):" for word in WORDS]
    before = generate(model, tokenizer, prompts)
    load_adapter(model, data_path("adapters", NAME))
    for prompt, old, new in zip(prompts, before, generate(model, tokenizer, prompts), strict=True):
        print(f"{prompt}\n  before: {old}\n  after:  {new}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    show() if parser.parse_args().show else main()
