"""The checks of lesson 17: choose which weights train (B1); in the lesson itself DoRA's forward."""

import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import (
    changed,
    close,
    is_number,
    is_several,
    is_tensor,
    known_slip,
    need_untouched,
    normal,
    shape_or_type,
    values_of,
    with_note,
)
from lora_edu.files import data_path
from lora_edu.lab.bases import load_base
from lora_edu.lab.datasets import collate, encode, load_dataset
from lora_edu.lab.training import evaluate, train

BUDGET, STEPS, BATCH, BATCHES = 78_336, 60, 8, 8


def dora_forward(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """*Your turn* in lesson 17: ``candidate(x, W, b, A, B, s, m)`` is m ⊙ (W + s·BA) x / ‖W + s·BA‖ + b."""
    whole = "turned = W + s * (B @ A); x @ ((m / turned.norm(dim=1).detach())[:, None] * turned).T + b"

    def drawn() -> tuple[Tensor, ...]:
        out, inside = random.sample(range(6, 14), 2)
        r = random.randint(2, 4)
        x, W, b = normal(random.randint(2, 4), random.randint(15, 17), inside), normal(out, inside), normal(out)
        return x, W, b, normal(r, inside), normal(out, r), normal(out).abs() + 0.5

    def ask(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, s: float, m: Tensor) -> Tensor:
        got = candidate(x, W, b, A, B, s, m)
        if not is_tensor(got, right := (*x.shape[:-1], len(W))):
            raise Wrong(
                f"for x of shape {tuple(x.shape)} and W of {tuple(W.shape)} you return {shape_or_type(got)}, "
                f"expected {right}",
                "W is (out, in). Which product takes in numbers to out numbers?",
                whole,
            )
        return got

    def start() -> None:
        x, W, b, A, B, _ = drawn()
        if not close(ask(x, W, b, A, 0 * B, 2.0, W.norm(dim=1)), x @ W.T + b):
            raise Wrong(
                "with B at zero and m = ‖W‖ it is not the frozen layer, so training would not start at the base model",
                "By which number is each row of W divided, and by which is it multiplied?",
                whole,
            )

    def value() -> None:
        x, W, b, A, B, m = drawn()
        s = random.choice([0.5, 1.5, 3.0])
        turned = W + s * (B @ A)

        def output(weight: Tensor) -> Tensor:
            return x @ weight.T

        right = output(m[:, None] * turned / turned.norm(dim=1, keepdim=True)) + b
        got = ask(x.clone(), W.clone(), b.clone(), A.clone(), B.clone(), s, m.clone())
        if close(got, right):
            return
        bare = W + B @ A
        slips = [
            (output(m[:, None] * turned / W.norm(dim=1, keepdim=True)) + b, "you divide by the norms of W alone"),
            (output(m[:, None] * turned / turned.norm(dim=0)) + b, "these are the norms of the columns, one an input"),
            (output(m[:, None] * turned / turned.norm()) + b, "you divide by one norm of the whole matrix"),
            (output(m[:, None] * bare / bare.norm(dim=1, keepdim=True)) + b, "the scale s is missing"),
            (output(m[:, None] * turned) + b, "nothing is divided by a norm"),
            (output(turned / turned.norm(dim=1, keepdim=True)) + b, "m is missing"),
            (
                output(m[:, None] * (W / W.norm(dim=1, keepdim=True) + s * (B @ A))) + b,
                "only W is divided",
            ),
            (output(W + s * (B @ A)) + b, "that is LoRA"),
            (right - b, "b is missing"),
            (right - b + b * m / turned.norm(dim=1), "b is scaled, too, and it is no part of the weight"),
        ]
        raise Wrong(
            with_note("the output is not m ⊙ (W + s·BA) x / ‖W + s·BA‖ + b", known_slip(got, slips, close)),
            "Which matrix has its rows divided by their own norms, and what comes after that?",
            whole,
        )

    def constant() -> None:
        x, W, b, A, B, m = drawn()
        leaves = [each.requires_grad_() for each in (A, B, m)]
        target = normal(*x.shape[:-1], len(W))
        got = ask(x, W, b, A, B, 1.5, m)
        if not got.requires_grad:
            raise Wrong(
                "no gradient reaches A, B or m",
                "What of your computation is detached, or made without gradients?",
                "Detach the norms alone: turned.norm(dim=1).detach().",
            )
        found = torch.autograd.grad((got * target).sum(), leaves, allow_unused=True)
        turned = W + 1.5 * (B @ A)
        norms = turned.norm(dim=1, keepdim=True)
        right, through = (
            torch.autograd.grad(((x @ (m[:, None] * turned / each).T + b) * target).sum(), leaves, retain_graph=True)
            for each in (norms.detach(), norms)
        )
        for name, one, other, whole_way in zip("ABm", found, right, through, strict=True):
            if one is None or not close(one, other):
                note = f"none at all reaches {name}" if one is None else ""
                if one is not None and close(one, whole_way):
                    note = "it goes through the norm"
                raise Wrong(
                    with_note(f"the gradient of {name} is another one", note),
                    "Does the backward pass know that the norms are constants, and nothing else is?",
                    "turned.norm(dim=1).detach()",
                )

    def untouched() -> None:
        *given, m = drawn()
        need_untouched(
            lambda: candidate(*given, 2.0, m),
            [*given, m],
            "your function writes into what it was given, and the model still needs it",
            "Use W + …, which makes a new tensor, not W += ….",
        )

    steps = [
        ("with B at zero and m = ‖W‖ it is the frozen layer", start),
        ("m ⊙ (W + s·BA) x / ‖W + s·BA‖ + b", value),
        ("what it was given stays as it was", untouched),
        ("the norms count as constants in the backward pass", constant),
    ]
    return run_steps("DoRA's forward", steps, hint)


def better_mask(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Which 78,336 weights of ``tiny`` train, to do better than LoRA with as many. Exercise B1 of lesson 17."""
    form = "Return (masks, learning_rate), with masks = {name of a parameter: bool tensor of its shape}."
    chosen: dict[str, Any] = {}

    def places() -> None:
        model, rows = _frozen(), _rows("train")
        before = values_of(model)
        batches = [collate(random.sample(rows, BATCH), 0) for _ in range(BATCHES)]
        got = candidate(model, batches)
        if not is_several(got, 2) or not isinstance(got[0], dict) or not is_number(got[1]) or not got[1] > 0:
            raise Wrong(
                f"you return {shape_or_type(got)}: expected masks and a learning rate above 0",
                "Which two things does the training need from you?",
                form,
            )
        if changed(model, before):
            raise Wrong(
                "your function has changed the model that it was given",
                "Does something in it take an optimizer's step, or work in place?",
                "Gradients are enough to choose by: torch.autograd.grad(loss, parameters).",
            )
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for name, mask in got[0].items():
            if name not in shapes:
                raise Wrong(
                    f"{name!r} is no parameter of the model",
                    "What are the names in model.named_parameters()?",
                    f"For example 'model.norm.weight'. {form}",
                )
            if not is_tensor(mask, shapes[name]) or mask.dtype != torch.bool:
                kind = f"{shape_or_type(mask)}, {mask.dtype}" if isinstance(mask, Tensor) else shape_or_type(mask)
                raise Wrong(
                    f"the mask of {name!r} is {kind}: expected {tuple(shapes[name])}, torch.bool",
                    "Does a mask say of each weight whether it trains?",
                    form,
                )
        chosen["masks"], chosen["rate"] = {name: mask.clone() for name, mask in got[0].items()}, float(got[1])

    def number() -> None:
        if (found := sum(int(mask.sum()) for mask in chosen["masks"].values())) != BUDGET:
            raise Wrong(
                f"you choose {found:,} weights, and LoRA has {BUDGET:,} numbers",
                "How do shares of all parameters add up after rounding?",
                "Take the topk of the last one so that the sum is right; several entries may share a threshold.",
            )

    def beats() -> None:
        record = json.loads(data_path("runs", "masks.json").read_text(encoding="utf-8"))
        losses = {
            way: [
                line["validation"]
                for line in record["runs"]
                if line["job"]["way"] == way and line["job"]["seed"] in record["settings"]["seeds"]
            ]
            for way in ("lora", "random")
        }
        model = _frozen()
        for name, mask in chosen["masks"].items():
            weight = model.get_parameter(name).requires_grad_(True)
            weight.register_hook(lambda gradient, mask=mask: gradient * mask)
        # The order of the rows is that of LoRA's first run: another one moves the loss by half of what is asked for.
        train(model, _rows("train"), steps=STEPS, batch_size=BATCH, learning_rate=chosen["rate"], seed=0)
        loss = evaluate(model, _rows("validation"))
        if not loss < min(losses["lora"]):
            random_mean = sum(losses["random"]) / len(losses["random"])
            raise Wrong(
                f"after {STEPS} steps your weights reach {loss:.2f} on the validation entries; the best of LoRA's five "
                f"runs has {min(losses['lora']):.2f}, and random weights {random_mean:.2f}",
                "Is the rate right for these weights? And which parameters has the lesson's mask left out?",
                "Take in each parameter, the embeddings too, the same share of its entries, those with the largest "
                "gradients over the batches, and try rates near 0.001.",
            )

    steps = [
        ("masks for parameters of the model, and a rate", places),
        (f"{BUDGET:,} weights are chosen", number),
        (f"after {STEPS} steps they are ahead of LoRA's best run", beats),
    ]
    return run_steps("a better mask", steps, hint)


def _frozen() -> nn.Module:
    """A fresh ``tiny`` in which nothing trains yet."""
    return load_base("tiny")[0].requires_grad_(False)


@cache
def _rows(split: str) -> list[dict[str, Any]]:
    return encode(load_dataset("jargon", split), load_base("tiny")[1])
