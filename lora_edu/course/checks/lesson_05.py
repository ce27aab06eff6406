"""The checks of lesson 05: counting a layer, PEFT's numbers, matching budgets. See also ``lesson_05_models``."""

import random
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import RobertaConfig

from lora_edu.core.layer import LoRALinear
from lora_edu.counting import count_parameters, lora_parameters
from lora_edu.counting.meta import meta_model
from lora_edu.course.checks.report import Report, Wrong, run_steps


def lora_count(candidate: Callable[[int, int, int], int], hint: int = 1) -> Report:
    """Exercise A1: ``candidate(in_features, out_features, r)`` is the number of LoRA parameters of one layer."""

    def compare(inputs: int, outputs: int, r: int) -> None:
        got, right = candidate(inputs, outputs, r), r * (inputs + outputs)
        if got == right:
            return
        slips = {
            r * inputs * outputs: "you multiply the two sides of the layer: that is r full weights",
            inputs * outputs: "this is the size of the weight itself",
            inputs + outputs: "your count does not depend on r",
            2 * r * inputs: "you count B as if the layer were square",
            2 * r * outputs: "you count A as if the layer were square",
            r * inputs: "you count A, and B is missing",
            r * outputs: "you count B, and A is missing",
            r * (inputs + outputs) + outputs: "you count a bias: LoRA adds none",
            r * (inputs + outputs) + inputs * outputs: "you count the frozen weight, too",
        }
        note = slips.get(got, "this is not the number of entries of A and B")
        if inputs == outputs and got == r * inputs:
            note = "you count one of the two matrices, and the other is missing"
        raise Wrong(
            f"for a layer {inputs} → {outputs} with r={r} you count {got:,} instead of {right:,}: {note}",
            "Which shapes have A and B, and how many entries has each?",
            "A is (r, in_features) and B is (out_features, r): return r * (in_features + out_features).",
        )

    def square() -> None:
        width = random.randint(20, 90)
        compare(width, width, random.randint(3, 9))

    def oblong() -> None:
        # more than twice as wide as high, so that no two mistakes give the same number
        compare(random.randint(20, 39), random.randint(80, 99), random.randint(3, 9))
        compare(random.randint(80, 99), random.randint(20, 39), random.randint(3, 9))

    def library() -> None:
        inputs, outputs, r = random.randint(40, 99), random.randint(20, 39), random.randint(2, 9)
        trainable, _ = count_parameters(LoRALinear(nn.Linear(inputs, outputs), r=r))
        if candidate(inputs, outputs, r) != trainable:
            compare(inputs, outputs, r)

    steps = [
        ("a square layer is counted", square),
        ("layers that are not square are counted", oblong),
        ("equal to what a LoRALinear trains", library),
    ]
    return run_steps("count of one layer", steps, hint)


def peft_numbers(candidate: Callable[[int, int, int], tuple[int, int, float]], hint: int = 1) -> Report:
    """Exercise A2: ``candidate(lora, base, head)`` is PEFT's (trainable, all, percent); ``base`` has the head once."""
    rule = "trainable = lora + head, all = base + lora + head (the head's copy), percent = 100 * trainable / all."

    def compare(lora: int, base: int, head: int) -> None:
        trainable, total, percent = candidate(lora, base, head)
        where = f"with lora={lora:,}, base={base:,}, head={head:,}"
        if trainable != lora + head:
            note = "the head trains, too" if head and trainable == lora else f"{lora + head:,} train"
            raise Wrong(f"{where} you call {trainable:,} trainable: {note}", "What trains besides A and B?", rule)
        if total != base + lora + head:
            slips = {
                base: "this is the base without the adapter",
                base + lora: "the head that trains is a copy beside the original, and both are counted",
                base + lora + 2 * head: "the original head is inside the base already",
            }
            note = slips.get(total, f"expected {base + lora + head:,}")
            raise Wrong(f"{where} you count {total:,} in all: {note}", "Which tensors does the model hold now?", rule)
        right = 100 * trainable / total
        if abs(percent - right) > 1e-9 * right:
            note = f"expected {right:.6f}"
            if abs(percent * 100 - right) < 1e-9 * right:
                note = "this is a fraction, not a percentage"
            elif abs(percent - 100 * trainable / base) < 1e-9 * right:
                note = "you divide by the base alone"
            elif abs(percent - right) < 1e-2 * right:
                note = f"expected {right:.6f}, not rounded"
            raise Wrong(f"{where} your percentage is {percent:.6f}: {note}", "What is the whole here?", rule)

    def plain() -> None:
        compare(random.randint(1000, 3000), random.randint(20_000, 90_000), 0)

    def with_head() -> None:
        compare(random.randint(1000, 3000), random.randint(20_000, 90_000), random.randint(500, 2500))

    def oracle() -> None:
        import peft

        width, labels, r = 8 * random.randint(2, 5), random.randint(2, 6), random.randint(2, 5)
        config = RobertaConfig(vocab_size=50, hidden_size=width, num_hidden_layers=2, num_attention_heads=2)
        model = meta_model(config, head="classification", num_labels=labels)
        lora = lora_parameters(model, r, ["query", "value"])
        base, head = count_parameters(model)[1], count_parameters(model.get_submodule("classifier"))[1]
        with torch.device("meta"):
            adapted = peft.get_peft_model(
                model, peft.LoraConfig(r=r, target_modules=["query", "value"], task_type="SEQ_CLS")
            )
        if candidate(lora, base, head)[:2] != adapted.get_nb_trainable_parameters():
            compare(lora, base, head)

    steps = [
        ("a language model: base and LoRA", plain),
        ("a classifier: the head trains, and is counted twice", with_head),
        ("equal to PEFT on a RoBERTa-shaped classifier", oracle),
    ]
    return run_steps("PEFT's numbers", steps, hint)


def matched_ranks(candidate: Callable[[dict[str, int], int], Mapping[str, int]], hint: int = 1) -> Report:
    """Exercise C1: ``candidate(per_rank, budget)`` gives each target set the rank whose count is nearest the budget."""

    def compare(per_rank: dict[str, int], budget: int) -> None:
        got = candidate(dict(per_rank), budget)
        for name, each in per_rank.items():
            rank = got[name]
            if not isinstance(rank, int):
                raise Wrong(
                    f"{name}: rank {rank!r} is no whole number", "Can a matrix have half a row?", "Use int(...)."
                )
            if rank < 1:
                raise Wrong(
                    f"{name} costs {each:,} a rank, the budget is {budget:,}: rank {rank} adapts nothing",
                    "What is the smallest rank of an adapter?",
                    "Take max(1, ...).",
                )
            gap = abs(rank * each - budget)
            better = min((other for other in (rank - 1, rank + 1) if other >= 1), key=lambda o: abs(o * each - budget))
            if abs(better * each - budget) < gap:
                raise Wrong(
                    f"{name} costs {each:,} a rank: rank {rank} misses the budget {budget:,} by {gap:,}, "
                    f"rank {better} by {abs(better * each - budget):,}",
                    "Which whole rank comes nearest, from below or from above?",
                    "Round budget / per_rank to the nearest whole number, for each target set on its own.",
                )

    def exact() -> None:
        base = random.randint(50, 90)
        compare({"narrow": base, "wide": 3 * base}, 12 * base)

    def nearest() -> None:
        each = random.randint(100, 200)
        compare({"above": each}, 5 * each + each // 4)
        compare({"below": each}, 5 * each - each // 4)
        compare({"a": each, "b": 2 * each + 7, "c": 5 * each + 3}, 31 * each + 11)

    def floor() -> None:
        compare({"small": 10, "large": 5000}, 1000)

    def llama() -> None:
        sets = {"q, v": ["q_proj", "v_proj"], "MLP": ["gate_proj", "up_proj", "down_proj"], "all": "all-linear"}
        compare({name: lora_parameters("llama-7b", 1, chosen) for name, chosen in sets.items()}, 20_000_000)

    steps = [
        ("a budget that fits exactly", exact),
        ("otherwise the nearest rank, from either side", nearest),
        ("no rank below 1", floor),
        ("LLaMA-7B with 20 million parameters", llama),
    ]
    return run_steps("matched ranks", steps, hint)
