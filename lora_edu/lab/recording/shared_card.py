"""Let several processes share one GPU at the same time, through NVIDIA's Multi-Process Service where it can be started.

Without it their kernels take turns; a run of a small model leaves most of a large GPU idle either way.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CONTROL = "nvidia-cuda-mps-control"
SECONDS = 60
TRY = "import torch; torch.ones(1, device='cuda').sum().item()"


@contextmanager
def shared_card(processes: int) -> Iterator[bool]:
    """Inside, processes that are started share the GPU by the service; yields whether they do.

    The service is this block's own, with its pipes in a folder of its own, and ends with it; no setting of the card is
    touched. Where there is no GPU, one process or no such program, or where a first process cannot use it, there is
    none, and everything else goes on as well.
    """
    if processes < 2 or not torch.cuda.is_available() or not shutil.which(CONTROL):
        yield False
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        named = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        before = {name: os.environ.get(name) for name in named}
        os.environ.update(named)
        works = _succeeds(CONTROL, "-d") and _succeeds(sys.executable, "-c", TRY)
        if not works:
            _end(before)
        try:
            yield works
        finally:
            if works:
                _end(before)


def _end(before: dict[str, str | None]) -> None:
    """Stop the service, and forget where it was."""
    _succeeds(CONTROL, words="quit\n")
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def _succeeds(*command: str, words: str = "") -> bool:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": SECONDS}
    try:
        return subprocess.run(command, input=words, text=True, **quiet).returncode == 0  # type: ignore[call-overload]
    except (OSError, subprocess.TimeoutExpired):
        return False
