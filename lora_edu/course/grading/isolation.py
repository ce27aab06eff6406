"""Isolation by bubblewrap: the command that starts a process in a sandbox, and whether that works on this machine.

Inside are the system's programs and libraries, this Python, and the course's package, data and cache, all read-only;
the few folders of a station, which can be written; no network, no home folder, no solutions, nobody else's files. It
needs no rights: bubblewrap uses the kernel's user namespaces.
"""

import os
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from lora_edu.files import ROOT, cache_path, data_folder
from lora_edu.quick import ENVIRONMENT

STATION_INSIDE = Path("/run/lora-edu")  # where a station's folder is, seen from inside
WRITABLE = ("notebook", "home", "tmp", "shm", "sockets")  # what is in it
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store")
MACHINE = ("/sys/devices/system", "/etc/alternatives", "/etc/fonts", "/etc/group", "/etc/ld.so.cache",
           "/etc/ld.so.conf.d", "/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd")  # fmt: skip
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV",
             "SYSTEMROOT", "USERPROFILE", "LOCALAPPDATA")  # fmt: skip


def clean_environment() -> dict[str, str]:
    """What a notebook that is not one's own sees of this environment: no keys, tokens or proxies."""
    return {
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
        **ENVIRONMENT,
        "OMP_NUM_THREADS": "1",  # a class runs several notebooks at once
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "HOME": str(Path.home()),
        "LORA_EDU_CACHE": str(cache_path()),
        "LORA_EDU_DATA": str(data_folder()),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def sandbox(folder: Path, hidden: Iterable[Path] = ()) -> list[str]:
    """The beginning of a command line: what follows it runs inside, in ``STATION_INSIDE``.

    Args:
        folder: a station's folder; what ``WRITABLE`` names in it can be written.
        hidden: folders that are covered where they would be seen.
    """
    seen = sorted(path for path in _needed() if path.exists())
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--proc", "/proc"]
    command += ["--dev", "/dev", "--bind", f"{folder}/shm", "/dev/shm", "--remount-ro", "/dev"]
    for path in map(Path, SYSTEM):
        link = path.is_symlink()
        command += ["--symlink", os.readlink(path), str(path)] if link else ["--ro-bind-try", str(path), str(path)]
    for place in MACHINE:
        command += ["--ro-bind-try", place, place]
    command += ["--bind", f"{folder}/tmp", "/tmp"]
    for name in mounted_in_tmp():
        command += ["--tmpfs", f"/tmp/{name}"]
    for path in seen:
        command += ["--ro-bind", str(path), str(path)]
    for name in mounted_in_tmp():
        command += ["--remount-ro", f"/tmp/{name}"]
    for path in (path.resolve() for path in hidden):
        if any(path.is_relative_to(place) for place in [*seen, *map(Path, SYSTEM)]):
            command += ["--tmpfs", str(path), "--remount-ro", str(path)]
    for name in WRITABLE:
        command += ["--bind", f"{folder}/{name}", f"{STATION_INSIDE}/{name}"]
    return [*command, "--remount-ro", "/", "--chdir", str(STATION_INSIDE)]


def _needed() -> set[Path]:
    """Python, its packages, and the course: not the repository, which holds solutions and tests."""
    places = [sys.prefix, sys.base_prefix, site.getusersitepackages() if site.ENABLE_USER_SITE else ""]
    places += os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    paths = {Path(place).absolute() for place in places if place}
    paths |= {ROOT / "lora_edu", data_folder().absolute(), cache_path().absolute()}
    paths |= {path.resolve() for path in paths}
    return {path for path in paths if not any(path.is_relative_to(place) for place in SYSTEM)}


def mounted_in_tmp() -> set[str]:
    """Names in a station's /tmp that have to stay: where the course itself lies in /tmp, it is mounted there."""
    parts = [path.parts for path in _needed() if path.exists()]
    return {names[2] for names in parts if names[:2] == ("/", "tmp") and len(names) > 2}


def unavailable() -> str:
    """Why notebooks cannot be isolated on this machine, found by one trial; nothing if they can be."""
    if sys.platform != "linux":
        return "bubblewrap needs Linux"
    if not shutil.which("bwrap"):
        return "bubblewrap (bwrap) was not found (apt install bubblewrap)"
    with tempfile.TemporaryDirectory(prefix="lora-edu-") as folder:
        for name in WRITABLE:
            Path(folder, name).mkdir()
        trial = [*sandbox(Path(folder)), sys.executable, "-I", "-c", "open('tmp/x', 'w')"]
        done = subprocess.run(trial, capture_output=True, text=True, env=clean_environment(), stdin=subprocess.DEVNULL)
    words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"bubblewrap does not work here ({words})" if done.returncode else ""


def decide(say: Callable[[str], None], required: bool = False) -> bool:
    """Whether notebooks will be isolated. Where they cannot be, says so in one line, before anything runs.

    Args:
        say: prints a line.
        required: refuse, where they cannot be.

    Raises:
        RuntimeError: if it is required and cannot be had.
    """
    reason = unavailable()
    if reason and required:
        raise RuntimeError(f"--require-isolation: {reason}; nothing was run")
    if reason:
        say(
            f"no isolation: {reason}. Notebooks run with your rights, and only time, memory and processes are limited; "
            "a container without a network would hold them."
        )
    return not reason
