"""Where the jail of ``jail.py`` is not available: refuse, inside Python, what a submission has no business doing.

Python reports such acts to audit hooks, and a hook cannot be taken out again. Code that leaves Python (a compiled
module, ctypes) is not seen: this guard keeps accidents and plain attempts away, not an expert.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LOCAL = ("127.", "::1", "localhost", "0.0.0.0", "::ffff:127.")
CHANGES = {  # events whose first argument, or first two, name what would be changed
    "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.utime": 1,
    "os.rename": 2, "os.link": 2, "os.symlink": 2, "shutil.rmtree": 1, "shutil.move": 2,
}  # fmt: skip
LOOKS = {"os.listdir", "os.scandir", "os.chdir"}
PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def install(work: Path, hidden: Iterable[Path]) -> None:
    """Refuse, from now on and in forked children too: the network, writing outside ``work``, reading ``hidden``,
    other programs, and signals to other processes.

    Args:
        work: the folder that may be written.
        hidden: folders that may not be read.
    """
    free = os.path.realpath(work)
    closed = [os.path.realpath(path) for path in hidden]
    allowed = {"/dev/null", os.devnull}

    def inside(path: str, folder: str) -> bool:
        return path == folder or path.startswith(folder + os.sep)

    def resolved(value: Any) -> str | None:
        return None if value is None or isinstance(value, int) else os.path.realpath(os.fsdecode(value))

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = (*arguments, 0)[:3]
            path = resolved(path)
            writes = any(letter in mode for letter in "wax+") if mode else bool((flags or 0) & WRITING)
            if path and any(inside(path, folder) for folder in closed) and not inside(path, free):
                raise PermissionError(f"the grader does not let a submission read {path}")
            if path and writes and path not in allowed and not inside(path, free):
                raise PermissionError(f"the grader does not let a submission write {path}")
        elif event in LOOKS:
            path = resolved(arguments[0] if arguments and arguments[0] is not None else ".")
            if path and any(inside(path, folder) for folder in closed) and not inside(path, free):
                raise PermissionError(f"the grader does not let a submission look into {path}")
        elif event in CHANGES:
            for path in map(resolved, arguments[: CHANGES[event]]):
                if path and not inside(path, free):
                    raise PermissionError(f"the grader does not let a submission change {path}")
        elif event in PROGRAMS:
            raise PermissionError("the grader does not let a submission start other programs")
        elif event in ("os.kill", "os.killpg") and arguments[0] != os.getpid():
            raise PermissionError("the grader does not let a submission signal other processes")
        elif event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
            address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
            host = address[0] if isinstance(address, tuple) else address
            if isinstance(host, bytes):
                host = host.decode(errors="replace")
            if host and not str(host).startswith(LOCAL):
                raise ConnectionError(f"the grader runs without the network, and something tried to reach {host!r}")

    sys.addaudithook(refuse)
