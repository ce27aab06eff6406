"""A Linux jail for one submission: no network, a read-only machine, and one small folder of its own that vanishes.

Kernel namespaces do the work, without root rights: a user namespace for the right to make the others, a mount namespace
in which everything is read-only and private places are covered, a network namespace with nothing but loopback, and a
process namespace whose end kills every process in it. ``enter`` and ``lock`` are called one after the other, with a
fork between them; a kernel that refuses any step raises OSError.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # NS UTS IPC USER PID NET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # this call has one number on every architecture
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
CAPABILITY_VERSION_3 = 0x20080522
COVERED = ("/run", "/tmp", "/var/tmp", "/dev")  # where other programs' sockets and devices are
DEVICES = ("null", "zero", "full", "random", "urandom")
MOST_PROCESSES = 400  # a fork bomb stops there, also root's, until the supervisor ends it
WORK_SIZE = 512 * 1024**2  # bytes that a submission may write in all


def enter(work: Path, keep: Iterable[Path], hidden: Iterable[Path]) -> None:
    """Put this process into the new namespaces; its next child is the first process of the jail.

    Args:
        work: the only folder that can be written; it starts empty, lives in memory, and ends with the jail.
        keep: folders that stay readable although the home folder or ``/tmp`` around them is covered.
        hidden: folders that are covered with nothing.

    Raises:
        OSError: naming the step that this kernel, or the container around it, does not allow.
    """
    uid, gid = os.geteuid(), os.getegid()
    covers = [Path(os.path.realpath(path)) for path in (*COVERED, Path.home())]
    covers = [path for path in covers if path.is_dir() and path != Path("/")]
    keep = [Path(os.path.realpath(path)) for path in keep]
    hidden = [Path(os.path.realpath(path)) for path in hidden]
    work = Path(os.path.realpath(work))
    _call("unshare", NEW_NAMESPACES)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _loopback_up()
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    pinned = {
        path: os.open(path, os.O_PATH) for path in keep if path.exists() and any(map(path.is_relative_to, covers))
    }
    pinned |= {path: os.open(path, os.O_PATH) for path in (Path("/dev", name) for name in DEVICES) if path.exists()}
    for cover in covers:
        if cover.is_dir():  # not one inside another that is covered already
            _mount("tmpfs", str(cover), "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for path, handle in sorted(pinned.items()):
        source = f"/proc/self/fd/{handle}"
        if path in covers or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if os.path.isdir(source) else path.touch()
            _mount(source, str(path), None, MS_BIND | MS_REC)
        os.close(handle)
    Path("/dev/fd").symlink_to("/proc/self/fd")
    work.mkdir(parents=True, exist_ok=True)
    shared = Path("/dev/shm")
    shared.mkdir(exist_ok=True)
    _read_only("/")
    for path in hidden:
        if path.is_dir():
            _mount("tmpfs", str(path), "tmpfs", MS_RDONLY | MS_NOSUID, "size=4k,mode=555")
    for path in (work, shared):
        _mount("tmpfs", str(path), "tmpfs", MS_NOSUID | MS_NODEV, f"size={WORK_SIZE},mode=700")


def lock() -> None:
    """In the first process of the jail: see only the jail's own processes, and give up all rights for good.

    Raises:
        OSError: if a right could not be given up.
    """
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    with contextlib.suppress(OSError):  # some containers refuse it; the old /proc is read-only, at least
        _mount("proc", "/proc", "proc", flags)
        if _kernel() >= (6, 14):  # from then on this number is the namespace's own; before, it is the whole machine's
            with contextlib.suppress(OSError):
                Path("/proc/sys/kernel/pid_max").write_text(str(MOST_PROCESSES))
        _mount(None, "/proc", None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
    die_with_parent()
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(64):
        try:
            _call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
        except OSError:
            break  # the last one that this kernel knows is behind us
    header, nothing = struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    _call("capset", ctypes.c_char_p(header), ctypes.c_char_p(nothing))


def why_not(course: Path) -> str:
    """Why there can be no jail on this machine, found by trying one; nothing if there can.

    Args:
        course: a folder that must be readable in the jail, and not writable.
    """
    if sys.platform != "linux":
        return "this is not Linux"
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        if (probe := os.fork()) == 0:
            try:
                enter(Path(folder), [course], [])
                if (child := os.fork()) == 0:
                    os._exit(_try_inside(Path(folder), course))
                _, code = os.waitpid(child, 0)
                os.write(writer, b"its walls do not hold" if code else b"")
            except OSError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            reason = stream.read()
        os.waitpid(probe, 0)
    return reason


def _try_inside(folder: Path, course: Path) -> int:
    try:
        lock()
        (folder / "x").write_text("x")
    except OSError:
        return 1
    return 1 if os.access(course, os.W_OK) or not os.access(course, os.R_OK) else 0


def adopt_orphans() -> None:
    """Make processes whose parents ended our own children, so that they can still be found and killed (Linux)."""
    if sys.platform == "linux":
        _call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however it ends."""
    if sys.platform == "linux":
        _call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    wrapped = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    if getattr(libc, name)(*wrapped) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _kernel() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    texts = [None if text is None else ctypes.c_char_p(text.encode()) for text in (source, target, kind)]
    try:
        _call("mount", *texts, flags, ctypes.c_char_p(options.encode()))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({kind or 'mount'} on {target})") from None


def _read_only(path: str) -> None:
    """Every mount from ``path`` down becomes read-only, by one call of Linux 5.12."""
    wanted = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (AT_FDCWD, ctypes.c_char_p(path.encode()), AT_RECURSIVE, ctypes.c_char_p(wanted), len(wanted))
    if libc.syscall(SYS_MOUNT_SETATTR, *arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount_setattr: {os.strerror(code)}")


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = struct.pack("16sH14x", b"lo", 0x1)  # IFF_UP
        fcntl.ioctl(handle, 0x8914, request)  # SIOCSIFFLAGS
