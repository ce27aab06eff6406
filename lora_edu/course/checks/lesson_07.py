"""The checks of lesson 07: labels of a row (A1) and warm-up (A2)."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch

from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.lab.datasets import IGNORED, collate

END = 2  # the id of the end token in drawn rows; it is the padding's too, as in SmolLM2


def answer_labels(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise A1: ``candidate(prompt, answer, eos, length)``, the labels of prompt + answer + [eos] + padding."""
    rule = "[-100] * len(prompt) + answer + [eos], and then -100 until there are length labels."

    def slips(prompt: list[int], answer: list[int], eos: int, padding: int) -> dict[tuple[int, ...], str]:
        """Wrong labels and what is wrong with them. All have the right length."""
        none, fill = [IGNORED] * len(prompt), [IGNORED] * padding
        right = [*none, *answer, eos, *fill]
        known: list[tuple[list[int], str]] = [
            ([*prompt, *answer, eos, *fill], "the prompt counts in the loss, too"),
            ([*prompt, *answer, eos, *[eos] * padding], "prompt and padding count in the loss, too"),
            ([*none, *answer, eos, *[eos] * padding], f"the padding counts: {padding} more ends are asked for"),
            ([*none, *answer, IGNORED, *fill], "the end does not count, so the model never learns to stop"),
            ([*prompt, *answer, IGNORED, *fill], "the prompt counts, and the end does not"),
            ([*right[1:], IGNORED], "each label stands one place early, but the model does that shift itself"),
            ([IGNORED, *right[:-1]], "each label stands one place late"),
            ([*none[1:], prompt[-1], *right[len(prompt) :]], "the last token of the prompt counts, too"),
            ([*none, IGNORED, *right[len(prompt) + 1 :]], "the first token of the answer does not count"),
            ([0 if label == IGNORED else label for label in right], "0 is the id of a token, so it counts"),
            ([-1 if label == IGNORED else label for label in right], "-1 is not the label that is left out"),
            (
                [IGNORED if id in prompt else id for id in right],
                "tokens of the answer are left out that the prompt has",
            ),
            ([IGNORED] * len(right), "no label is left to learn from"),
        ]
        # the first that fits is told: without padding, some of them are the same
        return {tuple(labels): words for labels, words in reversed(known) if labels != right}

    def ask(prompt: list[int], answer: list[int], padding: int) -> list[int]:
        length = len(prompt) + len(answer) + 1 + padding
        given = list(prompt), list(answer)
        labels = candidate(*given, END, length)
        right = [IGNORED] * len(prompt) + answer + [END] + [IGNORED] * padding
        setting = f"prompt={prompt}, answer={answer}, eos={END}, length={length}: "
        if given != (prompt, answer):
            raise Wrong(
                setting + "your function changed a list that it was given",
                "Does += make a new list, or lengthen the old one?",
                "Join with +, or into a new list: " + rule,
            )
        if not isinstance(labels, list) or len(labels) != length:
            seen = f"{len(labels)} labels" if isinstance(labels, list) else f"a {type(labels).__name__}"
            raise Wrong(
                setting + f"you give {seen}, expected a list of {length}",
                "Does every token of the row have a label, also the end and each token of padding?",
                "Return " + rule,
            )
        if labels != right:
            note = slips(prompt, answer, END, padding).get(tuple(labels))
            place = next(i for i, (ours, theirs) in enumerate(zip(right, labels, strict=True)) if ours != theirs)
            raise Wrong(
                setting + (note or f"label {place} is {labels[place]!r}, expected {right[place]}"),
                "Which tokens should the model learn to write, after which it is done?",
                "Return " + rule,
            )
        return labels

    def drawn() -> tuple[list[int], list[int]]:
        ids = random.sample(range(3, 40), random.randint(7, 10))  # no token twice, so that each slip is told apart
        cut = random.randint(3, 4)
        return ids[:cut], ids[cut:]

    def plain() -> None:
        ask(*drawn(), 0)

    def padded() -> None:
        ask(*drawn(), random.randint(2, 4))

    def repeated() -> None:
        prompt, answer = drawn()
        ask([END, *prompt, END, prompt[0]], [prompt[0], *answer, prompt[1]], 2)

    def oracle() -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        prompt, answer = drawn()
        labels = ask(prompt, answer, 3)
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        model, ids = LlamaForCausalLM(config).eval(), [*prompt, *answer, END]
        row = collate([{"input_ids": ids, "labels": ids}], END)
        padded_ids = torch.tensor([ids + [END] * 3])
        with torch.no_grad():
            loss = model(input_ids=padded_ids, labels=torch.tensor([labels])).loss.item()
            logs = model(row["input_ids"]).logits[0].log_softmax(-1)
        wanted = range(len(prompt), len(ids))
        right = -sum(logs[place - 1, ids[place]].item() for place in wanted) / len(wanted)
        if not math.isclose(loss, right, rel_tol=1e-4):
            raise Wrong(
                f"with your labels the model's loss is {loss:.4f}; answer and end alone give {right:.4f}",
                "Which tokens does this mean go over?",
                "Return " + rule,
            )

    steps = [
        ("prompt, answer and end", plain),
        ("with padding", padded),
        ("tokens that stand in prompt and answer", repeated),
        ("the loss of a real model is that of answer and end", oracle),
    ]
    return run_steps("labels of a row", steps, hint)


def warmup_factor(candidate: Callable[[int, int], float], hint: int = 1) -> Report:
    """Exercise A2: ``candidate(step, warmup_steps)``, the factor before the learning rate, steps counted from 1."""
    rule = "min(1, step / warmup_steps), and 1 where warmup_steps is 0."
    known: list[tuple[Callable[[int, int], float], str]] = [
        (lambda k, w: min(1.0, (k - 1) / w), "step 1 has the rate zero, so it trains nothing, and all else is late"),
        (lambda k, w: min(1.0, k / (w + 1)), "full rate comes one step late"),
        (lambda k, w: min(1.0, (k + 1) / w), "full rate comes one step early; the first step is not step 0"),
        (lambda k, w: min(1.0, k // w), "whole division leaves nothing between 0 and 1"),
        (lambda k, w: 1.0, "nothing rises"),
        (lambda k, w: max(1.0, k / w), "max keeps the larger of the two"),
        (lambda k, w: min(1.0, w / k), "the fraction is upside down"),
        (lambda k, w: w / k, "the fraction is upside down"),
        (lambda k, w: max(0.0, 1 - k / w), "it falls where it should rise"),
        (lambda k, w: min(1.0, (k / w) ** 2), "it rises, but not evenly"),
    ]

    def ask(step: int, warmup_steps: int, right: float) -> None:
        got = candidate(step, warmup_steps)
        setting = f"warmup_steps={warmup_steps}: the factor in step {step} is "
        if isinstance(got, bool) or not isinstance(got, int | float):
            raise Wrong(setting + f"a {type(got).__name__}", "What is multiplied with the rate?", "Return " + rule)
        if math.isclose(got, right, rel_tol=1e-6, abs_tol=1e-9):
            return
        note = ""
        for steps in (range(1, 3 * warmup_steps), range(1, warmup_steps)):  # all of it, or only while it should rise
            for slip, words in known if len(steps) > 1 else ():
                if all(math.isclose(candidate(k, warmup_steps), slip(k, warmup_steps)) for k in steps):
                    note = note or words
        if step >= warmup_steps > 0 and not note:
            now, later = candidate(warmup_steps + 1, warmup_steps), candidate(4 * warmup_steps, warmup_steps)
            note = "it falls again" if later < now else "it goes on rising" if now > 1 else "1 is never reached"
        raise Wrong(
            setting + f"{got:.4g}, expected {right:.4g}" + (f": {note}" if note else ""),
            "Which factors have the first step, step warmup_steps, and the one after it?",
            "Return " + rule,
        )

    def rises() -> None:
        warmup = random.randint(6, 12)
        for step in (2, 1, *range(3, warmup)):  # the second step tells more slips apart than the first
            ask(step, warmup, step / warmup)

    def full() -> None:
        warmup = random.randint(5, 12)
        ask(warmup, warmup, 1.0)

    def stays() -> None:
        warmup = random.randint(5, 12)
        for step in range(warmup + 1, 4 * warmup):
            ask(step, warmup, 1.0)

    def none() -> None:
        for step in range(1, 5):
            ask(step, 0, 1.0)
            ask(step, 1, 1.0)

    def oracle() -> None:
        warmup, rate = random.randint(4, 9), random.choice([5e-4, 1e-3, 2e-2])
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        for step in range(1, 3 * warmup):
            ask(step, warmup, optimizer.param_groups[0]["lr"] / rate)
            optimizer.step()
            schedule.step()

    steps = [
        ("it rises evenly from the first step on", rises),
        ("step warmup_steps has the full rate", full),
        ("then it stays", stays),
        ("warm-up of 0 or 1 steps is none", none),
        ("the same rates as PyTorch's LinearLR", oracle),
    ]
    return run_steps("warm-up", steps, hint)
