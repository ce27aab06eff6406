"""The checks of lesson 06's building exercises: what autograd keeps, and the largest batch that fits."""

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_edu.counting.measure import saved_bytes
from lora_edu.counting.memory import training_memory
from lora_edu.course.checks.report import Report, Wrong, run_steps


def kept_bytes(candidate: Callable[[nn.Module, Callable[[], Tensor]], int], hint: int = 1) -> Report:
    """Exercise B1: ``candidate(model, forward)`` is the bytes that autograd keeps, without the parameters."""

    def compare(model: nn.Module, forward: Callable[[], Tensor], slips: dict[int, str]) -> None:
        got, right = candidate(model, forward), saved_bytes(model, forward)
        if got == right:
            return
        slips |= {right // 4: "you count numbers, not bytes", 4: "this is the result of forward, not what it kept"}
        note = slips.get(got, "each piece of kept memory counts once, parameters not at all")
        raise Wrong(
            f"you find {got:,} bytes, autograd keeps {right:,}: {note}",
            "Which tensors reach pack, what memory lies behind each, and which of it is the model's own?",
            "Collect tensor.untyped_storage() by data_ptr(), leave out the parameters' storages, and sum nbytes().",
        )

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

        got = candidate(counted, gib, **options)
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
