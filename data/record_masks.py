"""Records what lesson 17 asks of low rank: LoRA beside masks that let as many numbers of the weights train.

    python data/record_masks.py             # data/runs/masks.json; four minutes on one core
    python data/record_masks.py --out FILE

`tiny` learns the Jargon File in 60 steps of 8. Every way has its rate tuned on the validation entries, with a seed that
takes no part in what is compared; then five seeds are tested. Every finished run is in the file at once; started again,
the script does what is missing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_edu import LoraConfig, ShiraConfig, count_parameters, inject, load_base, load_dataset
from lora_edu.files import data_path
from lora_edu.lab.datasets import collate, encode
from lora_edu.lab.recording.records import surroundings, write_record
from lora_edu.lab.training import evaluate, set_seed, train

R, STEPS, BATCH, GRADIENT_BATCHES = 8, 60, 8, 8
RATES = {
    "lora": (1e-3, 2e-3, 3e-3, 5e-3),
    "random": (1e-3, 2e-3, 3e-3, 5e-3),
    "gradient": (5e-4, 1e-3, 2e-3, 3e-3, 5e-3),
    "full": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
}
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)


def gradients(model: nn.Module, rows: list[dict[str, Any]], seed: int) -> dict[int, torch.Tensor]:
    """{id of a linear layer: gradient of its weight}, summed over a few random batches of training rows."""
    layers = [each for name, each in model.named_modules() if isinstance(each, nn.Linear) and "lm_head" not in name]
    weights = [layer.weight.requires_grad_(True) for layer in layers]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    loss = torch.zeros(())
    for batch in order[: BATCH * GRADIENT_BATCHES].split(BATCH):
        loss = loss + model(**collate([rows[place] for place in batch.tolist()], 0)).loss
    found = torch.autograd.grad(loss, weights)
    model.requires_grad_(False)
    return {id(layer): gradient for layer, gradient in zip(layers, found, strict=True)}


def prepare(model: nn.Module, way: str, rows: list[dict[str, Any]], seed: int) -> None:
    """Make trainable what trains: LoRA's factors, as many entries of each weight, or the weights whole."""
    if way == "lora":
        inject(model, LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear"))
    elif way == "random":
        inject(model, ShiraConfig(r=R, target_modules="all-linear", random_seed=seed))
    elif way == "gradient":
        found = gradients(model, rows, seed)

        def largest(layer: nn.Module, r: int) -> torch.Tensor:
            size = found[id(layer)].abs()
            mask = torch.zeros(size.numel(), dtype=torch.bool)
            mask[size.flatten().topk(r * sum(size.shape)).indices] = True
            return mask.view(size.shape)

        inject(model, ShiraConfig(r=R, target_modules="all-linear", mask_type="gradient", mask_fn=largest))
    else:
        model.requires_grad_(False)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and "lm_head" not in name:
                layer.weight.requires_grad_(True)


def run(job: dict[str, Any], splits: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One training run: how many numbers trained, and the losses."""
    set_seed(job["seed"])
    model, _ = load_base("tiny")
    prepare(model, job["way"], splits["train"], job["seed"])
    train(model, splits["train"], steps=STEPS, batch_size=BATCH, learning_rate=job["learning_rate"], seed=job["seed"])
    losses = {split: round(evaluate(model, splits[split]), 4) for split in ("validation", "test")}
    return {"job": job, "trainable": count_parameters(model)[0]} | losses


def main(out: Path) -> None:
    """Do what is missing in the file."""
    torch.set_num_threads(1)
    base, tokenizer = load_base("tiny")
    splits = {name: encode(load_dataset("jargon", name), tokenizer) for name in ("train", "validation", "test")}
    record: dict[str, Any] = {
        "command": "python data/record_masks.py",
        **surroundings("float32"),
        "settings": {"r": R, "lora_alpha": 2 * R, "steps": STEPS, "batch_size": BATCH, "rates": RATES}
        | {"gradient_batches": GRADIENT_BATCHES, "tuning_seed": TUNING_SEED, "seeds": SEEDS},
        "base": {split: round(evaluate(base, splits[split]), 4) for split in ("validation", "test")},
        "runs": [],
    }
    if out.exists():
        record["runs"] = json.loads(out.read_text(encoding="utf-8"))["runs"]

    def result(way: str, rate: float, seed: int) -> dict[str, Any]:
        job = {"way": way, "learning_rate": rate, "seed": seed}
        for line in record["runs"]:
            if line["job"] == job:
                return line
        record["runs"].append(line := run(job, splits))
        write_record(record, out)
        print(line, flush=True)
        return line

    for way, rates in RATES.items():
        tuned = min((result(way, rate, TUNING_SEED) for rate in rates), key=lambda line: line["validation"])
        for seed in SEEDS:
            result(way, tuned["job"]["learning_rate"], seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=data_path("runs", "masks.json"))
    main(parser.parse_args().out)
