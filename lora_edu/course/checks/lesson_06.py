"""The checks of lesson 06: bytes of a recipe (A1), operations (A2), what is kept (B1), a batch (B2), ratios (C1)."""

import math
import random
from collections.abc import Callable, Sequence
from statistics import mean, median, quantiles

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from lora_edu.counting.flops import step_flops
from lora_edu.counting.measure import saved_bytes
from lora_edu.counting.memory import find_recipe, training_memory
from lora_edu.counting.meta import meta_model
from lora_edu.course.checks.candidates import without
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import close_number, known_slip, need_number, need_several, need_whole


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


@without(
    "lora_edu.counting",
    symptom="you call {name}, which counts for you",
    question="Which products does a weight take part in: forward, gradient of its input, its own gradient?",
    fix="Return tokens * (frozen * (4 + again) + trained * (6 + again)), again = 2 with checkpointing and 0 without.",
)
def step_operations(candidate: Callable[..., int], hint: int = 1) -> Report:
    """Exercise A2: ``candidate(frozen, trained, tokens, checkpointing=False)`` operations of a training step."""
    rule = "tokens * (frozen * (4 + again) + trained * (6 + again)), again = 2 with checkpointing and 0 without."

    def compare(frozen: int, trained: int, tokens: int, checkpointing: bool) -> None:
        question = "Which products does a weight take part in: forward, gradient of its input, its own gradient?"
        got = need_number(candidate(frozen, trained, tokens, checkpointing), question, f"Return {rule}")
        right = tokens * (4 * frozen + 6 * trained + (2 * (frozen + trained) if checkpointing else 0))
        if got == right:
            return
        plain = tokens * (4 * frozen + 6 * trained)
        slips = {
            tokens * (2 * frozen + 6 * trained): "the gradient crosses frozen weights, too, and that is a product",
            tokens * 6 * (frozen + trained): "a frozen weight has no gradient of its own",
            tokens * 6 * trained: "frozen weights work in the forward pass, and their inputs get gradients",
            right // tokens: "your count does not grow with the tokens",
            right // 2: "a multiplication and an addition are two operations",
            tokens * (2 * frozen + 4 * trained): "you leave out the forward pass, or the gradient of the input",
        }
        if checkpointing:
            slips |= {
                plain: "checkpointing runs the forward pass a second time",
                plain + 2 * tokens * trained: "checkpointing runs the frozen weights a second time, too",
                plain + 2 * tokens * frozen: "checkpointing runs the trained weights a second time, too",
                2 * plain: "checkpointing repeats the forward pass, not the whole step",
            }
        unknown = "this is not the sum of forward, input gradients and weight gradients"
        note = known_slip(got, slips.items(), otherwise=unknown)
        raise Wrong(
            f"with frozen={frozen:,}, trained={trained:,}, tokens={tokens}, checkpointing={checkpointing} "
            f"you count {got:,} instead of {right:,}: {note}",
            question,
            f"Return {rule}",
        )

    def full() -> None:
        compare(0, random.randint(1000, 9000), random.randint(11, 60), False)

    def lora() -> None:
        compare(random.randint(50_000, 90_000), random.randint(1000, 9000), random.randint(11, 60), False)

    def checkpointed() -> None:
        compare(random.randint(50_000, 90_000), random.randint(1000, 9000), random.randint(11, 60), True)

    def oracle() -> None:
        # two tokens: attention's own products are then small beside the weights'
        config = LlamaConfig(
            hidden_size=256, intermediate_size=512, num_attention_heads=4, num_hidden_layers=3, vocab_size=300
        )
        config._attn_implementation = "eager"
        model = meta_model(config)
        products = sum(p.numel() for p in model.parameters() if p.dim() == 2) - 300 * 256
        counted, got = step_flops(model, tokens=2), candidate(0, products, 2)
        if abs(got / counted - 1) > 0.03:
            raise Wrong(
                f"PyTorch counts {counted:,} operations for a small Llama, you {got:,}",
                "Does your function work without checkpointing=…?",
                f"Return {rule}",
            )

    steps = [
        ("full fine-tuning", full),
        ("frozen weights", lora),
        ("checkpointing", checkpointed),
        ("within 3 % of PyTorch's own count", oracle),
    ]
    return run_steps("operations of a step", steps, hint)


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


def largest_batch(candidate: Callable[..., int], hint: int = 1) -> Report:
    """Exercise B2: ``candidate(peak, gib, reserve=1.0, limit=65536)`` is the largest batch that fits, 0 if none."""
    fix = (
        "Bisect between a batch that fits (0) and one that does not (limit + 1); compare with (gib - reserve) * 2**30."
    )

    def compare(peak: Callable[[int], float], right: int, words: str, gib: float, **options: float) -> None:
        calls = 0

        def counted(batch: int) -> float:
            nonlocal calls
            calls += 1
            if calls > 40:
                raise Wrong(
                    f"{words}: you called peak more than 40 times",
                    "How does one find a name in a telephone book?",
                    fix,
                )
            if batch < 1:
                raise Wrong(f"{words}: you asked for the peak of batch {batch}", "What is the smallest batch?", fix)
            return peak(batch)

        got = need_whole(candidate(counted, gib, **options), "Can a batch have half a row?", fix)
        if got == right:
            return
        room = (gib - options.get("reserve", 1.0)) * 2**30
        note = f"{right} would fit, too"
        if got > right:
            note = f"at {got} the peak is {peak(got) / 2**30:.3f} GiB, and {room / 2**30:.3f} GiB are free"
            if peak(got) <= gib * 2**30:
                note += ": the reserve is for the CUDA context"
            if got > options.get("limit", 65_536):
                note = f"{got} is above the limit"
        elif got and peak(got + 1) > (gib - options.get("reserve", 1.0)) * 1e9:
            note += ": a GiB has 2**30 bytes"
        raise Wrong(f"{words}: you return {got} instead of {right}; {note}", "Which batch is the last that fits?", fix)

    def steady() -> None:
        each, start = random.uniform(0.05, 0.09), random.uniform(2, 5)
        gib, reserve = random.randint(20, 40), random.choice([1.5, 2.5])
        right = int((gib - reserve - start) / each)
        compare(lambda b: (start + each * b) * 2**30, right, "a peak that grows evenly", gib, reserve=reserve)

    def flat() -> None:
        start, each, gib = random.uniform(10, 12), random.uniform(0.2, 0.3), 24
        right = int((gib - 1.0) / each)
        compare(lambda b: max(start, each * b) * 2**30, right, "a peak that is flat at first", gib)

    def none() -> None:
        compare(lambda b: (30 + b) * 2**30, 0, "a model that does not fit at all", 24)

    def all_fit() -> None:
        limit = random.randint(20, 90)
        compare(lambda b: (5 + b / 1000) * 2**30, limit, "a model of which every batch fits", 24, limit=limit)

    def exact() -> None:
        compare(lambda b: b * 2**30, 15, "a peak that fills the card to the last byte", 16)

    def llama() -> None:
        def peak(batch: int) -> float:
            return training_memory(small, target_modules="all-linear", batch=batch, tokens=512).peak

        small = "smollm2-135m"
        at = [peak(batch) for batch in (1, 2)]
        right = int(((8 - 1.0) * 2**30 - at[0]) / (at[1] - at[0])) + 1
        compare(peak, right, "SmolLM2 on an 8 GiB card", 8)

    steps = [
        ("a peak that grows evenly", steady),
        ("a peak that is flat at first", flat),
        ("nothing fits", none),
        ("everything fits", all_fit),
        ("exactly full", exact),
        ("SmolLM2 with LoRA on an 8 GiB card", llama),
    ]
    return run_steps("largest batch", steps, hint)


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
