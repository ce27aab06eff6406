"""One notebook, two sizes: ``LORA_EDU_RUN=quick`` (the default, for two CPU cores) or ``full`` (for a GPU)."""

from typing import TypeVar

from lora_edu.quick import is_quick

Size = TypeVar("Size")


def sized(quick: Size, full: Size) -> Size:
    """The first value in a quick run, the second in a full one. The outputs that the course stores are quick ones.

    Raises:
        ValueError: if ``LORA_EDU_RUN`` is set to another word.
    """
    return quick if is_quick() else full
