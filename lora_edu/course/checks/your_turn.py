"""``use``: what a lesson goes on with after a *Your turn* cell."""

from collections.abc import Callable
from typing import Any

from lora_edu.course.checks.report import Report


def use(mine: Any, *, otherwise: Any, check: Callable[..., Report], hint: int = 1) -> Any:
    """Try the reader's version, say what the check finds, and return the one that the lesson goes on with.

    Args:
        mine: the function or class that the reader wrote in the cell before.
        otherwise: the library's, or a stand-in from the cell itself; returned if ``mine`` does not pass.
        check: a check of ``lora_edu.course.checks``.
        hint: how much help it gives: 1 the symptom, 2 also a question, 3 also the fix.
    """
    if check(mine, hint=hint):
        return mine
    name = getattr(otherwise, "__name__", "version")
    whose = "the library's " if str(getattr(otherwise, "__module__", "")).startswith("lora_edu") else ""
    print(f"Until yours passes, the lesson goes on with {whose}{name}.")
    return otherwise
