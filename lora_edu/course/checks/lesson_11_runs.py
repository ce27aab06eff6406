"""The checks of lesson 11's larger exercises: triage of a broken model, and the split of the capstone."""

import copy
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.core.config import LoraConfig
from lora_edu.core.inject import inject
from lora_edu.course.checks.report import Report, Step, Wrong, run_steps

VERDICTS = ("no label counts", "nothing trains", "the base trains", "no gradient", "not finite", "healthy")
LOOK = {
    "no label counts": ("What does cross-entropy average over if every label is -100?", "Count labels != -100 first."),
    "nothing trains": ("Which property of a parameter says that it trains?", "No parameter has requires_grad."),
    "the base trains": ("Which names have the parameters that should train?", "One without lora_ requires a gradient."),
    "no gradient": ("Where did backward not arrive? Can it fail itself?", "Some .grad is None, or backward raises."),
    "not finite": ("Is the loss a number?", "torch.isfinite of the loss, and of every gradient."),
    "healthy": ("Which gradient is zero in LoRA's first step?", "A zero gradient of lora_A is no fault."),
}  # fmt: skip


class Reader(nn.Module):
    """A small language model of the usual form: ``model(input_ids=…, labels=…)`` has ``.loss`` and ``.logits``."""

    def __init__(self, width: int, words: int, blocks: int):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks: Any = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(width, width)}) for _ in range(blocks)])
        self.head = nn.Linear(width, words, bias=False)
        self.cut = False

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        for i, block in enumerate(self.blocks):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not (self.cut and i == 0)):
                x = x + torch.tanh(block["up_proj"](x))
        logits = self.head(x)
        return SimpleNamespace(
            logits=logits, loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )


def broken(fault: str, blocks: int | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model with LoRA, and one batch, with one of the faults in ``VERDICTS``."""
    width, words = random.choice([6, 10]), random.choice([17, 23])
    model = Reader(width, words, blocks or random.randint(2, 4))
    inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=["up_proj"]))
    ids = torch.randint(0, words, (random.randint(2, 3), random.randint(5, 7)))
    labels = ids.clone()
    labels[:, :2] = -100
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    if fault == "no label counts":
        labels[:] = -100
    elif fault == "nothing trains":
        model.requires_grad_(False)
    elif fault == "the base trains":
        random.choice([p for p in model.parameters() if not p.requires_grad]).requires_grad_(True)
    elif fault == "no gradient":
        model.cut = True
    elif fault == "not finite":
        random.choice(lora).data[0, 0] = float("nan")
    return model, {"input_ids": ids, "labels": labels}


def triage(candidate: Callable[[nn.Module, dict[str, Tensor]], str], hint: int = 1) -> Report:
    """Exercise B2: ``candidate(model, batch)`` looks at one forward and backward pass and names the fault."""

    def says(fault: str, **options: Any) -> None:
        model, batch = broken(fault, **options)
        verdict = candidate(model, batch)
        if verdict not in VERDICTS:
            raise Wrong(
                f"your verdict is {verdict!r}; expected one of {', '.join(VERDICTS)}",
                "Does every path of your function end in a return?",
                "Return one of the six sentences.",
            )
        if verdict != fault:
            question, fix = LOOK[fault]
            raise Wrong(f"a model with the fault {fault!r} gets the verdict {verdict!r}", question, fix)

    def healthy() -> None:
        says("healthy")

    def cut_everywhere() -> None:
        says("no gradient", blocks=1)  # with one block nothing of the graph is left, and backward raises

    def untouched() -> None:
        model, batch = broken("healthy")
        before = copy.deepcopy(model.state_dict())
        flags = [parameter.requires_grad for parameter in model.parameters()]
        candidate(model, batch)
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        if changed or flags != [parameter.requires_grad for parameter in model.parameters()]:
            raise Wrong(
                f"your examination changed the model ({changed[0] if changed else 'what requires a gradient'})",
                "Does a diagnosis need an optimizer step?",
                "Only call the model and backward.",
            )
        if left := [name for name, parameter in model.named_parameters() if parameter.grad is not None]:
            raise Wrong(
                f"gradients are left behind, for example in {left[0]}: the next step would add to them",
                "What does backward do with a gradient that is there already?",
                "model.zero_grad() at the end, on every path.",
            )

    steps: list[Step] = [
        ("a healthy run, in its first step", healthy),
        ("nothing trains", lambda: says("nothing trains")),
        ("the base trains along", lambda: says("the base trains")),
        ("no label counts", lambda: says("no label counts")),
        ("not finite", lambda: says("not finite")),
        ("one block is cut off", lambda: says("no gradient")),
        ("everything is cut off", cut_everywhere),
        ("the model is as it was", untouched),
    ]
    return run_steps("triage", steps, hint)


def honest_split(
    candidate: Callable[[Sequence[dict[str, str]], float, int], tuple[list[dict[str, str]], list[dict[str, str]]]],
    hint: int = 1,
) -> Report:
    """Exercise C1: ``candidate(entries, share, seed)`` gives (train, held-out) without a headword in both."""

    def entries(count: int) -> list[dict[str, str]]:
        words = [f"word{i}" for i in range(count)]
        meanings = [*words, *random.sample(words, count // 3)]  # a third of the words have two definitions
        return [{"word": word, "pos": "noun", "definition": f"meaning {i}"} for i, word in enumerate(meanings)]

    def key(entry: dict[str, str]) -> tuple[str, ...]:
        return tuple(entry.values())

    def complete() -> None:
        given = entries(random.randint(40, 60))
        kept = copy.deepcopy(given)
        train, held = candidate(given, 0.2, 0)
        if given != kept:
            raise Wrong(
                "your function changed the list it was given",
                "Does random.shuffle make a new list?",
                "Shuffle a copy: words = sorted({…}).",
            )
        there, expected = sorted(map(key, [*train, *held])), sorted(map(key, given))
        if there != expected:
            raise Wrong(
                f"{len(given)} entries went in and {len(train)} + {len(held)} came out, or not the same ones",
                "Where does each entry go, exactly once?",
                "Every entry whose word is held out goes there, every other one to train.",
            )

    def apart() -> None:
        train, held = candidate(entries(random.randint(40, 60)), 0.3, 1)
        both = sorted({entry["word"] for entry in train} & {entry["word"] for entry in held})
        if both:
            raise Wrong(
                f"{len(both)} headwords are in both parts, for example {both[0]!r}: the test was seen in training",
                "What do you draw: entries, or words?",
                "Draw the words, then sort the entries by their word.",
            )

    def size() -> None:
        for share in (0.1, 0.4):
            given = entries(200)
            held = candidate(given, share, random.randrange(100))[1]
            got = len({entry["word"] for entry in held}) / 200
            if abs(got - share) > 0.02:
                raise Wrong(
                    f"share={share}: {got:.0%} of the words are held out",
                    "Which of the two lists is the small one, and what is it a share of?",
                    "round(share * number of words) words are held out.",
                )

    def drawn() -> None:
        given = entries(60)
        first, again, other = (sorted(map(key, candidate(given, 0.3, seed)[1])) for seed in (5, 5, 6))
        if first != again:
            raise Wrong(
                "the same seed gives two different splits",
                "Which random numbers do you use, and who else uses them?",
                "random.Random(seed), and a sorted list of words: a set has no order of its own.",
            )
        if first == other:
            raise Wrong(
                "seeds 5 and 6 give the same split",
                "Are the entries of a dictionary in a random order?",
                "Shuffle the words with random.Random(seed).",
            )

    def polite() -> None:
        random.seed(3)
        expected = random.random()
        random.seed(3)
        candidate([{"word": word, "pos": "noun", "definition": word} for word in "abcdef"], 0.5, 1)
        if random.random() != expected:
            raise Wrong(
                "your function reseeds or uses up Python's own random numbers",
                "Whose numbers are they?",
                "A generator of your own: random.Random(seed).",
            )

    steps: list[Step] = [
        ("every entry is in exactly one part", complete),
        ("no headword is in both", apart),
        ("the held-out part has the size asked for", size),
        ("the seed decides, and nothing else", drawn),
        ("the caller's random numbers are untouched", polite),
    ]
    return run_steps("honest split", steps, hint)
