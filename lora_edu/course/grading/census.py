"""Which processes belong to a submission, what they may take, how much memory they hold, and how to end them all."""

import contextlib
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import psutil

ENOUGH = 100  # processes to measure; when there are more, their number decides

PASSES = 5


class Family:
    """All processes of a submission: those of the jail, or else the child's descendants as far as they were seen.

    Args:
        child: the submission's first process.
        jailed: whether it is in a jail, whose end takes all its processes with it.
    """

    def __init__(self, child: int, jailed: bool):
        self.child, self.jailed = child, jailed
        self.counts_all = False
        self.base = 0
        self.seen: dict[int, psutil.Process] = {}

    def start(self) -> None:
        """The submission is about to begin: what is resident now belongs to the libraries."""
        # In the jail /proc was mounted anew: it shows the submission's processes, and we are not among them.
        self.counts_all = self.jailed and not os.path.exists("/proc/self")
        if not self.counts_all:
            with contextlib.suppress(psutil.Error):
                self.seen[self.child] = psutil.Process(self.child)
        self.base = max(self._sizes())

    def size(self) -> tuple[int, int]:
        """Bytes resident beyond the libraries, of all processes together; and how many processes there are."""
        sizes = self._sizes() if self.base else [0]
        return sum(max(0, size - self.base) for size in sizes), len(sizes)

    def kill(self) -> None:
        """End them all, and wait for the first."""
        with contextlib.suppress(OSError):
            os.killpg(self.child, signal.SIGKILL)  # all at once: one by one, a fork bomb would win
        for _ in range(0 if self.jailed else PASSES):  # those that left the group, and what they started meanwhile
            self._sizes()
            for process in self.seen.values():
                with contextlib.suppress(psutil.Error):
                    process.kill()
        with contextlib.suppress(OSError):
            os.kill(self.child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.child, 0)

    def _sizes(self) -> list[int]:
        if self.counts_all:
            names = [name for name in os.listdir("/proc") if name.isdigit()]
            return [_resident(name) for name in names[:ENOUGH]] + [0] * len(names[ENOUGH:])
        for process in [psutil.Process(), *self.seen.values()]:  # orphans become our own children
            with contextlib.suppress(psutil.Error):
                self.seen |= {found.pid: found for found in process.children(recursive=True)}
        sizes = []
        for process in self.seen.values():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    sizes.append(process.memory_info().rss)
        return sizes or [0]


def _resident(name: str) -> int:
    """The resident bytes of a process; 0 if it has ended."""
    try:
        return int(Path("/proc", name, "statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def limit_this_process(limits: dict[str, Any]) -> None:
    """Set the kernel's own limits on this process and on each of its children.

    Args:
        limits: the fields of ``sandbox.Limits``.
    """
    seconds = int(2 * limits["seconds"]) + 10
    wanted = {"RLIMIT_CORE": 0, "RLIMIT_CPU": seconds, "RLIMIT_FSIZE": limits["file_bytes"], "RLIMIT_NOFILE": 512}
    if sys.platform == "linux":  # elsewhere address space is reserved without end, or not counted
        wanted["RLIMIT_AS"] = psutil.Process().memory_info().vms + limits["memory"]
        if os.geteuid():  # it counts all processes of a user; root has no such limit
            wanted["RLIMIT_NPROC"] = limits["processes"] + _threads_of_user()
    for name, value in wanted.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def _threads_of_user() -> int:
    numbers = (process.info for process in psutil.process_iter(["uids", "num_threads"]))
    return sum(info["num_threads"] or 0 for info in numbers if info["uids"] and info["uids"].real == os.getuid())
