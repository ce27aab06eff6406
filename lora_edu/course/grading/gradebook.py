"""The two tables of ``lora-edu grade``: a row for each exercise, and beside it a row for each student.

Both are written again, whole, after every notebook, so that Ctrl-C or a power cut loses nothing that was done. What a
teacher wrote into them is read before, and stays with the same student and exercise.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

from lora_edu.course.grading.classroom import Row, short_hash
from lora_edu.course.grading.handed_in import HandedIn
from lora_edu.course.grading.sheet import Cells, Sheet
from lora_edu.course.grading.submissions import checks_of, written_tasks
from lora_edu.course.grading.texts import defused, plain, rounded
from lora_edu.course.notebooks.runs import fingerprint
from lora_edu.course.notebooks.stored import EXERCISES, list_notebooks
from lora_edu.files import ROOT

EXERCISES_SHEET = ("student", "notebook", "exercise", "status", "points", "of", "symptom", "rubric", "remark",
                   "seconds", "file", "file_hash", "seed", "course")  # fmt: skip
STUDENTS_SHEET = ("student", "points", "of", "passed", "exercises"), ("note", "remark", "file_hash", "seed", "course")
VERDICTS = ("passed", "failed", "not done", "error", "timeout", "memory")
LONGEST_CELL = 1000
NO_VERDICT = ("to read", "not graded", "not graded yet", "not handed in", "no longer handed in")


class Gradebook:
    """Both tables. Making one writes them, so that a path that cannot be written is found before anything runs.

    Args:
        path: of the table of exercises; that of students lies beside it.
        found: what the class handed in.
        roster: everybody who takes part, if that is known.
        seed: what the checks draw from.
        exercises: the course's exercise notebooks.
    """

    def __init__(self, path: Path, found: HandedIn, roster: Iterable[str], seed: int, exercises: Path = EXERCISES):
        names = sorted({one.exercise for one in found.submissions})
        self.checks = {name: checks_of(exercises / f"{name}.ipynb") for name in names}
        self.tasks = {name: written_tasks(exercises / f"{name}.ipynb") for name in names}
        self.same: Cells = {"seed": seed, "course": course_version(exercises)}
        self.roster = {_cell(name) for name in roster}
        self.everybody = sorted({_cell(name) for name in found.students} | self.roster, key=_order)
        self.of_exercises = Sheet(path, EXERCISES_SHEET)
        known = [notebook.stem for notebook in list_notebooks(exercises)]
        self.of_students = Sheet(table_of_students(path), [*STUDENTS_SHEET[0], *names, *STUDENTS_SHEET[1]], known)
        self.rows: dict[tuple, Cells] = {_key(row): row for row in self.of_exercises.old}
        self._expect(found)
        self._write()

    def add(self, rows: list[Row]) -> None:
        """Take the rows of one notebook, and write both tables."""
        student, notebook = rows[0].student, rows[0].notebook
        own = {"file": plain(rows[0].file), "file_hash": rows[0].file_hash}
        before = {key for key in self.rows if key[:2] == (_cell(student), notebook)}
        for row in rows:
            said = {name: getattr(row, name) for name in ("status", "points", "of", "symptom", "seconds")}
            before.discard(self._put(student, notebook, row.exercise, **said, **own))
        for task in self.tasks[notebook]:
            before.discard(self._put(student, notebook, task, status="to read", **own))
        self._let_go(before)
        self._write()

    def _expect(self, found: HandedIn) -> None:
        """Say of everybody and everything what can be said before a notebook has run."""
        waiting = {(_cell(one.student), one.exercise): one for one in found.submissions}
        before = {key for key in self.rows if key[:2] not in waiting}
        for one in found.left:
            own = {"file": plain(one.place), "file_hash": short_hash(one.path)}
            before.discard(self._put(one.student, status="not graded", symptom=plain(one.reason), **own))
        for (student, notebook), mine in waiting.items():
            if not any(key[:2] == (student, notebook) for key in self.rows):  # else the last run's rows stay till then
                self._put(student, notebook, status="not graded yet", file=plain(mine.place))
        here = {student for student, _ in waiting} | {_cell(one.student) for one in found.left}
        for name in [*found.students, *self.roster]:
            if _cell(name) not in here:
                before.discard(self._put(name, status="not handed in", symptom="nothing to grade under this name"))
        self._let_go(before)

    def _let_go(self, keys: Iterable[tuple]) -> None:
        """Remove rows of an earlier run, but neither a teacher's own nor those that hold a teacher's words."""
        for key in keys:
            row = self.rows.pop(key)
            if not _is_ours(row):
                self.rows[key] = row
            elif self.of_exercises.written(row):
                self.rows[key] = dict(row, status="no longer handed in", points=0, of=0)

    def _put(self, student: str, notebook: str = "", exercise: str = "", **cells: object) -> tuple:
        """Set a row, and give its key; what a teacher wrote into it stays."""
        about = {"student": student, "notebook": notebook, "exercise": exercise, "points": 0, "of": 0}
        given = about | cells | self.same
        row = {name: _cell(value) if isinstance(value, str) else value for name, value in given.items()}
        self.rows[_key(row)] = row | self.of_exercises.written(self.rows.get(_key(row), {}))
        return _key(row)

    def _write(self) -> None:
        rows = sorted(self.rows.values(), key=lambda row: (not _is_ours(row), _order(str(row["student"])), _key(row)))
        self.of_exercises.write(rows)
        mine: dict[object, list[Cells]] = {name: [] for name in self.everybody}
        for row in rows:
            mine.get(row["student"], []).append(row)
        before = {row["student"]: row for row in self.of_students.old}
        table = [self._student(name, mine[name], before.pop(name, {})) for name in self.everybody]
        kept = [row for row in before.values() if not row.get("course") or self.of_students.written(row)]
        self.of_students.write([*table, *kept])

    def _student(self, name: str, rows: list[Cells], before: Cells) -> Cells:
        """The row of one student: points, of those for all notebooks that anybody handed in."""
        graded = [row for row in rows if row["status"] in VERDICTS]
        points = {notebook: rounded(sum(_number(row["points"]) for row in graded if row["notebook"] == notebook))
                  for notebook in self.checks if any(row["notebook"] == notebook for row in graded)}  # fmt: skip
        checks = [check for each in self.checks.values() for check in each]
        statuses = [row["status"] for row in rows]
        notes = ["not on the roster"] if self.roster and name not in self.roster else []
        for status in ("not graded yet", "not graded", "not handed in"):
            if count := statuses.count(status):
                notes.append(status if status == "not handed in" else f"{status}: {count} (see the other table)")
        return {
            "student": name,
            "points": rounded(sum(points.values())),
            "of": rounded(sum(check.worth for check in checks)),
            "passed": statuses.count("passed"),
            "exercises": len(checks),
            **points,
            "note": "; ".join(notes),
            "file_hash": " ".join(dict.fromkeys(str(row["file_hash"]) for row in graded)),
            **self.same,
            **self.of_students.written(before),
        }


def table_of_students(path: Path) -> Path:
    """Where the table of students lies, beside that of exercises."""
    return path.with_name(f"{path.stem}-students{path.suffix}")


def course_version(exercises: Path = EXERCISES) -> str:
    """The course's version, and the beginning of a hash of its code and exercises: "0.1.0+3fa29c0d"."""
    try:
        version = importlib.metadata.version("lora-edu")
    except importlib.metadata.PackageNotFoundError:  # it runs from its folder
        version = "0"
    code = fingerprint((ROOT / "lora_edu").rglob("*.py")) + fingerprint(list_notebooks(exercises), exercises)
    return f"{version}+{hashlib.sha256(code.encode()).hexdigest()[:8]}"


def _cell(text: str) -> str:
    return defused(plain(text, LONGEST_CELL))


def _is_ours(row: Cells) -> bool:
    return row.get("status") in (*VERDICTS, *NO_VERDICT)


def _key(row: Cells) -> tuple:
    """What a row is about: an exercise, or else a file."""
    last = "" if row.get("exercise") else row.get("file", "")
    return tuple(str(cell or "") for cell in (row["student"], row.get("notebook"), row.get("exercise"), last))


def _order(name: str) -> tuple[str, str]:
    return name.casefold(), name


def _number(cell: object) -> float:
    """A cell that a spreadsheet may have written, with a decimal comma too."""
    try:
        return float(str(cell).replace(",", "."))
    except ValueError:
        return 0
