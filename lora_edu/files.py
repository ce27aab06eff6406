"""Where things lie (the repository, its data, the user's cache), and how a file is written: whole, or not at all."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]  # of the repository, where the package was not installed from a wheel


def data_folder() -> Path:
    """The course's data folder, whether it is there or not: ``LORA_EDU_DATA`` if set, else the repository's."""
    return Path(os.environ.get("LORA_EDU_DATA") or ROOT / "data")


def data_path(*parts: str) -> Path:
    """The path of a file in the course's data folder.

    Raises:
        FileNotFoundError: if the data folder itself is not there (the file may be missing: callers say so better).
    """
    root = data_folder()
    if not root.is_dir():
        raise FileNotFoundError(
            f"no data folder at {root}: set LORA_EDU_DATA to the data/ folder of the course's repository"
        )
    return root.joinpath(*parts)


def cache_path(*parts: str) -> Path:
    """The path of a file in the user's cache: ``LORA_EDU_CACHE`` if set, else the platform's cache folder."""
    home = Path.home()
    if given := os.environ.get("LORA_EDU_CACHE"):
        root = Path(given)
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "lora_edu"
    elif sys.platform == "darwin":
        root = home / "Library" / "Caches" / "lora_edu"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "lora_edu"
    return root.joinpath(*parts)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees either the old one or the whole new one; its folder is made if missing."""
    with draft_of(path) as draft:
        draft.write_bytes(content)


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A draft beside the file, which takes its place when the block ends; with an error it goes, and the file stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
    except OSError as error:  # name the file, and not the draft
        raise OSError(error.errno, error.strerror, str(path)) from None
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.chmod(0o644)  # mkstemp's files are for their owner alone
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock beside the file: of two commands that write it, each would undo what the other recorded.

    The lock ends with the process that holds it, however that ends.

    Raises:
        RuntimeError: if another process holds it.
    """
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RuntimeError(f"{path} is being written by another command: wait, or name another file") from None
    except OSError as error:  # name the file, and not the lock
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes it when it is released
            os.unlink(lock.lock_file)
        lock.release()
