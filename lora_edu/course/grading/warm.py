"""The warm process of a station: it imports the library and the checks once, and forks a kernel for each notebook.

Each line on its standard input, {"connection_file": …, "environment": {…}}, is answered by a line when the new kernel
listens. It runs no code of a notebook itself. When its input ends, so does it, and its kernel with it.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

IMPORTS = ("lora_edu.course.checks", "lora_edu.course.grading.kernel", "matplotlib.pyplot", "peft",
           "ipykernel.kernelapp", "ipykernel.debugger")  # fmt: skip
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36


def main() -> None:
    """Import, say so, and fork a kernel for each request."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    for name in IMPORTS:
        with contextlib.suppress(ModuleNotFoundError):  # not installed; what is broken should be said
            importlib.import_module(name)
    with contextlib.suppress(OSError):  # if memory runs out on this machine, this is what goes first
        Path("/proc/self/oom_score_adj").write_text("500")
    _control(PR_SET_CHILD_SUBREAPER, 1)  # a process whose parent ended becomes our child, and is found
    _control(PR_SET_DUMPABLE, 0)  # no kernel can write into this process, which will fork the next one
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system then buries those that ended
    gc.collect()
    gc.freeze()
    answers.write("ready\n")
    kernel = 0
    for line in sys.stdin:
        kernel = os.fork()
        if kernel == 0:
            try:
                _become_kernel(json.loads(line), answers)
            finally:
                os._exit(1)
    with contextlib.suppress(OSError):
        os.killpg(kernel, signal.SIGKILL) if kernel else None


def _become_kernel(request: dict[str, Any], answers: TextIO) -> None:
    from ipykernel.kernelapp import IPKernelApp
    from traitlets.config import Config

    os.setsid()
    os.nice(10)  # the grader comes first
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _control(PR_SET_DUMPABLE, 1)
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    nothing = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(nothing, handle)
    settings = {"connection_file": request["connection_file"], "capture_fd_output": False}
    app = IPKernelApp.instance(config=Config({"IPKernelApp": settings, "HistoryManager": {"enabled": False}}))
    app.initialize([])
    answers.write("ready\n")
    answers.close()
    app.start()


def _control(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
