"""The checks of lesson 03: the gradient of x (A1), two published layers mended (A2, A3), the layer (B1), a tolerated
rate (C1); in the lesson itself the layer's forward pass and the gradient of A."""

import copy
import importlib.util
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.core.layer import LoRALinear
from lora_edu.course.checks.candidates import AUTOGRAD, without
from lora_edu.course.checks.report import Report, Step, Wrong, run_steps
from lora_edu.course.checks.starts import need_one_zero, need_start
from lora_edu.course.checks.tools import (
    close,
    dtype_name,
    is_tensor,
    known_slip,
    need_scale,
    normal,
    off_by,
    peft_linear,
    randomise,
    scale_slips,
    shape_or_type,
    trainable,
    with_note,
)


def sizes() -> tuple[int, int, int, float]:
    """in, out, r and alpha at which wrong answers differ: in ≠ out, and no two of the usual slips give one scale."""
    inputs, outputs = random.sample(range(7, 15), 2)
    return inputs, outputs, random.randint(2, 4), random.choice([5, 7, 10])


def need_gradient(name: str, ours: Tensor, right: Tensor, t: Mapping[str, Tensor], fix: str) -> None:
    """Raise ``Wrong`` unless the gradient of A, B or x is right; ``t`` holds g, W, A, B and the scale s."""
    if is_tensor(ours, right.shape) and close(ours, right):
        return
    if is_tensor(ours, right.shape):
        slips = [*scale_slips(right, t["s"].item())]
        slips += [(-right, "the sign is turned; the step goes against the gradient, the gradient itself does not")]
        if name == "x":
            frozen = t["g"] @ t["W"]
            slips = [
                (frozen, "this is the frozen path's alone, the adapter's term is missing"),
                (right - frozen, "this is the adapter's term alone, the frozen path's is missing"),
                (t["g"] @ (t["W"] + t["B"] @ t["A"]), "the adapter's term lacks the scale s"),
                *slips,
            ]
        symptom = with_note(f"is off by {off_by(ours, right):.0%}", known_slip(ours, slips, close))
    else:
        symptom = f"does not fit: it is {shape_or_type(ours)} instead of {tuple(right.shape)}"
    question = f"Which terms of y = x Wᵀ + s (x Aᵀ) Bᵀ contain {name}?"
    raise Wrong(f"your gradient of {name} {symptom}", question, fix)


def need_dropped_inputs(update: Tensor, whole: Tensor) -> None:
    """Raise ``Wrong`` unless dropout with p = 0.5 acted on x, before A.

    Args:
        update: what a layer in training adds for inputs with one non-zero entry each, a row for an input.
        whole: the same without dropout.
    """
    if close(update, whole):
        raise Wrong("with dropout 0.5 nothing is dropped", "Is the layer in training mode here?", "Drop x before A.")
    row = (update * whole).sum(1) / (whole * whole).sum(1)  # 0 or 1 / (1 - p) if whole entries of x were dropped
    if close(update, row[:, None] * whole) and all(min(abs(f), abs(f - 2)) < 1e-9 for f in row.tolist()):
        return
    if close(update, row[:, None] * whole) and all(min(abs(f), abs(f - 1)) < 1e-9 for f in row.tolist()):
        symptom = "what is kept is not divided by 1 − p, so that the mean of the update shrinks"
    elif close(update * (update - 2 * whole), torch.zeros_like(update)):
        symptom = "entries of the update are dropped, after B"
    else:
        symptom = "dropout does not act on x: it comes after A"
    raise Wrong(
        symptom,
        "Give it an x with one non-zero entry: which updates are possible if x is dropped, and which do you see?",
        "Drop x on its way into A, with nn.Dropout: frozen(x) + scaling * (dropout(x) @ A.T @ B.T).",
    )


def one_at_a_time(inputs: int) -> Tensor:
    """Inputs with one non-zero entry each, every entry 40 times: dropout drops or keeps it."""
    return torch.eye(inputs, dtype=torch.float64).repeat(40, 1)


def lora_forward(candidate: Callable[..., Tensor], hint: int = 1) -> Report:
    """``candidate(x, W, A, B, lora_alpha, r)`` is x Wᵀ + s · (x Aᵀ) Bᵀ with s = lora_alpha / r; see layer_forward."""

    def compare(*leading: int) -> None:
        inputs, outputs, r, alpha = sizes()
        x, W, A, B = (normal(*shape) for shape in ((*leading, inputs), (outputs, inputs), (r, inputs), (outputs, r)))
        y = candidate(*(tensor.clone() for tensor in (x, W, A, B)), alpha, r)
        if not is_tensor(y, (*leading, outputs)):
            raise Wrong(
                f"x of shape {tuple(x.shape)} gives {shape_or_type(y)}, not {(*leading, outputs)}",
                "Which way do A and B stand when the rows of x are the inputs?",
                "x @ A.T has r columns, and (x @ A.T) @ B.T has one for each output.",
            )
        base, update = x @ W.T, x @ A.T @ B.T
        need_scale(y - base, update, alpha, r)

    steps: list[Step] = [
        ("a batch of inputs", lambda: compare(5)),
        ("one input without a batch", compare),
        ("a batch of sequences", lambda: compare(2, 3)),
    ]
    return run_steps("forward pass", steps, hint)


def mended_shapes(candidate: Callable[[nn.Module, int], dict[str, Any]], hint: int = 1) -> Report:
    """Exercise A2: ``candidate(model, rank)`` gives {name: branch} for every linear layer, also those not square."""

    def model(*shapes: tuple[int, int]) -> nn.Module:
        layers: dict[str, nn.Module] = {f"layer_{i}": nn.Linear(*shape) for i, shape in enumerate(shapes)}
        return nn.Sequential(nn.ModuleDict(layers | {"norm": nn.LayerNorm(6), "table": nn.Embedding(5, 5)}))

    def compare(*shapes: tuple[int, int]) -> None:
        adapted, rank = model(*shapes), random.randint(2, 4)
        branches = candidate(adapted, rank)
        if not isinstance(branches, dict):
            raise Wrong(f"you return a {type(branches).__name__}", "What comes back?", "Return {name: branch}.")
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

    def untrained() -> None:
        branch = candidate(model((12, 9)), 3)["0.layer_0"]
        a, b = branch.A.weight, branch.B.weight
        need_one_zero(a, b, "A", "B")
        nn.init.normal_(b)
        x = torch.randn(5, 12)
        if not close(branch(x), x @ a.T @ b.T, rtol=1e-4, atol=1e-4):
            raise Wrong("a branch does not give B(Ax)", "Which class has the exercise for a branch?", "Use its Branch.")
        if frozen := sorted({"A.weight", "B.weight"} - {*trainable(branch)}):
            raise Wrong(
                f"{frozen[0]} of a branch does not train", "Who froze it?", "Leave a branch as Branch makes it."
            )

    steps: list[Step] = [
        ("square layers", lambda: compare((8, 8), (6, 6))),
        ("layers that widen", lambda: compare((6, 11), (8, 8))),
        ("layers that narrow", lambda: compare((13, 5), (7, 12))),
        ("each branch gives B(Ax), starts at zero and can learn", untrained),
    ]
    return run_steps("mended shapes", steps, hint)


def mended_note(candidate: Callable[[nn.Linear, int, float], Any], hint: int = 1) -> Report:
    """Exercise A3: the note's ``candidate(linear, rank, alpha)``, around a given layer that is frozen as a whole."""

    def build() -> tuple[Any, nn.Linear, int, float]:
        inputs, outputs, r, alpha = sizes()
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
        x = normal(4, linear.in_features)
        if not close(layer(x), linear(x)):
            raise Wrong(
                f"the fresh layer is {off_by(layer(x), linear(x)):.0%} away from the layer it was given",
                "Where do the values of your frozen weight and bias come from?",
                "Keep the given layer, and call it in forward.",
            )

    def frozen() -> None:
        layer, _, _, _ = build()
        trains = sorted(trainable(layer))
        if trains != ["lora_A", "lora_B"]:
            raise Wrong(
                f"these train: {', '.join(trains) or 'none'}",
                "An nn.Linear has two parameters. Did you freeze both?",
                "linear.requires_grad_(False), and lora_A and lora_B as nn.Parameter.",
            )

    def size() -> None:
        def fresh(linear: nn.Linear, r: int) -> tuple[Tensor, Tensor]:
            layer = candidate(linear, r, 8)
            return layer.lora_A, layer.lora_B

        need_start(fresh)

    def scale() -> None:
        layer, linear, r, alpha = build()
        a, b = randomise(layer)
        x = normal(4, linear.in_features)
        need_scale(layer(x) - linear(x), x @ a.T @ b.T, alpha, r)

    steps: list[Step] = [
        ("starts at the layer it was given", pretrained),
        ("weight and bias frozen", frozen),
        ("lora_A starts random, of the lesson's size, and lora_B at zero", size),
        ("the update is still scaled by alpha / rank", scale),
    ]
    return run_steps("mended note", steps, hint)


def lora_layer(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise B1: a class ``candidate(base, r, lora_alpha, lora_dropout)`` with ``lora_A`` and ``lora_B``."""

    def build(
        dropout: float = 0.0, dtype: torch.dtype = torch.float64, bias: bool = True
    ) -> tuple[Any, nn.Linear, int, float]:
        inputs, outputs, r, alpha = sizes()
        base = nn.Linear(inputs, outputs, bias, dtype=dtype)
        return candidate(copy.deepcopy(base), r=r, lora_alpha=alpha, lora_dropout=dropout), base, r, alpha

    def shapes() -> None:
        layer, base, r, _ = build()
        for name, right in (("lora_A", (r, base.in_features)), ("lora_B", (base.out_features, r))):
            tensor = getattr(layer, name, None)
            if not isinstance(tensor, nn.Parameter):
                raise Wrong(
                    f"your layer has no parameter {name}",
                    "What makes a tensor show up in layer.parameters()?",
                    f"self.{name} = nn.Parameter(...)",
                )
            if tensor.shape != right:
                raise Wrong(
                    f"for a layer {base.in_features} → {base.out_features} with r={r} your {name} is "
                    f"{tuple(tensor.shape)} instead of {right}",
                    "A takes the inputs to r numbers, B takes these to the outputs. How does PyTorch store such maps?",
                    "lora_A is (r, in), lora_B is (out, r), and base.weight.shape is (out, in).",
                )
            if tensor.dtype != base.weight.dtype:
                raise Wrong(
                    f"the base is {dtype_name(base.weight)}, your {name} is {dtype_name(tensor)}",
                    "Which dtype has a tensor that you create without saying so?",
                    "Create it with base.weight.new_zeros(...), which takes over dtype and device.",
                )

    def starts(bias: bool = True) -> None:
        layer, base, _, _ = build(bias=bias)
        x = normal(3, base.in_features)
        off = layer(x) - base(x)
        if close(off, torch.zeros_like(off)):
            return
        if base.bias is not None and close(off, -base.bias.expand_as(off)):
            raise Wrong(
                "your output lacks the base's bias",
                "What does base(x) add that x @ W.T does not?",
                "Call self.base(x).",
            )
        if layer.lora_B.any():
            raise Wrong(
                f"before any training the output is {off_by(layer(x), base(x)):.0%} away from the base's",
                "Which values must B have for BA to be zero?",
                "Leave lora_B at zero.",
            )
        raise Wrong(
            f"with B = 0 the output is still {off_by(layer(x), base(x)):.0%} away from the base's",
            "What is left of the forward pass when the update is zero?",
            "Return self.base(x) plus the update, and leave the base's weight as it is.",
        )

    def size() -> None:
        def fresh(linear: nn.Linear, r: int) -> tuple[Tensor, Tensor]:
            layer = candidate(linear, r=r, lora_alpha=8, lora_dropout=0.0)
            return layer.lora_A, layer.lora_B

        need_start(fresh)

    def frozen() -> None:
        layer, _, _, _ = build()
        trains = trainable(layer)
        for name in ("lora_A", "lora_B"):
            if name not in trains:
                raise Wrong(f"{name} does not train", "Who set its requires_grad?", "Freeze the base only.")
        if extra := sorted({*trains} - {"lora_A", "lora_B"}):
            raise Wrong(
                f"besides lora_A and lora_B these train: {', '.join(extra)}",
                "Which parameters has an nn.Linear?",
                "base.requires_grad_(False) freezes the weight and the bias.",
            )

    def scale() -> None:
        for leading in ((4,), (), (2, 3)):
            layer, base, r, alpha = build()
            x, a, b = normal(*leading, base.in_features), *randomise(layer)
            need_scale(layer(x) - base(x), x @ a.T @ b.T, alpha, r)

    def precision() -> None:
        for dtype in (torch.float64, torch.bfloat16):
            layer, base, _, _ = build(dtype=dtype)
            got = layer(normal(3, base.in_features).to(dtype))
            if got.dtype != dtype:
                raise Wrong(
                    f"a {dtype_name(base.weight)} layer returns {dtype_name(got)}",
                    "Where in your forward does the dtype change?",
                    "Return the sum in the dtype of self.base(x).",
                )

    def gradients() -> None:
        layer, base, r, alpha = build()
        a, b = randomise(layer)
        x, g = normal(2, 3, base.in_features).requires_grad_(), normal(2, 3, base.out_features)
        y = layer(x)
        got = torch.autograd.grad(y, (layer.lora_A, layer.lora_B, x), g, allow_unused=True)
        s, W, G = alpha / r, base.weight.detach(), g.flatten(0, 1).T @ x.detach().flatten(0, 1)
        t = {"g": g, "x": x, "W": W, "A": a, "B": b, "s": torch.tensor(s, dtype=torch.float64)}
        fix = "Let autograd see every step: no .data, .detach() or torch.no_grad() in forward."
        for name, ours, right in zip("ABx", got, (s * b.T @ G, s * G @ a.T, g @ (W + s * b @ a)), strict=True):
            if ours is None:
                raise Wrong(f"no gradient reaches {name}", "Where does your forward leave autograd's graph?", fix)
            need_gradient(name, ours, right, t, fix)

    def evaluation() -> None:
        layer, base, r, alpha = build(dropout=0.5)
        a, b = randomise(layer)
        x = normal(6, base.in_features)
        layer.eval()
        if not close(layer(x), base(x) + alpha / r * x @ a.T @ b.T):
            raise Wrong(
                "after layer.eval() something is still dropped",
                "Who tells F.dropout whether the layer is training?",
                "Use an nn.Dropout module, or F.dropout(x, p, training=self.training).",
            )

    def placement() -> None:
        layer, base, r, alpha = build(dropout=0.5)
        layer.train()
        x = one_at_a_time(base.in_features)
        if not close(layer(x), base(x)):
            raise Wrong(
                "in training a fresh layer with dropout is not the base: the frozen path is dropped, too",
                "Which of the two paths should dropout disturb?",
                "return self.base(x) + scaling * (dropout(x) @ A.T @ B.T)",
            )
        a, b = randomise(layer)
        whole = alpha / r * x @ a.T @ b.T
        update = layer(x) - base(x)
        need_dropped_inputs(update, whole)

    def oracle(reference: Callable[..., tuple[nn.Module, Tensor, Tensor]], name: str) -> Callable[[], None]:
        def step() -> None:
            layer, base, r, alpha = build()
            a, b = randomise(layer)
            other, other_a, other_b = reference(copy.deepcopy(base), r, alpha)
            other_a.data.copy_(a), other_b.data.copy_(b)
            x, target = normal(7, base.in_features), normal(7, base.out_features)
            for module, factors in ((layer, (layer.lora_A, layer.lora_B)), (other, (other_a, other_b))):
                optimizer = torch.optim.Adam(factors, lr=1e-2)
                for _ in range(5):
                    optimizer.zero_grad()
                    F.mse_loss(module(x), target).backward()
                    optimizer.step()
            if not close(layer(x), other(x)):
                raise Wrong(
                    f"after five steps from equal values your output differs from {name}'s",
                    "Does your layer keep anything from one call to the next?",
                    "Compute the update from lora_A and lora_B in every forward.",
                )

        return step

    steps: list[Step] = [
        ("lora_A is (r, in), lora_B is (out, r), in the base's precision", shapes),
        ("starts at the base model", starts),
        ("lora_A starts random, of the lesson's size, and lora_B at zero", size),
        ("base weight and bias frozen, A and B trainable", frozen),
        ("the update is scaled by lora_alpha / r", scale),
        ("keeps the precision of the base", precision),
        ("gradients of A, B and x", gradients),
        ("also around a layer without a bias", lambda: starts(bias=False)),
        ("no dropout in eval", evaluation),
        ("dropout on x, before A", placement),
        ("equal to lora_edu's layer after five steps", oracle(library_layer, "lora_edu")),
    ]
    if importlib.util.find_spec("peft"):
        steps.append(("equal to PEFT after five steps", oracle(peft_layer, "PEFT")))
    return run_steps("LoRA layer", steps, hint)


def library_layer(base: nn.Linear, r: int, alpha: float) -> tuple[nn.Module, Tensor, Tensor]:
    layer = LoRALinear(base, r=r, lora_alpha=alpha)
    return layer, layer.lora_A, layer.lora_B


def peft_layer(base: nn.Linear, r: int, alpha: float) -> tuple[nn.Module, Tensor, Tensor]:
    model, layer = peft_linear(base, r=r, lora_alpha=int(alpha))
    return model, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def last_tolerated(results: Mapping[float, Sequence[float]], limit: float) -> float | None:
    """The largest rate up to which every rate ends all its runs at or below the limit."""
    largest = None
    for rate in sorted(results):
        if not all(loss <= limit for loss in results[rate]):
            break
        largest = rate
    return largest


def drawn_results(limit: float) -> dict[float, list[float]]:
    """Losses of some rates in any order: at the limit or below, and a few above it, NaN or infinite."""
    rates = random.sample([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1], random.randint(2, 6))
    draws = random.randint(1, 4)
    fails = random.uniform(0, 0.4)
    results = {}
    for rate in rates:
        losses = [random.choice([limit, limit * random.uniform(0.2, 0.99)]) for _ in range(draws)]
        if random.random() < fails:
            losses[random.randrange(draws)] = random.choice([limit * random.uniform(1.01, 3), math.nan, math.inf])
        results[rate] = losses
    return results


def tolerated_rate(
    candidate: Callable[[Mapping[float, Sequence[float]], float], float | None], hint: int = 1
) -> Report:
    """Exercise C1: the largest rate up to which every rate ends all its runs at or below ``limit``, or None."""
    nan = math.nan

    def expect(results: Mapping[float, Sequence[float]], limit: float, question: str, fix: str) -> None:
        got = candidate({rate: list(losses) for rate, losses in results.items()}, limit)
        if got != (right := last_tolerated(results, limit)):
            raise Wrong(f"for {dict(results)} and limit={limit} you return {got}, not {right}", question, fix)

    def ask(losses: Mapping[int, Sequence[float]], question: str, fix: str) -> None:
        """``losses`` holds multiples of the smallest rate, and losses for a limit of 1."""
        one, limit = random.choice([0.01, 0.02]), random.choice([0.5, 1.5, 2.0])
        results = {k * one: [round(limit * loss, 4) for loss in each] for k, each in losses.items()}
        expect(results, limit, question, fix)

    def plain() -> None:
        ask(
            {1: [0.5, 0.6], 2: [0.4, 0.9], 4: [3.0, 2.5]},
            "Which rates end all their runs at or below the limit?", "all(loss <= limit for loss in losses)",
        )  # fmt: skip

    def equal() -> None:
        ask(
            {1: [0.5, 0.6], 2: [1.0, 0.9], 4: [1.5, 1.25]},
            "A run ends exactly at the limit. What does the task say about it?", "At or below: loss <= limit.",
        )  # fmt: skip

    def every_draw() -> None:
        ask(
            {1: [0.5, 0.6, 0.7], 2: [0.4, 0.5, 1.9]},
            "One draw of three fails at the larger rate. Is that tolerated?", "Ask all draws, not the median.",
        )  # fmt: skip

    def diverged() -> None:
        fix = "loss <= limit is False for NaN; max() and sorted() are not safe."
        ask({1: [0.5, 0.6], 2: [0.4, nan]}, "What does a comparison with NaN give?", fix)
        ask({1: [0.5, 0.6], 2: [nan, 0.4]}, "What does a comparison with NaN give?", fix)

    def gap() -> None:
        ask(
            {1: [0.5, 0.6], 2: [2.0, 0.6], 4: [0.9, 0.8]},
            "A rate fails and a larger one gets through. Up to where may you raise the rate?",
            "Walk up from the smallest rate, and stop at the first failure.",
        )  # fmt: skip

    def order() -> None:
        ask(
            {4: [0.4, 0.3], 1: [0.5, 0.6], 2: [0.6, 0.7]},
            "In which order do you meet the rates?", "for rate in sorted(results)",
        )  # fmt: skip

    def none() -> None:
        ask({1: [2.0, 0.5], 2: [0.6, 0.7]}, "What if the smallest rate fails?", "Return None.")

    def drawn() -> None:
        for _ in range(40):
            limit = random.choice([0.5, 1.5, 2.0])
            expect(
                drawn_results(limit), limit,
                "Which of the points above does this table test?",
                "Walk up the sorted rates while all losses are at or below the limit, and keep the last one.",
            )  # fmt: skip

    steps = [
        ("the largest rate at which the runs end below the limit", plain),
        ("every draw counts", every_draw),
        ("a run that ends at the limit is tolerated", equal),
        ("NaN is a failure", diverged),
        ("nothing beyond the first failure", gap),
        ("in any order", order),
        ("None if no rate is tolerated", none),
        ("40 drawn tables", drawn),
    ]
    return run_steps("tolerated rate", steps, hint)


def layer_forward(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """*Your turn* in lesson 03: the ``forward`` of ``candidate(base, r, lora_alpha)``, an ``nn.Module``."""

    def forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> Tensor:
        base = nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype)
        base.weight.data.copy_(W)
        layer = candidate(base, r, lora_alpha)
        layer.lora_A.data.copy_(A), layer.lora_B.data.copy_(B)
        y = layer(x)
        if not isinstance(y, Tensor):
            raise Wrong(
                f"your forward returns {shape_or_type(y)}, not a tensor",
                "Does forward end with return?",
                "return self.base(x) + the update",
            )
        if not torch.equal(base.weight, W):
            raise Wrong(
                "after one call of forward the base's weight is no longer what it was",
                "Which tensor does your forward write to?",
                "Leave self.base as it is, and add the update to its output.",
            )
        factors = (layer.lora_A, layer.lora_B)
        if not y.requires_grad or None in torch.autograd.grad(y.sum(), factors, allow_unused=True, retain_graph=True):
            raise Wrong(
                "no gradient reaches A or B through your forward: the layer could not learn",
                "Which tensors does your forward multiply with x, and are they the parameters themselves?",
                "Use self.lora_A and self.lora_B, without .data, .detach() or torch.no_grad().",
            )
        return y.detach() - base.bias.detach()

    return lora_forward(forward, hint)


@without(
    *AUTOGRAD,
    symptom="you let autograd differentiate; this cell wants matrix products only",
    question="Which of the matrices G, A and B does the gradient of A contain, and in which order?",
    fix="With G = gᵀ x of shape (out, in): ∂L/∂A = s Bᵀ G.",
)
def gradient_of_a(candidate: Callable[[Any, Tensor, Tensor], Tensor], hint: int = 1) -> Report:
    """*Your turn* in lesson 03: ``candidate(layer, x, g)`` is ∂L/∂A for g = ∂L/∂y, without autograd."""

    def compare(*leading: int) -> None:
        inputs, outputs, r, alpha = sizes()
        layer = LoRALinear(nn.Linear(inputs, outputs, dtype=torch.float64), r=r, lora_alpha=alpha)
        a, b = randomise(layer)
        x, g = normal(*leading, inputs), normal(*leading, outputs)
        (right,) = torch.autograd.grad(layer(x), layer.lora_A, g)
        with torch.no_grad():
            got = candidate(layer, x.clone(), g.clone())
        _need_tensor(got)
        t = {"A": a, "B": b, "s": torch.tensor(alpha / r, dtype=torch.float64)}
        need_gradient("A", got, right, t, "G = gᵀ x, summed over all inputs, and ∂L/∂A = s Bᵀ G.")

    steps: list[Step] = [
        ("a batch of inputs", lambda: compare(5)),
        ("a batch of sequences", lambda: compare(2, 3)),
    ]
    return run_steps("gradient of A", steps, hint)


def gradient_of_x(candidate: Callable[..., Tensor], hint: int = 1) -> Report:
    """Exercise A1: ``candidate(g, W, A, B, s)`` is ∂L/∂x of y = x Wᵀ + s (x Aᵀ) Bᵀ for g = ∂L/∂y."""

    def compare(*leading: int) -> None:
        inputs, outputs, r, alpha = sizes()
        s = alpha / r
        W, A, B = normal(outputs, inputs), normal(r, inputs), normal(outputs, r)
        x, g = normal(*leading, inputs).requires_grad_(), normal(*leading, outputs)
        (right,) = torch.autograd.grad(x @ W.T + s * (x @ A.T @ B.T), x, g)
        got = candidate(g.clone(), W.clone(), A.clone(), B.clone(), s)
        _need_tensor(got)
        t = {"g": g, "W": W, "A": A, "B": B, "s": torch.tensor(s, dtype=torch.float64)}
        need_gradient("x", got, right, t, "g @ W + s * (g @ B) @ A")

    steps: list[Step] = [
        ("a batch of inputs", lambda: compare(5)),
        ("one input without a batch", compare),
        ("a batch of sequences", lambda: compare(2, 3)),
    ]
    return run_steps("gradient of x", steps, hint)


def _need_tensor(got: Any) -> None:
    if not isinstance(got, Tensor):
        raise Wrong(
            f"you return {shape_or_type(got)}, not a tensor",
            "What should come back?",
            "Return the gradient, a tensor of the shape of what it belongs to.",
        )
