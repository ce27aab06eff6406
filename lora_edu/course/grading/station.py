"""A station: where notebooks run, one after another. A folder that is emptied after each, and a process that is warm.

Importing PyTorch and the checks takes seconds, so that is done once for a station (``warm``), which then forks a kernel
for each notebook. All of it runs inside bubblewrap where the station is isolated. Where fork is not to be had or not to
be relied on (Windows, macOS), a station is the folder alone, and Jupyter starts each kernel anew.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lora_edu.course.grading.isolation import STATION_INSIDE, WRITABLE, clean_environment, mounted_in_tmp, sandbox
from lora_edu.course.grading.walk import beside
from lora_edu.course.notebooks.execute import environment

FORKS = sys.platform == "linux"
START_SECONDS = 180  # for importing PyTorch on a slow disk
ATTEMPTS = 20  # to end processes that start others meanwhile
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
# bubblewrap ends with the thread that started it, so it has to be one that stays.
_starter = ThreadPoolExecutor(1, thread_name_prefix="station")


class StationError(RuntimeError):
    """The station did not start, or has ended."""


class Station:
    """Where one notebook at a time runs; ``start`` it before use, ``close`` it in the end.

    Args:
        isolated: inside bubblewrap.
        own: the notebooks are the learner's own, and see the environment as it is.
        hidden: folders that no notebook may see.

    Attributes:
        folder: its folder; ``inside`` is the same folder, as a notebook sees it.
        process: bubblewrap or the warm process; None where kernels are not forked.
        kernel: the process that runs the present notebook.
        base: resident bytes of the warm process, which are no notebook's.
    """

    def __init__(self, isolated: bool = False, own: bool = False, hidden: Iterable[Path] = ()):
        self.folder = Path(tempfile.mkdtemp(prefix="lora-edu-"))
        self.inside = STATION_INSIDE if isolated else self.folder
        for name in WRITABLE:
            (self.folder / name).mkdir()
        self.isolated, self.own, self.closed, self.base = isolated, own, False, 0
        self.environment = (environment() if own else clean_environment()) | {"MPLBACKEND": "Agg"}
        if not own:  # where the course itself lies in /tmp, the sandbox has no other
            self.environment["TMPDIR"] = str(self.inside / "tmp")
        self.process: Any = None  # a psutil.Popen
        self.kernel: psutil.Process | None = None
        self.mounted = mounted_in_tmp() if isolated else set()
        self.resident: set[psutil.Process] = set()  # bubblewrap's processes and the warm one
        self.seen: set[psutil.Process] = set()  # the notebook's
        if FORKS:
            self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
            command = sandbox(self.folder, hidden) if isolated else []
            command += [sys.executable, "-P", "-m", "lora_edu.course.grading.warm"]
            pipe, options = subprocess.PIPE, {"env": self.environment, "cwd": self.folder, "start_new_session": True}
            self.process = _starter.submit(
                psutil.Popen, command, stdin=pipe, stdout=pipe, stderr=self.log, **options
            ).result()

    def start(self) -> None:
        """Wait until the warm process has imported everything.

        Raises:
            StationError: with its last words, if it does not.
        """
        if self.process:
            self._wait(START_SECONDS)
            self.resident = {psutil.Process(self.process.pid), *self.process.children(recursive=True)}
            self.base = max(process.memory_info().rss for process in self.resident)

    def fill(self, files: Path) -> None:
        """Copy the plain files of a folder, so many and so large as fit the limits, to where the notebook will run."""
        for path in beside(files)[0]:
            target = self.folder / "notebook" / path.relative_to(files)
            with suppress(OSError):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target, follow_symlinks=False)

    def launch(self, connection: Mapping[str, Any]) -> psutil.Process:
        """Fork a kernel, and wait until it listens.

        Args:
            connection: what Jupyter writes into a connection file.

        Raises:
            StationError: if the warm process has ended.
        """
        inside = {"ip": str(self.inside / "sockets" / "k"), "key": connection["key"].decode()}
        (self.folder / "sockets" / "kernel.json").write_text(json.dumps({**connection, **inside}))
        home, temporary = str(self.inside / "home"), str(self.inside / "tmp")
        places = {} if self.own else {"HOME": home, "IPYTHONDIR": f"{home}/ipython", "TMPDIR": temporary}
        request = {"connection_file": str(self.inside / "sockets" / "kernel.json"), "environment": places}
        with suppress(OSError):  # it has ended, as _wait will find
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        self._wait(START_SECONDS / 3)
        self.kernel = next(iter(self.processes()), None)
        if self.kernel is None:
            raise StationError("the kernel ended at once")
        return self.kernel

    def _wait(self, seconds: float) -> None:
        """Wait for the warm process's answer."""
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        answer = os.read(self.process.stdout.fileno(), 100) if poll.poll(seconds * 1000) else b""
        if not answer:
            self.log.seek(0)
            last = " ".join(self.log.read().decode(errors="replace").split())[-300:]
            raise StationError(f"the process that runs notebooks does not answer: {last}")

    def processes(self) -> set[psutil.Process]:
        """What the present notebook has running: its kernel, and all that was started from there."""
        found = self.seen | ({self.kernel} if self.kernel else set())
        for process in {self.process} if self.process and self.process.poll() is None else set(found):
            with suppress(psutil.Error):
                found |= set(process.children(recursive=True))
        self.seen = {process for process in found - self.resident if _status(process) not in ENDED}
        return self.seen

    def kill(self) -> bool:
        """End the present notebook's processes. Whether that succeeded."""
        for _ in range(ATTEMPTS):
            if self.kernel and FORKS:
                with suppress(OSError):
                    os.killpg(self.kernel.pid, signal.SIGKILL)  # all at once: one by one, a fork bomb would win
            for process in self.processes():
                with suppress(psutil.Error):
                    process.kill()
            if not self.processes():
                return True
            time.sleep(0.01)
        return False

    def reset(self) -> bool:
        """End and remove what the last notebook left. Whether the station is as it was, and can take another."""
        clean = self.kill() and self.is_ready()
        self.kernel = None
        try:
            for name in WRITABLE:
                os.chmod(self.folder / name, 0o700)
                for entry in os.scandir(self.folder / name):
                    if name == "tmp" and entry.name in self.mounted:
                        continue
                    shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
        except (OSError, RecursionError):
            return False
        return clean

    def is_ready(self) -> bool:
        """Whether all that has to run is running, and not stopped by a notebook."""
        wrong = (*ENDED, psutil.STATUS_STOPPED)
        return not self.closed and not any(_status(process) in wrong for process in self.resident)

    def close(self) -> None:
        """End everything and remove the folder."""
        if self.closed:
            return
        self.closed = True
        if not self.isolated:
            self.kill()
        for process in self.resident:  # the sandbox's first process takes all others in it with it
            with suppress(psutil.Error):
                process.kill()
        if self.process:
            with suppress(psutil.Error):
                self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout, self.log):
                with suppress(OSError):
                    stream.close()
        with suppress(OSError, RecursionError):
            shutil.rmtree(self.folder)
        if self.folder.exists() and FORKS:  # somebody made it deep, or unreadable
            subprocess.run(["chmod", "-R", "u+rwX", self.folder], stderr=subprocess.DEVNULL)
            subprocess.run(["rm", "-rf", self.folder], stderr=subprocess.DEVNULL)


def _status(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.status() if process.is_running() else psutil.STATUS_DEAD
    return psutil.STATUS_DEAD
