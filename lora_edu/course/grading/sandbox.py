"""Run submissions apart from everything: a warm process forks a supervisor for each, which forks the submission's own.

    grader  ──  warm process  ──  supervisor  ──  submission
                (libraries)       (clock)         (student's code, then the course's checks)

The warm process imports PyTorch and the checks once; it never sees a submission. The supervisor enters the jail, counts
time, memory and processes from outside, and is the only one that talks to the grader.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_edu.course.notebooks.execute import ENVIRONMENT
from lora_edu.course.notebooks.stored import BUILD, SOLUTIONS
from lora_edu.files import ROOT, cache_path, data_path

HIDDEN = (SOLUTIONS, ROOT / ".git", BUILD, ROOT / "work", ROOT / "tests")
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV")
START_SECONDS = 180  # for importing PyTorch on a slow disk


@dataclass
class Limits:
    """What one submission may take: seconds in all, bytes beyond what the libraries take, processes."""

    seconds: float = 180
    memory: int = 4 * 1024**3
    processes: int = 64
    file_bytes: int = 256 * 1024**2


@dataclass
class Outcome:
    """What came of one submission: its checks' (status, symptom, seconds) by exercise, and how it ended."""

    reports: dict[str, tuple[str, str, float]] = field(default_factory=dict)
    ended: str = "error"
    words: str = ""


class Sandbox:
    """The warm process, and how to send it submissions. Use it in a ``with``; ``weakness`` says why there is no jail.

    Args:
        hidden: folders that no submission may see, beside the solutions.
        protection: "jail" (where the system has none: "guard"), "guard" inside Python, or "none" for one's own code.

    Raises:
        RuntimeError: if this system has no fork, or the warm process does not start.
    """

    def __init__(self, hidden: list[Path] | None = None, protection: str = "jail"):
        if not hasattr(os, "fork"):
            raise RuntimeError("grading needs Linux or macOS (each notebook is a forked process): on Windows use WSL")
        self.hidden, self.protection = [*HIDDEN, *(hidden or [])], protection
        self.lock = threading.Lock()
        self.control, theirs = socket.socketpair()
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        code = f"from lora_edu.course.grading.supervisor import warm; warm({theirs.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            env=clean_environment(),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.complaints,
            start_new_session=True,
        )
        theirs.close()
        self.control.settimeout(START_SECONDS)
        greeting = self.control.recv(4096)
        if not greeting:
            self.complaints.seek(0)
            last = self.complaints.read().decode(errors="replace")[-300:]
            raise RuntimeError(f"the grader's process did not start: {last}")
        self.weakness: str = json.loads(greeting)["weakness"]

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.control.close()
        self.process.kill()  # it holds nothing; a supervisor that is still there sees it gone, and ends what it watches
        self.process.wait()
        self.complaints.close()

    def run(
        self, cells: list[tuple[int, str]], checks: list[dict[str, Any]], limits: Limits, files: Path | None = None
    ) -> Outcome:
        """Run one submission to its end. May be called from several threads at once.

        Args:
            cells: the code cells, each with its place in the notebook.
            checks: "name", "exercise", "arguments" (texts) and "after" (a cell's place, or None for the end) of each.
            limits: what it may take.
            files: a folder whose files lie beside the notebook; copies of them do so in the sandbox.
        """
        work = Path(tempfile.mkdtemp(prefix="lora-edu-"))
        ours, theirs = socket.socketpair()
        try:
            with self.lock:
                socket.send_fds(self.control, [b"!"], [theirs.fileno()])
            theirs.close()
            job = {
                "cells": cells,
                "checks": checks,
                "limits": vars(limits),
                "work": str(work),
                "files": str(files or ""),
            }
            job |= {"protection": self.protection, "hidden": [str(path) for path in self.hidden]}
            ours.settimeout(limits.seconds + START_SECONDS)
            ours.sendall(json.dumps(job).encode())
            ours.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: ours.recv(65536), b""))
            return Outcome(**json.loads(answer)) if answer else Outcome(words="the sandbox ended without an answer")
        except OSError as error:
            return Outcome(words=f"the sandbox could not be used: {error}")
        finally:
            ours.close()
            _remove(work)


def clean_environment() -> dict[str, str]:
    """What the warm process sees of this one's environment: no keys, tokens or proxies."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {
        **kept,
        **ENVIRONMENT,
        "OMP_NUM_THREADS": "1",  # a class runs several submissions at once
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "MPLBACKEND": "Agg",
        "HOME": str(Path.home()),
        "LORA_EDU_CACHE": str(cache_path()),
        "LORA_EDU_DATA": str(data_path()),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _remove(folder: Path) -> None:
    """Remove a working copy, also one whose folders were made unreadable."""
    for place, _, _ in os.walk(folder, topdown=True):
        try:
            os.chmod(place, 0o700)
        except OSError:
            continue
    shutil.rmtree(folder, ignore_errors=True)
