"""The quick run, in which the stored outputs were made: on the CPU, two threads, fixed seeds. Full runs use a GPU.

``LORA_EDU_RUN`` says which: ``quick`` (the default) or ``full``.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What every executed notebook sees, in the course's runner and in the tests: the stored outputs depend on it.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "2",
    "GOMP_SPINCOUNT": "10000",  # a waiting thread spins for some 10 µs, then sleeps: fast alone, bearable when busy
    "LORA_EDU_RUN": "quick",
    "LORA_EDU_PROGRESS": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
# Of these, what can still be set when a notebook that nobody prepared imports the library, in VS Code for example.
# The progress bars stay on there, and the network is not shut off: a learner may load any model.
SET_ON_IMPORT = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM", "CUBLAS_WORKSPACE_CONFIG")


def is_quick() -> bool:
    """Whether this is a quick run, which stays on the CPU even where there is a GPU: its outputs are compared.

    Raises:
        ValueError: if ``LORA_EDU_RUN`` is set to another word.
    """
    run = os.environ.get("LORA_EDU_RUN", "quick")
    if run not in ("quick", "full"):
        raise ValueError(f"LORA_EDU_RUN={run!r}: expected 'quick' (two CPU cores) or 'full' (a GPU)")
    return run == "quick"


@contextmanager
def full_size() -> Iterator[None]:
    """Inside, and in processes started inside, it is a full run; also as a decorator."""
    before = os.environ.get("LORA_EDU_RUN")
    os.environ["LORA_EDU_RUN"] = "full"
    try:
        yield
    finally:
        os.environ.pop("LORA_EDU_RUN") if before is None else os.environ.update(LORA_EDU_RUN=before)


def prepare_kernel() -> None:
    """In a Jupyter kernel and a quick run, set what the stored outputs depend on. What is set already stays."""
    if "ipykernel" not in sys.modules or os.environ.get("LORA_EDU_RUN", "quick") != "quick":
        return
    threads_given = "OMP_NUM_THREADS" in os.environ
    for name in SET_ON_IMPORT:
        os.environ.setdefault(name, ENVIRONMENT[name])
    if not threads_given and "torch" in sys.modules:  # too late for the variable: PyTorch has read it
        sys.modules["torch"].set_num_threads(int(ENVIRONMENT["OMP_NUM_THREADS"]))
