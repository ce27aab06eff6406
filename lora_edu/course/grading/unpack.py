"""Zips as students hand them in: unpacked into a folder of their own, and nothing in them is trusted."""

import os
import shutil
import stat
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from lora_edu.course.notebooks.stored import NotebookError

MOST_FILES, MOST_BYTES = 1000, 256 * 1024**2  # of one zip
DEEPEST = 20  # folders inside each other
OLDEST = 1990  # zips that have no times say 1980
CANNOT = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, NotImplementedError)


def unpack(archive: Path, target: Path) -> list[tuple[str, str]]:
    """Unpack the plain files of a zip, each with the time that the zip gives for it.

    Args:
        archive: the zip.
        target: a folder, which is made; nothing is written outside of it.

    Returns:
        what was not unpacked, as (name in the zip, reason).

    Raises:
        NotebookError: if it is no zip that can be read.
    """
    try:
        zipped = zipfile.ZipFile(archive)
    except CANNOT as error:
        raise NotebookError(f"no zip that can be read ({_words(error)})") from None
    refused: list[tuple[str, str]] = []
    left = MOST_BYTES
    target.mkdir(parents=True, exist_ok=True)
    with zipped:
        entries = [entry for entry in zipped.infolist() if not entry.is_dir()]
        for entry in entries[:MOST_FILES]:
            parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
            reason = _refusal(entry, parts, left)
            try:
                if not reason:
                    _extract(zipped, entry, target.joinpath(*parts), archive)
                    left -= entry.file_size
            except FileExistsError:
                reason = "the zip holds this name twice"
            except CANNOT as error:
                reason = _words(error)
                with suppress(OSError):
                    target.joinpath(*parts).unlink()  # half a file
            if reason:
                refused.append((entry.filename, reason))
    if len(entries) > MOST_FILES:
        refused.append(("", f"the zip holds {len(entries)} files; only the first {MOST_FILES} were unpacked"))
    return refused


def _refusal(entry: zipfile.ZipInfo, parts: tuple[str, ...], left: int) -> str:
    if not parts or parts[0] == "/" or ".." in parts or PureWindowsPath(*parts).drive:
        return "its name leads out of the zip"
    if len(parts) > DEEPEST:
        return f"it lies in more than {DEEPEST - 1} folders inside each other"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "a link, not a file"
    if entry.flag_bits & 1:
        return "locked with a password"
    return f"the zip holds more than {MOST_BYTES // 1024**2} MB" if entry.file_size > left else ""


def _extract(zipped: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, archive: Path) -> None:
    """Write one entry; ``zipfile`` reads no more of it than the size that it states."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipped.open(entry) as source, path.open("xb") as file:
        shutil.copyfileobj(source, file)
    os.utime(path, (made := _time(entry, archive), made))


def _time(entry: zipfile.ZipInfo, archive: Path) -> float:
    with suppress(ValueError, OverflowError):
        if entry.date_time[0] >= OLDEST:
            return time.mktime((*entry.date_time, 0, 0, -1))
    return archive.stat().st_mtime


def _words(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
