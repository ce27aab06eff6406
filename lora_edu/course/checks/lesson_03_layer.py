"""The check of lesson 03's main exercise: a LoRA layer written by the learner."""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.core.layer import LoRALinear
from lora_edu.course.checks.lesson_03 import _close, _normal, _same_gradient, _same_scale, _sizes
from lora_edu.course.checks.report import Report, Step, Wrong, run_steps


def lora_layer(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise B1: a class ``candidate(base, r, lora_alpha, lora_dropout)`` with ``lora_A`` and ``lora_B``."""

    def build(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> tuple[Any, nn.Linear, int, float]:
        inputs, outputs, r, alpha = _sizes()
        base = nn.Linear(inputs, outputs, dtype=dtype)
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
                    f"the base is {_dtype(base.weight)}, your {name} is {_dtype(tensor)}",
                    "Which dtype has a tensor that you create without saying so?",
                    "Create it with base.weight.new_zeros(...), which takes over dtype and device.",
                )

    def starts() -> None:
        layer, base, _, _ = build()
        x = _normal(3, base.in_features)
        off = layer(x) - base(x)
        if _close(off, torch.zeros_like(off)):
            return
        if _close(off, -base.bias.expand_as(off)):
            raise Wrong(
                "your output lacks the base's bias",
                "What does base(x) add that x @ W.T does not?",
                "Call self.base(x).",
            )
        if layer.lora_B.any():
            raise Wrong(
                f"before any training the output is {(off.norm() / base(x).norm()).item():.0%} away from the base's",
                "Which values must B have for BA to be zero?",
                "Leave lora_B at zero.",
            )
        raise Wrong(
            f"with B = 0 the output is still {(off.norm() / base(x).norm()).item():.0%} away from the base's",
            "What is left of the forward pass when the update is zero?",
            "Return self.base(x) plus the update, and leave the base's weight as it is.",
        )

    def alive() -> None:
        layer, _, r, _ = build()
        if not layer.lora_A.any():
            raise Wrong(
                "lora_A starts at zero as well: this layer can never learn",
                "∂L/∂A contains B, ∂L/∂B contains A. What are they when both are zero?",
                "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))",
            )
        if (rank := int(torch.linalg.matrix_rank(layer.lora_A.detach()))) < r:
            raise Wrong(
                f"with r={r} your lora_A has rank {rank}: its rows are not independent",
                "What do rows that start alike get as their gradients?",
                "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))",
            )

    def frozen() -> None:
        layer, _, _, _ = build()
        trains = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
        for name in ("lora_A", "lora_B"):
            if name not in trains:
                raise Wrong(f"{name} does not train", "Who set its requires_grad?", "Freeze the base only.")
        if extra := sorted(trains - {"lora_A", "lora_B"}):
            raise Wrong(
                f"besides lora_A and lora_B these train: {', '.join(extra)}",
                "Which parameters has an nn.Linear?",
                "base.requires_grad_(False) freezes the weight and the bias.",
            )

    def scale() -> None:
        for leading in ((4,), (), (2, 3)):
            layer, base, r, alpha = build()
            x, a, b = _normal(*leading, base.in_features), *_randomise(layer)
            _same_scale(layer(x) - base(x), x @ a.T @ b.T, alpha, r)

    def precision() -> None:
        for dtype in (torch.float64, torch.bfloat16):
            layer, base, _, _ = build(dtype=dtype)
            got = layer(_normal(3, base.in_features).to(dtype))
            if got.dtype != dtype:
                raise Wrong(
                    f"a {_dtype(base.weight)} layer returns {_dtype(got)}",
                    "Where in your forward does the dtype change?",
                    "Return the sum in the dtype of self.base(x).",
                )

    def gradients() -> None:
        layer, base, r, alpha = build()
        a, b = _randomise(layer)
        x, g = _normal(2, 3, base.in_features).requires_grad_(), _normal(2, 3, base.out_features)
        y = layer(x)
        got = torch.autograd.grad(y, (layer.lora_A, layer.lora_B, x), g, allow_unused=True)
        s, W, G = alpha / r, base.weight.detach(), g.flatten(0, 1).T @ x.detach().flatten(0, 1)
        t = {"g": g, "x": x, "W": W, "A": a, "B": b, "s": torch.tensor(s, dtype=torch.float64)}
        fix = "Let autograd see every step: no .data, .detach() or torch.no_grad() in forward."
        for name, ours, right in zip("ABx", got, (s * b.T @ G, s * G @ a.T, g @ (W + s * b @ a)), strict=True):
            if ours is None:
                raise Wrong(f"no gradient reaches {name}", "Where does your forward leave autograd's graph?", fix)
            _same_gradient(name, ours, right, t, fix)

    def evaluation() -> None:
        layer, base, r, alpha = build(dropout=0.5)
        a, b = _randomise(layer)
        x = _normal(6, base.in_features)
        layer.eval()
        if not _close(layer(x), base(x) + alpha / r * x @ a.T @ b.T):
            raise Wrong(
                "after layer.eval() something is still dropped",
                "Who tells F.dropout whether the layer is training?",
                "Use an nn.Dropout module, or F.dropout(x, p, training=self.training).",
            )

    def placement() -> None:
        layer, base, r, alpha = build(dropout=0.5)
        layer.train()
        b = layer.lora_B.detach().clone()
        x = torch.eye(base.in_features).double().repeat(40, 1)  # one entry of x at a time is dropped or kept
        if not _close(layer(x), base(x)):
            raise Wrong(
                "in training a fresh layer with dropout is not the base: the frozen path is dropped, too",
                "Which of the two paths should dropout disturb?",
                "return self.base(x) + scaling * (dropout(x) @ A.T @ B.T)",
            )
        a, b = _randomise(layer)
        whole = alpha / r * x @ a.T @ b.T
        update = layer(x) - base(x)
        if _close(update, whole):
            raise Wrong(
                "with lora_dropout=0.5 nothing is dropped", "Is the layer in training mode here?", "Drop x before A."
            )
        row = (update * whole).sum(1) / (whole * whole).sum(1)  # 0 or 1 / (1 - p) if whole entries of x were dropped
        if _close(update, row[:, None] * whole) and all(min(abs(f), abs(f - 2)) < 1e-9 for f in row.tolist()):
            return
        if _close(update, row[:, None] * whole) and all(min(abs(f), abs(f - 1)) < 1e-9 for f in row.tolist()):
            symptom = "what is kept is not divided by 1 − p, so that the mean of the update shrinks"
        elif _close(update * (update - 2 * whole), torch.zeros_like(update)):
            symptom = "entries of the update are dropped, after B"
        else:
            symptom = "dropout does not act on x: it comes after A"
        raise Wrong(
            symptom,
            "Give it an x with one non-zero entry: which updates are possible if x is dropped, and which do you see?",
            "return self.base(x) + scaling * (self.dropout(x) @ A.T @ B.T) with nn.Dropout",
        )

    def oracle(reference: Callable[..., tuple[nn.Module, Tensor, Tensor]], name: str) -> Callable[[], None]:
        def step() -> None:
            layer, base, r, alpha = build()
            a, b = _randomise(layer)
            other, other_a, other_b = reference(copy.deepcopy(base), r, alpha)
            other_a.data.copy_(a), other_b.data.copy_(b)
            x, target = _normal(7, base.in_features), _normal(7, base.out_features)
            for module, factors in ((layer, (layer.lora_A, layer.lora_B)), (other, (other_a, other_b))):
                optimizer = torch.optim.Adam(factors, lr=1e-2)
                for _ in range(5):
                    optimizer.zero_grad()
                    F.mse_loss(module(x), target).backward()
                    optimizer.step()
            if not _close(layer(x), other(x)):
                raise Wrong(
                    f"after five steps from equal values your output differs from {name}'s",
                    "Does your layer keep anything from one call to the next?",
                    "Compute the update from lora_A and lora_B in every forward.",
                )

        return step

    steps: list[Step] = [
        ("lora_A is (r, in), lora_B is (out, r), in the base's precision", shapes),
        ("starts at the base model", starts),
        ("can learn: lora_A does not start at zero", alive),
        ("base weight and bias frozen, A and B trainable", frozen),
        ("the update is scaled by lora_alpha / r", scale),
        ("keeps the precision of the base", precision),
        ("gradients of A, B and x", gradients),
        ("no dropout in eval", evaluation),
        ("dropout on x, before A", placement),
        ("equal to lora_edu's layer after five steps", oracle(_library_layer, "lora_edu")),
    ]
    if importlib.util.find_spec("peft"):
        steps.append(("equal to PEFT after five steps", oracle(_peft_layer, "PEFT")))
    return run_steps("LoRA layer", steps, hint)


def _library_layer(base: nn.Linear, r: int, alpha: float) -> tuple[nn.Module, Tensor, Tensor]:
    layer = LoRALinear(base, r=r, lora_alpha=alpha)
    return layer, layer.lora_A, layer.lora_B


def _peft_layer(base: nn.Linear, r: int, alpha: float) -> tuple[nn.Module, Tensor, Tensor]:
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=int(alpha), target_modules=["0"])
    model: Any = peft.get_peft_model(nn.Sequential(base), config)  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    return model, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _randomise(layer: Any) -> tuple[Tensor, Tensor]:
    """Random values in place of A and B, also returned."""
    for parameter in (layer.lora_A, layer.lora_B):
        parameter.data.copy_(torch.randn_like(parameter))
    return layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
