"""One notebook, two sizes: ``LORA_EDU_RUN=quick`` (the default, for two CPU cores) or ``full`` (for a GPU)."""

import os
from typing import TypeVar

Size = TypeVar("Size")


def sized(quick: Size, full: Size) -> Size:
    """The first value in a quick run, the second in a full one. The outputs that the course stores are quick ones.

    Raises:
        ValueError: if ``LORA_EDU_RUN`` is set to another word.
    """
    run = os.environ.get("LORA_EDU_RUN", "quick")
    if run not in ("quick", "full"):
        raise ValueError(f"LORA_EDU_RUN={run!r}: expected 'quick' (two CPU cores) or 'full' (a GPU)")
    return full if run == "full" else quick
