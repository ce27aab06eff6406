"""One training run, described by a few settings and answered with its losses: what the recorded sweeps are made of.

A job is a plain dictionary, so that it can be written to a file beside its result. What it does not name is as in
``DEFAULTS``. Lessons 06, 07, 10 and 16 show the results; ``lora_edu/lab/recording/sweeps.py`` lists the jobs.
"""

import copy
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.core.adapter import AdapterLayer, adapter_layers
from lora_edu.core.config import LoraConfig
from lora_edu.core.inject import inject
from lora_edu.core.matching import layer_index
from lora_edu.lab.bases import load_base
from lora_edu.lab.datasets import encode, encode_topics, load_dataset
from lora_edu.lab.distributed import process_state
from lora_edu.lab.training import accuracy, evaluate, set_seed, train
from lora_edu.lowrank import amplification_factor, effective_rank, intruder_dimensions, subspace_similarity

DEFAULTS: dict[str, Any] = {
    "base": "tiny",
    "task": "devils_dictionary",  # or "jargon", or "wordnet_topics" for a classifier
    "method": "lora",  # or "full": every weight is trained
    "r": 8,
    "lora_alpha": 16,
    "use_rslora": False,
    "targets": "all-linear",
    "lora_dropout": 0.0,
    "start": "A",  # the factor that is random, the other is zero; "B": drawn as A usually is; or init_lora_weights
    "dtype": "float32",  # of the base, also of every weight that full fine-tuning trains
    "autocast_adapter_dtype": True,  # A and B in float32 on a base in half precision
    "learning_rate": 1e-3,
    "schedule": "constant",  # or "linear": the rate falls to nearly zero
    "max_grad_norm": 1.0,
    "steps": 60,
    "batch_size": 8,
    "rows": None,  # how many entries of the training split; None: all
    "eval_every": None,  # None: the validation loss at the end only
    "every_step": True,  # False: without the training loss of every step, where there are many runs
    "forgetting": False,  # also the losses on plain definitions, WordNet's
    "seed": 0,
}
LOOKING_INSIDE = (
    "base",
    "task",
    "steps",
    "ranks",
    "seeds",
    "learning_rate",
    "full_rate",
)  # what look_inside's job names
DTYPES = ("float32", "bfloat16", "float16")
TOPICS_TASK = "wordnet_topics"
TOPICS = 10
PLAIN_ROWS = 100


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says; losses in nats per token (a classifier: per row, and its accuracy), on fixed splits.

    Returns:
        ``train_loss`` of every step, if ``every_step``; ``validation`` and ``test`` at the end; with ``eval_every``
        also ``eval_steps`` and the ``curves`` of the validation split and, with ``forgetting``, of ``plain``
        definitions, as WordNet has them, and of the same ones ``punctuated``: with a capital letter and a full stop,
        as the dictionaries have them.

    Raises:
        ValueError: for a setting that no job has, an unknown method, or settings that do not go together.
    """
    settings = _settings(job)
    model, splits = _prepared(settings)
    curves = {"validation": splits["validation"]} if settings["eval_every"] else {}
    if settings["forgetting"]:
        curves |= {name: splits[name] for name in ("plain", "punctuated")}
    names = ("steps", "learning_rate", "schedule", "batch_size", "max_grad_norm", "seed")
    history = train(
        model,
        splits["train"][: settings["rows"]],
        eval_data=curves or None,
        eval_every=settings["eval_every"] or settings["steps"],
        **{name: settings[name] for name in names},
    )
    result: dict[str, Any] = {"train_loss": _rounded(history.train_loss)} if settings["every_step"] else {}
    if curves:
        result |= {"eval_steps": history.eval_steps}
        result |= {"curves": {name: _rounded(losses) for name, losses in history.eval_loss.items()}}
    for split in ("validation", "test"):
        result[split] = round(evaluate(model, splits[split]), 4)
        if settings["task"] == TOPICS_TASK:
            result[f"{split} accuracy"] = round(accuracy(model, splits[split]), 4)
    return result


def look_inside(job: dict[str, Any]) -> dict[str, Any]:
    """Train two ranks from two seeds, and everything once, and measure what the updates look like.

    The job names ``base``, ``task``, ``steps``, ``ranks`` (two), ``seeds`` (two), and a ``learning_rate`` for LoRA
    and a ``full_rate``.

    Returns:
        For each run the mean over layers of ΔW's effective rank, of ‖ΔW‖/‖W‖ and of the amplification factor, and how
        many intruder dimensions its matrices have; φ for all i, j of two runs' ``q_proj``, as a mean over layers.

    Raises:
        ValueError: if the job names something else, or not two rising ranks and two seeds.
    """
    if set(job) != set(LOOKING_INSIDE) or len(job["ranks"]) != 2 or len(set(job["seeds"])) != 2:
        raise ValueError(f"expected a job with {', '.join(LOOKING_INSIDE)}, of them two ranks and two seeds; got {job}")
    small, large = job["ranks"]
    if small >= large:
        raise ValueError(f"ranks={job['ranks']}: the smaller one first, as (8, 64)")
    common = {name: job[name] for name in ("base", "task", "steps")}
    runs = {
        f"r={r}, seed {seed}": common | {"r": r, "seed": seed, "learning_rate": job["learning_rate"]}
        for r in (small, large)
        for seed in job["seeds"]
    }
    runs["full"] = common | {"method": "full", "learning_rate": job["full_rate"], "seed": job["seeds"][0]}
    spectra, factors = {}, {}
    for name, each in runs.items():
        spectra[name], factors[name] = _spectrum(_settings(each))
    first, second = (f"seed {seed}" for seed in job["seeds"])
    pairs = {
        "two ranks": (f"r={small}, {first}", f"r={large}, {first}"),
        f"two seeds, r={small}": (f"r={small}, {first}", f"r={small}, {second}"),
        f"two seeds, r={large}": (f"r={large}, {first}", f"r={large}, {second}"),
    }
    overlap = {name: _overlap(factors[one], factors[other], small) for name, (one, other) in pairs.items()}
    generator = torch.Generator().manual_seed(0)
    chance = [torch.randn(factor.shape, generator=generator) for factor in factors[pairs["two ranks"][1]]]
    overlap["chance"] = _overlap(factors[pairs["two ranks"][0]], chance, small)
    return {"spectra": spectra, "overlap": overlap}


def _spectrum(settings: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """One run's numbers, and its A matrices of ``q_proj``, layer by layer."""
    model, splits = _prepared(settings)
    before = {name: layer.weight.detach().cpu().clone() for name, layer in _linears(model)}
    names = ("steps", "learning_rate", "batch_size", "seed")
    train(model, splits["train"], **{name: settings[name] for name in names})
    numbers, factors = [], []
    top = min(settings["r"], 4)
    for name, layer in _linears(model):
        W, weight = before[name], layer.weight
        if isinstance(layer, AdapterLayer):
            weight = layer.effective_weight()
        after = weight.detach().cpu()
        numbers.append(
            {
                "effective rank": effective_rank(after - W),
                "relative size": ((after - W).norm() / W.norm()).item(),
                "amplification": amplification_factor(W, after - W, top),
                "intruders": intruder_dimensions(W, after),
            }
        )
        if callable(getattr(layer, "factors", None)) and name.endswith("q_proj"):
            factors.append(layer.factors()[0].detach().cpu())
    report: dict[str, Any] = {
        key: round(sum(each[key] for each in numbers) / len(numbers), 4)
        for key in ("effective rank", "relative size", "amplification")
    }
    report |= {"intruders": sum(each["intruders"] for each in numbers), "matrices": len(numbers)}
    return report | {"test": round(evaluate(model, splits["test"]), 4)}, factors


def _overlap(one: list[Tensor], other: list[Tensor], largest: int) -> list[list[float]]:
    """φ(i, j) for i, j = 1 … largest, as a mean over layers."""
    sizes = range(1, largest + 1)
    return [
        [
            round(sum(subspace_similarity(a, b, i, j) for a, b in zip(one, other, strict=True)) / len(one), 4)
            for j in sizes
        ]
        for i in sizes
    ]


def _settings(job: dict[str, Any]) -> dict[str, Any]:
    """The job with all that it does not name, if it makes sense."""
    if unknown := job.keys() - DEFAULTS.keys():
        raise ValueError(f"a job with {sorted(unknown)}: the settings are {', '.join(DEFAULTS)}")
    settings = DEFAULTS | job
    if settings["method"] not in ("lora", "full"):
        raise ValueError(f"method={settings['method']!r}: expected 'lora' or 'full'")
    if settings["dtype"] not in DTYPES:
        raise ValueError(f"dtype={settings['dtype']!r}: expected {' or '.join(map(repr, DTYPES))}")
    if settings["forgetting"] and settings["task"] == TOPICS_TASK:
        raise ValueError(f"forgetting=True with task={TOPICS_TASK!r}: a classifier has no loss on plain definitions")
    return settings


def _prepared(settings: dict[str, Any]) -> tuple[nn.Module, dict[str, list]]:
    """A fresh model, on this process's GPU if there is one, with what is to be trained made trainable; and the data."""
    topics = settings["task"] == TOPICS_TASK
    base, splits = _loaded(settings["base"], settings["task"])
    model = copy.deepcopy(base).to(process_state().device, getattr(torch, settings["dtype"]))
    set_seed(settings["seed"])
    if settings["method"] == "full":
        return model.requires_grad_(True), splits
    names = ("r", "lora_alpha", "use_rslora", "lora_dropout")
    config = LoraConfig(
        target_modules=settings["targets"],
        init_lora_weights=True if settings["start"] in ("A", "B") else settings["start"],
        modules_to_save=["score"] if topics else None,
        **{name: settings[name] for name in names},
    )
    inject(model, config, autocast_adapter_dtype=settings["autocast_adapter_dtype"])
    if settings["start"] == "B":
        exchange_starts(model)
    return model, splits


def exchange_starts(model: nn.Module) -> None:
    """Set every A to zero and draw every B as A usually is: uniform, its variance 1 / (3 · its inputs, which are r)."""
    for layer in adapter_layers(model).values():
        A, B = layer.adapter_parameters()
        nn.init.zeros_(A)
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))


@cache
def _loaded(name: str, task: str) -> tuple[nn.Module, dict[str, list]]:
    """Base and encoded splits, once for each process. A classifier's head is drawn from seed 0, whatever the job's."""
    rows = {split: load_dataset(task, split) for split in ("train", "validation", "test")}
    if task == TOPICS_TASK:
        model, tokenizer = load_base(name, head="classification", num_labels=TOPICS)
        return model, {split: encode_topics(entries, tokenizer) for split, entries in rows.items()}
    rows["plain"] = load_dataset("wordnet_glosses", "validation")[:PLAIN_ROWS]
    rows["punctuated"] = [punctuated(entry) for entry in rows["plain"]]
    model, tokenizer = load_base(name)
    chat = bool(tokenizer.chat_template)
    length = 96 if chat else 64  # the template takes 35
    return model, {split: encode(entries, tokenizer, length, chat) for split, entries in rows.items()}


def punctuated(entry: dict[str, str]) -> dict[str, str]:
    """A dictionary's entry, its definition begun with a capital letter and ended with a full stop."""
    text = entry["definition"]
    return entry | {"definition": text[:1].upper() + text[1:] + "." * (not text.endswith("."))}


def _linears(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that are looked at: q_proj and up_proj of every block, of a deep model those of every third."""
    found = [each for each in model.named_modules() if each[0].endswith(("q_proj", "up_proj"))]
    blocks = len(found) // 2
    every = 1 if blocks < 10 else 3
    return [(name, layer) for name, layer in found if (layer_index(name) or 0) % every == 0]


def _rounded(losses: list[float]) -> list[float]:
    return [round(loss, 4) for loss in losses]
