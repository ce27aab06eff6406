"""The limits of a notebook, and a thread that sees from outside that none is passed: time, memory, processes, disk."""

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lora_edu.course.grading.station import START_SECONDS, Station

TICK = 0.2  # seconds between two looks
MOST_FILES = 20_000  # that a notebook may make
MOST_BYTES = 64 * 1024**2  # that a notebook may send to the grader


@dataclass(frozen=True)
class Limits:
    """What one notebook may take.

    Attributes:
        seconds: in all.
        memory: bytes beyond what the libraries take, of all its processes together.
        processes: how many at once.
        file_bytes: of one file; all files together may hold four times as much.
    """

    seconds: float = 180
    memory: int = 4 * 1024**3
    processes: int = 64
    file_bytes: int = 256 * 1024**2


class Watch(threading.Thread):
    """Looks at a notebook's processes and files until ``stopped`` is set, and ends them when a limit is passed.

    Attributes:
        step: where the notebook is, for the words; whoever runs it writes it here.
        received: bytes that the notebook has sent; whoever receives them adds them here.
        found: the status and the words, when a limit was passed.
    """

    def __init__(self, station: Station, limits: Limits):
        super().__init__(daemon=True, name="watch")
        self.station, self.limits = station, limits
        self.step, self.received = "its start", 0
        self.found: tuple[str, str] | None = None
        self.until = time.monotonic() + START_SECONDS
        self.stopped = threading.Event()

    def begin(self) -> None:
        """The notebook's own time begins now."""
        self.until = time.monotonic() + self.limits.seconds

    def left(self) -> float:
        """Seconds until the end."""
        return self.until - time.monotonic()

    def run(self) -> None:
        """Look at every tick."""
        while not self.found and not self.stopped.wait(TICK):
            try:
                self.found = self._look()
            except Exception as error:  # a notebook that nobody watches has to end
                self.found = "error", f"{self.step} could not be watched: {error!r}"
        if self.found:
            self.station.kill()

    def _look(self) -> tuple[str, str] | None:
        limits, count = self.limits, len(self.station.processes())
        if self.left() < 0:
            return "timeout", f"no end after {limits.seconds:g} s in {self.step}"
        if count > limits.processes:
            return "error", f"started more than {limits.processes} processes in {self.step}"
        if self._memory(exact=False) > limits.memory and self._memory(exact=True) > limits.memory:
            return "memory", f"took more than {limits.memory / 1024**3:g} GiB in {self.step}"
        if self.received > MOST_BYTES:
            return "error", f"sent more than {MOST_BYTES // 1024**2} MB of output in {self.step}"
        if _is_full(self.station.folder, 4 * limits.file_bytes):
            return "error", f"wrote too many or too large files in {self.step}"
        return None

    def _memory(self, exact: bool) -> int:
        """Bytes of all processes beyond the libraries'; exact: what they share is counted once (Linux; it is slow)."""
        total = -self.station.base
        for process in self.station.seen:
            with suppress(psutil.Error):
                about = process.memory_full_info() if exact else process.memory_info()
                total += getattr(about, "pss", about.rss)
        return total


def _is_full(folder: Path, most_bytes: int) -> bool:
    count = size = 0
    places = [str(folder)]
    while places and count <= MOST_FILES and size <= most_bytes:
        with suppress(OSError), os.scandir(places.pop()) as entries:
            for entry in entries:
                count += 1
                size += entry.stat(follow_symlinks=False).st_size
                if entry.is_dir(follow_symlinks=False):
                    places.append(entry.path)
    return count > MOST_FILES or size > most_bytes
