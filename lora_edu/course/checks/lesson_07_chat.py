"""Check of lesson 07: an entry as a chat model sees it, and its labels (B1)."""

import copy
import random
from collections.abc import Callable
from functools import cache
from typing import Any

from lora_edu.course.checks.report import Report, Step, Wrong, run_steps
from lora_edu.lab.bases import require_base
from lora_edu.lab.datasets import IGNORED, encode, format_chat, load_dataset, prompt_ids

Entry = dict[str, Any]


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
            try:
                candidate(entry, tokenizer, given - less)
            except ValueError:
                continue
            raise Wrong(
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
