"""Trains the adapter that ships with the course, and records the sweeps that lesson 04 and its exercises quote.

    python data/train_adapters.py sweep --processes 8   # learning rates, ranks, targets; a few minutes
    python data/train_adapters.py ship                  # data/adapters/tiny-devils-dictionary/, half a minute
    python data/train_adapters.py show                                # definitions before and after

All on the CPU, in float32, with fixed seeds. Rates are chosen on the validation split; lessons show the test split.
Settings, losses, versions and dates go to data/runs/tiny_adapters.json.
"""

import argparse
import hashlib
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import cache
from itertools import product
from typing import Any

import torch
import transformers

from lora_edu import LoraConfig, inject, load_adapter, load_base, load_dataset, save_adapter
from lora_edu.core.peft_io import WEIGHTS_FILE
from lora_edu.files import data_path
from lora_edu.lab.datasets import encode
from lora_edu.lab.training import evaluate, generate, set_seed, train

NAME = "tiny-devils-dictionary"
SEEDS = (0, 1, 2)
BUDGET = 78_336  # what r=8 on all linear layers trains: the ranks below cost as much, or a little less
TARGETS: dict[str, tuple[Any, int]] = {
    "q, v": (["q_proj", "v_proj"], 34),
    "q, k, v, o": (["q_proj", "k_proj", "v_proj", "o_proj"], 17),
    "gate, up, down": (["gate_proj", "up_proj", "down_proj"], 15),
}
WORDS = (  # for show
    "philosophy happiness piano patriot wedding politician lawyer love marriage friendship war money computer history "
    "optimist saint king democracy religion truth hope idiot poet doctor opera critic university wisdom beauty death"
)


def jobs() -> list[dict[str, Any]]:
    """Every run of the sweep: full fine-tuning of everything, of the linear layers; LoRA by rank, and by targets."""
    rates = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 3e-3)
    runs = [{"method": method, "rate": rate} for method in ("full", "full, linear layers") for rate in rates]
    for rank, rate in product((1, 2, 4, 8, 16, 32), (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)):
        runs.append({"method": "lora", "targets": "all-linear", "r": rank, "rate": rate})
    for (name, (_, rank)), rate in product(TARGETS.items(), (1e-3, 2e-3, 3e-3, 5e-3, 1e-2)):
        runs.append({"method": "lora", "targets": name, "r": rank, "rate": rate})
    return [{**run, "seed": seed} for run in runs for seed in SEEDS]


@cache
def rows(split: str) -> list[dict[str, list[int]]]:
    """The Devil's Dictionary, encoded."""
    return encode(load_dataset("devils_dictionary", split), load_base("tiny")[1])


def run(job: dict[str, Any]) -> dict[str, Any]:
    """60 steps of 8 rows, as in the lesson; the job with its losses on the validation and the test split."""
    torch.set_num_threads(1)
    set_seed(job["seed"])
    model, _ = load_base("tiny")
    if job["method"] == "lora":
        targets = job["targets"] if job["targets"] == "all-linear" else TARGETS[job["targets"]][0]
        inject(model, LoraConfig(r=job["r"], lora_alpha=8, target_modules=targets))
    elif job["method"] == "full, linear layers":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("_proj.weight"))
    train(model, rows("train"), steps=60, learning_rate=job["rate"], batch_size=8, seed=job["seed"])
    return job | {split: round(evaluate(model, rows(split)), 4) for split in ("validation", "test")}


def sweep(processes: int) -> None:
    """Run all jobs and write the table."""
    todo = jobs()
    with ProcessPoolExecutor(processes) as pool:
        done = []
        for result in pool.map(run, todo):
            done.append(result)
            print(f"{len(done)} of {len(todo)}", result, flush=True)
    base, _ = load_base("tiny")
    start = {split: round(evaluate(base, rows(split)), 4) for split in ("validation", "test")}
    settings = {"steps": 60, "batch_size": 8, "lora_alpha": 8, "optimizer": "AdamW, no decay, clipped to norm 1"}
    write("sweep", {"settings": settings, "base": start, "runs": done})


def ship(rate: float, steps: int, seed: int) -> None:
    """Train r=8 on all linear layers, save the adapter, and note how it went.

    The validation loss is lowest after about 200 steps. The shipped adapter trains for twice as long: its loss is
    still far below the base's, and its greedy text has more of the voice and fewer loops.
    """
    torch.set_num_threads(1)
    set_seed(seed)
    model, _ = load_base("tiny")
    report = inject(model, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    settings = {"steps": steps, "learning_rate": rate, "batch_size": 8, "eval_every": 50, "seed": seed}
    history = train(model, rows("train"), eval_data=rows("validation"), **settings)
    folder = save_adapter(model, data_path("adapters", NAME))
    base, _ = load_base("tiny")
    write(
        NAME,
        {
            "settings": settings | {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "targets": "all-linear"},
            "trainable": report.trainable,
            "eval_steps": history.eval_steps,
            "validation": [round(loss, 4) for loss in history.eval_loss["held-out"]],
            "lowest_validation_at_step": history.best_step,
            "train": {
                name: round(evaluate(m, rows("train")), 4) for name, m in {"base": base, "adapted": model}.items()
            },
            "test": {name: round(evaluate(m, rows("test")), 4) for name, m in {"base": base, "adapted": model}.items()},
            "sha256": hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
        },
    )
    show()


def show() -> None:
    """Print definitions by the base and by the shipped adapter, greedily."""
    model, tokenizer = load_base("tiny")
    words = WORDS.split()
    prompts = [f"{word} (noun):" for word in words]
    before = generate(model, tokenizer, prompts)
    load_adapter(model, data_path("adapters", NAME))
    for word, old, new in zip(words, before, generate(model, tokenizer, prompts), strict=True):
        print(f"{word}\n  before: {old}\n  after:  {new}")


def write(key: str, entry: dict[str, Any]) -> None:
    """Put one entry into the log, with what is needed to repeat it."""
    path = data_path("runs", "tiny_adapters.json")
    path.parent.mkdir(exist_ok=True)
    log = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    base = hashlib.sha256(data_path("tiny", "model.safetensors").read_bytes()).hexdigest()
    where = {
        "date": date.today().isoformat(),
        "hardware": f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]}
        | {"transformers": transformers.__version__},
        "base_sha256": base,
    }
    command = "sweep" if key == "sweep" else "ship"
    log[key] = {"command": f"python data/train_adapters.py {command}", **where, **entry}
    path.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sweep", "ship", "show"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=2)
    given = parser.parse_args()
    if given.what == "sweep":
        sweep(given.processes)
    elif given.what == "ship":
        ship(given.rate, given.steps, given.seed)
    else:
        show()


if __name__ == "__main__":
    main()
