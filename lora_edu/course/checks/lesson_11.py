"""The checks of lesson 11: error traces (A1), a profile (A2), triage of a broken model (B1), a split (C1)."""

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
from lora_edu.course.checks.tools import changed, need_number, trainable, values_of
from lora_edu.lab.datasets import IGNORED

VERDICTS = ("no label counts", "nothing trains", "the base trains", "no gradient", "not finite", "healthy")


def answer_to(answers: Any, key: str) -> Any:
    """The learner's answer to one question of a reading."""
    if not isinstance(answers, dict):
        raise Wrong(
            f"you return {answers!r:.60}", "What holds one answer a question?", "Return the filled-in dictionary."
        )
    if key not in answers:
        raise Wrong(f"{key!r} has no answer", "Which keys has the dictionary of the exercise?", f'"{key}": your answer')
    return answers[key]


def need_choice(answers: Any, key: str, right: str, others: dict[str, str], question: str, fix: str) -> None:
    """The right one of several phrases, in capitals or not; ``others`` says of each wrong one why it is wrong."""
    answer = answer_to(answers, key)
    said = " ".join(answer.lower().split()) if isinstance(answer, str) else str(answer)
    if said in others:
        raise Wrong(others[said], question, fix)
    if said != right:
        choice = ", ".join(map(repr, sorted([right, *others])))
        raise Wrong(f"{key!r}: {answer!r} is none of {choice}", "Is it spelled as in the list?", f"One of {choice}.")


def need_near(answers: Any, key: str, right: float, tolerance: float, slips: dict[float, str], fix: str) -> None:
    """A number near the right one; ``slips`` are known wrong ones, each with what it is instead."""
    question = f"What does {key!r} ask for, and which line of the profile has it?"
    answer = need_number(answer_to(answers, key), question, fix)
    if abs(answer - right) > tolerance:
        known = [what for slip, what in slips.items() if abs(answer - slip) <= 0.006 * abs(slip)]
        raise Wrong(f"{key!r}: {answer:g} is {known[0] if known else 'not what the profile says'}", question, fix)


def error_traces(candidate: Callable[[], dict[str, str]], hint: int = 1) -> Report:
    """Exercise A1: ``candidate()`` says what two error traces are about, and what helps."""

    def what_did_not_fit() -> None:
        others = {
            "weights": "the weights are 8.04 billion numbers of 2 bytes, 15.0 GiB; 46.97 were asked for",
            "adapter": "the adapter has 6.8 million numbers, 0.03 GiB in float32; 46.97 were asked for",
            "optimizer states": "the trace ends in cross_entropy; the optimizer has not made a step yet",
        }
        question = "Which tensor has 48 · 2,048 · 128,256 numbers of 4 bytes?"
        fix = 'One number for each token and word, 46.97 GiB: "logits".'
        need_choice(candidate(), "tensor", "logits", others, question, fix)

    def what_helps() -> None:
        others = {
            "a smaller rank": "a smaller rank saves a part of the adapter's 0.03 GiB; 46.97 are asked for",
            "a lower learning rate": "no tensor becomes smaller with the learning rate",
            "expandable segments": "6.13 GiB are reserved and not used; with the 21.27 that are free, 46.97 do not fit",
        }
        question = "On which numbers of the script does the size of that tensor depend?"
        fix = 'It grows with the rows: "fewer rows at a time", and more steps of accumulation.'
        need_choice(candidate(), "what helps", "fewer rows at a time", others, question, fix)

    def what_differs() -> None:
        others = {
            "the rank": "the rank is 8 in the file, and 8 in the model",
            "the scale": "alpha / r stands in the config, and is no tensor's shape",
            "the names": "a name that fits nothing would be a missing key; this one is on both sides",
        }
        question = "lora_A has the shape (r, in). Which of the two numbers differs?"
        fix = 'r is 8 on both sides; in is 576 in the file and 192 in the model: "the width".'
        need_choice(candidate(), "what differs", "the width", others, question, fix)

    def what_repairs() -> None:
        others = {
            "another rank in the config": "the rank is 8 on both sides already",
            "other target modules": "q_proj and v_proj are found on both sides, so the targets agree",
            "ignoring the mismatch": "then these layers keep their start, B = 0, and the adapter does nothing",
        }
        question = "Is the file at fault, or the model into which it is loaded?"
        fix = 'An adapter belongs to one base: "the base it was trained on".'
        need_choice(candidate(), "what repairs", "the base it was trained on", others, question, fix)

    steps: list[Step] = [
        ("trace 1: what did not fit", what_did_not_fit),
        ("trace 1: what helps", what_helps),
        ("trace 2: what differs", what_differs),
        ("trace 2: what repairs it", what_repairs),
    ]
    return run_steps("two error traces", steps, hint)


def profile_of_a_step(candidate: Callable[[], dict[str, Any]], hint: int = 1) -> Report:
    """Exercise A2: ``candidate()`` says where the time of a profiled training step goes, and what helps."""

    def optimizer() -> None:
        slips = {0.5: "a percentage", 15: "a time in milliseconds", 0.531: "backward's share", 0.465: "forward's share"}
        fix = "15 of 3,347 milliseconds, as a number from 0 to 1."
        need_near(candidate(), "share of the optimizer", 15 / 3347, 0.0006, slips, fix)

    def computed() -> None:
        slips = {512.0: "the tokens of one text", 427.0: "the tokens of the texts alone", 192.0: "the model's width"}
        slips |= {8.0: "the number of texts", 64.0: "the length of the longest text"}
        fix = "The first matrix of a product has a row for each token: 4,096."
        need_near(candidate(), "tokens computed", 4096, 0, slips, fix)

    def wasted() -> None:
        slips = {427 / 4096: "the share that is text", 89.6: "a percentage", 3669: "a number of tokens"}
        fix = "1 - 427 / 4096, a number from 0 to 1."
        need_near(candidate(), "share of padding", 1 - 427 / 4096, 0.006, slips, fix)

    def what_helps() -> None:
        others = {
            "a smaller rank": "none of the largest entries has r = 8 as the side of a matrix",
            "another optimizer": "the optimizer takes 0.5 % of the step; the rest would remain",
            "gradient checkpointing": "checkpointing saves memory, and computes the forward pass twice",
        }
        question = "Which number in the shapes is larger than the texts ask for?"
        fix = '"pad to the longest text": 8 · 64 = 512 tokens instead of 4,096.'
        need_choice(candidate(), "what helps", "pad to the longest text", others, question, fix)

    steps: list[Step] = [
        ("the optimizer's share", optimizer),
        ("the tokens that are computed", computed),
        ("the share of padding", wasted),
        ("what helps", what_helps),
    ]
    return run_steps("profile of a step", steps, hint)


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
    """Exercise B1: ``candidate(model, batch)`` looks at one forward and backward pass and names the fault."""

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
