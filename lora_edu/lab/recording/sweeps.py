"""Which runs the recorded sweeps of lessons 06, 07, 10 and 16 are made of. ``full_runs.py`` beside it does them."""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from torch import nn

from lora_edu.core.matching import linear_endings
from lora_edu.counting.meta import load_config, meta_model
from lora_edu.counting.parameters import lora_parameters
from lora_edu.lab.bases import list_bases, require_base

Job = dict[str, Any]
SEEDS = (0, 1, 2)
FIVE_SEEDS = (*SEEDS, 3, 4)
RULES = {  # three ways to set alpha; all give the scale 2 at r = 8
    "alpha / r": lambda r: {"lora_alpha": 16},
    "alpha = 2r": lambda r: {"lora_alpha": 2 * r},
    "rsLoRA": lambda r: {"lora_alpha": 2 * 8**0.5, "use_rslora": True},
}
TARGETS: dict[str, Any] = {
    "q, v": ["q_proj", "v_proj"],
    "q, k, v, o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gate, up, down": ["gate_proj", "up_proj", "down_proj"],
    "all-linear": "all-linear",
}
# Ranks that train as many numbers as r = 8 on all linear layers: the same for tiny to 1 %, for SmolLM2 to 7 %.
SAME_BUDGET = {
    "tiny": {"q, v": 34, "q, k, v, o": 17, "gate, up, down": 15, "all-linear": 8},
    "smollm2-135m": {"q, v": 42, "q, k, v, o": 22, "gate, up, down": 12, "all-linear": 8},
}


def jobs(name: str, base: str | None = None) -> list[Job]:
    """Every run of a sweep, a whole seed before the next: a sweep that is cut short still compares like with like.

    Args:
        name: one of ``SWEEPS``.
        base: another base model than the sweep's own: any name, id or folder that ``load_base`` takes. Tasks, steps
            and rates stay; ranks of different targets are set to train as much as r = 8 on all of its linear layers.

    Raises:
        ValueError: for an unknown name, or a base that is no language model, or lacks the layers that the sweep names.
        FileNotFoundError: for a named base that is not on this machine.
    """
    if name not in SWEEPS:
        raise ValueError(f"unknown sweep {name!r}; there are: {', '.join(SWEEPS)}")
    listed = [{"part": part} | job for part, job in SWEEPS[name]()]
    return listed if base is None else _with_base(name, listed, base)


def _with_base(name: str, listed: list[Job], base: str) -> list[Job]:
    """The same jobs for another base."""
    model = _without_weights(base)
    there = linear_endings(dict(model.named_modules()))
    if not any(each.endswith(("ForCausalLM", "LMHeadModel")) for each in model.config.architectures or []):
        raise ValueError(f"base {base!r} is a {type(model).__name__}: {name} trains language models")
    missing = [ending for ending in TARGETS["q, k, v, o"] + TARGETS["gate, up, down"] if ending not in there]
    if missing and any(job["part"] in ("targets", "inside") for job in listed):
        raise ValueError(
            f"base {base!r} is a {type(model).__name__} without {', '.join(missing)}; its linear layers are "
            f"{', '.join(there)}. {name} compares layers by the names that Llama-like models have; "
            "smollm2_finetuning adapts all linear layers, whatever their names"
        )
    ranks = {} if missing else SAME_BUDGET.get(base) or same_budget(model)
    found = []
    for job in listed:
        job = job | {"base": base}
        if job["part"] == "targets":
            r = next(ranks[place] for place, targets in TARGETS.items() if targets == job["targets"])
            job |= {"r": r, "lora_alpha": 2 * r}
        found.append(job)
    return found


def _without_weights(base: str) -> Any:
    """The base as a model without weights, from its config alone."""
    named = base in {each.name for each in list_bases()}
    return meta_model(load_config(require_base(base) if named else base))


def same_budget(model: nn.Module) -> dict[str, int]:
    """The rank for each of ``TARGETS`` that comes closest to training as much as r = 8 on all linear layers."""
    budget = lora_parameters(model, 8, "all-linear")
    return {name: max(1, round(budget / lora_parameters(model, 1, targets))) for name, targets in TARGETS.items()}


def _finetuning() -> Iterator[tuple[str, Job]]:
    """Lesson 07: full fine-tuning against LoRA, each over its learning rates, five seeds, with curves."""
    common = {"base": "smollm2-135m", "steps": 120, "eval_every": 10, "forgetting": True}
    rates = {"full": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4), "lora": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)}
    for seed in FIVE_SEEDS:
        for method, learning_rates in rates.items():
            for rate in learning_rates:
                yield "methods", common | {"method": method, "learning_rate": rate, "seed": seed}


def _precision() -> Iterator[tuple[str, Job]]:
    """Lesson 06: the adapter's dtype on a base in bfloat16, and all in float32 beside it, over rates."""
    kinds: dict[str, Job] = {
        "all float32": {},
        "float32 adapter": {"dtype": "bfloat16"},
        "bfloat16 adapter": {"dtype": "bfloat16", "autocast_adapter_dtype": False},
    }
    for seed in FIVE_SEEDS:
        for rate, (kind, dtypes) in product((5e-5, 2e-4, 7e-4, 2e-3), kinds.items()):
            job: Job = {"base": "smollm2-135m", "steps": 80, "kind": kind, "learning_rate": rate, "seed": seed}
            yield "precision", job | dtypes


def _choices(
    base: str, task: str, steps: int, rates: tuple[float, ...], full_rates: tuple[float, ...], seeds: tuple[int, ...]
) -> Iterator[tuple[str, Job]]:
    """Lesson 10: one choice at a time, each at several learning rates."""
    common: Job = {"base": base, "task": task, "steps": steps}
    looked_at = {"ranks": (8, 64), "seeds": (0, 1), "learning_rate": rates[1], "full_rate": full_rates[1]}
    yield "inside", common | looked_at
    long = {"steps": 2 * steps, "eval_every": steps // 4, "learning_rate": rates[1]}
    for seed in seeds:
        for (rule, alpha), r, rate in product(RULES.items(), (1, 4, 16, 64), rates):
            yield "rank", common | {"rule": rule, "r": r, "learning_rate": rate, "seed": seed} | alpha(r)
        for (name, targets), rate in product(TARGETS.items(), rates):
            r = SAME_BUDGET[base][name]
            placed = {"targets": targets, "r": r, "lora_alpha": 2 * r}  # the scale is 2 for all: only the place differs
            yield "targets", common | placed | {"learning_rate": rate, "seed": seed}
        for r, rate in product((1, 4, 16, 64), rates[:2]):
            topics = {"base": base, "task": "wordnet_topics", "steps": 2 * steps, "batch_size": 16}
            yield "topics", topics | {"r": r, "learning_rate": rate, "seed": seed}
        for size, method in product((4, 8, 32), ("lora", "full")):
            for rate in rates if method == "lora" else full_rates:
                sized = {"batch_size": size, "steps": steps * 8 // size}
                yield "batch", common | sized | {"method": method, "learning_rate": rate, "seed": seed}
        for rows, r in product((64, 256, None), (1, 8, 64)):
            yield "data", common | long | {"rows": rows, "r": r, "seed": seed}
        for r, dropout in product((8, 64), (0.0, 0.05, 0.1, 0.3)):
            yield "dropout", common | long | {"rows": 256, "r": r, "lora_dropout": dropout, "seed": seed}


def _tiny_choices() -> Iterator[tuple[str, Job]]:
    for seed in SEEDS:
        for rate in (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2):
            yield "rate", {"task": "jargon", "learning_rate": rate, "seed": seed}
        for rate in (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3):
            yield "rate", {"task": "jargon", "method": "full", "learning_rate": rate, "seed": seed}
    yield from _choices("tiny", "jargon", 60, (1e-3, 3e-3, 1e-2), (2e-4, 5e-4, 1e-3), SEEDS)


def _tiny_schedules() -> Iterator[tuple[str, Job]]:
    """Lesson 07: a constant rate against one that falls linearly, each over its rates, five seeds, with curves."""
    common: Job = {"steps": 120, "eval_every": 20}
    rates = {"constant": (5e-4, 1e-3, 2e-3, 5e-3), "linear": (1e-3, 2e-3, 5e-3)}  # the best of each lies inside
    for seed in FIVE_SEEDS:
        for schedule, learning_rates in rates.items():
            for rate in learning_rates:
                yield "schedule", common | {"schedule": schedule, "learning_rate": rate, "seed": seed}


def _tiny_starts() -> Iterator[tuple[str, Job]]:
    """Lesson 16: three rules for alpha at four ranks, from either start, and PiSSA; over rates, one long run for each.

    Nothing is clipped: then two ratios of rates, scale and the start's size decide all, and LoRA+ with the ratio 16 is
    plain LoRA with 16 times the alpha. So alpha = 2r with LoRA+, either way round, needs no optimizer of its own.
    """
    common: Job = {"task": "jargon", "steps": 400, "eval_every": 25, "every_step": False, "max_grad_norm": 1e9}
    for seed in SEEDS:
        for start, r in product("AB", (1, 4, 16, 64)):
            alphas = {32.0, 2.0 * r, r**0.5}  # at r = 16 two rules are one
            if (start, r) == ("A", 4):
                alphas |= {2.0 * r * 16, 2.0 * r / 16}
            for alpha in sorted(alphas):
                # Where the best rate lay after 25 steps, and a little lower, as it is after more.
                middle = -7 - 0.65 * math.log2(alpha) if start == "A" else -11.5 - math.log2(alpha / r)
                for exponent in range(round(middle) - 4, round(middle) + 4):
                    job = {"start": start, "r": r, "lora_alpha": alpha, "learning_rate": 2.0**exponent, "seed": seed}
                    yield "starts", common | job
        for exponent in range(-14, -6):  # the rates of plain LoRA at the same rank and scale
            pissa = {"start": "pissa", "r": 16, "lora_alpha": 32.0, "learning_rate": 2.0**exponent, "seed": seed}
            yield "starts", common | pissa


def _smollm2_choices() -> Iterator[tuple[str, Job]]:
    rates, full_rates = (2e-4, 7e-4, 2e-3), (2e-5, 5e-5, 1e-4)
    yield from _choices("smollm2-135m", "devils_dictionary", 80, rates, full_rates, FIVE_SEEDS)


WHAT = {  # in a word, and what each needs
    "smollm2_finetuning": "lessons 04, 07: full fine-tuning and LoRA over rates; needs the base smollm2-135m",
    "smollm2_precision": "lesson 06: adapters in float32 and in bfloat16; needs the base smollm2-135m",
    "smollm2_choices": "lesson 10: one choice at a time; needs the base smollm2-135m",
    "tiny_choices": "lesson 10: one choice at a time, with the base tiny",
    "tiny_schedules": "lesson 07: a constant rate against one that falls, with the base tiny",
    "tiny_starts": "lesson 16: rules for alpha, starts and PiSSA over rates at four ranks, with the base tiny",
}
SWEEPS = {
    "smollm2_finetuning": _finetuning,
    "smollm2_precision": _precision,
    "smollm2_choices": _smollm2_choices,
    "tiny_choices": _tiny_choices,
    "tiny_schedules": _tiny_schedules,
    "tiny_starts": _tiny_starts,
}
