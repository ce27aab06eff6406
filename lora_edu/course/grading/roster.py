"""The list of who takes part, and which folder is whose where the two do not spell a name alike."""

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lora_edu.course.grading.texts import plain

MOODLE = re.compile(r"^(.+)_\d+_assignsubmission_\w+$")  # the folders of a download: Ada Lovelace_4711_assign…


def read_roster(path: Path) -> list[str]:
    """The students on a roster: the column "student" of a CSV file, or a plain list with one name in a line.

    Raises:
        ValueError: if it is neither, or names somebody twice.
    """
    rows = read_rows(path)
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if "student" in header:
        cells = [row[header.index("student")] for row in rows[1:] if len(row) > header.index("student")]
    elif all(len(row) <= 1 for row in rows):
        cells = [row[0] for row in rows if row]
    else:
        raise ValueError(
            f"{path} has no column 'student' (it has: {', '.join(rows[0])}): give this name to the column whose cells "
            "are the names of the folders that were handed in"
        )
    names = [name for name in (plain(unicodedata.normalize("NFC", cell)) for cell in cells) if name]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        raise ValueError(f"{path} names {twice[0]!r} twice" if twice else f"{path} names nobody")
    return names


def read_rows(path: Path) -> list[list[str]]:
    """The rows of a CSV file as spreadsheets write it: in UTF-8, with commas, semicolons or tabs.

    Raises:
        ValueError: if it has another encoding, or is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not in UTF-8: save it again from the spreadsheet as CSV UTF-8") from None
    first = text.partition("\n")[0]
    try:
        return list(csv.reader(text.splitlines(keepends=True), delimiter=max(",;\t", key=first.count)))
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file ({error})") from None


def on_roster(owners: Iterable[str], roster: Iterable[str]) -> dict[str, str]:
    """For each name of a folder the student's name: as the roster spells it, if that is one person without doubt.

    Capitals and spaces do not count, nor does what Moodle adds to a name. Where two folders would be one person's, both
    keep their names: there may be two students of one name.
    """
    owners = list(owners)
    known: dict[str, set[str]] = {}
    for name in roster:
        known.setdefault(_folded(name), set()).add(name)
    found = {}
    for owner in owners:
        moodle = MOODLE.match(owner)
        fitting = known.get(_folded(owner)) or (known.get(_folded(moodle[1])) if moodle else None) or {owner}
        found[owner] = owner if owner in fitting or len(fitting) > 1 else next(iter(fitting))
    often = Counter(found.values())
    return {owner: name if often[name] == 1 or owner == name else owner for owner, name in found.items()}


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())
