"""What an inspection says: findings, each with a level, a sentence, the way out, and the lesson that explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEVELS = ("ok", "note", "wrong")


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: "ok"; "note", which is good to know; or "wrong", which makes the exit status 1.
        code: a short name for programs, such as "dead-factors"; it stays the same when the sentence changes.
        sentence: what is the case.
        lesson: the number of the lesson that explains it, such as "08".
        way_out: what to do about it; empty where there is nothing to do.
        names: the modules, tensors or files that it is about.
    """

    level: str
    code: str
    sentence: str
    lesson: str
    way_out: str = ""
    names: tuple[str, ...] = ()


def some(names: Sequence[str], most: int = 2) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def sentence(error: Exception) -> str:
    """An error's message as a sentence."""
    text = str(error)
    return text[:1].upper() + text[1:] + "."


def counted(number: int, noun: str) -> str:
    """``1 tensor``, ``210 tensors``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
