"""One short training loop for every lesson, with evaluation and generation. First used in lesson 02.

Whatever requires a gradient is trained, be it a whole model, a LoRA adapter of ours or one of PEFT's. It runs on the
CPU, or with ``LORA_EDU_RUN=full`` on the device that Accelerate picks, a GPU where there is one, and the model is then
where it was before. ``accelerate launch`` runs it on several: configurations are in ``data/accelerate/``, and
``lora_edu/lab/distributed.py`` has what they have to agree on.
"""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_edu.lab.datasets import collate, prompt_ids, shuffled_batches
from lora_edu.lab.distributed import (
    STREAM,
    broadcast_from_main,
    copy_back,
    copy_to_shard,
    count_targets,
    home_device,
    new_accelerator,
    own_gpu,
    shards,
    split_batch,
)
from lora_edu.lab.hooks import Hooks
from lora_edu.lab.schedules import rate_factor
from lora_edu.lab.stopping import Best

Row = dict[str, Any]  # one encoded entry: input_ids, and labels (a list as long, or one class)


@dataclass
class History:
    """What happened in one call of :func:`train`; losses are means per token, in nats.

    ``train_loss[i]`` is the loss of the batch of step ``steps[i]`` (counted from 1), before that step's update.
    ``eval_loss[name][j]`` is the held-out loss after ``eval_steps[j]`` updates; the first is 0, the model as it came.
    """

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    eval_loss: dict[str, list[float]] = field(default_factory=dict)
    best_step: int | None = None  # where the first held-out set had its lowest loss
    stopped_early: bool = False


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's random numbers, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train(
    model: nn.Module,
    data: Sequence[Row],
    *,
    steps: int = 60,
    learning_rate: float = 3e-3,
    batch_size: int = 8,
    eval_data: Sequence[Row] | Mapping[str, Sequence[Row]] | None = None,
    eval_every: int = 20,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    schedule: str = "constant",
    max_grad_norm: float = 1.0,
    patience: int | None = None,
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None,
    seed: int = 0,
) -> History:
    """Train what requires a gradient, with AdamW if nothing else is said, and return the losses on the way.

    Args:
        model: a language model or a classifier that returns ``.loss`` when it is given labels.
        data: encoded rows (see :func:`lora_edu.lab.datasets.encode`).
        steps: number of updates, each on ``batch_size`` rows; the rows are shuffled anew whenever all were used.
        batch_size: rows of one update, over all processes together: each takes its share of them.
        learning_rate: rises linearly over ``warmup_steps``, then stays, or falls linearly with ``schedule="linear"``.
        eval_data: held-out rows, or several sets by name; evaluated before the first step, every ``eval_every`` steps
            and after the last. Rows without a name are called "held-out".
        max_grad_norm: gradients are scaled down to this norm where theirs is larger.
        patience: stop after this many evaluations in a row without a new lowest loss on the first held-out set, and
            put the best trainable weights back. ``None`` trains to the end and keeps the last weights.
        optimizer: function of the model and ``learning_rate`` → the optimizer, if it is not to be AdamW with one rate
            for all and ``weight_decay``. The rates of all its groups rise and fall with the schedule.
        seed: fixes the order of the batches (the same for every model) and what is random in the model, like dropout.
            The caller's own random state is left as it was.

    Modules and adapters' configs that define ``extra_loss()``, ``after_backward(step)`` or ``after_step(step)`` have
    them called; see ``lab/hooks.py``. Adapted layers that the first step does not reach are named in a warning.

    Under ``accelerate launch`` all processes call this with the same model and data, and get the same history and the
    same trained weights, those of one process up to rounding (dropout is drawn by each on its own). The held-out rows
    are evaluated whole by every process. With FSDP a copy of the model is trained in shards, and the caller's gets the
    trained weights back: leave it on the CPU if it is too large for one GPU. What the modules above note in themselves,
    other than parameters and buffers, stays in that copy, and the gradients that they see there are shards.

    Raises:
        ValueError: if nothing requires a gradient, if there are no rows, if ``patience`` is given without eval_data,
            if there are more processes than rows in a batch, or for a schedule that there is not.
    """
    sets = eval_data if isinstance(eval_data, Mapping) else {"held-out": eval_data} if eval_data else {}
    accelerator = new_accelerator()
    index, processes = accelerator.process_index, accelerator.num_processes
    _check_arguments(model, data, steps, sets, patience)
    if batch_size < processes:
        raise ValueError(
            f"batch_size={batch_size} for {processes} processes: it counts the rows of all together, and each needs at "
            f"least one; raise it, or launch with --num_processes {max(1, batch_size)}"
        )
    # ``inner`` holds the weights that train; ``outer`` is what runs: with DDP a wrapper that averages the gradients.
    sharded, home = shards(accelerator), home_device(model, accelerator)
    inner = copy_to_shard(model) if sharded else model
    if optimizer is None:
        stepper: torch.optim.Optimizer = torch.optim.AdamW(
            _trainable(inner), lr=learning_rate, weight_decay=weight_decay
        )
    else:
        stepper = optimizer(inner, learning_rate)
    outer, wrapped = accelerator.prepare(inner, stepper)
    # Not prepared: Accelerate would step it once for each process, and here one step is one step of all.
    rates = torch.optim.lr_scheduler.LambdaLR(stepper, rate_factor(schedule, steps, warmup_steps))
    trainable = _trainable(inner)
    hooks = Hooks(inner)
    order = shuffled_batches(len(data), batch_size, seed)
    history, best = History(eval_loss={name: [] for name in sets}), Best(patience)
    silent = os.environ.get("LORA_EDU_PROGRESS") == "0" or not accelerator.is_main_process
    was_training = model.training
    with torch.random.fork_rng(devices=own_gpu()):
        torch.manual_seed(seed + STREAM * index)  # each process draws its own dropout
        best.see(_evaluate_all(inner, sets, history, 0), 0, trainable)
        outer.train()
        for step in tqdm(range(1, steps + 1), desc="training", unit="step", disable=silent):
            rows, factor = split_batch([data[i] for i in next(order)], index, processes)
            loss = outer(**_collate(inner, rows)).loss * factor
            history.steps.append(step)
            history.train_loss.append(accelerator.reduce(loss.detach(), "mean").item())
            accelerator.backward(hooks.add_to(loss))
            hooks.after_backward(step)
            accelerator.clip_grad_norm_(trainable, max_grad_norm)
            wrapped.step()
            hooks.after_step(step)
            rates.step()
            wrapped.zero_grad()
            if step % eval_every == 0 or step == steps:
                best.see(_evaluate_all(inner, sets, history, step), step, trainable)
            if best.out_of_patience:
                history.stopped_early = step < steps
                break
    best.restore(trainable)
    if sharded:
        copy_back(inner, model)
    if home is not None:
        model.to(home)
    history.best_step = best.step
    model.train(was_training)
    return history


@torch.no_grad()
def evaluate(model: nn.Module, data: Sequence[Row], batch_size: int = 32) -> float:
    """Mean loss per token in nats over all rows: every token counts the same, whatever batch it is in.

    For a classifier's rows, with one label each, it is the mean loss per row.

    Rows of like length share a batch, so that little padding is computed. The model is evaluated in eval mode and left
    in the mode in which it came.

    Raises:
        ValueError: if there are no rows, or none asks for anything.
    """
    if not data:
        raise ValueError("no rows to evaluate on; data is empty")
    was_training, total, tokens = model.training, 0.0, 0
    model.eval()
    by_length = sorted(data, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(data), batch_size):
        rows = by_length[start : start + batch_size]
        if count := count_targets(rows):
            total += model(**_collate(model, rows)).loss.item() * count
            tokens += count
    model.train(was_training)
    if not tokens:
        raise ValueError("no token to evaluate on: every label is -100; was max_length so short that answers were cut?")
    return total / tokens


@torch.no_grad()
def accuracy(model: nn.Module, data: Sequence[Row], batch_size: int = 32) -> float:
    """The share of rows whose class gets the largest logit, for a classifier and rows with one label each.

    The model is evaluated in eval mode and left in the mode in which it came.

    Raises:
        ValueError: if there are no rows, or they are those of a language model, with a label for each token.
    """
    if not data:
        raise ValueError("no rows to evaluate on; data is empty")
    if isinstance(data[0]["labels"], list):
        raise ValueError("accuracy is for rows with one label each (encode_topics); these have one for each token")
    was_training, right = model.training, 0
    model.eval()
    for start in range(0, len(data), batch_size):
        batch = _collate(model, data[start : start + batch_size])
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    model.train(was_training)
    return right / len(data)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 40,
    do_sample: bool = False,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """Continue each prompt until eos or ``max_new_tokens``; returns only the new text.

    Greedy by default, so the same on every run. With ``do_sample`` the ``seed`` fixes the draw and the caller's own
    random state is left as it was. Prompts of different length are padded on the left, where the model ignores it.
    ``options`` go to the model's own ``generate``, for instance ``stopping_criteria``.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts={prompts!r}: give a list with at least one prompt, such as ['politician (noun):']")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    longest = max(map(len, ids))
    device = next(model.parameters()).device
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    options |= {"temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=own_gpu()):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            do_sample=do_sample,
            **options,
        )
    model.train(was_training)
    return [text.strip() for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]


def _check_arguments(model: nn.Module, data: Sequence[Row], steps: int, sets: Mapping, patience: int | None) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "nothing requires a gradient, so nothing can be trained; inject an adapter, or unfreeze weights"
        )
    if not data:
        raise ValueError("no rows to train on; data is empty")
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step is needed")
    if patience is not None and not sets:
        raise ValueError(f"patience={patience} needs eval_data: held-out rows whose loss decides when to stop")


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _evaluate_all(model: nn.Module, sets: Mapping[str, Sequence[Row]], history: History, step: int) -> float | None:
    """Evaluate every held-out set, note it in the history, and return the loss of the first (None without any)."""
    # Every process finds the same; but if a last bit differed, one might stop early and the others wait for it.
    losses = broadcast_from_main({name: evaluate(model, rows) for name, rows in sets.items()})
    history.eval_steps += [step] if sets else []
    for name, loss in losses.items():
        history.eval_loss[name].append(loss)
    return next(iter(losses.values()), None)


def _collate(model: nn.Module, rows: Sequence[Row]) -> dict[str, Tensor]:
    """A padded batch on the model's device, padded with the model's own pad token.

    For a language model it does not matter what stands in the padding, it is masked. A decoder with a classification
    head looks for the last token that is not its pad token: padded with another one, it would read the padding.
    """
    device = next(model.parameters()).device
    pad = max(0, getattr(getattr(model, "config", None), "pad_token_id", None) or 0)  # some configs say -1 for none
    return {name: tensor.to(device) for name, tensor in collate(rows, pad).items()}
