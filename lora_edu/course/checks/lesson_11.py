"""The checks of lesson 11: labels (A1), a block's layers (A2), a merging layer (B1), triage (B2), a split (C1)."""

import copy
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.core.config import LoraConfig
from lora_edu.core.inject import inject
from lora_edu.course.checks.report import Report, Step, Wrong, run_steps
from lora_edu.course.checks.tools import (
    changed,
    close,
    factor_between,
    is_tensor,
    normal,
    shape_or_type,
    trainable,
    values_of,
)
from lora_edu.lab.datasets import IGNORED

VERDICTS = ("no label counts", "nothing trains", "the base trains", "no gradient", "not finite", "healthy")


def labels_without_padding(candidate: Callable[[Tensor, Tensor], Tensor], hint: int = 1) -> Report:
    """Exercise A1: ``candidate(input_ids, attention_mask)`` gives labels in which only the padding is left out."""

    def batch() -> tuple[Tensor, Tensor]:
        rows, longest = random.randint(3, 5), random.randint(9, 12)
        lengths = [random.randint(4, longest - 2) for _ in range(rows)]
        lengths[random.randrange(rows)] = longest
        ids = torch.randint(3, 50, (rows, longest))
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            ids[row, length - 1 :] = 2  # the end of the text, and the padding behind it: one and the same id
            mask[row, :length] = 1
        return ids, mask

    def labels_of(ids: Tensor, mask: Tensor) -> Tensor:
        labels = candidate(ids.clone(), mask.clone())
        if not is_tensor(labels, ids.shape):
            raise Wrong(
                f"for input_ids of shape {tuple(ids.shape)} your labels are {shape_or_type(labels)}",
                "The model shifts labels by itself. Which shape does it expect?",
                "Return one label for each token.",
            )
        return labels

    def padding_left_out() -> None:
        ids, mask = batch()
        labels = labels_of(ids, mask)
        counted = int((labels[mask == 0] != IGNORED).sum())
        if counted:
            raise Wrong(
                f"{counted} of {int((mask == 0).sum())} padding positions still count in the loss",
                "Which label does cross-entropy leave out?",
                "-100 wherever attention_mask is 0.",
            )

    def end_counts() -> None:
        ids, mask = batch()
        labels = labels_of(ids, mask)
        last = mask.sum(1) - 1
        lost = int((labels[torch.arange(len(ids)), last] == IGNORED).sum())
        if lost:
            raise Wrong(
                f"in {lost} of {len(ids)} rows the token that ends the text is left out: the model will never stop",
                "Padding and end have the same id here. What else tells them apart?",
                "Decide by attention_mask, not by the id.",
            )

    def text_counts() -> None:
        ids, mask = batch()
        labels = labels_of(ids, mask)
        wrong = (labels != ids) & (mask == 1)
        if wrong.any():
            left_out = int((labels[wrong] == IGNORED).sum())
            raise Wrong(
                f"{int(wrong.sum())} text tokens have another label than themselves ({left_out} are left out)",
                "What is the right label of a token of the text? The model does the shifting.",
                "labels = input_ids.clone(), and only then -100 at the padding.",
            )

    def inputs_untouched() -> None:
        ids, mask = batch()
        before = ids.clone()
        candidate(ids, mask)
        if not torch.equal(before, ids):
            raise Wrong(
                "your function changes input_ids: the model would be fed -100 as a token",
                "Is your labels tensor a copy?",
                "input_ids.clone(), or torch.where, which makes a new tensor.",
            )

    steps: list[Step] = [
        ("the padding is left out", padding_left_out),
        ("the token that ends the text counts", end_counts),
        ("every text token is its own label", text_counts),
        ("input_ids is as it was", inputs_untouched),
    ]
    return run_steps("labels without padding", steps, hint)


def linear_layers_of_block(candidate: Callable[[nn.Module, int], list[str]], hint: int = 1) -> Report:
    """Exercise A2: ``candidate(model, index)`` names the linear layers of one block, and of no other."""

    def compare(model: nn.Module, index: int, container: str) -> None:
        modules = dict(model.named_modules())
        answer = candidate(model, index)
        if not isinstance(answer, list | tuple | set):
            raise Wrong(f"you return {answer!r:.60}", "What comes back?", "Return a list of names.")
        names = sorted(map(str, answer))
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise Wrong(f"you return {twice[0]!r} twice", "How often does named_modules() give it?", "Each name once.")
        if unknown := [name for name in names if name not in modules]:
            raise Wrong(
                f"{unknown[0]!r} is no module of the model", "Where do names come from?", "model.named_modules()"
            )
        if other := [name for name in names if not isinstance(modules[name], nn.Linear)]:
            raise Wrong(
                f"{other[0]!r} is a {type(modules[other[0]]).__name__}: LoRA needs a weight matrix",
                "Which class do the layers have that you want?",
                "Ask for isinstance(module, nn.Linear) as well.",
            )
        wanted = [n for n, m in modules.items() if isinstance(m, nn.Linear) and n.startswith(f"{container}.{index}.")]
        if foreign := [name for name in names if name not in wanted]:
            raise Wrong(
                f"asked for block {index}, you also return {foreign[0]!r} ({len(foreign)} layers too many)",
                "Of which longer names is yours a part?",
                'Compare whole segments: "layers" and the number in name.split("."), one after the other.',
            )
        if missing := [name for name in wanted if name not in names]:
            raise Wrong(
                f"block {index} has {len(wanted)} linear layers; {missing[0]!r} is not among yours",
                "How deep may a layer lie inside its block?",
                "Everything whose name continues after the block's own name belongs to it.",
            )

    def block() -> nn.Module:
        inner = nn.ModuleDict({"q_proj": nn.Linear(4, 6), "norm": nn.LayerNorm(6)})
        return nn.ModuleDict({"attention": inner, "up_proj": nn.Linear(6, 4), "post_attention_norm": nn.LayerNorm(4)})

    def tower(count: int) -> nn.ModuleList:
        return nn.ModuleList([block() for _ in range(count)])

    def few() -> None:
        model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "layers": tower(random.randint(3, 9))})
        compare(model, random.randrange(1, 3), "layers")

    def many() -> None:
        model = nn.ModuleDict({"model": nn.ModuleDict({"layers": tower(random.randint(12, 25))})})
        compare(model, 1, "model.layers")

    def other_numbers() -> None:
        experts = nn.ModuleDict({"layers": tower(4), "experts": tower(5)})
        compare(nn.ModuleDict({"model": experts, "head": nn.Linear(4, 3)}), random.randrange(1, 4), "model.layers")

    steps: list[Step] = [
        ("a model with fewer than ten blocks", few),
        ("a model with more than ten blocks", many),
        ("a model with other numbered parts", other_numbers),
    ]
    return run_steps("linear layers of one block", steps, hint)


def merging_layer(candidate: Callable[[nn.Linear, Tensor, Tensor, float], Any], hint: int = 1) -> Report:
    """Exercise B1: ``candidate(linear, lora_A, lora_B, scaling)``, which merges without counting twice."""

    def build() -> tuple[Any, nn.Linear, Tensor, Tensor]:
        """The learner's layer, a copy of the linear one, an input, and the update."""
        outputs, inputs, r, scaling = random.randint(5, 8), random.randint(9, 12), random.randint(2, 4), 1.5
        linear = nn.Linear(inputs, outputs).double()
        a, b = normal(r, inputs), normal(outputs, r)
        layer = candidate(copy.deepcopy(linear), a.clone(), b.clone(), scaling)
        return layer, linear, normal(3, 2, inputs), scaling * b @ a

    def expect(layer: Any, linear: nn.Linear, x: Tensor, update: Tensor, when: str) -> None:
        with torch.no_grad():
            got = layer(x) - linear(x)
            right = x @ update.T
        times = factor_between(got, right)
        shown = f"{round(times, 1) + 0.0:.1f}"  # adding zero turns "-0.0" into "0.0"
        if not close(got, right):
            exact = close(got, times * right)
            raise Wrong(
                f"{when} the layer adds {shown} × the update" if exact else f"{when} the output is no base + update",
                "Which places add the update? At which of them is it added already?",
                "Keep a flag self.merged: forward adds s·BAx only without it, merge adds s·BA only without it.",
            )

    def before() -> None:
        expect(*build(), "before any merge")

    def once() -> None:
        layer, linear, x, update = build()
        layer.merge()
        expect(layer, linear, x, update, "after one merge")

    def in_weight() -> None:
        layer, linear, _, update = build()
        before = {name: getattr(layer, name).detach().clone() for name in ("lora_A", "lora_B")}
        layer.merge()
        if not close(layer.linear.weight.detach(), linear.weight + update):
            raise Wrong(
                "after merge, linear.weight is not W + s·BA: somebody who saves the weight saves something else",
                "What should a merged weight be worth without the adapter?",
                "self.linear.weight.data += self.scaling * self.lora_B @ self.lora_A",
            )
        if lost := [name for name, value in before.items() if not torch.equal(getattr(layer, name), value)]:
            raise Wrong(
                f"after merge, {lost[0]} is no longer what it was",
                "From what would the update be taken out of the weight again, or saved by itself?",
                "merge writes into linear.weight and remembers in self.merged that it did; nothing else changes.",
            )

    def twice() -> None:
        layer, linear, x, update = build()
        layer.merge()
        layer.merge()
        expect(layer, linear, x, update, "after two merges")

    def back() -> None:
        layer, linear, x, update = build()
        layer.unmerge()
        expect(layer, linear, x, update, "after unmerge without a merge")
        layer.merge()
        layer.unmerge()
        expect(layer, linear, x, update, "after merge and unmerge")
        if not close(layer.linear.weight.detach(), linear.weight):
            raise Wrong(
                "after unmerge the pretrained weight is not back",
                "What does merge add? Does your unmerge take away the same, and only when it is there?",
                "The mirror image of merge, and self.merged = False.",
            )

    steps: list[Step] = [
        ("unmerged, the update counts once", before),
        ("merged, it counts once", once),
        ("the merged weight is W + s·BA", in_weight),
        ("merging again changes nothing", twice),
        ("unmerge brings the weight back", back),
    ]
    return run_steps("merging layer", steps, hint)


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


def broken(fault: str, blocks: int | None = None, in_gradient: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model with LoRA, and one batch, with one of the faults in ``VERDICTS``.

    With ``in_gradient`` a run that is not finite has a finite loss: only one of its gradients is not.
    """
    width, words = random.choice([6, 10]), random.choice([17, 23])
    model = Reader(width, words, blocks or random.randint(2, 4))
    inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=["up_proj"]))
    ids = torch.randint(0, words, (random.randint(2, 3), random.randint(5, 7)))
    labels = ids.clone()
    labels[:, :2] = IGNORED
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    if fault == "no label counts":
        labels[:] = IGNORED
    elif fault == "nothing trains":
        model.requires_grad_(False)
    elif fault == "the base trains":
        random.choice([p for p in model.parameters() if not p.requires_grad]).requires_grad_(True)
    elif fault == "no gradient":
        model.cut = True
    elif fault == "not finite" and in_gradient:
        next(p for p in lora if not p.any()).register_hook(lambda gradient: gradient * torch.inf)  # a B, which has one
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
        before, training = values_of(model), trainable(model)
        candidate(model, batch)
        others = changed(model, before)
        if others or trainable(model) != training:
            raise Wrong(
                f"your examination changed the model ({others[0] if others else 'what requires a gradient'})",
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
        ("a finite loss with a gradient that is not", lambda: says("not finite", in_gradient=True)),
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
        def states() -> dict[str, Any]:
            numpy: Any = np.random.get_state()
            return {"Python": random.getstate(), "PyTorch": torch.get_rng_state().tolist(), "NumPy": numpy[1].tolist()}

        before = states()
        candidate([{"word": word, "pos": "noun", "definition": word} for word in "abcdef"], 0.5, 1)
        if used := [name for name, state in states().items() if state != before[name]]:
            raise Wrong(
                f"your function reseeds or uses up {used[0]}'s own random numbers",
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
