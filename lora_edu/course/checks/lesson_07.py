"""The checks of lesson 07: padding (A1), warm-up (A2), chat rows (B1), early stopping (B2), equal quality (C1).

And the labels of a batch, in the lesson's *Your turn*.
"""

import copy
import math
import operator
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.course.checks.candidates import plain, without
from lora_edu.course.checks.report import Report, Step, Wrong, run_steps
from lora_edu.course.checks.tools import (
    close_number,
    dtype_name,
    is_number,
    is_tensor,
    known_slip,
    need_refusal,
    shape_or_type,
    small_llama,
    with_note,
)
from lora_edu.lab.bases import require_base
from lora_edu.lab.datasets import IGNORED, collate, encode, format_chat, load_dataset, prompt_ids
from lora_edu.lab.recording.records import read_record

END = 2  # the id of the end token in drawn rows; it is the padding's too, as in SmolLM2
Entry = dict[str, Any]


def padding_share(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise A1: ``candidate(lengths, batch_size)``, the share of all positions of a pass that is padding."""
    fix = "Cut lengths into batches, add up len(batch) * max(batch) over them, and return 1 - sum(lengths) / that sum."
    question = "How many positions has each batch, how many of all of them hold a token?"

    def cut(lengths: list[int], size: int) -> list[list[int]]:
        return [lengths[start : start + size] for start in range(0, len(lengths), size)]

    def share(lengths: list[int], size: int) -> float:
        return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in cut(lengths, size))

    def slips(lengths: list[int], size: int) -> list[tuple[float, str]]:
        batches, right = cut(lengths, size), share(lengths, size)
        positions, longest = sum(len(batch) * max(batch) for batch in batches), max(lengths)
        whole = batches[:-1] if len(batches[-1]) < size else batches
        kept = sum(map(sum, whole)), sum(len(batch) * max(batch) for batch in whole)
        return [
            (1 - right, "that is the share of the tokens, not of the padding"),
            (100 * right, "that is a percentage; a share lies between 0 and 1"),
            (positions - sum(lengths), "that is the number of padded positions, not their share"),
            (positions / sum(lengths) - 1, "you divide by the tokens; the whole is all positions, padding included"),
            (1 - sum(lengths) / (len(lengths) * longest), "you pad each batch to the longest row of all batches"),
            (
                sum(1 - sum(batch) / (len(batch) * max(batch)) for batch in batches) / len(batches),
                "that is the mean of the batches' shares; batches with long rows have more positions",
            ),
            (
                1 - sum(lengths) / sum(size * max(batch) for batch in batches),
                "you count the last batch as if it were full",
            ),
            (1 - kept[0] / kept[1] if kept[1] else 0.0, "the last batch, which is not full, is left out"),
            (share(sorted(lengths), size), "you sort the rows first; they come in the order that they are in"),
            (1 - sum(lengths) / sum(len(batch) * batch[0] for batch in batches), "you pad to the first row of a batch"),
        ]

    def ask(lengths: list[int], size: int) -> None:
        given = list(lengths)
        got, right = candidate(given, size), share(lengths, size)
        setting = f"lengths={lengths}, batch_size={size}: "
        if given != lengths:
            raise Wrong(
                setting + "your function changed the list",
                "Does sort make a new list?",
                "Leave lengths as it is. " + fix,
            )
        if not is_number(got):
            raise Wrong(setting + f"you give a {type(got).__name__}, expected one number", question, fix)
        if not (abs(got - right) < 1e-9):
            note = known_slip(got, slips(lengths, size), close_number)
            raise Wrong(with_note(f"{setting}you give {got:.4g}, expected {right:.4g}", note), question, fix)

    def drawn(count: int) -> list[int]:
        # The last row of all is a short one, so that no slip gives what is right.
        return [*random.sample(range(20, 96), count - 1), random.randint(8, 15)]

    def one() -> None:
        lengths = drawn(random.randint(4, 6))
        ask(lengths, len(lengths))

    def several() -> None:
        size = random.randint(3, 5)
        ask(drawn(random.randint(3, 4) * size), size)

    def rest() -> None:
        size = random.randint(4, 6)
        ask(drawn(3 * size + random.randint(2, size - 2)), size)

    def none() -> None:
        ask([random.randint(20, 90)] * 6, 3)
        ask(drawn(5), 1)

    def oracle() -> None:
        rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in drawn(21)]
        masks = [collate(rows[start : start + 8], END)["attention_mask"] for start in range(0, len(rows), 8)]
        padded, positions = sum(int((mask == 0).sum()) for mask in masks), sum(mask.numel() for mask in masks)
        lengths = [len(row["input_ids"]) for row in rows]
        got = candidate(list(lengths), 8)
        if not is_number(got) or not (abs(got - padded / positions) < 1e-9):
            raise Wrong(
                f"21 rows in batches of 8: collate pads {padded} of {positions} positions, you give {got!r}",
                question,
                fix,
            )

    steps: list[Step] = [
        ("one batch", one),
        ("several batches, each padded to its own longest row", several),
        ("a last batch that is not full", rest),
        ("no padding at all", none),
        ("what collate pads", oracle),
    ]
    return run_steps("the share of padding", steps, hint)


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
        if not is_number(got):
            raise Wrong(setting + f"a {type(got).__name__}", "What is multiplied with the rate?", "Return " + rule)
        if close_number(got, right, 1e-6):
            return
        note = ""
        for steps in (range(1, 3 * warmup_steps), range(1, warmup_steps)):  # all of it, or only while it should rise
            for slip, words in known if len(steps) > 1 else ():
                if all(close_number(candidate(k, warmup_steps), slip(k, warmup_steps)) for k in steps):
                    note = note or words
        if step >= warmup_steps > 0 and not note:
            now, later = candidate(warmup_steps + 1, warmup_steps), candidate(4 * warmup_steps, warmup_steps)
            note = "it falls again" if later < now else "it goes on rising" if now > 1 else "1 is never reached"
        raise Wrong(
            with_note(f"{setting}{got:.4g}, expected {right:.4g}", note),
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


@cache
def _tokenizer(name: str) -> Any:
    """The tokenizer of a base, without its model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(require_base(name)), local_files_only=True)
    except FileNotFoundError as missing:
        raise Wrong(
            str(missing), "Nothing is wrong with your function so far.", "Fetch the base, then check again."
        ) from None


def drawn_tokenizer(bos: str = "template", space: bool = False) -> Any:
    """``tiny``'s tokenizer with a small chat template of its own.

    Args:
        bos: who writes <bos>: "template"; "both" the template, and the tokenizer again; "nobody", though there is one;
            "none", there is none.
        space: the assistant's turn begins with a space before the answer, not with a new line.
    """
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(_tokenizer("tiny"))
    if bos == "both":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    if bos == "none":
        tokenizer.bos_token = None
    left, right = random.choice([("## ", ""), ("[", "]"), ("* ", ":")])
    right += " " if space else "\\n"
    system = random.choice(["", f"{left}rules{right}Be brief.", f"{left}about{right}You are a dictionary."])
    start = "{{ bos_token }}" if bos in ("template", "both") else ""
    start += f"{{{{ '{system}' + eos_token + '\\n' }}}}" if system else ""
    turn = f"{{{{ '{left}' + m['role'] + '{right}' + m['content'] + eos_token + '\\n' }}}}"
    tokenizer.chat_template = (
        f"{start}{{% for m in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{left}assistant{right}' }}}}{{% endif %}}"
    )
    return tokenizer


def drawn_entry(pos: bool = True) -> Entry:
    """An entry of the data with or without a part of speech, and with a definition of some words."""
    entries = [e for e in load_dataset("devils_dictionary") if 40 < len(e["definition"]) < 160 and e["pos"]]
    entry = dict(random.choice(entries))
    return entry if pos else entry | {"pos": ""}


def row_of(candidate: Callable[..., Any], entry: Entry, tokenizer: Any, max_length: int) -> tuple[list, list]:
    """(input_ids, labels) of the learner's row, two lists of whole numbers."""
    row = candidate(dict(entry), tokenizer, max_length)
    if not isinstance(row, dict) or not {"input_ids", "labels"} <= row.keys():
        seen = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise Wrong(
            f"your function returns {seen}",
            "Which two things does training need of a row?",
            '{"input_ids": …, "labels": …}',
        )
    ids, labels = row["input_ids"], row["labels"]
    for name, values in (("input_ids", ids), ("labels", labels)):
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            odd = next((v for v in values if type(v) is not int), values) if isinstance(values, list) else values
            raise Wrong(
                f"{name} is no list of whole numbers: it has, or is, {odd!r:.60}",
                "apply_chat_template with tokenize=True returns a dictionary. And which tokenizers have no bos?",
                'Write the text with tokenize=False, then tokenizer(text, add_special_tokens=False)["input_ids"]; '
                "bos_token_id may be None.",
            )
    return ids, labels


def expected(entry: Entry, tokenizer: Any, max_length: int = 512) -> tuple[list[int], list[int], int]:
    """(input_ids, labels, length of the prompt) as the library has them."""
    row = encode([entry], tokenizer, max_length, chat=True)[0]
    return row["input_ids"], row["labels"], len(prompt_ids(format_chat(entry, tokenizer)[0], tokenizer))


_TURN = (
    "What does the template write when the model is asked to answer?",
    "One message, the user's, and add_generation_prompt=True: its text ends where the answer begins.",
)


def text_of_user(entry: Entry) -> str:
    """What the user asks: ``Define: duty, noun``, or ``Define: duty``."""
    return f"Define: {entry['word']}" + (f", {entry['pos']}" if entry["pos"] else "")


def compare_prompt(candidate: Callable[..., Any], entry: Entry, tokenizer: Any) -> None:
    """Everything before the answer."""
    ids, _ = row_of(candidate, entry, tokenizer, 512)
    right, _, given = expected(entry, tokenizer)
    if ids[:given] == right[:given]:
        return
    bos, text = tokenizer.bos_token_id, format_chat(entry, tokenizer)[0]

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    user = [{"role": "user", "content": text_of_user(entry)}]
    joined = encoded(text + entry["definition"])
    unopened = prompt_ids(tokenizer.apply_chat_template(user, tokenize=False), tokenizer)
    if bos is not None and ids[:2] == [bos, bos]:
        raise Wrong(
            f"the row begins with two {tokenizer.bos_token}",
            "Who writes it: the template, the tokenizer, you? Nothing in training ever looked like that.",
            "Tokenize with add_special_tokens=False, and add bos only if the template did not write it.",
        )
    if bos is not None and ids[:1] != [bos]:
        raise Wrong(
            f"the row does not begin with {tokenizer.bos_token}; this template does not write it",
            "What did the model see first in every text of its training?",
            "If the tokenizer has a bos, and the ids do not begin with it, put it there.",
        )
    if ids[:given] in (joined[:given], [bos, *joined][:given]):
        border = tokenizer.convert_ids_to_tokens(ids[:given])[-1]
        raise Wrong(
            f"the prompt's last token is {border!r}, a token that belongs to prompt and answer: "
            f"{text[-12:]!r} and {entry['definition'][:8]!r} were tokenized in one piece",
            "When the model is asked later, which ids does the prompt end with, before there is any answer?",
            "Tokenize prompt and answer apart, and join the ids.",
        )
    if ids[: len(unopened)] == unopened:
        raise Wrong("the assistant's turn is not opened: the answer follows the end of the user's turn", *_TURN)
    raise Wrong(
        f"the row begins {tokenizer.decode(ids[:given])!r}, expected {tokenizer.decode(right[:given])!r}",
        "Which message does the user write, and who writes what stands around it?",
        f"One message of the user, {text_of_user(entry)!r}, and the tokenizer's own template.",
    )


def compare_answer(candidate: Callable[..., Any], entry: Entry, tokenizer: Any) -> None:
    """Everything after the prompt."""
    ids, _ = row_of(candidate, entry, tokenizer, 512)
    right, _, given = expected(entry, tokenizer)
    rest, wanted, eos = ids[given:], right[given:], tokenizer.eos_token_id
    if rest == wanted:
        return
    spaced = [*tokenizer(" " + entry["definition"], add_special_tokens=False)["input_ids"], eos]
    if rest[:1] == [eos]:
        raise Wrong("the assistant's turn is closed before the answer begins", *_TURN)
    if rest == wanted[:-1]:
        raise Wrong(
            "the end token is missing after the answer",
            "How should the model learn when a definition is over?",
            "answer ids + [tokenizer.eos_token_id]",
        )
    if rest[: len(wanted)] == wanted:
        raise Wrong(
            f"after the end comes {tokenizer.decode(rest[len(wanted) :])!r}, which the model would learn to write, too",
            "Where does generation stop? What does the template write after a turn?",
            "Do not render the answer with the template: answer ids + [tokenizer.eos_token_id].",
        )
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id in rest:
        raise Wrong(
            f"a {tokenizer.bos_token} stands between prompt and answer",
            "What does this tokenizer put before every text that it is given?",
            "tokenizer(answer, add_special_tokens=False)",
        )
    if rest == spaced:
        raise Wrong(
            "the answer begins with a space",
            "A base model's format puts one there. Does this template ask for it?",
            "Tokenize the definition as it is.",
        )
    raise Wrong(
        f"the answer is {tokenizer.decode(rest)!r}, expected {tokenizer.decode(wanted)!r}",
        "What should the model write, and with which token does it end?",
        "The ids of entry['definition'], and tokenizer.eos_token_id.",
    )


def compare_labels(candidate: Callable[..., Any], entry: Entry, tokenizer: Any, max_length: int = 512) -> None:
    """Which tokens count in the loss."""
    ids, labels = row_of(candidate, entry, tokenizer, max_length)
    _, right, given = expected(entry, tokenizer, max_length)
    if labels == right:
        return
    counted = sum(label != IGNORED for label in labels[:given])
    if len(labels) != len(ids):
        note = f"{len(ids)} input_ids have {len(labels)} labels"
    elif labels == [*right[1:], IGNORED]:
        note = "each label stands one place early, but the model does that shift itself"
    elif counted:
        note = f"{counted} of the prompt's {given} tokens count in the loss"
    elif labels[:-1] == right[:-1]:
        note = "the end does not count in the loss, so the model never learns to stop"
    elif labels[given] == IGNORED:
        lost = sum(label == IGNORED for label in labels[given:])
        note = f"{lost} of the answer's {len(right) - given} tokens, the first among them, do not count"
    else:
        note = "the labels of the answer are not its ids"
    raise Wrong(
        note,
        "Which tokens should the model learn to write? Where does the prompt end, counted in ids, not in characters?",
        "labels = [-100] * len(prompt ids) + answer ids + [eos], cut to the same length as input_ids.",
    )


@without(
    "lora_edu.lab.datasets.encode", "lora_edu.lab.datasets.format_chat", "lora_edu.lab.datasets.prompt_ids",
    symptom="you call {name} of lora_edu.lab.datasets, which this exercise wants you to write",
    question="Which text does the chat template write, and which ids do prompt and answer have by themselves?",
    fix="tokenizer.apply_chat_template(…, tokenize=False, add_generation_prompt=True), then tokenize it.",
)  # fmt: skip
def encode_chat(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise B1: ``candidate(entry, tokenizer, max_length)`` gives a row with ``input_ids`` and ``labels``."""

    def form() -> None:
        row_of(candidate, drawn_entry(), drawn_tokenizer(), 512)
        row_of(candidate, drawn_entry(), drawn_tokenizer("none"), 512)

    def prompt() -> None:
        for bos in ("template", "both", "nobody", "none"):
            compare_prompt(candidate, drawn_entry(), drawn_tokenizer(bos))
        compare_prompt(candidate, drawn_entry(pos=False), drawn_tokenizer())

    def border() -> None:
        for _ in range(2):
            compare_prompt(candidate, drawn_entry(), drawn_tokenizer(space=True))

    def answer() -> None:
        for bos in ("template", "both", "none"):
            compare_answer(candidate, drawn_entry(), drawn_tokenizer(bos))

    def labels() -> None:
        for bos in ("template", "both", "nobody"):
            compare_labels(candidate, drawn_entry(), drawn_tokenizer(bos))

    def cut() -> None:
        entry, tokenizer = drawn_entry(), drawn_tokenizer()
        whole, _, given = expected(entry, tokenizer)
        for length in (given + 3, given + 1, len(whole) - 1, len(whole), len(whole) + 2):
            ids, _ = row_of(candidate, entry, tokenizer, length)
            if ids != whole[:length]:
                note = f"has {len(ids)} tokens" if len(ids) != len(whole[:length]) else "are other tokens"
                if len(ids) == length and ids == [*whole[: length - 1], tokenizer.eos_token_id]:
                    note = "ends with the end token, although the definition goes on"
                elif ids == whole[-length:]:
                    note = "has lost its beginning, and with it the question"
                raise Wrong(
                    f"a row of {len(whole)} tokens cut at max_length={length} {note}",
                    "Which part of a long row is kept? Was the end of this definition ever seen?",
                    "Join everything, the end included, then [:max_length], for input_ids and labels alike.",
                )
            compare_labels(candidate, entry, tokenizer, length)

    def refused() -> None:
        for less in (0, 3):
            entry, tokenizer = drawn_entry(), drawn_tokenizer()
            given = expected(entry, tokenizer)[2]
            need_refusal(
                partial(candidate, entry, tokenizer, given - less),
                f"the prompt has {given} tokens, and with max_length={given - less} your function returns a row",
                "How many labels of such a row count? What is the mean of no numbers?",
                "if len(prompt ids) >= max_length: raise ValueError(…)",
            )

    def smollm2() -> None:
        tokenizer = _tokenizer("smollm2-135m")
        for pos in (True, True, False):
            entry = drawn_entry(pos)
            compare_prompt(candidate, entry, tokenizer)
            compare_answer(candidate, entry, tokenizer)
            compare_labels(candidate, entry, tokenizer, 50)

    steps: list[Step] = [
        ("two lists of whole numbers", form),
        ("the prompt as the template writes it, with one bos", prompt),
        ("no token belongs to prompt and answer", border),
        ("the answer and its end", answer),
        ("the loss asks for answer and end only", labels),
        ("cut at max_length", cut),
        ("a prompt that leaves no room is refused", refused),
        ("the same as the library, with SmolLM2's tokenizer", smollm2),
    ]
    return run_steps("a chat model's rows", steps, hint)


def lowest(losses: Sequence[float]) -> int:
    """The number of the first lowest loss; NaN is never lowest."""
    return min(range(len(losses)), key=lambda i: (losses[i] != losses[i], losses[i]))


def stop_of(losses: Sequence[float], patience: int) -> int | None:
    """The number of the evaluation after which to stop, or None."""
    return next((i for i in range(len(losses)) if i - lowest(losses[: i + 1]) >= patience), None)


def in_total(losses: Sequence[float], patience: int) -> int | None:
    """As :func:`stop_of`, but bad evaluations are never forgotten."""
    bad = [i for i in range(1, len(losses)) if not losses[i] < min(losses[:i])]
    return bad[patience - 1] if len(bad) >= patience else None


def against_previous(losses: Sequence[float], patience: int) -> int | None:
    """As :func:`stop_of`, but each loss is compared with the one before it."""
    since = 0
    for i in range(1, len(losses)):
        since = 0 if losses[i] < losses[i - 1] else since + 1
        if since >= patience:
            return i
    return None


def early_stopping(candidate: Callable[[list[Tensor], int], Any], hint: int = 1) -> Report:
    """Exercise B2: an object with ``see(loss) -> bool``, ``best`` and ``restore()``."""

    def run(losses: Sequence[float], patience: int) -> tuple[Any, list[nn.Parameter], list[list[Tensor]], int | None]:
        """Train until told to stop: (the object, the parameters, their values at each evaluation, where it stopped)."""
        parameters = [nn.Parameter(torch.randn(random.randint(2, 4), 3)), nn.Parameter(torch.randn(5))]
        stopper, values = candidate(list(parameters), patience), []
        for i, loss in enumerate(losses):
            values.append([p.detach().clone() for p in parameters])
            verdict = stopper.see(loss)
            if not isinstance(verdict, bool):
                raise Wrong(
                    f"see(…) returns {verdict!r}, expected True or False",
                    "What does the training loop ask? Does each way through see end in a return?",
                    "return self.since >= self.patience",
                )
            if verdict:
                return stopper, parameters, values, i
            with torch.no_grad():
                for parameter in parameters:
                    parameter.add_(torch.randn_like(parameter))
        return stopper, parameters, values, None

    def ask(losses: list[float], patience: int, question: str, fix: str) -> None:
        got, right = run(losses, patience)[3], stop_of(losses, patience)
        if got == right:
            return
        notes: list[tuple[int | None, str]] = [
            (stop_of(losses, patience + 1), "one evaluation too late"),
            (stop_of(losses, patience - 1) if patience > 1 else -1, "one evaluation too early"),
            (in_total(losses, patience), "you count all evaluations without a new lowest loss, not those in a row"),
            (against_previous(losses, patience), "you compare with the evaluation before, not with the lowest so far"),
            (patience - 1, "no loss counts as the lowest; what does yours begin with?"),
            (stop_of(losses, 1), "you do not wait"),
        ]
        where = ["it never stops" if at is None else f"after evaluation {at}" for at in (got, right)]
        said = f"losses {losses}, patience={patience}: {where[0]}, expected: {where[1]}"
        raise Wrong(with_note(said, known_slip(got, notes, operator.eq)), question, fix)

    def rising() -> None:
        for patience in (random.choice([3, 4, 5]), 2, 1):
            falling = [round(5 - 0.3 * i, 1) for i in range(patience + random.randint(1, 3))]
            rise = [round(falling[-1] + 0.1 * i, 1) for i in range(1, 9)]
            ask(
                falling + rise, patience,
                "With patience=1, how many evaluations without a new lowest loss are enough?",
                "self.since counts evaluations since the lowest; return self.since >= self.patience.",
            )  # fmt: skip

    def forgiving() -> None:
        losses = [5.0, 4.5, 4.7, 4.6, 4.2, 4.4, 4.3, 4.1, 4.3, 3.9, 4.0, 4.1, 4.2, 4.3]
        ask(
            losses, 3,
            "A new lowest loss came: what should the counter be now?",
            "Set self.since = 0 with every new lowest loss.",
        )  # fmt: skip

    def against_the_lowest() -> None:
        question = "A loss falls for many evaluations without getting as low as it once was. Is that progress?"
        fix = "Keep the lowest loss in self.lowest, and compare with that."
        ask([5.0, 3.5, 4.6, 4.4, 4.2, 4.0, 3.9, 3.8, 3.7], random.choice([3, 4]), question, fix)
        ask(
            [140.0, 120.0, 130.0, 125.0, 128.0, 126.0],
            3,
            question,
            fix + " Before the first evaluation it is infinite.",
        )

    def ties() -> None:
        question = "Is a loss that only equals the lowest a new lowest? Is NaN one?"
        fix = "Improvement is loss < self.lowest and nothing else; NaN < x is False, but so is NaN >= x."
        ask([5.0, 4.0, 4.0, 4.0, 4.0, 4.0], random.choice([2, 3]), question, fix)
        ask([5.0, 4.0, math.nan, math.nan, math.nan, math.nan], random.choice([2, 3]), question, fix)

    def best() -> None:
        for losses in (
            [5.0, 4.1, 3.8, 4.0, 3.9, 4.2],
            [5.0, 4.6, 4.4, 4.4, 4.1],
            [4.0, 4.3, 4.4],
            [5.0, 4.0, math.nan],
        ):
            stopper, _, _, _ = run(losses, 9)
            if (best := plain(stopper.best)) != lowest(losses):
                raise Wrong(
                    f"losses {losses}: best is {best!r}, expected {lowest(losses)}",
                    "Evaluations are counted from 0. Which was the first to have the lowest loss?",
                    "When a new lowest loss comes, set self.best to the number of evaluations seen before it.",
                )

    def restores() -> None:
        for losses, patience in (([5.0, 4.2, 4.0, 4.3, 4.1, 4.4], 3), ([5.0, 4.5, 4.6, 4.1], 9)):
            stopper, parameters, values, _ = run(losses, patience)
            places = [(p, p.data_ptr()) for p in parameters]
            stopper.restore()
            right, seen = values[lowest(losses)], [p.detach() for p, _ in places]
            if any(p.data_ptr() != place for p, place in places):
                raise Wrong(
                    "after restore the parameters have other memory",
                    "Does assigning to .data write values?",
                    "Inside torch.no_grad(): parameter.copy_(kept).",
                )
            if not all(p.requires_grad for p, _ in places):
                raise Wrong("after restore a parameter is frozen", "Who asked for that?", "torch.no_grad() is enough.")
            if all(map(torch.equal, seen, right)):
                continue
            notes = [f"those of evaluation {i}" for i, v in enumerate(values) if all(map(torch.equal, seen, v))]
            raise Wrong(
                f"losses {losses}: after restore the weights are {notes[0] if notes else 'those of no evaluation'}, "
                f"expected those of evaluation {lowest(losses)}",
                "When did you keep them? Is what you kept a copy, or a second name for tensors that train on?",
                "With each new lowest loss, keep [p.detach().clone() for p in parameters]; restore copies them back.",
            )

    def replay() -> None:
        question, fix = "Does your object rely on anything but the losses it has seen?", "Print loss and counter."
        for _ in range(40):
            losses = [round(random.uniform(3, 5), 1) for _ in range(random.randint(3, 25))]
            ask(losses, random.randint(1, 5), question, fix)
        for line in read_record("smollm2_finetuning")["runs"]:
            ask(line["curves"]["validation"], random.randint(1, 3), question, fix)

    steps: list[Step] = [
        ("stops when patience is used up", rising),
        ("a new lowest loss starts the count again", forgiving),
        ("each loss is compared with the lowest so far", against_the_lowest),
        ("a tie is no improvement, and NaN is none", ties),
        ("best is the evaluation with the lowest loss", best),
        ("the best weights come back, in place", restores),
        ("drawn and recorded curves", replay),
    ]
    return run_steps("early stopping", steps, hint)


def crossing(learned: Sequence[float], other: Sequence[float], target: float) -> float | None:
    """``other`` where ``learned`` first comes down to the target, in straight lines between the evaluations."""
    if learned[0] <= target:
        return other[0]
    for i in range(1, len(learned)):
        if learned[i] <= target:
            share = (learned[i - 1] - target) / (learned[i - 1] - learned[i])
            return other[i - 1] + share * (other[i] - other[i - 1])
    return None


def at_equal_quality(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise C1: ``candidate(learned, other, target)``, one loss where another first reaches the target."""
    place = "Find the first i with learned[i] <= target."
    line = "share = (learned[i-1] - target) / (learned[i-1] - learned[i]); other[i-1] + share * (other[i] - other[i-1])"

    def same(got: Any, value: float | None) -> bool:
        return got is value or (is_number(got) and value is not None and close_number(got, value, 1e-6))

    def ask(learned: list[float], other: list[float], target: float, question: str, fix: str) -> None:
        given = list(learned), list(other)
        got, right = candidate(*given, target), crossing(learned, other, target)
        if given != (learned, other):
            raise Wrong("your function changed its lists", "Does sort make a new list?", "Work on copies.")
        if same(got, right):
            return
        last = next((i for i in range(len(learned) - 1, 0, -1) if learned[i] <= target < learned[i - 1]), None)
        near = min(range(len(learned)), key=lambda i: abs(learned[i] - target))
        low = min(range(len(learned)), key=learned.__getitem__)
        notes: list[tuple[float | None, str]] = [(other[low], "that is where the learned loss is lowest")]
        if right is not None:
            i = next(i for i, loss in enumerate(learned) if loss <= target)
            notes += [(other[i], "that is the first evaluation at or below the target, not the crossing before it")]
            notes += [(target, "that is the target itself"), (learned[i], "that is the learned loss")]
            if i:
                notes += [(other[i - 1] + other[i] - right, "the two evaluations have each other's weight")]
                notes += [(other[i - 1], "that is the evaluation before the target is reached")]
                notes += [((other[i - 1] + other[i]) / 2, "that is halfway, wherever the target lies")]
            notes += [(other[near], "that is the nearest evaluation")]
        if last is not None:
            notes += [(crossing(learned[last - 1 :], other[last - 1 :], target), "that is the last crossing")]
        notes += [(other[0], "that is the first evaluation"), (other[-1], "that is the last evaluation")]
        yours = f"{got:.4g}" if is_number(got) else f"{got!r}"
        said = f"learned={learned}, other={other}, target={target}: you give {yours}, "
        said += f"expected {right if right is None else round(right, 4)}"
        raise Wrong(with_note(said, known_slip(got, notes, same)), question, fix)

    def moves(start: float, *steps: float) -> list[float]:
        losses = [start]
        for step in steps:
            losses.append(round(losses[-1] + step, 2))
        return losses

    def other(count: int) -> list[float]:
        # three decimals and no value twice: then no slip looks like another
        return [value / 1000 for value in random.sample([v for v in range(4001, 6000) if v % 10], count)]

    def on_an_evaluation() -> None:
        learned = moves(5.0, *(-random.choice([0.2, 0.3, 0.4]) for _ in range(5)))
        ask(learned, other(6), learned[random.randint(1, 4)], "At which evaluation is the target reached?", place)

    def between() -> None:
        learned = moves(5.0, *(-random.choice([0.3, 0.4, 0.5]) for _ in range(5)))
        at = random.randint(1, 4)
        ask(
            learned, other(6), round(learned[at] + 0.1, 2),
            "Which two evaluations lie around the target, and how far is it from the earlier one?", line,
        )  # fmt: skip

    def first() -> None:
        learned = moves(5.0, -0.5, -0.5, 0.4, 0.3, -0.6, -0.5)
        ask(
            learned, other(7), 4.3,
            "The loss falls, rises and falls again. When is a run that stops at the target over?",
            place + " np.interp wants values that only rise; losses do not.",
        )  # fmt: skip

    def never() -> None:
        learned = moves(5.0, -0.4, -0.3, 0.1)
        ask(learned, other(4), 4.0, "Does this run ever come that far?", "Return None if no learned loss is so low.")

    def at_once() -> None:
        learned = moves(3.9, -0.4, -0.2)
        ask(
            learned, other(3), 4.0,
            "How many steps does a model need that is below the target from the start?",
            "If learned[0] <= target, return other[0]: there is no evaluation before it.",
        )  # fmt: skip

    def recorded() -> None:
        for run in random.sample(read_record("smollm2_finetuning")["runs"], 12):
            curves, target = run["curves"], random.choice([3.7, 3.8, 3.9, 4.2])
            ask(curves["validation"], curves["plain"], target, "Does it work on 13 evaluations?", f"{place} {line}")

    steps: list[Step] = [
        ("a target that is met by an evaluation", on_an_evaluation),
        ("a target between two evaluations", between),
        ("the first time counts", first),
        ("None where it is never reached", never),
        ("below from the start", at_once),
        ("recorded curves", recorded),
    ]
    return run_steps("forgetting at equal quality", steps, hint)


def mask_labels(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """*Your turn*: ``candidate(input_ids, attention_mask, prompt_lengths)``, the labels of a padded batch."""
    rule = (
        "Clone input_ids; write -100 where attention_mask is 0, and in each row before the place prompt_lengths says."
    )
    question = "Which tokens should the model learn to write, after which it is done?"

    def right_labels(ids: Tensor, mask: Tensor, prompts: list[int]) -> Tensor:
        starts = torch.tensor(prompts)[:, None]
        return torch.where((torch.arange(ids.shape[1]) >= starts) & (mask == 1), ids, IGNORED)

    def slips(ids: Tensor, mask: Tensor, prompts: list[int]) -> list[tuple[Tensor, str]]:
        """Wrong labels and what is wrong with them; the first that fits is told."""
        places, starts, ends = torch.arange(ids.shape[1]), torch.tensor(prompts)[:, None], mask.sum(1, keepdim=True)
        right = right_labels(ids, mask, prompts)
        off = torch.full_like(ids[:, :1], IGNORED)
        in_prompt = torch.stack([torch.isin(row, row[:n]) for row, n in zip(ids, prompts, strict=True)])
        answers = (places >= starts) & (mask == 1)

        def only(keep: Tensor) -> Tensor:
            return torch.where(keep, ids, IGNORED)

        return [
            (ids, "prompts and padding count in the loss, too"),
            (only(mask == 1), "the prompts count in the loss, too"),
            (only(places >= starts), "the padding counts: the model is asked for one end after another"),
            (
                only(answers & (ids != END)),
                "the answers' ends are left out with the padding, whose id they share: the model never learns to stop",
            ),
            (only((mask == 1) & (ids != END)), "the prompts count, and the answers' ends do not"),
            (only(answers & (places != ends - 1)), "the ends do not count, so the model never learns to stop"),
            (torch.cat([right[:, 1:], off], 1), "each label stands one place early; the model does that shift itself"),
            (torch.cat([off, right[:, :-1]], 1), "each label stands one place late"),
            (only((places >= starts - 1) & (mask == 1)), "the last token of each prompt counts, too"),
            (only((places > starts) & (mask == 1)), "the first token of each answer does not count"),
            (only((places >= prompts[0]) & (mask == 1)), "the first row's prompt length is used for all rows"),
            (only((places >= max(prompts)) & (mask == 1)), "the longest prompt's length is used for all rows"),
            (only((places >= min(prompts)) & (mask == 1)), "the shortest prompt's length is used for all rows"),
            (only((places < starts) & (mask == 1)), "it is the wrong way round: the prompts count, the answers do not"),
            (only(~answers), "it is the wrong way round: what should count is left out, and the rest counts"),
            (right.masked_fill(~answers, 0), "0 is the id of a token, so it counts"),
            (right.masked_fill(~answers, -1), "-1 is not the label that is left out"),
            (only(answers & ~in_prompt), "tokens of an answer are left out because its prompt has them, too"),
            (torch.full_like(ids, IGNORED), "no label is left to learn from"),
        ]

    def ask(ids: Tensor, mask: Tensor, prompts: list[int]) -> Tensor:
        given = ids.clone(), mask.clone(), list(prompts)
        labels, right = candidate(*given), right_labels(ids, mask, prompts)
        setting = f"input_ids={ids.tolist()}, prompt_lengths={prompts}: "
        if not (torch.equal(given[0], ids) and torch.equal(given[1], mask) and given[2] == prompts):
            raise Wrong(
                "your function changes the batch that it was given",
                "Is labels = input_ids a new tensor, or a second name? What would the model then read?",
                rule,
            )
        if not is_tensor(labels, ids.shape) or labels.dtype != ids.dtype:
            seen = dtype_name(labels) + " labels" if is_tensor(labels, ids.shape) else f"a {shape_or_type(labels)}"
            raise Wrong(
                f"you give {seen}, expected one whole number (int64) for each token, {tuple(ids.shape)}",
                "Does every token have a label, those that do not count included?",
                rule,
            )
        if not torch.equal(labels, right):
            row, place = (labels != right).nonzero()[0].tolist()
            first = f"label {place} of row {row} is {labels[row, place].item()}, expected {right[row, place].item()}"
            note = known_slip(labels, slips(ids, mask, prompts), torch.equal)
            raise Wrong(setting + (note or first), question, rule)
        return labels

    def batch(totals: list[int], prompts: list[int], repeated: bool = False) -> tuple[Tensor, Tensor, list[int]]:
        """Rows of these lengths, each ending with END and padded with END; no other id twice in a row."""
        rows = [[*random.sample(range(3, 60), total - 1), END] for total in totals]
        for row, n in zip(rows if repeated else [], prompts, strict=False):
            row[0], row[n] = END, row[1]
        padded = collate([{"input_ids": row, "labels": row} for row in rows], END)
        return padded["input_ids"], padded["attention_mask"], prompts

    def drawn() -> list[int]:
        """Three prompt lengths, the first neither the shortest nor the longest."""
        short = random.randint(2, 3)
        return [short + 1, short, short + 2]

    def alone() -> None:
        ask(*batch([random.randint(7, 9)], [random.randint(2, 4)]))

    def unpadded() -> None:
        ask(*batch([random.randint(8, 10)] * 3, drawn()))

    def padded() -> None:
        longest = random.randint(11, 13)
        ask(*batch([longest - 3, longest, longest - 2], drawn()))

    def repeated() -> None:
        longest = random.randint(11, 13)
        ask(*batch([longest - 2, longest, longest - 4], drawn(), repeated=True))

    def oracle() -> None:
        ids, mask, prompts = batch([9, 12, 10], drawn())
        labels, model = ask(ids, mask, prompts), small_llama(vocab_size=60, num_hidden_layers=1)
        with torch.no_grad():
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
            rows = [row[:n] for row, n in zip(ids, mask.sum(1), strict=True)]
            each = [model(input_ids=row[None]).logits[0].log_softmax(-1) for row in rows]
        wanted = [
            -logs[place - 1, row[place]].item()
            for row, logs, n in zip(rows, each, prompts, strict=True)
            for place in range(n, len(row))
        ]
        if not close_number(loss, sum(wanted) / len(wanted), 1e-4):
            raise Wrong(
                f"with your labels the model's loss is {loss:.4f}; answers and ends alone give "
                f"{sum(wanted) / len(wanted):.4f}",
                "Which tokens does this mean go over?",
                rule,
            )

    steps: list[Step] = [
        ("one row: prompt, answer and end", alone),
        ("several rows, each with its own prompt", unpadded),
        ("padding, which has the end's id", padded),
        ("tokens that stand in prompt and answer", repeated),
        ("the loss of a real model is that of answers and ends", oracle),
    ]
    return run_steps("labels of a batch", steps, hint)
