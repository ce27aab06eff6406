"""One job of the referee: a training run and its results, or what a step costs. ``referee.py`` lists the jobs."""

import copy
import dataclasses
import gc
import math
import tempfile
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.core.entrants import Entrant, registered_entrants
from lora_edu.core.inject import count_parameters, inject
from lora_edu.core.parts import TASK_HEADS
from lora_edu.core.peft_io import save_adapter
from lora_edu.core.state import injected_models
from lora_edu.counting.measure import paired_times
from lora_edu.lab.datasets import collate
from lora_edu.lab.distributed import process_state
from lora_edu.lab.hooks import Hooks
from lora_edu.lab.recording import baselines  # noqa: F401  (they register)
from lora_edu.lab.recording.tasks import PLAN, Plan, Task, loaded
from lora_edu.lab.training import accuracy, evaluate, set_seed, train

REFERENCE = "lora-r8"  # the entrant whose step is the unit of time


def trial(plan: Plan, job: dict[str, Any]) -> dict[str, Any]:
    """Do one job. Its ``stage`` says what for:

    - ``"base"``: the model as it comes, on validation, test and, for a language model, plain definitions;
    - ``"tune"``: a run at one rate and batch, on the validation split alone;
    - ``"seed"``: a run at the chosen rate and batch, on all of them, with what it trains and how large its file is;
    - ``"step"``: time and memory of a step. Nothing else should run on the machine then.

    Losses are in nats per token (a classifier: per row, and its accuracy); None where they are not finite.
    """
    task = plan.tasks[job["task"]]
    if job["stage"] == "step":
        return step_cost(plan, task, entrant_called(job["method"]))
    if job["stage"] == "base":
        base, splits = loaded(task)
        return results(copy.deepcopy(base).to(process_state().device), splits, ("validation", "test", "plain"))
    start = time.perf_counter()
    entrant = entrant_called(job["method"])
    model, splits = prepared(task, entrant, job["seed"], plan.start_batches)
    steps = task.steps(job["batch"])
    train(
        model,
        splits["train"],
        steps=steps,
        learning_rate=job["rate"],
        batch_size=job["batch"],
        schedule=plan.schedule,
        warmup_steps=round(plan.warmup * steps),
        optimizer=entrant.optimizer,
        seed=job["seed"],
    )
    found = results(model, splits, ("validation",) if job["stage"] == "tune" else ("validation", "test", "plain"))
    if job["stage"] == "seed":
        found |= {"trainable": count_parameters(model)[0], "file_bytes": file_bytes(model)}
    return found | {"seconds": round(time.perf_counter() - start, 2)}


def entrant_called(name: str) -> Entrant:
    """The registered entrant of that name.

    Raises:
        ValueError: if there is none.
    """
    known = {entrant.name: entrant for entrant in registered_entrants()}
    if name not in known:
        raise ValueError(f"unknown entrant {name!r}; there are: {', '.join(known)}")
    return known[name]


def prepared(
    task: Task, entrant: Entrant, seed: int, start_batches: int = PLAN.start_batches
) -> tuple[nn.Module, dict[str, list]]:
    """A fresh model, on this process's GPU if there is one, with what the entrant trains made trainable; the data.

    A method whose start is computed from data gets so many of the first training batches.

    Raises:
        ValueError: if the task is to classify and the new head is not among it.
    """
    base, splits = loaded(task)
    device = process_state().device
    model = copy.deepcopy(base).to(device)
    set_seed(seed)
    if entrant.unfreeze:
        entrant.unfreeze(model.requires_grad_(False), task.place)
    elif entrant.config:
        config = dataclasses.replace(entrant.config(task.place), task_type=task.place.task_type)
        inject(model, config, batches=_batches(model, splits["train"], task, start_batches))
    heads = TASK_HEADS.get(task.place.task_type, ())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if heads and not any(part in heads for name in trained for part in name.split(".")):
        raise ValueError(
            f"entrant {entrant.name!r} does not train the new head of {task.base!r}, so it cannot learn to classify: "
            "where it injects by itself, its config needs task_type=place.task_type"
        )
    return model, splits


def results(model: nn.Module, splits: dict[str, list], names: tuple[str, ...]) -> dict[str, Any]:
    """The loss on each of these splits that there is, and for a classifier its accuracy."""
    found: dict[str, Any] = {}
    for name in names:
        if name in splits:
            loss = evaluate(model, splits[name])
            found[name] = round(loss, 4) if math.isfinite(loss) else None
            if not isinstance(splits[name][0]["labels"], list):
                found[f"{name} accuracy"] = round(accuracy(model, splits[name]), 4)
    return found


def file_bytes(model: nn.Module) -> int:
    """How large the file with what was trained is; for what is no adapter, the size of the trained tensors."""
    if not injected_models(model):
        return sum(each.numel() * each.element_size() for each in model.parameters() if each.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        return (save_adapter(model, folder) / "adapter_model.safetensors").stat().st_size


def step_cost(plan: Plan, task: Task, entrant: Entrant) -> dict[str, Any]:
    """Time of a training step as a ratio to the reference's, in turns with it, and its peak memory on a GPU."""
    cuda = process_state().device.type == "cuda"
    _Steps(task, entrant)()  # a process's first steps also allocate cuBLAS's workspaces, which then stay
    gc.collect()  # what this and earlier jobs left
    before = torch.cuda.memory_allocated() if cuda else 0
    own = _Steps(task, entrant)
    for _ in range(2):  # AdamW's moments come with the first step
        own()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    own()
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    times = paired_times({"own": own, "reference": _Steps(task, entrant_called(REFERENCE))}, plan.rounds, warmup=3)
    return {
        "step_ratio": round(times.ratio("own", "reference"), 3),
        "middle_half": [round(each, 3) for each in times.middle_half("own", "reference")],
        "step_seconds": round(median(times.seconds["own"]), 5),
        "peak_bytes": peak,
    }


class _Steps:
    """Training steps on one fixed batch, as ``train`` takes them; a call is one."""

    def __init__(self, task: Task, entrant: Entrant):
        self.model, splits = prepared(task, entrant, seed=0)
        self.batch = next(_batches(self.model, splits["train"], task, 1))
        self.trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = (
            entrant.optimizer(self.model, 1e-4) if entrant.optimizer else torch.optim.AdamW(self.trained, lr=1e-4)
        )
        self.hooks, self.done = Hooks(self.model.train()), 0

    def __call__(self) -> None:
        self.done += 1
        self.hooks.add_to(self.model(**self.batch).loss).backward()
        self.hooks.after_backward(self.done)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.hooks.after_step(self.done)
        self.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _batches(model: nn.Module, rows: list, task: Task, number: int) -> Iterator[dict[str, Tensor]]:
    """The first batches of the training rows, in their order, on the model's device; fewer if there are fewer rows."""
    device = next(model.parameters()).device
    for start in range(0, number * task.batches[0], task.batches[0]):
        if part := rows[start : start + task.batches[0]]:
            batch = collate(part, max(0, getattr(model.config, "pad_token_id", None) or 0))
            yield {name: tensor.to(device) for name, tensor in batch.items()}
