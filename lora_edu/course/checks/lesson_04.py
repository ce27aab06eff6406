"""Check of lesson 04: injection by hand (B1). A1 and C1 are in ``lesson_04_short``, B2 is in ``lesson_04_files``."""

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.core.layer import LoRALinear
from lora_edu.course.checks.report import Report, Wrong, run_steps


class Block(nn.Module):
    """A piece of a model with a name that only looks like a target (eq_proj) and a norm that sounds like one."""

    def __init__(self, width: int, wide: int):
        super().__init__()
        self.q_proj, self.eq_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj_norm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, wide), "down_proj": nn.Linear(wide, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.q_proj_norm(self.q_proj(x) + self.eq_proj(x))
        return self.mlp["down_proj"](torch.tanh(self.mlp["up_proj"](x)))


def draw_model() -> nn.Module:
    """An embedding, blocks in a list, and at the top of the model a linear layer and a head."""
    width, wide = random.randint(5, 9), random.randint(10, 14)
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(11, width))
    model.add_module("layers", nn.Sequential(*(Block(width, wide) for _ in range(random.randint(2, 3)))))
    model.add_module("q_proj", nn.Linear(width, width))
    model.add_module("head", nn.Linear(width, 11))
    return model.double()


def adapted(model: nn.Module) -> list[str]:
    """Names of the LoRA layers in a model."""
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def hand_injection(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """``candidate(model, targets, r, lora_alpha)`` injects LoRA by hand. Exercise B1 of lesson 04."""
    targets = ["q_proj", "up_proj"]

    def right_names(model: nn.Module, wanted: Sequence[str]) -> list[str]:
        ends = tuple("." + target for target in wanted)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return [name for name in linear if name in wanted or name.endswith(ends)]

    def replaces() -> None:
        model = draw_model()
        expected = right_names(model, targets)
        candidate(model, targets, 2, 6)
        found = adapted(model)
        if not found:
            raise Wrong(
                "after your call the model still holds no LoRALinear",
                "Did you change this model, or a copy of it? And is the new layer put back under its name?",
                "setattr(parent, attribute, LoRALinear(layer, r, lora_alpha)), in the model that came in.",
            )
        if missed := [name for name in expected if name not in found]:
            raise Wrong(
                f"not adapted: {some(missed)}",
                "Do you reach layers at every depth, inside lists and dictionaries, and at the top of the model?",
                "Walk model.named_modules(); the parent is model.get_submodule(name.rpartition('.')[0]).",
            )
        if extra := [name for name in found if name not in expected]:
            raise Wrong(
                f"adapted, but no target: {some(extra)}",
                "Which rule decides whether a name is meant? See exercise A1.",
                "Match whole segments: lora_edu.core.matching.matches_names(targets, name).",
            )

    def returns_names() -> None:
        model = draw_model()
        expected, got = right_names(model, targets), candidate(model, targets, 2, 6)
        if not isinstance(got, list) or [str(name) for name in got] != expected:
            shown = f"{len(got)} entries, the first {got[0]!r}" if isinstance(got, list) and got else repr(got)
            raise Wrong(
                f"you return {shown}; expected a list of {len(expected)} full names, the first {expected[0]!r}",
                "By which name would a reader find the layer in this model?",
                "Collect the full names of named_modules() in their order, and return that list.",
            )

    def settings() -> None:
        model, r, alpha = draw_model(), random.randint(2, 4), random.randint(5, 9)
        candidate(model, targets, r, alpha)
        layer: Any = model.get_submodule("q_proj")
        if (layer.r, layer.lora_alpha) != (r, alpha):
            raise Wrong(
                f"asked for r={r}, lora_alpha={alpha}; the layers have r={layer.r}, lora_alpha={layer.lora_alpha}",
                "Are both numbers passed on to LoRALinear?",
                "LoRALinear(layer, r=r, lora_alpha=lora_alpha)",
            )

    def starts_at_base() -> None:
        model, ids = draw_model(), torch.randint(11, (3, 5))
        before, weights = model(ids), {id(parameter) for parameter in model.parameters()}
        candidate(model, targets, 2, 6)
        same = {id(p) for name, p in model.named_parameters() if "lora_" not in name} == weights
        if not same or not torch.equal(model(ids), before):
            raise Wrong(
                "the fresh adapter changes the model's output, or its pretrained weights are new tensors",
                "Which layer did you give to LoRALinear: the model's own, or a new one?",
                "Wrap the layer that stands there; LoRALinear keeps it as .base.",
            )

    def freezes() -> None:
        model = draw_model()
        candidate(model, targets, 2, 6)
        trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        loose = [name for name, on in trains.items() if on and "lora_" not in name]
        if loose:
            n = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            total = sum(parameter.numel() for parameter in model.parameters())
            raise Wrong(
                f"{n} of {total} numbers train, among them {some(loose)}",
                "LoRALinear freezes the layer that it wraps. Who freezes all the others?",
                "Freeze the whole model, then let only the parameters of LoRALinear modules train.",
            )
        if dead := [name for name, on in trains.items() if not on and "lora_" in name]:
            raise Wrong(
                f"frozen as well: {some(dead)}",
                "In which order do you freeze and wrap?",
                "Freeze first and wrap then, or set requires_grad of lora_A and lora_B at the end.",
            )

    def once() -> None:
        model, ids = draw_model(), torch.randint(11, (2, 4))
        candidate(model, targets, 2, 6)
        for name in adapted(model):
            layer: Any = model.get_submodule(name)
            nn.init.normal_(layer.lora_B)
        before, names, modules = model(ids), adapted(model), len(list(model.modules()))
        again = candidate(model, targets, 2, 6)
        if adapted(model) != names or len(list(model.modules())) != modules:
            raise Wrong(
                f"after a second call there are {len(adapted(model))} LoRA layers, {len(names)} before: "
                "a layer was wrapped twice",
                "After the first call a plain nn.Linear stands inside each LoRALinear. What are the two called now?",
                "Wrap only modules that are an nn.Linear, and only if their own full name matches.",
            )
        if again != [] or not torch.equal(model(ids), before):
            raise Wrong(
                f"a second call found nothing to wrap and returned {again!r}; expected [] and an unchanged output",
                "What did this call replace?",
                "Return the names that this call replaced: an empty list.",
            )

    def adds() -> None:
        model = draw_model()
        first = candidate(model, ["q_proj"], 2, 6)
        second = candidate(model, ["down_proj"], 3, 6)
        frozen = [n for n, p in model.named_parameters() if "lora_" in n and not p.requires_grad]
        if sorted(adapted(model)) != sorted([*first, *second]) or frozen:
            raise Wrong(
                f"a second call with other targets stops the first adapter from training: {some(frozen)}"
                if frozen
                else "after a second call with other targets, the adapted layers are not those of both calls",
                "Freezing everything also freezes the A and B of an earlier call.",
                "Decide by owner: a parameter trains if its module is a LoRALinear.",
            )

    def oracle() -> None:
        import peft

        model = draw_model()
        reference = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=targets))
        candidate(model, targets, 3, 8)
        mine = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        right, _ = reference.get_nb_trainable_parameters()
        if mine != right:
            raise Wrong(
                f"PEFT trains {right:,} parameters of this model, yours {mine:,}",
                "Print name and size of everything that trains, in both models.",
                "Compare [n for n, p in model.named_parameters() if p.requires_grad] to lora_edu.core.inject's.",
            )

    steps = [
        ("every target is replaced, and nothing else", replaces),
        ("the names of the replaced layers come back", returns_names),
        ("r and lora_alpha reach the layers", settings),
        ("the model starts where it was", starts_at_base),
        ("only A and B train", freezes),
        ("a second call wraps nothing twice", once),
        ("a second call with other targets adds to the first", adds),
        ("as many trainable parameters as PEFT", oracle),
    ]
    return run_steps("injection", steps, hint)
