"""The checks of lesson 07 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from found import assert_found, assert_random_state_kept, each_is_found, each_passes
from lora_edu.course import checks
from lora_edu.course.checks import lesson_07
from lora_edu.course.notebooks.stored import find_notebook, read
from lora_edu.lab import datasets
from lora_edu.lab.bases import BaseMissing

pytestmark = pytest.mark.graders
NOTEBOOK = "07_fine_tuning_a_real_model"
OFF = -100


def cut(lengths: list[int], size: int) -> list[list[int]]:
    return [lengths[start : start + size] for start in range(0, len(lengths), size)]


def positions(batches: list[list[int]]) -> int:
    return sum(len(batch) * max(batch) for batch in batches)


def share(lengths: list[int], size: int) -> float:
    return 1 - sum(lengths) / positions(cut(lengths, size))


def sorted_first(lengths: list[int], size: int) -> float:
    lengths.sort()
    return share(lengths, size)


def whole_batches(lengths: list[int], size: int) -> float:
    batches = [batch for batch in cut(lengths, size) if len(batch) == size]
    return 1 - sum(map(sum, batches)) / positions(batches)


PADDING_SHARE = {
    "the share of tokens": (lambda n, b: 1 - share(n, b), "one batch", "share of the tokens"),
    "a percentage": (lambda n, b: 100 * share(n, b), "one batch", "is a percentage"),
    "a number, not a share": (lambda n, b: positions(cut(n, b)) - sum(n), "one batch", "number of padded positions"),
    "over the tokens": (lambda n, b: positions(cut(n, b)) / sum(n) - 1, "one batch", "you divide by the tokens"),
    "padded to the first row": (
        lambda n, b: 1 - sum(n) / sum(len(batch) * batch[0] for batch in cut(n, b)),
        "one batch|several",
        "to the first row",
    ),
    "padded to the longest of all": (
        lambda n, b: 1 - sum(n) / (len(n) * max(n)),
        "several batches",
        "longest row of all batches",
    ),
    "the mean of the shares": (
        lambda n, b: sum(share(batch, b) for batch in cut(n, b)) / len(cut(n, b)),
        "several batches",
        "mean of the batches' shares",
    ),
    "the list sorted in place": (sorted_first, "one batch", "changed the list"),
    "sorted first": (lambda n, b: share(sorted(n), b), "several batches", "you sort the rows first"),
    "the last batch as if full": (
        lambda n, b: 1 - sum(n) / sum(b * max(batch) for batch in cut(n, b)),
        "not full",
        "as if it were full",
    ),
    "the last batch left out": (whole_batches, "not full", "left out"),
    "nothing returned": (lambda n, b: None, "one batch", "NoneType"),
}


def added_up(lengths: list[int], batch_size: int) -> float:
    padded = total = 0
    for start in range(0, len(lengths), batch_size):
        batch = lengths[start : start + batch_size]
        padded += sum(max(batch) - length for length in batch)
        total += len(batch) * max(batch)
    return padded / total


def as_a_tensor(lengths: list[int], batch_size: int) -> float:
    batches = torch.tensor(lengths).split(batch_size)
    return 1 - sum(lengths) / sum(batch.numel() * batch.max().item() for batch in batches)


test_other_shares_pass = each_passes(checks.padding_share, {"added up": added_up, "with split": as_a_tensor})
test_padding_share_names_the_mistake = each_is_found(checks.padding_share, PADDING_SHARE)


def masked(
    start: Callable[[list[int]], list[int]] = list,
    counts: Callable[[Tensor, Tensor], Tensor] = lambda ids, mask: mask == 1,
    off: int = OFF,
    keep: bool = True,
) -> Callable[..., Tensor]:
    """An answer to *Your turn*: which places count, by the prompts' lengths and by the mask."""

    def label(ids: Tensor, mask: Tensor, prompts: list[int]) -> Tensor:
        starts = torch.tensor(start(prompts))[:, None]
        wanted = (torch.arange(ids.shape[1]) >= starts) & counts(ids, mask)
        return torch.where(wanted == keep, ids, off)

    return label


def in_place(ids: Tensor, mask: Tensor, prompts: list[int]) -> Tensor:
    labels = ids
    labels[mask == 0] = OFF
    for row, n in enumerate(prompts):
        labels[row, :n] = OFF
    return labels


def by_value(ids: Tensor, mask: Tensor, prompts: list[int]) -> Tensor:
    labels = masked()(ids, mask, prompts)
    for row, n in enumerate(prompts):
        labels[row, torch.isin(ids[row], ids[row, :n])] = OFF
    return labels


def rolled(by: int) -> Callable[..., Tensor]:
    def label(ids: Tensor, mask: Tensor, prompts: list[int]) -> Tensor:
        labels = masked()(ids, mask, prompts).roll(by, 1)
        labels[:, -1 if by < 0 else 0] = OFF
        return labels

    return label


def not_end(ids: Tensor, mask: Tensor) -> Tensor:
    return ids != lesson_07.END  # as who masks the padding by its id


def before_end(ids: Tensor, mask: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]) < mask.sum(1, keepdim=True) - 1


MASK_LABELS = {
    "nothing masked": (lambda ids, mask, prompts: ids.clone(), "one row", "prompts and padding count|prompts count"),
    "the prompts not masked": (masked(lambda p: [0] * len(p)), "one row", "the prompts count|prompts and padding"),
    "padding masked by its id": (masked(counts=not_end), "one row", "never learns to stop"),
    "the ends masked by place": (masked(counts=before_end), "one row", "never learns to stop"),
    "the prompt's last token counts": (masked(lambda p: [n - 1 for n in p]), "one row", "last token of each prompt"),
    "the answer's first does not": (masked(lambda p: [n + 1 for n in p]), "one row", "first token of each answer"),
    "shifted": (rolled(-1), "one row", "does that shift itself"),
    "shifted the other way": (rolled(1), "one row", "one place late"),
    "the wrong way round": (masked(keep=False), "one row", "the wrong way round"),
    "0 instead of -100": (masked(off=0), "one row", "0 is the id of a token"),
    "-1 instead of -100": (masked(off=-1), "one row", "-1 is not the label"),
    "everything masked": (lambda ids, mask, prompts: torch.full_like(ids, OFF), "one row", "no label is left"),
    "one prompt length for all": (masked(lambda p: [p[0]] * len(p)), "several rows", "first row's prompt length"),
    "the longest prompt for all": (masked(lambda p: [max(p)] * len(p)), "several rows", "longest prompt's length"),
    "the shortest prompt for all": (masked(lambda p: [min(p)] * len(p)), "several rows", "shortest prompt's length"),
    "the padding counts": (masked(counts=lambda ids, mask: mask > -1), "padding", "one end after another"),
    "masked by value": (by_value, "prompt and answer", "its prompt has them, too"),
    "the batch changed": (in_place, "one row", "changes the batch"),
    "a list": (lambda *given: masked()(*given).tolist(), "one row", "a list"),
    "floats": (lambda *given: masked()(*given).float(), "one row", "float32"),
    "a mask instead of labels": (lambda ids, mask, p: masked()(ids, mask, p) != OFF, "one row", "bool"),
    "the library's own": (datasets.mask_labels, "one row", "the library's own code"),
}


def row_by_row(ids: Tensor, mask: Tensor, prompts: list[int]) -> Tensor:
    labels = ids.clone()
    labels[mask == 0] = OFF
    for row, n in enumerate(prompts):
        labels[row, :n] = OFF
    return labels


def piece_by_piece(ids: Tensor, mask: Tensor, prompts: list[int]) -> Tensor:
    labels = torch.full_like(ids, OFF)
    for row, n in enumerate(prompts):
        end = int(mask[row].sum())
        labels[row, n:end] = ids[row, n:end]
    return labels


def from_lists(ids: Tensor, mask: Tensor, prompts: list[int]) -> Tensor:
    labels = []
    for row, real, n in zip(ids.tolist(), mask.tolist(), prompts, strict=True):
        end = sum(real)
        labels.append([OFF] * n + row[n:end] + [OFF] * (len(row) - end))
    return torch.tensor(labels)


RIGHT_MASKS = {"row by row": row_by_row, "piece by piece": piece_by_piece, "lists": from_lists, "where": masked()}
test_other_masks_pass = each_passes(checks.mask_labels, RIGHT_MASKS)
test_mask_labels_names_the_mistake = each_is_found(checks.mask_labels, MASK_LABELS)


def test_the_lessons_own_cell_passes_and_its_stub_is_not_done() -> None:
    (cell,) = (c for c in read(find_notebook("07")).cells if "your-turn" in c.metadata.get("tags", []))
    for source, status in ((cell.source, "passed"), (cell.metadata["stub"], "not done")):
        there: dict[str, Any] = {"IGNORED": OFF}
        exec(source, there)
        assert checks.mask_labels(there["mask_labels"]).status == status


WARMUP_FACTOR = {
    "starts at zero": (lambda k, w: min(1.0, (k - 1) / max(1, w)), "rises evenly", "trains nothing"),
    "one step late": (lambda k, w: min(1.0, k / (w + 1)), "rises evenly", "one step late"),
    "one step early": (lambda k, w: min(1.0, (k + 1) / max(1, w)), "rises evenly", "one step early"),
    "whole division": (lambda k, w: min(1, k // max(1, w)), "rises evenly", "whole division"),
    "upside down, no limit": (lambda k, w: max(1, w) / k, "rises evenly", "upside down"),
    "upside down": (lambda k, w: min(1.0, w / k), "rises evenly", "upside down"),
    "falls": (lambda k, w: max(0.0, 1 - k / max(1, w)), "rises evenly", "falls where it should rise"),
    "max for min": (lambda k, w: max(1.0, k / max(1, w)), "rises evenly", "larger of the two"),
    "no warm-up at all": (lambda k, w: 1.0, "rises evenly", "nothing rises"),
    "a curve": (lambda k, w: min(1.0, (k / max(1, w)) ** 2), "rises evenly", "not evenly"),
    "1 is never reached": (lambda k, w: min(k, w - 1) / w, "the full rate", "1 is never reached"),
    "grows on": (lambda k, w: k / max(1, w), "it stays", "goes on rising"),
    "falls afterwards": (
        lambda k, w: k / w if k <= w else max(0.0, 1 - (k - w) / (5 * w)),
        "it stays",
        "it falls again",
    ),
    "repeats itself": (lambda k, w: ((k - 1) % w + 1) / w if w else 1.0, "it stays", "expected 1"),
    "division by zero": (lambda k, w: min(1.0, k / w), "none", "ZeroDivisionError"),
    "no warm-up is no training": (lambda k, w: min(1.0, k / w) if w else 0.0, "none", "in step 1 is 0, expected 1"),
    "nothing returned": (lambda k, w: None, "rises evenly", "NoneType"),
}
RIGHT_WARMUP = {
    "two cases": lambda k, w: k / w if k < w else 1.0,
    "a whole 1": lambda k, w: 1 if w == 0 else min(1, k / w),
    "clipped by PyTorch": lambda k, w: torch.tensor(k / max(w, 1), dtype=torch.float64).clamp(max=1).item(),
}
test_other_warmups_pass = each_passes(checks.warmup_factor, RIGHT_WARMUP)
test_warmup_factor_names_the_mistake = each_is_found(checks.warmup_factor, WARMUP_FACTOR)


def chat(
    bos: str = "once",
    opened: bool = True,
    closed: bool = False,
    joined: bool = False,
    special: bool = False,
    space: str = "",
    end: str = "one",
    counted: Callable[[list[int], list[int]], list[int]] = lambda g, w: [OFF] * len(g) + w,
    cut: str = "both",
    refuse: bool = True,
    user: str = "Define: ",
    always_pos: bool = False,
) -> Callable[..., dict[str, list[int]]]:
    """The row with switches for its mistakes."""

    def row(entry: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
        def ids_of(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=special)["input_ids"]

        request = user + entry["word"] + (f", {entry['pos']}" if entry["pos"] or always_pos else "")
        messages = [{"role": "user", "content": request}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        text += tokenizer.eos_token + "\n" if closed else ""
        answer, eos, start = space + entry["definition"], tokenizer.eos_token_id, tokenizer.bos_token_id
        given, wanted = ids_of(text), ids_of(answer)
        if joined:
            wanted = ids_of(text + answer)[len(given) :]
            given = ids_of(text + answer)[: len(given)]
        if bos == "always" or (bos == "once" and start is not None and given[0] != start):
            given = [start, *given]
        if refuse and len(given) >= max_length:
            raise ValueError("no room")
        wanted += {"one": [eos], "none": [], "line": [eos, *ids_of("\n")], "two": [eos, eos]}[end]
        ids, labels = given + wanted, counted(given, wanted)
        if cut == "end kept" and len(ids) > max_length:
            ids, labels = [*ids[: max_length - 1], eos], [*labels[: max_length - 1], eos]
        elif cut == "left":
            ids, labels = ids[-max_length:], labels[-max_length:]
        elif cut == "ids only":
            ids = ids[:max_length]
        elif cut == "both":
            ids, labels = ids[:max_length], labels[:max_length]
        return {"input_ids": ids, "labels": labels}

    return row


def with_the_template(entry: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, Any]:
    """Trusts apply_chat_template to return a list."""
    messages = [{"role": "user", "content": entry["word"]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return {"input_ids": ids, "labels": ids}


def whole_conversation(entry: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Renders question and answer, and masks as many tokens as the prompt has."""
    request = ", ".join(filter(None, [f"Define: {entry['word']}", entry["pos"]]))
    messages = [{"role": "user", "content": request}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": entry["definition"]})
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None and ids[0] != tokenizer.bos_token_id:
        ids, given = [tokenizer.bos_token_id, *ids], [tokenizer.bos_token_id, *given]
    return {"input_ids": ids[:max_length], "labels": ([OFF] * len(given) + ids[len(given) :])[:max_length]}


def as_tensors(entry: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, Tensor]:
    return {name: torch.tensor(values) for name, values in chat()(entry, tokenizer, max_length).items()}


def bos_between(entry: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """The prompt is tokenized with care, the answer is not."""
    row = chat()(entry, tokenizer, max_length)
    given = sum(label == OFF for label in row["labels"])
    wanted = [*tokenizer(entry["definition"])["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": row["input_ids"][:given] + wanted, "labels": [OFF] * given + wanted}


ENCODE_CHAT = {
    "apply_chat_template returns a dictionary": (with_the_template, "whole numbers", "tokenize=False"),
    "tensors": (as_tensors, "whole numbers", "no list of whole numbers"),
    "no labels": (
        lambda *given: {"input_ids": chat()(*given)["input_ids"]},
        "whole numbers",
        "your function returns ['input_ids']",
    ),
    "bos always": (chat(bos="always"), "whole numbers", "may be None"),
    "bos always where there is one": (
        lambda e, t, n: chat(bos="once" if t.bos_token_id is None else "always")(e, t, n),
        "one bos",
        "begins with two <bos>",
    ),
    "the tokenizer's bos before the template's": (chat(special=True), "one bos", "begins with two <bos>"),
    "bos never": (chat(bos="never"), "one bos", "does not begin with <bos>"),
    "no generation prompt": (chat(opened=False), "one bos", "turn is not opened"),
    "the end token in the prompt": (chat(closed=True), "answer and its end", "closed before the answer"),
    "another question": (chat(user="What is "), "one bos", "Which message does the user write"),
    "a comma without a part of speech": (chat(always_pos=True), "one bos", "the row begins"),
    "tokenized in one piece": (chat(joined=True), "prompt and answer", "were tokenized in one piece"),
    "the whole conversation rendered": (whole_conversation, "prompt and answer", "were tokenized in one piece"),
    "no end": (chat(end="none"), "answer and its end", "the end token is missing"),
    "a line after the end": (chat(end="line"), "answer and its end", "after the end comes"),
    "two ends": (chat(end="two"), "answer and its end", "after the end comes"),
    "a space before the answer": (chat(space=" "), "answer and its end", "begins with a space"),
    "bos before the answer": (bos_between, "answer and its end", "stands between prompt and answer"),
    "the prompt in the loss": (chat(counted=lambda g, w: g + w), "the loss", "tokens count in the loss"),
    "the prompt's last token in the loss": (
        chat(counted=lambda g, w: [*[OFF] * (len(g) - 1), g[-1], *w]),
        "the loss",
        "1 of the prompt's",
    ),
    "the end not in the loss": (
        chat(counted=lambda g, w: [*[OFF] * len(g), *w[:-1], OFF]),
        "the loss",
        "never learns to stop",
    ),
    "the answer's first token not in the loss": (
        chat(counted=lambda g, w: [*[OFF] * (len(g) + 1), *w[1:]]),
        "the loss",
        "the first among them",
    ),
    "labels shifted": (chat(counted=lambda g, w: [*[OFF] * (len(g) - 1), *w, OFF]), "the loss", "shift itself"),
    "labels of the answer only": (chat(counted=lambda g, w: list(w)), "the loss", "labels"),
    "nothing cut": (chat(cut="none"), "cut at", "tokens"),
    "labels not cut": (chat(cut="ids only"), "cut at", "input_ids have"),
    "the end kept in a cut row": (chat(cut="end kept"), "cut at", "although the definition goes on"),
    "cut at the beginning": (chat(cut="left"), "cut at", "has lost its beginning"),
    "nothing refused": (chat(refuse=False), "is refused", "your function returns a row"),
}
test_encode_chat_names_the_mistake = each_is_found(checks.encode_chat, ENCODE_CHAT)


def test_a_missing_base_is_no_mistake_of_the_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lesson_07.require_base

    def without_smollm2(name: str) -> Any:
        if name != "tiny":
            raise BaseMissing(f"the base {name!r} is not on this machine yet: run `lora-edu bases fetch` once")
        return real(name)

    lesson_07._tokenizer.cache_clear()
    monkeypatch.setattr(lesson_07, "require_base", without_smollm2)
    report = checks.encode_chat(chat())
    lesson_07._tokenizer.cache_clear()
    assert_found(report, "SmolLM2's tokenizer", "bases fetch")
    assert len(report.passed) == 7


def stopping(
    better: Callable[[float, float], bool] = lambda loss, lowest: loss < lowest,
    reset: bool = True,
    late: int = 0,
    against: str = "lowest",
    start: float = float("inf"),
    keep: Callable[[list[Tensor]], list[Tensor]] = lambda ps: [p.detach().clone() for p in ps],
    when: str = "better",
    back: str = "copy",
    count_from: int = 0,
) -> type:
    """The class with switches for its mistakes."""

    class Stopping:
        def __init__(self, parameters: list[Tensor], patience: int):
            self.parameters, self.patience = parameters, patience
            self.best, self.seen, self.since, self.lowest = None, count_from, 0, start
            self.kept: list[Tensor] = []

        def see(self, loss: float) -> bool:
            if better(loss, self.lowest):
                self.lowest, self.best = loss, self.seen
                self.since = 0 if reset else self.since
                if when == "better" or not self.kept:
                    self.kept = keep(self.parameters)
            else:
                self.since += 1
                if against == "previous":
                    self.lowest = loss
            if when == "always":
                self.kept = keep(self.parameters)
            self.seen += 1
            return self.since >= self.patience + late

        @torch.no_grad()
        def restore(self) -> None:
            for i, (parameter, value) in enumerate(zip(self.parameters, self.kept, strict=True)):
                if back == "copy":
                    parameter.copy_(value)
                elif back == "data":
                    parameter.data = value
                elif back == "list":
                    self.parameters[i] = value
                elif back == "frozen":
                    parameter.requires_grad_(False).copy_(value)

    return Stopping


class NothingReturned(stopping()):  # type: ignore[misc]
    def see(self, loss: float) -> None:
        super().see(loss)


EARLY_STOPPING = {
    "one evaluation too late": (stopping(late=1), "patience is used up", "one evaluation too late"),
    "one evaluation too early": (stopping(late=-1), "patience is used up", "too early|after evaluation 0"),
    "patience is ignored": (
        type("AtOnce", (stopping(),), {"see": lambda self, loss: stopping().see(self, loss) or self.since > 0}),
        "patience is used up",
        "you do not wait",
    ),
    "nothing returned": (NothingReturned, "patience is used up", "see(…) returns None"),
    "higher is better": (stopping(better=lambda a, b: a > b, start=-1.0), "patience is used up", "expected"),
    "counts in total": (stopping(reset=False), "starts the count again", "not those in a row"),
    "compared with the one before": (stopping(against="previous"), "lowest so far", "with the evaluation before"),
    "starts at 0": (stopping(start=0.0), "patience is used up", "no loss counts as the lowest"),
    "starts at 100": (stopping(start=100.0), "lowest so far", "it is infinite"),
    "a tie is better": (stopping(better=lambda a, b: a <= b), "a tie is no", "only equals the lowest"),
    "NaN is better": (stopping(better=lambda a, b: not a >= b), "a tie is no", "NaN"),
    "counted from 1": (stopping(count_from=1), "best is the evaluation", "counted from 0"),
    "names instead of copies": (stopping(keep=list), "weights come back", "those of no evaluation|a second name"),
    "detached, not copied": (stopping(keep=lambda ps: [p.detach() for p in ps]), "weights come back", "second name"),
    "a shallow copy": (stopping(keep=copy.copy), "weights come back", "second name"),
    "the last weights": (stopping(when="always"), "weights come back", "those of evaluation 5, expected those of"),
    "the first weights": (stopping(when="first"), "weights come back", "those of evaluation 0, expected"),
    "restored into the list only": (stopping(back="list"), "weights come back", "after restore the weights are"),
    "restored by .data": (stopping(back="data"), "weights come back", "other memory"),
    "frozen by restoring": (stopping(back="frozen"), "weights come back", "frozen"),
}


class Anything(int):
    """A number that equals every other."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


class BestIsAnything(stopping()):  # type: ignore[misc]
    def see(self, loss: float) -> bool:
        verdict = super().see(loss)
        self.best = Anything(7)
        return verdict


class Remembering:
    """Keeps every loss, and decides from all of them."""

    def __init__(self, parameters: list[Tensor], patience: int):
        self.parameters, self.patience, self.losses, self.values = parameters, patience, [], {}

    @property
    def best(self) -> int | None:
        numbers = [i for i, loss in enumerate(self.losses) if loss == loss]
        return min(numbers, key=self.losses.__getitem__, default=None)

    def see(self, loss: float) -> bool:
        self.losses.append(loss)
        self.values[len(self.losses) - 1] = copy.deepcopy([parameter.data for parameter in self.parameters])
        return len(self.losses) - 1 - self.best >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in zip(self.parameters, self.values[self.best], strict=True):
            parameter[:] = value


EARLY_STOPPING["best equals everything"] = (BestIsAnything, "best is the evaluation", "best is 7")
test_other_stoppings_pass = each_passes(checks.early_stopping, {"counting": stopping(), "remembering": Remembering})
test_early_stopping_names_the_mistake = each_is_found(checks.early_stopping, EARLY_STOPPING)


def test_deep_copies_pass_too() -> None:
    def keep(parameters: list[Tensor]) -> list[Tensor]:
        return [nn.Parameter(p.detach()) for p in copy.deepcopy(parameters)]

    assert checks.early_stopping(stopping(keep=keep)).status == "passed"


Curve = Sequence[float]


def first_below(learned: Curve, target: float) -> int | None:
    return next((i for i, loss in enumerate(learned) if loss <= target), None)


def between(
    share: Callable[[float, float, float], float] = lambda above, below, target: (above - target) / (above - below),
) -> Callable[[Curve, Curve, float], float | None]:
    """An answer to C1 from the share of the way between two evaluations."""

    def at(learned: Curve, other: Curve, target: float) -> float | None:
        i = first_below(learned, target)
        if not i:
            return None if i is None else other[0]
        way = share(learned[i - 1], learned[i], target)
        return other[i - 1] + way * (other[i] - other[i - 1])

    return at


def last_crossing(learned: Curve, other: Curve, target: float) -> float | None:
    found = None
    for i in range(1, len(learned)):
        if learned[i] <= target < learned[i - 1]:
            way = (learned[i - 1] - target) / (learned[i - 1] - learned[i])
            found = other[i - 1] + way * (other[i] - other[i - 1])
    return found if found is not None else other[0] if learned[0] <= target else None


def interp(learned: Curve, other: Curve, target: float) -> float | None:
    import numpy as np

    pairs = sorted(zip(learned, other, strict=True))
    if target < pairs[0][0]:
        return None
    return float(np.interp(target, [p[0] for p in pairs], [p[1] for p in pairs]))


def from_the_second(learned: Curve, other: Curve, target: float) -> float | None:
    for i in range(1, len(learned)):
        if learned[i] <= target:
            way = (learned[i - 1] - target) / (learned[i - 1] - learned[i])
            return other[i - 1] + way * (other[i] - other[i - 1])
    return None


def or_the_last(learned: Curve, other: Curve, target: float) -> float | None:
    found = between()(learned, other, target)
    return other[-1] if found is None else found


def strictly_below(learned: Curve, other: Curve, target: float) -> float | None:
    i = next((i for i, loss in enumerate(learned) if loss < target), None)
    return None if i is None else other[i]


AT_EQUAL_QUALITY = {
    "the lowest point": (lambda a, b, t: b[min(range(len(a)), key=a.__getitem__)], "met by", "is lowest"),
    "the last evaluation": (lambda a, b, t: b[-1], "met by", "is lowest|last evaluation"),
    "the learned loss": (lambda a, b, t: between()(a, a, t), "met by", "that is the target itself"),
    "strictly below, no line": (strictly_below, "met by", "expected"),
    "no line": (
        lambda a, b, t: None if (i := first_below(a, t)) is None else b[i],
        "between two",
        "not the crossing before it",
    ),
    "the evaluation before": (between(lambda above, below, t: 0.0 if t > below else 1.0), "between two", "before the"),
    "halfway": (between(lambda above, below, t: 0.5 if t > below else 1.0), "between two", "halfway"),
    "weights exchanged": (
        between(lambda above, below, t: (t - below) / (above - below) if t > below else 1.0),
        "between two",
        "each other's weight",
    ),
    "the last crossing": (last_crossing, "first time", "that is the last crossing"),
    "interpolated in sorted values": (interp, "first time", "np.interp"),
    "the last one if never": (or_the_last, "never reached", "you give"),
    "drawn on if never": (
        lambda a, b, t: or_the_last(a, b, max(t, min(a))),
        "never reached",
        "that is where the learned loss is lowest",
    ),
    "below from the start": (from_the_second, "from the start", "other[0]"),
    "None from the start": (
        lambda a, b, t: None if a[0] <= t else between()(a, b, t),
        "from the start",
        "you give None",
    ),
}
test_at_equal_quality_names_the_mistake = each_is_found(checks.at_equal_quality, AT_EQUAL_QUALITY)


def test_checks_leave_the_random_state_alone(from_solution: Callable) -> None:
    assert_random_state_kept(checks.early_stopping, from_solution(NOTEBOOK, "EarlyStopping"))
