"""The checks of lesson 06: bytes of a recipe (A1), a message (A2), what is kept (B1), a job (B2), ratios (C1)."""

import json
import math
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import mean, median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.counting.measure import saved_bytes
from lora_edu.counting.memory import MemoryEstimate, find_recipe, training_memory
from lora_edu.counting.meta import meta_model
from lora_edu.course.checks.candidates import without
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import close_number, known_slip, need_number, need_several, need_whole, with_note
from lora_edu.files import data_path


@without(
    "lora_edu.counting",
    symptom="you call {name}, which adds up for you",
    question="Which tensors exist for a number that trains, and which for one that does not?",
    fix="Return frozen * frozen_bytes + trained * (weight + gradient + 2 * moment + master).",
)
def state_bytes(candidate: Callable[..., float], hint: int = 1) -> Report:
    """Exercise A1: ``candidate(frozen, trained, frozen_bytes, weight, gradient, moment, master=0)`` in bytes."""
    rule = "frozen * frozen_bytes + trained * (weight + gradient + 2 * moment + master)"

    def compare(frozen: int, trained: int, frozen_bytes: float, w: int, g: int, m: int, master: int) -> None:
        question = "Which tensors exist for a number that trains, and which for one that does not?"
        got = need_number(candidate(frozen, trained, frozen_bytes, w, g, m, master), question, f"Return {rule}.")
        base, each = frozen * frozen_bytes, w + g + 2 * m + master
        if close_number(got, base + trained * each):
            return
        slips = {
            base + trained * (w + g + m + master): "Adam keeps two moments, and you count one",
            base + trained * (g + 2 * m + master): "the trained numbers themselves are missing",
            base + trained * (w + 2 * m + master): "the gradients are missing",
            base + trained * (w + g + master): "the moments are missing",
            base + trained * (w + g + 2 * m): "the master copy is missing",
            trained * each: "the frozen numbers are missing: they stay in memory, too",
            (frozen + trained) * each: "you give frozen numbers a gradient and moments",
            frozen + trained * each: "frozen numbers count one byte each",
            frozen * w + trained * each: "frozen numbers take frozen_bytes, not the bytes of a trained weight",
        }
        note = known_slip(got, slips.items(), otherwise="this is not the sum of the parts")
        raise Wrong(
            f"with frozen={frozen:,}, trained={trained:,}, frozen_bytes={frozen_bytes}, weight={w}, gradient={g}, "
            f"moment={m}, master={master} you get {got:,.0f} instead of {base + trained * each:,.0f} bytes: {note}",
            question,
            f"Return {rule}.",
        )

    def full() -> None:
        compare(0, random.randint(1000, 9000), 2, 3, 2, 5, 0)  # unlike numbers, so that no two mistakes agree

    def lora() -> None:
        compare(random.randint(50_000, 90_000), random.randint(1000, 9000), 0.5625, 4, 3, 7, 0)

    def master() -> None:
        compare(random.randint(50_000, 90_000), random.randint(1000, 9000), 2.5, 2, 3, 7, 4)

    def library() -> None:
        r, recipe = random.randint(2, 40), find_recipe("lora", "fp32-adapter")
        right = training_memory("llama-7b", r=r, target_modules="all-linear", activations=False)
        got = candidate(6_738_415_616, right.trainable, 2, recipe.weight, recipe.gradient, recipe.moments // 2)
        if abs(got - right.states) > 1:
            raise Wrong(
                f"LLaMA-7B, r={r}: you get {got / 1e9:.3f} GB, the library {right.states / 1e9:.3f} GB",
                "Does your function work without master=…?",
                f"Return {rule}.",
            )

    steps = [
        ("full fine-tuning: nothing is frozen", full),
        ("LoRA on a frozen base", lora),
        ("a master copy", master),
        ("equal to the library on LLaMA-7B", library),
    ]
    return run_steps("bytes of a recipe", steps, hint)


HELP: dict[str, tuple[str, dict[str, Any]]] = {  # what A2 offers, and how training_memory's arguments change with it
    "a": ("expandable segments give back what is cached and no more", {}),
    "b": ("the rank hardly enters", {"r": 4}),
    "c": ("", {"batch": 16}),
    "d": ("", {"checkpointing": True}),
    "e": ("a vocabulary of 32,000 makes the loss a small part", {"loss_rows": 512}),
    "f": ("", {"precision": "bf16"}),
}


def out_of_memory(candidate: Callable[[], Mapping[str, Any]], hint: int = 1) -> Report:
    """Exercise A2: ``candidate()`` is what a message says, in GiB, the phase of the step, and the letters that help."""
    job = json.loads(data_path("runs", "memory_cases.json").read_text(encoding="utf-8"))["out_of_memory"]
    message = job["message"]

    def size(before: str) -> float:
        """The size in GiB after these words of the message."""
        found = re.search(rf"{before}([\d.]+) ([GM])iB", message)
        assert found is not None
        return float(found[1]) / (1 if found[2] == "G" else 1024)

    asked, live = size("Tried to allocate "), size("Of the allocated memory ")
    cached, in_use, total = size("PyTorch, and "), size("this process has "), size("total capacity of ")
    outside = in_use - live - cached

    def number(name: str, right: float, slips: dict[float, str], question: str, fix: str) -> None:
        got = need_number(answer_of(candidate, name), question, fix)
        if abs(got - right) <= 0.0051:
            return
        note = next((words for value, words in slips.items() if abs(got - value) <= 0.0051), "")
        raise Wrong(with_note(f"{name!r} is {got:,.2f} GiB instead of {right:.2f}", note), question, fix)

    def sizes() -> None:
        question = "Which number of the message belongs to which of these words?"
        mib = {1024 * asked: "the message says MiB, and you are asked for GiB", 1000 * asked: "a GiB is 1024 MiB"}
        number("asked", asked, {**mib, asked * 1.024: "a GiB is 1024 MiB"}, question, "Return 256 / 1024.")
        swapped = {
            in_use: "this is all that the process holds",
            live + cached: "this includes what is reserved and unused",
            total: "this is the card",
            cached: "this is reserved and unused",
        }
        number("live", live, swapped, question, f"Tensors hold what is allocated by PyTorch, {live} GiB.")
        swapped = {live: "this is what tensors hold", outside: "this is outside PyTorch", outside + cached: "too much"}
        number("cached", cached, swapped, question, f"It is called reserved by PyTorch but unallocated: {cached} GiB.")

    def context() -> None:
        question = "What does the process hold in all, and which two parts of that has PyTorch's allocator?"
        slips = {
            in_use - live: "what PyTorch has reserved is still in it",
            total - live - cached: "the card has more than this process uses",
            total - in_use: "this is what is free",
        }
        number("outside", outside, slips, question, f"Return {in_use} - {live} - {cached}.")

    def phase() -> None:
        got, question = answer_of(candidate, "phase"), "Which function stands in the last line of the calls?"
        if got != "forward":
            raise Wrong(
                f"'phase' is {got!r}: in the backward pass the last calls would be autograd's, in the third the "
                "optimizer's",
                question,
                'It stopped in LoRALinear.update, which forward calls: "forward".',
            )

    def helps() -> None:
        question = "How many GiB does lora_edu.counting give for this job after each change, and how many has the card?"
        fix = "Compare training_memory('llama-7b', …, batch=32, tokens=512).peak after each change with the card."
        given = answer_of(candidate, "helps")
        words = given if isinstance(given, str) else " ".join(map(str, given)) if isinstance(given, Collection) else ""
        got = set(re.findall(r"\b[a-z]\b", words) or re.findall(r"[a-z]", words))
        for letter, (note, change) in HELP.items():
            asks = {"r": 16, "batch": job["batch"], "precision": "fp32-adapter"} | change
            need = estimated("llama-7b", "lora", tokens=job["tokens"], **asks).peak / 2**30 + outside
            fits = f"with ({letter}) the step needs {need:.0f} GiB of {total:.0f}"
            if letter in got and need > total:
                raise Wrong(f"{fits}, so it still does not fit: {note}", question, fix)
            if letter not in got and need <= total:
                raise Wrong(f"{fits}, so it fits, and you leave it out", question, fix)
        if got - set(HELP):
            raise Wrong(f"{sorted(got - set(HELP))} are none of the letters (a) to (f)", question, fix)

    steps = [
        ("what was asked for, is live, is cached", sizes),
        ("what PyTorch's allocator does not hold", context),
        ("where the step stopped", phase),
        ("which changes help", helps),
    ]
    return run_steps("an out-of-memory message", steps, hint)


def answer_of(candidate: Callable[[], Mapping[str, Any]], name: str) -> Any:
    """The entry of the candidate's dictionary; ``Wrong`` if it is no dictionary or has none."""
    answers = candidate()
    if not isinstance(answers, Mapping) or name not in answers:
        raise Wrong(
            f"expected a dictionary with {name!r}, and got {answers!r}",
            "Which entries does the exercise ask for?",
            'Return {"asked": …, "live": …, "cached": …, "outside": …, "phase": …, "helps": …}.',
        )
    return answers[name]


@lru_cache
def built(name: str) -> nn.Module:
    """The model without weights, built once."""
    return meta_model(name)


@lru_cache
def estimated(name: str, method: str, precision: str, **options: Any) -> MemoryEstimate:
    """``training_memory`` with LoRA on all linear layers, each question answered once."""
    lora: dict[str, Any] = {"r": 16, "target_modules": "all-linear"} | options
    return training_memory(built(name), method, precision, **lora)


@without(
    "lora_edu.counting",
    symptom="you call {name}, which asks autograd for you",
    question="Which tensors reach pack, what memory lies behind each, and which of it is the model's own?",
    fix="Use torch.autograd.graph.saved_tensors_hooks(pack, unpack) around forward().",
)
def kept_bytes(candidate: Callable[[nn.Module, Callable[[], Tensor]], int], hint: int = 1) -> Report:
    """Exercise B1: ``candidate(model, forward)`` is the bytes that autograd keeps, without the parameters."""

    def compare(model: nn.Module, forward: Callable[[], Tensor], slips: dict[int, str]) -> None:
        question = "Which tensors reach pack, what memory lies behind each, and which of it is the model's own?"
        fix = "Collect tensor.untyped_storage() by data_ptr(), leave out the parameters' storages, and sum nbytes()."
        right = saved_bytes(model, forward)
        if (got := need_whole(candidate(model, forward), question, fix)) == right:
            return
        slips |= {right // 4: "you count numbers, not bytes", 4: "this is the result of forward, not what it kept"}
        note = slips.get(got, "each piece of kept memory counts once, parameters not at all")
        raise Wrong(f"you find {got:,} bytes, autograd keeps {right:,}: {note}", question, fix)

    def packed(forward: Callable[[], Tensor]) -> list[Tensor]:
        seen: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            seen.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward()
        return seen

    def wrong_sums(model: nn.Module, forward: Callable[[], Tensor]) -> dict[int, str]:
        """What usual mistakes would give here."""
        seen = packed(forward)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen}
        outside = [t for t in seen if t.untyped_storage().data_ptr() not in own]
        everything = "you add every tensor, also parameters and repetitions"
        return {
            sum(t.numel() * t.element_size() for t in seen): everything,
            sum(t.untyped_storage().nbytes() for t in seen): everything,
            sum(
                t.untyped_storage().nbytes() for t in outside
            ): "several operations keep the same memory, count it once",
            sum(storages.values()): "the model's own parameters are in your sum",
            sum(t.numel() for t in seen): "you count numbers, not bytes",
        }

    def activations() -> None:
        width, rows = 8 * random.randint(3, 6), random.randint(5, 9)
        model, x = nn.Sequential(nn.Linear(width, width), nn.Sigmoid(), nn.Linear(width, 3)), torch.randn(rows, width)
        compare(model, lambda: model(x).sum(), wrong_sums(model, lambda: model(x).sum()))

    def shared() -> None:
        width = 8 * random.randint(3, 6)
        model, x = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(3)]), torch.randn(7, width)

        def forward() -> Tensor:
            return sum((layer(x) for layer in model), torch.zeros(()).expand(7, width)).pow(2).sum()

        compare(model, forward, wrong_sums(model, forward))

    def views() -> None:
        model, x = nn.Linear(6, 6), torch.randn(40, 6)

        def forward() -> Tensor:
            half = model(x)[::2]  # a view: the memory behind it stays whole
            return (half * half).sum()

        slips = wrong_sums(model, forward)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        outside = {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in packed(forward)}
        viewed = sum(size for pointer, size in outside.items() if pointer not in own)
        compare(model, forward, {**slips, viewed: "a view keeps the whole memory behind it"})

    def frozen() -> None:
        width = 8 * random.randint(3, 6)
        model, x = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)), torch.randn(9, width)
        for parameter in model[2].parameters():  # its weight is kept, for the gradient that passes; it is no extra
            parameter.requires_grad_(False)
        compare(model, lambda: model(x).sum(), wrong_sums(model, lambda: model(x).sum()))

    steps = [
        ("activations of a small network", activations),
        ("an input that three layers share counts once", shared),
        ("a view keeps the memory behind it", views),
        ("a frozen layer above a trained one keeps nothing of its own", frozen),
    ]
    return run_steps("what autograd keeps", steps, hint)


RESERVE = 2.0  # GiB that B2 leaves free


@dataclass(frozen=True)
class Job:
    """What is to be trained, on a card of how many GiB, with how many rows of how many tokens in an optimizer step."""

    model: str
    method: str
    gib: float
    tokens: int
    rows: int

    def needs(self, micro_batch: int, checkpointing: bool, loss_rows: int | None) -> float:
        """Bytes at the peak of an optimizer step."""
        precision = "bf16" if self.method == "full" else "fp32-adapter"
        options = {"batch": micro_batch, "tokens": self.tokens, "checkpointing": checkpointing}
        e = estimated(self.model, self.method, precision, loss_rows=loss_rows, **options)
        return e.peak if micro_batch == self.rows else e.states + (e.activations or 0)

    def best(self) -> tuple[bool, int] | None:
        """Whether to checkpoint, and the largest micro-batch that then fits; None if nothing does."""
        pieces = None if self.method == "full" else 512
        for checkpointing in (False, True):
            for micro_batch in (n for n in range(self.rows, 0, -1) if self.rows % n == 0):
                if self.needs(micro_batch, checkpointing, pieces) <= (self.gib - RESERVE) * 2**30:
                    return checkpointing, micro_batch
        return None

    def __str__(self) -> str:
        return f"{self.method}, {self.model}, {self.rows}×{self.tokens} tokens, a card of {self.gib:.2f} GiB"


def size_job(candidate: Callable[..., Mapping[str, Any] | None], hint: int = 1) -> Report:
    """Exercise B2: ``candidate(model, method, gib, tokens, rows)`` is a plan that fits and is the fastest, or None."""
    fix = (
        "Try checkpointing False, then True, and in each micro-batches from rows down; take the first whose peak, "
        "e.peak for one micro-batch and e.states + e.activations for several, is at most (gib - 2) * 2**30."
    )

    def compare(job: Job) -> None:
        right = job.best()
        got = candidate(built(job.model), job.method, job.gib, job.tokens, job.rows)
        if right is None or got is None:
            if got is not None:
                raise Wrong(f"{job}: you return {got!r}, and nothing fits", "What do the frozen weights need?", fix)
            if right is not None:
                words = f"{job}: you find nothing, and micro-batches of {right[1]} fit with checkpointing={right[0]}"
                question = "Did you try checkpointing, and with LoRA a loss in pieces of 512 tokens?"
                raise Wrong(words, question, fix)
            return
        micro_batch, accumulation, checkpointing, loss_rows = entries(got)
        if min(micro_batch, accumulation) < 1 or micro_batch * accumulation != job.rows:
            words = f"{job}: {accumulation} micro-batches of {micro_batch} rows are not {job.rows} rows"
            raise Wrong(words, "How many micro-batches make one optimizer step?", fix)
        if loss_rows is not None and (job.method == "full" or loss_rows < 1):
            words = f"{job}: loss_rows={loss_rows}, but a loss in pieces needs a frozen head and at least one token"
            raise Wrong(words, "Does the head train in full fine-tuning?", fix)
        need, room = job.needs(micro_batch, checkpointing, loss_rows) / 2**30, job.gib - RESERVE
        if need > room:
            raise Wrong(
                with_note(
                    f"{job}: your plan {got!r} needs {need:.2f} GiB of {room:.2f}",
                    excess(job, need, micro_batch, checkpointing, loss_rows),
                ),
                "What is in memory when the last micro-batch's loss goes backward?",
                fix,
            )
        if checkpointing and not right[0]:
            words = f"{job}: you checkpoint, and without it micro-batches of {right[1]} fit"
            raise Wrong(words, "What does checkpointing cost in operations?", fix)
        if micro_batch < right[1]:
            smaller = job.needs(right[1], right[0], loss_rows) / 2**30
            note = "a GiB has 2**30 bytes" if smaller <= room else "with a loss in pieces"
            words = f"{job}: micro-batches of {right[1]} fit, yours are of {micro_batch}; {note}"
            raise Wrong(words, "Which is the largest divisor of rows that fits?", fix)

    def entries(plan: Any) -> tuple[int, int, bool, int | None]:
        names = ("micro_batch", "accumulation", "checkpointing", "loss_rows")
        if not isinstance(plan, Mapping) or set(names) - set(plan):
            words = f"expected a dictionary with {', '.join(names)} or None, and got {plan!r}"
            raise Wrong(words, "Which four decisions does a plan hold?", fix)
        whole = "Can a batch have half a row?"
        micro_batch, accumulation = (need_whole(plan[name], whole, fix) for name in names[:2])
        loss_rows = plan["loss_rows"]
        return micro_batch, accumulation, bool(plan["checkpointing"]), loss_rows and need_whole(loss_rows, whole, fix)

    def excess(job: Job, need: float, micro_batch: int, checkpointing: bool, loss_rows: int | None) -> str:
        """What is known about a plan that needs too much."""
        alone = replace(job, rows=micro_batch)
        if alone.needs(micro_batch, checkpointing, loss_rows) / 2**30 <= job.gib - RESERVE:
            return "from the second micro-batch on gradients and activations are there together"
        return f"{RESERVE:.0f} GiB stay free for the CUDA context and PyTorch's reserve" if need <= job.gib else ""

    def at_once() -> None:
        tokens, rows = random.choice([256, 512]), 8
        need = Job("smollm2-135m", "lora", 0, tokens, rows).needs(rows, False, 512) / 2**30
        compare(Job("smollm2-135m", "lora", need + RESERVE + random.uniform(0.03, 0.1), tokens, rows))

    def accumulated() -> None:
        need = Job("llama-7b", "lora", 0, 512, 8).needs(4, False, 512) / 2**30
        compare(Job("llama-7b", "lora", need + RESERVE - random.uniform(0.3, 1.5), 512, random.choice([8, 16])))

    def checkpointed() -> None:
        compare(Job("llama-3-8b", "lora", 24, random.choice([2048, 4096]), random.choice([8, 16])))

    def too_large() -> None:
        compare(Job("llama-13b", "lora", 24, 512, 4))

    def everything() -> None:
        tokens, several = 256, Job("smollm2-135m", "full", 0, 256, 8)
        together, alone = several.needs(4, False, None), Job("smollm2-135m", "full", 0, tokens, 4).needs(4, False, None)
        share = random.uniform(0.3, 0.7)
        compare(Job("smollm2-135m", "full", RESERVE + (share * together + (1 - share) * alone) / 2**30, tokens, 8))

    steps = [
        ("a card on which the whole batch just fits", at_once),
        ("accumulation before checkpointing", accumulated),
        ("Llama-3-8B on 24 GiB", checkpointed),
        ("a base that does not fit at all", too_large),
        ("full fine-tuning, whose gradients stay", everything),
    ]
    return run_steps("a job for a card", steps, hint)


def paired_ratio(
    candidate: Callable[[Sequence[float], Sequence[float]], tuple[float, float, float]], hint: int = 1
) -> Report:
    """Exercise C1: ``candidate(a, b)`` is the median and the quartiles of the ratios a[i] / b[i]."""

    def wrong_middles(a: list[float], b: list[float]) -> dict[float, str]:
        """What usual mistakes would give in place of the median."""
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        return {
            median(a) / median(b): "this is the ratio of the two medians: the rounds are no longer paired",
            mean(a) / mean(b): "this is the ratio of the two means: one disturbed round moves it",
            mean(ratios): "this is the mean of the ratios: one disturbed round moves it",
            1 / median(ratios): "this is b over a",
            min(a) / min(b): "this is the ratio of the two fastest times: they come from different rounds",
        }

    def compare(a: list[float], b: list[float]) -> None:
        got = need_several(
            candidate(list(a), list(b)),
            3,
            "three numbers",
            "What are the median and the two quartiles?",
            "Return (median, low, high).",
        )
        for number in got:
            need_number(number, "What are the median and the two quartiles?", "Return (median, low, high).")
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        if not close_number(got[0], middle):
            slips = wrong_middles(a, b)
            note = known_slip(got[0], slips.items(), otherwise="not the median of a[i]/b[i]")
            raise Wrong(
                f"your first number is {got[0]:.4f} instead of {middle:.4f}: {note}",
                "Which two times met the same disturbance?",
                "Form the ratio of each round, then take the median of the ratios.",
            )
        if not (close_number(got[1], low) and close_number(got[2], high)):
            slips = {
                high: "the lower quartile comes first",
                min(ratios): "these are the smallest and the largest ratio",
            }
            note = known_slip(got[1], slips.items(), otherwise="not the quartiles")
            raise Wrong(
                f"your last two numbers are {got[1]:.4f} and {got[2]:.4f} instead of {low:.4f} and {high:.4f}: {note}",
                "Between which values does the middle half of the ratios lie?",
                'Use statistics.quantiles(ratios, n=4, method="inclusive"): its first and last value.',
            )

    def noise(rounds: int) -> list[float]:
        return [random.uniform(1.0, 3.0) for _ in range(rounds)]

    def slow_rounds() -> None:
        a, b, middle = [1.0], [1.0], 1.0
        while any(math.isclose(wrong, middle, rel_tol=1e-3) for wrong in wrong_middles(a, b)):  # no mistake is right
            b, ratios = noise(9), [random.uniform(0.6, 0.9) for _ in range(9)]
            a, middle = [x * ratio for x, ratio in zip(b, ratios, strict=True)], median(ratios)
        compare(a, b)

    def outlier() -> None:
        b = noise(7)
        a = [0.7 * x * random.uniform(0.98, 1.02) for x in b]
        a[3] *= 10
        compare(a, b)

    def spread() -> None:
        a, b = noise(8), noise(8)
        compare(a, b)

    steps = [
        ("rounds of different speed", slow_rounds),
        ("one disturbed time", outlier),
        ("an even number of rounds", spread),
    ]
    return run_steps("paired ratio", steps, hint)
