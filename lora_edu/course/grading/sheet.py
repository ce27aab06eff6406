"""A CSV file that a program and a teacher both write: the columns named are ours, the rest is the teacher's."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_edu.course.grading.roster import read_rows
from lora_edu.files import write_atomically

FOR_TEACHERS = ("rubric", "remark")  # columns that are theirs to fill in

Cells = dict[str, Any]


class Sheet:
    """One file: the rows that are in it, and how it is written.

    Args:
        path: the file, which need not be there yet.
        columns: ours, in their order; columns of the teacher's own come after them.
        dropped: columns of an earlier run that are not wanted again.

    Attributes:
        old: the rows that are in the file.

    Raises:
        ValueError: if there is a file that is no such table.
    """

    def __init__(self, path: Path, columns: Iterable[str], dropped: Iterable[str] = ()):
        self.path, self.columns = path, [*columns]
        rows = read_rows(path) if path.exists() else []
        header: list[str] = []
        for index in range(max(map(len, rows), default=0)):
            name = rows[0][index].strip() if index < len(rows[0]) else ""
            header.append(name if name and name not in header else f"{name or 'column'} {index + 1}")
        if rows and "student" not in header:
            raise ValueError(f"{path} is there already and is no table of lora-edu grade: name another file")
        self.added = [name for name in header if name not in {*columns, *dropped}]
        self.old = [dict.fromkeys(header, "") | dict(zip(header, row, strict=False)) for row in rows[1:] if any(row)]

    def written(self, row: Cells) -> Cells:
        """What a teacher wrote into a row."""
        return {name: row[name] for name in (*FOR_TEACHERS, *self.added) if row.get(name)}

    def write(self, rows: Iterable[Cells]) -> None:
        """Write the file whole or not at all, as spreadsheets read it: UTF-8 with a byte-order mark, and commas."""
        text = io.StringIO()
        table = csv.DictWriter(text, [*self.columns, *self.added], "", "ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_atomically(self.path, text.getvalue().encode("utf-8-sig"))
