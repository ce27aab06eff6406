"""The sandbox's two inner processes: the warm one, which forks, and the supervisor, which holds the clock.

Neither ever runs a student's code. See ``sandbox`` for who starts whom.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import pkgutil
import secrets
import select
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_edu
from lora_edu.course.grading import guard, jail
from lora_edu.course.grading.census import Family, limit_this_process
from lora_edu.files import ROOT, cache_path, data_path

TICK = 0.03  # seconds between two looks at memory and processes
PATIENCE = 1.0  # seconds that a submission has beyond its own clock, to stop by itself
MOST_FILES, MOST_BYTES = 200, 16 * 1024**2  # of the files beside a notebook
MOST_WORDS = 2 * 1024**2  # bytes that a submission may send
STATUSES = {"passed", "failed", "not done", "error", "timeout", "memory"}


def warm(control: int) -> None:
    """Import what submissions need, try the jail, and fork a supervisor for each connection that comes."""
    _import_all()
    marking = _nameless("marking")
    snapshot = _nameless("integrity").Snapshot()
    weakness = jail.why_not(ROOT)
    connection = socket.socket(fileno=control)
    connection.sendall(json.dumps({"weakness": weakness}).encode())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system then buries ended supervisors
    own = os.getpid()
    while True:
        message, handles, _, _ = socket.recv_fds(connection, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            with contextlib.suppress(BaseException):
                connection.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                supervise(socket.socket(fileno=handles[0]), own, marking, snapshot, can_jail=not weakness)
            os._exit(0)
        os.close(handles[0])


def _import_all() -> None:
    """Whatever submissions may import: so that every fork has it already, and the snapshot holds it."""
    for name in ("matplotlib.pyplot", "IPython.core.interactiveshell", "peft"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for module in pkgutil.walk_packages(lora_edu.__path__, "lora_edu."):
        if not module.name.startswith("lora_edu.course"):
            importlib.import_module(module.name)


def _nameless(name: str) -> Any:
    """A copy of one of our modules that no import finds."""
    spec = importlib.util.spec_from_file_location("nameless", Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}.py is not beside {__file__}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def supervise(grader: socket.socket, warm_process: int, marking: Any, snapshot: Any, can_jail: bool) -> None:
    """Read one job, run it in a child of its own, and send the outcome.

    Args:
        grader: where the job comes from and the outcome goes.
        warm_process: our parent's number; when it is gone, so is the grader.
        marking: the module of that name.
        snapshot: of the pristine library.
        can_jail: whether this system has a jail to put the submission into.
    """
    with grader.makefile("rb") as stream:
        job = json.loads(stream.read())
    work, hidden = Path(job["work"]), [Path(path) for path in job["hidden"]]
    jailed = can_jail and job["protection"] == "jail"
    guarded = not jailed and job["protection"] != "none"
    files = _read_files(Path(job["files"])) if job["files"] else {}
    ours, theirs = socket.socketpair()
    with contextlib.suppress(OSError):  # if memory runs out on this machine, this is what goes first
        Path("/proc/self/oom_score_adj").write_text("500")
    try:
        if jailed:
            keep = [
                ROOT,
                data_path(),
                cache_path(),
                *(Path(path) for path in [sys.prefix, sys.base_prefix, *sys.path] if path),
            ]
            jail.enter(work, keep, hidden)
        else:
            jail.adopt_orphans()
        jail.die_with_parent()
        child = os.fork()
    except OSError as error:
        grader.sendall(json.dumps({"words": f"the sandbox could not be set up: {error}"}).encode())
        return
    if child == 0:
        try:
            grader.close()
            ours.close()
            os.setsid()
            jail.lock() if jailed else jail.die_with_parent()
            _submission(theirs, job, marking, snapshot, files, work, hidden if guarded else None)
        except BaseException:
            os._exit(1)
        os._exit(0)
    theirs.close()
    outcome = _watch(child, ours, job, jailed, lambda: os.getppid() == warm_process)
    grader.sendall(json.dumps(outcome).encode())


def _submission(
    connection: socket.socket,
    job: dict[str, Any],
    marking: Any,
    snapshot: Any,
    files: dict[str, bytes],
    work: Path,
    closed: list[Path] | None,
) -> None:
    """The student's process: its limits, its folder, then its code."""
    quiet = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(quiet, handle)
    for name in ("notebook", "home", "tmp"):
        (work / name).mkdir()
    for path, content in files.items():
        place = work / "notebook" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    os.chdir(work / "notebook")
    sys.path.append(str(work / "notebook"))
    os.environ.update(HOME=str(work / "home"), TMPDIR=str(work / "tmp"), IPYTHONDIR=str(work / "home" / "ipython"))
    tempfile.tempdir = None
    os.nice(10)  # the supervisor comes first
    channel = marking.Channel(connection)
    shell = marking.make_shell()
    limits = job["limits"]
    limit_this_process(limits)
    if closed is not None:
        guard.install(work, closed)
    channel.send(ready=True)
    channel.receive()
    until = time.monotonic() + limits["seconds"]
    job["deadline"] = lambda: until - time.monotonic()
    marking.Marker(channel, job, snapshot, shell).run()


def _watch(
    child: int, connection: socket.socket, job: dict[str, Any], jailed: bool, wanted: Callable[[], bool]
) -> dict[str, Any]:
    """Hold clock, memory and processes until the submission ends; then kill whatever is left of it."""
    limits, exercises = job["limits"], {check["exercise"] for check in job["checks"]}
    reports: dict[str, tuple[str, str, float]] = {}
    family = Family(child, jailed)
    deadline, step, nonce, received, pending = time.monotonic() + 60, "its start", "", 0, b""
    since = time.monotonic()
    ended, words, started = "error", "", False
    connection.settimeout(PATIENCE)  # nobody makes us wait by not reading
    while not words:
        readable, _, _ = select.select([connection], [], [], TICK)
        data = connection.recv(65536) if readable else b""
        if readable and not data:
            words = f"Python ended in {step} (by the code itself, by a crash, or for lack of memory)"
        received += len(data)
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
                if "ready" in message and not started:
                    started = True
                    family.start()
                    deadline = time.monotonic() + limits["seconds"] + PATIENCE
                    connection.sendall(b"{}\n")
                elif "step" in message:
                    step = str(message["step"])[:60]
                elif "ask" in message and not nonce:
                    nonce = secrets.token_hex(8)
                    connection.sendall(json.dumps({"nonce": nonce}).encode() + b"\n")
                elif "report" in message:
                    right = nonce and message["nonce"] == nonce and message["report"] in exercises - reports.keys()
                    if not right or message["status"] not in STATUSES:
                        raise ValueError
                    nonce, now = "", time.monotonic()
                    reports[message["report"]] = (message["status"], str(message["symptom"]), round(now - since, 2))
                    since = now
                elif "end" in message:
                    ended, words = "ended", "ended"
                else:
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
                words = f"the notebook wrote to the grader's own channel in {step}"
                break
        memory, processes = family.size()
        if not wanted():
            words = "the grader is gone"
        elif not words and received + len(pending) > MOST_WORDS:
            words = f"the notebook flooded the grader in {step}"
        elif not words and memory > limits["memory"]:
            ended, words = "memory", f"took more than {limits['memory'] / 1024**3:g} GiB in {step}"
        elif not words and processes > limits["processes"]:
            words = f"started more than {limits['processes']} processes in {step}"
        elif not words and time.monotonic() > deadline:
            ended, words = "timeout", f"no end after {limits['seconds']:g} s in {step}"
    family.kill()
    return {"reports": reports, "ended": ended, "words": words}


def _read_files(folder: Path) -> dict[str, bytes]:
    """The plain files of a folder by name, so many and so large as fit the limits; links are left out."""
    found: dict[str, bytes] = {}
    left = MOST_BYTES
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(OSError):
            about = path.lstat()
            if (
                stat.S_ISREG(about.st_mode)
                and path.suffix != ".ipynb"
                and about.st_size <= left
                and len(found) < MOST_FILES
            ):
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
                left -= about.st_size
    return found
