"""The checks of lesson 11 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from found import each_is_found, each_passes
from lora_edu.course import checks

pytestmark = pytest.mark.graders


def with_changes(right: dict[str, Any], **changes: Any) -> Callable[[], dict[str, Any]]:
    """The right answers, some of them changed; an underscore in a name stands for a space."""
    return lambda: right | {key.replace("_", " "): value for key, value in changes.items()}


TRACES = {
    "tensor": "logits",
    "what helps": "fewer rows at a time",
    "what differs": "the width",
    "what repairs": "the base it was trained on",
}
test_traces_name_the_mistake = each_is_found(
    checks.error_traces,
    {
        "weights": (with_changes(TRACES, tensor="weights"), "did not fit", "15.0 GiB"),
        "adapter": (with_changes(TRACES, tensor="adapter"), "did not fit", "0.03 GiB"),
        "optimizer": (with_changes(TRACES, tensor="optimizer states"), "did not fit", "has not made a step"),
        "a tensor of one's own": (with_changes(TRACES, tensor="activations"), "did not fit", "is none of"),
        "smaller rank": (with_changes(TRACES, what_helps="a smaller rank"), "trace 1: what helps", "0.03 GiB"),
        "slower": (
            with_changes(TRACES, what_helps="a lower learning rate"),
            "trace 1: what helps",
            "no tensor becomes",
        ),
        "the trace's advice": (
            with_changes(TRACES, what_helps="expandable segments"),
            "trace 1: what helps",
            "6.13 GiB",
        ),
        "rank": (with_changes(TRACES, what_differs="the rank"), "what differs", "8 in the file, and 8"),
        "scale": (with_changes(TRACES, what_differs="the scale"), "what differs", "in the config"),
        "names": (with_changes(TRACES, what_differs="the names"), "what differs", "missing key"),
        "another rank": (with_changes(TRACES, what_repairs="another rank in the config"), "repairs", "already"),
        "targets": (with_changes(TRACES, what_repairs="other target modules"), "repairs", "found on both sides"),
        "ignored": (with_changes(TRACES, what_repairs="ignoring the mismatch"), "repairs", "does nothing"),
        "left out": (lambda: {"tensor": "logits"}, "trace 1: what helps", "'what helps' has no answer"),
        "nothing returned": (lambda: None, "did not fit", "you return None"),
        "a list": (lambda: list(TRACES.values()), "did not fit", "you return ['logits'"),
    },
)
test_other_readings_of_the_traces_pass = each_passes(
    checks.error_traces,
    {
        "capitals and spaces": with_changes(TRACES, tensor="Logits", what_helps="Fewer rows  at a time "),
        "another order": lambda: dict(reversed(TRACES.items())),
    },
)

PROFILE = {
    "share of the optimizer": 0.0045,
    "tokens computed": 4096,
    "share of padding": 0.9,
    "what helps": "pad to the longest text",
}
test_profile_names_the_mistake = each_is_found(
    checks.profile_of_a_step,
    {
        "percent": (with_changes(PROFILE, share_of_the_optimizer=0.5), "optimizer", "a percentage"),
        "milliseconds": (with_changes(PROFILE, share_of_the_optimizer=15), "optimizer", "a time"),
        "backward": (with_changes(PROFILE, share_of_the_optimizer=1777 / 3347), "optimizer", "backward's share"),
        "a guess": (with_changes(PROFILE, share_of_the_optimizer=0.1), "optimizer", "not what the profile says"),
        "words": (with_changes(PROFILE, share_of_the_optimizer="small"), "optimizer", "expected a number"),
        "one text": (with_changes(PROFILE, tokens_computed=512), "computed", "the tokens of one text"),
        "real tokens": (with_changes(PROFILE, tokens_computed=427), "computed", "the texts alone"),
        "width": (with_changes(PROFILE, tokens_computed=192), "computed", "the model's width"),
        "the other part": (with_changes(PROFILE, share_of_padding=427 / 4096), "padding", "the share that is text"),
        "percent of padding": (with_changes(PROFILE, share_of_padding=89.6), "padding", "a percentage"),
        "number of tokens": (with_changes(PROFILE, share_of_padding=4096 - 427), "padding", "a number of tokens"),
        "smaller rank": (with_changes(PROFILE, what_helps="a smaller rank"), "what helps", "r = 8"),
        "optimizer": (with_changes(PROFILE, what_helps="another optimizer"), "what helps", "0.5 %"),
        "checkpointing": (with_changes(PROFILE, what_helps="gradient checkpointing"), "what helps", "twice"),
        "nothing returned": (lambda: None, "optimizer", "you return None"),
    },
)
test_other_readings_of_the_profile_pass = each_passes(
    checks.profile_of_a_step,
    {
        "from the column of percentages": with_changes(PROFILE, share_of_the_optimizer=0.005),
        "computed": with_changes(
            PROFILE, share_of_the_optimizer=15 / 3347, tokens_computed=8 * 512, share_of_padding=1 - 427 / (8 * 512)
        ),
    },
)


def doctor(*, skip: str = "", zero_is_missing: bool = False, step: bool = False, leave: bool = False) -> Callable:
    """The solution, with one examination left out or one thing done too much."""

    def triage(model: Any, batch: dict[str, Tensor]) -> str:
        training = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if skip != "no label counts" and (batch["labels"] == -100).all():
            return "no label counts"
        if skip != "nothing trains" and not training:
            return "nothing trains"
        if skip != "the base trains" and any("lora_" not in name for name in training):
            return "the base trains"
        loss = model(**batch).loss
        if skip != "not finite" and not torch.isfinite(loss):
            return "not finite"
        if skip != "no graph" and not loss.requires_grad:
            return "no gradient"
        loss.backward()
        gradients = [p.grad for p in training.values()]
        if step:
            torch.optim.SGD(training.values(), lr=0.1).step()
        if not leave:
            model.zero_grad()
        missing = any(g is None or (zero_is_missing and not g.any()) for g in gradients)
        return "no gradient" if missing and skip != "no gradient" else "healthy"

    return triage


TRIAGE = {
    "always healthy": (lambda m, b: "healthy", "nothing trains", "gets the verdict 'healthy'"),
    "zero taken for missing": (doctor(zero_is_missing=True), "a healthy run", "gets the verdict 'no gradient'"),
    "frozen taken for cut off": (doctor(skip="nothing trains"), "nothing trains", "gets the verdict 'no gradient'"),
    "base not looked at": (doctor(skip="the base trains"), "the base trains", "gets the verdict"),
    "labels not looked at": (doctor(skip="no label counts"), "no label counts", "gets the verdict 'not finite'"),
    "numbers not looked at": (doctor(skip="not finite"), "not finite", "gets the verdict 'healthy'"),
    "gradients not looked at": (doctor(skip="no gradient"), "one block is cut off", "gets the verdict 'healthy'"),
    "backward raises": (doctor(skip="no graph"), "everything is cut off", "your code raised RuntimeError"),
    "takes a step": (doctor(step=True), "as it was", "changed the model"),
    "leaves gradients": (doctor(leave=True), "as it was", "gradients are left behind"),
    "no return": (lambda m, b: None, "a healthy run", "your verdict is None"),
}
TRIAGE["values of gradients not looked at"] = (doctor(), "a gradient that is not", "gets the verdict 'healthy'")
test_triage_names_the_mistake = each_is_found(checks.triage, TRIAGE)


Entries = list[dict[str, str]]


def by_entry(entries: Entries, share: float, seed: int) -> tuple[Entries, Entries]:
    order = random.Random(seed).sample(entries, len(entries))
    cut = round(share * len(entries))
    return order[cut:], order[:cut]


def shuffles_the_input(entries: Entries, share: float, seed: int) -> tuple[Entries, Entries]:
    random.Random(seed).shuffle(entries)
    return by_word(entries, share, seed)


def by_word(
    entries: Entries, share: float, seed: int, draw: Callable[[int], Any] = random.Random
) -> tuple[Entries, Entries]:
    words = sorted({entry["word"] for entry in entries})
    draw(seed).shuffle(words)
    held = set(words[: round(share * len(words))])
    return [e for e in entries if e["word"] not in held], [e for e in entries if e["word"] in held]


def seeds_everybody(entries: Entries, share: float, seed: int) -> tuple[Entries, Entries]:
    random.seed(seed)
    return by_word(entries, share, seed, draw=lambda _: random)


def one_entry_a_word(entries: Entries, share: float, seed: int) -> tuple[Entries, Entries]:
    return by_word(list({entry["word"]: entry for entry in entries}.values()), share, seed)


SPLITS = {
    "draws entries": (by_entry, "no headword", "headwords are in both"),
    "shuffles what it was given": (shuffles_the_input, "exactly one part", "changed the list"),
    "drops second definitions": (one_entry_a_word, "exactly one part", "entries went in"),
    "the two swapped": (lambda e, s, r: by_word(e, s, r)[::-1], "the size", "of the words are held out"),
    "nothing held out": (lambda e, s, r: (list(e), []), "the size", "0% of the words"),
    "no seed": (
        lambda e, s, r: by_word(e, s, r, draw=lambda _: random.Random(random.random())), "the seed", "two different",
    ),
    "the seed ignored": (lambda e, s, r: by_word(e, s, 0), "the seed", "the same split"),
    "seeds everybody": (seeds_everybody, "random numbers", "reseeds"),
}  # fmt: skip


def by_permutation(entries: Entries, share: float, seed: int) -> tuple[Entries, Entries]:
    torch.manual_seed(seed)
    words = sorted({entry["word"] for entry in entries})
    held = {words[i] for i in torch.randperm(len(words))[: round(share * len(words))]}
    return [e for e in entries if e["word"] not in held], [e for e in entries if e["word"] in held]


def by_numpy(entries: Entries, share: float, seed: int) -> list[Entries]:
    words = list(dict.fromkeys(entry["word"] for entry in entries))
    held = {str(word) for word in np.random.default_rng(seed).permutation(words)[: round(share * len(words))]}
    parts: list[Entries] = [[], []]
    for entry in entries:
        parts[entry["word"] in held].append(entry)
    return parts


SPLITS["seeds PyTorch"] = (by_permutation, "random numbers", "PyTorch's own random numbers")
test_other_splits_pass = each_passes(checks.honest_split, {"drawn words": by_word, "NumPy's generator": by_numpy})
test_split_names_the_mistake = each_is_found(checks.honest_split, SPLITS)
