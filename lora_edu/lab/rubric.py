"""What a program can check about an answer, and about the texts it was trained and tested on. Built in lesson 12.

None of these checks reads. Each is about one thing that goes wrong often and that a loss does not show.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

Run = tuple[str, ...]


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def runs_of(text: str, n: int) -> set[Run]:
    """All runs of n words in a row."""
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def first_sentence(text: str) -> str:
    """The text up to its first full stop, question or exclamation mark, on one line; all of it if there is none."""
    found = re.match(r".*?[.!?](?=\s|$)", text.strip(), re.S)
    return " ".join((found[0] if found else text).split())


def ends_by_itself(text: str, tokenizer: Any, max_new_tokens: int) -> bool:
    """Whether the model ended the answer with its end token, and was not cut off at ``max_new_tokens``.

    Counted from the text, by the tokens that it has now. An answer of exactly one token less than the limit counts as
    cut, since a space at its end may have been lost.
    """
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) < max_new_tokens - 1


def repeats(text: str, n: int = 3) -> bool:
    """Whether a run of n words stands in the text twice, as in a loop."""
    words = words_of(text)
    return len(words) - n + 1 > len(runs_of(text, n))


def longest_copy(text: str, sources: Iterable[str]) -> Run:
    """The longest run of words that the text shares with one of the sources, empty if they share no word.

    Built in lesson 12.
    """
    words, longest = words_of(text), 0
    best: Run = ()
    padded = [f" {' '.join(words_of(source))} " for source in sources]
    for start in range(len(words)):
        while start + longest < len(words):
            run = words[start : start + longest + 1]
            if not any(f" {' '.join(run)} " in source for source in padded):
                break
            best, longest = tuple(run), longest + 1
    return best


class Checked(NamedTuple):
    """What the rubric says of one answer; True is good, each time."""

    is_sentence: bool
    has_length: bool
    ends_by_itself: bool
    does_not_repeat: bool
    is_not_circular: bool
    is_not_copied: bool


def check_answer(
    answer: str,
    word: str,
    ended: bool,
    sources: Sequence[str] = (),
    length: range = range(3, 26),
    longest: int = 6,
) -> Checked:
    """Try a definition on six rules.

    Args:
        answer: what the model wrote.
        word: the word that was to be defined.
        ended: whether the model ended it (:func:`ends_by_itself`).
        sources: the training texts, of which it should copy nothing.
        length: how many words it may have.
        longest: a shared run of so many words is a copy.

    Returns:
        Whether it begins with a capital letter and ends with a sentence mark; has a fitting length; ended; has no
        run of three words twice; does not contain the word itself; shares no long run with a source.
    """
    text, words = answer.strip(), words_of(answer)
    own = words_of(word)
    circular = any(words[i : i + len(own)] == own for i in range(len(words) - len(own) + 1))
    return Checked(
        is_sentence=bool(re.match(r"[^\w]*[A-Z]", text)) and text.endswith((".", "!", "?")),
        has_length=len(words) in length,
        ends_by_itself=ended,
        does_not_repeat=not repeats(answer),
        is_not_circular=not circular,
        is_not_copied=len(longest_copy(answer, sources)) < longest,
    )


class Overlap(NamedTuple):
    """A held-out text and the training text most like it, with the share of its runs of words that stand there too."""

    share: float
    held_out: str
    training: str


def contamination(held_out: Sequence[str], training: Sequence[str], n: int = 5) -> list[Overlap]:
    """For each held-out text the training text that shares most of its runs of n words, the largest share first.

    A text of fewer than n words counts as one run. Built in lesson 12; lesson 07 did it by hand.

    Raises:
        ValueError: if either list is empty, or n is below 1.
    """
    if n < 1 or not held_out or not training:
        raise ValueError(
            f"n={n}, {len(held_out)} held-out and {len(training)} training texts: expected n of 1 or more and texts"
        )
    found: dict[Run, list[int]] = {}
    for place, text in enumerate(training):
        for run in _whole_or_runs(text, n):
            found.setdefault(run, []).append(place)
    overlaps = []
    for text in held_out:
        own = _whole_or_runs(text, n)
        shared = Counter(place for run in sorted(own) for place in found.get(run, ()))
        for place, count in shared.most_common(1):
            overlaps.append(Overlap(count / len(own), text, training[place]))
        if not shared:
            overlaps.append(Overlap(0.0, text, ""))
    return sorted(overlaps, key=lambda each: -each.share)


def _whole_or_runs(text: str, n: int) -> Collection[Run]:
    return runs_of(text, n) or {tuple(words_of(text))}
