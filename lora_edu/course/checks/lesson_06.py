"""The checks of lesson 06: bytes of a recipe, operations of a step, honest ratios. See also ``lesson_06_measure``."""

import random
from collections.abc import Callable, Sequence
from statistics import mean, median, quantiles

from transformers import LlamaConfig

from lora_edu.counting.flops import step_flops
from lora_edu.counting.memory import find_recipe, training_memory
from lora_edu.counting.meta import meta_model
from lora_edu.course.checks.report import Report, Wrong, run_steps


def state_bytes(candidate: Callable[..., float], hint: int = 1) -> Report:
    """Exercise A1: ``candidate(frozen, trained, frozen_bytes, weight, gradient, moment, master=0)`` in bytes."""
    rule = "frozen * frozen_bytes + trained * (weight + gradient + 2 * moment + master)"

    def compare(frozen: int, trained: int, frozen_bytes: float, w: int, g: int, m: int, master: int) -> None:
        got = candidate(frozen, trained, frozen_bytes, w, g, m, master)
        base, each = frozen * frozen_bytes, w + g + 2 * m + master
        if abs(got - (base + trained * each)) < 1e-6 * (base + trained * each):
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
        note = next((words for value, words in slips.items() if abs(got - value) < 1e-6 * max(value, 1)), None)
        raise Wrong(
            f"with frozen={frozen:,}, trained={trained:,}, frozen_bytes={frozen_bytes}, weight={w}, gradient={g}, "
            f"moment={m}, master={master} you get {got:,.0f} instead of {base + trained * each:,.0f} bytes: "
            + (note or "this is not the sum of the parts"),
            "Which tensors exist for a number that trains, and which for one that does not?",
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


def step_operations(candidate: Callable[..., int], hint: int = 1) -> Report:
    """Exercise A2: ``candidate(frozen, trained, tokens, checkpointing=False)`` operations of a training step."""
    rule = "tokens * (frozen * (4 + again) + trained * (6 + again)), again = 2 with checkpointing and 0 without."

    def compare(frozen: int, trained: int, tokens: int, checkpointing: bool) -> None:
        got = candidate(frozen, trained, tokens, checkpointing)
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
        note = slips.get(got, "this is not the sum of forward, input gradients and weight gradients")
        raise Wrong(
            f"with frozen={frozen:,}, trained={trained:,}, tokens={tokens}, checkpointing={checkpointing} "
            f"you count {got:,} instead of {right:,}: {note}",
            "Which products does a weight take part in: forward, gradient of its input, its own gradient?",
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


def paired_ratio(
    candidate: Callable[[Sequence[float], Sequence[float]], tuple[float, float, float]], hint: int = 1
) -> Report:
    """Exercise C1: ``candidate(a, b)`` is the median and the quartiles of the ratios a[i] / b[i]."""

    def compare(a: list[float], b: list[float]) -> None:
        got = candidate(a, b)
        if not isinstance(got, tuple | list) or len(got) != 3:
            raise Wrong(
                f"you return {got!r}: expected three numbers",
                "What are the median and the two quartiles?",
                "Return (median, low, high).",
            )
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        if not close(got[0], middle):
            slips = {
                median(a) / median(b): "this is the ratio of the two medians: the rounds are no longer paired",
                mean(a) / mean(b): "this is the ratio of the two means: one disturbed round moves it",
                mean(ratios): "this is the mean of the ratios: one disturbed round moves it",
                1 / middle: "this is b over a",
                min(a) / min(b): "this is the ratio of the two fastest times: they come from different rounds",
            }
            note = next(
                (words for value, words in slips.items() if close(got[0], value)), "not the median of a[i]/b[i]"
            )
            raise Wrong(
                f"your first number is {got[0]:.4f} instead of {middle:.4f}: {note}",
                "Which two times met the same disturbance?",
                "Form the ratio of each round, then take the median of the ratios.",
            )
        if not (close(got[1], low) and close(got[2], high)):
            note = "these are the smallest and the largest ratio" if close(got[1], min(ratios)) else "not the quartiles"
            if close(got[1], high):
                note = "the lower quartile comes first"
            raise Wrong(
                f"your last two numbers are {got[1]:.4f} and {got[2]:.4f} instead of {low:.4f} and {high:.4f}: {note}",
                "Between which values does the middle half of the ratios lie?",
                'Use statistics.quantiles(ratios, n=4, method="inclusive"): its first and last value.',
            )

    def noise(rounds: int) -> list[float]:
        return [random.uniform(1.0, 3.0) for _ in range(rounds)]

    def slow_rounds() -> None:
        disturbed, ratios = noise(9), [random.uniform(0.6, 0.9) for _ in range(9)]
        compare([d * x for d, x in zip(disturbed, ratios, strict=True)], disturbed)

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


def close(a: float, b: float) -> bool:
    """Equal to rounding."""
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b), 1e-9)
