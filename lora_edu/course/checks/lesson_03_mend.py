"""The checks of lesson 03's repairs: three published layers, each with its mistakes mended by the learner."""

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.course.checks.lesson_03 import _close, _normal, _same_scale, _sizes
from lora_edu.course.checks.report import Report, Step, Wrong, run_steps


def mended_tutorial(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise A2: the tutorial's ``candidate(in_dim, out_dim, rank, alpha, dropout)``, which could not be built."""

    def build() -> tuple[Any, int, float]:
        inputs, outputs, r, alpha = _sizes()
        return candidate(inputs, outputs, r, alpha, 0.0).double(), r, alpha

    def constructed() -> None:
        inputs, outputs, r, alpha = _sizes()
        try:
            layer = candidate(inputs, outputs, r, alpha, 0.0)
        except AttributeError as error:
            raise Wrong(
                f"your class cannot be built: {error}",
                "nn.Module must be ready before anything can be assigned to it. Which call makes it so?",
                "super().__init__() is the first line of __init__.",
            ) from None
        names = {name for name, _ in layer.named_parameters()}
        if missing := sorted({"linear.weight", "lora_a.weight", "lora_b.weight"} - names):
            raise Wrong(
                f"{missing[0]} is no parameter of your layer", "Are the names the tutorial's?", "Keep its names."
            )

    def starts() -> None:
        layer, _, _ = build()
        x = _normal(4, layer.linear.weight.shape[1])
        if not _close(layer(x), layer.linear(x)):
            off = ((layer(x) - layer.linear(x)).norm() / layer.linear(x).norm()).item()
            raise Wrong(
                f"the fresh layer is {off:.0%} away from its linear layer",
                "Which values does nn.Linear give lora_b?",
                "nn.init.zeros_(self.lora_b.weight)",
            )

    def alive() -> None:
        layer, _, _ = build()
        if not layer.lora_a.weight.any():
            raise Wrong(
                "lora_a and lora_b are both zero: this layer can never learn",
                "Which of the two must be zero for the product to be zero?",
                "Leave lora_a as nn.Linear starts it.",
            )

    def frozen() -> None:
        layer, _, _ = build()
        trains = sorted(name for name, parameter in layer.named_parameters() if parameter.requires_grad)
        if trains != ["lora_a.weight", "lora_b.weight"]:
            raise Wrong(f"these train: {', '.join(trains)}", "Which should?", "lora_a.weight and lora_b.weight only.")

    def scale() -> None:
        layer, r, alpha = build()
        nn.init.normal_(layer.lora_b.weight)
        x = _normal(4, layer.linear.weight.shape[1])
        _same_scale(layer(x) - layer.linear(x), x @ layer.lora_a.weight.T @ layer.lora_b.weight.T, alpha, r)

    steps: list[Step] = [
        ("can be built", constructed),
        ("starts at its linear layer", starts),
        ("can learn", alive),
        ("only lora_a and lora_b train", frozen),
        ("the update is still scaled by alpha / rank", scale),
    ]
    return run_steps("mended tutorial", steps, hint)


def mended_shapes(candidate: Callable[[nn.Module, int], dict[str, Any]], hint: int = 1) -> Report:
    """Exercise A3: ``candidate(model, rank)`` gives {name: branch} for every linear layer, also those not square."""

    def model(*shapes: tuple[int, int]) -> nn.Module:
        layers: dict[str, nn.Module] = {f"layer_{i}": nn.Linear(*shape) for i, shape in enumerate(shapes)}
        return nn.Sequential(nn.ModuleDict(layers | {"norm": nn.LayerNorm(6), "table": nn.Embedding(5, 5)}))

    def compare(*shapes: tuple[int, int]) -> None:
        adapted, rank = model(*shapes), random.randint(2, 4)
        branches = candidate(adapted, rank)
        linear = {name: module for name, module in adapted.named_modules() if isinstance(module, nn.Linear)}
        if left_out := [name for name in linear if name not in branches]:
            layer = linear[left_out[0]]
            raise Wrong(
                f"the layer {layer.in_features} → {layer.out_features} gets no branch",
                "Which condition leaves it out, and which mistake did that condition hide?",
                "Ask for isinstance(module, nn.Linear) only.",
            )
        if extra := [name for name in branches if name not in linear]:
            raise Wrong(f"{extra[0]!r} is no linear layer and gets a branch", "What is adapted?", "Linear layers only.")
        for name, layer in linear.items():
            a, b = branches[name].A.weight, branches[name].B.weight
            if a.shape != (rank, layer.in_features) or b.shape != (layer.out_features, rank):
                raise Wrong(
                    f"a layer {layer.in_features} → {layer.out_features} gets a branch {a.shape[1]} → {b.shape[0]} "
                    f"of rank {a.shape[0]}",
                    "In which order does weight.shape hold the two sides?",
                    "Branch(module.in_features, module.out_features, rank); weight.shape is (out, in).",
                )

    steps: list[Step] = [
        ("square layers", lambda: compare((8, 8), (6, 6))),
        ("layers that widen", lambda: compare((6, 11), (8, 8))),
        ("layers that narrow", lambda: compare((13, 5), (7, 12))),
    ]
    return run_steps("mended shapes", steps, hint)


def mended_note(candidate: Callable[[nn.Linear, int, float], Any], hint: int = 1) -> Report:
    """Exercise A4: the note's ``candidate(linear, rank, alpha)``, around a given layer that is frozen as a whole."""

    def build() -> tuple[Any, nn.Linear, int, float]:
        inputs, outputs, r, alpha = _sizes()
        linear = nn.Linear(inputs, outputs).double()
        layer = candidate(copy.deepcopy(linear), r, alpha)
        for name, parameter in layer.named_parameters():
            if parameter.dtype != linear.weight.dtype:
                raise Wrong(
                    f"the layer it was given is in {linear.weight.dtype}, and your {name} in {parameter.dtype}",
                    "Which type has torch.randn(r, n), if nobody says?",
                    "Give A and B the given layer's type: torch.randn(r, n, dtype=linear.weight.dtype).",
                )
        return layer, linear, r, alpha

    def pretrained() -> None:
        layer, linear, _, _ = build()
        x = _normal(4, linear.in_features)
        if not _close(layer(x), linear(x)):
            raise Wrong(
                f"the fresh layer is {((layer(x) - linear(x)).norm() / linear(x).norm()).item():.0%} away from the "
                "layer it was given",
                "Where do the values of your frozen weight and bias come from?",
                "Keep the given layer, and call it in forward.",
            )

    def frozen() -> None:
        layer, _, _, _ = build()
        trains = sorted(name for name, parameter in layer.named_parameters() if parameter.requires_grad)
        if trains != ["lora_A", "lora_B"]:
            raise Wrong(
                f"these train: {', '.join(trains) or 'none'}",
                "An nn.Linear has two parameters. Did you freeze both?",
                "linear.requires_grad_(False), and lora_A and lora_B as nn.Parameter.",
            )

    def size() -> None:
        inputs = random.choice([600, 900])
        a: Tensor = candidate(nn.Linear(inputs, 5), 64, 8).lora_A.detach()
        if not a.any():
            raise Wrong(
                "lora_A is zero, and so is lora_B: a dead layer", "Which start did the lesson keep?", "A random."
            )
        right, got = 1 / math.sqrt(3 * inputs), a.std().item()
        if not 0.8 < got / right < 1.25:
            raise Wrong(
                f"for {inputs} inputs the entries of your lora_A have the standard deviation {got:.3g}: "
                f"{got / right:.2g} × that of the lesson's start",
                "How large is A x if each entry of A has the standard deviation 1 and x has many entries?",
                "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5)) on a tensor of shape (rank, in).",
            )

    def scale() -> None:
        layer, linear, r, alpha = build()
        a, b = (torch.randn_like(parameter) for parameter in (layer.lora_A, layer.lora_B))
        layer.lora_A.data.copy_(a), layer.lora_B.data.copy_(b)
        x = _normal(4, linear.in_features)
        _same_scale(layer(x) - linear(x), x @ a.T @ b.T, alpha, r)

    steps: list[Step] = [
        ("starts at the layer it was given", pretrained),
        ("weight and bias frozen", frozen),
        ("lora_A starts at the lesson's size", size),
        ("the update is still scaled by alpha / rank", scale),
    ]
    return run_steps("mended note", steps, hint)
