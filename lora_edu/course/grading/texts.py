"""What students wrote, made fit to print, to stand in a spreadsheet, and to name a file."""

import re
import unicodedata

LONGEST = 200  # characters of a symptom in the table
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I)  # names that Windows keeps for devices


def plain(text: str, longest: int = LONGEST) -> str:
    """One line of printable characters: a symptom may quote what a student wrote."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def defused(text: str) -> str:
    """A text for a cell of a spreadsheet: one that it would take for a formula gets an apostrophe.

    What counts is the first character in any width: some spreadsheets calculate "＝1+1" too.
    """
    first = unicodedata.normalize("NFKC", text[:1])
    return f"'{text}" if first in ("=", "+", "-", "@", "\t", "\r", "\n") else text


def rounded(number: float) -> float:
    """A number of points, with at most two decimals, and none if it is whole."""
    number = round(float(number), 2)
    return int(number) if number.is_integer() else number


def file_name(text: str) -> str:
    """A name for a file or a folder on any system, from a student's name: it leads nowhere else."""
    name = re.sub(r'[<>:"/\\|?*]', "_", plain(text, 100)).strip(" .")
    return f"_{name}" if not name or RESERVED.fullmatch(name) else name
