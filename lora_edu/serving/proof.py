"""Is what is served the adapter, or silently the base? A few prompts tell, of any server. Built in lesson 13.

A server that leaves an adapter out gives no error, and the base's fluent answers. So ask it prompts on which base and
adapter are known to differ, and compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ADAPTER, BASE, NEITHER, BOTH = "adapter", "base", "neither", "both"


@dataclass(frozen=True)
class Answer:
    """What was served to one prompt, and whose answer that is: the adapter's, the base's, both's, or neither's."""

    prompt: str
    served: str
    whose: str


@dataclass(frozen=True)
class Proof:
    """The outcome.

    Attributes:
        verdict: "adapter" if every prompt that can tell got the adapter's answer, "base" if each got the base's, and
            else "neither".
        sentence: the verdict in words, with the counts.
        answers: one for each prompt.
    """

    verdict: str
    sentence: str
    answers: tuple[Answer, ...]

    def __str__(self) -> str:
        return self.sentence


def served_is_not_base(
    ask: Callable[[str], str],
    base: Sequence[str] | Callable[[str], str],
    adapted: Sequence[str] | Callable[[str], str],
    prompts: Sequence[str],
    words: int | None = None,
) -> Proof:
    """Put each prompt to a server, and say whose answers come back.

    Args:
        ask: the server: a prompt goes in, its text comes out. Decode greedily (temperature 0), as for the two others.
        base, adapted: what the base alone and the adapted model answer in a program that you trust: a text for each
            prompt, in their order, or a function that gives it.
        prompts: three or more; those on which base and adapter agree tell nothing.
        words: compare only so many words from the beginning, for a server whose weights are rounded otherwise and
            whose texts part from the reference later on. Default: whole texts.

    Raises:
        ValueError: if the texts are not as many as the prompts, or base and adapter agree on every prompt.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts={prompts!r}: give a list of prompts, three or more")

    def cut(text: str) -> list[str]:
        return text.split()[:words]

    pairs = list(zip(texts(base, prompts, "base"), texts(adapted, prompts, "adapted"), strict=True))
    if all(cut(one) == cut(other) for one, other in pairs):
        raise ValueError(
            f"base and adapter give the same answers to all {len(prompts)} prompts, so that nothing could be told: "
            "take prompts on which they differ"
        )
    answers = []
    for prompt, (one, other) in zip(prompts, pairs, strict=True):
        served = ask(prompt)
        like = [name for name, text in ((BASE, one), (ADAPTER, other)) if cut(served) == cut(text)]
        answers.append(Answer(prompt, served, BOTH if len(like) > 1 else like[0] if like else NEITHER))
    telling = Counter(answer.whose for answer in answers if answer.whose != BOTH)
    return Proof(*verdict_of(telling), tuple(answers))


def texts(given: Sequence[str] | Callable[[str], str], prompts: Sequence[str], what: str) -> list[str]:
    """One text for each prompt."""
    found = [given(prompt) for prompt in prompts] if callable(given) else list(given)
    if len(found) != len(prompts) or isinstance(given, str):
        raise ValueError(f"{what} has {len(found)} texts for {len(prompts)} prompts: give one for each, in their order")
    return found


def verdict_of(counts: Counter[str]) -> tuple[str, str]:
    """(verdict, sentence) for the answers that can tell."""
    total = counts.total()
    if counts[ADAPTER] == total:
        return ADAPTER, f"What is served is the adapter: its answer came to all {total} prompts that can tell."
    if counts[BASE] == total:
        return BASE, (
            f"What is served is the base: its answer came to all {total} prompts that can tell, as if there were no "
            "adapter. Look which model the request named, whether the server loaded the adapter, and at which scale."
        )
    return NEITHER, (
        f"What is served is neither: of {total} prompts that can tell, {counts[ADAPTER]} got the adapter's answer, "
        f"{counts[BASE]} the base's and {counts[NEITHER]} another text. Look at the scale, at the chat template, at "
        "the order of the rows in q and k, and whether the server samples."
    )
